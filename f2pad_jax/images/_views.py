"""Crops of an image, and windows of the resized image that a network sees."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped


class Box(eqx.Module):
    """Rectangle of an image: its corner may be traced, its size is static."""

    corner: Int[Array, " 2"]
    """Row and column of the top-left pixel."""
    size: tuple[int, int] = eqx.field(static=True)
    """Height and width, pixels, static."""

    def cut(self, image: Shaped[Array, "h w *c"]) -> Shaped[Array, "_h _w *c"]:
        """Returns the pixels of the rectangle."""
        rest = image.shape[2:]
        return jax.lax.dynamic_slice(image, (*self.corner, *_zeros(len(rest))), (*self.size, *rest))

    def paste(self, part: Shaped[Array, "_h _w *c"], image: Shaped[Array, "h w *c"]) -> Shaped[Array, "h w *c"]:
        """Returns the image with the pixels of the rectangle replaced by ``part``."""
        return jax.lax.dynamic_update_slice(image, part, (*self.corner, *_zeros(part.ndim - 2)))


def _zeros(count: int) -> list[np.int32]:
    """Returns zeros of the type of a corner; Python's have another type where JAX computes with 64 bits."""
    return [np.int32(0)] * count


class View(eqx.Module):
    """Map from a crop of an image to a window of the resized image (bilinear, antialiased when shrinking).

    Only the crop varies, and the resize is linear: the window is a constant plus the resized crop. An image that needs no
    resize needs no matrices, and the window is the crop.
    """

    rows: Float[Array, "_h _H"] | None = None
    """Weights of the crop's rows in each row of the window."""
    columns: Float[Array, "_w _W"] | None = None
    """Weights of the crop's columns in each column of the window."""
    rest: Float[Array, "_h _w c"] | None = None
    """Contribution of the pixels outside the crop to the window, normalised intensity."""
    share: float = eqx.field(static=True, default=1.0)
    """Number of pixels of the resized image per pixel of the image, static."""

    def __call__(self, crop: Float[Array, "_H _W c"]) -> Float[Array, "_h _w c"]:
        """Returns the window for the crop's pixels."""
        return crop if self.rest is None else self.rest + self.shrunk(crop)

    def touched(self, mask: Bool[Array, "_H _W"]) -> Bool[Array, "_h _w"]:
        """Returns the pixels of the window to which any pixel of the mask contributes."""
        return mask if self.rest is None else self.shrunk(mask[..., None].astype(jnp.float32))[..., 0] > 1e-3

    def back(self, values: Float[Array, "_h _w"]) -> Float[Array, "_H _W"]:
        """Returns the mean of the window's values at each pixel of the crop, weighted by the pixel's contributions."""
        if self.rows is None or self.columns is None:
            return values
        rows, columns = (matrix / jnp.maximum(jnp.sum(matrix, axis=0), 1e-6) for matrix in (self.rows, self.columns))
        return jnp.einsum("iI,jJ,ij->IJ", rows, columns, values, precision="highest", optimize="optimal")

    def shrunk(self, crop: Float[Array, "_H _W c"]) -> Float[Array, "_h _w c"]:
        """Returns the contribution of the crop's pixels to the window."""
        return jnp.einsum("iI,jJ,IJc->ijc", self.rows, self.columns, crop, precision="highest", optimize="optimal")


def view_of(window: Box, crop: Box, small: Float[Array, "h w c"], large: Float[Array, "H W c"]) -> View:
    """Returns the view from ``crop``, a box of the image ``large``, to ``window``, a box of the resized image ``small``.

    Applied to the crop of ``large``, the view returns the window of ``small``. If both images have one size, both boxes are
    equal, and the window is the crop.
    """
    (h, w, _), (height, width, _) = small.shape, large.shape
    if (h, w) == (height, width):
        return View()
    matrices = []
    for axis, (shrunk, full) in enumerate(((h, height), (w, width))):
        matrix = jax.image.resize(jnp.eye(full, dtype=jnp.float32), (shrunk, full), "linear")
        corner = window.corner[axis], crop.corner[axis]
        matrices.append(jax.lax.dynamic_slice(matrix, corner, (window.size[axis], crop.size[axis])))
    view = View(*matrices, share=h * w / (height * width))
    return dataclasses.replace(view, rest=window.cut(small) - view.shrunk(crop.cut(large)))


def scaled(values: Float[Array, "h w *c"], size: tuple[int, int]) -> Float[Array, "h2 w2 *c"]:
    """Resizes values to ``size``, bilinear (antialiased when shrinking)."""
    return values if values.shape[:2] == size else jax.image.resize(values, (*size, *values.shape[2:]), "linear")


def scaled_mask(mask: Bool[Array, "h w"], size: tuple[int, int], level: float = 0.5) -> Bool[Array, "h2 w2"]:
    """Resizes a mask to ``size``: true where its bilinear resize exceeds ``level``."""
    return mask if mask.shape == size else scaled(mask.astype(jnp.float32), size) > level


def size_of(image: Array | np.ndarray) -> tuple[int, int]:
    """Returns height and width of an image."""
    return image.shape[0], image.shape[1]
