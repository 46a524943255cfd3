"""``f2pad compose``: a model whose maps and verdict come from one model, and its masks from another."""

import argparse
from pathlib import Path

from f2pad_jax.commands._console import add_model_weights, make_folder
from f2pad_jax.detectors.composed import compose
from f2pad_jax.detectors.saving import load_detector, save_detector


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("coarse", type=Path, metavar="COARSE", help="model that finds the defects, and gives the verdict")
    text = "model whose network judges the restored images; 'f2pad fit --features-only' makes it in seconds"
    parser.add_argument("judge", type=Path, metavar="JUDGE", help=text)
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="model file to write")
    add_model_weights(parser)


def run(arguments: argparse.Namespace) -> None:
    """Composes both models and writes the model file; it needs neither of the two files later."""
    make_folder(arguments.out.parent)
    coarse, judge = (load_detector(path, weights=arguments.weights) for path in (arguments.coarse, arguments.judge))
    save_detector(arguments.out, compose(coarse, judge))
    names = (f"{type(detector).__name__} on {detector.backbone.name}" for detector in (coarse, judge))
    print(f"{arguments.out}: finds defects by {next(names)}, and draws their masks by {next(names)}")
