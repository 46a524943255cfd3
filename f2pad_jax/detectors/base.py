"""What F2PAD needs of a detector, and the coarse map every detector shares."""

import abc
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8, UInt16

from f2pad_jax.backbones import Backbone
from f2pad_jax.backbones.network import Network
from f2pad_jax.errors import ImageError
from f2pad_jax.prior import PixelPrior
from f2pad_jax.progress import Progress
from f2pad_jax.smoothing import smoothed
from f2pad_jax.units import denormalise, normalise, resized, to_unit

Where = Any
"""What a detector needs to know about one window, as a pytree of arrays: positions, candidates, statistics."""

ORIGIN = np.zeros(2, np.int32)
"""The corner of a window that is the whole image."""


class NormalImages(Sequence):
    """Defect-free images at the detector's size, kept at 16 bits a channel (0.3 MB at 224x224) whatever they came as.

    Indexing gives an image in normalised intensity.
    """

    def __init__(self, images: Iterable[Shaped[np.ndarray | Array, "..."]], size: tuple[int, int]):
        self.size = size
        if isinstance(images, (np.ndarray, jax.Array)) and images.ndim < 4:
            raise ImageError(f"fitting takes a list of images, or (n, h, w, 3); got an array of shape {images.shape}")
        self.stored = []
        for image in images:
            unit = to_unit(image)
            if unit.ndim != 3:
                raise ImageError(f"one of the images has shape {unit.shape}; expected (h, w) or (h, w, 3)")
            self.stored.append(np.rint(65535 * np.asarray(resized(unit, size))).astype(np.uint16))

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, i: int) -> Float[Array, "h w 3"]:
        return normalise(to_unit(self.stored[i]))

    def subset(self, indices: Iterable[int]) -> "NormalImages":
        """Some of the images; nothing is copied."""
        part = NormalImages((), self.size)
        part.stored = [self.stored[i] for i in indices]
        return part

    def pixels(self, i: int) -> UInt16[np.ndarray, "h w 3"]:
        """An image as it is kept."""
        return self.stored[i]


class Calibration(eqx.Module):
    """What fitting measures besides a method's own statistics; :func:`f2pad_jax.fit` makes it."""

    scale: Float[Array, ""]
    """Mean raw score of held-out normal images."""
    ordinary: Float[Array, ""]
    """Mean level of the anomaly maps of held-out normal images."""
    threshold: Float[Array, ""]
    """Level of the anomaly map above which a pixel may belong to m0."""
    prior: PixelPrior
    """Distribution of normal pixel values, Eq. (9)."""
    normals: UInt8[Array, "k h w 3"] | None = None
    """Some of the training images, for the inpainter to borrow from."""
    tuned: tuple[Float[Array, ""], Float[Array, ""]] | None = None
    """Factors on α1 and on the sparsity of :class:`~f2pad_jax.Settings` that suit these images, if they were tuned."""


