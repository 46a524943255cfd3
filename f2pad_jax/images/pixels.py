"""Units of pixel values: stored (uint8, or float in 0..1) and normalised intensity (ImageNet mean and deviation).

The solver works in normalised intensity with every backbone, so that its settings suit all backbones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
MIN_SIDE = 16
"""Smallest height or width of an image, pixels."""
LOWEST, HIGHEST = (0 - MEAN) / STD, (1 - MEAN) / STD
"""Normalised intensity of 0 and of 1."""


def to_unit(images: Shaped[Array | np.ndarray, "..."] | Sequence) -> Float[Array, "*b h w 3"]:
    """Converts images to RGB in 0..1.

    Args:
        images: ``(h, w)``, ``(h, w, 1|3)``, ``(n, h, w, 1|3)`` or a list; uint8, uint16, bool or float in 0..1.

    Raises:
        ImageError: the shape or dtype is none of these, or a float is not finite or not in 0..1. Under ``jit``, an array
            with such a float becomes NaN instead.
    """
    if isinstance(images, (list, tuple)):
        arrays = [_array(image) for image in images]
        if not arrays:
            raise ImageError("the list of images is empty")
        if len({array.shape for array in arrays}) > 1:
            raise ImageError("the images of a batch differ in size; pass them one at a time")
        images = np.stack(arrays)
    images = images if isinstance(images, jax.Array) else _array(images)
    if images.ndim == 2:
        images = images[..., None]
    if images.ndim not in (3, 4) or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ImageError(
            f"images have shape {images.shape}; expected (h, w), (h, w, 3) or (n, h, w, 3), channels last, grey or RGB "
            "(drop an alpha channel first; give a grey batch as images[..., None])"
        )
    if images.dtype in (np.uint8, np.uint16):
        # a table, because XLA multiplies by the inverse, which is not always the nearest float
        levels = np.arange(np.iinfo(images.dtype).max + 1, dtype=np.float32) / np.float32(np.iinfo(images.dtype).max)
        unit = jnp.asarray(levels)[images] if isinstance(images, jax.Array) else jax.device_put(levels[images])
    elif images.dtype == bool or jnp.issubdtype(images.dtype, jnp.floating):
        unit = jnp.asarray(images, jnp.float32)
        inside = jnp.all((unit >= 0) & (unit <= 1))
        if isinstance(unit, Tracer):
            unit = jnp.where(inside, unit, jnp.nan)
        elif not inside:
            finite = np.isfinite(unit)
            if not finite.all():
                raise ImageError(f"{np.sum(~finite)} values are not finite; float images must be within 0..1")
            raise ImageError(f"float images must be within 0..1; got {unit.min():g}..{unit.max():g} (or pass uint8)")
    else:
        raise ImageError(f"images have dtype {images.dtype}; expected uint8, uint16, bool or float in 0..1")
    return jnp.broadcast_to(unit, (*unit.shape[:-1], 3))


def _array(images: Any) -> np.ndarray:
    """Returns images as an array.

    Raises:
        ImageError: they are a path, nothing, or something that NumPy can't read.
    """
    if isinstance(images, (str, Path)):
        raise ImageError(f"{images}: this is a path; read it with f2pad_jax.images.read_image, or use refine_many")
    try:
        return np.asarray(images)
    except (TypeError, ValueError, RuntimeError) as error:  # such as a tensor with a gradient, or with bfloat16
        raise ImageError(f"{type(images).__name__} can't become an array ({str(error).splitlines()[0]})") from None


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
