import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse

from f2pad_jax import harmonic

HEIGHT, WIDTH = 20, 28

tight = jax.jit(functools.partial(harmonic, rtol=1e-10, max_steps=2000))
default = jax.jit(harmonic)


@pytest.fixture
def image():
    noise = np.random.default_rng(0).standard_normal((HEIGHT, WIDTH, 3))
    return scipy.ndimage.gaussian_filter(noise, (2, 2, 0)) * 10


def blob():
    region = np.zeros((HEIGHT, WIDTH), bool)
    region[5:13, 6:17] = region[9:16, 14:22] = True
    region[8:10, 9:12] = False  # an island of known pixels
    return region


def at_a_corner():
    region = np.zeros((HEIGHT, WIDTH), bool)
    region[:8, :10] = region[-4:, -6:] = True
    return region


def scattered():
    return np.random.default_rng(1).random((HEIGHT, WIDTH)) < 0.6


REGIONS = pytest.mark.parametrize("region", [blob(), at_a_corner(), scattered()], ids=["blob", "corner", "scattered"])


def direct(image, region):
    """Each unknown pixel is the mean of the neighbours it has, solved as one sparse system."""
    h, w = region.shape
    system, right = scipy.sparse.lil_matrix((h * w, h * w)), np.zeros((h * w, 3))
    for y in range(h):
        for x in range(w):
            here = y * w + x
            if not region[y, x]:
                system[here, here], right[here] = 1, image[y, x]
                continue
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < h and 0 <= u < w:
                    system[here, here] += 1
                    system[here, v * w + u] = -1
    return scipy.sparse.linalg.spsolve(system.tocsc(), right).reshape(image.shape)


@REGIONS
def test_equals_the_direct_solution_of_laplaces_equation(image, region):
    with jax.enable_x64(True):
        found = tight(jnp.asarray(image), jnp.asarray(region))
    np.testing.assert_allclose(found, direct(image, region), atol=1e-7)


@REGIONS
def test_default_tolerance_is_close_enough_for_a_first_guess(image, region):
    found = default(jnp.asarray(image, jnp.float32), jnp.asarray(region))
    np.testing.assert_allclose(found, direct(image, region), atol=0.01 * np.ptp(image))


@REGIONS
def test_known_pixels_are_bit_identical(image, region):
    image = image.astype(np.float32)
    found = np.asarray(default(jnp.asarray(image), jnp.asarray(region)))
    np.testing.assert_array_equal(found[~region], image[~region])
    assert not np.array_equal(found[region], image[region])


@REGIONS
def test_nothing_under_the_region_leaks_into_the_fill(image, region):
    image = image.astype(np.float32)
    painted = np.where(region[..., None], np.float32(100.0), image)
    found, other = (np.asarray(default(jnp.asarray(i), jnp.asarray(region))) for i in (image, painted))
    np.testing.assert_array_equal(found, other)


@REGIONS
def test_the_fill_stays_between_the_known_values(image, region):
    found = np.asarray(default(jnp.asarray(image, jnp.float32), jnp.asarray(region)))
    known = image[~region]
    slack = 0.01 * np.ptp(image)
    assert np.all(found >= known.min(0) - slack) and np.all(found <= known.max(0) + slack)


@REGIONS
def test_a_constant_image_stays(region):
    constant = np.broadcast_to(np.float32([0.3, -1.7, 2.2]), (HEIGHT, WIDTH, 3))
    np.testing.assert_allclose(default(jnp.asarray(constant), jnp.asarray(region)), constant, atol=1e-5)


def test_a_linear_ramp_is_continued():
    yy, xx = np.mgrid[:HEIGHT, :WIDTH]
    ramp = np.stack([0.1 * yy, 0.2 * xx - 0.05 * yy, 1.0 - 0.1 * xx], axis=-1)
    with jax.enable_x64(True):
        found = tight(jnp.asarray(ramp), jnp.asarray(blob()))
    np.testing.assert_allclose(found, ramp, atol=1e-7)


def test_without_a_region_the_image_is_returned(image):
    image = image.astype(np.float32)
    np.testing.assert_array_equal(default(jnp.asarray(image), jnp.zeros((HEIGHT, WIDTH), bool)), image)


def test_a_region_of_the_whole_image_gives_finite_values(image):
    found = default(jnp.asarray(image, jnp.float32), jnp.ones((HEIGHT, WIDTH), bool))
    assert np.all(np.isfinite(found))


def test_one_known_pixel_colours_the_whole_image(image):
    region = np.ones((HEIGHT, WIDTH), bool)
    region[3, 4] = False
    found = default(jnp.asarray(image, jnp.float32), jnp.asarray(region))
    np.testing.assert_allclose(found, np.broadcast_to(image[3, 4], image.shape), atol=1e-3)


def test_the_same_under_vmap(image):
    image = jnp.asarray(image, jnp.float32)
    regions = jnp.asarray([blob(), at_a_corner(), scattered()])
    together = jax.jit(jax.vmap(harmonic, in_axes=(None, 0)))(image, regions)
    alone = np.stack([default(image, region) for region in regions])
    np.testing.assert_allclose(together, alone, atol=1e-4)
