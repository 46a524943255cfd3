"""``f2pad bench``: the benchmark ``benchmarks/bench.py`` of a source checkout."""

import argparse
import importlib.util
from pathlib import Path

from f2pad_jax.errors import OptionError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench.py"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds one argument, which passes the command line on to the script."""
    parser.add_argument("script_arguments", nargs=argparse.REMAINDER)


def run(arguments: argparse.Namespace) -> None:
    """Runs the script.

    Raises:
        OptionError: the package lies in no source checkout, or the script refuses an argument.
    """
    spec = importlib.util.spec_from_file_location("f2pad_bench", SCRIPT)
    if not SCRIPT.is_file() or spec is None or spec.loader is None:
        raise OptionError(
            "'f2pad bench' needs a source checkout; clone the repository, run 'pip install -e .' in it, and run this again"
        )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(arguments.script_arguments, prog="f2pad bench")
