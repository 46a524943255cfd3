import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from f2pad_jax.images._smoothing import guided, smoothed


@pytest.mark.parametrize("sigma", [0.8, 2.0, 4.0])
def test_smoothing_equals_scipys(sigma):
    image = np.random.default_rng(0).standard_normal((37, 52)).astype(np.float32)
    expected = scipy.ndimage.gaussian_filter(image, sigma, mode="reflect", truncate=4.0)
    np.testing.assert_allclose(smoothed(jnp.asarray(image), sigma), expected, atol=1e-6)


def test_guided_filter_equals_a_least_squares_fit_in_every_window():
    rng = np.random.default_rng(0)
    image, values, radius, epsilon = rng.random((11, 12, 3)), rng.random((11, 12)), 1, 0.01
    models = np.zeros((11, 12, 4))
    for i in range(1, 10):
        for j in range(1, 11):
            window = np.s_[i - radius : i + radius + 1, j - radius : j + radius + 1]
            guide, target = image[window].reshape(-1, 3), values[window].ravel()
            centred = guide - guide.mean(0)
            slope = np.linalg.solve(centred.T @ centred / 9 + epsilon * np.eye(3), centred.T @ (target - target.mean()) / 9)
            models[i, j] = [*slope, target.mean() - slope @ guide.mean(0)]
    found = guided(*(jnp.asarray(a, jnp.float32) for a in (values, image)), radius, epsilon**0.5)
    for i in range(2, 9):
        for j in range(2, 10):
            model = models[i - 1 : i + 2, j - 1 : j + 2].mean((0, 1))
            assert found[i, j] == pytest.approx(model[:3] @ image[i, j] + model[3], abs=1e-6)


def test_guided_filter_keeps_what_the_guide_explains():
    image = np.random.default_rng(1).random((30, 30, 3))
    values = image @ [0.2, -0.5, 1.0] + 0.3
    found = guided(jnp.asarray(values, jnp.float32), jnp.asarray(image, jnp.float32), 8, 1e-3)
    np.testing.assert_allclose(found, values, atol=1e-4)


def test_guided_filter_of_a_grey_guide_does_not_fail():
    """The covariance of equal channels has rank 1: only the floor keeps it invertible."""
    rng = np.random.default_rng(2)
    grey = np.repeat(scipy.ndimage.gaussian_filter(rng.random((40, 50)), 2)[..., None], 3, axis=-1)
    mask = grey[..., 0] > np.median(grey)
    found = guided(jnp.asarray(mask, jnp.float32), jnp.asarray(4 * grey, jnp.float32), 8, 0.01)
    assert np.isfinite(found).all() and np.mean((np.asarray(found) > 0.5) == mask) > 0.97
