import numpy as np
import pytest
import scipy.ndimage

from f2pad_jax.data import load_texture
from f2pad_jax.evaluation.peers import core, grabcut, guided_mask, mebin, walker_mask
from f2pad_jax.images.metrics import iou


@pytest.fixture(scope="module")
def pasted():
    """A flat patch on a texture, its mask, a coarse mask shifted off it and the region around both."""
    test = load_texture("grass", size=96, num_train=2, num_test=1).test[0]
    coarse = np.roll(scipy.ndimage.binary_dilation(test.mask, iterations=4), (3, -3), axis=(0, 1))
    region = scipy.ndimage.binary_dilation(coarse | test.mask, iterations=6)
    return np.asarray(test.image, np.float32) / (255 if test.image.dtype == np.uint8 else 1), test.mask, coarse, region


def test_peers_move_the_outline_towards_a_flat_patch(pasted):
    image, truth, coarse, region = pasted
    assert iou(guided_mask(image, coarse), truth) > iou(coarse, truth)
    walked = walker_mask(image, coarse, region)
    assert iou(walked, truth) > iou(coarse, truth) and not walked[~region].any() and walked[core(coarse)].all()
    pytest.importorskip("cv2")
    found = grabcut(image, coarse, region)
    assert iou(found, truth) > iou(coarse, truth) and not found[~region].any()
    np.testing.assert_array_equal(grabcut(image, coarse, region), found)


def test_the_core_is_the_deepest_quarter():
    disc = np.hypot(*(np.mgrid[:41, :41] - 20)) < 16
    found = core(disc)
    assert 0.25 <= found.sum() / disc.sum() < 0.33 and found[20, 20] and np.hypot(*(np.argwhere(found) - 20).T).max() < 9.5


def test_nothing_becomes_nothing(pasted):
    image, _, coarse, region = pasted
    assert not walker_mask(image, coarse & ~coarse, region).any()
    pytest.importorskip("cv2")
    assert not grabcut(image, coarse & ~coarse, region).any()


def test_mebin_keeps_what_stands_out_at_most_thresholds():
    y, x = np.mgrid[:40, :40]
    noise = scipy.ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((40, 40)), 1)
    peaks = np.exp(-((y - 10) ** 2 + (x - 12) ** 2) / 15) + np.exp(-((y - 30) ** 2 + (x - 25) ** 2) / 15)
    found = mebin(peaks + 0.1 * noise, 0.0, 1.0, erosion=2)
    assert scipy.ndimage.label(found)[1] == 2 and found[10, 12] and found[30, 25] and found.mean() < 0.2
    assert not mebin(0.1 * noise, 0.0, 1.0, erosion=2).any()  # below nearly every threshold: a good image
    # by hand, without erosion: parts at 0.875, 0.75, ..., 0 are 0 1 1 1 1 2 2 1; four levels, the last of them 0.375
    line = np.array([[0.8, 0.0, 0.3, 0.0]])
    assert np.array_equal(mebin(np.maximum(line, 0.05), 0.0, 1.0, num_levels=8, erosion=1), line > 0.375)
    assert not mebin(np.maximum(line, 0.05), 0.0, 1.0, num_levels=8, min_length=5, erosion=1).any()


def test_mebin_counts_and_returns_eroded_parts():
    """Of two plateaus, erosion removes the narrow one: one part remains at all levels, eroded as OpenCV does it."""
    plateaus = np.zeros((30, 40))
    plateaus[5:20, 5:20], plateaus[5:20, 30:34] = 1.0, 0.9
    found = mebin(plateaus, 0.0, 1.0)
    cv2 = pytest.importorskip("cv2")
    eroded = cv2.erode((plateaus > 0.5).astype(np.uint8), np.ones((6, 6), np.uint8)) > 0
    np.testing.assert_array_equal(found, eroded)
    assert found.sum() == 10 * 10
