"""Smoothing of maps by a Gaussian or along the edges of an image, and attraction of masks by edges."""

from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


@partial(jax.jit, static_argnums=1)
def smoothed(image: Float[Array, "h w"], sigma: float) -> Float[Array, "h w"]:
    """Smooths by a Gaussian of ``sigma`` pixels, truncated at 4 sigma; the border is mirrored with the edge repeated."""
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return filtered(image, taps / taps.sum())


def filtered(images: Float[Array, "*c h w"], taps: np.ndarray) -> Float[Array, "*c h w"]:
    """Filters rows and columns by an odd number of ``taps``; the border is mirrored with the edge repeated."""
    radius = len(taps) // 2
    for axis in (-2, -1):
        n = images.shape[axis]
        pads = [(radius, radius) if a == axis else (0, 0) for a in range(-images.ndim, 0)]
        padded = jnp.pad(images, pads, mode="symmetric")
        # XLA makes one loop of this sum, on a CPU ten times faster than a convolution
        slices = (jax.lax.slice_in_dim(padded, i, i + n, axis=padded.ndim + axis) for i in range(len(taps)))
        images = reduce(add, (tap * part for tap, part in zip(taps.tolist(), slices, strict=True)))
    return images


def guided(
    values: Float[Array, "h w"], guide: Float[Array, "h w 3"], radius: int = 8, floor: float | Float[Array, ""] = 0.03
) -> Float[Array, "h w"]:
    """Smooths values along the edges of a guide: the guided filter of He, Sun & Tang (TPAMI 2013), Eq. 19-21.

    In each square of 2·radius + 1 pixels, a linear function of the guide's channels is fitted to the values. A pixel's
    result is the mean of all functions whose squares hold the pixel.

    Args:
        values: values to smooth.
        guide: image whose edges the result follows.
        radius: radius of the squares, pixels, static.
        floor: standard deviation of the guide below which the values are only averaged, units of the guide.
    """
    return _fitted(values, guide, radius, floor)[0]


def attracted(
    mask: Bool[Array, "h w"],
    guide: Float[Array, "h w 3"],
    radius: int,
    floor: float | Float[Array, ""],
    inertia: float | Float[Array, ""],
) -> Bool[Array, "h w"]:
    """Moves the border of a mask to edges of a guide, and leaves the border where the guide has no edge.

    Departure from :func:`guided`: each square counts in proportion to the share R² of the mask's variance that its linear
    function explains, and the mask itself counts as ``inertia``. The plain filter shrinks a mask where the guide is flat.

    Args:
        mask: mask to move.
        guide: image with the edges.
        radius: radius of the squares, pixels, static.
        floor: standard deviation of the guide below which an edge does not count, units of the guide.
        inertia: weight of the mask; the weight of the squares is their mean R².
    """
    values = mask.astype(guide.dtype)
    fit, weight = _fitted(values, guide, radius, floor, weighted=True)
    return fit + inertia * values > 0.5 * (weight + inertia)


@partial(jax.jit, static_argnums=(2, 4))
def _fitted(
    values: Float[Array, "h w"],
    guide: Float[Array, "h w 3"],
    radius: int,
    floor: float | Float[Array, ""],
    weighted: bool = False,
) -> tuple[Float[Array, "h w"], Float[Array, "h w"]]:
    """Returns the mean, over the squares that hold a pixel, of their functions times their weights, and of the weights."""
    mean = partial(filtered, taps=np.full(2 * radius + 1, 1 / (2 * radius + 1)))
    x = jnp.moveaxis(guide, -1, 0)
    x = x - jnp.mean(x, axis=(1, 2), keepdims=True)  # for the rounding of the covariances

    def products(x0, x1, x2, v) -> Float[Array, "10 h w"]:
        """Returns the products whose means, less the products of the means, are the covariances."""
        return jnp.stack([x0 * x0, x0 * x1, x0 * x2, x1 * x1, x1 * x2, x2 * x2, x0 * v, x1 * v, x2 * v, v * v])

    maps = jnp.concatenate([x, values[None]])
    means = mean(jnp.concatenate([maps, products(*maps)]))
    (x0, x1, x2), (m0, m1, m2, level) = x, means[:4]
    c00, c01, c02, c11, c12, c22, b0, b1, b2, variance = means[4:] - products(*means[:4])
    # (C + floor²·I)·slope = b by elimination, which rounding harms least where all channels are alike
    d0 = c00 + floor**2
    k01, k02 = c01 / d0, c02 / d0
    d1, e12 = c11 + floor**2 - k01 * c01, c12 - k01 * c02
    k12 = e12 / d1
    d2 = c22 + floor**2 - k02 * c02 - k12 * e12
    r1 = b1 - k01 * b0
    s2 = (b2 - k02 * b0 - k12 * r1) / d2
    s1 = r1 / d1 - k12 * s2
    s0 = b0 / d0 - k01 * s1 - k02 * s2
    weight = jnp.ones_like(values)
    if weighted:
        explained = s0 * b0 + s1 * b1 + s2 * b2
        weight = jnp.clip(explained / jnp.maximum(variance, 1e-4), 0.0, 1.0)  # 0 where the values are constant
    offset = level - s0 * m0 - s1 * m1 - s2 * m2
    t0, t1, t2, offset, weight = mean(weight * jnp.stack([s0, s1, s2, offset, jnp.ones_like(values)]))
    return t0 * x0 + t1 * x1 + t2 * x2 + offset, weight
