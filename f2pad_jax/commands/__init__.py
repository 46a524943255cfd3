"""The command ``f2pad``. Every sub-command is a module with ``add``, which describes its arguments, and ``run``."""

import argparse
import sys
from collections.abc import Sequence

from f2pad_jax._version import __version__
from f2pad_jax.commands import bench, demo, evaluate, fit, import_anomalib, make_dataset, refine, weights
from f2pad_jax.errors import F2padError

COMMANDS = (demo, fit, import_anomalib, refine, make_dataset, evaluate, bench, weights)
"""Modules of the sub-commands, in the order of the help text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 after an error, or 130 after an interrupt.

    ``f2pad refine --fail-on-defect`` returns 1 for a defect. An error is printed in one line on standard error.
    """
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except F2padError as error:
        print(f"f2pad: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"f2pad: error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("f2pad: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    found = argparse.ArgumentParser(prog="f2pad", description="Pixel-accurate anomaly segmentation (F2PAD in JAX).")
    found.add_argument("--version", action="version", version=f"f2pad-jax {__version__}")
    commands = found.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return found
