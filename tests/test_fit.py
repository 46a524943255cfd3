import itertools
from dataclasses import replace
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import calibration, smooth_image
from scipy.spatial.distance import cdist

from f2pad_jax import fit, load_detector, refine, save_detector
from f2pad_jax.backbones import Backbone, load_backbone
from f2pad_jax.data import load_texture
from f2pad_jax.detectors import AbstractDetector, Calibration, NormalImages, PaDiM, PatchCore, calibrate
from f2pad_jax.detectors.base import BORDER
from f2pad_jax.detectors.calibration import EXTENT
from f2pad_jax.detectors.normality import folds
from f2pad_jax.detectors.patchcore import embed
from f2pad_jax.errors import CheckpointError, ImageError, ModelError, OptionError
from f2pad_jax.images import MEAN, STD, normalise, to_unit
from f2pad_jax.images.metrics import iou

SIDE = 64
SIZE = (SIDE, SIDE)
QUICK = {"size": SIZE, "num_components": 1}
"""One Gaussian of pixel values, which takes no time."""
PATCHCORE = {**QUICK, "seed": 3, "max_bank": 60, "num_candidates": 7}


class Blocks(AbstractDetector):
    """A user's own detector: how far the mean colours of blocks, at two sizes, are from those of the images fitted to."""

    backbone: Backbone
    size: tuple[int, int] = eqx.field(static=True)
    known: tuple[jax.Array, ...]
    seen: jax.Array
    power: float = eqx.field(static=True, default=1.0)
    calibration: Calibration | None = None

    refits: ClassVar[bool] = False

    @classmethod
    def default_layers(cls, network, num_images):
        return ("stage3",) if num_images < 5 else ("stage4",)

    @classmethod
    def fit(cls, images, backbone, *, seed, progress, power=1.0):
        means = [[] for _ in SIDES]
        for i, image in enumerate(images):
            progress("blocks", i, len(images))
            for each, side in zip(means, SIDES, strict=True):
                each.append(block_means(image, side).reshape(-1, 3))
        progress("blocks", len(images), len(images))
        seen = np.stack([images.pixels(i) for i in range(len(images))])
        return cls(backbone, images.size, tuple(map(jnp.concatenate, means)), jnp.asarray(seen), power)

    def raw_scores(self, image, context):
        def score(side, known):
            apart = jnp.sum((block_means(image, side)[:, :, None] - known) ** 2, axis=-1)
            return jnp.min(apart, axis=-1) ** self.power

        return tuple(score(side, known) for side, known in zip(SIDES, self.known, strict=True))


class Refitted(Blocks):
    refits: ClassVar[bool] = True


SIDES = (4, 8)


