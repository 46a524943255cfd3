"""The interface of a detector, and the coarse map that all detectors share."""

import abc
import tempfile
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8, UInt16

from f2pad_jax.backbones.backbone import Backbone, in_tiles
from f2pad_jax.backbones.network import Network
from f2pad_jax.detectors.normality import PRIOR_EXCESS, Normality
from f2pad_jax.detectors.prior import PixelPrior
from f2pad_jax.errors import ImageError
from f2pad_jax.images._smoothing import smoothed
from f2pad_jax.images.pixels import Scalar, denormalise, normalise, resized, to_unit
from f2pad_jax.progress import Progress

BORDER = 5 / 7
"""Height of the border of m0 in a faint defect, as a share of the threshold's height above the ordinary level."""
UNLIKE = 0.2
"""Least height of the median of an image unlike the normal images, as a share of the threshold's height. Both heights are
above the ordinary level."""
LARGE = 1024 * 1024
"""Largest number of pixels of an image that the network sees at once; it sees a larger image in tiles."""
Context = Any
"""Pytree of arrays that a detector needs to score one window: positions, candidates or statistics."""

ORIGIN = np.zeros(2, np.int32)
"""Corner of a window that is the whole image."""


class NormalImages(Sequence):
    """Defect-free images at the detector's size, stored with 16 bits a channel (0.3 MB at 224x224).

    Indexing gives an image in normalised intensity. Pixels that are ``ignored`` in all images count neither in the
    calibration nor later.
    """

    def __init__(
        self,
        images: Iterable[Shaped[np.ndarray | Array, "..."]],
        size: tuple[int, int],
        ignored: Bool[np.ndarray, "h w"] | None = None,
    ):
        self.size, self.ignored = size, ignored
        self.kept: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}
        self.numbers: list[int] = []
        self.total = 0
        if isinstance(images, (np.ndarray, jax.Array)) and images.ndim < 4:
            raise ImageError(f"fitting takes a list of images, or an array (n, h, w, 3); got the shape {images.shape}")
        self.stored = []
        for image in images:
            unit = to_unit(image)
            if unit.ndim != 3:
                number = len(self.stored)
                raise ImageError(f"one of the images has shape {unit.shape} (index {number}); expected (h, w) or (h, w, 3)")
            self.stored.append(np.rint(65535 * np.asarray(resized(unit, size))).astype(np.uint16))
        self.total = len(self.stored)
        self.numbers = list(range(self.total))

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, i: int) -> Float[Array, "h w 3"]:
        return normalise(to_unit(self.stored[i]))

    def subset(self, indices: Iterable[int]) -> "NormalImages":
        """Returns some of the images, without a copy."""
        part, indices = NormalImages((), self.size, self.ignored), list(indices)
        part.stored, part.numbers = ([values[i] for i in indices] for values in (self.stored, self.numbers))
        part.kept, part.total = self.kept, self.total
        return part

    def computed(self, key: Hashable, function: Callable[[Float[Array, "h w 3"]], Array], i: int) -> np.ndarray:
        """Returns ``function`` of an image, as float32. It is computed once for all subsets and kept in a temporary file.

        Args:
            key: name of the function, and of everything that it depends on.
            function: function of an image in normalised intensity.
            i: index of the image.
        """
        if key not in self.kept:
            shape = jax.eval_shape(function, self[i]).shape
            with tempfile.TemporaryFile() as file:  # the system removes the file when the array is gone
                self.kept[key] = np.memmap(file, np.float32, "w+", shape=(self.total, *shape)), np.zeros(self.total, bool)
        (values, done), number = self.kept[key], self.numbers[i]
        if not done[number]:
            values[number], done[number] = np.asarray(function(self[i])), True
        return values[number]

    def pixels(self, i: int) -> UInt16[np.ndarray, "h w 3"]:
        """Returns an image as it is stored."""
        return self.stored[i]


