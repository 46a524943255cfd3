"""Units of pixel values: stored (uint8, or float in 0..1) and normalised intensity (ImageNet mean and deviation).

The solver works in normalised intensity with every backbone, so that its settings suit all backbones.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Shaped

from f2pad_jax.errors import ImageError

Scalar = float | Float[Array, ""]
"""Number, traced or not."""

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
"""Mean of each channel in ImageNet, 0..1."""
STD = np.array([0.229, 0.224, 0.225], np.float32)
"""Standard deviation of each channel in ImageNet, 0..1."""
LOWEST, HIGHEST = (0 - MEAN) / STD, (1 - MEAN) / STD
"""Normalised intensity of 0 and of 1."""


def to_unit(images: Shaped[Array | np.ndarray, "..."] | Sequence) -> Float[Array, "*b h w 3"]:
    """Converts images to RGB in 0..1.

    Args:
        images: ``(h, w)``, ``(h, w, 1|3)``, ``(n, h, w, 1|3)`` or a list; uint8, uint16, bool or float in 0..1.

    Raises:
        ImageError: the shape or dtype is none of these, or a float is not finite or not in 0..1 (not checked under jit).
    """
    if isinstance(images, (list, tuple)):
        arrays = [np.asarray(image) for image in images]
        if not arrays:
            raise ImageError("the list of images is empty")
        if len({array.shape for array in arrays}) > 1:
            raise ImageError("the images of a batch differ in size; pass them one at a time")
        images = np.stack(arrays)
    if not isinstance(images, jax.Array):
        images = np.asarray(images)
    if images.ndim == 2:
        images = images[..., None]
    if images.ndim not in (3, 4) or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ImageError(
            f"images have shape {images.shape}; expected (h, w), (h, w, 3) or (n, h, w, 3), channels last, "
            "grey or RGB (drop an alpha channel first)"
        )
    if images.dtype in (np.uint8, np.uint16):
        # a table, because XLA multiplies by the inverse, which is not always the nearest float
        levels = np.arange(np.iinfo(images.dtype).max + 1, dtype=np.float32) / np.float32(np.iinfo(images.dtype).max)
        unit = jnp.asarray(levels)[images] if isinstance(images, jax.Array) else jax.device_put(levels[images])
    elif images.dtype == bool or jnp.issubdtype(images.dtype, jnp.floating):
        unit = jnp.asarray(images, jnp.float32)
        if not isinstance(unit, Tracer) and not jnp.all((unit >= 0) & (unit <= 1)):  # jnp.min may pass over NaN
            low, high = float(np.min(unit)), float(np.max(unit))
            raise ImageError(f"float images must be finite and within 0..1; got {low:g}..{high:g} (or pass uint8)")
    else:
        raise ImageError(f"images have dtype {images.dtype}; expected uint8, uint16, bool or float in 0..1")
    return jnp.broadcast_to(unit, (*unit.shape[:-1], 3))


def normalise(unit: Float[Array | np.ndarray, "*b 3"]) -> Float[Array, "*b 3"]:
    """Converts values in 0..1 to normalised intensity."""
    return (jnp.asarray(unit) - MEAN) / STD


def denormalise(normalised: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """Converts normalised intensity to values in 0..1."""
    return normalised * STD + MEAN


def resized(image: Float[Array, "h w 3"], size: tuple[int, int]) -> Float[Array, "h2 w2 3"]:
    """Resizes an image in 0..1 without a crop (paper, Section IV-A3): bilinear, antialiased when shrinking."""
    if image.shape[:2] == tuple(size):
        return image
    return jnp.clip(jax.image.resize(image, (*size, image.shape[2]), "linear"), 0.0, 1.0)
