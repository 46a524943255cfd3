"""The size at which a detector sees the images."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import smooth_image

from f2pad_jax import fit
from f2pad_jax.backbones.backbone import in_tiles
from f2pad_jax.commands import main
from f2pad_jax.detectors import NormalImages, PatchCore, base, load_detector
from f2pad_jax.detectors.base import counted, extract
from f2pad_jax.detectors.calibration import faint_defects, sampled_pixels
from f2pad_jax.detectors.resolution import LARGEST, PEEKED, SEEN, detector_size, ignored_pixels, peeked
from f2pad_jax.errors import OptionError
from f2pad_jax.images import MEAN, STD, write_png


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("size", [None, 64, 300, 1000])
@pytest.mark.parametrize("seed", range(20))
def test_sides_are_multiples_with_the_aspect_ratio_and_never_enlarged(seed, size, stride):
    height, width = np.random.default_rng(seed).integers(16, 4000, 2).tolist()
    found = detector_size((height, width), stride, size)
    assert all(side % stride == 0 and side > 0 for side in found)
    assert all(side <= own or own < stride for side, own in zip(found, (height, width), strict=True))
    scale = min((size or LARGEST) / math.sqrt(height * width), 1)
    for side, own in zip(found, (height, width), strict=True):
        assert abs(side - scale * own) < stride or side == stride


@pytest.mark.parametrize(
    ("own", "size"),
    [((224, 224), (224, 224)), ((640, 640), (448, 448)), ((1260, 500), (704, 288)), ((320, 297), (320, 288))],
)
def test_small_images_keep_their_size_and_large_ones_their_shape(own, size):
    assert detector_size(own, 16) == size


def test_the_smallest_defect_chooses_the_size():
    assert detector_size((2000, 2000), 16, smallest_defect=SEEN) == (2000, 2000)
    assert detector_size((2000, 1000), 16, smallest_defect=5 * SEEN) == (400, 192)
    assert detector_size((640, 640), 16, smallest_defect=1.0) == (640, 640), "never enlarged"


@pytest.mark.parametrize("wrong", [{"size": 0}, {"smallest_defect": 0.0}, {"smallest_defect": float("nan")}, {"size": -3}])
def test_sizes_that_are_not_positive_are_refused(wrong):
    with pytest.raises(OptionError, match="must be positive"):
        detector_size((100, 100), 16, **wrong)


def test_the_own_size_is_the_median_of_the_first_images():
    images = [np.zeros((h, w, 3)) for h, w in ((10, 20), (30, 50), (20, 40))]
    own, rest = peeked(iter(images))
    assert own == (20, 40) and [i.shape for i in rest] == [i.shape for i in images]
    many = [np.zeros((8, 8))] * PEEKED + [np.zeros((99, 99))] * 50
    assert peeked(many)[0] == (8, 8) and len(list(peeked(many)[1])) == len(many)
    assert peeked(np.zeros((5, 7, 9, 3)))[0] == (7, 9)


def test_a_fit_keeps_the_aspect_ratio(shallow_backbone):
    images = [np.asarray(smooth_image(seed, 64))[:48] for seed in range(3)]
    options = {"num_components": 1, "features_only": True}
    assert fit(PatchCore, np.stack(images), shallow_backbone, size=40, **options).size == (32, 48)
    assert fit(PatchCore, images, shallow_backbone, smallest_defect=2 * SEEN, **options).size == (24, 32)
    with pytest.raises(OptionError, match="not both"):
        fit(PatchCore, images, shallow_backbone, size=(48, 64), smallest_defect=10)


@pytest.mark.parametrize(("options", "size"), [(["--size", "auto"], (48, 64)), (["--size", "32x48"], (32, 48))])
def test_the_command_takes_a_size(options, size, tmp_path, capsys):
    for seed in range(3):
        write_png(tmp_path / "good" / f"{seed}.png", np.asarray(smooth_image(seed, 64))[:48])
    model = tmp_path / "x.model"
    command = ["fit", str(tmp_path / "good"), "--out", str(model), "--layers", "stage1", "stage2", *options]
    assert main(command) == 0
    assert load_detector(model).size == size
    assert f"3 normal images at {size[0]}x{size[1]} pixels" in capsys.readouterr().out
    chart = (tmp_path / "x.model.svg").read_text()
    assert "normal images" in chart and "synthetic defects" in chart and chart.count("<rect") > 4


@pytest.mark.parametrize("text", ["0", "3x", "1x2x3", "big"])
def test_wrong_sizes_are_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", str(tmp_path), "--out", str(tmp_path / "x"), "--size", text])
    assert "--size" in capsys.readouterr().err


def test_a_border_and_a_mask_do_not_count():
    assert ignored_pixels(None, 0, (64, 64), (32, 32)) is None
    found = ignored_pixels(None, 8, (64, 128), (32, 32))
    expected = np.ones((32, 32), bool)
    expected[4:-4, 2:-2] = False
    np.testing.assert_array_equal(found, expected)
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    half = ignored_pixels(mask, 0, (64, 64), (32, 32))
    assert half[:16].all() and not half[17:].any()  # a pixel to which any ignored pixel contributes does not count
    for wrong in ((np.ones((8, 8), bool), 0), (None, 40), (None, -1)):
        with pytest.raises(OptionError, match=r"border|pixel"):
            ignored_pixels(*wrong, (64, 64), (32, 32))


def test_ignored_pixels_have_the_mean_of_the_others():
    values = np.arange(12.0).reshape(3, 4).astype(np.float32)
    ignored = values > 8
    np.testing.assert_allclose(counted(jnp.asarray(values), jnp.asarray(ignored)), np.where(ignored, 4.0, values))
    assert counted(jnp.asarray(values), None) is not None


def test_ignored_pixels_are_no_part_of_the_calibration(shallow_backbone):
    """A corner that is white in every image: no white pixel is drawn for the prior, and no synthetic defect lies there."""
    images = [np.array(smooth_image(seed, 64)) * 0.8 for seed in range(6)]
    for image in images:
        image[:24, :24] = 1.0
    mask = np.zeros((64, 64), bool)
    mask[:24, :24] = True
    normals = NormalImages(images, (64, 64), mask)
    assert normals.subset([1, 2]).ignored is mask
    white = (1 - MEAN) / STD
    for ignored, drawn in ((mask, False), (None, True)):
        pixels = sampled_pixels(np.random.default_rng(0), normals.stored, ignored)
        assert np.any(np.all(np.abs(pixels - white) < 1e-3, axis=1)) == drawn
    for k, defective in enumerate(faint_defects(normals, 0).stored):
        assert (defective[4:20, 4:20] == normals.stored[k % 6][4:20, 4:20]).all()
    found = fit(PatchCore, images, shallow_backbone, size=(64, 64), num_components=1, ignore=mask).calibrated
    np.testing.assert_array_equal(found.ignored, mask)


@pytest.mark.parametrize("size", [(320, 192), (64, 512), (208, 208)])
def test_maps_of_a_large_image_have_no_seams(shallow_backbone, size):
    """Tile by tile or at once: equal maps at every position, also at the seams and beside the border."""
    image = np.random.default_rng(0).standard_normal((*size, 3)).astype(np.float32)
    whole = jax.jit(lambda x: shallow_backbone(x))(image)
    tiles = jax.jit(lambda x: in_tiles(shallow_backbone, x, tile=96, margin=64))(image)
    for one, other in zip(whole, tiles, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * float(jnp.abs(one).max()))
    narrow = jax.jit(lambda x: in_tiles(shallow_backbone, x, tile=96, margin=0))(image)
    assert any(np.abs(a - b).max() > 1e-2 * float(jnp.abs(b).max()) for a, b in zip(narrow, whole, strict=True))


def test_a_large_image_is_seen_tile_by_tile(shallow_backbone, monkeypatch):
    image = jnp.asarray(smooth_image(0, 128))
    whole = extract(shallow_backbone, image)
    monkeypatch.setattr(base, "LARGE", 64 * 64)
    monkeypatch.setattr(base, "in_tiles", functools.partial(in_tiles, tile=64, margin=64))
    for one, other in zip(extract(shallow_backbone, image), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * float(jnp.abs(other).max()))
