"""The first guess n0: the region filled from its surroundings (paper, Section III-E1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from f2pad_jax.region import dilate

Inpainter = Callable[[Float[Array, "h w 3"], Bool[Array, "h w"]], Float[Array, "h w 3"]]
"""``(image, region) -> image`` with the region's pixels replaced, in normalised intensity."""


def harmonic(
    image: Float[Array, "h w 3"], region: Bool[Array, "h w"], *, rtol: float = 1e-3, max_steps: int = 500
) -> Float[Array, "h w 3"]:
    """The smoothest fill: Laplace's equation inside the region, the image's own values on its rim.

    Solved by conjugate gradients on the graph Laplacian (image borders are reflecting).
    Departure: the paper uses a masked autoencoder; this fill needs no weights.
    """
    inside = region[..., None].astype(image.dtype)

    def laplacian(u: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
        p = jnp.pad(u, ((1, 1), (1, 1), (0, 0)), mode="edge")
        return 4 * u - p[:-2, 1:-1] - p[2:, 1:-1] - p[1:-1, :-2] - p[1:-1, 2:]

    # unknown d = u - u_start inside: P L P d = -P L u_start, with P the projection onto the region
    outside = image * (1 - inside)
    start = outside + inside * jnp.sum(outside, axis=(0, 1)) / jnp.maximum(jnp.sum(1 - inside), 1)
    change, _ = jax.scipy.sparse.linalg.cg(
        lambda d: inside * laplacian(inside * d) + (1 - inside) * d, -inside * laplacian(start), tol=rtol, maxiter=max_steps
    )
    return jnp.where(region[..., None], start + change, image)


def exemplar(
    image: Float[Array, "h w 3"], region: Bool[Array, "h w"], *, rim: int = 8, max_steps: int = 500
) -> Float[Array, "h w 3"]:
    """The best-matching other part of the same image, blended in seamlessly.

    One displacement brings known pixels to the whole region: the one that agrees best with the image on a rim of ``rim``
    pixels around it (squared differences of all displacements at once, by FFT). What difference remains on the rim is
    spread over the inside by Laplace's equation (Poisson blending, Perez et al. 2003). Texture stays texture, which
    :func:`harmonic` smooths away; where nothing of the image fits, the fill is :func:`harmonic`.
    Departure: the paper uses a masked autoencoder; this fill needs no weights.
    """
    h, w, _ = image.shape
    around = dilate(region, rim) & ~region
    known = (~region).astype(image.dtype)
    shape = (2 * h, 2 * w)

    def correlate(a: Float[Array, "h w"], b: Float[Array, "h w"]) -> Float[Array, "h2 w2"]:
        """Σ_p a(p)·b(p + s) for every displacement s."""
        return jnp.fft.irfft2(jnp.conj(jnp.fft.rfft2(a, shape)) * jnp.fft.rfft2(b, shape), shape)

    ring = around.astype(image.dtype)
    mismatch = correlate(ring, jnp.sum((known[..., None] * image) ** 2, axis=-1))
    for c in range(3):
        mismatch -= 2 * correlate(ring * image[..., c], known * image[..., c])
    needed = dilate(region, rim).astype(image.dtype)
    whole = correlate(needed, known) > jnp.sum(needed) - 0.5  # every pixel to copy and its rim are known
    best = jnp.argmin(jnp.where(whole, mismatch, jnp.inf))
    row, column = best // (2 * w), best % (2 * w)
    # the copy wraps around only where it isn't needed; modulo 2h, and so modulo h, displacements back are negative ones
    copied = jnp.roll(image, (-row, -column), axis=(0, 1))  # pyright: ignore[reportArgumentType]
    copied = jnp.where(jnp.any(whole), copied, 0.0)
    difference = harmonic(image - copied, region, max_steps=max_steps)
    return jnp.where(region[..., None], copied + difference, image)
