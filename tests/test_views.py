import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import smooth_image

from f2pad_jax.views import Box, View, scaled, scaled_mask, view_of

NETWORK = (64, 64)


@pytest.mark.parametrize("own", [(150, 130), (64, 200), (40, 48), (257, 64)])
@pytest.mark.parametrize("corner", [(0, 0), (16, 8), (32, 32)])
def test_a_window_sees_what_the_resize_of_the_whole_image_shows_there(own, corner):
    image = jax.image.resize(smooth_image(0, 96), (*own, 3), "linear")

    @jax.jit
    def window(corner):
        box = Box(corner, (32, 32))
        large, view = view_of(box, NETWORK, own)
        return view(large.crop(image)), box.crop(jax.image.resize(image, (*NETWORK, 3), "linear"))

    seen, shown = window(jnp.array(corner))
    np.testing.assert_allclose(seen, shown, atol=1e-5)


def test_an_image_of_the_networks_size_is_seen_as_it_is():
    box = Box(jnp.array([8, 16]), (32, 32))
    assert view_of(box, NETWORK, NETWORK) == (box, View())
    image, mask = jnp.asarray(smooth_image(0)), jnp.ones(NETWORK, bool)
    assert scaled(image, NETWORK) is image and scaled_mask(mask, NETWORK) is mask


def test_the_window_grows_with_the_image_not_beyond_it():
    large, view = view_of(Box(jnp.array([0, 16]), (32, 32)), NETWORK, (640, 640))
    assert max(large.size) <= 10 * 32 + 24 and view.share == pytest.approx(0.01)
    np.testing.assert_array_equal(large.corner, [0, 160 - 11])
    large, _ = view_of(Box(jnp.array([0, 0]), NETWORK), NETWORK, (640, 500))
    assert large.size == (640, 500)


def test_gradients_are_the_transpose():
    _, view = view_of(Box(jnp.array([16, 16]), (32, 32)), NETWORK, (150, 130))
    key = jax.random.key(0)
    shape = (view.rows.shape[1], view.columns.shape[1], 3)
    image, cotangent = jax.random.normal(key, shape), jax.random.normal(key, (32, 32, 3))
    gradient = jax.grad(lambda image: jnp.vdot(view(image), cotangent))(image)
    np.testing.assert_allclose(jnp.vdot(gradient, image), jnp.vdot(view(image), cotangent), rtol=1e-4)
    expected = jnp.einsum("iI,jJ,ijc->IJc", view.rows, view.columns, cotangent)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_touched_is_where_any_of_the_mask_is_seen():
    _, view = view_of(Box(jnp.array([0, 0]), (32, 32)), NETWORK, (640, 640))
    mask = np.zeros((view.rows.shape[1], view.columns.shape[1]), bool)
    mask[100:103, 200:203] = True  # a third of one pixel of the network's
    touched = np.asarray(view.touched(jnp.asarray(mask)))
    assert touched[10, 20] and not touched[13, 20] and touched.sum() <= 9


def test_crop_and_paste():
    image = jnp.asarray(smooth_image(0))
    box = Box(jnp.array([5, 7]), (20, 30))
    np.testing.assert_array_equal(box.crop(image), image[5:25, 7:37])
    pasted = box.paste(jnp.zeros((20, 30, 3)), image)
    assert not pasted[5:25, 7:37].any()
    np.testing.assert_array_equal(pasted[25:], image[25:])
    assert box.crop(image[..., 0] > 0.5).shape == (20, 30)


def test_masks_are_cut_at_one_half():
    mask = jnp.zeros((8, 8), bool).at[2:4, 2:6].set(True)
    enlarged = np.asarray(scaled_mask(mask, (80, 80)))
    assert enlarged[20:40, 20:60].mean() > 0.94 and enlarged.sum() == pytest.approx(800, rel=0.06)
