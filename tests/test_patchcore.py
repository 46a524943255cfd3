import itertools
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from conftest import calibration, maps_of, smooth_image

from f2pad_jax.detectors import NormalImages, PatchCore
from f2pad_jax.detectors.base import coarse_map
from f2pad_jax.detectors.patchcore import BLOCK, Candidates, coreset, embed, nearest
from f2pad_jax.errors import OptionError
from f2pad_jax.images import MEAN, STD, normalise

SIZE, SIDE, CHANNELS = 64, 32, 80
POSITIONS = SIDE * SIDE
EVERY = 8
"""The memory bank holds every eighth of the features of the first two images."""
CORNER = jnp.zeros(2, jnp.int32)

smooth = jax.jit(coarse_map, static_argnames=("size", "sigma"))


def squared_distances(features, bank):
    """Every pair, in double precision."""
    features, bank = np.asarray(features, np.float64), np.asarray(bank, np.float64)
    return np.stack([np.sum((bank - feature) ** 2, axis=1) for feature in features])


def bilinear(image, size):
    """Bilinear enlargement with pixel centres at halves and the border repeated."""
    for axis, n in enumerate(size):
        at = np.clip((np.arange(n) + 0.5) * image.shape[axis] / n - 0.5, 0, image.shape[axis] - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, image.shape[axis] - 1)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(image.ndim)])
        image = (1 - share) * np.take(image, low, axis) + share * np.take(image, high, axis)
    return image


@pytest.fixture(scope="module")
def shallow(backbone):
    """The first three stages, which compile faster than the default layers."""
    return replace(backbone, layers=("stage1", "stage2", "stage3"))


@pytest.fixture(scope="module")
def images():
    return [normalise(smooth_image(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def extracted(shallow, images):
    """The maps of the network and their embedding, of each image."""
    embedded = jax.jit(embed)
    return [(maps_of(shallow, image), embedded(shallow, image)) for image in images]


@pytest.fixture(scope="module")
def features(extracted):
    """Of each image, (positions, channels)."""
    return [np.asarray(embedding).reshape(POSITIONS, CHANNELS) for _, embedding in extracted]


@pytest.fixture(scope="module")
def detector(shallow, features):
    bank = np.concatenate(features[:2])[::EVERY]
    return PatchCore(
        backbone=shallow,
        size=(SIZE, SIZE),
        memory_bank=jnp.asarray(bank),
        num_candidates=10,
        calibration=calibration(3.0),
    )


@pytest.fixture(scope="module")
def moved(detector, images):
    """Candidates found at one image, and the same refreshed at another."""
    where = jax.jit(PatchCore.locate)(detector, images[0], CORNER)
    return where, jax.jit(PatchCore.refresh)(detector, images[2], where)


@pytest.mark.parametrize("positions", [1, BLOCK, 2 * BLOCK + 77])
@pytest.mark.parametrize("k", [1, 7])
def test_nearest_equals_brute_force(positions, k):
    rng = np.random.default_rng(positions)
    features, bank = rng.standard_normal((positions, 20), np.float32), rng.standard_normal((90, 20), np.float32)
    distances, indices = nearest(jnp.asarray(features), jnp.asarray(bank), k)
    expected = squared_distances(features, bank)
    np.testing.assert_array_equal(indices, np.argsort(expected, axis=1)[:, :k])
    np.testing.assert_allclose(distances, expected.min(axis=1), rtol=1e-5)


def test_distance_of_a_member_is_exactly_zero_however_long_the_features():
    bank = 1000 + np.random.default_rng(0).standard_normal((50, 8), np.float32)
    distances, _ = nearest(jnp.asarray(bank), jnp.asarray(bank), 1)
    assert np.median(np.asarray(distances)) == 0


def greedy(points, first, size):
    """k-centre: each next point is the farthest from those chosen."""
    chosen = [first]
    distance = np.full(len(points), np.inf)
    while len(chosen) < size:
        distance = np.minimum(distance, np.sum((points - points[chosen[-1]]) ** 2, axis=1))
        chosen.append(int(np.argmax(distance)))
    return chosen


def regrets(points, chosen):
    """By how much each choice fell short of the farthest point there was, in squared distance."""
    distance, short = np.full(len(points), np.inf), []
    for before, index in itertools.pairwise(chosen):
        distance = np.minimum(distance, np.sum((points - points[before]) ** 2, axis=1))
        short.append(distance.max() - distance[index])
    return np.array(short)


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 512])
@pytest.mark.parametrize("first", [0, 217, 399])
def test_coreset_is_the_greedy_k_centre_selection(batch, first):
    points = np.random.default_rng(0).standard_normal((400, 30), np.float32)
    chosen = coreset(points, 60, first, batch=batch)
    np.testing.assert_array_equal(chosen, greedy(points.astype(np.float64), first, 60))


@pytest.mark.parametrize("batch", [1, 10, 512])
def test_coreset_of_clusters_far_from_the_origin_is_the_greedy_selection(batch):
    """Nearly all of a pass's farthest points lie in the same far cluster, where the first choice makes them near."""
    rng = np.random.default_rng(1)
    centres = 1000 + 100 * rng.standard_normal((5, 8))
    points = np.concatenate([c + s * rng.standard_normal((60, 8)) for c, s in zip(centres, (5, 1, 0.1, 3, 2), strict=True)])
    np.testing.assert_array_equal(coreset(points, 90, 4, batch=batch), greedy(points, 4, 90))


@pytest.mark.parametrize("batch", [1, 3, 512])
def test_where_points_are_equally_far_any_of_them_is_chosen(batch):
    grid = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), axis=-1).reshape(-1, 3)
    chosen = coreset(grid, 100, 7, batch=batch)
    assert len(set(chosen.tolist())) == 100
    np.testing.assert_allclose(regrets(grid, chosen), 0, atol=1e-9)


