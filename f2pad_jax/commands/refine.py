"""``f2pad refine``: masks, restored images and overlays of images, which lie in files or in a bucket."""

import argparse
import collections
import glob
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from f2pad_jax._storage import write_atomically
from f2pad_jax.commands._archive import Archive, Record, location
from f2pad_jax.commands._console import (
    COMPILING,
    add_strict,
    exit_status,
    make_folder,
    shown_progress,
)
from f2pad_jax.commands._ray import ray_workers
from f2pad_jax.commands._refine_files import worker
from f2pad_jax.commands._refine_options import add_method, add_model, method_options, recipe_of
from f2pad_jax.commands._results_page import write_views
from f2pad_jax.commands._settings_file import as_toml
from f2pad_jax.detectors.saving import load_detector
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images.files import MAP_SUFFIXES, SUFFIXES, beside, check_images, is_address, list_images
from f2pad_jax.images.pictures import figures
from f2pad_jax.regions.formats import FORMATS


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_model(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE_OR_DIR",
        help="images, patterns ('in/*.png'), folders or buckets (s3://bucket/folder) that hold images; - reads a list of "
        "them from standard input, one a line",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder for masks and pictures")
    parser.add_argument(
        "--ignore",
        type=Path,
        metavar="FILE_OR_DIR",
        help="picture of the pixels that do not count, white: one for all images, or a folder with a picture NAME.png for "
        "each image that needs one (default: all pixels count)",
    )
    given = parser.add_mutually_exclusive_group()
    text = "folder with the coarse map of each image from another detector, at the image's relative path: NAME.npy, .npz, "
    text += ".tif or .png; its levels are those of 'f2pad fit --maps', else each map's own"
    given.add_argument("--maps", type=Path, metavar="DIR", help=text)
    text = "folder with a mask NAME.png of the suspect pixels of each image: boxes, points or scribbles, white"
    given.add_argument("--masks", type=Path, metavar="DIR", help=text)
    add_method(parser)
    parser.add_argument(
        "--ray",
        type=int,
        metavar="WORKERS",
        help="refine in this number of Ray processes, on this machine or on the cluster that RAY_ADDRESS names",
    )
    text = f"additional file of the regions for other programs; one or several of {', '.join(FORMATS)}"
    export = {"nargs": "+", "action": "extend", "default": [], "choices": list(FORMATS), "metavar": "FORMAT"}
    parser.add_argument("--export", **export, help=text)
    text = "print the record of each image as a line of JSON on standard output, and all other lines on standard error"
    parser.add_argument("--json", action="store_true", help=text)
    add_strict(parser)
    parser.add_argument("--fail-on-defect", action="store_true", help="exit with status 1 if an image is defective")
    text = "also write the probability of each pixel, as a grey PNG of 16 bits: 65535 is 1, and the mask is above 32767"
    parser.add_argument("--probability", action="store_true", help=text)
    parser.add_argument(
        "--history",
        action="store_true",
        help="also write the solver's steps towards each mask, as curves, an animation and a table; takes twice the time",
    )


def run(arguments: argparse.Namespace) -> int:
    """Refines the images that the output folder has no result of, and writes the results of all.

    The exit status is 2 if no image can be used, and 3 if some can't. Else it is 1 if an image is defective and
    ``--fail-on-defect`` is given, and 0 otherwise.
    """
    if arguments.ray is not None:  # accelerators are for the workers; this process only reads the model
        jax.config.update("jax_platforms", "cpu")
    if arguments.history:
        figures()  # raises the error of a missing matplotlib before the first image, not after it
    options, out = method_options(arguments), arguments.out
    given = {"ignore": arguments.ignore, "maps": arguments.maps, "masks": arguments.masks}
    given = {name: path and path.absolute() for name, path in given.items()}
    for path in given.values():
        if path is not None and not path.exists():
            raise ImageError(f"{path}: no such file or folder")
    detector = load_detector(arguments.model, weights=arguments.weights)
    found = list_images(expanded(arguments.images))
    if not found:
        raise ImageError("no image is given")
    if given["maps"] is None and given["masks"] is None and detector.calibrated.maps != "own":
        raise OptionError(f"{arguments.model} has no maps of its own; give --maps or --masks")
    options |= {"history": arguments.history, **given}
    options["reported"] = options["reported"]._replace(probability=arguments.probability)
    recipe = recipe_of(arguments.model, options)
    make_folder(out)
    console = sys.stderr if arguments.json else sys.stdout
    with Archive(out, recipe) as archive:
        own = archive.files()
        found = [(path, relative) for path, relative in found if location(path) not in own]
        names = zip(found, result_names(distinct(found)), strict=True)
        kept = {place: name for name, place in archive.planned.items()}
        tasks = [(path, kept.get(location(path), name)) for (path, _), name in names]
        if arguments.strict:
            check_images((path for path, _ in tasks), strict=True)
            for folder, suffixes in ((given["maps"], MAP_SUFFIXES), (given["masks"], SUFFIXES)):
                for _, name in tasks:
                    if folder is not None:
                        beside(folder, name, suffixes)
        waiting = archive.missing(tasks)
        write_atomically(out / "settings.toml", as_toml(options["settings"]).encode())
        if waiting:
            print(COMPILING, file=console)
        if arguments.json:
            unfinished = {*waiting}
            for task in tasks:
                if task not in unfinished:
                    print_json(archive.records[task[1]])
        if arguments.ray is None:
            work = worker(detector, out, **options)
        else:
            work = ray_workers(arguments.model, arguments.weights, out, num_workers=arguments.ray, options=options)
        with shown_progress() as progress:
            progress("refining", len(tasks) - len(waiting), len(tasks))
            try:
                for count, record in enumerate(work(waiting), len(tasks) - len(waiting) + 1):
                    archive.add(record)
                    if arguments.json:
                        print_json(record)
                    progress("refining", count, len(tasks))
            except KeyboardInterrupt:
                text = f"{archive.num_refined} of {len(waiting)} images are done and kept; the same command goes on"
                print(text, file=sys.stderr)
                raise
    results = archive.results()
    write_views(results["images"], out)
    for name in arguments.export:
        FORMATS[name](results["images"], out)
    status = exit_status(record["error"] for record in archive.unusable)
    print(summary(results, out), file=console)
    asked = {name for _, name in tasks}
    defective = any(r["verdict"] == "defective" for r in results["images"] if r["name"] in asked)
    if status:
        return status if len(archive.unusable) < len(tasks) else 2
    return int(arguments.fail_on_defect and defective)


def print_json(record: Record) -> None:
    """Prints a record as a line of JSON, at once."""
    print(json.dumps({key: value for key, value in record.items() if key != "file"}), flush=True)


def expanded(sources: Sequence[str]) -> list[str]:
    """Returns the sources with the lines of standard input in place of "-", and matching files in place of patterns.

    Raises:
        ImageError: no file matches a pattern.
    """
    listed = [line for source in sources for line in (sys.stdin.read().splitlines() if source == "-" else [source]) if line]
    found = []
    for source in listed:
        pattern = not is_address(source) and not Path(source).exists() and glob.has_magic(source)
        matches = sorted(glob.glob(source, recursive=True)) if pattern else [source]
        if not matches:
            raise ImageError(f"{source}: no file matches this pattern")
        found += matches
    return found


def summary(results: dict[str, Any], out: Path) -> str:
    """Returns the last line of the command: counts of images, and the place of the results."""
    records, count = results["images"], results["refined_now"]
    num_defective = sum(record["verdict"] == "defective" for record in records)
    unusable = f", {len(results['unusable'])} can't be used" if results["unusable"] else ""
    before = f" ({len(records) - count} of them before)" if count < len(records) else ""
    return (
        f"{len(records)} images{before} in {results['seconds']:.0f} s: {num_defective} defective, "
        f"{len(records) - num_defective} good{unusable}; report.html, sheet.jpg, tables and masks are in {out}"
    )


def distinct(found: Sequence[tuple[Path | str, Path]]) -> list[Path]:
    """Returns the relative path of each image; if two are equal, the paths below the folder or bucket that all share."""
    relative = [path for _, path in found]
    if len({*relative}) == len(relative):
        return relative
    names = [str(path).partition("://")[2] if is_address(path) else os.path.abspath(path) for path, _ in found]
    paths = [path.relative_to(path.anchor) for path in map(Path, names)]
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared) for path in paths]


def result_names(paths: Sequence[Path]) -> list[str]:
    """Returns a name for the results of each image: its relative path without the suffix.

    If two images would then have one name, both names keep the suffix.

    Raises:
        ImageError: two images would have one name.
    """
    stems = [path.with_suffix("").as_posix() for path in paths]
    count = collections.Counter(stems)
    names = [
        stem if count[stem] == 1 else path.as_posix().replace(".", "_") for stem, path in zip(stems, paths, strict=True)
    ]
    name, most = collections.Counter(names).most_common(1)[0]
    if most > 1:
        raise ImageError(f"the results of two images would both be named '{name}': give each image once")
    return names