class Factors(eqx.Module):
    """Factors on constants of :class:`~f2pad_jax.Settings`, tuned to the normal images; 1 without tuning."""

    alpha1: Scalar = 1.0
    """Factor on the weight of the pixel prior."""
    sparsity: Scalar = 1.0
    """Factor on the sparsity."""


class Added(eqx.Module):
    """Record of an image that :func:`f2pad_jax.update` added to a detector. Its fields are static."""

    name: str = eqx.field(static=True)
    """Path of the file, or number of the image in the call."""
    sha256: str = eqx.field(static=True)
    """SHA-256 of the file, or of the array's bytes, in hexadecimal."""
    date: str = eqx.field(static=True)
    """Date and time of the update, with the offset from UTC."""
    before: float = eqx.field(static=True)
    """Score (:func:`~f2pad_jax.detectors.normality.image_score`) of the image by the detector before the update."""
    after: float = eqx.field(static=True)
    """Score of the image by the detector after the update."""


class Calibration(eqx.Module):
    """Measurements of :func:`f2pad_jax.fit` besides the method's own statistics."""

    scale: Float[Array, ""]
    """Mean raw score of held-out normal images."""
    ordinary: Float[Array, ""]
    """Mean level of the anomaly maps of held-out normal images."""
    threshold: Float[Array, ""]
    """Level of the anomaly map that a pixel of each part of a mask exceeds; m0 reaches down to a lower level."""
    prior: PixelPrior
    """Distribution of normal pixel values, Eq. (9)."""
    normals: UInt8[Array, "k h w 3"] | None = None
    """Some of the training images, from which the inpainter copies; None without images."""
    factors: Factors = Factors()
    """Factors on constants of :class:`~f2pad_jax.Settings`, found by tuning."""
    ignored: Bool[Array, "h w"] | None = None
    """Pixels of every image that do not count; None: all pixels count."""
    normality: Normality | None = None
    """Distribution of the maps of normal images; None: an image is defective if a pixel exceeds ``threshold``."""
    added: tuple[Added, ...] = ()
    """Images that updates added after the fit, in order."""
    maps: Literal["own", "given", "none"] = eqx.field(static=True, default="own")
    """Origin of the maps that gave the levels, static: the detector, another detector, or no maps."""
    white: float | int | None = eqx.field(static=True, default=None)
    """Value of white in image files with more than 8 bits, static; None: each file's own."""