def test_coreset_covers_better_than_a_random_choice():
    rng = np.random.default_rng(2)
    features = np.concatenate([rng.normal(0, 1, (500, 6)), rng.normal(8, 0.1, (4, 6))]).astype(np.float32)

    def radius(chosen):
        return squared_distances(features, features[chosen]).min(axis=1).max()

    assert radius(coreset(features, 50, 0)) < 0.7 * radius(rng.choice(504, 50, replace=False))


def test_coreset_never_picks_twice_and_is_everything_where_there_is_no_more():
    points = np.random.default_rng(3).standard_normal((100, 5), np.float32)
    assert sorted(coreset(points, 500, 20)) == list(range(100))
    assert coreset(points, 1, 20).tolist() == [20]
    for batch in (1, 8, 512):
        assert len(set(coreset(np.ones((30, 4), np.float32), 12, 3, batch=batch).tolist())) == 12


def test_coreset_tells_its_progress_up_to_the_end():
    told = []
    coreset(np.random.default_rng(4).standard_normal((200, 3)), 50, 0, lambda *what: told.append(what), batch=4)
    counts = [done for _, done, _ in told]
    assert {(stage, total) for stage, _, total in told} == {("coreset", 50)}
    assert counts[0] == 1 and counts[-1] == 50 and counts == sorted(counts)


@pytest.fixture(scope="module")
def normals(images):
    return NormalImages([np.asarray(image * STD + MEAN).clip(0, 1) for image in images], (SIZE, SIZE))


@pytest.fixture(scope="module")
def every_feature(shallow, normals):
    """Of all images as they are kept, in the order of images and positions."""
    embed_jit = jax.jit(embed)
    return np.concatenate([np.asarray(embed_jit(shallow, image)).reshape(-1, CHANNELS) for image in normals])


def rows_of(bank, features):
    """Which of the features each entry of the bank is."""
    distances = squared_distances(bank, features)
    assert distances.min(axis=1).max() == 0, "every entry is a feature, to the bit"
    return distances.argmin(axis=1)