def block_means(image, side):
    h, w, _ = image.shape
    return image.reshape(h // side, side, w // side, side, 3).mean(axis=(1, 3))


@pytest.fixture(scope="module")
def texture():
    return load_texture("brick", size=SIDE, num_train=10, num_test=3)


@pytest.fixture(scope="module")
def stage4():
    return load_backbone("efficientnet-lite0", layers=("stage4",))


@pytest.fixture(scope="module")
def shallow():
    return load_backbone("efficientnet-lite0", layers=("stage2", "stage3"))


@pytest.fixture(scope="module")
def blocks(texture, stage4):
    return fit(Blocks, texture.train, stage4, seed=3, **QUICK)


@pytest.fixture(scope="module")
def other_seed(texture, stage4):
    return fit(Blocks, texture.train, stage4, seed=4, num_exemplars=4, **QUICK)


@pytest.fixture(scope="module")
def squared(texture, stage4):
    return fit(Blocks, texture.train, stage4, seed=3, power=2.0, num_exemplars=0, **QUICK)


@pytest.fixture(scope="module")
def told():
    """What was told of the progress of :func:`patchcore`."""
    return []


@pytest.fixture(scope="module")
def patchcore(texture, shallow, told):
    return fit(PatchCore, texture.train, shallow, progress=lambda *what: told.append(what), **PATCHCORE)


def deep(images):
    """Images as they are kept."""
    return np.stack([image.astype(np.uint16) * 257 for image in images])


# --- what is held out


def held_out_of(count):
    """Indices of the first part, and of the other parts, for seed 3."""
    part = folds(count, 3)[0]
    return part, [i for i in range(count) if i not in part]


def test_a_method_that_does_not_refit_has_not_seen_the_images_held_out(blocks, texture):
    held_out, others = held_out_of(10)
    assert len(held_out) == 2 == len(blocks.calibration.normality.scores)
    np.testing.assert_array_equal(blocks.seen, deep(texture.train)[others])


def test_a_method_that_refits_is_fitted_to_each_four_parts_and_to_all(blocks, texture, stage4):
    told = []
    refitted = fit(Refitted, texture.train, stage4, seed=3, progress=lambda *what: told.append(what), **QUICK)
    np.testing.assert_array_equal(refitted.seen, deep(texture.train))
    assert [what for what in told if what[0].endswith("blocks")] == [
        *(("blocks", i, 10) for i in range(11)),
        *((f"fold {k} of 5: blocks", i, 8) for k in range(1, 6) for i in range(9)),
    ]
    np.testing.assert_array_equal(refitted.calibration.scale, blocks.calibration.scale)
    assert len(refitted.calibration.normality.scores) == 10


# --- calibration


def test_the_scale_is_the_mean_raw_score_of_the_images_held_out(blocks, texture):
    """The mean over all positions of both sizes of block, in NumPy."""
    held_out, others = held_out_of(10)
    images = (np.stack(texture.train) / 255 - MEAN) / STD

    def colours(i, side):
        n = SIDE // side
        return images[i].reshape(n, side, n, side, 3).mean(axis=(1, 3)).reshape(-1, 3)

    scores = [
        cdist(colours(i, side), np.concatenate([colours(j, side) for j in others]), "sqeuclidean").min(axis=1)
        for side in SIDES
        for i in held_out
    ]
    assert float(blocks.calibration.scale) == pytest.approx(np.mean(np.concatenate(scores)), rel=1e-4)


def test_the_scale_of_patchcore_is_the_mean_distance_of_the_images_held_out(patchcore, texture, shallow):
    held_out, others = held_out_of(10)
    bank = PatchCore.fit(NormalImages([texture.train[i] for i in others], SIZE), shallow, seed=3, max_bank=60).memory_bank
    images = [normalise(to_unit(texture.train[i])) for i in held_out]
    features = np.concatenate([np.asarray(jax.jit(embed)(shallow, image)).reshape(-1, bank.shape[1]) for image in images])
    expected = np.mean(cdist(features, bank, "sqeuclidean").min(axis=1))
    assert float(patchcore.calibration.scale) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["blocks", "patchcore"])
def test_the_threshold_lies_between_ordinary_and_defective_levels(name, texture, request):
    detector = request.getfixturevalue(name)
    threshold = float(detector.calibration.threshold)
    assert np.isfinite(threshold)
    anomaly_map = jax.jit(type(detector).anomaly_map)
    held_out, _ = held_out_of(10)
    ordinary = np.stack([anomaly_map(detector, normalise(to_unit(texture.train[i]))) for i in held_out])
    assert np.median(ordinary) < threshold
    for test in texture.test:
        found = np.asarray(anomaly_map(detector, normalise(to_unit(test.image))))
        assert found[test.mask].max() > threshold
        mask = np.asarray(detector.coarse_mask(jnp.asarray(found)))
        assert mask[test.mask].any() and mask.mean() < 0.5
        assert mask[test.mask].mean() > 2 * mask[~test.mask].mean()


class Colour(AbstractDetector):
    """A user's own detector, without a backbone: how far each pixel is from one colour."""

    backbone: Backbone | None
    size: tuple[int, int] = eqx.field(static=True)
    colour: jax.Array
    calibration: Calibration | None = None

    @classmethod
    def fit(cls, images, backbone, *, seed=0, progress=None):
        return cls(backbone, images.size, jnp.mean(jnp.stack([*images]), axis=(0, 1, 2)))

    def raw_scores(self, image, context):
        return (jnp.sum((image - self.colour) ** 2, axis=-1),)

    def anomaly_map(self, image):
        return self.scores(image, None)[0]


