import math
import shutil
import sys
from dataclasses import replace
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
import scipy.stats
from conftest import check_map_of_batches, maps_of, smooth_image
from flax import nnx

import f2pad_jax
from f2pad_jax.backbones import BACKBONES, find_network
from f2pad_jax.detectors import CFlow, NormalImages
from f2pad_jax.detectors._flow import Coupling, Flow
from f2pad_jax.detectors._training import batches, rate_factors, rotated, train
from f2pad_jax.detectors.cflow import enlarged_aligned, position_encoding
from f2pad_jax.errors import CheckpointError, OptionError

SIZE = 64
SIDES = (16, 8)
"""Positions along the two layers tapped, at strides 4 and 8."""
COUNTS = (24, 40)
"""Their channels."""
CORNER = jnp.zeros(2, jnp.int32)

flow_jit = jax.jit(lambda flow, features, condition: flow(features, flow.biases(condition)))
log_likelihood = jax.jit(lambda flow, features, condition: flow.log_likelihood(features, flow.biases(condition)))


def initial_flow(seed, channels, num_blocks):
    rng = np.random.default_rng(seed)
    return Flow(tuple(Coupling.initial(rng, channels) for _ in range(num_blocks)))


def perturbed(flow, seed, dtype=np.float32):
    """Everything that is trained moved by a tenth of a standard normal."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        return jnp.asarray(leaf + 0.1 * rng.standard_normal(leaf.shape), dtype)

    def orthogonal(matrix):
        u, _, v = np.linalg.svd(np.asarray(matrix, dtype))
        return jnp.asarray(u @ v)

    return Flow(tuple(replace(jax.tree.map(moved, b), rotation=orthogonal(b.rotation)) for b in flow.blocks))


def samples(seed, count, channels, dtype=np.float32):
    """Features and conditions."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((count, c)), dtype) for c in (channels, 128)]


def same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(one, other)


# The flow


@pytest.mark.parametrize("channels", [6, 7, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_flow_gives_freias_latents_and_log_determinants(channels, seed):
    """To 1e-5 of the largest latent, and of the largest log-determinant."""
    torch = pytest.importorskip("torch")
    framework, modules = pytest.importorskip("FrEIA.framework"), pytest.importorskip("FrEIA.modules")
    torch.manual_seed(seed)

    def subnet(c_in, c_out):
        return torch.nn.Sequential(torch.nn.Linear(c_in, 2 * c_in), torch.nn.ReLU(), torch.nn.Linear(2 * c_in, c_out))

    theirs = framework.SequenceINN(channels)
    for _ in range(8):
        theirs.append(
            modules.AllInOneBlock,
            cond=0,
            cond_shape=(128,),
            subnet_constructor=subnet,
            affine_clamping=1.9,
            global_affine_type="SOFTPLUS",
            permute_soft=True,
        )
    ours = initial_flow(seed, channels, 8)
    for block in theirs.module_list:
        fresh = block.global_scale.detach().numpy()[0]
        np.testing.assert_allclose(fresh, ours.blocks[0].global_scale, rtol=1e-6)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)

    def copied(block):
        tensors = (
            block.subnet[0].weight.T,
            block.subnet[0].bias,
            block.subnet[2].weight.T,
            block.subnet[2].bias,
            block.global_scale[0],
            block.global_offset[0],
            block.w_perm,
        )
        return Coupling(*[jnp.asarray(t.detach().numpy()) for t in tensors])

    flow = Flow(tuple(copied(block) for block in theirs.module_list))
    assert jax.tree.map(jnp.shape, flow) == jax.tree.map(jnp.shape, ours)
    features, condition = samples(seed, 50, channels)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(features)), [torch.tensor(np.asarray(condition))])
    for one, other in zip(flow_jit(flow, features, condition), expected, strict=True):
        other = other.numpy()
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_log_determinant_is_that_of_the_jacobian(channels):
    with jax.enable_x64(True):
        flow = perturbed(initial_flow(0, channels, 2), 1, np.float64)
        features, condition = samples(2, 5, channels, np.float64)
        jacobian = jax.jit(jax.vmap(jax.jacobian(lambda f, c: flow_jit(flow, f[None], c[None])[0][0])))(features, condition)
        sign, expected = jnp.linalg.slogdet(jacobian)
        _, found = flow_jit(flow, features, condition)
        assert np.all(np.asarray(sign) == 1)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
        assert np.std(found) > 1e-3


