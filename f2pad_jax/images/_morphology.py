"""Morphology of masks, as array code with fixed shapes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def dilate(mask: Bool[Array, "h w"], radius: int) -> Bool[Array, "h w"]:
    """Dilates a mask by a square of side 2·radius + 1."""
    return mask if radius == 0 else _any_in_squares(mask, 2 * radius + 1, radius)


def _any_in_squares(mask: Bool[Array, "h w"], side: int, beyond: int) -> Bool[Array, "_h _w"]:
    """Returns which squares of ``side`` pixels hold a set pixel; squares extend up to ``beyond`` pixels past the image."""
    for window, pads in (((side, 1), ((beyond, beyond), (0, 0))), ((1, side), ((0, 0), (beyond, beyond)))):
        mask = jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, window, (1, 1), pads)
    return mask


def opened(mask: Bool[Array, "h w"], side: int = 3) -> Bool[Array, "h w"]:
    """Opens a mask by a square of ``side`` pixels: removes dots and thinner lines (paper, Section III-E3: 3x3).

    Pixels beyond the border count as set; squares extend up to half their side beyond the border.
    """
    fits = ~_any_in_squares(~mask, side, side // 2)
    return _any_in_squares(fits, side, (side - 1) // 2)


def reached(start: Bool[Array, "h w"], within: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
    """Returns the connected components of ``within`` (4-neighbours) that contain a pixel of ``start``.

    Sweeps along columns and rows, each a running maximum, flood the components until nothing changes. A sweep crosses the
    whole image: most shapes need few sweeps.
    """

    def sweep(wet: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
        for axis in (0, 1):
            # in both directions: is the last wall or wet pixel wet? walls have even numbers, wet pixels odd ones
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
    """Fills holes: sets the connected components (4-neighbours) of unset pixels that do not touch the border."""
    border = jnp.zeros_like(mask).at[0].set(True).at[-1].set(True).at[:, 0].set(True).at[:, -1].set(True)
    return ~reached(border, ~mask)
