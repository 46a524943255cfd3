from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from conftest import calibration, check_map_of_batches, maps_of, smooth_image
from sklearn.covariance import EmpiricalCovariance

from f2pad_jax import fit
from f2pad_jax.detectors import NormalImages, PaDiM, padim
from f2pad_jax.detectors.padim import REGULARISER, Full, LeftOut, LowRank, quadratic
from f2pad_jax.errors import OptionError

SIZE, SIDE = 64, 16
COUNTS = (24, 40)
"""Channels of the two layers tapped, at strides 4 and 8."""
CHANNELS = 20
NUM_IMAGES = 9
SEED = 3
CORNER = jnp.zeros(2, jnp.int32)
RTOL = 1e-4  # of squared distances: single precision, amplified by ill-conditioned covariances

anomaly_map = jax.jit(PaDiM.anomaly_map)


def embedding(maps, channels):
    """The chosen channels at the larger map's positions, every pixel of the smaller repeated 2 x 2 times."""
    fine, coarse = (np.asarray(m, np.float64) for m in maps)
    return np.concatenate([fine[..., channels[0]], coarse.repeat(2, 0).repeat(2, 1)[..., channels[1]]], axis=-1)


def covariances(features):
    """Of every position, with n - 1 in the denominator, plus 0.01 on the diagonal."""
    flat = features.reshape(len(features), -1, CHANNELS).swapaxes(0, 1)
    per_position = np.stack([np.cov(f, rowvar=False) + 0.01 * np.eye(CHANNELS) for f in flat])
    return per_position.reshape(*features.shape[1:], CHANNELS)


def squared_distances(difference, precision):
    return np.einsum("hwi,hwij,hwj->hw", difference, precision, difference)


@jax.jit
def whole_scores(detector, image):
    return detector.raw_scores(image, detector.locate(image, CORNER))[0]


@pytest.fixture(scope="module")
def shallow(backbone):
    """The second and third stage, which compile faster than the default layers."""
    return replace(backbone, layers=("stage2", "stage3"))


@pytest.fixture(scope="module")
def normals():
    return NormalImages([smooth_image(seed) for seed in range(NUM_IMAGES)], (SIZE, SIZE))


@pytest.fixture(scope="module")
def test_image():
    return NormalImages([smooth_image(99)], (SIZE, SIZE))[0]


def fitted(images, backbone, **options):
    return PaDiM.fit(images, backbone, **{"seed": SEED, "num_channels": CHANNELS, **options})


@pytest.fixture(scope="module")
def stages():
    """Everything the progress callback was told, as the detector below was fitted."""
    return []


@pytest.fixture(scope="module")
def detector(normals, shallow, stages):
    return fitted(normals, shallow, progress=lambda *told: stages.append(told))


@pytest.fixture(scope="module")
def channels(detector):
    return [np.asarray(kept) for kept in detector.channels]


@pytest.fixture(scope="module")
def features(shallow, normals, channels):
    """Of the normal images, (n, h, w, channels), in double precision."""
    return np.stack([embedding(maps_of(shallow, normals[i]), channels) for i in range(NUM_IMAGES)])


@pytest.fixture(scope="module")
def test_features(shallow, test_image, channels):
    return embedding(maps_of(shallow, test_image), channels)


def same_statistics(found, expected, rtol):
    """Every array of one detector within ``rtol`` of its peak in the other."""
    arrays = [jax.tree.leaves((d.channels, d.mean, d.precision)) for d in (found, expected)]
    for one, other in zip(*arrays, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.abs(other).max())


# What is kept of the features


