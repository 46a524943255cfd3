"""The coarse stage: anomaly map, coarse mask m0 and suspect region, of the detector or from elsewhere."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Num

from f2pad_jax.detectors.base import AbstractDetector, counted
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images._morphology import dilate, filled, reached
from f2pad_jax.images._views import scaled, scaled_mask
from f2pad_jax.images.pixels import MIN_SIDE, Scalar, normalise, resized
from f2pad_jax.method.settings import Settings


class Given(eqx.Module):
    """Coarse map or coarse mask from elsewhere, in place of the detector's own map. A batch adds a leading axis."""

    values: Float[Array, "*b _h _w"]
    """Values of the map, higher where an anomaly is likelier; of a mask, 0 and 1."""
    is_mask: bool = eqx.field(static=True, default=False)
    """Whether the values are a mask, static."""

    @staticmethod
    def of(
        coarse_map: Num[Array | np.ndarray, "*b _h _w"] | None,
        coarse_mask: Bool[Array | np.ndarray, "*b _H _W"] | None,
    ) -> "Given | None":
        """Returns the map or the mask; None if there is neither.

        Raises:
            OptionError: there are both.
            ImageError: the map has values that are not finite.
        """
        if coarse_map is not None and coarse_mask is not None:
            raise OptionError("give a coarse map or a coarse mask, not both")
        if coarse_mask is not None:
            return Given(jnp.asarray(coarse_mask, jnp.float32), is_mask=True)
        if coarse_map is not None:
            values = jnp.asarray(coarse_map, jnp.float32)
            if not isinstance(values, Tracer) and not np.isfinite(values).all():
                raise ImageError("a coarse map has values that are not finite")
            return Given(values)
        return None

    def read_by(
        self, detector: AbstractDetector, x: Float[Array, "h w 3"], ignored: Bool[Array, "h w"] | None = None
    ) -> tuple[Float[Array, "h w"], AbstractDetector]:
        """Returns the map at the detector's size, and the detector with the levels of this map.

        The levels are the detector's if it was fitted with coarse maps of normal images. Otherwise the map runs from 0, its
        median, to 1, its maximum, and pixels above 0.5 are anomalous. The least value takes the median's place if more than
        half of the pixels have the maximum. Only the pixels that are not ``ignored`` count.

        A mask becomes a map above 0.5 inside the mask and 0 outside. A mask does not say how likely each of its pixels is:
        a box has good pixels, too. Inside it, the detector's own map therefore runs from 0.5, its median, to 1.
        """
        c = detector.calibrated
        if self.is_mask:
            inside = scaled_mask(self.values > 0.5, detector.size, 1e-3)
            found = counted(detector.anomaly_map(x), ignored)
            low, high = jnp.median(found), jnp.max(jnp.where(inside, found, -jnp.inf))
            likely = jnp.clip((found - low) / jnp.maximum(high - low, 1e-6), 0, 1)
            values = jnp.where(inside, 0.51 + 0.49 * likely, 0)
        else:
            values = scaled(self.values, detector.size)
            if c.maps == "given":
                return values, detector
            values = counted(values, ignored)
            low, high = jnp.median(values), jnp.max(values)
            low = jnp.where(low < high, low, jnp.min(values))
            varied = high - low > 1e-5 * jnp.max(jnp.abs(values))  # more than the resize rounds
            values = jnp.where(varied, (values - low) / jnp.where(varied, high - low, 1), 0)
        own = dataclasses.replace(c, ordinary=jnp.float32(0), threshold=jnp.float32(0.5), normality=None)
        return values, dataclasses.replace(detector, calibration=own)


