"""Windows of an image, and how the network sees the pixels n lives on: through its resize of the whole image."""

import dataclasses

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
    """What the network sees, through the bilinear resize (antialiased when shrinking), of an image of which one box varies.

    Without matrices the network sees the box as it is.
    """

    rows: Float[Array, "_h _H"] | None = None
    columns: Float[Array, "_w _W"] | None = None
    rest: Float[Array, "_h _w c"] | None = None
    """What it sees of the image around the box."""
    share: float = eqx.field(static=True, default=1.0)
    """Pixels of the small image to one of the large."""

    def __call__(self, box: Float[Array, "_H _W c"]) -> Float[Array, "_h _w c"]:
        """The window of the small image, with these pixels in the box."""
        return box if self.rest is None else self.rest + self.shrunk(box)

    def touched(self, mask: Bool[Array, "_H _W"]) -> Bool[Array, "_h _w"]:
        """The pixels that see any of the mask."""
        return mask if self.rest is None else self.shrunk(mask[..., None].astype(jnp.float32))[..., 0] > 1e-3

    def back(self, values: Float[Array, "_h _w"]) -> Float[Array, "_H _W"]:
        """Values of the window where the box's pixels are: of those that see a pixel, the mean by how much they do."""
        if self.rows is None or self.columns is None:
            return values
        rows, columns = (matrix / jnp.maximum(jnp.sum(matrix, axis=0), 1e-6) for matrix in (self.rows, self.columns))
        return jnp.einsum("iI,jJ,ij->IJ", rows, columns, values, precision="highest", optimize="optimal")

    def shrunk(self, box: Float[Array, "_H _W c"]) -> Float[Array, "_h _w c"]:
        """The box's own part of what is seen: linear."""
        return jnp.einsum("iI,jJ,IJc->ijc", self.rows, self.columns, box, precision="highest", optimize="optimal")


def view_of(box: Box, own: Box, small: Float[Array, "h w c"], large: Float[Array, "H W c"]) -> View:
    """How ``box`` of an image's resize, ``small``, depends on the pixels of ``own``, a box of the image itself, ``large``.

    With ``own``'s pixels as they are the network sees ``box`` of ``small``. Where both images have one size, both boxes are
    one, which is seen as it is.
    """
    (h, w, _), (height, width, _) = small.shape, large.shape
    if (h, w) == (height, width):
        return View()
    matrices = []
    for axis, (shrunk, full) in enumerate(((h, height), (w, width))):
        matrix = jax.image.resize(jnp.eye(full), (shrunk, full), "linear")
        corner = box.corner[axis], own.corner[axis]
        matrices.append(jax.lax.dynamic_slice(matrix, corner, (box.size[axis], own.size[axis])))
    view = View(*matrices, share=h * w / (height * width))
    return dataclasses.replace(view, rest=box.crop(small) - view.shrunk(own.crop(large)))


def scaled(values: Float[Array, "h w *c"], size: tuple[int, int]) -> Float[Array, "h2 w2 *c"]:
    """Values at another size, bilinear (antialiased when shrinking)."""
    return values if values.shape[:2] == size else jax.image.resize(values, (*size, *values.shape[2:]), "linear")


def scaled_mask(mask: Bool[Array, "h w"], size: tuple[int, int], level: float = 0.5) -> Bool[Array, "h2 w2"]:
    """The mask at another size, cut at ``level`` of the bilinear resize."""
    return mask if mask.shape == size else scaled(mask.astype(jnp.float32), size) > level
