"""Files of ``f2pad refine``. Each result is written as soon as it is done, so a stopped run continues where it stopped."""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from f2pad_jax._storage import file_sha256, write_atomically
from f2pad_jax._version import __version__
from f2pad_jax.data.mvtec import read_mask
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.images.files import MAP_SUFFIXES, SUFFIXES, beside, read_image, read_map, state_of, write_png
from f2pad_jax.images.pictures import overlay
from f2pad_jax.inpainting._choice import INPAINTERS
from f2pad_jax.method.algorithm import Refined
from f2pad_jax.method.history import history as trace
from f2pad_jax.method.settings import Settings
from f2pad_jax.progress import Progress
from f2pad_jax.refinement import refine_many
from f2pad_jax.regions.measure import described, find_regions, mask_of
from f2pad_jax.solvers.loop import Outcome

Task = tuple[Path | str, str]
"""Path of an image, or its address in a bucket, and the name of its results."""
Record = dict[str, Any]
"""Figures of one image and the names of its files, as ``results.json`` has them."""
Work = Callable[[Sequence[Task]], Iterator[Record]]
"""Function that refines images, writes their files, and yields a record of each, in any order."""


class Reported(NamedTuple):
    """Regions that a result has, the scale of their lengths, and files that are written on request."""

    min_area: float = 0.0
    """Least number of pixels."""
    min_score: float | None = None
    """Least height of the coarse map; None: any."""
    mm_per_pixel: float | None = None
    """Side of a pixel, mm; None: no lengths in millimetres."""
    probability: bool = False
    """Whether the probability of each pixel is written as well."""


ALL = Reported()
"""All regions, in pixels."""


def refine_files(
    model: Path,
    tasks: Sequence[Task],
    out: Path,
    work: Work,
    recipe: dict[str, Any],
    progress: Progress,
    show: Callable[[Record], None] | None = None,
) -> dict[str, Any]:
    """Refines the images that are not done, and writes the records of all images to ``results.json``.

    The records are in the order of ``tasks``.

    Args:
        model: model file.
        tasks: images to refine.
        out: folder for the results.
        work: function that refines.
        recipe: all other options that change the results. Records of a run with another recipe or model are dropped.
        progress: function that is told how many images are done.
        show: function that is given the record of each image as soon as it is done.

    Returns:
        The content of ``results.json``.
    """
    began, partial = time.perf_counter(), out / "results.partial"
    recipe = {"version": __version__, "model": str(model), "sha256": file_sha256(model), **recipe}
    done = _kept(partial, recipe)

    def kept(path: Path | str, name: str) -> bool:
        record = done.get(str(path))
        return record is not None and record["name"] == name and record["file"] == state_of(path)

    waiting = [task for task in tasks if not kept(*task)]
    progress("refining", len(tasks) - len(waiting), len(tasks))
    if show is not None:
        missing = {*waiting}
        for task in tasks:
            if task not in missing:
                show(done[str(task[0])])
    with partial.open("a") as log:
        for count, record in enumerate(work(waiting), len(tasks) - len(waiting) + 1):
            done[record["image"]] = record
            log.write(json.dumps(record) + "\n")
            log.flush()
            if show is not None:
                show(record)
            progress("refining", count, len(tasks))
    images = [{key: value for key, value in done[str(path)].items() if key != "file"} for path, _ in tasks]
    results = {**recipe, "seconds": round(time.perf_counter() - began, 2), "refined_now": len(waiting), "images": images}
    write_atomically(out / "results.json", _readable(results).encode())
    partial.unlink()
    return results


def _readable(results: dict[str, Any]) -> str:
    """Returns results as JSON, with a line for each value and for each image: outlines have many numbers."""
    images = ",\n".join(json.dumps(record) for record in results["images"])
    others = json.dumps({key: value for key, value in results.items() if key != "images"}, indent=2)
    return f'{others[:-2]},\n  "images": [\n{images}\n  ]\n}}'


def _kept(partial: Path, recipe: dict[str, Any]) -> dict[str, Record]:
    """Returns the records of a stopped run with this recipe, by image. If there is no such run, it begins a new file."""
    lines = partial.read_text().splitlines() if partial.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # the run was stopped in the middle of a line
            break
    if not records or _without_path(records[0]) != _without_path(recipe):
        records = [recipe]
    write_atomically(partial, "".join(json.dumps(record) + "\n" for record in records).encode())
    return {record["image"]: record for record in records[1:]}


