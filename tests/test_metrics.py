import numpy as np
import pytest
import scipy.ndimage
import skimage.measure
import skimage.segmentation
import sklearn.metrics

from f2pad_jax.images import contact_sheet, gallery, overlay
from f2pad_jax.images.metrics import aupro, auroc, average_precision, best_threshold, boundary_f1, dice, f1_max, iou
from f2pad_jax.images.pictures import OUTLINE, to_uint8


def random_masks(seed):
    rng = np.random.default_rng(seed)
    return rng.random((2, 20, 30)) < rng.uniform(0.05, 0.95, (2, 1, 1))


@pytest.mark.parametrize("seed", range(5))
def test_iou_and_dice_equal_scikit_learns(seed):
    mask, truth = random_masks(seed)
    assert iou(mask, truth) == pytest.approx(sklearn.metrics.jaccard_score(truth.ravel(), mask.ravel()), rel=1e-12)
    assert dice(mask, truth) == pytest.approx(sklearn.metrics.f1_score(truth.ravel(), mask.ravel()), rel=1e-12)


@pytest.mark.parametrize("metric", [iou, dice])
def test_agreement_is_one_and_disagreement_zero(metric):
    mask = random_masks(0)[0]
    nothing = np.zeros_like(mask)
    assert metric(mask, mask) == 1
    assert metric(mask, ~mask) == 0
    assert metric(nothing, nothing) == 1
    assert metric(nothing, mask) == metric(mask, nothing) == 0
    assert isinstance(metric(mask, mask), float)


def f1_above(threshold, maps, truth):
    return sklearn.metrics.f1_score(truth.ravel(), maps.ravel() > threshold, zero_division=0.0)


def brute_force(maps, truth):
    """The best F1 of any threshold: below all values, or at one of them."""
    thresholds = [maps.min() - 1, *np.unique(maps)]
    return max(f1_above(t, maps, truth) for t in thresholds)


def blurred_truth(seed, shape=(3, 8, 9)):
    rng = np.random.default_rng(seed)
    truth = rng.random(shape) < 0.3
    return (truth + rng.normal(0, 0.6, shape)).astype(np.float32), truth


