"""The verdict on whole images: scores, p-values, limits, and cross-fitting."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from conftest import calibration, smooth_image

from f2pad_jax import Outcome, Settings, fit, refine
from f2pad_jax.backbones import Backbone
from f2pad_jax.commands._model_files import described_verdict
from f2pad_jax.detectors import AbstractDetector, Calibration, NormalImages, Normality
from f2pad_jax.detectors.calibration import EXTENT, NUM_DEFECTS, with_calibration
from f2pad_jax.detectors.normality import (
    FOLDS,
    PRIOR_EXCESS,
    PRIOR_EXCESSES,
    PRIOR_IMAGES,
    SMOOTHING,
    TOP,
    Moments,
    certified_rate,
    folds,
    image_score,
)
from f2pad_jax.errors import OptionError
from f2pad_jax.images import to_unit
from f2pad_jax.method import AbstractDecision


def with_scores(scores):
    """A distribution with these scores of normal images."""
    return Normality(
        jnp.zeros((4, 4)),
        jnp.ones((4, 4)),
        jnp.asarray(np.sort(scores), jnp.float32),
        *(jnp.zeros(0), jnp.zeros(()), jnp.zeros(len(scores)), jnp.zeros(len(scores))),
    )


P_VALUE, LIMIT = jax.jit(jax.vmap(Normality.p_value, (None, 0))), jax.jit(jax.vmap(Normality.limit, (None, 0)))


def test_up_to_the_tail_the_p_value_is_the_rank():
    scores = np.random.default_rng(0).normal(3, 1, 100)
    tried = np.sort(scores)[:89] + 1e-3  # ten scores are the tail
    expected = [(1 + np.sum(scores >= t)) / 101 for t in tried]
    np.testing.assert_allclose(P_VALUE(with_scores(scores), tried), expected, rtol=1e-6)


def test_beyond_the_highest_normal_score_the_p_value_falls_as_the_predictive_tail():
    scores = np.concatenate([np.linspace(0, 1, 91), np.linspace(1.1, 2.9, 9)])  # n = 100: k = 10, start = 89/90
    start = 89 / 90
    mean = np.median(np.sort(scores)[90:] - start) / math.log(2)
    mean = (10 * mean + PRIOR_EXCESSES * PRIOR_EXCESS) / (10 + PRIOR_EXCESSES)
    expected = 11 / 101 * (1 + (5 - start) / (14 * mean)) ** -14
    np.testing.assert_allclose(P_VALUE(with_scores(scores), np.array([5.0])), [expected], rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 50, 200])
def test_the_limit_is_the_inverse_of_the_p_value(count):
    normality = with_scores(np.random.default_rng(count).gumbel(3, 0.5, count))
    rates = np.array([0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-5])
    limits = np.asarray(LIMIT(normality, rates))
    assert np.isfinite(limits).all() and (np.diff(limits) >= 0).all()
    assert (np.asarray(P_VALUE(normality, limits + 1e-3)) <= rates + 1e-6).all()
    below = np.asarray(P_VALUE(normality, limits - 1e-3))
    assert (below[rates * (count + 1) >= 1] >= rates[rates * (count + 1) >= 1] - 1e-6).all()


@pytest.mark.parametrize("draw", ["normal", "gumbel", "exponential"])
@pytest.mark.parametrize("count", [5, 16, 50, 200])
@pytest.mark.parametrize("rate", [0.05, 0.02])
def test_false_alarms_are_as_rare_as_asked(draw, count, rate):
    """Over many draws of normal images, other normal images exceed the limit at about the rate."""
    rng = np.random.default_rng(count)
    normal = getattr(rng, draw)(size=(2000, count)).astype(np.float32)
    limits = jax.jit(jax.vmap(lambda s: with_sorted(s).limit(rate)))(np.sort(normal, axis=1))
    found = np.mean(getattr(rng, draw)(size=(2000, 400)) > np.asarray(limits)[:, None])
    assert found < 1.3 * rate
    assert found > 0.2 * rate or count < 50  # few scores make the limit cautious, above all for a Gaussian


def with_sorted(scores):
    return Normality(jnp.zeros((1, 1)), jnp.ones((1, 1)), scores, jnp.zeros(0), jnp.zeros(()), scores, scores)


@pytest.mark.parametrize("rate", [0.05, 0.02])
def test_a_defective_image_among_fifty_hardly_moves_the_limit(rate):
    scores = np.random.default_rng(0).normal(3, 0.5, 50)
    clean, spoilt = with_scores(scores), with_scores(np.append(scores[:-1], 30.0))
    assert float(spoilt.limit(rate)) < 1.15 * float(clean.limit(rate))


def test_the_score_is_the_mean_of_the_highest_deviations():
    rng = np.random.default_rng(0)
    values, mean, spread = rng.random((40, 60)), rng.random((40, 60)), 0.5 + rng.random((40, 60))
    deviations = np.sort(((values - mean) / spread).ravel())
    expected = deviations[-int(TOP * 2400) :].mean()
    assert float(image_score(*map(jnp.asarray, (values, mean, spread)))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_mean_and_spread_are_of_every_pixel_smoothed(count):
    maps = np.random.default_rng(count).random((count, 48, 64)).astype(np.float32) * np.linspace(1, 3, 64)
    variance = (count * maps.var(axis=0) + PRIOR_IMAGES * maps.var()) / (count + PRIOR_IMAGES)
    mean, spread = Moments.of(maps).statistics()
    smooth = [scipy.ndimage.gaussian_filter(a, SMOOTHING, mode="reflect") for a in (maps.mean(axis=0), variance)]
    np.testing.assert_allclose(mean, smooth[0], rtol=1e-3)
    np.testing.assert_allclose(spread, np.sqrt(smooth[1]), rtol=1e-3)


def test_no_score_comes_from_statistics_of_its_own_image():
    maps = np.random.default_rng(0).random((7, 16, 16)).astype(np.float16)
    expected = []
    for i in range(7):
        others = [j for j in range(7) if j % FOLDS != i % FOLDS]
        expected.append(float(image_score(jnp.asarray(maps[i], jnp.float32), *Moments.of(maps[others]).statistics())))
    np.testing.assert_allclose(Normality.of(maps).scores, np.sort(expected), rtol=1e-5)


def test_variation_at_one_place_does_not_hide_a_defect_at_another():
    rng = np.random.default_rng(0)
    maps = 1 + 0.05 * rng.standard_normal((60, 64, 64))
    maps[:, :32] += 2 * rng.random((60, 1, 1)) ** 2  # the upper half varies from image to image
    normality, clean, faint = Normality.of(maps.astype(np.float32)), np.ones((64, 64)), np.ones((64, 64))
    faint[50:60, 20:30] = 1.8  # far below the highest maxima of normal maps, far above what is normal there
    assert faint.max() < np.quantile(maps.max(axis=(1, 2)), 0.5)
    scores = [float(normality.score(jnp.asarray(m, jnp.float32))) for m in (clean, faint)]
    assert scores[0] < float(normality.limit(0.05)) < scores[1]


@pytest.mark.parametrize(("above", "count", "bound"), [(0, 59, 0.0495), (8, 160, 0.0884), (2, 2, 1.0), (0, 1, 0.95)])
def test_the_certified_rate_is_exact(above, count, bound):
    """Bounds of Clopper and Pearson: 59 images without a false alarm certify 5 %."""
    assert certified_rate(above, count) == pytest.approx(bound, abs=2e-4)


@pytest.mark.parametrize("count", [2, 4, 5, 9, 160])
def test_folds_part_all_images(count):
    parts = folds(count, 0)
    assert len(parts) == min(count, FOLDS) and sorted(i for part in parts for i in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and all(part == sorted(part) for part in parts)
    assert folds(50, 1) == folds(50, 1) != folds(50, 2)


class Seen(AbstractDetector):
    """Detector whose map is 1, and 9 in every image that its fit has seen."""

    backbone: Backbone | None
    size: tuple[int, int] = eqx.field(static=True)
    images: jax.Array
    calibration: Calibration | None = None

    @classmethod
    def fit(cls, images, backbone, *, seed=0, progress=None):
        return cls(None, images.size, jnp.stack([*images]))

    def raw_scores(self, image, context):
        seen = jnp.any(jnp.all(jnp.abs(self.images - image) < 1e-6, axis=(1, 2, 3)))
        return (jnp.where(seen, 9.0, 1.0) * jnp.ones(self.size),)

    def anomaly_map(self, image):
        return self.raw_scores(image, None)[0]


@pytest.mark.parametrize("count", [2, 3, 12])
def test_every_normal_image_is_scored_by_a_detector_that_has_not_seen_it(count, shallow_backbone):
    images = [smooth_image(seed, 16) for seed in range(count)]
    found = fit(Seen, images, shallow_backbone, size=(16, 16), num_components=1).calibrated
    assert float(found.ordinary) == 1 and float(found.threshold) == 1, "no map is 9"
    assert len(found.normality.scores) == count


def test_features_are_computed_once_for_all_folds():
    images = NormalImages([smooth_image(seed, 16) for seed in range(4)], (16, 16))
    seen = []

    def mean(image):
        if not isinstance(image, jax.core.Tracer):
            seen.append(1)
        return jnp.mean(image, axis=(0, 1))

    for part in ([1, 3], [3, 0], [2, 1]):
        subset = images.subset(part)
        for i, number in enumerate(part):
            np.testing.assert_allclose(subset.computed("mean", mean, i), jnp.mean(images[number], axis=(0, 1)), rtol=1e-6)
    assert len(seen) == 4
    np.testing.assert_allclose(images.computed("other", lambda image: image[0], 2), images[2][0])


def test_the_threshold_lies_between_the_ordinary_level_and_the_limit_of_the_maxima(detector):
    c = detector.calibrated
    assert float(c.ordinary) < float(c.threshold) and 0 < EXTENT < 1


def test_the_false_alarm_rate_moves_the_verdict_without_a_fit(detector, texture):
    image = texture.test[1].image
    strict, loose = (refine(detector, image, settings=Settings(false_alarms=rate, max_steps=10)) for rate in (1e-6, 0.2))
    assert float(strict.score) < float(loose.score) and float(strict.p_value) == float(loose.p_value)
    assert strict.outcome == Outcome.NOTHING_TO_REFINE and not strict.mask.any() and not strict.coarse_mask.any()
    assert loose.mask.any() and loose.score > 1


def test_a_rate_of_one_leaves_out_the_verdict():
    assert float(with_scores([1.0, 2.0, 3.0]).limit(1.0)) == -math.inf
    assert float(with_scores([1.0, 2.0, 3.0]).limit(0.99)) == 1


def test_the_line_of_the_fit_says_what_is_certified(detector):
    few = described_verdict(detector, 0.05)
    assert few.startswith("limit ") and "for 5 % false alarms: 0 of 6 normal images are above it" in few
    assert "at most 39.3 % with 95 % confidence" in few and "19 or more images would show it" in few
    many = dataclasses.replace(detector.calibrated, normality=with_scores(np.linspace(1, 3, 400)))
    assert "\n" not in described_verdict(with_calibration(detector, many), 0.05)


class Nothing(AbstractDecision):
    """Decision that finds nothing."""

    def __call__(self, solver, evidence):
        return jnp.zeros(evidence.excess.shape)


@pytest.mark.parametrize("windows", [False, True])
def test_the_mask_of_a_defective_image_is_never_empty(detector, texture, windows):
    image = texture.test[1].image
    found = refine(detector, image, settings=Settings(decision=Nothing(), max_steps=10), windows=windows)
    assert found.outcome == Outcome.COARSE_MASK and "coarse mask stays" in Outcome(int(found.outcome)).message
    np.testing.assert_array_equal(found.mask, found.coarse_mask)
    assert found.mask.any()
    np.testing.assert_array_equal(found.normal, to_unit(image))


def test_a_defective_image_has_a_coarse_mask_however_low_its_map():
    """Where the deviation gives the verdict and no pixel exceeds the threshold, half of the height bounds m0."""
    normality = Normality(
        jnp.full((8, 8), 1.0),
        jnp.full((8, 8), 0.1),
        jnp.linspace(0, 1, 50),
        jnp.zeros(0),
        jnp.float32(2),
        *jnp.ones((2, 50)),
    )
    found = dataclasses.replace(calibration(threshold=100.0), normality=normality)
    detector = Seen(None, (8, 8), jnp.zeros((1, 8, 8, 3)), found)
    levels = jnp.ones((8, 8)).at[2, 3].set(2.0)
    assert float(detector.verdict(levels, 0.05)[0]) > 1
    mask = np.asarray(detector.coarse_mask(levels))
    assert mask[2, 3] and mask.sum() == 1


@pytest.mark.parametrize("lifted", [0.0, 5.0])
def test_in_an_image_unlike_the_normals_the_defect_stands_out_from_the_image_itself(lifted):
    """Another batch lifts the whole map: m0 is not the whole image, but what rises above the lifted level."""
    rng = np.random.default_rng(0)
    normality = Normality.of((1 + 0.1 * rng.random((30, 32, 32))).astype(np.float32))
    found = dataclasses.replace(calibration(threshold=1.5), normality=normality)
    detector = Seen(None, (32, 32), jnp.zeros((1, 32, 32, 3)), found)
    levels = jnp.asarray(1 + 0.1 * rng.random((32, 32)) + lifted).at[8:12, 20:26].add(3.0)
    mask = np.asarray(detector.coarse_mask(levels))
    assert mask[8:12, 20:26].all() and mask.sum() == 24
    assert (float(detector.lift(levels)) > 0) == (lifted > 0)
    assert 0 < float(detector.excess(levels)[1]) <= 1


@pytest.mark.parametrize("peak", [0.0, 0.05, 3.0, 30.0])
def test_m0_is_never_the_whole_of_a_lifted_image(peak):
    """Whatever rises above the lifted level, and if nothing does."""
    rng = np.random.default_rng(0)
    normality = Normality.of((1 + 0.1 * rng.random((30, 32, 32))).astype(np.float32))
    found = dataclasses.replace(calibration(threshold=1.5), normality=normality)
    detector = Seen(None, (32, 32), jnp.zeros((1, 32, 32, 3)), found)
    levels = jnp.asarray(6 + 0.1 * rng.random((32, 32))).at[8:12, 20:26].add(peak)
    excess, threshold = detector.excess(levels)
    assert 0 < np.mean(np.asarray(excess) > 1) < 0.3
    assert peak < 1 or np.mean(np.asarray(excess) > 0.5) < 0.05
    assert 0 < float(threshold) <= 1


def test_hardly_any_normal_image_is_unlike_the_normals():
    maps = np.random.default_rng(0).normal(1, 0.1, (200, 16, 16)) + np.random.default_rng(1).normal(0, 0.05, (200, 1, 1))
    level = float(Normality.of(maps).level)
    assert np.mean(np.median(maps, axis=(1, 2)) > level) < 0.02


def test_a_plain_background_does_not_make_images_unlike_the_normals():
    """Medians of maps with a plain background are nearly equal, and three deviations of them are nothing to report."""
    rng = np.random.default_rng(0)
    normality = Normality.of((1 + 0.001 * rng.random((30, 32, 32))).astype(np.float32))
    detector = Seen(
        None, (32, 32), jnp.zeros((1, 32, 32, 3)), dataclasses.replace(calibration(threshold=2.0), normality=normality)
    )
    assert float(normality.level) < 1.01
    assert float(detector.lift(jnp.full((32, 32), 1.05))) == 0
    np.testing.assert_allclose(float(detector.lift(jnp.full((32, 32), 1.5))), 0.5 - 0.2, atol=1e-3)


def test_all_images_of_a_group_are_in_one_part():
    groups = [i // 16 for i in range(64)]
    parts = folds(64, 0, groups=groups)
    assert len(parts) == 4 and sorted(i for part in parts for i in part) == list(range(64))
    assert all(len({groups[i] for i in part}) == 1 for part in parts)
    assert [len(p) for p in folds(10, 0, groups=[0] * 9 + [1])] in ([9, 1], [1, 9])


def test_no_image_is_scored_by_a_detector_that_has_seen_its_group(shallow_backbone):
    """Two crops of each photograph are equal: without groups, a detector has seen most of them."""
    images = [smooth_image(seed // 2, 16) for seed in range(12)]
    grouped = fit(Seen, images, shallow_backbone, size=(16, 16), num_components=1, groups=[i // 2 for i in range(12)])
    alone = fit(Seen, images, shallow_backbone, size=(16, 16), num_components=1)
    assert float(grouped.calibrated.ordinary) == 1 < float(alone.calibrated.ordinary)


@pytest.mark.parametrize("groups", [[0, 1], [0] * 4])
def test_wrong_groups_are_refused(groups, shallow_backbone):
    with pytest.raises(OptionError, match="group"):
        fit(Seen, [smooth_image(i, 16) for i in range(4)], shallow_backbone, size=(16, 16), groups=groups)


def test_scores_of_synthetic_defects_show_whether_the_detector_sees_any(detector):
    found = detector.calibrated.normality
    assert len(found.defects) == NUM_DEFECTS and (np.diff(found.defects) >= 0).all()
    assert np.mean(np.asarray(found.defects) > float(found.limit(0.05))) > 0.5
    assert f"of {NUM_DEFECTS} synthetic defects" in described_verdict(detector, 0.05)
    blind = dataclasses.replace(found, defects=found.scores)
    blind = with_calibration(detector, dataclasses.replace(detector.calibrated, normality=blind))
    assert "warning" in described_verdict(blind, 0.05) and "warning" not in described_verdict(detector, 0.05)
