"""The first guess n0: the region filled from its surroundings (paper, Section III-E1)."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Complex, Float, Int, UInt8

from f2pad_jax import checkpoints
from f2pad_jax.backbones import load_autoencoder
from f2pad_jax.backbones.mae import SIDE
from f2pad_jax.errors import CheckpointError
from f2pad_jax.region import dilate
from f2pad_jax.units import normalise

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
        # from differences to neighbours: 4u - Σ neighbours would leave rounding errors even of a constant
        down = jnp.pad(jnp.diff(u, axis=0), ((1, 1), (0, 0), (0, 0)))
        right = jnp.pad(jnp.diff(u, axis=1), ((0, 0), (1, 1), (0, 0)))
        return down[:-1] - down[1:] + right[:, :-1] - right[:, 1:]

    # unknown d = u - u_start inside: P L P d = -P L u_start, with P the projection onto the region
    outside = image * (1 - inside)
    start = outside + inside * jnp.sum(outside, axis=(0, 1)) / jnp.maximum(jnp.sum(1 - inside), 1)
    change, _ = jax.scipy.sparse.linalg.cg(
        lambda d: inside * laplacian(inside * d) + (1 - inside) * d, -inside * laplacian(start), tol=rtol, maxiter=max_steps
    )
    return jnp.where(region[..., None], start + change, image)


_STRANGER = 2.0
"""How much better another image must fit. Objects seen by a fixed camera fit many times better in another image. Textures
hardly do, and the image's own, under its own light, restores the features as well."""


def exemplar(
    image: Float[Array, "h w 3"],
    region: Bool[Array, "h w"],
    others: Float[Array, "k h w 3"] | None = None,
    *,
    rim: int = 4,
    max_steps: int = 500,
) -> Float[Array, "h w 3"]:
    """The best-matching other part of the same image, or part of another normal image, blended in seamlessly.

    One displacement of one source brings known pixels to the whole region: those that agree best with the image on a rim of
    ``rim`` pixels around it, up to a constant (squared differences of all displacements at once, by FFT). What difference
    remains on the rim is spread over the inside by Laplace's equation (Poisson blending, Perez et al. 2003). Texture and
    parts stay what they are, which :func:`harmonic` smooths away; where nothing fits, the fill is :func:`harmonic`.
    Departure: the paper uses a masked autoencoder; this fill needs no weights.

    Args:
        image: normalised intensity.
        region: pixels to replace.
        others: normal images of the same size; one is taken where it fits twice as well as the image itself.
        rim: width of the rim, pixels.
        max_steps: of the Laplace solver.
    """
    h, w, _ = image.shape
    needed = dilate(region, rim)
    ring = (needed & ~region).astype(image.dtype)
    num_ring = jnp.maximum(jnp.sum(ring), 1)
    within = keeping_inside(needed.any(axis=1))[:, None] & keeping_inside(needed.any(axis=0))

    def spectrum(a: Float[Array, "h w *c"]) -> Complex[Array, "h w2 *c"]:
        return jnp.fft.rfft2(a, axes=(0, 1))

    def correlated(product: Complex[Array, "h w2 *c"]) -> Float[Array, "h w *c"]:
        """Σ_p a(p)·b(p + s) for every displacement s, around the borders, of conj(spectrum(a))·spectrum(b)."""
        return jnp.fft.irfft2(product, (h, w), axes=(0, 1))

    ringed = ring[..., None] * image
    of_ring, of_needed, of_ringed = (jnp.conj(spectrum(a)) for a in (ring, needed.astype(image.dtype), ringed))

    def best(source: tuple[Float[Array, "h w 3"], Bool[Array, "h w"]]) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """Σ_rim (x - s)² - (Σ_rim (x - s))²/N, smallest over the displacements allowed, and where."""
        pixels, allowed = source
        channels = spectrum(pixels)
        squares = correlated(of_ring * spectrum(jnp.sum(pixels**2, axis=-1)) - 2 * jnp.sum(of_ringed * channels, axis=-1))
        offsets = correlated(of_ring[..., None] * channels) - jnp.sum(ringed, axis=(0, 1))
        mismatch = jnp.sum(ringed**2) + squares - jnp.sum(offsets**2, axis=-1) / num_ring
        mismatch = jnp.where(allowed, mismatch, jnp.inf)
        where = jnp.argmin(mismatch)
        return mismatch.ravel()[where], where

    known = (~region).astype(image.dtype)
    # every pixel to copy and its rim are known: of the image itself not all, of the others all
    whole = correlated(of_needed * spectrum(known)) > jnp.sum(needed) - 0.5
    sources, searched, allowed = image[None], (known[..., None] * image)[None], (within & whole)[None]
    if others is not None:
        sources, searched = jnp.concatenate([sources, others]), jnp.concatenate([searched, others])
        allowed = jnp.concatenate([allowed, jnp.broadcast_to(within, others.shape[:3])])
    mismatches, places = jax.lax.map(best, (searched, allowed))
    mismatches = jnp.maximum(mismatches, 0).at[1:].multiply(_STRANGER)
    chosen = jnp.argmin(mismatches)
    row, column = places[chosen] // w, places[chosen] % w
    # the copy wraps around only where it isn't needed; modulo h, displacements back are negative ones
    copied = jnp.roll(sources[chosen], (-row, -column), axis=(0, 1))  # pyright: ignore[reportArgumentType]
    copied = jnp.where(jnp.isfinite(mismatches[chosen]), copied, 0.0)
    difference = harmonic(image - copied, region, max_steps=max_steps)
    return jnp.where(region[..., None], copied + difference, image)