def coarse_oracle(anomaly_map, calibration):
    """Above the middle between the ordinary level and the map's maximum, and above the border if any pixel is."""
    ordinary, highest = float(calibration.ordinary), float(anomaly_map.max())
    border = ordinary + BORDER * (float(calibration.threshold) - ordinary)
    middle = max((ordinary + highest) / 2, ordinary)
    return (anomaly_map > middle) & ((anomaly_map > border) | (highest <= border))


@pytest.fixture(scope="module")
def thirds():
    """A detector that tells 3 from what is ordinary, which is 1."""
    return Colour(None, (32, 32), jnp.zeros(3), calibration(ordinary=1.0, threshold=3.0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("peak", [0.5, 2.9, 3.1, 4.9, 5.1, 20.0, 500.0])
def test_the_coarse_mask_is_above_the_border_and_half_way_from_the_ordinary_level(thirds, peak, seed):
    levels = smooth_image(seed, 32)[..., 0]
    levels = peak * levels / levels.max()
    mask = np.asarray(jax.jit(Colour.coarse_mask)(thirds, jnp.asarray(levels)))
    np.testing.assert_array_equal(mask, coarse_oracle(levels, thirds.calibration))
    assert mask.any() == (peak > 1)


def test_of_a_faint_map_the_border_alone_decides(thirds):
    assert pytest.approx(2.4286, abs=1e-4) == 1 + 2 * BORDER
    levels = jnp.asarray([[1.0, 2.42, 2.5], [3.8, 2.3, -1.0]])
    np.testing.assert_array_equal(thirds.coarse_mask(levels), [[False, False, True], [True, False, False]])


@pytest.mark.parametrize(("peak", "height"), [(3.8, 2 / (2 * BORDER)), (20.0, 2 / 9.5)])
def test_the_threshold_is_told_on_the_scale_of_the_border(thirds, peak, height):
    """A part of a mask has a pixel above the threshold; of a faint map, a pixel of m0 is enough."""
    _, threshold = thirds.excess(jnp.asarray([[1.0, peak]]))
    assert float(threshold) == pytest.approx(min(height, 1), rel=1e-5)


def test_of_a_glaring_map_half_the_height_decides(thirds):
    levels = jnp.asarray([[1.0, 20.0, 10.4], [10.6, 3.1, -1.0]])
    np.testing.assert_array_equal(thirds.coarse_mask(levels), [[False, True, False], [True, False, False]])


def test_nothing_is_masked_below_the_threshold_wherever_the_ordinary_level_is(thirds):
    detector = replace(thirds, calibration=calibration(ordinary=5.0, threshold=3.0))
    assert not np.asarray(detector.coarse_mask(jnp.full((4, 4), 2.0))).any()


@pytest.fixture(scope="module")
def normals():
    """Five normal images of little contrast, of which the last two are held out."""
    return NormalImages([0.4 + 0.2 * smooth_image(seed, 32) for seed in range(5)], (32, 32))


@pytest.fixture(scope="module")
def calibrated(normals):
    """A detector calibrated on two images."""
    detector = Colour.fit(normals.subset([0, 1, 2]), None)
    return calibrate(detector, normals.subset([3, 4]), others=normals.subset([0, 1, 2]), num_components=1)


def distances(images, normals):
    """Squared distance of each pixel to the mean colour of the first three images, of images in 0..1."""
    colour = np.mean([(normals.pixels(i) / 65535 - MEAN) / STD for i in range(3)], axis=(0, 1, 2))
    return np.sum(((np.asarray(images) - MEAN) / STD - colour) ** 2, axis=-1)


def test_scale_and_ordinary_level_are_those_of_the_images_held_out(calibrated, normals):
    raw = distances([normals.pixels(i) / 65535 for i in (3, 4)], normals)
    assert float(calibrated.calibration.scale) == pytest.approx(raw.mean(), rel=1e-5)
    assert float(calibrated.calibration.ordinary) == pytest.approx(1.0, rel=1e-5)  # a map of scores over their mean


def test_the_ordinary_level_is_the_mean_level_of_the_maps(normals):
    """... whatever maps have to do with scores."""

    class Sharper(Colour):
        def anomaly_map(self, image):
            return self.scores(image, None)[0] ** 2

    found = calibrate(Sharper.fit(normals.subset([0, 1, 2]), None), normals.subset([3, 4]), num_components=1).calibration
    raw = distances([normals.pixels(i) / 65535 for i in (3, 4)], normals)
    assert float(found.ordinary) == pytest.approx(np.mean((raw / raw.mean()) ** 2), rel=1e-4)


def test_the_threshold_is_a_share_of_the_way_to_the_limit_of_the_maxima(calibrated, normals):
    found = calibrated.calibration
    maps = distances([normals.pixels(i) / 65535 for i in (3, 4)], normals) / float(found.scale)
    limit = np.quantile(maps.max(axis=(1, 2)), 0.95)
    assert float(found.threshold) == pytest.approx(maps.mean() + EXTENT * (limit - maps.mean()), rel=2e-3)
    assert maps.mean() < float(found.threshold) < limit


def test_calibration_is_reproducible_by_its_seed_and_replaces_the_one_before(calibrated, normals):
    parts = {"others": normals.subset([0, 1, 2]), "num_components": 1}
    again, other = (calibrate(calibrated, normals.subset([3, 4]), seed=seed, **parts).calibration for seed in (0, 1))
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(calibrated.calibration), strict=True):
        np.testing.assert_array_equal(one, two)
    assert other.threshold == again.threshold and other.scale == again.scale
    assert not np.array_equal(other.prior.means, again.prior.means)


def test_scores_are_raw_over_the_scale_and_raw_before_calibration(blocks, texture):
    image = normalise(to_unit(texture.test[0].image))
    uncalibrated = replace(blocks, calibration=None)
    raw = blocks.raw_scores(image, None)
    for found, expected in itertools.chain(
        zip(blocks.scores(image, None), [r / blocks.calibration.scale for r in raw], strict=True),
        zip(uncalibrated.scores(image, None), raw, strict=True),
    ):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="Blocks is not calibrated"):
        refine(uncalibrated, texture.test[0].image)


