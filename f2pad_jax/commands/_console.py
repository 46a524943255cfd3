"""Helpers of all sub-commands: arguments, output folders and progress."""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import filelock
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from f2pad_jax.errors import OptionError, RunError, one_line
from f2pad_jax.method.settings import Settings
from f2pad_jax.progress import Progress

LINE_INTERVAL_S = 10.0
"""Least time between two lines of progress, seconds. Lines replace the bars where there is no terminal."""
COMPILING = (
    "a window is the part of an image that is solved; the first window of each size takes up to half a minute longer: "
    "its program is compiled, and kept for later runs"
)
"""Message before the first image is refined."""


def add_network(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that name the network and its weight file."""
    parser.add_argument(
        "--backbone", default="efficientnet-lite0", help="network that extracts the features (default: %(default)s)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weight file of the network (default: the installed one)"
    )


def add_model_weights(parser: argparse.ArgumentParser) -> None:
    """Adds the argument of the weight files of a model."""
    text = "weight file of the model's network (default: the installed one); once for each network of a composed model"
    parser.add_argument("--weights", type=Path, action="append", metavar="FILE", help=text)


def add_size(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the size that images are resized to."""
    group = parser.add_mutually_exclusive_group()
    text = (
        "size that images are resized to: 'auto' (the images' own size, at most as many pixels as 448x448), a number N "
        "(as many pixels as NxN), or HEIGHTxWIDTH; the first two keep the aspect ratio (default: auto)"
    )
    group.add_argument("--size", type=_size, metavar="auto|N|HxW", help=text)
    text = "width of the smallest defect to be found, pixels of the images; it chooses the size"
    group.add_argument("--smallest-defect", type=float, metavar="PIXELS", help=text)


def _size(text: str) -> tuple[int, int] | int | None:
    if text == "auto":
        return None
    sides = [at_least(1)(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text} is not auto, a number or HEIGHTxWIDTH")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


_size.__name__ = "size"  # argparse writes "invalid size value"


def add_ignored(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the pixels that do not count."""
    text = "picture of the pixels that do not count in any image, white; its size may differ (default: all pixels count)"
    parser.add_argument("--ignore", type=Path, metavar="FILE", help=text)
    text = "width of a frame that does not count, pixels of the images (default: %(default)s)"
    parser.add_argument("--border", type=at_least(0), default=0, metavar="PIXELS", help=text)


def add_false_alarms(parser: argparse.ArgumentParser, *, from_settings: bool = False) -> None:
    """Adds the argument of the false-alarm rate; ``from_settings``: absent, if the user does not give it."""
    rate = Settings().false_alarms
    text = f"share of good images that may be called defective (default: {rate}); another share needs no new fit"
    default = None if from_settings else rate
    parser.add_argument("--false-alarms", type=_share, default=default, metavar="RATE", help=text)


def add_strict(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that ends the command at an image that can't be used."""
    text = "end before any work if an image can't be used (default: it is named, the others are done, the exit status is 3)"
    parser.add_argument("--strict", action="store_true", help=text)


def exit_status(errors: Iterable[object]) -> int:
    """Prints the errors of images that can't be used; returns the exit status, 3 if there is one, else 0."""
    status = 0
    for error in errors:
        print(f"f2pad: error: {one_line(error)}", file=sys.stderr)
        status = 3
    return status


def add_white(parser: argparse.ArgumentParser) -> None:
    """Adds the argument of the white level."""
    text = "value of white in files with more than 8 bits, such as 4095 for a camera of 12 bits; the model keeps it "
    text += "(default: found from the files)"
    parser.add_argument("--white", type=positive, metavar="VALUE", help=text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


_share.__name__ = "number"  # argparse writes "invalid number value"


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Adds the argument of the seed."""
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of all random choices (default: %(default)s)")


def at_least(least: int) -> Callable[[str], int]:
    """Returns a parser of an argument that is a whole number of at least ``least``."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    number.__name__ = "whole number"  # argparse writes "invalid whole number value"
    return number


def positive(text: str) -> float:
    """Parses an argument that is a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


positive.__name__ = "number"


def make_folder(path: Path) -> None:
    """Creates an output folder before the work begins. A wrong folder is then refused at once, not after hours.

    Raises:
        OptionError: ``path`` is a file, or lies below one.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OptionError(f"{path}: not a folder; --out must name a folder that exists or can be made") from None


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Holds the lock of an output folder or file, into which no other process writes meanwhile.

    The lock is a file in the folder or beside the file, deleted at the end. The lock of a killed process is free.

    Raises:
        RunError: another process holds the lock.
    """
    lock = out / "results.lock" if out.is_dir() else out.with_name(f"{out.name}.lock")
    held = filelock.FileLock(lock)
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        raise RunError(f"{out}: another run is writing there") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: a process that waits at the old file sees that it is gone
        held.release()


@contextlib.contextmanager
def shown_progress(*, sizes: bool = False) -> Iterator[Progress]:
    """Yields a progress function that draws bars on standard error, or prints lines where there is no terminal.

    Args:
        sizes: whether the counts are bytes.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _printed(sizes)
        return
    counts: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn()) if sizes else (MofNCompleteColumn(),)
    columns = SpinnerColumn(), TextColumn("{task.description:<22}"), BarColumn(), *counts, TimeElapsedColumn()
    with Bars(*columns, console=console) as bars:
        yield _drawn(bars)


def _printed(sizes: bool) -> Progress:
    """Returns a progress function that prints a line every :data:`LINE_INTERVAL_S` seconds, with the time left.

    A stage that has a line has a last line too.
    """
    last, began = time.monotonic(), {}
    shown: set[str] = set()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        start, first = began.setdefault(stage, (now, done))
        if now - last >= LINE_INTERVAL_S or (done == total and stage in shown):
            last = now
            shown.add(stage)
            count = f"{decimal(done)} of {decimal(total)}" if sizes else f"{done}/{total}"
            left = (now - start) * (total - done) / (done - first) if first < done < total else 0
            ending = f", {timedelta(seconds=round(left))} left" if left else ""
            print(f"{time.strftime('%H:%M:%S')} {stage} {count}{ending}", file=sys.stderr, flush=True)

    return report


def _drawn(bars: Bars) -> Progress:
    """Returns a progress function that draws one bar for each stage. The name of a stage ends at its first comma."""
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        name = stage.split(",")[0]
        if name not in tasks:
            tasks[name] = bars.add_task(stage, total=total)
        bars.update(tasks[name], completed=done, total=total, description=stage)

    return report
