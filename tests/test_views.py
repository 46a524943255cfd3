import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import smooth_image

from f2pad_jax.images._views import Box, View, scaled, scaled_mask, view_of

NETWORK = (64, 64)


def shrunk(image):
    """The network's resize of an image."""
    return jax.image.resize(image, (*NETWORK, 3), "linear")


@pytest.mark.parametrize("size", [(150, 130), (64, 200), (40, 48), (257, 64)])
@pytest.mark.parametrize("place", [(0, 0), (0.5, 0.3), (1, 1)])
def test_a_window_sees_what_the_resize_of_the_whole_image_shows_there(size, place):
    """Whatever becomes of the pixels of a box, and wherever it is: inside the window, at its border or beyond it."""
    image = jax.image.resize(smooth_image(0, 96), (*size, 3), "linear")
    change = jax.random.normal(jax.random.key(0), (24, 30, 3))

    @jax.jit
    def window(corner):
        box, own = Box(jnp.array([16, 8]), (32, 32)), Box(corner, change.shape[:2])
        changed = own.cut(image) + change
        view = view_of(box, own, shrunk(image), image)
        return view(changed), box.cut(shrunk(own.paste(changed, image)))

    corner = jnp.array([round(place[axis] * (size[axis] - change.shape[axis])) for axis in (0, 1)])
    np.testing.assert_allclose(*window(corner), atol=1e-5)


def test_an_image_of_the_networks_size_is_seen_as_it_is():
    box, image = Box(jnp.array([8, 16]), (32, 32)), jnp.asarray(smooth_image(0))
    view = view_of(box, box, image, image)
    part, mask = box.cut(image), jnp.ones(NETWORK, bool)
    assert view == View() and view.share == 1
    assert view(part) is part and view.touched(mask) is mask and view.back(part[..., 0]).shape == (32, 32)
    assert scaled(image, NETWORK) is image and scaled_mask(mask, NETWORK) is mask


@pytest.fixture(scope="module")
def tenth():
    """A window of an image ten times as large as the network's, seen from a quarter of its pixels."""
    large = jnp.asarray(smooth_image(0, 640))
    return view_of(Box(jnp.array([16, 8]), (32, 32)), Box(jnp.array([230, 140]), (160, 160)), shrunk(large), large)


def test_a_pixel_counts_by_its_share_of_the_networks(tenth):
    assert tenth.share == pytest.approx(0.01)


def test_gradients_are_the_transpose(tenth):
    key = jax.random.key(0)
    image, cotangent = jax.random.normal(key, (160, 160, 3)), jax.random.normal(key, (32, 32, 3))
    gradient = jax.grad(lambda image: jnp.vdot(tenth(image), cotangent))(image)
    np.testing.assert_allclose(jnp.vdot(gradient, image), jnp.vdot(tenth.shrunk(image), cotangent), rtol=1e-4)
    expected = jnp.einsum("iI,jJ,ijc->IJc", tenth.rows, tenth.columns, cotangent)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_touched_is_where_any_of_the_mask_is_seen(tenth):
    mask = np.zeros((160, 160), bool)
    mask[100:103, 60:63] = True  # a third of one pixel of the network's: row 33, column 20
    touched = np.asarray(tenth.touched(jnp.asarray(mask)))
    assert touched[17, 12] and not touched[20, 12] and touched.sum() <= 9


def test_back_is_where_a_value_was_seen(tenth):
    """Rows and columns of the small image, asked for at the pixels of the large one, are interpolated."""
    rows, columns = jnp.meshgrid(jnp.arange(16.0, 48), jnp.arange(8.0, 40), indexing="ij")
    row, column = ((corner + np.arange(160) + 0.5) / 10 - 0.5 for corner in (230, 140))
    np.testing.assert_allclose(tenth.back(rows), np.broadcast_to(row[:, None], (160, 160)), atol=1e-3)
    np.testing.assert_allclose(tenth.back(columns), np.broadcast_to(column, (160, 160)), atol=1e-3)


def test_crop_and_paste():
    image = jnp.asarray(smooth_image(0))
    box = Box(jnp.array([5, 7]), (20, 30))
    np.testing.assert_array_equal(box.cut(image), image[5:25, 7:37])
    pasted = box.paste(jnp.zeros((20, 30, 3)), image)
    assert not pasted[5:25, 7:37].any()
    np.testing.assert_array_equal(pasted[25:], image[25:])
    assert box.cut(image[..., 0] > 0.5).shape == (20, 30)


def test_masks_are_cut_at_one_half():
    mask = jnp.zeros((8, 8), bool).at[2:4, 2:6].set(True)
    enlarged = np.asarray(scaled_mask(mask, (80, 80)))
    assert enlarged[20:40, 20:60].mean() > 0.94 and enlarged.sum() == pytest.approx(800, rel=0.06)