@pytest.mark.parametrize("seed", range(5))
def test_best_threshold_reaches_the_best_f1_of_all_thresholds(seed):
    maps, truth = blurred_truth(seed)
    assert f1_above(best_threshold(maps, truth), maps, truth) == pytest.approx(brute_force(maps, truth), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_best_threshold_agrees_with_the_precision_recall_curve(seed):
    maps, truth = blurred_truth(seed, (4, 40, 50))
    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(truth.ravel(), maps.ravel())
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = np.argmax(f1[:-1])
    below = maps[maps < thresholds[best]].max()  # scikit-learn calls a value positive where it reaches the threshold
    assert below <= best_threshold(maps, truth) < thresholds[best]


@pytest.mark.parametrize("levels", [2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_ties_are_kept_together(seed, levels):
    maps, truth = blurred_truth(seed)
    maps = np.clip(np.round(maps * levels / 2), 0, levels)
    assert f1_above(best_threshold(maps, truth), maps, truth) == pytest.approx(brute_force(maps, truth), rel=1e-12)


def test_one_value_everywhere_calls_all_of_it_anomalous():
    maps, truth = np.full((2, 4, 4), 0.3, np.float32), np.zeros((2, 4, 4), bool)
    truth[0, 0, 0] = True
    assert np.all(maps > best_threshold(maps, truth))


def test_everything_positive_is_all_above_the_threshold():
    maps = np.random.default_rng(0).random((2, 4, 4)).astype(np.float32)
    assert np.all(maps > best_threshold(maps, np.ones(maps.shape, bool)))


def test_without_positives_nothing_exceeds_the_threshold():
    maps = np.random.default_rng(0).random((2, 4, 4)).astype(np.float32)
    assert not np.any(maps > best_threshold(maps, np.zeros(maps.shape, bool)))


def test_separable_values_are_parted_in_the_middle():
    maps = np.array([[[0.0, 1.0], [3.0, 4.0]]], np.float32)
    assert best_threshold(maps, maps > 2) == 2.0


def test_neighbouring_single_precision_values_are_parted():
    maps = np.array([[[np.nextafter(np.float32(1), np.float32(0)), 1.0, 0.0]]], np.float32)
    truth = np.array([[[False, True, False]]])
    np.testing.assert_array_equal(maps > best_threshold(maps, truth), truth)


def picture(shape=(40, 60)):
    return np.random.default_rng(0).integers(0, 200, (*shape, 3)).astype(np.uint8)


def test_overlay_tints_the_mask_outlines_it_and_leaves_the_rest():
    image, mask = picture(), np.zeros((40, 60), bool)
    mask[10:20, 15:30] = True
    kept = image.copy()
    found = overlay(image, mask)
    rim = scipy.ndimage.binary_dilation(mask) & ~mask
    assert found.shape == image.shape and found.dtype == np.uint8
    np.testing.assert_array_equal(found[~mask & ~rim], image[~mask & ~rim])
    np.testing.assert_array_equal(found[rim], np.broadcast_to(OUTLINE, (rim.sum(), 3)))
    np.testing.assert_allclose(found[mask], 0.65 * image[mask] + 0.35 * np.array(OUTLINE), atol=1)
    np.testing.assert_array_equal(image, kept)


def test_the_outline_of_a_large_picture_is_thicker():
    image, mask = picture((900, 900)), np.zeros((900, 900), bool)
    mask[300:500, 300:500] = True
    row = overlay(image, mask)[400]
    assert np.all(row[297:300] == OUTLINE) and not np.any(np.all(row[:297] == OUTLINE, axis=-1))


def test_a_contact_sheet_has_rows_of_pictures_over_their_captions():
    grey = [np.full((20, 10 + 30 * (number == 4)), 50 * number + 50, np.uint8) for number in range(5)]
    texts = [("a", "black"), ("b", "#c11"), ("c", "black"), ("", "black"), ("long" * 40, "black")]
    found = contact_sheet(grey, texts, columns=3, cell=40)
    assert found.shape == (2 * 68 + 8, 3 * 48 + 8, 3)
    for number in range(5):
        top, left = 8 + number // 3 * 68, 8 + number % 3 * 48
        assert abs(int(found[top + 20, left + 20, 0]) - (50 * number + 50)) <= 1  # pictures keep their shape
        assert (found[top + 40 : top + 60, left : left + 40] < 200).any() == (number != 3)
    assert (found[:, 3 * 48 :] == 255).all() and (found[76:, 2 * 48 + 8 :] == 255).all()


def test_overlay_of_an_empty_mask_is_the_image():
    np.testing.assert_array_equal(overlay(picture(), np.zeros((40, 60), bool)), picture())


def test_overlay_takes_floats():
    mask = np.zeros((40, 60), bool)
    mask[5:9, 5:9] = True
    np.testing.assert_array_equal(overlay(picture() / np.float32(255), mask), overlay(picture(), mask))


def test_every_kind_of_picture_becomes_8_bit_rgb():
    mask = np.eye(5, dtype=bool)
    np.testing.assert_array_equal(to_uint8(mask), np.repeat(255 * np.eye(5, dtype=np.uint8)[..., None], 3, -1))
    np.testing.assert_array_equal(to_uint8(picture()[..., 0]), np.repeat(picture()[..., :1], 3, -1))
    np.testing.assert_array_equal(to_uint8(np.array([[-1.0, 0.5, 2.0]]))[0, :, 0], [0, 128, 255])


def test_gallery_is_a_grid_with_every_image_in_its_cell():
    colours = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]], [[0, 250, 250], [250, 0, 250]]], np.uint8)
    rows = [[np.broadcast_to(colour, (30, 50, 3)) for colour in row] for row in colours]
    found = gallery(rows, ["left", "right"], ["one", "two\nlines", "three"], cell=60)
    assert found.dtype == np.uint8 and found.shape == (26 + 3 * 66 + 6, 124 + 2 * 66 + 6, 3)
    for r in range(3):
        for c in range(2):
            tile = found[26 + r * 66 :, 124 + c * 66 :][:60, :60]
            np.testing.assert_array_equal(tile, np.broadcast_to(colours[r, c], (60, 60, 3)))
    assert np.any(found[:26, 124:] < 128) and np.any(found[26:, :124] < 128)  # titles and labels


