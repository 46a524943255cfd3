"""Options that ``f2pad refine``, ``serve`` and ``watch`` share."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from f2pad_jax._storage import file_sha256
from f2pad_jax._version import __version__
from f2pad_jax.commands._archive import Record
from f2pad_jax.commands._console import add_false_alarms, add_model_weights, at_least, positive
from f2pad_jax.commands._refine_files import Reported, checksum_of
from f2pad_jax.commands._settings_file import PRESETS, read_settings
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.detectors.saving import load_detector
from f2pad_jax.errors import OptionError
from f2pad_jax.inpainting._choice import INPAINTERS, full_name

EFFORTS = "normal", "fast"
"""Names in :data:`~f2pad_jax.commands._settings_file.PRESETS`, the default first."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the model and its weights."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="model file, from 'f2pad fit' or 'f2pad import'")
    add_model_weights(parser)


def add_method(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the method, and of the regions that are reported."""
    parser.add_argument(
        "--inpaint",
        choices=INPAINTERS,
        default=INPAINTERS[0],
        help="inpainter that makes the first guess of the normal image (default: %(default)s)",
    )
    add_false_alarms(parser, from_settings=True)
    settings = parser.add_mutually_exclusive_group()
    text = "'fast' draws masks from the first guess of the normal image, without the solver's steps (default: %(default)s)"
    settings.add_argument("--effort", choices=EFFORTS, default=EFFORTS[0], help=text)
    text = "settings in a TOML file, such as the settings.toml that 'f2pad refine' writes into its output folder"
    settings.add_argument("--config", type=Path, metavar="FILE", help=text)
    text = "time that the solver may take for an image; the first guess, the mask and compiling take further time "
    text += "(default: no limit)"
    parser.add_argument("--budget", type=positive, metavar="SECONDS", help=text)
    parser.add_argument(
        "--lanes",
        type=int,
        help="number of lanes: parts of images that are solved side by side "
        "(default: 1 on each core of a CPU; elsewhere as many as the memory holds, at most 64)",
    )
    text = "least number of pixels of a region; smaller ones are dropped, and counted in the record (default: %(default)s)"
    parser.add_argument("--min-area", type=at_least(0), default=0, metavar="PIXELS", help=text)
    text = "least height of the coarse map in a region; others are dropped (default: any)"
    parser.add_argument("--min-score", type=float, metavar="SCORE", help=text)
    text = "side of a pixel; regions then have an area in mm² and lengths in mm"
    parser.add_argument("--mm-per-pixel", type=positive, metavar="MM", help=text)


def method_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of the arguments of :func:`add_method`, as options of ``_refine_files.worker``."""
    settings = read_settings(arguments.config) if arguments.config else PRESETS[arguments.effort]()
    if arguments.false_alarms is not None:
        settings = dataclasses.replace(settings, false_alarms=arguments.false_alarms)
    reported = Reported(arguments.min_area, arguments.min_score, arguments.mm_per_pixel)
    return {
        "inpaint": full_name(arguments.inpaint),
        "lanes": arguments.lanes,
        "budget": arguments.budget,
        "settings": settings,
        "reported": reported,
    }


def recipe_of(model: Path, options: Mapping[str, Any]) -> Record:
    """Returns everything that results depend on besides the images, for an archive.

    Args:
        model: model file.
        options: options of ``_refine_files.worker``.
    """
    recipe = {"version": __version__, "model": str(model), "sha256": file_sha256(model), "inpaint": options["inpaint"]}
    recipe |= {"history": options.get("history", False), "budget": options["budget"]}
    recipe |= {"settings": options["settings"].described()}
    return recipe | options["reported"]._asdict() | {n: checksum_of(options.get(n)) for n in ("ignore", "maps", "masks")}


def detector_with_maps(arguments: argparse.Namespace) -> AbstractDetector:
    """Reads the model.

    Raises:
        OptionError: the model has no maps of its own.
    """
    detector = load_detector(arguments.model, weights=arguments.weights)
    if detector.calibrated.maps != "own":
        raise OptionError(f"{arguments.model} has no maps of its own; use 'f2pad refine' with --maps or --masks")
    return detector
