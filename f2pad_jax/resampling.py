"""Linear maps of images: how a detector sees a window of a larger image, and Gaussian smoothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class Resampling(eqx.Module):
    """A window of :func:`jax.image.resize` (linear, antialiased), as one matrix per axis."""

    rows: Float[Array, "h2 h"]
    columns: Float[Array, "w2 w"]

    def __call__(self, image: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c"]:
        """The image at the detector's resolution."""
        return jnp.einsum("ih,hwc,jw->ijc", self.rows, image, self.columns)

    def touched(self, region: Bool[Array, "h w"]) -> Bool[Array, "h2 w2"]:
        """The detector's pixels that a region's pixels enter."""
        return self(region[..., None].astype(self.rows.dtype))[..., 0] > 1e-6


def smoothed(image: Float[Array, "h w"], sigma: float) -> Float[Array, "h w"]:
    """Gaussian filter of ``sigma`` pixels: separable, truncated at 4 sigma, border mirrored with the edge repeated."""
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(image.dtype)
    for axis in (0, 1):
        n = image.shape[axis]
        padded = jnp.pad(image, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="symmetric")
        slices = [jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(len(taps))]
        image = jnp.tensordot(taps, jnp.stack(slices), axes=1)
    return image