class AbstractDetector(eqx.Module):
    """A fitted feature-based detector: a pytree that says how normal each position of an image looks.

    A method of one's own implements :meth:`fit` and :meth:`raw_scores`, and :meth:`locate` where its scores depend on the
    position; everything else follows. All images are ``(h, w, 3)`` in normalised intensity.
    """

    backbone: eqx.AbstractVar[Backbone]
    size: eqx.AbstractVar[tuple[int, int]]
    """Height and width the detector was fitted at."""
    calibration: eqx.AbstractVar[Calibration | None]
    """None until :func:`f2pad_jax.fit` has measured it."""

    refits: ClassVar[bool] = True
    """Whether :func:`f2pad_jax.fit` may fit a second time, to all images, after it has calibrated on those held out."""
    emphasis: ClassVar[float] = 1.0
    """Factor on ``Settings.sparsity``, for scores whose excess over 1 is no measure of how much n has to gain."""

    @classmethod
    @abc.abstractmethod
    def fit(cls, images: NormalImages, backbone: Backbone, *, seed: int, progress: Progress, **options: Any) -> Any:
        """A detector of this class: the method's statistics of normal images, not yet calibrated."""

    @classmethod
    def default_layers(cls, network: Network, num_images: int) -> tuple[str, ...]:
        """The layers to tap where the user names none."""
        del num_images
        return network.default_layers

    @abc.abstractmethod
    def raw_scores(self, image: Float[Array, "h w 3"], where: Where) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """How anomalous a window's positions are, one map per scored layer, at least 0, differentiable in ``image``."""

    def locate(self, image: Float[Array, "h w 3"], corner: Int[Array | np.ndarray, " 2"]) -> Where:
        """What :meth:`raw_scores` needs for the window ``image`` whose top-left pixel is ``corner`` of the whole image.

        Default: nothing.
        """
        return None

    def refresh(self, image: Float[Array, "h w 3"], where: Where) -> Where:
        """``where`` for the same window after the image changed; called every few steps. Default: unchanged."""
        return where

    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """The coarse anomaly map of a whole image. Default: the scores, enlarged, summed over layers and smoothed."""
        scores = self.scores(image, self.locate(image, ORIGIN))
        return jnp.sum(jnp.stack([coarse_map(s, (image.shape[0], image.shape[1])) for s in scores]), axis=0)

    # what follows is the same for every method

    @property
    def calibrated(self) -> Calibration:
        """The calibration, which must be there."""
        if self.calibration is None:
            raise ValueError(f"this {type(self).__name__} is not calibrated; make it with f2pad_jax.fit")
        return self.calibration

    @property
    def stride(self) -> int:
        """Window corners and sides are multiples of this many pixels."""
        return self.backbone.stride

    @property
    def local(self) -> bool:
        """Whether a window of an image has the image's scores, but for those near the window's border."""
        return self.backbone.local

    @property
    def scale(self) -> Float[Array, ""] | float:
        """Mean raw score of held-out normal images; 1 before the calibration."""
        return 1.0 if self.calibration is None else self.calibration.scale

    def scores(self, image: Float[Array, "h w 3"], where: Where) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """:meth:`raw_scores` over their mean on held-out normal images.

        1 is ordinary, whatever the method and backbone, so one set of weights in Eq. (12) serves all (departure: the paper
        does not state the scale of its loss).
        """
        return tuple(score / self.scale for score in self.raw_scores(image, where))

    def features(self, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "_h_k _w_k _c_k"], ...]:
        """The backbone's maps."""
        return extract(self.backbone, image)

    def coarse_mask(self, anomaly_map: Float[Array, "h w"]) -> Bool[Array, "h w"]:
        """m0: where the map exceeds the threshold, and half-way from the ordinary level to its own maximum.

        A smoothed step is half as high where it was sharp: the threshold alone, which faint defects must reach, would put
        the outline of a glaring one far outside of it.
        """
        return self.excess(anomaly_map) > 1

    def excess(self, anomaly_map: Float[Array, "h w"], values: Float[Array, "*v"] | None = None) -> Float[Array, "*v"]:
        """How far values (default: the map's) are above the ordinary level (0), in units of the border of its m0 (1)."""
        c = self.calibrated
        level = jnp.maximum(c.threshold, half_height(anomaly_map, c.ordinary))
        above = (anomaly_map if values is None else values) - c.ordinary
        return jnp.maximum(above, 0) / jnp.maximum(level - c.ordinary, 1e-6)


def half_height(anomaly_map: Float[Array | np.ndarray, "h w"], ordinary: Float[Array, ""] | float) -> Float[Array, ""]:
    """Half-way from the ordinary level to a map's maximum."""
    return (ordinary + jnp.max(jnp.asarray(anomaly_map))) / 2


def extract(backbone: Backbone, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "_h_k _w_k _c_k"], ...]:
    """The backbone's maps of an image in normalised intensity."""
    return backbone(backbone.normalise(denormalise(image)))


def coarse_map(scores: Float[Array, "h_k w_k"], size: tuple[int, int], *, sigma: float = 4.0) -> Float[Array, "h w"]:
    """Scores to a pixel map as PaDiM and PatchCore do it: bilinear, then a Gaussian of ``sigma`` pixels.

    Separable, truncated at 4 sigma (33 taps at sigma 4), border mirrored with the edge repeated (scipy's "reflect").
    """
    return smoothed(jax.image.resize(scores, size, "linear", antialias=False), sigma)
