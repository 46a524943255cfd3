"""Steps that ``f2pad fit`` and ``f2pad import`` share: checks of their files, and the line about the model."""

import math
import tempfile
from pathlib import Path

import numpy as np

from f2pad_jax._storage import write_atomically
from f2pad_jax.commands._console import exit_status, make_folder
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.detectors.normality import certified_rate
from f2pad_jax.detectors.patchcore import PatchCore
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.evaluation._charts import histogram, standalone
from f2pad_jax.images import metrics
from f2pad_jax.images.files import check_images, list_images

SUITS = 0.8
"""Least image AUROC on synthetic defects of a detector that suits its images."""


def normal_images(folder: Path, out: Path, *, strict: bool, white: float | None) -> tuple[list[Path], int, float | None]:
    """Checks the images of a folder and the path of the model file.

    Args:
        folder: folder of normal images.
        out: model file.
        strict: whether every image must be usable.
        white: value of white in files with more than 8 bits; None: found from the files.

    Returns:
        The paths of the usable images, the exit status (the errors of the others are printed), and the white level.

    Raises:
        ImageError: the folder is missing or empty, or ``strict`` is set and an image can't be used.
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
    paths, errors, level = check_images((path for path, _ in list_images([folder])), strict=strict)
    return [Path(path) for path in paths], exit_status(errors), white or level


def described_verdict(detector: AbstractDetector, false_alarms: float) -> str:
    """Describes the limit of the verdict, the certified rate, and how many synthetic defects are found."""
    normality = detector.calibrated.normality
    if normality is None:
        return "no false-alarm rate: the model has no scores of normal images"
    scores, defects = np.asarray(normality.scores), np.asarray(normality.defects)
    limit = float(normality.limit(false_alarms))
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
    if len(defects):
        truth = np.repeat([False, True], [count, len(defects)])
        auroc = metrics.auroc(np.concatenate([scores, defects])[:, None, None], truth[:, None, None])
        text += f"\nfinds {np.sum(defects > limit)} of {len(defects)} synthetic defects (image AUROC {auroc:.2f})"
        if auroc < SUITS:
            advice = "" if isinstance(detector, PatchCore) else ", and parts in changing positions --method patchcore"
            text += "\nwarning: the detector hardly tells synthetic defects from normal images; "
            text += f"small defects need a larger --size{advice}"
    return text


def score_chart(detector: AbstractDetector, false_alarms: float) -> bytes:
    """Draws the scores of normal images and synthetic defects in units of the limit, as SVG."""
    normality = detector.calibrated.normality
    assert normality is not None
    kinds = {"normal images": normality.scores, "synthetic defects": normality.defects}
    values = {name: np.asarray(detector.in_units(scores, false_alarms)).tolist() for name, scores in kinds.items()}
    return standalone(histogram("image scores; above 1: defective", values))


def write_chart(model: Path, detector: AbstractDetector, false_alarms: float) -> Path:
    """Writes :func:`score_chart` beside a model file, and returns the chart's path."""
    chart = model.with_name(f"{model.name}.svg")
    write_atomically(chart, score_chart(detector, false_alarms))
    return chart


def described(detector: AbstractDetector, num_images: int) -> str:
    """Describes a detector and its calibration in a line."""
    backbone, calibration = detector.backbone, detector.calibrated
    height, width = detector.size
    white = "" if calibration.white is None else f" (white is {calibration.white:g})"
    return (
        f"{num_images} normal images at {height}x{width} pixels{white}, {backbone.name} {' '.join(backbone.layers)}; "
        f"{calibration.prior.num_components} pixel components, threshold of m0 {float(calibration.threshold):.2f}"
    )
