"""``f2pad import``: a detector trained with anomalib."""

import argparse
from pathlib import Path

from f2pad_jax.commands._console import (
    add_false_alarms,
    add_seed,
    at_least,
    shown_progress,
)
from f2pad_jax.commands._model_files import described, described_verdict, normal_images
from f2pad_jax.detectors.anomalib import load_anomalib
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


def run(arguments: argparse.Namespace) -> None:
    """Imports and calibrates a detector and writes the model file."""
    paths = normal_images(arguments.normal, arguments.out)
    size = tuple(arguments.size) if arguments.size else None
    images = (read_image(path) for path in paths)
    with shown_progress() as progress:
        detector = load_anomalib(arguments.checkpoint, images, size=size, seed=arguments.seed, progress=progress)
    save_detector(arguments.out, detector)
    print(
        f"{arguments.out}: {type(detector).__name__} trained with anomalib, {described(detector, len(paths))}; "
        f"'f2pad refine' needs --weights {arguments.checkpoint}"
    )
    print(described_verdict(detector, arguments.false_alarms))
