"""Fitting of any method to normal images: hold-out, calibration and refit, without a label."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Shaped

from f2pad_jax.backbones.backbone import Backbone, find_network, load_backbone
from f2pad_jax.detectors.base import NormalImages
from f2pad_jax.detectors.calibration import D, normal_maps, scaled, with_calibration, with_maps
from f2pad_jax.detectors.normality import folds
from f2pad_jax.errors import ImageError
from f2pad_jax.progress import Progress, silent

Adjust = Callable[[D, NormalImages, NormalImages], D]
"""Function of a calibrated detector, the held-out images and the other images; returns the detector with a better
calibration."""


def fit(
    method: type[D],
    images: Iterable[Shaped[np.ndarray | Array, "..."]],
    backbone: Backbone | str,
    *,
    size: tuple[int, int] = (224, 224),
    num_components: int = 6,
    num_exemplars: int = 16,
    adjust: Adjust | None = None,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> D:
    """Fits a detector to defect-free images and calibrates it without a label.

    The images are divided into five parts. The method is fitted to four parts, and the detector scores the images of the
    fifth, for each of the five parts in turn (cross-fitting). All images then have maps of a detector that has not seen
    them. These maps give the threshold and the false-alarm rates. The first part gives the scale of the scores. At last
    the method is fitted to all images. Methods with a long training are fitted once, to four parts (``refits = False``).

    Args:
        method: class of the detector, such as :class:`~f2pad_jax.detectors.PatchCore`, or one of your own.
        images: at least two normal images of any sizes, each as :func:`~f2pad_jax.images.to_unit` takes it. They are read
            once and kept at the detector's size, 6 bytes a pixel.
        backbone: frozen feature extractor, or its name. A backbone given by name has the method's default layers.
        size: height and width that images are resized to, multiples of the backbone's stride.
        num_components: largest number of Gaussians of the pixel prior.
        num_exemplars: largest number of training images kept for the inpainter.
        adjust: function that improves the calibration before the refit; :func:`f2pad_jax.tune` passes one.
        resume: file of the state of a long training, which goes on from the file. The fit removes the file at its end.
            Methods with ``resumable = False`` do not use it.
        seed: seed of everything drawn at random.
        progress: function that receives stage, number done and total.
        options: options of the method's own ``fit``, such as ``rank`` of ``PaDiM.fit``.

    Raises:
        ImageError: there are fewer than two images, an image can't be used, or the size does not suit the backbone.
        CheckpointError: the backbone's weights are missing.
    """
    normals = NormalImages(images, size)
    if len(normals) < 2:
        raise ImageError(f"fitting needs at least two normal images; got {len(normals)} (one is held out for calibration)")
    if isinstance(backbone, str):
        layers = method.default_layers(find_network(backbone), len(normals))
        backbone = load_backbone(backbone, layers=layers)
    if any(side % backbone.stride or side <= 0 for side in size):
        raise ImageError(f"size {size} is not a multiple of the backbone's stride {backbone.stride}; give another size")
    if resume and method.resumable:
        options["resume"] = resume
    parts = folds(len(normals), seed)
    parts = parts if method.refits else parts[:1]
    splits = [(normals.subset(part), normals.subset(sorted({*range(len(normals))} - {*part}))) for part in parts]
    maps, first = np.empty((len(normals), *size), np.float16), None
    for number, (part, (held_out, others)) in enumerate(zip(parts, splits, strict=True)):

        def fold_progress(stage: str, done: int, total: int, number: int = number) -> None:
            progress(f"fold {number + 1} of {len(parts)}: {stage}" if len(parts) > 1 else stage, done, total)

        detector = method.fit(others, backbone, seed=seed, progress=fold_progress, **options)
        if first is None:
            first = scaled(detector, held_out, others, num_components, num_exemplars, seed, progress)
        maps[part] = normal_maps(with_calibration(detector, first.calibrated), held_out, fold_progress)
    assert first is not None
    detector = with_maps(first, maps[sorted(itertools.chain(*parts))])
    if adjust is not None:
        detector = adjust(detector, *splits[0])
    if method.refits:
        refitted = method.fit(normals, backbone, seed=seed, progress=progress, **options)
        detector = with_calibration(refitted, detector.calibrated)
    if resume and method.resumable:
        Path(resume).unlink(missing_ok=True)
    return detector