def test_no_more_training_images_are_kept_than_asked_for(other_seed, squared, texture):
    kept = other_seed.calibration.normals
    assert kept.dtype == np.uint8 and kept.shape == (4, *SIZE, 3)
    assert len({np.asarray(image).tobytes() for image in kept} & {image.tobytes() for image in texture.train}) == 4
    assert squared.calibration.normals is None


# --- options


def test_options_reach_the_method(patchcore, blocks, squared, texture, stage4):
    assert patchcore.num_candidates == 7 and patchcore.memory_bank.shape == (60, 64)
    image = normalise(to_unit(texture.test[0].image))
    for found, root in zip(squared.raw_scores(image, None), blocks.raw_scores(image, None), strict=True):
        np.testing.assert_allclose(found, np.asarray(root) ** 2, rtol=1e-6, atol=1e-30)
    with pytest.raises(TypeError, match="exponent"):
        fit(Blocks, texture.train, stage4, exponent=2.0, **QUICK)


def test_fitting_is_reproducible_by_its_seed(patchcore, texture, shallow):
    again = fit(PatchCore, texture.train, shallow, **PATCHCORE)
    for one, two in zip(jax.tree.leaves(patchcore), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)


def test_another_seed_is_another_fit(blocks, other_seed):
    assert not np.array_equal(other_seed.seen, blocks.seen)
    assert other_seed.calibration.scale != blocks.calibration.scale


def test_a_backbone_by_name_has_the_layers_the_method_asks_for(texture):
    for count, layers in ((4, ("stage3",)), (5, ("stage4",))):
        detector = fit(Blocks, texture.train[:count], "efficientnet_lite0", **QUICK)
        assert (detector.backbone.name, detector.backbone.layers) == ("efficientnet-lite0", layers)
        assert detector.stride == {"stage3": 8, "stage4": 16}[layers[0]]
    with pytest.raises(CheckpointError, match="unknown backbone 'lenet'"):
        fit(Blocks, texture.train, "lenet", **QUICK)


