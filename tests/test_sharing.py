import jax
import jax.numpy as jnp
import numpy as np
import pytest

from f2pad_jax.solvers import Sharing

SIGMA0, SIGMA1, RADIUS = 1.1, 3.0, 5


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def image():
    """Pixels in normalised intensity, on which both factors of Eq. (14) matter."""
    return np.random.default_rng(0).normal(0, 1, (13, 17, 3))


@pytest.fixture(scope="module")
def gradient():
    return np.random.default_rng(1).standard_normal((13, 17, 3))


@pytest.fixture(scope="module")
def whole(image):
    """All 121 taps."""
    return Sharing(radius=RADIUS, cutoff=0.0)(jnp.asarray(image))


def naive_weights(x, radius=RADIUS, sigma0=SIGMA0, sigma1=SIGMA1):
    """Eq. (14), pixel by pixel: the weight of every offset that stays inside the image."""
    h, w, _ = x.shape
    weights = {}
    for i in range(h):
        for j in range(w):
            around = {}
            for di in range(-radius, radius + 1):
                for dj in range(-radius, radius + 1):
                    if 0 <= i + di < h and 0 <= j + dj < w:
                        colour = np.sum((x[i + di, j + dj] - x[i, j]) ** 2)
                        around[di, dj] = np.exp(-(di**2 + dj**2) / sigma0) * np.exp(-colour / sigma1)
            total = sum(around.values())
            weights[i, j] = {offset: value / total for offset, value in around.items()}
    return weights


def naive_sharing(weights, gradient):
    """Eq. (13), pixel by pixel."""
    out = np.zeros_like(gradient)
    for (i, j), around in weights.items():
        out[i, j] = sum(value * gradient[i + di, j + dj] for (di, dj), value in around.items())
    return out


def test_weights_equal_equation_14_at_every_pixel_and_offset(image, whole):
    assert len(whole.taps) == 121
    expected = naive_weights(image)
    for tap, weights in zip(whole.taps, np.asarray(whole.weights), strict=True):
        wanted = [[expected[i, j].get(tap, 0.0) for j in range(17)] for i in range(13)]
        np.testing.assert_allclose(weights, wanted, rtol=1e-10)


def test_sharing_equals_equation_13_borders_included(image, gradient, whole):
    found = whole(jnp.asarray(gradient))
    np.testing.assert_allclose(found, naive_sharing(naive_weights(image), gradient), rtol=1e-10)


def test_other_scales_and_radius_are_used(image, gradient):
    sharing = Sharing(radius=2, sigma0=4.0, sigma1=0.7, cutoff=0.0)(jnp.asarray(image))
    expected = naive_sharing(naive_weights(image, 2, 4.0, 0.7), gradient)
    np.testing.assert_allclose(sharing(jnp.asarray(gradient)), expected, rtol=1e-10)


def test_weights_sum_to_one_at_every_pixel_whatever_is_left_out(image, whole):
    for sharing in (whole, Sharing()(jnp.asarray(image)), Sharing(cutoff=0.1)(jnp.asarray(image))):
        np.testing.assert_allclose(np.sum(sharing.weights, axis=0), 1.0, rtol=1e-13)


def test_default_keeps_29_taps_and_moves_the_result_by_under_a_thousandth(image, gradient, whole):
    pruned = Sharing()(jnp.asarray(image))
    difference = np.abs(pruned(jnp.asarray(gradient)) - whole(jnp.asarray(gradient)))
    assert 0 < difference.max() < 1e-3 * np.abs(gradient).max()
    assert len(pruned.taps) == 29


def test_constant_gradient_is_preserved(image):
    constant = np.broadcast_to([1.0, -2.0, 0.5], image.shape)
    np.testing.assert_allclose(Sharing()(jnp.asarray(image))(jnp.asarray(constant)), constant, rtol=1e-13)


def test_similar_neighbours_weigh_more(image):
    x = np.zeros_like(image)
    x[6, 9], x[6, 7] = 0.2, 2.0
    sharing = Sharing()(jnp.asarray(x))
    at = dict(zip(sharing.taps, np.asarray(sharing.weights)[:, 6, 8], strict=True))
    assert at[0, 0] > at[0, 1] > at[0, -1] > 0
    assert at[0, 1] / at[0, -1] == pytest.approx(np.exp(3 * (2.0**2 - 0.2**2) / SIGMA1))


def test_pixels_of_a_distant_colour_share_nothing(image):
    x = np.zeros_like(image)
    x[:, 8:] = 100.0
    gradient = np.where(x == 0, 1.0, -1.0)
    np.testing.assert_allclose(Sharing()(jnp.asarray(x))(jnp.asarray(gradient)), gradient)


def test_an_image_smaller_than_the_neighbourhood():
    x = np.random.default_rng(2).normal(0, 1, (2, 1, 3))
    found = Sharing(radius=3, cutoff=0.0)(jnp.asarray(x))(jnp.asarray(x))
    np.testing.assert_allclose(found, naive_sharing(naive_weights(x, 3), x), rtol=1e-10)


def test_the_same_under_jit_and_vmap(image, gradient):
    def direction(x, g):
        return Sharing(radius=2)(x)(g)

    images, gradients = jnp.stack([image, image[::-1]]), jnp.stack([gradient, gradient[:, ::-1]])
    found = jax.jit(jax.vmap(direction))(images, gradients)
    for one, x, g in zip(found, images, gradients, strict=True):
        np.testing.assert_allclose(one, direction(x, g), rtol=1e-12)