def test_the_memory_bank_is_a_greedy_coreset_of_all_features(shallow, normals, every_feature):
    told = []
    fitted = PatchCore.fit(
        normals, shallow, seed=3, progress=lambda *what: told.append(what), coreset_ratio=0.02, num_candidates=6
    )
    chosen = rows_of(fitted.memory_bank, every_feature)
    assert len(chosen) == np.ceil(0.02 * 3 * POSITIONS) and {*(chosen // POSITIONS)} == {0, 1, 2}
    np.testing.assert_allclose(regrets(every_feature.astype(np.float64), chosen), 0, atol=1e-3)
    assert fitted.num_candidates == 6 and fitted.size == (SIZE, SIZE) and fitted.calibration is None
    assert [stage for stage, done, total in told if done == total] == ["features", "coreset", "memory bank"]


def test_a_coreset_of_many_channels_is_chosen_on_their_projection(shallow, normals, every_feature):
    fitted = PatchCore.fit(normals, shallow, seed=7, max_bank=40, projection=16)
    chosen = rows_of(fitted.memory_bank, every_feature)
    assert len(chosen) == 40
    projected = every_feature.astype(np.float64) @ np.random.default_rng(7).standard_normal((CHANNELS, 16)) / 4
    np.testing.assert_allclose(regrets(projected, chosen), 0, atol=1e-3)
    assert regrets(every_feature.astype(np.float64), chosen).max() > 1, "on all channels others would have been chosen"


def test_the_seed_decides_the_memory_bank(shallow, normals):
    banks = [np.asarray(PatchCore.fit(normals, shallow, seed=seed, max_bank=20).memory_bank) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(banks[0], banks[1])
    assert not np.array_equal(banks[0], banks[2])


def test_embedding_is_averaged_enlarged_and_concatenated(extracted):
    maps, embedding = extracted[0]
    assert [m.shape for m in maps] == [(32, 32, 16), (16, 16, 24), (8, 8, 40)]
    averaged = [scipy.ndimage.uniform_filter(np.asarray(m, np.float64), (3, 3, 1), mode="constant") for m in maps]
    expected = np.concatenate([bilinear(a, (SIDE, SIDE)) for a in averaged], axis=-1)
    np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "size", "sigma"), [((SIDE, SIDE), (SIZE, SIZE), 4.0), ((5, 8), (40, 24), 2.0), ((3, 4), (9, 12), 4.0)]
)
def test_coarse_map_equals_scipys_gaussian_of_the_bilinear_map(shape, size, sigma):
    scores = np.random.default_rng(0).gamma(2.0, 1.0, shape).astype(np.float32)
    found = smooth(jnp.asarray(scores), size=size, sigma=sigma)
    enlarged = bilinear(scores.astype(np.float64), size)
    expected = scipy.ndimage.gaussian_filter(enlarged, sigma, mode="reflect", truncate=4)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_anomaly_map_is_the_coarse_map_of_equation_4(detector, images, features):
    expected = squared_distances(features[2], detector.memory_bank).min(axis=1).reshape(SIDE, SIDE) / 3.0
    found = jax.jit(PatchCore.anomaly_map)(detector, images[2])
    np.testing.assert_allclose(found, smooth(jnp.asarray(expected, jnp.float32), size=(SIZE, SIZE)), rtol=1e-3, atol=1e-4)


def test_candidates_are_the_bank_entries_nearest_to_the_first_guess(detector, features, moved):
    where, _ = moved
    distances = squared_distances(features[0], detector.memory_bank)
    assert where.indices.shape == (POSITIONS, 10)
    found = np.take_along_axis(distances, np.asarray(where.indices), axis=1)
    np.testing.assert_allclose(found, np.sort(distances, axis=1)[:, :10], rtol=1e-3, atol=1e-2)


def test_refresh_picks_the_best_candidate_for_the_image_as_it_is_now(detector, features, moved):
    before, after = moved
    np.testing.assert_array_equal(after.indices, before.indices)
    bank, indices = np.asarray(detector.memory_bank), np.asarray(before.indices)
    distances = np.take_along_axis(squared_distances(features[2], bank), indices, axis=1)
    best = np.take_along_axis(indices, distances.argmin(axis=1)[:, None], axis=1)[:, 0]
    found = np.asarray(after.nearest).reshape(POSITIONS, CHANNELS)
    agreeing = np.all(found == bank[best], axis=1)
    assert agreeing.mean() > 0.99  # the rest are ties to single precision
    assert np.mean(found != np.asarray(before.nearest).reshape(POSITIONS, CHANNELS)) > 0.1
    np.testing.assert_allclose(np.sum((found - features[2]) ** 2, axis=1), distances.min(axis=1), rtol=1e-3)


def test_scores_are_equation_5_over_the_scale(detector, images, features, moved):
    _, where = moved
    both = jax.jit(lambda detector, image, where: detector.scores(image, where) + detector.raw_scores(image, where))
    found, raw = both(detector, images[2], where)
    distances = np.take_along_axis(squared_distances(features[2], detector.memory_bank), np.asarray(where.indices), axis=1)
    np.testing.assert_allclose(found, distances.min(axis=1).reshape(SIDE, SIDE) / 3.0, rtol=1e-3)
    np.testing.assert_allclose(raw, 3.0 * np.asarray(found), rtol=1e-6)


def test_scores_with_all_candidates_equal_equation_4(detector, images, features):
    everything = replace(detector, calibration=None, num_candidates=10_000)

    @jax.jit
    def score(detector, first, image):
        return detector.scores(image, detector.refresh(image, detector.locate(first, CORNER)))

    (found,) = score(everything, images[0], images[2])
    expected = squared_distances(features[2], everything.memory_bank).min(axis=1)
    np.testing.assert_allclose(found, expected.reshape(SIDE, SIDE), rtol=1e-3)


def test_few_candidates_never_score_below_equation_4(detector, images, features, moved):
    (found,) = jax.jit(PatchCore.scores)(detector, images[2], moved[1])
    least = squared_distances(features[2], detector.memory_bank).min(axis=1).reshape(SIDE, SIDE) / 3.0
    assert np.all(np.asarray(found) >= least * (1 - 1e-3))
    assert np.any(np.asarray(found) > least * 1.01)


def test_a_patch_in_the_memory_bank_scores_nothing(detector, images, moved):
    (found,) = jax.jit(PatchCore.scores)(detector, images[0], moved[0])
    known = np.asarray(found).ravel()[::EVERY]
    assert known.max() < 1e-6 < np.median(np.asarray(found))


def test_gradient_of_the_scores_equals_directional_differences(detector, images):
    two_layers = replace(detector, backbone=replace(detector.backbone, layers=("stage1", "stage2")))
    wanted = np.random.default_rng(9).standard_normal((SIDE, SIDE, 40), np.float32)
    where = Candidates(jnp.zeros((POSITIONS, 1), jnp.int32), jnp.asarray(wanted))
    with jax.enable_x64(True):
        doubled = jax.tree.map(lambda v: v.astype(np.float64) if eqx.is_inexact_array(v) else v, (two_layers, where))
        image = images[2].astype(np.float64)
        loss = jax.jit(jax.value_and_grad(lambda image, detector, where: jnp.sum(detector.scores(image, where)[0])))
        _, gradient = loss(image, *doubled)
        assert gradient.dtype == np.float64
        for seed in range(5):
            direction = 1e-6 * np.random.default_rng(seed).standard_normal(image.shape)
            (ahead, _), (behind, _) = loss(image + direction, *doubled), loss(image - direction, *doubled)
            assert float(ahead - behind) / 2 == pytest.approx(float(np.sum(gradient * direction)), rel=1e-5)


def test_fewer_candidates_than_asked_for_when_the_bank_is_small(detector, images):
    small = replace(detector, memory_bank=detector.memory_bank[:4])
    where = jax.eval_shape(PatchCore.locate, small, images[0], CORNER)
    assert where.indices.shape == (POSITIONS, 4)


@pytest.mark.parametrize(
    "options", [{"coreset_ratio": 0.0}, {"coreset_ratio": 7.0}, {"max_bank": 0}, {"num_candidates": 0}, {"projection": 0}]
)
def test_options_that_make_no_sense_are_refused(images, shallow, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        PatchCore.fit(NormalImages([], (SIZE, SIZE)), shallow, **options)