def keeping_inside(occupied: Bool[Array, " n"]) -> Bool[Array, " n"]:
    """Which displacements, modulo n, move what is occupied nowhere beyond either end."""
    n = occupied.size
    place = jnp.arange(n)
    first, last = jnp.argmax(occupied), n - 1 - jnp.argmax(occupied[::-1])
    return (place <= n - 1 - last) | (place >= n - first)


class Exemplar(eqx.Module):
    """:func:`exemplar` with the normal images a detector keeps."""

    normals: UInt8[Array, "k h w 3"]
    """RGB, at the size of the images to fill."""
    name: ClassVar[str] = "exemplar"

    def __call__(self, image: Float[Array, "h w 3"], region: Bool[Array, "h w"]) -> Float[Array, "h w 3"]:
        """The image with the region's pixels borrowed."""
        return exemplar(image, region, normalise(self.normals.astype(image.dtype) / 255))


class MAE(eqx.Module):
    """The paper's inpainter: a masked autoencoder draws every patch the region touches, and only the region is taken over.

    The network is run on the whole image, at 224 x 224 pixels; an image of another size is resized there and the drawn
    pixels back. Irregular regions cost no other program, and ``jax.vmap`` batches images. The weights are leaves of this
    pytree: pass it as an argument of what you jit. Input and output in normalised intensity, as the network was trained.
    """

    name: str = eqx.field(static=True)
    graphdef: nnx.GraphDef = eqx.field(static=True)
    state: nnx.State

    @staticmethod
    def load(name: str | None = None, *, weights: str | Path | None = None) -> "MAE":
        """``mae-base``, ``mae-large`` or ``mae-huge`` with its weights; default: the first of :data:`PREFERRED` installed.

        Raises:
            CheckpointError: the weights are missing, damaged, another network's or without the decoder.
        """
        name = name or in_full("mae")
        return MAE(name, *load_autoencoder(name, weights=weights))

    def __call__(self, image: Float[Array, "h w 3"], region: Bool[Array, "h w"]) -> Float[Array, "h w 3"]:
        """The image with the region's pixels drawn."""
        autoencoder = nnx.merge(self.graphdef, self.state)
        size = image.shape[:2]
        if size == (SIDE, SIDE):
            return autoencoder(image, region)
        touched = jax.image.resize(region.astype(image.dtype), (SIDE, SIDE), "linear") > 0
        drawn = autoencoder(jax.image.resize(image, (SIDE, SIDE, 3), "linear"), touched)
        return jnp.where(region[..., None], jax.image.resize(drawn, image.shape, "linear"), image)


PREFERRED = ("mae-large", "mae-base", "mae-huge")
"""Masked autoencoders in the order in which an installed one is chosen."""

INPAINTERS = ("mae", "exemplar", "harmonic")


def installed_mae() -> str | None:
    """The masked autoencoder whose weights are installed, if any."""
    return next((name for name in PREFERRED if checkpoints.cached_file(name).exists()), None)


def in_full(inpaint: str | None) -> str:
    """The name of an inpainter, of ``mae`` and of None that of the one that is taken.

    Raises:
        CheckpointError: ``mae`` with no weights installed.
    """
    found = installed_mae() if inpaint in (None, "mae") else None
    if found is None and inpaint == "mae":
        raise CheckpointError(f"no masked autoencoder is installed; run: f2pad weights fetch {PREFERRED[0]}")
    return found or inpaint or "exemplar"


def choose(
    inpaint: Inpainter | str | None, normals: UInt8[Array, "k h w 3"] | None = None, *, traced: bool = False
) -> tuple[str, Inpainter]:
    """An inpainter and its name. None: ``mae`` where installed, else ``exemplar``, the best one without weights.

    Inside a transform None is ``exemplar``: weights loaded there would be constants of the program.

    Args:
        inpaint: a name, of an autoencoder its own too, an inpainter or None.
        normals: what the detector lets ``exemplar`` borrow from.
        traced: whether this is inside a transform.

    Raises:
        CheckpointError: an unknown name, or ``mae`` with no weights installed.
    """
    if inpaint is None and traced:
        inpaint = "exemplar"
    if inpaint is None or isinstance(inpaint, str):
        inpaint = in_full(inpaint)
    match inpaint:
        case "exemplar":
            inpaint = exemplar if normals is None else Exemplar(normals)
        case "harmonic":
            inpaint = harmonic
        case str() if inpaint.startswith("mae-"):
            inpaint = _loaded_mae(inpaint)
        case str():
            raise CheckpointError(f"unknown inpainter '{inpaint}'; known: {', '.join(INPAINTERS)}, or any callable")
    return getattr(inpaint, "name", None) or getattr(inpaint, "__name__", type(inpaint).__name__), inpaint


@functools.lru_cache(maxsize=1)
def _loaded_mae(name: str) -> MAE:
    return MAE.load(name)
