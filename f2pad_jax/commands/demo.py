"""``f2pad demo``: the method on three photographs, from packages alone."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from f2pad_jax.commands._console import (
    COMPILING,
    at_least,
    make_folder,
    shown_progress,
)
from f2pad_jax.commands._textures_demo import run_demo


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("f2pad-demo"),
        help="output folder for gallery.png and summary.json (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="seed of the crops, the defects and the coreset (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the demonstration and prints a table of the IoU and DICE of the masks before and after refinement."""
    make_folder(arguments.out)
    print(COMPILING)
    with shown_progress() as progress:
        summary = run_demo(arguments.out, seed=arguments.seed, progress=progress)
    print(table(summary))
    print(
        f"compiling took {summary['compile_seconds']:.0f} s; the masks are in {arguments.out / 'gallery.png'}; "
        f"the figures are in {arguments.out / 'summary.json'}"
    )


def table(summary: dict[str, Any]) -> str:
    """Returns the figures of every category and their mean as a table."""
    categories = summary["categories"]
    mean = {**summary, "steps": float(np.mean([c["steps"] for c in categories.values()]))}
    lines = [f"{'category':10}  {'backbone IoU/DICE':>17}  {'refined IoU/DICE':>16}  {'steps':>5}  {'s/image':>7}"]
    for name, c in [*categories.items(), ("mean", mean)]:
        before, after = c["before"], c["after"]
        lines.append(
            f"{name:10}  {before['iou']:9.3f} / {before['dice']:.3f}  {after['iou']:8.3f} / {after['dice']:.3f}"
            f"  {c['steps']:5.0f}  {c['seconds_per_image']:7.1f}"
        )
    return "\n".join(lines)
