"""A detector composed of two: one finds where the defects are, and the other judges the restored image."""

import dataclasses
from typing import Any, NoReturn

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax.detectors.base import AbstractDetector, Calibration, Context, NormalImages
from f2pad_jax.errors import OptionError
from f2pad_jax.images._views import scaled, scaled_mask
from f2pad_jax.images.pixels import denormalise, normalise, resized


class Composed(AbstractDetector):
    """Detector with the maps and the verdict of one detector, and the scores of another. :func:`compose` makes it.

    Departure: in the paper one detector gives both the coarse mask and l_n of Eq. (2). The coarse stage is not
    differentiated. It may be a vision transformer, whose features tell defects from good parts best. The scores that the
    solver minimises may be a convolutional network's, which are cheaper and respect each pixel's place.
    """

    coarse: AbstractDetector
    """Detector of the coarse stage."""
    judge: AbstractDetector
    """Detector whose scores the solver minimises."""
    calibration: Calibration | None = None
    """Levels and verdict of ``coarse``; scale, pixel prior and images of ``judge``."""

    @classmethod
    def fit(cls, images: NormalImages, backbone: Any, **options: Any) -> NoReturn:
        """Raises an OptionError: both detectors are fitted alone, and composed then."""
        raise OptionError("fit two detectors, and compose them with f2pad_jax.detectors.compose")

    @property
    def backbone(self) -> Any:
        """Network of ``judge``."""
        return self.judge.backbone

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images of ``judge``, pixels."""
        return self.judge.size

    @property
    def stride(self) -> int:
        """Stride of ``judge``, pixels."""
        return self.judge.stride

    @property
    def local(self) -> bool:
        """Whether the scores of ``judge`` are local."""
        return self.judge.local

    @property
    def sparsity_scale(self) -> float:
        """Factor of ``judge`` on the sparsity."""
        return self.judge.sparsity_scale

    def raw_scores(self, image: Float[Array, "h w 3"], context: Context) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """Returns the scores of ``judge``."""
        return self.judge.raw_scores(image, context)

    def locate(self, image: Float[Array, "h w 3"], corner: Int[Array | Any, " 2"]) -> Context:
        """Returns the context of ``judge``."""
        return self.judge.locate(image, corner)

    def refresh(self, image: Float[Array, "h w 3"], context: Context) -> Context:
        """Returns the refreshed context of ``judge``."""
        return self.judge.refresh(image, context)

    def extended(self, images: NormalImages) -> "Composed":
        """Returns the detector with further normal images in the statistics of both detectors."""
        pixels = (images.pixels(i) for i in range(len(images)))
        seen = images if self.coarse.size == images.size else NormalImages(pixels, self.coarse.size)
        return dataclasses.replace(self, coarse=self.coarse.extended(seen), judge=self.judge.extended(images))

    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """Returns the map of ``coarse`` at its own size, scaled to the size of the image."""
        seen = normalise(resized(denormalise(image), self.coarse.size))
        return scaled(self.coarse.anomaly_map(seen), (image.shape[0], image.shape[1]))


def compose(coarse: AbstractDetector, judge: AbstractDetector) -> Composed:
    """Composes two detectors of one kind of images.

    Nothing is fitted again. Levels, threshold and false-alarm rates come from ``coarse``. A fit of ``judge``
    with ``features_only=True`` is enough, and takes seconds.

    Args:
        coarse: detector with maps of its own, such as PatchCore on a vision transformer.
        judge: detector of any method, best on a convolutional network. Images are resized to its size first: its sides must
            be no smaller than the sides of ``coarse``.

    Raises:
        OptionError: ``coarse`` has no maps of its own or a larger size than ``judge``, or the white levels of files differ.
    """
    levels, own = coarse.calibrated, judge.calibrated
    if levels.maps != "own":
        raise OptionError("the coarse detector has no maps of its own; fit it without coarse_maps and features_only")
    if levels.white != own.white:
        raise OptionError(f"the white levels differ: {levels.white} and {own.white}; fit both detectors with one of them")
    if any(side > other for side, other in zip(coarse.size, judge.size, strict=True)):
        raise OptionError(
            f"the coarse detector has the size {coarse.size}, the judge {judge.size}: fit the judge with no smaller size"
        )
    normality = levels.normality
    if normality is not None:
        at_size = {name: scaled(getattr(normality, name), judge.size) for name in ("mean", "spread")}
        normality = dataclasses.replace(normality, **at_size)
    masks = [scaled_mask(c.ignored, judge.size, 1e-3) for c in (levels, own) if c.ignored is not None]
    ignored: Bool[Array, "h w"] | None = jnp.any(jnp.stack(masks), axis=0) if masks else None
    calibration = dataclasses.replace(
        own, ordinary=levels.ordinary, threshold=levels.threshold, normality=normality, ignored=ignored, maps="own"
    )
    # the images and the prior of the coarse detector are never read
    bare = dataclasses.replace(coarse, calibration=dataclasses.replace(levels, normals=None, normality=None))
    plain = dataclasses.replace(judge, calibration=dataclasses.replace(own, normals=None))
    return Composed(coarse=bare, judge=plain, calibration=calibration)  # pyright: ignore[reportCallIssue]
