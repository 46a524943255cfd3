"""``f2pad import``: a detector trained with anomalib."""

import argparse
import dataclasses
from pathlib import Path

from f2pad_jax.commands._console import (
    add_false_alarms,
    add_seed,
    add_strict,
    add_white,
    at_least,
    only_writer,
    shown_progress,
)
from f2pad_jax.commands._model_files import described, described_verdict, normal_images
from f2pad_jax.detectors.anomalib import load_anomalib
from f2pad_jax.detectors.calibration import with_calibration
from f2pad_jax.detectors.saving import save_detector
from f2pad_jax.images.files import read_image


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help=".ckpt file that anomalib's engine saved")
    parser.add_argument(
        "normal",
        type=Path,
        metavar="NORMAL_DIR",
        help="folder of defect-free images; images that the detector was not trained on are best",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="model file to write")
    parser.add_argument(
        "--size",
        type=at_least(1),
        nargs=2,
        metavar=("H", "W"),
        help="height and width that images are resized to, in pixels (default: the size in the .ckpt file)",
    )
    add_false_alarms(parser)
    add_seed(parser)
    add_strict(parser)
    add_white(parser)


def run(arguments: argparse.Namespace) -> int:
    """Imports and calibrates a detector and writes the model file; the exit status is 3 if an image can't be used."""
    paths, status, white = normal_images(arguments.normal, arguments.out, strict=arguments.strict, white=arguments.white)
    size = tuple(arguments.size) if arguments.size else None
    images = (read_image(path, white=white) for path in paths)
    with only_writer(arguments.out), shown_progress() as progress:
        detector = load_anomalib(arguments.checkpoint, images, size=size, seed=arguments.seed, progress=progress)
        detector = with_calibration(detector, dataclasses.replace(detector.calibrated, white=white))
        save_detector(arguments.out, detector)
    print(
        f"{arguments.out}: {type(detector).__name__} trained with anomalib, {described(detector, len(paths))}; "
        f"'f2pad refine' needs --weights {arguments.checkpoint}"
    )
    print(described_verdict(detector, arguments.false_alarms))
    return status
