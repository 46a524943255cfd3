import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.sparse

from f2pad_jax import _storage as storage
from f2pad_jax import history, refine, refine_many
from f2pad_jax.backbones import _mae as mae
from f2pad_jax.backbones import _weight_files as weight_files
from f2pad_jax.backbones._conversion import parameter_shapes
from f2pad_jax.backbones.backbone import NETWORKS
from f2pad_jax.errors import CheckpointError
from f2pad_jax.images import normalise
from f2pad_jax.inpainting import MAE, Exemplar, autoencoder, exemplar, harmonic
from f2pad_jax.inpainting._choice import choose, full_name
from f2pad_jax.inpainting.patches import keeping_inside
from f2pad_jax.method import pose

HEIGHT, WIDTH = 20, 28

tight = jax.jit(functools.partial(harmonic, rtol=1e-10, max_steps=2000))
default = jax.jit(harmonic)
by_example = jax.jit(functools.partial(exemplar, rim=3))


@pytest.fixture(scope="module")
def small_autoencoder(tmp_path_factory):
    """The weight file of a masked autoencoder small enough for tests, known as ``mae-small``."""
    network = mae._network(width=48, num_heads=2, depth=2, patch=32)
    with pytest.MonkeyPatch.context() as patch:
        for networks in (mae.NETWORKS, NETWORKS):
            patch.setitem(networks, "mae-small", network)
        patch.setitem(weight_files.manifest(), "mae-small", weight_files.manifest()["mae-base"])
        rng = np.random.default_rng(0)
        tensors = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in parameter_shapes(network).items()}
        path = tmp_path_factory.mktemp("weights") / "mae-small.safetensors"
        storage.write_safetensors(path, tensors, {})
        yield path


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


def small_blob():
    region = np.zeros((HEIGHT, WIDTH), bool)
    region[6:10, 8:13] = region[9:12, 11:14] = True
    return region


def small_at_a_corner():
    region = np.zeros((HEIGHT, WIDTH), bool)
    region[:4, -5:] = True
    return region


SMALL = pytest.mark.parametrize("region", [small_blob(), small_at_a_corner()], ids=["blob", "corner"])


def best_copy(image, region, rim):
    """The image moved by the displacement that fits best on the rim, of all that move known pixels over region and rim."""
    needed = scipy.ndimage.binary_dilation(region, np.ones((2 * rim + 1, 2 * rim + 1)))
    ys, xs = np.nonzero(needed)
    on_rim = ~region[needed]
    best, copied = np.inf, None
    for dy in range(-HEIGHT, HEIGHT):
        for dx in range(-WIDTH, WIDTH):
            v, u = ys + dy, xs + dx
            if v.min() < 0 or v.max() >= HEIGHT or u.min() < 0 or u.max() >= WIDTH or region[v, u].any():
                continue
            difference = (image[v, u] - image[ys, xs])[on_rim]
            mismatch = np.sum((difference - difference.mean(axis=0)) ** 2)  # a constant will be blended away
            if mismatch < best:
                best, copied = mismatch, np.zeros_like(image)
                copied[needed] = image[v, u]
    return copied


@SMALL
def test_exemplar_is_the_best_copy_with_the_difference_spread_harmonically(image, region):
    found = by_example(jnp.asarray(image, jnp.float32), jnp.asarray(region))
    copied = best_copy(image, region, 3)
    expected = np.where(region[..., None], copied + direct(image - copied, region), image)
    np.testing.assert_allclose(found, expected, atol=0.01 * np.ptp(image))


@SMALL
def test_exemplar_continues_a_pattern_that_harmonic_smooths_away(region):
    yy, xx = np.mgrid[:HEIGHT, :WIDTH]
    pattern = np.stack([np.sin(2 * np.pi * yy / 4), np.sin(2 * np.pi * xx / 5), np.cos(2 * np.pi * xx / 5)], axis=-1)
    pattern = jnp.asarray(pattern, jnp.float32)
    by_copy, by_smoothing = (np.asarray(fill(pattern, jnp.asarray(region))) for fill in (by_example, default))
    np.testing.assert_allclose(by_copy, pattern, atol=1e-3)
    assert np.abs(by_smoothing - pattern).max() > 0.3


@SMALL
def test_exemplar_leaves_known_pixels_bit_identical_and_uses_nothing_under_the_region(image, region):
    image = image.astype(np.float32)
    painted = np.where(region[..., None], np.float32(3.0), image)
    found, other = (np.asarray(by_example(jnp.asarray(i), jnp.asarray(region))) for i in (image, painted))
    np.testing.assert_array_equal(found[~region], image[~region])
    np.testing.assert_allclose(found, other, atol=0.01 * np.ptp(image))


@pytest.mark.parametrize("region", [blob(), np.ones((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)])
def test_exemplar_without_a_displacement_that_fits_is_harmonic(image, region):
    image, region = jnp.asarray(image, jnp.float32), jnp.asarray(region)
    found = by_example(image, region)
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found, default(image, region), atol=1e-5)


def test_exemplar_is_the_same_under_vmap(image):
    image = jnp.asarray(image, jnp.float32)
    regions = jnp.asarray([small_blob(), small_at_a_corner(), blob()])
    together = jax.jit(jax.vmap(functools.partial(exemplar, rim=3), in_axes=(None, 0)))(image, regions)
    alone = np.stack([by_example(image, region) for region in regions])
    np.testing.assert_allclose(together, alone, atol=1e-3)


