"""Synthetic defects: cut-paste (paper, Eq. 16) and fainter kinds, in irregular shapes drawn from smooth noise."""

from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float

from f2pad_jax.images.pixels import STD

FAR = 0.8
"""Least distance between a pasted pixel and the pixel under it, normalised intensity (L2 over channels)."""


class Defective(NamedTuple):
    """A synthetic defective image and its exact mask."""

    image: Float[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]


def irregular_shape(
    rng: np.random.Generator, size: tuple[int, int], *, area: tuple[float, float] = (0.005, 0.06)
) -> Bool[np.ndarray, "h w"]:
    """Draws one connected blob with a ragged outline, anywhere in the image.

    Args:
        rng: source of randomness.
        size: height and width, pixels.
        area: lowest and highest share of the image that the blob covers.
    """
    h, w = size
    target = max(rng.uniform(*area) * h * w, 1.0)
    radius = np.sqrt(target / np.pi)
    # a random ellipse with a ragged outline: the noise has a third of the radius as its scale
    yy, xx = np.mgrid[:h, :w]
    reach = min(1.3 * radius, 0.45 * min(h, w))
    cy, cx = rng.uniform(reach, h - reach), rng.uniform(reach, w - reach)
    angle, aspect = rng.uniform(0, np.pi), np.exp(rng.uniform(-0.6, 0.6))
    u = ((yy - cy) * np.cos(angle) + (xx - cx) * np.sin(angle)) * np.sqrt(aspect)
    v = (-(yy - cy) * np.sin(angle) + (xx - cx) * np.cos(angle)) / np.sqrt(aspect)
    noise = scipy.ndimage.gaussian_filter(rng.standard_normal(size), max(radius / 3, 1.5))
    field = np.hypot(u, v) / radius - 0.45 * noise / noise.std()
    level = np.partition(field.ravel(), int(target))[int(target)]
    parts = np.empty(size, np.int32)
    scipy.ndimage.label(field < level, output=parts)
    largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return np.asarray(scipy.ndimage.binary_fill_holes(parts == largest))


def paste_flat(rng: np.random.Generator, normal: Float[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> Defective:
    """Pastes a random flat colour, Eq. (16), at least :data:`FAR` from every pixel that it covers.

    Colours are drawn until one is far enough from all covered pixels, at most 100 times. If none is, the farthest one is
    used. Where it is still too near, it is multiplied by the factor nearest to 1 that brings it far enough (paper,
    Section IV-A: "a desired factor").

    Args:
        rng: source of randomness.
        normal: defect-free image in 0..1.
        mask: pixels to paste on.
    """
    best, colour = -1.0, np.zeros(3, np.float32)
    for candidate in rng.uniform(0, 1, (100, 3)).astype(np.float32):
        distance = np.linalg.norm((candidate - normal[mask]) / STD, axis=-1).min()
        if distance > best:
            best, colour = distance, candidate
        if best >= FAR:
            break
    image = normal.copy()
    image[mask] = colour if best >= FAR else _corrected(colour, normal[mask])
    return Defective(image, mask)


def _corrected(colour: Float[np.ndarray, "3"], covered: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Returns the colour for each covered pixel, lighter or darker where it is too near."""
    factors = np.exp(np.linspace(-3, 3, 121, dtype=np.float32))
    factors = factors[np.argsort(np.abs(np.log(factors)), kind="stable")]  # 1 first, then farther and farther from 1
    candidates = np.clip(factors[:, None] * colour, 0, 1)
    far = np.linalg.norm((candidates[:, None] - covered) / STD, axis=-1) >= FAR
    return candidates[np.argmax(far, axis=0)]


def paste_tint(rng: np.random.Generator, normal: Float[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> Defective:
    """Pastes the flat colour of :func:`paste_flat` at an opacity of 0.1 to 1, equally often in every octave."""
    opacity = np.float32(np.exp(rng.uniform(np.log(0.1), 0)))
    return Defective(normal + opacity * (paste_flat(rng, normal, mask).image - normal), mask)


def paste_stain(rng: np.random.Generator, normal: Float[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> Defective:
    """Multiplies each channel by a factor between exp(-0.6) and exp(0.6), with a soft edge."""
    factors = np.exp(rng.uniform(0.2, 1) * rng.uniform(-0.6, 0.6, 3)).astype(np.float32)
    return Defective(blend(normal, normal * factors, mask, 1.0).image, mask)


def paste_noise(rng: np.random.Generator, normal: Float[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> Defective:
    """Adds noise with a deviation of 3 to 20 % of the full range, smoothed over 0.5 to 4 pixels, with a soft edge."""
    sigma = rng.uniform(0.5, 4)
    noise = scipy.ndimage.gaussian_filter(rng.standard_normal(normal.shape).astype(np.float32), (sigma, sigma, 0))
    changed = normal + np.float32(rng.uniform(0.03, 0.2)) * noise / noise.std()
    return Defective(blend(normal, changed, mask, 1.0).image, mask)


def blend(
    normal: Float[np.ndarray, "h w 3"], changed: Float[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], sigma: float
) -> Defective:
    """Blends ``changed`` into ``normal`` inside the mask, over a soft edge of ``sigma`` pixels.

    Pixels are anomalous where ``changed`` has a share of at least one half.
    """
    share = scipy.ndimage.gaussian_filter(mask.astype(np.float32), sigma)
    image = (1 - share[..., None]) * normal + share[..., None] * np.clip(changed, 0, 1)
    return Defective(image, share >= 0.5)
