"""Fitting of any method to normal images: hold-out, calibration and refit, without a label."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, Shaped

from f2pad_jax.backbones.backbone import Backbone, find_network, load_backbone
from f2pad_jax.detectors.base import NormalImages, counted
from f2pad_jax.detectors.calibration import D, faint_defects, maps_of, with_calibration, with_maps, with_scale
from f2pad_jax.detectors.normality import folds
from f2pad_jax.detectors.resolution import detector_size, ignored_pixels, peeked
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images._views import scaled
from f2pad_jax.progress import Progress, silent

Adjust = Callable[[D, NormalImages, NormalImages], D]
"""Function of a calibrated detector, the held-out images and the other images; returns the detector with a better
calibration."""


def fit(
    method: type[D],
    images: Iterable[Shaped[np.ndarray | Array, "..."]],
    backbone: Backbone | str,
    *,
    size: Sequence[int] | int | None = None,
    smallest_defect: float | int | None = None,
    groups: Sequence[Hashable] | None = None,
    ignore: Bool[np.ndarray, "H W"] | None = None,
    border: int = 0,
    coarse_maps: Iterable[Num[np.ndarray | Array, "..."]] | None = None,
    features_only: bool = False,
    num_components: int = 6,
    num_exemplars: int = 16,
    adjust: Adjust | None = None,
    resume: str | Path | None = None,
    white: float | int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> D:
    """Fits a detector to defect-free images and calibrates it without a label.

    The images are divided into five parts. The method is fitted to four parts, and the detector scores the images of the
    fifth, for each of the five parts in turn (cross-fitting). All images then have maps of a detector that has not seen
    them. These maps give the threshold and the false-alarm rates. The first part gives the scale of the scores. The
    detector itself is fitted to all images. Methods with a long training are fitted once, to four parts
    (``refits = False``). PaDiM with full covariances is fitted once, to all images: a formula gives the map of each image
    without it (:meth:`~f2pad_jax.detectors.AbstractDetector.left_out`). With ``coarse_maps`` or ``features_only``, any
    method is fitted once, to four parts.

    Args:
        method: class of the detector, such as :class:`~f2pad_jax.detectors.PatchCore`, or one of your own.
        images: at least two normal images of any sizes, each as :func:`~f2pad_jax.images.to_unit` takes it. They are read
            once and kept at the detector's size, 6 bytes a pixel.
        backbone: frozen feature extractor, or its name. A backbone given by name has the method's default layers.
        size: height and width that images are resized to, multiples of the backbone's stride. A number is the side of a
            square with as many pixels; the images keep their aspect ratio. Default: the images' own size, at most the
            pixels of 448x448 (:func:`~f2pad_jax.detectors.resolution.detector_size`).
        smallest_defect: width of the smallest defect that is to be found, pixels of the images; it chooses the size.
        groups: group of each image, such as the name of the photograph from which it was cut. No image is scored by a
            detector that has seen an image of its group.
        ignore: pixels that do not count, in the fit and in every later image; a mask of any size, for example of a
            label's place. Default: all pixels count.
        border: width of a frame that does not count, pixels of the images.
        coarse_maps: anomaly map of each image from another detector that has not seen the image, of any size. The verdict
            and the levels are then the other detector's, and later images need ``coarse_map`` in its units.
        features_only: whether later images bring their coarse maps or masks. The fit then has no verdict, and it takes a
            fraction of the time.
        num_components: largest number of Gaussians of the pixel prior.
        num_exemplars: largest number of training images kept for the inpainter.
        adjust: function that improves the calibration before the refit; :func:`f2pad_jax.tune` passes one.
        resume: file of the state of a long training, which goes on from the file. The fit removes the file at its end.
            Methods with ``resumable = False`` do not use it.
        white: value of white with which files of more than 8 bits were read (:func:`~f2pad_jax.images.read_image`). Later
            files are read with it.
        seed: seed of everything drawn at random.
        progress: function that receives stage, number done and total.
        options: options of the method's own ``fit``, such as ``rank`` of ``PaDiM.fit``.

    Raises:
        ImageError: there are fewer than two images, an image or a coarse map can't be used, or the size does not suit the
            backbone.
        OptionError: both ``size`` and ``smallest_defect`` are given, or one of them is not positive; or there is only one
            group, or not a group for each image; or all pixels are ignored; or there is not a coarse map for each image.
        CheckpointError: the backbone's weights are missing.
    """
    if not isinstance(method, type):
        raise OptionError(f"method is {method!r}; it must be a class of detectors, such as f2pad_jax.detectors.PatchCore")
    if size is not None and smallest_defect is not None:
        raise OptionError("give the size or the smallest defect, not both: the smallest defect chooses the size")
    own, images = peeked(images)
    if isinstance(size, Sequence):
        height, width = size
        size = height, width
        if min(size) <= 0:
            raise OptionError(f"size {size} must be positive")
    else:
        if isinstance(backbone, str):
            network = find_network(backbone)
            stride = max(network.strides[layer] for layer in method.default_layers(network, sys.maxsize))
        else:
            stride = backbone.stride
        size = detector_size(own, stride, size, smallest_defect)
    normals = NormalImages(images, size, ignored_pixels(ignore, border, own, size))
    if len(normals) < 2:
        raise ImageError(f"fitting needs at least two normal images; got {len(normals)} (one is held out for calibration)")
    if isinstance(backbone, str):
        layers = method.default_layers(find_network(backbone), len(normals))
        backbone = load_backbone(backbone, layers=layers)
    if any(side % backbone.stride for side in size):
        raise ImageError(f"size {size} is not a multiple of the backbone's stride {backbone.stride}; give another size")
    if resume and method.resumable:
        options["resume"] = resume
    if groups is not None and len(groups) != len(normals):
        raise OptionError(f"{len(groups)} groups for {len(normals)} images: give the group of each image")
    parts = folds(len(normals), seed, groups=groups)
    if len(parts) == 1:
        raise OptionError("all images are in one group; give at least two groups, or none")
    own_maps = coarse_maps is None and not features_only
    if adjust is not None and not own_maps:
        raise OptionError("tuning needs the detector's own maps")
    parts = parts if method.refits and own_maps else parts[:1]
    splits = [(normals.subset(part), normals.subset(sorted({*range(len(normals))} - {*part}))) for part in parts]
    other_maps = None if coarse_maps is None else _other_maps(coarse_maps, normals)
    start = partial(with_scale, num_components=num_components, num_exemplars=num_exemplars, seed=seed, progress=progress)
    method_fit = partial(method.fit, backbone=backbone, seed=seed, **options)
    refitted = method_fit(normals, progress=progress) if method.refits and own_maps else None
    alone = refitted.left_out(len(normals)) if refitted is not None and groups is None else None
    if not own_maps:
        detector = start(method_fit(splits[0][1], progress=progress), *splits[0])
        detector = detector if other_maps is None else with_maps(detector, other_maps, other_maps[:0])
        origin = "none" if other_maps is None else "given"
        detector = with_calibration(detector, dataclasses.replace(detector.calibrated, maps=origin))
    elif refitted is None or alone is None:
        detector = _cross_fitted(method_fit, splits, start, seed, progress)
    else:
        detector = _left_out(refitted, start(alone, *splits[0]), normals, seed, progress)
    if adjust is not None:
        held_out, others = splits[0]
        if alone is not None:
            detector = with_calibration(method_fit(others, progress=progress), detector.calibrated)
        detector = adjust(detector, held_out, others)
    if refitted is not None:
        detector = with_calibration(refitted, detector.calibrated)
    if resume and method.resumable:
        Path(resume).unlink(missing_ok=True)
    return with_calibration(detector, dataclasses.replace(detector.calibrated, white=white))


def _other_maps(maps: Iterable[Num[np.ndarray | Array, "..."]], normals: NormalImages) -> Float[np.ndarray, "n h w"]:
    """Returns the maps of another detector at this detector's size, without the pixels that do not count."""
    height, width = normals.size
    ignored = None if normals.ignored is None else jnp.asarray(normals.ignored)
    found = []
    for i, given in enumerate(maps):
        if np.ndim(given) != 2 or not np.isfinite(np.asarray(given)).all():
            raise ImageError(f"coarse map {i} has the shape {np.shape(given)}; expected finite values (h, w)")
        found.append(np.asarray(counted(scaled(jnp.asarray(given, jnp.float32), (height, width)), ignored)))
    if len(found) != len(normals):
        raise OptionError(f"{len(found)} coarse maps for {len(normals)} images: give the map of each image")
    return np.stack(found)


