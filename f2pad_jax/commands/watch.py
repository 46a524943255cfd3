"""``f2pad watch``: images as a camera writes them into a folder, each once. Results are as of ``f2pad refine``."""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from f2pad_jax._storage import write_atomically
from f2pad_jax.commands._archive import Archive, Record, Task, file_state, location
from f2pad_jax.commands._console import make_folder, positive
from f2pad_jax.commands._refine_files import Work, worker
from f2pad_jax.commands._refine_options import add_method, add_model, detector_with_maps, method_options, recipe_of
from f2pad_jax.commands._results_page import write_views
from f2pad_jax.commands._settings_file import as_toml
from f2pad_jax.commands.refine import print_json, summary
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images.files import list_images, named_as_image

BATCH = 64
"""Largest number of images that are refined before the folder is looked at again."""
PATIENCE = 10
"""Settling times after which an unchanged file that can't be read is given up."""
LOOK_S = 0.2
"""Time between two looks at files that are being written, seconds."""
LIST_S = 60.0
"""Time between two lists of the whole folder, seconds. They find files that the system has reported no change of."""
PUBLISH_S = 30.0
"""Least time between two writings of the tables while the command runs, seconds."""
PUBLISH_SHARE = 0.02
"""Largest share of the time that goes into writing the tables: with many images they are written less often."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_model(parser)
    parser.add_argument("folder", type=Path, metavar="IN", help="folder that a camera fills, with its subfolders")
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder, outside IN; as of 'f2pad refine --out'")
    text = "time without a change after which a file is whole (default: %(default)s)"
    parser.add_argument("--settle", type=positive, default=1.0, metavar="SECONDS", help=text)
    add_method(parser)
    text = "print the record of each image as a line of JSON on standard output, and all other lines on standard error"
    parser.add_argument("--json", action="store_true", help=text)


def run(arguments: argparse.Namespace) -> None:
    """Refines the images of a folder, and all that arrive, until an interrupt or SIGTERM.

    Raises:
        OptionError: the extra ``serve`` is missing, or the output folder lies inside the watched folder.
        ImageError: the watched folder is missing.
    """
    try:
        import watchfiles  # noqa: F401
    except ImportError:
        raise OptionError("watching a folder needs watchfiles; run: pip install 'f2pad-jax[serve]'") from None
    folder, out = Path(os.path.abspath(arguments.folder)), arguments.out
    if not folder.is_dir():
        raise ImageError(f"{arguments.folder}: no such folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise OptionError(f"{out}: lies inside the folder of the images; choose another folder")
    detector, options = detector_with_maps(arguments), method_options(arguments)
    make_folder(out)
    with stopped_by_signals() as stop, Archive(out, recipe_of(arguments.model, options)) as archive:
        write_atomically(out / "settings.toml", as_toml(options["settings"]).encode())
        print(f"watching {folder}; Ctrl-C ends", file=sys.stderr, flush=True)
        for record in refined(folder, archive, worker(detector, out, **options), settle=arguments.settle, stop=stop):
            show(record, as_json=arguments.json)
    write_views(archive.results()["images"], archive.out)
    print(summary(archive.results(), out), file=sys.stderr if arguments.json else sys.stdout)


def refined(folder: Path, archive: Archive, work: Work, *, settle: float, stop: threading.Event) -> Iterator[Record]:
    """Refines the images of a folder, and yields their records, until ``stop`` is set.

    Args:
        folder: absolute path of the folder.
        archive: archive of the results, open.
        work: function that refines images.
        settle: time without a change after which a file is whole, seconds.
        stop: event that ends the work; the images that are done are kept.
    """
    from watchfiles import watch

    arrivals, publishing = Arrivals(folder, archive, settle), Publishing(archive)
    looks = watch(
        folder,
        watch_filter=None,
        debounce=400,
        rust_timeout=int(1000 * min(LOOK_S, settle)),
        yield_on_timeout=True,
        stop_event=stop,
        ignore_permission_denied=True,
    )
    listed = -LIST_S
    for changes in looks:
        paths = [Path(path) for _, path in changes]
        if time.monotonic() - listed >= LIST_S or any(path.is_dir() for path in paths):  # a folder may come with files
            arrivals.look()
            listed = time.monotonic()
        for path in paths:
            arrivals.notice(path)
        whole = arrivals.whole()
        for start in range(0, len(whole), BATCH):
            tasks = archive.missing(whole[start : start + BATCH])
            for record in work(tasks) if tasks else ():
                if "error" in record and not arrivals.given_up(Path(record["image"])):
                    continue
                archive.add(record)
                yield record
                publishing.write()
                if stop.is_set():
                    return
        publishing.write()


class Waiting(NamedTuple):
    """File that is not whole yet, or can't be read yet."""

    state: list[int | str]
    """Size and time of the last change that was seen."""
    since: float
    """Time at which this state was seen first."""
    patience: float
    """Time without a change after which the file is read, seconds."""


