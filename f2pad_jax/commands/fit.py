"""``f2pad fit`` and ``f2pad tune``: a detector from a folder of defect-free images."""

import argparse
import inspect
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from f2pad_jax.backbones.backbone import find_network, load_backbone
from f2pad_jax.commands._console import (
    add_false_alarms,
    add_ignored,
    add_network,
    add_seed,
    add_size,
    add_strict,
    add_white,
    only_writer,
    shown_progress,
)
from f2pad_jax.commands._model_files import described, described_verdict, normal_images, write_chart
from f2pad_jax.data.mvtec import read_mask
from f2pad_jax.detectors import fitting
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.detectors.registry import DETECTORS
from f2pad_jax.detectors.saving import save_detector
from f2pad_jax.errors import OptionError
from f2pad_jax.images.files import MAP_SUFFIXES, beside, read_image, read_map
from f2pad_jax.tuning import trials_table, tune

_GENERAL = frozenset(inspect.signature(fitting.fit).parameters)
"""Names of the arguments of all methods."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of both sub-commands."""
    parser.add_argument("normal", type=Path, metavar="NORMAL_DIR", help="folder of defect-free images")
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="model file to write")
    parser.add_argument(
        "--method", choices=list(DETECTORS), default="patchcore", help="method of the detector (default: %(default)s)"
    )
    add_size(parser)
    add_ignored(parser)
    parser.add_argument(
        "--groups",
        metavar="PATTERN",
        help="regular expression of the part of a file's name that names its group, such as '^[^_]+' for 012_3.png; a "
        "group has the images of one photograph or lot, and none judges another (default: no groups)",
    )
    own = parser.add_mutually_exclusive_group()
    text = "folder with the map of each image from another detector that has not seen the image, at its relative path: "
    text += "NAME.npy, .npz, .tif or .png; 'f2pad refine --maps' then has the verdict of these maps"
    own.add_argument("--maps", type=Path, metavar="DIR", help=text)
    text = "no maps and no verdict, in a fraction of the time; for 'f2pad refine' with --masks or --maps"
    own.add_argument("--features-only", action="store_true", help=text)
    add_false_alarms(parser)
    add_seed(parser)
    add_strict(parser)
    add_white(parser)
    add_network(parser)
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="LAYER",
        help="layers of the network, shallow to deep (default: the layers of the method)",
    )
    known = "; ".join(f"{name}: {', '.join(own_options(method))}" for name, method in DETECTORS.items())
    parser.add_argument(
        "--option",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help=f"options of the method; each method has its own ({known})",
    )
    if parser.prog.endswith(" tune"):
        parser.set_defaults(tune=True)
    else:
        text = "also choose the weights of the objective for these images, as 'f2pad tune' does"
        parser.add_argument("--tune", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Fits or tunes a detector and writes the model file; the exit status is 3 if an image can't be used.

    A stopped training continues from the file ``MODEL.partial`` beside the model file.
    """
    paths, status, white = normal_images(arguments.normal, arguments.out, strict=arguments.strict, white=arguments.white)
    method = DETECTORS[arguments.method]
    options = parsed_options(method, arguments.option)
    layers = tuple(arguments.layers or method.default_layers(find_network(arguments.backbone), len(paths)))
    backbone = load_backbone(arguments.backbone, layers=layers, weights=arguments.weights)
    options |= {
        "size": arguments.size,
        "smallest_defect": arguments.smallest_defect,
        "ignore": None if arguments.ignore is None else read_mask(arguments.ignore),
        "border": arguments.border,
        "coarse_maps": arguments.maps and given_maps(arguments.maps, arguments.normal, paths),
        "features_only": arguments.features_only,
        "groups": None if arguments.groups is None else grouped(paths, arguments.groups),
        "resume": arguments.out.with_name(f"{arguments.out.name}.partial"),
        "white": white,
        "seed": arguments.seed,
    }
    images = (read_image(path, white=white) for path in paths)
    with only_writer(arguments.out), shown_progress() as progress:
        if arguments.tune:
            detector, trials = tune(method, images, backbone, progress=progress, **options)
        else:
            detector, trials = fitting.fit(method, images, backbone, progress=progress, **options), []
        save_detector(arguments.out, detector)
    if trials:
        print(trials_table(trials))
    print(f"{arguments.out}: {type(detector).__name__}, {described(detector, len(paths))}")
    print(described_verdict(detector, arguments.false_alarms))
    if detector.calibrated.normality is None:
        return status
    chart = write_chart(arguments.out, detector, arguments.false_alarms)
    print(f"{chart} shows the scores of the normal images and of the synthetic defects")
    return status


def given_maps(folder: Path, images: Path, paths: Sequence[Path]) -> list[Float[np.ndarray, "_ _"]]:
    """Reads the map of each image."""
    names = (path.relative_to(images).with_suffix("").as_posix() for path in paths)
    return [read_map(beside(folder, name, MAP_SUFFIXES)) for name in names]


def grouped(paths: Sequence[Path], pattern: str) -> list[str]:
    """Returns the group of each image: the part of the file's name that matches the pattern.

    Raises:
        OptionError: the pattern is no regular expression, or a name does not match.
    """
    try:
        found = [re.search(pattern, path.name) for path in paths]
    except re.error as error:
        raise OptionError(f"--groups '{pattern}' is no regular expression: {error}") from None
    unmatched = [path for path, match in zip(paths, found, strict=True) if match is None]
    if unmatched:
        raise OptionError(f"--groups '{pattern}' does not match {unmatched[0].name}")
    return [match.group() for match in found if match is not None]


def own_options(method: type[AbstractDetector]) -> dict[str, Any]:
    """Returns the options that only this method's ``fit`` has, with their defaults."""
    parameters = inspect.signature(method.fit).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in _GENERAL}


def parsed_options(method: type[AbstractDetector], pairs: Sequence[str]) -> dict[str, Any]:
    """Returns the options of a method from ``NAME=VALUE`` pairs.

    An option is a number of at least 0 if its default is a float, else a whole number of at least 1.

    Raises:
        OptionError: an option is unknown, or its value is not in this range.
    """
    known, options = own_options(method), {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in known:
            raise OptionError(f"{method.__name__} has no option '{name}'; it has {', '.join(known)}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        whole = not isinstance(known[name], float)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise OptionError(f"option {name}: '{text}' is no number of at least 0")
        if whole and (value < 1 or value != int(value)):
            raise OptionError(f"option {name}: '{text}' is no whole number of at least 1")
        options[name] = int(value) if whole else float(value)
    return options