def _without_path(recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe without the path of its model, whose checksum is enough."""
    return {key: value for key, value in recipe.items() if key != "model"}


def worker(
    detector: AbstractDetector,
    out: Path,
    *,
    inpaint: str = INPAINTERS[0],
    lanes: int | None = None,
    history: bool = False,
    settings: Settings | None = None,
    ignore: Path | None = None,
    maps: Path | None = None,
    masks: Path | None = None,
    reported: Reported = ALL,
) -> Work:
    """Returns a function that refines in this process, on all its devices.

    Args:
        detector: fitted detector.
        out: folder for the results.
        inpaint: name of the inpainter.
        lanes: as for :func:`f2pad_jax.refine_many`.
        history: whether to write the history of each image as well.
        settings: constants of the method.
        ignore: picture of the pixels that do not count in any image, or folder with a picture for each image.
        maps: folder with the coarse map of each image.
        masks: folder with the coarse mask of each image.
        reported: regions that the results have.
    """
    sources = {"ignore": (ignore, ignored_pixels), "coarse_map": (maps, coarse_map), "coarse_mask": (masks, coarse_mask)}
    readers = {key: functools.partial(read, source) for key, (source, read) in sources.items() if source is not None}

    def work(tasks: Sequence[Task]) -> Iterator[Record]:
        of_images = {key: map(read, [name for _, name in tasks]) for key, read in readers.items()}
        options = {"settings": settings, "inpaint": inpaint}
        results = refine_many(detector, [path for path, _ in tasks], lanes=lanes, **of_images, **options)
        for (path, name), result in zip(tasks, results, strict=True):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            if history:
                past = trace(detector, read_image(path), **{key: read(name) for key, read in readers.items()}, **options)
                past.save_csv(out / f"{name}_history.csv")
                past.save_animation(out / f"{name}_history.gif")
                past.save_figure(out / f"{name}_history.png")
            yield written(path, name, result, inpaint, out, reported)

    return work


def coarse_map(folder: Path, name: str) -> Float[np.ndarray, "h w"]:
    """Reads the coarse map of an image."""
    return read_map(beside(folder, name, MAP_SUFFIXES))


def coarse_mask(folder: Path, name: str) -> Bool[np.ndarray, "h w"]:
    """Reads the coarse mask of an image."""
    return read_mask(beside(folder, name, SUFFIXES))


def ignored_pixels(ignore: Path, name: str) -> Bool[np.ndarray, "h w"] | None:
    """Reads the pixels of an image that do not count; None if the folder has no picture with its name.

    Args:
        ignore: picture for all images, or folder with a picture for each.
        name: name of the image's results.
    """
    file = ignore / f"{name}.png" if ignore.is_dir() else ignore
    return None if ignore.is_dir() and not file.exists() else read_mask(file)


def checksum_of(source: Path | None) -> str | None:
    """Returns a checksum of a file, or of all files in a folder, in hexadecimal; None without a source."""
    if source is None:
        return None
    if not source.is_dir():
        return file_sha256(source)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    return hashlib.sha256(repr([(str(file.relative_to(source)), file_sha256(file)) for file in files]).encode()).hexdigest()


def written(path: Path | str, name: str, result: Refined, inpainter: str, out: Path, reported: Reported) -> Record:
    """Writes the mask, the restored image and the overlay of an image, and returns its record.

    The probability is a grey picture of 16 bits, 65535 for 1: above 32767 is the mask, before regions are dropped.
    """
    outcome, found = Outcome(int(result.outcome)), find_regions(result)
    lowest = -math.inf if reported.min_score is None else reported.min_score
    kept = [region for region in found if region.area >= reported.min_area and region.score >= lowest]
    height, width = result.mask.shape
    mask = mask_of(kept, (height, width))
    files = {kind: f"{name}_{kind}.png" for kind in ("mask", "normal", "overlay")}
    write_png(out / files["mask"], mask)
    write_png(out / files["normal"], np.asarray(result.normal))
    write_png(out / files["overlay"], overlay(np.asarray(result.normal + result.anomaly), mask))
    if reported.probability:
        files["probability"] = f"{name}_probability.png"
        levels = np.ceil(65535 * np.asarray(result.probability) - 0.5)  # rounded, and one half down
        write_png(out / files["probability"], levels.astype(np.uint16))
    return {
        "image": str(path),
        "name": name,
        "height": height,
        "width": width,
        "file": state_of(path),
        **files,
        "verdict": "defective" if result.defective else "good",
        "score": round(float(result.score), 4),
        "p_value": float(f"{float(result.p_value):.3g}") if np.isfinite(result.p_value) else None,
        "unlike_normals": bool(result.unlike),
        "anomalous_pixels": int(mask.sum()),
        "anomalous_share": float(mask.mean()),
        "coarse_share": float(result.coarse_mask.mean()),
        "max_score": float(result.coarse_map.max()),
        "inpainter": inpainter,
        "sparsity": float(result.sparsity),
        "steps": int(result.steps),
        "objective": float(result.objective),
        "outcome": outcome.name.lower(),
        "message": outcome.message,
        "dropped_regions": len(found) - len(kept),
        "regions": [described(region, (height, width), reported.mm_per_pixel) for region in kept],
    }