def inverse(flow, latents, condition):
    """From latents to features, in double precision."""
    x, condition = np.asarray(latents, np.float64), np.asarray(condition, np.float64)
    for block in reversed(flow.blocks):
        b = {name: np.asarray(value, np.float64) for name, value in vars(block).items()}
        half = x.shape[1] // 2
        x = np.linalg.solve(b["rotation"], x.T).T - b["global_offset"]
        x = x / (0.2 * np.log1p(np.exp(0.5 * b["global_scale"])))
        first, second = x[:, :-half], x[:, -half:]
        hidden = np.maximum(np.concatenate([first, condition], axis=1) @ b["weight1"] + b["bias1"], 0)
        scale, shift = np.split(0.1 * (hidden @ b["weight2"] + b["bias2"]), 2, axis=1)
        x = np.concatenate([first, (second - shift) / np.exp(1.9 * np.tanh(scale))], axis=1)
    return x


@pytest.mark.parametrize("channels", [4, 5])
def test_flow_is_inverted_block_by_block(channels):
    flow = perturbed(initial_flow(0, channels, 4), 1)
    features, condition = samples(2, 30, channels)
    latents, _ = flow_jit(flow, features, condition)
    assert np.abs(latents - features).max() > 0.5
    np.testing.assert_allclose(inverse(flow, latents, condition), features, rtol=0, atol=1e-4)


def test_density_integrates_to_one():
    flow = perturbed(initial_flow(3, 2, 3), 4)
    side, step = 20, 0.1
    axis = np.arange(-side, side, step, dtype=np.float32)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    _, condition = samples(5, 1, 2)
    parts = [log_likelihood(flow, part, jnp.broadcast_to(condition, (len(part), 128))) for part in jnp.split(grid, 8)]
    density = np.exp(2 * np.concatenate(parts, dtype=np.float64))
    assert np.sum(density) * step**2 == pytest.approx(1, abs=1e-3)


def test_fresh_flow_has_scale_one_a_rotation_and_pytorchs_range_of_weights():
    (block,) = initial_flow(0, 7, 1).blocks
    np.testing.assert_allclose(0.2 * np.log1p(np.exp(0.5 * np.asarray(block.global_scale))), 1, rtol=1e-6)
    np.testing.assert_array_equal(block.global_offset, np.zeros(7))
    np.testing.assert_allclose(block.rotation @ block.rotation.T, np.eye(7), rtol=0, atol=1e-6)
    assert np.linalg.det(block.rotation) == pytest.approx(1, abs=1e-5)
    for values, fan_in in [(block.weight1, 132), (block.bias1, 132), (block.weight2, 264), (block.bias2, 264)]:
        limit = 1 / np.sqrt(fan_in)
        assert 0.5 * limit < np.abs(values).max() <= limit * (1 + 1e-6)
    assert block.weight1.shape == (132, 264)
    assert block.weight2.shape == (264, 6)
    other = initial_flow(1, 7, 1).blocks[0]
    assert not np.allclose(block.rotation, other.rotation)


@pytest.mark.parametrize("channels", [3, 8])
def test_log_likelihood_is_the_normal_density_of_the_latent_and_the_determinant_per_channel(channels):
    flow = perturbed(initial_flow(0, channels, 2), 1)
    features, condition = samples(2, 20, channels)
    latents, log_determinant = (np.asarray(a, np.float64) for a in flow_jit(flow, features, condition))
    expected = (scipy.stats.norm.logpdf(latents).sum(axis=1) + log_determinant) / channels
    np.testing.assert_allclose(log_likelihood(flow, features, condition), expected, rtol=1e-5)