def _left_out(refitted: D, alone: D, normals: NormalImages, seed: int, progress: Progress) -> D:
    """Returns the detector calibrated on the map of each image without the image, and on maps of synthetic defects.

    Args:
        refitted: detector fitted to all images.
        alone: the detector of :meth:`~f2pad_jax.detectors.AbstractDetector.left_out`, with a scale.
        normals: images of the fit.
        seed: seed of the synthetic defects.
        progress: function that receives stage, number done and total.
    """
    maps = maps_of(alone, normals, "maps of normal images", progress)
    whole, defects = with_calibration(refitted, alone.calibrated), faint_defects(normals, seed)
    return with_maps(alone, maps, maps_of(whole, defects, "maps of synthetic defects", progress))


def _cross_fitted(
    method_fit: Callable[..., D],
    splits: Sequence[tuple[NormalImages, NormalImages]],
    start: Callable[..., D],
    seed: int,
    progress: Progress,
) -> D:
    """Returns the detector fitted without the first part, calibrated on the maps of every part by a fit without the part.

    Args:
        method_fit: function that fits the method to images.
        splits: images of each part, and all other images.
        start: function that gives a detector its scale, from images that it has not seen and from the other images.
        seed: seed of the synthetic defects.
        progress: function that receives stage, number done and total.
    """
    maps, first, defects = [], None, None
    for number, (held_out, others) in enumerate(splits, 1):

        def fold_progress(stage: str, done: int, total: int, number: int = number) -> None:
            progress(f"fold {number} of {len(splits)}: {stage}" if len(splits) > 1 else stage, done, total)

        detector = method_fit(others, progress=fold_progress)
        if first is None:
            first = start(detector, held_out, others)
            defects = maps_of(first, faint_defects(held_out, seed), "maps of synthetic defects", fold_progress)
        detector = with_calibration(detector, first.calibrated)
        maps.append(maps_of(detector, held_out, "maps of normal images", fold_progress))
    assert first is not None and defects is not None
    bounds = np.cumsum([0, *map(len, maps)])
    parts = [range(start, end) for start, end in itertools.pairwise(bounds)] if len(maps) > 1 else None
    return with_maps(first, np.concatenate(maps), defects, parts)
