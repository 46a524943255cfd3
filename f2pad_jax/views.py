"""Windows of an image, and how the network sees the pixels n lives on: its own resize, restricted to a window."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class Box(eqx.Module):
    """A rectangle of an image: a corner that may be traced, a size that may not."""

    corner: Int[Array, " 2"]
    size: tuple[int, int] = eqx.field(static=True)

    def crop(self, image: Shaped[Array, "h w *c"]) -> Shaped[Array, "_h _w *c"]:
        """The rectangle's pixels."""
        rest = image.shape[2:]
        return jax.lax.dynamic_slice(image, (*self.corner, *[0] * len(rest)), (*self.size, *rest))

    def paste(self, part: Shaped[Array, "_h _w *c"], image: Shaped[Array, "h w *c"]) -> Shaped[Array, "h w *c"]:
        """The image with the rectangle's pixels replaced."""
        return jax.lax.dynamic_update_slice(image, part, (*self.corner, *[0] * (part.ndim - 2)))


class View(eqx.Module):
    """The part of a bilinear resize (antialiased when shrinking) that makes one window of the small image.

    Without matrices the network sees the image as it is.
    """

    rows: Float[Array, "_h _H"] | None = None
    columns: Float[Array, "_w _W"] | None = None
    share: float = eqx.field(static=True, default=1.0)
    """Pixels of the small image to one of the large."""

    def __call__(self, image: Float[Array, "_H _W c"]) -> Float[Array, "_h _w c"]:
        """What the network sees of a window of the image; linear, so that gradients pass."""
        if self.rows is None or self.columns is None:
            return image
        return jnp.einsum("iI,jJ,IJc->ijc", self.rows, self.columns, image, precision="highest", optimize="optimal")

    def touched(self, mask: Bool[Array, "_H _W"]) -> Bool[Array, "_h _w"]:
        """The pixels that see any of the mask."""
        return self(mask[..., None].astype(jnp.float32))[..., 0] > 1e-3


def view_of(box: Box, size: tuple[int, int], own: tuple[int, int]) -> tuple[Box, View]:
    """The pixels of an image of size ``own`` that ``box`` of its resize to ``size`` depends on, and that resize.

    The same box, seen as it is, where the image has the network's size. The resize is exact: a pixel of the window gets
    what it would in a resize of the whole image.
    """
    if size == own:
        return box, View()
    starts, sides, matrices = [], [], []
    for axis in (0, 1):
        scale = own[axis] / size[axis]
        reach = math.ceil(max(scale, 1.0)) + 1  # half the width of the resize's triangle, and rounding
        side = min(math.ceil(box.size[axis] * scale) + 2 * reach, own[axis])
        start = jnp.clip(jnp.floor(box.corner[axis] * scale).astype(jnp.int32) - reach, 0, own[axis] - side)
        matrix = jax.image.resize(jnp.eye(own[axis]), (size[axis], own[axis]), "linear")
        matrices.append(jax.lax.dynamic_slice(matrix, (box.corner[axis], start), (box.size[axis], side)))
        starts.append(start)
        sides.append(side)
    return Box(jnp.stack(starts), (sides[0], sides[1])), View(*matrices, share=math.prod(size) / math.prod(own))


def scaled(values: Float[Array, "h w *c"], size: tuple[int, int]) -> Float[Array, "h2 w2 *c"]:
    """Values at another size, bilinear (antialiased when shrinking)."""
    return values if values.shape[:2] == size else jax.image.resize(values, (*size, *values.shape[2:]), "linear")


def scaled_mask(mask: Bool[Array, "h w"], size: tuple[int, int], level: float = 0.5) -> Bool[Array, "h2 w2"]:
    """The mask at another size, cut at ``level`` of the bilinear resize."""
    return mask if mask.shape == size else scaled(mask.astype(jnp.float32), size) > level
