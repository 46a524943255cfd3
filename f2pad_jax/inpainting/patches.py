"""Inpainting by a copy of the best-matching part of the image or of a normal image."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Int, UInt8

from f2pad_jax.images._morphology import dilate
from f2pad_jax.images.pixels import normalise
from f2pad_jax.inpainting.laplace import harmonic

_OTHER_IMAGE_FACTOR = 2.0
"""Factor on the mismatch of another image. An object under a fixed camera fits many times better in another image. A
texture hardly fits better there, and the image's own texture, under its own light, restores the features equally well."""


def exemplar(
    image: Float[Array, "h w 3"],
    region: Bool[Array, "h w"],
    *,
    others: Float[Array, "k h w 3"] | None = None,
    rim: int = 4,
    max_steps: int = 500,
) -> Float[Array, "h w 3"]:
    """Fills the region with the best-matching part of the image or of another normal image, blended in seamlessly.

    One source, displaced as a whole, fills the region. The displacement minimises the squared differences to the image, up
    to a constant per channel, on a rim around the region (all displacements by FFT). Laplace's equation spreads the
    remaining differences on the rim over the region (Poisson blending, Perez et al. 2003). The fill keeps texture and
    parts, which :func:`harmonic` smooths away. The copied pixels lie inside the source; in the image itself, also outside
    the region. Without such a displacement, the fill is :func:`harmonic`.
    Departure: the paper uses a masked autoencoder; this fill needs no weights.

    Args:
        image: image to fill, normalised intensity.
        region: pixels to replace.
        others: normal images of the image's size; one is taken if its mismatch is under half of the image's own.
        rim: width of the rim, pixels.
        max_steps: limit on the steps of the Laplace solver.
    """
    h, w, _ = image.shape
    footprint = dilate(region, rim)
    ring = (footprint & ~region).astype(image.dtype)
    num_ring = jnp.maximum(jnp.sum(ring), 1)
    within = keeping_inside(footprint.any(axis=1))[:, None] & keeping_inside(footprint.any(axis=0))

    def spectrum(a: Float[Array, "h w *c"]) -> Complex[Array, "h w2 *c"]:
        return jnp.fft.rfft2(a, axes=(0, 1))

    def correlated(product: Complex[Array, "h w2 *c"]) -> Float[Array, "h w *c"]:
        """Returns Σ_p a(p)·b(p + d), periodic, for every displacement d, from conj(spectrum(a))·spectrum(b)."""
        return jnp.fft.irfft2(product, (h, w), axes=(0, 1))

    ringed = ring[..., None] * image
    ring_conj, footprint_conj, ringed_conj = (jnp.conj(spectrum(a)) for a in (ring, footprint.astype(image.dtype), ringed))

    def best(source: tuple[Float[Array, "h w 3"], Bool[Array, "h w"]]) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """Returns the least Σ_rim (x - s)² - (Σ_rim (x - s))²/N over allowed displacements of a source s, and its index."""
        pixels, allowed = source
        channels = spectrum(pixels)
        energies = spectrum(jnp.sum(pixels**2, axis=-1))
        squares = correlated(ring_conj * energies - 2 * jnp.sum(ringed_conj * channels, axis=-1))
        offsets = correlated(ring_conj[..., None] * channels) - jnp.sum(ringed, axis=(0, 1))
        mismatch = jnp.sum(ringed**2) + squares - jnp.sum(offsets**2, axis=-1) / num_ring
        mismatch = jnp.where(allowed, mismatch, jnp.inf)
        index = jnp.argmin(mismatch)
        return mismatch.ravel()[index], index

    outside = (~region).astype(image.dtype)
    # in the image itself, the copied pixels and their rim must lie outside the region
    disjoint = correlated(footprint_conj * spectrum(outside)) > jnp.sum(footprint) - 0.5
    sources, masked, allowed = image[None], (outside[..., None] * image)[None], (within & disjoint)[None]
    if others is not None:
        sources, masked = jnp.concatenate([sources, others]), jnp.concatenate([masked, others])
        allowed = jnp.concatenate([allowed, jnp.broadcast_to(within, others.shape[:3])])
    mismatches, places = jax.lax.map(best, (masked, allowed))
    mismatches = jnp.maximum(mismatches, 0).at[1:].multiply(_OTHER_IMAGE_FACTOR)
    best_source = jnp.argmin(mismatches)
    row, column = places[best_source] // w, places[best_source] % w
    # the copy wraps around only outside the footprint; displacements are modulo (h, w)
    copy = jnp.roll(sources[best_source], (-row, -column), axis=(0, 1))  # pyright: ignore[reportArgumentType]
    copy = jnp.where(jnp.isfinite(mismatches[best_source]), copy, 0.0)
    difference = harmonic(image - copy, region, max_steps=max_steps)
    return jnp.where(region[..., None], copy + difference, image)


def keeping_inside(occupied: Bool[Array, " n"]) -> Bool[Array, " n"]:
    """Returns which displacements, modulo n, keep every occupied place inside 0..n-1."""
    n = occupied.size
    place = jnp.arange(n)
    first, last = jnp.argmax(occupied), n - 1 - jnp.argmax(occupied[::-1])
    return (place <= n - 1 - last) | (place >= n - first)


class Exemplar(eqx.Module):
    """Inpainter :func:`exemplar` with the normal images of a detector."""

    normals: UInt8[Array, "k h w 3"]
    """RGB images, 0..255, of the size of the images to fill."""
    name: ClassVar[str] = "exemplar"
    """Name of the inpainter."""

    def __call__(self, image: Float[Array, "h w 3"], region: Bool[Array, "h w"]) -> Float[Array, "h w 3"]:
        """Returns the image with the pixels of the region replaced."""
        return exemplar(image, region, others=normalise(self.normals.astype(image.dtype) / 255))