@pytest.mark.parametrize("size", [(3, 5), (7, 2), (28, 28)])
def test_position_encoding_is_the_published_formula(size):
    expected = np.zeros((*size, 128))
    for y, x, i in np.ndindex(*size, 32):
        frequency = 1 / 10_000 ** (2 * i / 64)
        expected[y, x, 2 * i] = math.sin(x * frequency)
        expected[y, x, 2 * i + 1] = math.cos(x * frequency)
        expected[y, x, 64 + 2 * i] = math.sin(y * frequency)
        expected[y, x, 64 + 2 * i + 1] = math.cos(y * frequency)
    np.testing.assert_allclose(position_encoding(*size), expected, rtol=0, atol=1e-6)


# Training


def published_rate(lr, epoch, sub_epoch, batch, meta_epochs, sub_epochs, num_batches):
    """The rate the authors' code sets before a batch: adjust_learning_rate, then warmup_learning_rate."""
    eta_min = lr * 0.1**3
    if epoch < 2:
        warm_from = lr / 10
        warm_to = eta_min + (lr - eta_min) * (1 + math.cos(math.pi * 2 / meta_epochs)) / 2
        total = num_batches * sub_epochs
        share = (batch + sub_epoch * num_batches + epoch * total) / (2 * total)
        return warm_from + share * (warm_to - warm_from)
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * epoch / meta_epochs)) / 2


@pytest.mark.parametrize("meta_epochs", [2, 3, 25])
def test_learning_rate_is_the_published_one_at_every_batch(meta_epochs):
    sub_epochs, num_batches = 8, 5
    moments = [(epoch, sub, i) for epoch in range(meta_epochs) for sub in range(sub_epochs) for i in range(num_batches)]
    expected = [published_rate(2e-4, *moment, meta_epochs, sub_epochs, num_batches) for moment in moments]
    epochs = np.array([epoch + (sub + i / num_batches) / sub_epochs for epoch, sub, i in moments])
    np.testing.assert_allclose(2e-4 * rate_factors(epochs, meta_epochs), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "size", "shape"), [(10, 3, (3, 3)), (256, 256, (1, 256)), (5, 256, (1, 5)), (1, 4, (1, 1))]
)
def test_batches_hold_each_index_at_most_once_and_leave_the_remainder_out(count, size, shape):
    found = batches(np.random.default_rng(0), count, size)
    assert found.shape == shape
    assert len(np.unique(found)) == found.size
    assert found.min() >= 0 and found.max() < count


def test_batches_are_drawn_anew_every_time_and_leave_out_other_indices():
    rng = np.random.default_rng(0)
    draws = [batches(rng, 10, 3) for _ in range(50)]
    assert len({d.tobytes() for d in draws}) == 50
    assert set(np.concatenate(draws).ravel().tolist()) == set(range(10))


