"""Size at which a detector sees the images: their aspect ratio, and enough pixels for the smallest defect."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from f2pad_jax.errors import OptionError
from f2pad_jax.images._views import scaled_mask

LARGEST = 448
"""Side of the square with as many pixels as the largest size that is chosen without ``smallest_defect``."""
SEEN = 12.0
"""Width of the smallest defect at the detector's size, pixels: three positions of a layer with stride 4."""
PEEKED = 16
"""Number of images whose median size counts as the images' own size."""


def detector_size(
    own: tuple[float | int, float | int], stride: int, size: int | None = None, smallest_defect: float | int | None = None
) -> tuple[int, int]:
    """Returns the height and width at which a detector sees images, multiples of ``stride`` with the images' aspect ratio.

    No side exceeds the images' own side, unless this side is below the stride. By default images have at most the pixels of
    a square of :data:`LARGEST`.

    Args:
        own: height and width of the images.
        stride: stride of the backbone, pixels.
        size: side of a square; images have as many pixels as this square.
        smallest_defect: width of the smallest defect that is to be found, pixels of the images. It has :data:`SEEN` pixels
            at the detector's size.

    Raises:
        OptionError: the size or the smallest defect is not positive.
    """
    size = LARGEST if size is None else size
    if not (size > 0 and (smallest_defect is None or smallest_defect > 0)):
        raise OptionError(f"size {size} and smallest defect {smallest_defect} must be positive")
    scale = SEEN / smallest_defect if smallest_defect else size / math.sqrt(own[0] * own[1])
    sides = (min(round(scale * side / stride), int(side // stride)) for side in own)
    height, width = (max(count, 1) * stride for count in sides)
    return height, width


def ignored_pixels(
    ignore: Bool[np.ndarray, "H W"] | None, border: int, own: tuple[float | int, float | int], size: tuple[int, int]
) -> Bool[np.ndarray, "h w"] | None:
    """Returns the pixels that do not count, at the detector's size; None if all count.

    Args:
        ignore: mask of any size, or None.
        border: width of a frame, pixels of the images.
        own: height and width of the images.
        size: height and width at which the detector sees them.

    Raises:
        OptionError: the mask has no two dimensions, the border is negative, or no pixel counts.
    """
    if border < 0 or (ignore is not None and np.ndim(ignore) != 2):
        raise OptionError(f"border {border} must be at least 0, and the mask of ignored pixels an array (h, w)")
    if ignore is None and border == 0:
        return None
    ignored = np.zeros(size, bool) if ignore is None else np.array(scaled_mask(jnp.asarray(ignore, bool), size, 1e-3))
    for axis in (0, 1):
        width = min(math.ceil(border * size[axis] / own[axis]), size[axis])
        lines = np.moveaxis(ignored, axis, 0)
        lines[:width] = lines[size[axis] - width :] = True
    if ignored.all():
        raise OptionError("no pixel counts: the mask of ignored pixels and the border cover the image")
    return ignored


def peeked(images: Iterable[Any]) -> tuple[tuple[float, float], Iterable[Any]]:
    """Returns the median height and width of the first images, and all images."""
    if isinstance(images, (np.ndarray, jax.Array)):
        first = images[:PEEKED]
    else:
        images = iter(images)
        first = list(itertools.islice(images, PEEKED))
        images = itertools.chain(first, images)
    sizes = [np.shape(image)[:2] for image in first if np.ndim(image) in (2, 3)]  # others are refused later
    height, width = np.median(sizes, axis=0) if sizes else (LARGEST, LARGEST)
    return (float(height), float(width)), images
