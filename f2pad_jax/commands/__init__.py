"""The command ``f2pad``. Every sub-command is a module with ``add``, which describes its arguments, and ``run``."""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from f2pad_jax._version import __version__
from f2pad_jax.errors import F2padError, one_line

COMMANDS = {
    "demo": "try the method on photographs of three textures, and compare the refined masks with the coarse masks",
    "fit": "fit a detector to a folder of defect-free images",
    "tune": "fit a detector, and choose the weights of the objective on synthetic defects; takes some minutes",
    "import": "import a detector trained with anomalib 2.x, and calibrate it on defect-free images",
    "compose": "make a model that finds defects by one model, and draws their masks by another",
    "update": "add good images, such as false alarms, to a fitted model, list the added images, or undo the last update",
    "drift": "compare the scores of the last images with those of the normal images of the fit",
    "refine": "mark the anomalous pixels of images; a stopped run continues where it stopped",
    "serve": "answer images over HTTP with verdict, mask and regions, on this machine",
    "watch": "mark the anomalous pixels of images as a camera writes them into a folder",
    "make-dataset": "make a data set in MVTec layout by pasting synthetic defects on normal images",
    "evaluate": "measure detectors with and without refinement, as in the paper's tables; a stopped run continues",
    "bench": "measure images per second, and the time of each stage, on this machine; needs a source checkout",
    "weights": "list, download, convert and verify the weights of the networks",
    "warmup": "compile the programs of a model ahead, for a deployment",
    "cache": "show the compiled programs that are kept for later runs, or delete them",
    "doctor": "show devices, versions, weights, caches and optional packages, and name what is missing",
}
"""Sub-commands and their help texts, sentences without a full stop, in the order of the help text."""
_MODULES = {"tune": "fit", "import": "import_anomalib", "make-dataset": "make_dataset"}
"""Names of the modules of sub-commands, where they differ."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 after an error, or 3 if some images fail.

    130 is an interrupt, and 1 a defect for ``f2pad refine --fail-on-defect``. An error is one line on standard error.
    """
    argv = sys.argv[1:] if argv is None else argv
    for console in (sys.stdout, sys.stderr):
        if isinstance(console, io.TextIOWrapper):
            console.reconfigure(errors="backslashreplace")  # a name that the console can't show ends no work
    arguments = parser(argv).parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except F2padError as error:
        print(f"f2pad: error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"f2pad: error: {one_line(f'{place}{error.strerror or error}')}", file=sys.stderr)
        return 2
    except (RuntimeError, AssertionError) as error:
        if not traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
            raise
        asked = os.environ.get("JAX_PLATFORMS", "")
        print(f"f2pad: error: JAX finds no device for JAX_PLATFORMS={asked}; unset it, or give another", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("f2pad: interrupted", file=sys.stderr)
        return 130


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Returns the parser of a command line. Only the sub-command that it calls is imported: JAX takes seconds."""
    found = argparse.ArgumentParser(prog="f2pad", description="Pixel-accurate anomaly segmentation (F2PAD in JAX).")
    found.add_argument("--version", action="version", version=f"f2pad-jax {__version__}")
    commands = found.add_subparsers(required=True, metavar="COMMAND")
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        # the script behind "bench" also answers "--help"
        options = {"add_help": False, "prefix_chars": "\0"} if name == "bench" else {}
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", **options)
        if name == called:
            module = import_module(f"{__name__}.{_MODULES.get(name, name)}")
            module.add(command)
            command.set_defaults(run=module.run)
    return found
