"""Learning on the line: further normal images, such as false alarms, for a fitted detector."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from f2pad_jax._storage import file_sha256
from f2pad_jax.detectors.base import AbstractDetector, Added, NormalImages
from f2pad_jax.detectors.calibration import D, maps_of, with_calibration, with_more_maps
from f2pad_jax.detectors.normality import Normality, folds
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images.files import is_address, read_image
from f2pad_jax.progress import Progress, silent

RARE = 0.001
"""Share of good images above the score from which an image is refused, if most synthetic defects lie below this score."""


def update(
    detector: D,
    images: Iterable[Shaped[np.ndarray | Array, "..."] | str | Path],
    *,
    force: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> D:
    """Returns the detector after learning from further good images, such as false alarms that a person has looked at.

    No image of the fit is needed. The images join the method's statistics
    (:meth:`~f2pad_jax.detectors.AbstractDetector.extended`): PatchCore's memory bank grows, and PaDiM has the means and
    covariances of all images. CFLOW-AD's flows stay, and its calibration alone changes.

    The images also join the calibration: scores, levels and exemplars. Each of them is scored by a detector that has
    learnt from the other images of the update, but not from this one. It is the score of a good image that the detector
    has not seen, as for the images of the fit. An image that is alone of its kind raises the limit by its place among all
    scores. Images of one kind in one update vouch for each other and raise it less. The scores of earlier images stay.

    The limit has its false-alarm rate if the images are a fair sample of the line's good images. False alarms alone are
    no fair sample: then the limit is too high, and fewer good images and faint defects are marked.

    The scale of the scores, the pixel prior and the tuned factors stay. A model for another product or camera needs a new
    fit. The number of scores is part of the compiled programs: they are compiled again after an update.

    Args:
        detector: detector with maps of its own, from :func:`f2pad_jax.fit` or an earlier update.
        images: good images: files, or arrays as :func:`~f2pad_jax.images.to_unit` takes them. An image whose SHA-256 is
            among ``detector.calibration.added`` is left out.
        force: whether images that look defective are accepted. Their scores exceed both the median score of the synthetic
            defects and the score that the share :data:`RARE` of good images exceeds.
        seed: seed of the parts of the images, and of the exemplars.
        progress: function that receives stage, number done and total.

    Returns:
        The updated detector, with a record of each image in ``calibration.added``; ``detector`` if no image is new.

    Raises:
        ImageError: an image can't be used, or looks defective and ``force`` is not set.
        OptionError: the detector has no scores of normal images, or PaDiM's number of images is unknown.
    """
    c = detector.calibrated
    if c.normality is None or c.maps != "own":
        raise OptionError("the model has no scores of its own on normal images; fit it with maps of its own")
    if isinstance(images, (str, Path)) or (isinstance(images, (np.ndarray, jax.Array)) and images.ndim < 4):
        raise ImageError("an update takes several images: a list of arrays or paths, or an array (n, h, w, 3)")
    found: dict[str, str] = {}
    ignored = None if c.ignored is None else np.asarray(c.ignored)
    normals = NormalImages(_new(images, {a.sha256 for a in c.added}, found, c.white), detector.size, ignored)
    if not found:
        return detector
    maps = maps_of(detector, normals, "maps before the update", progress)
    before = _scores(c.normality, maps)
    if not force:
        _refuse_defects(c.normality, list(found.values()), before)
    extended: D = detector.extended(normals)  # pyright: ignore[reportAssignmentType]
    if extended is not detector:
        alone = extended.left_out(len(c.normality.scores) + len(normals))
        if alone is not None:
            maps = maps_of(alone, normals, "maps of left-out images", progress)
        else:
            maps = _cross_fitted(detector, normals, seed, progress)
    updated = with_more_maps(with_calibration(extended, c), maps)
    after = _scores(c.normality, maps_of(updated, normals, "maps after the update", progress))
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    values = zip(found, found.values(), before, after, strict=True)
    added = [Added(name, sha256, date, round(b, 4), round(a, 4)) for sha256, name, b, a in values]
    exemplars = None if c.normals is None else _exemplars(np.asarray(c.normals), normals, len(c.normality.scores), seed)
    calibration = dataclasses.replace(updated.calibrated, added=(*c.added, *added), normals=exemplars)
    return with_calibration(updated, calibration)


def _new(images: Iterable[Any], known: set[str], found: dict[str, str], white: float | int | None) -> Iterator[np.ndarray]:
    """Yields the images that are not known yet, and puts the name of each into ``found``, by its SHA-256."""
    for number, image in enumerate(images):
        path = image if isinstance(image, (str, Path)) else None
        pixels = np.asarray(image) if path is None else read_image(path, white=white)
        if path is None or is_address(path):
            sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
        else:
            sha256 = file_sha256(Path(path))
        if sha256 not in known and sha256 not in found:
            found[sha256] = f"image {number}" if path is None else str(path)
            yield pixels


def _scores(normality: Normality, maps: Float[np.ndarray, "n h w"]) -> list[float]:
    return [float(normality.score(jnp.asarray(m, jnp.float32))) for m in maps]


def _refuse_defects(normality: Normality, names: list[str], scores: list[float]) -> None:
    """Raises an ImageError that names all images with the scores of defects."""
    defects = np.asarray(normality.defects)
    bound = max(float(normality.limit(RARE)), float(np.median(defects)) if len(defects) else 0.0)
    suspect = [f"{name} ({score:.2f})" for name, score in zip(names, scores, strict=True) if score > bound]
    if suspect:
        raise ImageError(
            f"scores of a defect, above {bound:.2f}: {', '.join(suspect)}; nothing was added: look at these images, leave "
            "out the defective ones, and add the others with force"
        )


def _cross_fitted(
    detector: AbstractDetector, images: NormalImages, seed: int, progress: Progress
) -> Float[np.ndarray, "n h w"]:
    """Returns the map of each image by the detector that has learnt from the images of the other parts."""
    maps = np.empty((len(images), *images.size), np.float16)
    parts = folds(len(images), seed)
    for number, part in enumerate(parts, 1):
        others = sorted({*range(len(images))} - {*part})
        learnt = detector.extended(images.subset(others)) if others else detector
        maps[part] = maps_of(learnt, images.subset(part), f"part {number} of {len(parts)}", progress)
    return maps


def _exemplars(
    kept: UInt8[np.ndarray, "k h w 3"], images: NormalImages, num_before: int, seed: int
) -> UInt8[Array, "k h w 3"]:
    """Returns as many exemplars, a random sample of all images: each new one takes a place by chance (Vitter 1985)."""
    rng, kept = np.random.default_rng([seed, num_before]), kept.copy()
    for i in range(len(images)):
        place = rng.integers(num_before + i + 1)
        if place < len(kept):
            kept[place] = np.rint(images.pixels(i) / 257)
    return jnp.asarray(kept)
