"""Where to look: thresholded map -> filled, dilated region -> window; and the morphology the mask needs.

All but the choice of windows is array code: fixed shapes, no host, so it runs inside ``jit`` and ``vmap``.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax.units import Scalar

WINDOWS = (64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
"""Sides of the square windows solved in; the whole image where none holds the region. A step costs in proportion to the
area; each side in use is one more program to compile, and takes memory maps, of which a process has few."""


def dilate(mask: Bool[Array, "h w"], radius: int) -> Bool[Array, "h w"]:
    """Dilation by a (2·radius+1)² square."""
    return mask if radius == 0 else _touched(mask, 2 * radius + 1, radius)


def _touched(mask: Bool[Array, "h w"], side: int, beyond: int) -> Bool[Array, "_h _w"]:
    """Which side² squares have a set pixel, of all that reach at most ``beyond`` pixels beyond the image."""
    for window, pads in (((side, 1), ((beyond, beyond), (0, 0))), ((1, side), ((0, 0), (beyond, beyond)))):
        mask = jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, window, (1, 1), pads)
    return mask


def opened(mask: Bool[Array, "h w"], side: int = 3) -> Bool[Array, "h w"]:
    """Opening by a side² square: removes dots and lines thinner than that (paper, Section III-E3: 3x3).

    What lies beyond the border counts as set, for squares no more than half of which lie there.
    """
    fits = ~_touched(~mask, side, side // 2)
    return _touched(fits, side, (side - 1) // 2)


def reached(start: Bool[Array, "h w"], within: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
    """The pixels of ``within`` that can be reached from one of ``start`` without leaving it, through 4-neighbours.

    Flooded by sweeps along columns and rows, each a running maximum, until nothing changes; a sweep crosses the whole
    image, so ordinary shapes take a handful.
    """

    def sweep(wet: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
        for axis in (0, 1):
            # both ways: the last pixel passed that is a wall (even) or wet (odd)
            walls, flooded = (jnp.stack([a, jnp.flip(a, axis)]) for a in (~within, wet))
            place = 2 * jax.lax.broadcasted_iota(jnp.int32, walls.shape, axis + 1) + 2
            last = jax.lax.cummax(jnp.where(walls | flooded, place + flooded, 0), axis + 1) % 2 == 1
            wet = within & (last[0] | jnp.flip(last[1], axis))
        return wet

    def grow(carry):
        wet, _ = carry
        new = sweep(wet)
        return new, jnp.any(new != wet)

    wet, _ = jax.lax.while_loop(lambda carry: carry[1], grow, (start & within, jnp.any(start & within)))
    return wet


def filled(mask: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
    """Fill holes: every unset pixel that can't reach the border through 4-neighbours is set."""
    border = jnp.zeros_like(mask).at[0].set(True).at[-1].set(True).at[:, 0].set(True).at[:, -1].set(True)
    return ~reached(border, ~mask)


def suspect_region(excess: Float[Array, "h w"], threshold: Scalar, spill: Scalar, dilation: int) -> Bool[Array, "h w"]:
    """The pixels to optimise: m0 dilated (paper, Section III-E2), its holes filled, and what around it stands out less.

    Departures: holes are filled, since coarse maps are often rings around large defects; and pixels above ``spill``, where
    they are connected to one above the threshold, are suspect too, so that the faint part of a defect is not missed.

    Args:
        excess: the coarse map above the ordinary level, in units of the border of m0.
        threshold: the detector's, in the same units; 1 or less.
        spill: what is suspect, in the same units; infinity: nothing but m0.
        dilation: growth of m0, pixels.
    """
    return reached(excess > threshold, filled(dilate(excess > 1, dilation) | (excess > spill)))


