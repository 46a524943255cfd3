"""``f2pad update``: good images, such as false alarms, that a model learns without a new fit."""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from f2pad_jax._storage import write_atomically
from f2pad_jax.commands._console import (
    add_false_alarms,
    add_model_weights,
    add_seed,
    add_strict,
    exit_status,
    make_folder,
    only_writer,
    shown_progress,
)
from f2pad_jax.commands._model_files import described_verdict, write_chart
from f2pad_jax.detectors.base import AbstractDetector, Added
from f2pad_jax.detectors.patchcore import PatchCore
from f2pad_jax.detectors.saving import load_detector, save_detector
from f2pad_jax.detectors.updating import update
from f2pad_jax.errors import ModelError, OptionError
from f2pad_jax.images.files import check_images, list_images


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="model file, from 'f2pad fit'")
    text = "good images that a person has looked at, or folders that hold them; without an image, the command lists the "
    text += "images of earlier updates"
    parser.add_argument("images", nargs="*", metavar="IMAGE_OR_DIR", help=text)
    text = "model file to write; the file that it replaces is kept as FILE.before (default: MODEL)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=text)
    parser.add_argument("--force", action="store_true", help="add images that look defective, too")
    parser.add_argument("--undo", action="store_true", help="put MODEL.before, the model before the last update, in place")
    add_model_weights(parser)
    add_false_alarms(parser)
    add_seed(parser)
    add_strict(parser)


def run(arguments: argparse.Namespace) -> int:
    """Updates a model, lists its updates or undoes the last one; the exit status is 3 if an image can't be used.

    The new model is complete in a file beside ``FILE`` before it takes the place of ``FILE`` in one step. A command that is
    stopped leaves the old model or the new one.
    """
    model, out = arguments.model, arguments.out or arguments.model
    if arguments.undo:
        if arguments.images or arguments.out:
            raise OptionError("--undo takes the model alone, without images or --out")
        undo(model, arguments.weights, arguments.false_alarms)
        return 0
    if not arguments.images:
        added = load_detector(model, weights=arguments.weights).calibrated.added
        print(table(added) or f"{model}: no update added an image")
        return 0
    if out.is_dir():
        raise OptionError(f"{out}: this is a folder; --out must name the model file to write")
    make_folder(out.parent)
    with only_writer(out):
        return add_images(arguments, out)


def add_images(arguments: argparse.Namespace, out: Path) -> int:
    """Writes the updated model, and prints the changes; the exit status is 3 if an image can't be used."""
    detector = load_detector(arguments.model, weights=arguments.weights)
    paths, errors, _ = check_images((path for path, _ in list_images(arguments.images)), strict=arguments.strict)
    status = exit_status(errors)
    if not paths:
        return 2
    with shown_progress() as progress:
        updated = update(detector, paths, force=arguments.force, seed=arguments.seed, progress=progress)
    added = updated.calibrated.added[len(detector.calibrated.added) :]
    if len(added) < len(paths):
        print(f"{len(paths) - len(added)} of {len(paths)} images were added before")
    if not added and out == arguments.model:
        return status
    replace_model(out, updated)
    write_chart(out, updated, arguments.false_alarms)
    were = count_marked(detector, [a.before for a in added], arguments.false_alarms)
    are = count_marked(updated, [a.after for a in added], arguments.false_alarms)
    print(table(added))
    print(f"{out}: {len(added)} images added; {were} of them were defective before, {are} are now")
    print(described_grown(detector, updated) + described_verdict(updated, arguments.false_alarms))
    return status


def replace_model(path: Path, detector: AbstractDetector) -> None:
    """Writes a model file, and keeps the file that it replaces as ``NAME.before``."""
    new = path.with_name(f".{path.name}.new")
    save_detector(new, detector)
    if path.exists():
        write_atomically(before(path), path.read_bytes())
    new.replace(path)


def undo(model: Path, weights: list[Path] | None, false_alarms: float) -> None:
    """Puts the model before the last update in place.

    Raises:
        ModelError: no update made the model, or the model before the update is not beside it.
    """
    added, kept = load_detector(model, weights=weights).calibrated.added, before(model)
    if not added:
        raise ModelError(f"{model}: no update made this model; there is nothing to undo")
    if not kept.exists():
        raise ModelError(f"{model}: {kept.name} is not beside it; only the last update can be undone")
    detector = load_detector(kept, weights=weights)
    earlier = detector.calibrated.added
    if len(earlier) >= len(added) or earlier != added[: len(earlier)]:
        raise ModelError(f"{kept}: not the model before the last update of {model}")
    kept.replace(model)
    write_chart(model, detector, false_alarms)
    print(f"{model}: the model before the update of {added[-1].date}, with {len(earlier)} added images")


def before(path: Path) -> Path:
    """Returns the path of the model before an update."""
    return path.with_name(f"{path.name}.before")


def count_marked(detector: AbstractDetector, scores: list[float], false_alarms: float) -> int:
    """Returns the number of scores above the limit."""
    return int(np.sum(np.asarray(detector.in_units(jnp.asarray(scores, jnp.float32), false_alarms)) > 1))


def described_grown(old: AbstractDetector, new: AbstractDetector) -> str:
    """Describes the growth of a memory bank in a line; the text is empty without a bank."""
    if not isinstance(old, PatchCore) or not isinstance(new, PatchCore):
        return ""
    return f"memory bank: {len(old.memory_bank)} features before, {len(new.memory_bank)} now\n"


def table(added: tuple[Added, ...]) -> str:
    """Returns a line for each image that an update added."""
    head = f"{'date':25} {'sha256':12} {'before':>8} {'after':>8}  image"
    lines = [f"{a.date:25} {a.sha256[:12]} {a.before:8.2f} {a.after:8.2f}  {a.name}" for a in added]
    return "\n".join([head, *lines] if lines else [])
