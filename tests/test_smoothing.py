import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from f2pad_jax.images._smoothing import smoothed


@pytest.mark.parametrize("sigma", [0.8, 2.0, 4.0])
def test_smoothing_equals_scipys(sigma):
    image = np.random.default_rng(0).standard_normal((37, 52)).astype(np.float32)
    expected = scipy.ndimage.gaussian_filter(image, sigma, mode="reflect", truncate=4.0)
    np.testing.assert_allclose(smoothed(jnp.asarray(image), sigma), expected, atol=1e-6)