class Coarse(eqx.Module):
    """Result of the coarse stage for one image, at the detector's size."""

    x: Float[Array, "h w 3"]
    """Image in normalised intensity."""
    anomaly_map: Float[Array, "h w"]
    """Map of the detector in units of the mean score of normal images, or the map of :meth:`Given.read_by`."""
    excess: Float[Array, "h w"]
    """Map on a linear scale: 0 at the level of normal images or below, 1 at the border of m0, more inside m0."""
    threshold: Float[Array, ""]
    """Threshold of the detector, on the scale of ``excess``: 1, or less if m0 ends at half of the map's height instead."""
    mask: Bool[Array, "h w"]
    """Coarse mask m0: pixels whose excess is above 1."""
    region: Bool[Array, "h w"]
    """Suspect region: pixels that may change. In a good image, m0 and the region are empty."""
    score: Float[Array, ""]
    """Score of the image; the image is defective if it exceeds 1."""
    p_value: Float[Array, ""]
    """Probability that a normal image has this score or a higher one."""
    unlike: Bool[Array, ""]
    """Whether the image is unlike the normal images as a whole: the ordinary level of its map is higher."""
    ignored: Bool[Array, "h w"] | None = None
    """Pixels that do not count; None: all count."""

    @property
    def covered(self) -> Bool[Array, ""]:
        """Whether every pixel that counts is suspect: no good pixel is left to start from."""
        outside = ~self.region if self.ignored is None else ~(self.region | self.ignored)
        return jnp.any(self.region) & ~jnp.any(outside)


@jax.jit
def look(
    detector: AbstractDetector,
    image: Float[Array, "h w 3"],
    settings: Settings,
    ignored: Bool[Array, "_H _W"] | None = None,
    given: Given | None = None,
) -> Coarse:
    """Finds the coarse map, the verdict, m0 and the suspect region of an image in 0..1.

    ``ignored`` pixels do not count. A ``given`` map takes the place of the detector's.

    Raises:
        ImageError: a side of the image is under :data:`~f2pad_jax.images.pixels.MIN_SIDE`.
        OptionError: no map is given for a detector that was fitted without maps of its own.
    """
    if min(image.shape[:2]) < MIN_SIDE:
        raise ImageError(f"an image of {image.shape[1]}x{image.shape[0]} pixels; the smallest side allowed is {MIN_SIDE}")
    if given is None and detector.calibrated.maps != "own":
        raise OptionError("this detector has no maps of its own; give the coarse map or coarse mask of each image")
    x = normalise(resized(image, detector.size))
    masks = [m for m in (detector.calibrated.ignored, ignored) if m is not None]
    ignored = jnp.any(jnp.stack([scaled_mask(m, detector.size, 1e-3) for m in masks]), axis=0) if masks else None
    anomaly_map, detector = (detector.anomaly_map(x), detector) if given is None else given.read_by(detector, x, ignored)
    anomaly_map = counted(anomaly_map, ignored)
    excess, threshold = detector.excess(anomaly_map)
    score, p_value = detector.verdict(anomaly_map, settings.false_alarms)
    region = suspect_region(excess, threshold, settings.hysteresis, settings.dilation)
    may_change = (score > 1) & (True if ignored is None else ~ignored)
    m0, region = (mask & may_change for mask in (detector.coarse_mask(anomaly_map), region))
    unlike = detector.lift(anomaly_map) > 0
    return Coarse(x, anomaly_map, excess, threshold, m0, region, score, p_value, unlike, ignored)


def suspect_region(excess: Float[Array, "h w"], threshold: Scalar, hysteresis: Scalar, dilation: int) -> Bool[Array, "h w"]:
    """Returns the pixels to optimise: m0 dilated (paper, Section III-E2) and filled, with a hysteresis threshold.

    Departures: holes are filled, since coarse maps are often rings around large defects. Pixels above ``hysteresis`` are
    suspect too if they are connected to a pixel above ``threshold``: they hold the faint part of a defect.

    Args:
        excess: map on a linear scale, as in :class:`Coarse`.
        threshold: threshold of the detector on this scale, at most 1.
        hysteresis: lower threshold on this scale; infinity for none.
        dilation: growth of m0, pixels.
    """
    return reached(excess > threshold, filled(dilate(excess > 1, dilation) | (excess > hysteresis)))