def test_every_stage_is_told_up_to_its_end(patchcore, told):
    last = {stage: (done, total) for stage, done, total in told}
    within = {"features", "coreset", "memory bank"}
    assert last.keys() >= within | {
        f"fold {k} of 5: {stage}" for stage in (*within, "maps of normal images") for k in range(1, 6)
    }
    assert all(done == total for done, total in last.values())
    for stage in last:
        counts = [done for name, done, _ in told if name == stage]
        assert counts == sorted(counts)


# --- images


@pytest.mark.parametrize("count", [0, 1])
def test_fitting_needs_two_images(texture, stage4, count):
    with pytest.raises(ImageError, match=f"at least two normal images; got {count}") as refusal:
        fit(Blocks, texture.train[:count], stage4, **QUICK)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [(100, 64), (64, 8)])
def test_sizes_that_are_no_multiples_of_the_stride_are_refused(texture, stage4, size):
    with pytest.raises(ImageError, match="not a multiple of the backbone's stride 16"):
        fit(Blocks, texture.train[:2], stage4, size=size, num_components=1)


@pytest.mark.parametrize("size", [(0, 64), (-16, 64)])
def test_sizes_that_are_not_positive_are_refused(texture, stage4, size):
    with pytest.raises(OptionError, match="must be positive"):
        fit(Blocks, texture.train[:2], stage4, size=size, num_components=1)


def test_images_of_any_size_and_kind_are_fitted_together(texture, stage4):
    first = texture.train[0]
    images = [
        first,
        texture.train[1][:50, :33],
        np.kron(texture.train[2], np.ones((3, 2, 1), np.uint8)),
        jnp.asarray(texture.train[3] / 255, jnp.float32),
        texture.train[4].astype(np.uint16) * 257,
        texture.train[5].mean(axis=-1).astype(np.uint8),
    ]
    detector = fit(Refitted, iter(images), stage4, **QUICK)
    assert detector.seen.shape == (6, *SIZE, 3)
    np.testing.assert_array_equal(detector.seen[jnp.asarray([0, 3, 4])], deep([texture.train[i] for i in (0, 3, 4)]))
    np.testing.assert_array_equal(detector.seen[5], np.repeat(deep([images[5]])[0][..., None], 3, axis=-1))
    assert np.isfinite(detector.calibration.scale) and np.isfinite(detector.calibration.threshold)


def test_constant_images_give_finite_scores_and_masks(shallow):
    """Nothing differs from anything: the mean score is 0, which nothing must be divided by."""
    grey = np.full((*SIZE, 3), 100, np.uint8)
    for method, options in ((PatchCore, PATCHCORE), (PaDiM, {**QUICK, "num_channels": 40})):
        detector = fit(method, [grey] * 3, shallow, **options)
        assert all(
            np.isfinite(leaf).all() for leaf in jax.tree.leaves((detector.calibration.scale, detector.calibration.prior))
        )
        spotted = grey.copy()
        spotted[20:36, 24:40] = (250, 20, 20)
        maps = [jax.jit(method.anomaly_map)(detector, normalise(to_unit(image))) for image in (grey, spotted)]
        assert np.isfinite(maps).all()
        masks = [np.asarray(detector.coarse_mask(m)) for m in maps]
        assert masks[1][20:36, 24:40].any()
        scores = [float(detector.verdict(m, 0.05)[0]) for m in maps]
        assert scores[0] <= 1 < scores[1]


def test_fewer_images_than_feature_dimensions_are_enough(texture, shallow):
    detector = fit(PaDiM, texture.train[:3], shallow, num_channels=40, **QUICK)
    assert detector.mean.shape == (16, 16, 40)
    for image in (texture.train[0], texture.test[0].image):
        assert np.isfinite(jax.jit(PaDiM.anomaly_map)(detector, normalise(to_unit(image)))).all()
    assert np.isfinite(detector.calibration.threshold)


