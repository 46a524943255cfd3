"""Inpainting by Laplace's equation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def harmonic(
    image: Float[Array, "h w 3"], region: Bool[Array, "h w"], *, rtol: float = 1e-3, max_steps: int = 500
) -> Float[Array, "h w 3"]:
    """Fills the region smoothly: Laplace's equation inside the region, the image's values on its rim.

    Conjugate gradients solve the equation on the grid of pixels; image borders are reflecting.
    Departure: the paper uses a masked autoencoder; this fill needs no weights.
    """
    inside = region[..., None].astype(image.dtype)

    def laplacian(u: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
        # sums of differences: 4u - Σ neighbours has rounding errors even for a constant
        down = jnp.pad(jnp.diff(u, axis=0), ((1, 1), (0, 0), (0, 0)))
        right = jnp.pad(jnp.diff(u, axis=1), ((0, 0), (1, 1), (0, 0)))
        return down[:-1] - down[1:] + right[:, :-1] - right[:, 1:]

    # P L P d = -P L u_start for the change d = u - u_start, where P projects onto the region
    outside = image * (1 - inside)
    start = outside + inside * jnp.sum(outside, axis=(0, 1)) / jnp.maximum(jnp.sum(1 - inside), 1)
    change, _ = jax.scipy.sparse.linalg.cg(
        lambda d: inside * laplacian(inside * d) + (1 - inside) * d, -inside * laplacian(start), tol=rtol, maxiter=max_steps
    )
    return jnp.where(region[..., None], start + change, image)