class AbstractDetector(eqx.Module):
    """Fitted feature-based detector: a pytree that scores every position of an image.

    A new method implements :meth:`fit` and :meth:`raw_scores`, and :meth:`locate` if its scores depend on the position.
    Images are ``(h, w, 3)`` in normalised intensity.
    """

    backbone: eqx.AbstractVar[Backbone]
    """Frozen feature extractor."""
    size: eqx.AbstractVar[tuple[int, int]]
    """Height and width of the images of the fit, pixels."""
    calibration: eqx.AbstractVar[Calibration | None]
    """Calibration by :func:`f2pad_jax.fit`; None before the calibration."""

    refits: ClassVar[bool] = True
    """Whether :func:`f2pad_jax.fit` repeats the method's fit on all images after the calibration on held-out images."""
    resumable: ClassVar[bool] = False
    """Whether the method's ``fit`` takes ``resume``, a file that keeps the state of a long training."""
    sparsity_scale: ClassVar[float] = 1.0
    """Factor on ``Settings.sparsity``, above 1 for scores that saturate: a saturated score understates a defect."""

    @classmethod
    @abc.abstractmethod
    def fit(cls, images: NormalImages, backbone: Backbone, *, seed: int, progress: Progress, **options: Any) -> Any:
        """Returns a detector with the method's statistics of normal images, not yet calibrated."""

    @classmethod
    def default_layers(cls, network: Network, num_images: int) -> tuple[str, ...]:
        """Returns the layers to tap if the user names none."""
        del num_images
        return network.default_layers

    @abc.abstractmethod
    def raw_scores(self, image: Float[Array, "h w 3"], context: Context) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """Returns a map of anomaly scores for each scored layer of a window, at least 0 and differentiable in ``image``."""

    def left_out(self, num_images: int) -> "AbstractDetector | None":
        """Returns the detector that scores each of its training images as if the image had been left out of the fit.

        Default: None, and :func:`f2pad_jax.fit` fits the method to parts of the images instead.

        Args:
            num_images: number of images of the fit.
        """
        del num_images
        return None

    def extended(self, images: NormalImages) -> "AbstractDetector":
        """Returns the detector with further normal images in its statistics, as far as this needs no image of the fit.

        Default: the detector itself, and :func:`f2pad_jax.update` then changes the calibration alone.
        """
        del images
        return self

    def locate(self, image: Float[Array, "h w 3"], corner: Int[Array | np.ndarray, " 2"]) -> Context:
        """Returns the context of a window whose top-left pixel is at ``corner`` of the whole image; default: None."""
        return None

    def refresh(self, image: Float[Array, "h w 3"], context: Context) -> Context:
        """Returns the window's context for a changed image, every few steps of the solver. Default: ``context``."""
        return context

    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """Returns the coarse map of a whole image; default: the scores, enlarged, smoothed and summed over layers."""
        scores = self.scores(image, self.locate(image, ORIGIN))
        return jnp.sum(jnp.stack([coarse_map(s, (image.shape[0], image.shape[1])) for s in scores]), axis=0)

    # shared by all methods

    @property
    def calibrated(self) -> Calibration:
        """Calibration of the detector; a ValueError is raised if there is none."""
        if self.calibration is None:
            raise ValueError(f"this {type(self).__name__} is not calibrated; make it with f2pad_jax.fit")
        return self.calibration

    @property
    def stride(self) -> int:
        """Coarsest stride of the tapped layers, pixels; window corners and sides are multiples of it."""
        return self.backbone.stride

    @property
    def local(self) -> bool:
        """Whether the scores of a window equal the scores of the whole image, except near the window's border."""
        return self.backbone.local

    @property
    def scale(self) -> Float[Array, ""] | float:
        """Mean raw score of held-out normal images; 1 before the calibration."""
        return 1.0 if self.calibration is None else self.calibration.scale

    def scores(self, image: Float[Array, "h w 3"], context: Context) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """Returns :meth:`raw_scores` divided by their mean on held-out normal images.

        A normal image then scores 1 on average for every method and backbone, and one set of weights in Eq. (12) serves
        all. Departure: the paper does not state the scale of its loss.
        """
        return tuple(score / self.scale for score in self.raw_scores(image, context))

    def features(self, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "_h_k _w_k _c_k"], ...]:
        """Returns the backbone's feature maps."""
        return extract(self.backbone, image)

    def coarse_mask(self, anomaly_map: Float[Array, "h w"]) -> Bool[Array, "h w"]:
        """Returns m0: the pixels above the low level of :data:`BORDER`, and above half of the map (:func:`half_height`).

        At the outline of a defect, smoothing leaves half of its peak. The threshold suits faint defects. Without the second
        condition, the outline of a glaring defect would lie too far out.
        """
        return self.excess(anomaly_map)[0] > 1

    def verdict(self, anomaly_map: Float[Array, "h w"], false_alarms: Scalar) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the score and the p-value of an image by its map. The image is defective if the score exceeds 1.

        The score is in units of the limit that the share ``false_alarms`` of normal images exceeds. Without
        ``normality`` the score is the map's maximum in units of the threshold, and the p-value is NaN.
        """
        c = self.calibrated
        if c.normality is None:
            return jnp.max(anomaly_map) / c.threshold, jnp.float32(jnp.nan)
        score = c.normality.score(anomaly_map)
        return self.in_units(score, false_alarms), c.normality.p_value(score)

    def in_units(self, scores: Float[Array, "*n"], false_alarms: Scalar) -> Float[Array, "*n"]:
        """Returns scores of :class:`~f2pad_jax.detectors.Normality` in units of the limit, at least 0."""
        normality = self.calibrated.normality
        assert normality is not None
        limit = jnp.maximum(normality.limit(false_alarms), PRIOR_EXCESS)  # positive, whatever the scores are
        return jnp.maximum(scores, 0) / limit

    def excess(self, anomaly_map: Float[Array, "h w"]) -> tuple[Float[Array, "h w"], Float[Array, ""]]:
        """Returns the map and the threshold relative to the level at the border of m0.

        0 is the ordinary level or below, and 1 the level at the border of m0. This level is :data:`BORDER` of the
        threshold's height, or half of the map's height if half is higher or no pixel exceeds the first. The threshold is
        at most 1. In an image unlike the normal images as a whole, 0, the threshold and the first of both levels are
        lifted (:meth:`lift`). Half of the height of a glaring defect is not: the defect remains whole.
        """
        c = self.calibrated
        lift = self.lift(anomaly_map)
        ordinary, threshold = c.ordinary + lift, c.threshold + lift
        low = ordinary + BORDER * (threshold - ordinary)
        glaring = jnp.maximum(low, half_height(anomaly_map, c.ordinary))
        faint = half_height(anomaly_map, jnp.maximum(ordinary, jnp.median(anomaly_map)))
        level = jnp.where(jnp.max(anomaly_map) > low, glaring, faint)
        height = jnp.maximum(level - ordinary, 1e-6)
        return jnp.maximum(anomaly_map - ordinary, 0) / height, jnp.minimum((threshold - ordinary) / height, 1)

    def lift(self, anomaly_map: Float[Array, "h w"]) -> Float[Array, ""]:
        """Returns the height of a map's median above all medians of images that resemble the normal images as a whole.

        It is 0 up to :attr:`~f2pad_jax.detectors.Normality.level`, and up to :data:`UNLIKE` of the threshold's height: a
        plain background hardly varies. Other light, a blurred lens or another batch lifts the whole map. The defect is
        then sought above the lifted level.
        """
        c = self.calibrated
        if c.normality is None:
            return jnp.float32(0)
        level = jnp.maximum(c.normality.level, c.ordinary + UNLIKE * (c.threshold - c.ordinary))
        return jnp.maximum(jnp.median(anomaly_map) - level, 0)


def counted(anomaly_map: Float[Array, "h w"], ignored: Bool[Array, "h w"] | None) -> Float[Array, "h w"]:
    """Returns the map with its median over the counted pixels in place of the ignored pixels.

    If all pixels are ignored, the map is its least value everywhere.
    """
    if ignored is None:
        return anomaly_map
    median = jnp.nanmedian(jnp.where(ignored, jnp.nan, anomaly_map))
    return jnp.where(ignored, jnp.where(jnp.all(ignored), jnp.min(anomaly_map), median), anomaly_map)


def half_height(anomaly_map: Float[Array | np.ndarray, "h w"], ordinary: Float[Array, ""] | float) -> Float[Array, ""]:
    """Returns the level half-way from the ordinary level to a map's maximum."""
    return (ordinary + jnp.max(jnp.asarray(anomaly_map))) / 2


def extract(backbone: Backbone, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "_h_k _w_k _c_k"], ...]:
    """Returns the backbone's feature maps of an image in normalised intensity; of a large image, tile by tile."""
    pixels = backbone.normalise(denormalise(image))
    large = image.shape[0] * image.shape[1] > LARGE
    return in_tiles(backbone, pixels) if large and backbone.local else backbone(pixels)


def coarse_map(scores: Float[Array, "h_k w_k"], size: tuple[int, int], *, sigma: float = 4.0) -> Float[Array, "h w"]:
    """Returns scores as a pixel map, as in PaDiM and PatchCore: enlarged bilinearly, then smoothed by a Gaussian.

    The Gaussian has a standard deviation of ``sigma`` pixels and ends at 4 sigma (33 taps at sigma 4). The border is
    mirrored with the edge repeated (scipy's "reflect").
    """
    return smoothed(jax.image.resize(scores, size, "linear", antialias=False), sigma)