@pytest.mark.parametrize(
    "bad",
    [
        np.full((32, 32, 3), np.nan, np.float32),
        np.where(np.eye(SIDE, dtype=bool)[..., None], np.float32(np.inf), np.zeros((*SIZE, 3), np.float32)),
        np.full((*SIZE, 3), 200.0),
        np.zeros((*SIZE, 4), np.uint8),
        np.zeros((*SIZE, 3), np.int64),
        np.zeros((0, 64, 3), np.uint8),
    ],
    ids=["nan", "infinite", "out of range", "four channels", "int64", "empty"],
)
def test_a_bad_image_is_refused_in_one_line(bad, texture, stage4):
    with pytest.raises(ImageError) as refusal:
        fit(Blocks, [*texture.train[:3], bad], stage4, **QUICK)
    assert "\n" not in str(refusal.value)


def test_an_8_bit_image_of_the_right_size_comes_back_bit_for_bit():
    every_level = np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    images = NormalImages([every_level], (16, 16))
    np.testing.assert_array_equal(images[0], normalise(to_unit(every_level)))
    np.testing.assert_array_equal(images.pixels(0) // 257, every_level)


def test_images_are_kept_at_16_bits():
    rng = np.random.default_rng(0)
    fine, level = rng.uniform(0, 1, (16, 24, 3)).astype(np.float32), rng.integers(0, 65536, (16, 24, 3), np.uint16)
    images = NormalImages([fine, level], (16, 24))
    assert len(images) == 2 and images.pixels(0).dtype == np.uint16
    np.testing.assert_allclose(images.pixels(0), fine.astype(np.float64) * 65535, atol=0.51)
    np.testing.assert_array_equal(images.pixels(1), level)
    np.testing.assert_allclose(images[0], (fine - MEAN) / STD, atol=1 / 65535 / STD.min())


def test_some_of_the_images_share_their_memory(texture):
    images = NormalImages(texture.train, SIZE)
    part = images.subset([7, 2])
    assert len(part) == 2 and part.size == SIZE
    for mine, i in enumerate((7, 2)):
        assert np.shares_memory(part.pixels(mine), images.pixels(i))
        np.testing.assert_array_equal(part[mine], images[i])


# --- a detector of one's own


def test_a_detector_of_one_s_own_is_refined_saved_and_loaded(blocks, texture, tmp_path):
    path = tmp_path / "blocks.model"
    save_detector(path, blocks)
    with pytest.raises(ModelError, match=r"holds a Blocks; .* classes=\(Blocks,\)"):
        load_detector(path)
    loaded = load_detector(path, classes=(Blocks,))
    assert type(loaded) is Blocks
    test = texture.test[1]
    mask = np.asarray(refine(blocks, test.image, inpaint="harmonic").mask)
    assert iou(mask, test.mask) > 0.8
    np.testing.assert_array_equal(refine(loaded, test.image, inpaint="harmonic").mask, mask)
    assert not np.asarray(refine(loaded, texture.train[held_out_of(10)[1][0]]).mask).any()


def test_a_batch_among_the_images_is_refused(texture, stage4):
    for batch in (np.stack(texture.train[:2]), np.zeros((*SIZE, 10, 3), np.uint8)):
        with pytest.raises(ImageError, match="one of the images has shape"):
            fit(Blocks, [*texture.train[:3], batch], stage4, **QUICK)


def test_one_image_in_place_of_a_list_is_refused(texture, stage4):
    with pytest.raises(ImageError, match="takes a list of images"):
        fit(Blocks, texture.train[0], stage4, **QUICK)


@pytest.mark.parametrize("side", [32, 64, 300])
def test_nan_pixels_are_refused_at_any_size(side, texture, stage4):
    image = np.full((side, side, 3), 0.5, np.float32)
    image[side // 2, 3, 1] = np.nan
    with pytest.raises(ImageError, match="finite"):
        fit(Blocks, [*texture.train[:3], image], stage4, **QUICK)


def test_a_detector_without_exemplars_and_positions_is_refined(squared, texture):
    assert squared.calibration.normals is None
    assert refine(squared, texture.test[1].image, inpaint="harmonic").mask.any()