def affected_positions(region: Bool[Array, "h w"], shape: tuple[int, int], reach: int | None) -> Float[Array, "hk wk"]:
    """Which feature positions enter l_n: 1 where the cell lies within ``reach`` pixels of the region (None: all), else 0.

    Paper, Section III-E2. ``reach`` stands for the effective receptive field, which is far smaller than the theoretical.
    """
    if reach is None:
        return jnp.ones(shape)
    near = dilate(region, reach)
    (h, w), (hk, wk) = region.shape, shape
    cells = near.reshape(hk, h // hk, wk, w // wk)
    return jnp.any(cells, axis=(1, 3)).astype(jnp.float32)


def window_offset(region: Bool[Array, "h w"], size: tuple[int, int], stride: int) -> Int[Array, " 2"]:
    """Top-left corner of a window of ``size`` around the region's bounding box: aligned to ``stride``, inside the image."""

    def along(axis: int) -> Int[Array, ""]:
        hit = jnp.any(region, axis=1 - axis)
        first, last = jnp.argmax(hit), hit.size - 1 - jnp.argmax(hit[::-1])
        start = (first + last + 1 - size[axis]) // 2
        start = jnp.clip(start, 0, region.shape[axis] - size[axis])
        return (start + stride // 2) // stride * stride

    return jnp.stack([along(0), along(1)]).astype(jnp.int32)


def window_size(region: Bool[np.ndarray, "h w"], margin: int, stride: int, sizes: tuple[int, ...]) -> tuple[int, int]:
    """The smallest square window of ``sizes`` that holds the region and ``margin`` on each side, aligned to ``stride``.

    On the host: the answer is a shape. The whole image where none of ``sizes`` fits.
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


def own_size(
    region: Bool[np.ndarray, "h w"], window: tuple[int, int], image: tuple[int, int], margin: int | None
) -> tuple[int, int]:
    """The sides of the box of an image's own pixels that n lives on: quarters of the window's, as few as hold the region.

    On the host. ``region`` and ``window`` are at the detector's size, ``margin`` (None: the whole image) in pixels of the
    image: what acts on them looks no farther than 8. At one size the box is the window.
    """
    if region.shape == image:
        return window
    if margin is None:
        return image
    quarters, count = [], 1
    for axis in (0, 1):
        scale, hits = image[axis] / region.shape[axis], np.flatnonzero(region.any(axis=1 - axis))
        needed = scale * (np.ptp(hits) + 1 if hits.size else 0) + 2 * (margin + 1)  # and a pixel for rounding
        quarters.append(math.ceil(scale * window[axis] / 4))
        count = max(count, math.ceil(needed / quarters[axis]))
    return min(count * quarters[0], image[0]), min(count * quarters[1], image[1])


def divided(
    region: Bool[np.ndarray, "h w"], margin: int | None, stride: int, sizes: tuple[int, ...]
) -> list[tuple[Bool[np.ndarray, "h w"], tuple[int, int]]]:
    """The parts of a region to solve for separately, each with the size of its window.

    On the host. Two parts go together where one is within the other's margin, so that no defect is another's context, or
    where a window around both is no larger than their two. Without a margin (None) all is one, in the whole image.
    """
    if margin is None:
        return [(region, (region.shape[0], region.shape[1]))]
    labels, count = scipy.ndimage.label(region, np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    parts = [labels == i + 1 for i in range(count)]

    def window(part: Bool[np.ndarray, "h w"]) -> tuple[int, int]:
        return window_size(part, margin, stride, sizes)

    def belong(one: Bool[np.ndarray, "h w"], other: Bool[np.ndarray, "h w"]) -> bool:
        if np.prod(window(one | other)) <= np.prod(window(one)) + np.prod(window(other)):
            return True
        (first, last), (start, end) = (
            (np.argwhere(part).min(axis=0), np.argwhere(part).max(axis=0) + 1) for part in (one, other)
        )
        return bool(np.all((first - margin < end) & (start - margin < last)))

    def pair() -> tuple[int, int] | None:
        return next((p for p in itertools.combinations(range(len(parts)), 2) if belong(*(parts[i] for i in p))), None)

    while found := pair():
        other = parts.pop(found[1])
        parts[found[0]] = parts[found[0]] | other
    return [(part, window(part)) for part in parts]