def others(image, seed=2):
    """Two normal images: one of noise, and the image itself, brighter and shifted."""
    noise = np.random.default_rng(seed).standard_normal(image.shape)
    return jnp.asarray(np.stack([noise, np.roll(image, (2, -3), (0, 1)) + 0.5]), jnp.float32)


def test_exemplar_borrows_from_another_image_what_fits_but_for_a_constant(image):
    region = small_blob()
    painted = np.where(region[..., None], 3.0, image)
    found = by_example(jnp.asarray(painted, jnp.float32), jnp.asarray(region), others=others(image))
    np.testing.assert_allclose(found, image, atol=0.01 * np.ptp(image))
    alone = by_example(jnp.asarray(painted, jnp.float32), jnp.asarray(region))
    assert np.abs(alone - image).max() > 0.1 * np.ptp(image)


def test_exemplar_borrows_nothing_from_images_that_fit_worse(image):
    pattern = jnp.asarray(
        np.stack([np.sin(2 * np.pi * np.mgrid[:HEIGHT, :WIDTH][i % 2] / 4) for i in range(3)], -1), jnp.float32
    )
    region = jnp.asarray(small_blob())
    noise = jnp.asarray(np.random.default_rng(3).standard_normal((1, *pattern.shape)), jnp.float32)
    np.testing.assert_allclose(by_example(pattern, region, others=noise), by_example(pattern, region), atol=1e-5)


def test_an_exemplar_reads_the_images_a_detector_keeps():
    rng = np.random.default_rng(4)
    normals = rng.integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    region = jnp.asarray(small_blob())
    truth = normalise(jnp.asarray(normals[1], jnp.float32) / 255)
    found = Exemplar(jnp.asarray(normals))(jnp.where(region[..., None], 0.0, truth), region)
    np.testing.assert_allclose(found, truth, atol=0.02)


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("F2PAD_CACHE", str(tmp_path))


def test_a_name_gives_its_inpainter(nothing_installed):
    assert choose("exemplar") is exemplar
    normals = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    inpainter = choose("exemplar", normals)
    assert isinstance(inpainter, Exemplar) and inpainter.normals is normals
    assert choose("harmonic", normals) is harmonic


def test_any_callable_is_taken():
    def own(image, region):
        return image

    assert choose(own) is own
    bound = functools.partial(own)
    assert choose(bound) is bound


def test_mae_without_weights_and_unknown_names_are_refused(nothing_installed):
    with pytest.raises(CheckpointError, match="f2pad weights fetch mae-large"):
        choose("mae")
    with pytest.raises(CheckpointError, match="'telea'; known: exemplar, mae, harmonic"):
        choose("telea")


def test_an_installed_autoencoder_is_taken_where_it_is_asked_for(tmp_path, monkeypatch, small_autoencoder):
    monkeypatch.setenv("F2PAD_CACHE", str(tmp_path))
    monkeypatch.setattr(autoencoder, "PREFERRED", ("mae-small",))
    autoencoder.loaded_mae.cache_clear()
    weight_files.install("mae-small", small_autoencoder, lambda tensors: dict(tensors))
    inpainter = choose("mae")
    assert isinstance(inpainter, MAE) and inpainter.name == full_name("mae") == "mae-small"
    assert choose("mae-small") is inpainter  # loaded once
    for call in (refine, refine_many, history, pose):  # what is installed is no default
        assert inspect.signature(call).parameters["inpaint"].default == "exemplar"


def test_mae_fills_an_image_of_another_size(small_autoencoder):
    autoencoder = MAE.load("mae-small", weights=small_autoencoder)
    image = jnp.asarray(np.random.default_rng(5).standard_normal((96, 160, 3)), jnp.float32)
    region = jnp.zeros((96, 160), bool).at[20:41, 33:70].set(True)
    fill = jax.jit(lambda autoencoder, image, region: autoencoder(image, region))
    found = fill(autoencoder, image, region)
    np.testing.assert_array_equal(found[~region], image[~region])
    assert np.all(np.isfinite(found)) and np.abs(found - image)[region].min(axis=-1).max() > 0
    hidden = jnp.where(region[..., None], 7.0, image)  # what is under the region's inner pixels is not seen
    inner = jnp.zeros_like(region).at[26:35, 40:63].set(True)
    np.testing.assert_allclose(fill(autoencoder, jnp.where(inner[..., None], hidden, image), region), found, atol=1e-5)


@pytest.mark.parametrize("first", [0, 1, 3, 5])
@pytest.mark.parametrize("length", [1, 3, 5, 8])
def test_nothing_is_borrowed_around_a_border(first, length):
    """A displacement is allowed where it, or the one back around the circle, moves no occupied place beyond either end."""
    occupied = np.zeros(8, bool)
    occupied[first : first + length] = True
    occupied[first + 1 : first + length - 1 : 2] = False  # gaps don't matter
    places = np.flatnonzero(occupied)
    expected = [any(np.all((places + s >= 0) & (places + s < 8)) for s in (k, k - 8)) for k in range(8)]
    np.testing.assert_array_equal(keeping_inside(jnp.asarray(occupied)), expected)
