"""Steps that ``f2pad fit`` and ``f2pad import`` share: checks of their files, and the line about the model."""

import tempfile
from pathlib import Path

from f2pad_jax.commands._console import make_folder
from f2pad_jax.detectors.base import AbstractDetector
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


def described(detector: AbstractDetector, num_images: int) -> str:
    """Describes a detector and its calibration in a line."""
    backbone, calibration = detector.backbone, detector.calibrated
    return (
        f"{num_images} normal images, {backbone.name} {' '.join(backbone.layers)}; "
        f"{calibration.prior.num_components} pixel components, threshold {float(calibration.threshold):.2f}"
    )