class Arrivals:
    """Images of a folder that are not done, and names of their results."""

    def __init__(self, folder: Path, archive: Archive, settle: float):
        self.folder, self.settle = folder, settle
        self.waiting: dict[Path, Waiting] = {}
        self.taken: dict[Path, Waiting] = {}
        """Last state of each file that was read."""
        self.names = {place: name for name, place in archive.planned.items()}
        """Name of the results of each file, by its absolute path."""
        self.used = {*archive.planned}

    def look(self) -> None:
        """Notices all images of the folder, and forgets the ones that are gone."""
        try:
            found = [path for path, _ in list_images([self.folder])]
        except ImageError:  # none yet, or the folder is gone for a while
            return
        for path in found:
            self.notice(path)
        self.taken = {path: self.taken[path] for path in found if path in self.taken}

    def notice(self, path: Path) -> None:
        """Lets an image wait, unless it waits already or has not changed since it was read."""
        if path in self.waiting or not named_as_image(path.relative_to(self.folder)) or not path.is_file():
            return
        state = file_state(path)
        if state is not None and (path not in self.taken or self.taken[path].state != state):
            self.waiting[path] = Waiting(state, time.monotonic(), self.settle)

    def whole(self) -> list[Task]:
        """Returns the images that have not changed for the settling time, in the order in which they came."""
        tasks = []
        for path, seen in [*self.waiting.items()]:
            state = file_state(path)
            if state is None:
                del self.waiting[path]
            elif state != seen.state:
                self.waiting[path] = Waiting(state, time.monotonic(), self.settle)
            elif time.monotonic() - seen.since >= seen.patience:
                self.taken[path] = self.waiting.pop(path)
                tasks.append((path, self.name(path)))
        return tasks

    def given_up(self, path: Path) -> bool:
        """Returns whether an image that can't be read is unusable; else it is gone, or waits once more, for longer."""
        seen = self.taken[path]
        if seen.patience > self.settle:
            return True
        if (state := file_state(path)) is not None:
            patience = PATIENCE * self.settle if state == seen.state else self.settle
            self.waiting[path] = Waiting(state, time.monotonic(), patience)
        return False

    def name(self, path: Path) -> str:
        """Returns the name of an image's results: its relative path without the ending, if no other image has this name."""
        place, relative = location(path), path.relative_to(self.folder)
        if place not in self.names:
            name = relative.with_suffix("").as_posix()
            if name in self.used:
                name = relative.as_posix().replace(".", "_")
            while name in self.used:
                name += "_"
            self.used.add(name)
            self.names[place] = name
        return self.names[place]


class Publishing:
    """Writer of the files of the whole archive while it grows."""

    def __init__(self, archive: Archive):
        self.archive, self.due, self.num_written = archive, time.monotonic() + PUBLISH_S, archive.num_refined

    def write(self) -> None:
        """Writes the files, if they are due and a result is new."""
        began = time.monotonic()
        if began < self.due or self.archive.num_refined == self.num_written:
            return
        self.archive.write()
        write_views(self.archive.results()["images"], self.archive.out)
        self.num_written, ended = self.archive.num_refined, time.monotonic()
        self.due = ended + max(PUBLISH_S, (ended - began) / PUBLISH_SHARE)


def show(record: Record, *, as_json: bool) -> None:
    """Prints a record, and the error of an image that can't be used on standard error too."""
    if "error" in record:
        print(f"f2pad: error: {record['error']}", file=sys.stderr, flush=True)
    if as_json:
        print_json(record)
    elif "error" not in record:
        regions = len(record["regions"])
        print(f"{record['name']}: {record['verdict']}, score {record['score']:.2f}, {regions} regions", flush=True)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Yields an event that an interrupt or SIGTERM sets. A second signal ends the process at once."""
    stop = threading.Event()
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def ask(*_: object) -> None:
        stop.set()
        restore()

    for number in usual:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
