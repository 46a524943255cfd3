"""What F2PAD needs of a detector, and the coarse map every detector shares."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from f2pad_jax.prior import PixelPrior

Where = Any
"""What a detector needs to know about one window, as a pytree of arrays: positions, candidates, statistics."""


class AbstractDetector(eqx.Module):
    """A fitted feature-based detector: a pytree that says how normal each position of an image looks.

    Scores are divided by the mean score of held-out normal images, so 1 is ordinary and one set of weights in Eq. (12)
    serves every detector and backbone (departure: the paper does not state the scale of its loss).
    All images are ``(h, w, 3)`` in normalised intensity.
    """

    size: eqx.AbstractVar[tuple[int, int]]
    """Height and width the detector was fitted at."""
    prior: eqx.AbstractVar[PixelPrior]
    """Distribution of normal pixel values, Eq. (9)."""
    threshold: eqx.AbstractVar[Float[Array, ""]]
    """Level of :meth:`anomaly_map` above which a pixel belongs to m0."""

    @property
    @abc.abstractmethod
    def stride(self) -> int:
        """Window corners and sides are multiples of this many pixels."""

    @abc.abstractmethod
    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """The coarse anomaly map of a whole image."""

    def coarse_mask(self, anomaly_map: Float[Array, "h w"]) -> Bool[Array, "h w"]:
        """m0. Default: where the map exceeds the threshold."""
        return anomaly_map > self.threshold

    def exemplars(self) -> UInt8[Array, "k h w 3"] | None:
        """Normal RGB images at the detector's size, from which an inpainter may borrow. Default: none."""
        return None

    @abc.abstractmethod
    def locate(self, image: Float[Array, "h w 3"], corner: Int[Array, " 2"]) -> Where:
        """What :meth:`scores` needs for the window ``image`` whose top-left pixel is ``corner`` of the whole image."""

    def refresh(self, image: Float[Array, "h w 3"], where: Where) -> Where:
        """``where`` for the same window after the image changed; called every few steps. Default: unchanged."""
        return where

    @abc.abstractmethod
    def scores(self, image: Float[Array, "h w 3"], where: Where) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """Anomaly scores of a window's positions, one map per scored layer, differentiable in ``image``."""


def coarse_map(scores: Float[Array, "h_k w_k"], size: tuple[int, int], *, sigma: float = 4.0) -> Float[Array, "h w"]:
    """Scores to a pixel map as PaDiM and PatchCore do it: bilinear, then a Gaussian of ``sigma`` pixels.

    Separable, truncated at 4 sigma (33 taps at sigma 4), border mirrored with the edge repeated (scipy's "reflect").
    """
    pixels = jax.image.resize(scores, size, "linear", antialias=False)
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        n = pixels.shape[axis]
        padded = jnp.pad(pixels, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="symmetric")
        slices = [jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(len(taps))]
        pixels = jnp.tensordot(taps, jnp.stack(slices), axes=1)
    return pixels
