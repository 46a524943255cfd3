"""Files of each image of ``f2pad refine``, written as soon as the image is done."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from f2pad_jax._storage import file_sha256
from f2pad_jax.commands._archive import Record, Task, file_state
from f2pad_jax.data.mvtec import read_mask
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.errors import ImageError
from f2pad_jax.images.files import MAP_SUFFIXES, SUFFIXES, beside, is_address, read_image, read_map, write_png
from f2pad_jax.images.pictures import overlay, to_uint8
from f2pad_jax.inpainting._choice import INPAINTERS
from f2pad_jax.method.algorithm import Refined
from f2pad_jax.method.history import history as trace
from f2pad_jax.method.settings import Settings
from f2pad_jax.refinement import refine_many
from f2pad_jax.regions.measure import described, find_regions, mask_of
from f2pad_jax.solvers.loop import Outcome

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


SHOWN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""Suffixes of images that a browser shows, if their pixels have 8 bits. The others get a copy for the page."""
ALL = Reported()
"""All regions, in pixels."""


def worker(
    detector: AbstractDetector,
    out: Path,
    *,
    inpaint: str = INPAINTERS[0],
    lanes: int | None = None,
    budget: float | None = None,
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
        budget: as for ``refine_many``.
        history: whether to write the history of each image as well.
        settings: constants of the method.
        ignore: picture of the pixels that do not count in any image, or folder with a picture for each image.
        maps: folder with the coarse map of each image.
        masks: folder with the coarse mask of each image.
        reported: regions that the results have.
    """

    def extras(name: str) -> dict[str, Path | None]:
        """Returns the files that belong to an image, by the argument of ``refine_many``."""
        own = {} if ignore is None else {"ignore": ignored_file(ignore, name)}
        own |= {} if maps is None else {"coarse_map": beside(maps, name, MAP_SUFFIXES)}
        return own | ({} if masks is None else {"coarse_mask": beside(masks, name, SUFFIXES)})

    def work(tasks: Sequence[Task]) -> Iterator[Record]:
        ready, files, failed = [], [], {}
        for path, name in tasks:
            try:
                files.append(extras(name))
                ready.append((path, name))
            except ImageError as error:
                yield {"image": str(path), "name": name, "error": str(error)}

        paths = [path for path, _ in ready]
        states = [file_state(path) for path in paths]  # before they are read: a file may change while it is refined
        of_images = {key: [file[key] for file in files] for key in (files[0] if files else ())}
        options = {"settings": settings, "inpaint": inpaint}
        results = refine_many(
            detector, paths, lanes=lanes, budget=budget, on_error=failed.__setitem__, **of_images, **options
        )
        for count, result in enumerate(results):
            number = count + len(failed)  # errors come in the order of the images, too
            path, name = ready[number]
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            if history:
                past = trace(detector, read_image(path, white=detector.calibrated.white), **read(files[number]), **options)
                past.save_csv(out / f"{name}_history.csv")
                past.save_animation(out / f"{name}_history.gif")
                past.save_figure(out / f"{name}_history.png")
            record = written(path, name, result, inpaint, out, reported)
            if detector.calibrated.white is not None or is_address(path) or Path(path).suffix.lower() not in SHOWN:
                record["input"] = f"{name}_input.png"
                write_png(out / record["input"], to_uint8(np.asarray(result.normal + result.anomaly)))
            yield record | {"file": states[number]}
        for number, error in failed.items():
            yield {"image": str(ready[number][0]), "name": ready[number][1], "error": str(error)}

    return work


READERS = {"ignore": read_mask, "coarse_map": read_map, "coarse_mask": read_mask}
"""Functions that read the files of :func:`worker`."""


def read(files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Returns the contents of the files that belong to an image."""
    return {key: None if file is None else READERS[key](file) for key, file in files.items()}


def ignored_file(ignore: Path, name: str) -> Path | None:
    """Returns the picture of an image's pixels that do not count; None if the folder has no picture with its name.

    Args:
        ignore: picture for all images, or folder with a picture for each.
        name: name of the image's results.
    """
    file = ignore / f"{name}.png" if ignore.is_dir() else ignore
    return None if ignore.is_dir() and not file.exists() else file


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
    figures, mask = judged(result, inpainter, reported)
    files = {kind: f"{name}_{kind}.png" for kind in ("mask", "normal", "overlay")}
    write_png(out / files["mask"], mask)
    write_png(out / files["normal"], np.asarray(result.normal))
    write_png(out / files["overlay"], overlay(np.asarray(result.normal + result.anomaly), mask))
    if reported.probability:
        files["probability"] = f"{name}_probability.png"
        levels = np.ceil(65535 * np.asarray(result.probability) - 0.5)  # rounded, and one half down
        write_png(out / files["probability"], levels.astype(np.uint16))
    size = {key: figures[key] for key in ("height", "width")}
    return {"image": str(path), "name": name} | size | files | figures


def judged(result: Refined, inpainter: str, reported: Reported) -> tuple[Record, Bool[np.ndarray, "h w"]]:
    """Returns the figures and regions of a result, and the mask of the regions that are kept."""
    outcome, found = Outcome(int(result.outcome)), find_regions(result)
    lowest = -math.inf if reported.min_score is None else reported.min_score
    kept = [region for region in found if region.area >= reported.min_area and region.score >= lowest]
    height, width = result.mask.shape
    mask = mask_of(kept, (height, width))
    figures = {
        "height": height,
        "width": width,
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
    return figures, mask