def test_training_steps_are_optax_adams():
    features, _ = samples(0, 24, 4)
    conditions = jnp.asarray(position_encoding(2, 3).reshape(6, 128))
    start = perturbed(initial_flow(1, 4, 2), 2)
    order = np.random.default_rng(3).permutation(24).reshape(3, 8).astype(np.int32)
    rates = np.array([1e-2, 2e-2, 5e-3], np.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(flow, indices):
        of_positions = jnp.tile(conditions, (4, 1))[indices]  # four images of six positions
        return -jnp.mean(jax.nn.log_sigmoid(log_likelihood(flow, features[indices], of_positions)))

    optimiser = optax.adam(lambda count: jnp.asarray(rates)[count])
    flow, state, losses = start, optimiser.init(start), []
    for indices in order:
        value, gradient = loss(flow, indices)
        updates, state = optimiser.update(gradient, state)
        flow = optax.apply_updates(flow, updates)
        losses.append(value)
    found, _, mean_loss = train(
        start, optax.scale_by_adam().init(start), features, conditions, jnp.asarray(order), jnp.asarray(rates)
    )
    assert float(mean_loss) == pytest.approx(np.mean(losses), rel=1e-5)
    for one, other, before in zip(*map(jax.tree.leaves, (found, flow, start)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        assert np.all(one == before) if one.shape == (4, 4) else np.abs(one - before).max() > 1e-2  # the rotation is fixed


def test_training_finds_a_distribution_that_depends_on_the_position():
    """To within 0.05 of the true log-likelihood of vectors not trained on."""
    channels, side, epochs = 3, 3, 24
    rng = np.random.default_rng(0)
    means = rng.normal(0, 1.5, (side * side, channels))
    factor = np.array([[1.2, 0, 0], [0.8, 0.8, 0], [-0.4, 0.4, 1.2]])
    training, held_out = (means + rng.standard_normal((400, side * side, channels)) @ factor.T for _ in range(2))
    conditions = jnp.asarray(position_encoding(side, side).reshape(side * side, 128))
    flow = initial_flow(0, channels, 4)
    state = optax.scale_by_adam().init(flow)
    vectors = jnp.asarray(training.reshape(-1, channels), jnp.float32)
    losses = []
    for epoch in range(epochs):
        order = batches(rng, len(vectors), 256)
        rates = rate_factors(epoch + np.arange(len(order)) / len(order), epochs)
        flow, state, loss = train(flow, state, vectors, conditions, jnp.asarray(order), 2e-2 * jnp.asarray(rates))
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3
    residuals = (held_out - means).reshape(-1, channels)
    true = np.mean(scipy.stats.multivariate_normal.logpdf(residuals, np.zeros(channels), factor @ factor.T)) / channels
    vectors = jnp.asarray(held_out.reshape(-1, channels), jnp.float32)
    where = np.tile(conditions, (400, 1))
    found = np.mean(log_likelihood(flow, vectors, jnp.asarray(where)))
    misplaced = np.mean(log_likelihood(flow, vectors, jnp.asarray(np.roll(where, 1, axis=0))))
    assert true - 0.05 < found < true + 0.01
    assert misplaced < found - 0.5


# Fitting


@pytest.fixture(scope="module")
def shallow(backbone):
    """The second and third stage, which compile faster than the default layers."""
    return replace(backbone, layers=("stage2", "stage3"))


@pytest.fixture(scope="module")
def normals():
    return NormalImages([smooth_image(seed) for seed in range(3)], (SIZE, SIZE))


@pytest.fixture(scope="module")
def test_image():
    return NormalImages([smooth_image(99)], (SIZE, SIZE))[0]


OPTIONS = {"num_blocks": 1, "meta_epochs": 4, "sub_epochs": 3, "batch_size": 10_000, "rotation": 0.0}


@pytest.fixture(scope="module")
def stages():
    """Everything the progress callback was told, as the detector below was fitted."""
    return []


@pytest.fixture(scope="module")
def detector(normals, shallow, stages):
    def progress(*told):
        stages.append(told)

    return CFlow.fit(normals, shallow, seed=5, progress=progress, learning_rate=3e-2, **OPTIONS)


def encodings(size=(SIZE, SIZE)):
    """Of every position of both layers."""
    return [position_encoding(size[0] // stride, size[1] // stride) for stride in (4, 8)]


def test_fitting_is_adam_at_the_published_rates_on_the_features_of_all_images(detector, normals, shallow):
    """Where all vectors make one batch and no image is turned, nothing is drawn at random but the first weights."""

    def mean_loss(flow, vectors, where):
        return -jnp.mean(jax.nn.log_sigmoid(log_likelihood(flow, vectors, where)))

    rng = np.random.default_rng(5)
    maps = [maps_of(shallow, normals[i]) for i in range(3)]
    for k, condition in enumerate(encodings()):
        vectors = jnp.concatenate([m[k].reshape(-1, COUNTS[k]) for m in maps])
        where = jnp.asarray(np.tile(condition.reshape(-1, 128), (3, 1)))
        moments = [(epoch, sub) for epoch in range(4) for sub in range(3)]
        rates = jnp.asarray([published_rate(3e-2, epoch, sub, 0, 4, 3, 1) for epoch, sub in moments])
        optimiser = optax.adam(lambda count, rates=rates: rates[count])

        @jax.jit
        def step(flow, state, vectors, where, optimiser=optimiser):
            value, gradient = jax.value_and_grad(mean_loss)(flow, vectors, where)
            updates, state = optimiser.update(gradient, state)
            return optax.apply_updates(flow, updates), state, value

        flow = Flow((Coupling.initial(rng, COUNTS[k]),))
        state, losses = optimiser.init(flow), []
        for _ in moments:
            flow, state, loss = step(flow, state, vectors, where)
            losses.append(loss)
        expected = np.reshape(losses, (4, 3)).mean(axis=1)
        np.testing.assert_allclose(detector.losses[:, k], expected, rtol=1e-3)
        assert expected[-1] < 0.7 * expected[0]


def test_progress_counts_the_passes_and_tells_the_loss(detector, stages):
    assert [done for _, done, _ in stages] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12]
    assert {total for *_, total in stages} == {12}
    assert stages[0][0] == "training"
    assert stages[-1][0] == f"training, loss {float(detector.losses[-1].sum()):.4f}"


class Outputs(NamedTuple):
    maps: tuple
    log_likelihoods: tuple
    raw_scores: tuple
    anomaly_map: jax.Array


@pytest.fixture(scope="module")
def outputs(detector, normals, test_image):
    """For each normal image and, last, another."""

    @jax.jit
    def apply(detector, image):
        where = detector.locate(image, CORNER)
        found = detector.log_likelihoods(image, where), detector.raw_scores(image, where), detector.anomaly_map(image)
        return Outputs(maps_of(detector.backbone, image), *found)

    return [jax.tree.map(np.asarray, apply(detector, image)) for image in (*normals, test_image)]


def test_peaks_are_the_largest_log_likelihoods_of_the_normal_images(detector, outputs):
    found = [[m.max() for m in output.log_likelihoods] for output in outputs[:3]]
    np.testing.assert_allclose(detector.peaks, np.max(found, axis=0), rtol=1e-5)


# Scores and the anomaly map


def test_log_likelihoods_are_the_flows_of_the_features_at_their_positions(detector, outputs):
    layers = zip(detector.flows, outputs[-1].maps, encodings(), SIDES, outputs[-1].log_likelihoods, strict=True)
    for flow, features, condition, side, found in layers:
        flat = [jnp.asarray(a).reshape(side * side, -1) for a in (features, condition)]
        expected = np.asarray(log_likelihood(flow, *flat)).reshape(side, side)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_raw_scores_are_minus_log_sigmoid_and_fall_as_the_likelihood_grows(outputs):
    for score, log_p in zip(outputs[-1].raw_scores, outputs[-1].log_likelihoods, strict=True):
        np.testing.assert_allclose(score, np.log1p(np.exp(-log_p.astype(np.float64))), rtol=1e-4)
        assert np.all(score >= 0)
        assert np.all(np.diff(score.ravel()[np.argsort(log_p.ravel())]) <= 0)


def test_anomaly_map_is_the_number_of_layers_less_their_normality_enlarged(detector, outputs):
    for output in outputs:
        expected = np.full((SIZE, SIZE), 2.0)
        for log_p, peak, side in zip(output.log_likelihoods, detector.peaks, SIDES, strict=True):
            at = np.linspace(0, side - 1, SIZE)
            normality = np.exp(log_p.astype(np.float64) - float(peak))
            expected -= scipy.ndimage.map_coordinates(normality, np.meshgrid(at, at, indexing="ij"), order=1)
        np.testing.assert_allclose(output.anomaly_map, expected, rtol=0, atol=1e-5)
        assert output.anomaly_map.std() > 1e-2


def test_anomaly_map_of_a_normal_image_lies_between_nothing_and_the_number_of_layers(outputs):
    maps = np.stack([output.anomaly_map for output in outputs[:3]])
    assert -1e-5 <= maps.min() < maps.max() <= 2


@pytest.mark.parametrize(("shape", "size"), [((3, 5), (12, 7)), ((4, 4), (4, 4)), ((1, 3), (6, 9)), ((5, 2), (1, 1))])
def test_enlarging_keeps_the_corner_values_at_the_corners(shape, size):
    scores = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    at = [np.linspace(0, n - 1, m) for n, m in zip(shape, size, strict=True)]
    expected = scipy.ndimage.map_coordinates(scores.astype(np.float64), np.meshgrid(*at, indexing="ij"), order=1)
    np.testing.assert_allclose(enlarged_aligned(jnp.asarray(scores), size), expected, rtol=0, atol=1e-6)


def test_anomaly_map_does_not_depend_on_the_other_images_of_a_batch(detector, normals, test_image, outputs):
    alone = outputs[-1].anomaly_map
    check_map_of_batches(detector, alone, test_image, normals)


@jax.jit
def window_scores(detector, window, corner):
    where = detector.locate(window, corner)
    return maps_of(detector.backbone, window), where, detector.raw_scores(window, where)


@pytest.mark.parametrize("corner", [(0, 0), (8, 16), (40, 0), (40, 32)])
def test_window_has_the_position_encodings_of_its_corner(detector, test_image, corner):
    (top, left), (h, w) = corner, (24, 32)
    window = test_image[top : top + h, left : left + w]
    found = window_scores(detector, window, jnp.array(corner))
    for flow, whole, s, features, biases, score in zip(detector.flows, encodings(), (4, 8), *found, strict=True):
        here = whole[top // s : (top + h) // s, left // s : (left + w) // s]
        for bias, block in zip(biases, flow.blocks, strict=True):
            weights = np.asarray(block.weight1, np.float64)[-128:]
            np.testing.assert_allclose(bias, here @ weights + block.bias1, rtol=0, atol=1e-5 * np.abs(bias).max())
        flat = [jnp.asarray(a).reshape(h * w // s**2, -1) for a in (features, here)]
        expected = np.logaddexp(0, -np.asarray(log_likelihood(flow, *flat), np.float64)).reshape(score.shape)
        np.testing.assert_allclose(score, expected, rtol=1e-4)


def test_gradient_of_the_scores_equals_directional_differences(shallow, test_image):
    two_layers = replace(shallow, layers=("stage1.project", "stage1"))
    flows = tuple(perturbed(initial_flow(k, 16, 1), k) for k in range(2))
    single = CFlow(two_layers, (SIZE, SIZE), flows, jnp.zeros(2), jnp.zeros((1, 2)))
    where = single.locate(test_image, CORNER)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda v: v.astype(np.float64) if eqx.is_inexact_array(v) else v, (single, where))
        image = test_image.astype(np.float64)

        @jax.jit
        @jax.value_and_grad
        def loss(image, detector, where):
            return sum(jnp.sum(score) for score in detector.raw_scores(image, where))

        _, gradient = loss(image, *double)
        assert gradient.dtype == np.float64
        for seed in range(5):
            # small enough to cross next to none of the kinks of ReLU and ReLU6
            direction = 1e-8 * np.random.default_rng(seed).standard_normal(image.shape)
            (ahead, _), (behind, _) = loss(image + direction, *double), loss(image - direction, *double)
            assert float(ahead - behind) / 2 == pytest.approx(float(np.sum(gradient * direction)), rel=1e-5)


# Turned images


def test_image_turned_by_nothing_is_itself():
    image = jnp.asarray(smooth_image(0))
    np.testing.assert_array_equal(rotated(image, jnp.float32(0)), image)


def test_image_turned_by_a_right_angle_is_numpys():
    image = smooth_image(0)
    turned, back = (rotated(jnp.asarray(image), jnp.float32(degrees)) for degrees in (90, -90))
    direction = 1 if np.allclose(turned, np.rot90(image), atol=1e-4) else -1
    np.testing.assert_allclose(turned, np.rot90(image, direction), rtol=0, atol=1e-4)
    np.testing.assert_allclose(back, np.rot90(image, -direction), rtol=0, atol=1e-4)


@pytest.mark.parametrize("degrees", [5.0, -3.0, 30.0])
def test_turning_is_bilinear_and_repeats_the_border(degrees):
    image = smooth_image(0)[:40]
    found = np.asarray(rotated(jnp.asarray(image), jnp.float32(degrees)))
    options = {"axes": (0, 1), "reshape": False, "order": 1, "mode": "nearest"}
    expected = [scipy.ndimage.rotate(image.astype(np.float64), angle, **options) for angle in (degrees, -degrees)]
    errors = [np.abs(found - e).max() for e in expected]
    assert min(errors) < 1e-4 < 1e-2 < max(errors)
    assert found.min() >= image.min() and found.max() <= image.max()


# Taking a training up again


class Interruption(Exception):
    pass


SMALL = {"num_blocks": 1, "meta_epochs": 3, "sub_epochs": 2, "batch_size": 64, "learning_rate": 1e-2, "seed": 7}


@pytest.fixture(scope="module")
def shallowest(backbone):
    """Two taps with maps of one shape, so that training is compiled but once."""
    return replace(backbone, layers=("stage1.project", "stage1"))


@pytest.fixture(scope="module")
def small_images():
    return NormalImages([smooth_image(seed, 32) for seed in range(2)], (32, 32))


@pytest.fixture(scope="module")
def interrupted(small_images, shallowest, tmp_path_factory):
    """The file of a training that stopped in the middle of its second meta-epoch."""
    path = tmp_path_factory.mktemp("resume") / "state.safetensors"

    def progress(stage, done, total):
        if done == 3:  # of six passes
            raise Interruption

    with pytest.raises(Interruption):
        CFlow.fit(small_images, shallowest, progress=progress, resume=path, **SMALL)
    return path


@pytest.fixture
def state_file(interrupted, tmp_path):
    return shutil.copy(interrupted, tmp_path / "state.safetensors")


@pytest.fixture(scope="module")
def finished_file(tmp_path_factory):
    return tmp_path_factory.mktemp("resume") / "state.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(small_images, shallowest, finished_file):
    """A training that went through, and its file."""
    return CFlow.fit(small_images, shallowest, resume=finished_file, **SMALL)


def test_resumed_training_gives_every_bit_of_an_uninterrupted_one(state_file, small_images, shallowest, uninterrupted):
    told = []
    found = CFlow.fit(small_images, shallowest, progress=lambda *args: told.append(args), resume=state_file, **SMALL)
    assert told[0] == ("training", 2, 6)  # the first meta-epoch was not repeated
    assert state_file.exists()  # what was trained is yet to be calibrated
    for name in ("flows", "losses", "peaks"):
        same_bits(getattr(found, name), getattr(uninterrupted, name))
    assert np.all(np.asarray(found.losses) > 0)


def test_training_that_was_done_when_it_stopped_is_only_read(finished_file, small_images, shallowest, uninterrupted):
    told = []
    found = CFlow.fit(small_images, shallowest, progress=lambda *args: told.append(args), resume=finished_file, **SMALL)
    assert told == [] and finished_file.exists()
    for name in ("flows", "losses", "peaks"):
        same_bits(getattr(found, name), getattr(uninterrupted, name))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found.flows))


@pytest.mark.parametrize("option", [{"seed": 8}, {"batch_size": 65}, {"meta_epochs": 4}, {"learning_rate": 2e-2}])
def test_file_of_a_training_with_other_options_is_refused(state_file, small_images, shallowest, option):
    with pytest.raises(CheckpointError, match="another training"):
        CFlow.fit(small_images, shallowest, resume=state_file, **{**SMALL, **option})
    assert state_file.exists()


def test_file_of_a_training_with_other_images_layers_or_weights_is_refused(state_file, small_images, shallowest):
    for images, backbone in [
        (NormalImages([smooth_image(seed, 32) for seed in (0, 2)], (32, 32)), shallowest),
        (small_images.subset([1, 0]), shallowest),
        (small_images, replace(shallowest, layers=("stage1", "stage1.project"))),
        (small_images, replace(shallowest, checksum=shallowest.checksum ^ 1)),
    ]:
        with pytest.raises(CheckpointError, match="another training"):
            CFlow.fit(images, backbone, resume=state_file, **SMALL)


@pytest.mark.parametrize("damage", ["cut short", "garbage", "empty", "a folder"])
def test_damaged_file_is_refused(state_file, small_images, shallowest, damage):
    data = state_file.read_bytes()
    if damage == "a folder":
        state_file.unlink()
        state_file.mkdir()
    else:
        state_file.write_bytes({"cut short": data[: len(data) // 2], "garbage": b"\xff" * 500, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"state\.safetensors: (damaged|no such file)"):
        CFlow.fit(small_images, shallowest, resume=state_file, **SMALL)


def header_end(data):
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("at", ["first value", "middle", "last value"])
def test_file_with_an_altered_byte_is_refused(state_file, small_images, shallowest, at):
    data = bytearray(state_file.read_bytes())
    start = header_end(data)
    data[{"first value": start, "middle": (start + len(data)) // 2, "last value": len(data) - 1}[at]] ^= 1
    state_file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        CFlow.fit(small_images, shallowest, resume=state_file, **SMALL)
    assert state_file.read_bytes() == data


def test_state_that_cannot_be_written_is_told_before_the_training(small_images, shallowest, tmp_path):
    path, told = tmp_path / "file" / "state.safetensors", []
    path.parent.touch()
    with pytest.raises(CheckpointError, match="can't be written") as refusal:
        CFlow.fit(small_images, shallowest, progress=lambda *args: told.append(args), resume=path, **SMALL)
    assert told == [] and "\n" not in str(refusal.value)


def test_file_is_kept_until_all_is_measured(shallowest, tmp_path, monkeypatch):
    images, path = [smooth_image(seed, 32) for seed in range(3)], tmp_path / "new" / "state.safetensors"

    def fitted(progress=lambda *args: None):
        return f2pad_jax.fit(CFlow, images, shallowest, size=(32, 32), progress=progress, resume=path, **SMALL)

    def stop(*args, **kwargs):
        raise Interruption

    for holder, name in ((CFlow, "with_peaks"), (sys.modules["f2pad_jax.detectors.fitting"], "with_maps")):
        with monkeypatch.context() as power_cut:
            power_cut.setattr(holder, name, stop)
            with pytest.raises(Interruption):
                fitted()
        assert path.exists()
    told = []
    found = fitted(lambda *args: told.append(args))
    assert told and not any(stage.startswith("training") for stage, *_ in told)
    assert not path.exists()
    expected = f2pad_jax.fit(CFlow, images, shallowest, size=(32, 32), **SMALL)
    for name in ("flows", "losses", "peaks"):
        same_bits(getattr(found, name), getattr(expected, name))


# The layers tapped


@pytest.mark.parametrize("name", BACKBONES)
def test_few_images_leave_the_deepest_layer_out(name):
    network = find_network(name)
    layers = CFlow.default_layers(network, 17)
    assert len(layers) == 3 and all(layer in network.strides for layer in layers)
    strides = [network.strides[layer] for layer in layers]
    assert strides == sorted(strides)
    assert CFlow.default_layers(network, 16) == CFlow.default_layers(network, 2) == layers[:2]


def test_layers_of_efficientnet_b6_are_those_of_the_authors_rule():
    network = find_network("efficientnet-b6")
    layers = CFlow.default_layers(network, 100)
    assert layers == ("stage3.project", "stage5.project", "stage6.project")
    graphdef, state = nnx.split(nnx.eval_shape(lambda: network.build(layers[-1])))
    image = jax.ShapeDtypeStruct((224, 224, 3), jnp.float32)
    maps = jax.eval_shape(lambda state, image: nnx.merge(graphdef, state)(image), state, image)
    assert [maps[layer].shape for layer in layers] == [(28, 28, 72), (14, 14, 200), (7, 7, 344)]
    assert [network.strides[layer] for layer in layers] == [8, 16, 32]


def test_file_with_another_count_of_meta_epochs_is_refused(state_file, small_images, shallowest):
    data = state_file.read_bytes()
    assert data.count(b'"epochs":"1"') == 1
    state_file.write_bytes(data.replace(b'"epochs":"1"', b'"epochs":"2"'))
    with pytest.raises(CheckpointError, match="damaged"):
        CFlow.fit(small_images, shallowest, resume=state_file, **SMALL)


@pytest.mark.parametrize(
    "options", [{"num_blocks": 0}, {"meta_epochs": 0}, {"sub_epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}]
)
def test_options_that_make_no_sense_are_refused(backbone, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        CFlow.fit(NormalImages([], (SIZE, SIZE)), backbone, **options)