def test_gallery_takes_masks_grey_and_floats_of_any_size():
    mask = np.zeros((7, 9), bool)
    mask[3:, :] = True
    found = gallery([[mask, picture(), np.full((5, 5), 0.5), picture()[..., 0]]], list("abcd"), ["x"], cell=40)
    assert found.shape == (26 + 46 + 6, 124 + 4 * 46 + 6, 3)
    assert set(np.unique(found[26:66, 124:164])) == {0, 255}  # a mask stays black and white


def test_gallery_refuses_rows_without_labels():
    with pytest.raises(ValueError):
        gallery([[picture()], [picture()]], ["a"], ["only one"])


def test_what_holds_at_every_threshold_equals_scikit_learns():
    maps, truth = blurred_truth(3, (4, 20, 25))
    flat = truth.ravel(), maps.ravel()
    assert f1_max(maps, truth) == pytest.approx(brute_force(maps, truth), rel=1e-12)
    assert average_precision(maps, truth) == pytest.approx(sklearn.metrics.average_precision_score(*flat), rel=1e-12)
    assert auroc(maps, truth) == pytest.approx(sklearn.metrics.roc_auc_score(*flat), rel=1e-12)
    assert all(np.isnan(measure(maps, truth & False)) for measure in (average_precision, auroc, aupro))


def overlap_curve(maps, truth):
    """False positive rate and mean overlap of regions, threshold by threshold, by scikit-image's labels."""
    regions = [
        (k, labels == i)
        for k, labels in enumerate(skimage.measure.label(mask, connectivity=2) for mask in truth)
        for i in range(1, labels.max() + 1)
    ]
    thresholds = [np.inf, *np.unique(maps)[::-1]]
    fpr = np.array([(maps >= t)[~truth].mean() for t in thresholds])
    pro = np.array([np.mean([(maps[k] >= t)[region].mean() for k, region in regions]) for t in thresholds])
    return fpr, pro


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_integrates_the_curve_of_regions_found(seed, limit):
    rng = np.random.default_rng(seed)
    truth = scipy.ndimage.gaussian_filter(rng.standard_normal((3, 12, 14)), (0, 1.5, 1.5)) > 0.15
    maps = np.round(4 * (truth + rng.normal(0, 0.6, truth.shape))) / 4  # with ties
    fpr, pro = overlap_curve(maps, truth)
    grid = np.linspace(0, limit, 200_001)
    expected = np.interp(grid, fpr, pro).mean()
    assert aupro(maps, truth, max_fpr=limit) == pytest.approx(expected, abs=2e-3)


def test_aupro_weighs_regions_alike_whatever_their_size():
    truth = np.zeros((1, 20, 20), bool)
    truth[0, :10, :10] = truth[0, 15, 15] = True
    large = np.zeros((1, 20, 20), np.float32)
    large[0, :10, :10] = 1
    assert aupro(truth.astype(np.float32), truth) == pytest.approx(1)
    # the other region is found last, along with all that is normal
    assert aupro(large, truth) == pytest.approx(0.5 + 0.5 * 0.3 / 2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tolerance", [0, 1, 2, 3])
def test_boundary_f1_equals_the_distances_between_scikit_images_outlines(seed, tolerance):
    rng = np.random.default_rng(seed)
    masks = [scipy.ndimage.gaussian_filter(rng.standard_normal((30, 40)), 3) > 0.02 for _ in range(2)]
    points = [np.argwhere(skimage.segmentation.find_boundaries(m, connectivity=1, mode="inner")) for m in masks]
    distances = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    precision, recall = (distances.min(1) <= tolerance).mean(), (distances.min(0) <= tolerance).mean()
    assert boundary_f1(*masks, tolerance) == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-12)


def test_boundary_f1_of_a_mask_moved_by_two_pixels():
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    moved, nothing = np.roll(mask, 2, axis=1), mask & False
    assert boundary_f1(mask, mask, 0) == 1 == boundary_f1(mask, moved, 2) == boundary_f1(nothing, nothing, 1)
    assert boundary_f1(mask, moved, 1) < 0.6
    assert boundary_f1(mask, nothing, 3) == boundary_f1(nothing, mask, 3) == 0
