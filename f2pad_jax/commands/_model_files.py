"""Steps that ``f2pad fit`` and ``f2pad import`` share: checks of their files, and the line about the model."""

import math
import tempfile
from pathlib import Path

import numpy as np

from f2pad_jax.commands._console import make_folder
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.detectors.normality import certified_rate
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images.files import check_images, list_images


def normal_images(folder: Path, out: Path) -> list[Path]:
    """Checks the images of a folder and the path of the model file, and returns the paths of the images.

    Raises:
        ImageError: the folder is missing or empty, or an image can't be read.
        OptionError: ``out`` is a folder, or lies below a file.
        OSError: ``out`` can't be written.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder}: no such folder")
    if out.is_dir():
        raise OptionError(f"{out}: this is a folder; --out must name the model file to write")
    make_folder(out.parent)
    with tempfile.TemporaryFile(dir=out.parent):  # refuses a read-only folder before the fit, not after it
        pass
    paths = [path for path, _ in list_images([folder])]
    check_images(paths)
    return paths


def described_verdict(detector: AbstractDetector, false_alarms: float) -> str:
    """Describes the limit of the verdict, and the rate that so many normal images certify, in one or two lines."""
    normality = detector.calibrated.normality
    if normality is None:
        return "no false-alarm rate: the model has no scores of normal images"
    scores, limit = np.asarray(normality.scores), float(normality.limit(false_alarms))
    above, count = int(np.sum(scores > limit)), len(scores)
    text = (
        f"limit {limit:.2f} for {100 * false_alarms:g} % false alarms: {above} of {count} normal images are above it; "
        f"the true rate is at most {100 * certified_rate(above, count):.1f} % with 95 % confidence"
    )
    needed = math.ceil(1 / false_alarms) - 1
    if count < needed:
        text += (
            f"\n{count} normal images are few for this rate: it is extrapolated, and {needed} or more images would show it"
        )
    return text


def described(detector: AbstractDetector, num_images: int) -> str:
    """Describes a detector and its calibration in a line."""
    backbone, calibration = detector.backbone, detector.calibrated
    return (
        f"{num_images} normal images, {backbone.name} {' '.join(backbone.layers)}; "
        f"{calibration.prior.num_components} pixel components, threshold of m0 {float(calibration.threshold):.2f}"
    )
