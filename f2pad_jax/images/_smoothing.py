"""Gaussian smoothing of maps."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def smoothed(image: Float[Array, "h w"], sigma: float) -> Float[Array, "h w"]:
    """Smooths by a Gaussian of ``sigma`` pixels, truncated at 4 sigma; the border is mirrored with the edge repeated."""
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(image.dtype)
    for axis in (0, 1):
        n = image.shape[axis]
        padded = jnp.pad(image, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="symmetric")
        slices = [jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(len(taps))]
        image = jnp.tensordot(taps, jnp.stack(slices), axes=1)
    return image