def test_embedding_is_the_chosen_channels_of_all_layers_enlarged_by_nearest_neighbour(shallow, detector, test_image):
    maps = maps_of(shallow, test_image)
    assert [m.shape for m in maps] == [(SIDE, SIDE, COUNTS[0]), (SIDE // 2, SIDE // 2, COUNTS[1])]
    found = jax.jit(padim.embed)(shallow, detector.channels, test_image)
    expected = embedding(maps, [np.asarray(kept) for kept in detector.channels])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_channels_are_as_many_as_asked_for_of_all_layers_together_and_ascending(channels):
    assert sum(map(len, channels)) == CHANNELS
    for kept, count in zip(channels, COUNTS, strict=True):
        assert 0 < len(kept) < CHANNELS
        assert kept.min() >= 0 and kept.max() < count
        assert np.all(np.diff(kept) > 0)


def test_channels_are_reproducible_by_their_seed(normals, shallow, detector):
    again = fitted(normals.subset([0]), shallow)
    other = fitted(normals.subset([0]), shallow, seed=SEED + 1)
    for kept, same in zip(detector.channels, again.channels, strict=True):
        np.testing.assert_array_equal(kept, same)
    assert any(not np.array_equal(a, b) for a, b in zip(detector.channels, other.channels, strict=True))


def test_all_channels_are_kept_where_there_are_fewer_than_asked_for(normals, shallow):
    everything = fitted(normals.subset([0]), shallow, num_channels=1000)
    for kept, count in zip(everything.channels, COUNTS, strict=True):
        np.testing.assert_array_equal(kept, np.arange(count))
    assert everything.mean.shape == (SIDE, SIDE, sum(COUNTS))


def test_a_layer_may_be_left_without_a_channel(normals, shallow, test_image):
    narrow = fitted(normals.subset([0, 1]), shallow, num_channels=1)
    assert sorted(map(len, narrow.channels)) == [0, 1]
    maps = maps_of(shallow, normals[0]), maps_of(shallow, normals[1]), maps_of(shallow, test_image)
    first, second, third = (embedding(m, [np.asarray(kept) for kept in narrow.channels])[..., 0] for m in maps)
    variance = (first - second) ** 2 / 2 + 0.01
    expected = (third - (first + second) / 2) ** 2 / variance
    np.testing.assert_allclose(whole_scores(narrow, test_image), expected, rtol=RTOL, atol=RTOL * expected.max())


# Statistics and scores


def test_mean_is_that_of_the_features(detector, features):
    expected = features.mean(axis=0)
    np.testing.assert_allclose(detector.mean, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_precision_times_covariance_is_the_identity(detector, features):
    product = np.asarray(detector.precision.precision, np.float64) @ covariances(features)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(CHANNELS), product.shape), rtol=0, atol=1e-3)


def test_quadratic_form_has_every_derivative_of_the_plain_one():
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        root, vector = rng.standard_normal((2, 3, 3)), jnp.asarray(rng.standard_normal((2, 3)))
        matrix = jnp.asarray(root @ root.swapaxes(1, 2))

        def plain(matrix, vector):
            return jnp.einsum("bi,bij,bj->b", vector, matrix, vector)

        for transform, argnums in ((jax.jacfwd, (0, 1)), (jax.jacrev, (0, 1)), (jax.hessian, 1)):
            for found, expected in zip(
                jax.tree.leaves(transform(quadratic, argnums=argnums)(matrix, vector)),
                jax.tree.leaves(transform(plain, argnums=argnums)(matrix, vector)),
                strict=True,
            ):
                np.testing.assert_allclose(found, expected, atol=1e-12)


def test_scores_are_scikit_learns_squared_mahalanobis_distances(detector, features, test_features, test_image):
    found = np.asarray(whole_scores(detector, test_image))
    expected = np.zeros_like(found)
    for y, x in np.ndindex(SIDE, SIDE):
        estimate = EmpiricalCovariance().fit(features[:, y, x])
        unbiased = estimate.covariance_ * NUM_IMAGES / (NUM_IMAGES - 1) + 0.01 * np.eye(CHANNELS)
        estimate.precision_ = np.linalg.inv(unbiased)
        expected[y, x] = estimate.mahalanobis(test_features[y, x][None])[0]
    np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_images_taken_a_few_at_a_time_give_the_statistics_of_all_at_once(monkeypatch, normals, shallow, detector):
    monkeypatch.setattr(padim, "CHUNK", 4)  # nine images are no multiple of it
    monkeypatch.setattr(padim, "BLOCK", 100)  # nor are 256 positions of this
    same_statistics(fitted(normals, shallow), detector, 1e-6)


def test_the_order_of_the_normal_images_does_not_matter(normals, shallow, detector):
    same_statistics(fitted(normals.subset(range(NUM_IMAGES)[::-1]), shallow), detector, 1e-6)


def test_fewer_images_than_channels_are_enough(normals, shallow, features, test_features, test_image):
    few = fitted(normals.subset([0, 1, 2]), shallow)
    found = np.asarray(whole_scores(few, test_image))
    assert np.all(np.isfinite(found))
    precision = np.linalg.inv(covariances(features[:3]))
    expected = squared_distances(test_features - features[:3].mean(axis=0), precision)
    np.testing.assert_allclose(found, expected, rtol=RTOL)


@pytest.mark.parametrize("rank", [None, 1])
def test_a_single_image_has_the_regulariser_for_its_covariance(normals, shallow, features, test_features, test_image, rank):
    single = fitted(normals.subset([4]), shallow, rank=rank)
    expected = np.sum((test_features - features[4]) ** 2, axis=-1) / 0.01
    np.testing.assert_allclose(whole_scores(single, test_image), expected, rtol=RTOL)
    assert np.max(whole_scores(single, normals[4])) < 1e-6 * expected.max()


def test_progress_is_told_of_every_image_and_block_up_to_the_last(detector, stages):
    assert [told for told in stages if told[0] == "features"] == [
        ("features", i, NUM_IMAGES) for i in range(NUM_IMAGES + 1)
    ]
    assert stages[-1] == ("covariances", SIDE * SIDE, SIDE * SIDE)


# The low-rank covariance


@pytest.mark.parametrize("rank", [NUM_IMAGES - 1, NUM_IMAGES + 3, CHANNELS])
def test_low_rank_is_exact_where_there_are_no_more_images_than_directions(normals, shallow, detector, test_image, rank):
    low_rank = fitted(normals, shallow, rank=rank)
    assert low_rank.precision.basis.shape == (SIDE, SIDE, rank, CHANNELS)
    np.testing.assert_allclose(whole_scores(low_rank, test_image), whole_scores(detector, test_image), rtol=RTOL)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_low_rank_is_probabilistic_pca(normals, shallow, detector, features, test_features, test_image, rank):
    variances, directions = np.linalg.eigh(covariances(features))
    rest = variances[..., : CHANNELS - rank].mean(axis=-1, keepdims=True)
    kept = np.concatenate([np.repeat(rest, CHANNELS - rank, axis=-1), variances[..., CHANNELS - rank :]], axis=-1)
    precision = directions / kept[..., None, :] @ directions.swapaxes(2, 3)
    expected = squared_distances(test_features - features.mean(axis=0), precision)
    found = np.asarray(whole_scores(fitted(normals, shallow, rank=rank), test_image))
    np.testing.assert_allclose(found, expected, rtol=RTOL)
    assert np.median(np.abs(found / np.asarray(whole_scores(detector, test_image)) - 1)) > 0.01


@pytest.mark.parametrize("rank", [-1, 0, CHANNELS + 1])
def test_rank_out_of_range_is_refused(normals, shallow, rank):
    with pytest.raises(OptionError, match=rf"rank {rank} is not between 1 and the number of channels, {CHANNELS}"):
        fitted(normals, shallow, rank=rank)


# Windows


@pytest.fixture(scope="module", params=[None, 3], ids=["full", "rank 3"])
def either(request, normals, shallow, detector):
    return detector if request.param is None else fitted(normals, shallow, rank=request.param)


WINDOW = (24, 32)
locate = jax.jit(PaDiM.locate)


@pytest.mark.parametrize("corner", [(0, 0), (8, 16), (40, 0), (16, 32), (40, 32)])
def test_window_has_the_statistics_of_its_own_positions(either, test_image, corner):
    (top, left), (h, w) = corner, WINDOW
    window = test_image[top : top + h, left : left + w]
    where = locate(either, window, jnp.array(corner))
    for found, whole in zip(jax.tree.leaves(where), jax.tree.leaves((either.mean, either.precision)), strict=True):
        np.testing.assert_array_equal(found, whole[top // 4 : (top + h) // 4, left // 4 : (left + w) // 4])


@jax.jit
def window_scores(detector, window, corner):
    return detector.raw_scores(window, detector.locate(window, corner))


@pytest.mark.parametrize("corner", [(0, 0), (8, 16), (40, 32)])
def test_window_scores_are_distances_to_the_statistics_there(shallow, detector, channels, features, test_image, corner):
    (top, left), (h, w) = corner, WINDOW
    window = test_image[top : top + h, left : left + w]
    here = features[:, top // 4 : (top + h) // 4, left // 4 : (left + w) // 4]
    difference = embedding(maps_of(shallow, window), channels) - here.mean(axis=0)
    expected = squared_distances(difference, np.linalg.inv(covariances(here)))
    (found,) = window_scores(detector, window, jnp.array(corner))
    np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_scores_are_raw_scores_over_the_scale(detector, test_image):
    calibrated = replace(detector, calibration=calibration(3.0))
    where = locate(calibrated, test_image, CORNER)
    (found,) = jax.jit(PaDiM.scores)(calibrated, test_image, where)
    np.testing.assert_allclose(found, whole_scores(detector, test_image) / 3, rtol=1e-5)


@pytest.mark.parametrize("low_rank", [False, True])
def test_gradient_of_the_scores_equals_directional_differences(shallow, test_image, low_rank):
    rng = np.random.default_rng(9)
    two_layers = replace(shallow, layers=("stage1", "stage2"))
    channels = (jnp.array([0, 3, 9]), jnp.array([2, 5]))
    with jax.enable_x64(True):
        spread = rng.standard_normal((32, 32, 5, 9))
        covariance = spread @ spread.swapaxes(2, 3) / 9
        flat = covariance.reshape(-1, 5, 5)
        fields = LowRank.of(flat, 2) if low_rank else Full.of(flat)
        doubled = [jnp.asarray(f.reshape(32, 32, *f.shape[1:]), jnp.float64) for f in fields]
        precision = LowRank(*doubled) if low_rank else Full(*doubled)
        mean = jnp.asarray(rng.standard_normal((32, 32, 5)))
        double = PaDiM(two_layers, (SIZE, SIZE), channels, mean, precision)
        double = jax.tree.map(lambda v: v.astype(np.float64) if eqx.is_inexact_array(v) else v, double)
        image = test_image.astype(np.float64)
        where = (double.mean, double.precision)
        loss = jax.jit(jax.value_and_grad(lambda image, detector, where: jnp.sum(detector.raw_scores(image, where)[0])))
        _, gradient = loss(image, double, where)
        assert gradient.dtype == np.float64
        for seed in range(5):
            # small enough to cross next to none of the kinks of ReLU6
            direction = 1e-8 * np.random.default_rng(seed).standard_normal(image.shape)
            (ahead, _), (behind, _) = loss(image + direction, double, where), loss(image - direction, double, where)
            assert float(ahead - behind) / 2 == pytest.approx(float(np.sum(gradient * direction)), rel=1e-5)


# The anomaly map


def test_anomaly_map_is_the_smoothed_root_of_the_scores(detector, test_image):
    scores = np.asarray(whole_scores(detector, test_image), np.float64)
    enlarged = scipy.ndimage.zoom(np.sqrt(scores), SIZE // SIDE, order=1, mode="nearest", grid_mode=True)
    expected = scipy.ndimage.gaussian_filter(enlarged, 4.0, mode="reflect", truncate=4)
    np.testing.assert_allclose(anomaly_map(detector, test_image), expected, rtol=1e-5)


def test_anomaly_map_does_not_depend_on_the_other_images_of_a_batch(detector, normals, test_image):
    alone = np.asarray(anomaly_map(detector, test_image))
    check_map_of_batches(detector, alone, test_image, normals)


@pytest.mark.parametrize(("count", "channels"), [(8, 3), (12, 6), (40, 30), (160, 100)])
def test_a_training_image_is_scored_as_if_it_had_been_left_out(count, channels):
    """The formula against a fit without each vector."""
    vectors = np.random.default_rng(count).standard_normal((count, channels)) * np.linspace(0.3, 3, channels)

    def fitted_to(rows):
        covariance = np.atleast_2d(np.cov(rows.T)) + REGULARISER * np.eye(channels)
        return rows.mean(axis=0), Full(jnp.asarray(Full.of(covariance[None])[0])[None])

    mean, full = fitted_to(vectors)
    found = [float(LeftOut(full, count)(jnp.asarray(v - mean, jnp.float32)[None, None])[0, 0]) for v in vectors]
    expected, whole = [], []
    for i, vector in enumerate(vectors):
        others, precision = fitted_to(np.delete(vectors, i, axis=0))
        expected.append(float(precision(jnp.asarray(vector - others, jnp.float32)[None, None])[0, 0]))
        whole.append(float(full(jnp.asarray(vector - mean, jnp.float32)[None, None])[0, 0]))
    np.testing.assert_allclose(found, expected, rtol=0.02 if count > 8 else 0.05)
    assert np.mean(whole) < 0.9 * np.mean(expected), "the whole fit has seen the image"


def test_a_fit_of_full_covariances_needs_no_folds(shallow):
    stages = []
    options = {"num_channels": 8, "num_components": 1, "size": (SIZE, SIZE)}
    images = [smooth_image(seed) for seed in range(NUM_IMAGES)]
    fit(PaDiM, images, shallow, progress=lambda stage, done, total: stages.append(stage), **options)
    assert "covariances" in stages and not any("fold" in stage for stage in stages)
    fit(PaDiM, images, shallow, progress=lambda stage, done, total: stages.append(stage), rank=2, **options)
    assert any("fold 2" in stage for stage in stages)
