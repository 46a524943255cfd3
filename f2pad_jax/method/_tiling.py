"""Division of a suspect region into parts, and the window around each part."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Array, Bool, Int

WINDOWS = (96, 160, 256, 448)
"""Sides of square windows, pixels. The whole image is used if no window holds the region. The cost of a step is
proportional to the area, and every side in use compiles more programs. Ten sides would save a fifth of the pixels, and
compile twice as often (``benchmarks/shapes.py``)."""


def window_offset(region: Bool[Array, "h w"], size: tuple[int, int], stride: int) -> Int[Array, " 2"]:
    """Returns the top-left corner of a window of ``size`` around the region, aligned to ``stride`` and inside the image."""

    def along(axis: int) -> Int[Array, ""]:
        hit = jnp.any(region, axis=1 - axis)
        first, last = jnp.argmax(hit), hit.size - 1 - jnp.argmax(hit[::-1])
        start = (first + last + 1 - size[axis]) // 2
        start = jnp.clip(start, 0, region.shape[axis] - size[axis])
        return (start + stride // 2) // stride * stride

    return jnp.stack([along(0), along(1)]).astype(jnp.int32)


def window_size(region: Bool[np.ndarray, "h w"], margin: int, stride: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Returns the smallest square window of ``sizes`` that holds the region with a margin, aligned to ``stride``.

    The size is the whole image if none of ``sizes`` fits. It is computed on the host, since a compiled shape can't vary.
    """
    h, w = region.shape

    def along(axis: int) -> int:
        hits = np.flatnonzero(region.any(axis=1 - axis))
        if not hits.size:
            return 0
        first, last = max(int(hits[0]) - margin, 0), min(int(hits[-1]) + 1 + margin, region.shape[axis])
        return -(-last // stride) * stride - first // stride * stride

    needed = max(along(0), along(1))
    return next(((s, s) for s in sorted(sizes) if needed <= s <= min(h, w) and s % stride == 0), (h, w))


def crop_size(
    region: Bool[np.ndarray, "h w"], window: tuple[int, int], image: tuple[int, int], margin: int | None
) -> tuple[int, int]:
    """Returns the size of the crop, the rectangle of the full-resolution image whose pixels are optimised.

    Each side is a multiple of a quarter of the window's side, for few compiled programs. One multiple serves both
    sides, the smallest with room for the region and a margin. If the image has the detector's size, the crop is the window.

    Args:
        region: suspect region at the detector's size.
        window: window at the detector's size.
        image: height and width of the image.
        margin: pixels of the image around the region; 8 cover gradient sharing and decision. None: the whole image.
    """
    if region.shape == image:
        return window
    if margin is None:
        return image
    quarters, count = [], 1
    for axis in (0, 1):
        scale, hits = image[axis] / region.shape[axis], np.flatnonzero(region.any(axis=1 - axis))
        needed = scale * (np.ptp(hits) + 1 if hits.size else 0) + 2 * (margin + 1)  # 1 pixel for rounding
        quarters.append(math.ceil(scale * window[axis] / 4))
        count = max(count, math.ceil(needed / quarters[axis]))
    return min(count * quarters[0], image[0]), min(count * quarters[1], image[1])


def divided(
    region: Bool[np.ndarray, "h w"], margin: int | None, stride: int, sizes: tuple[int, ...]
) -> list[tuple[Bool[np.ndarray, "h w"], tuple[int, int]]]:
    """Divides a region into parts that are solved separately, each with the size of its window.

    Two connected components form one part if one lies within the other's margin: a defect is no context for another. They
    also form one part if a window around both is no larger than their two windows together. Without a margin (None), or
    without ``sizes``, the whole region is one part in the whole image. The parts are found on the host.
    """
    if margin is None:
        return [(region, (region.shape[0], region.shape[1]))]
    labels, count = scipy.ndimage.label(region, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    parts = [labels == i + 1 for i in range(count)]

    def window(part: Bool[np.ndarray, "h w"]) -> tuple[int, int]:
        return window_size(part, margin, stride, sizes)

    def belong_together(one: Bool[np.ndarray, "h w"], other: Bool[np.ndarray, "h w"]) -> bool:
        if np.prod(window(one | other)) <= np.prod(window(one)) + np.prod(window(other)):
            return True
        (first, last), (start, end) = (
            (np.argwhere(part).min(axis=0), np.argwhere(part).max(axis=0) + 1) for part in (one, other)
        )
        return bool(np.all((first - margin < end) & (start - margin < last)))

    def next_pair() -> tuple[int, int] | None:
        pairs = itertools.combinations(range(len(parts)), 2)
        return next((pair for pair in pairs if belong_together(*(parts[i] for i in pair))), None)

    while pair := next_pair():
        other = parts.pop(pair[1])
        parts[pair[0]] = parts[pair[0]] | other
    return [(part, window(part)) for part in parts]
