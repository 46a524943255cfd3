"""Images in files, refined to files: what ``f2pad refine`` writes. A run that was stopped goes on where it was."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import f2pad_jax
from f2pad_jax.checkpoints import file_sha256, write_atomically
from f2pad_jax.data.images import read_image, state_of, write_png
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.evaluation.pictures import overlay
from f2pad_jax.progress import Progress
from f2pad_jax.refine import refine_many
from f2pad_jax.solvers import Outcome
from f2pad_jax.window import Refined

Task = tuple[Path | str, str]
"""An image file, or the address of one in a bucket, and the name its results get."""
Work = Callable[[Sequence[Task]], Iterator[dict[str, Any]]]
"""Refines images, writes their files, and gives a record of each, in any order."""


def refine_files(
    model: Path, tasks: Sequence[Task], out: Path, work: Work, recipe: dict, progress: Progress
) -> dict[str, Any]:
    """Do what is not done yet; returns, and writes to ``results.json``, records of all in the order of ``tasks``.

    Args:
        model: the model file.
        tasks: what to refine.
        out: folder for the results.
        work: what refines.
        recipe: what else the results depend on; those of another recipe or model are not kept.
        progress: called as (stage, done, total).
    """
    began, partial = time.perf_counter(), out / "results.partial"
    made_by = {"version": f2pad_jax.__version__, "settings": f2pad_jax.Settings().described()}
    recipe = {**made_by, "model": str(model), "sha256": file_sha256(model), **recipe}
    done = _kept(partial, recipe)
    waiting = [task for task in tasks if str(task[0]) not in done or done[str(task[0])]["file"] != state_of(task[0])]
    progress("refining", len(tasks) - len(waiting), len(tasks))
    with partial.open("a") as log:
        for count, record in enumerate(work(waiting), len(tasks) - len(waiting) + 1):
            done[record["image"]] = record
            log.write(json.dumps(record) + "\n")
            log.flush()
            progress("refining", count, len(tasks))
    images = [{key: value for key, value in done[str(path)].items() if key != "file"} for path, _ in tasks]
    results = {**recipe, "seconds": round(time.perf_counter() - began, 2), "refined_now": len(waiting), "images": images}
    write_atomically(out / "results.json", json.dumps(results, indent=2).encode())
    partial.unlink()
    return results


def _kept(partial: Path, recipe: dict) -> dict[str, dict[str, Any]]:
    """Records of a run with this recipe that was stopped; begins a new file where there is none."""
    lines = partial.read_text().splitlines() if partial.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # cut short
            break
    if not records or _without_path(records[0]) != _without_path(recipe):
        records = [recipe]
    write_atomically(partial, "".join(json.dumps(record) + "\n" for record in records).encode())
    return {record["image"]: record for record in records[1:]}


def _without_path(recipe: dict) -> dict:
    """A recipe without where its model lies, of which the checksum says enough."""
    return {key: value for key, value in recipe.items() if key != "model"}


def worker(
    detector: AbstractDetector, out: Path, *, inpaint: str | None = None, lanes: int | None = None, history: bool = False
) -> Work:
    """Work in this process, on all its devices."""

    def work(tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        results = refine_many(detector, [path for path, _ in tasks], inpaint=inpaint, lanes=lanes)
        for (path, name), result in zip(tasks, results, strict=True):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            if history:
                way = f2pad_jax.history(detector, read_image(path), inpaint=inpaint)
                way.save_csv(out / f"{name}_history.csv")
                way.save_animation(out / f"{name}_history.gif")
                way.save_figure(out / f"{name}_history.png")
            yield written(path, name, result, out)

    return work


def written(path: Path | str, name: str, result: Refined, out: Path) -> dict[str, Any]:
    """Write the mask, the restored image and the overlay of a result; what else there is to say of it."""
    outcome = Outcome(int(result.outcome))
    files = {kind: f"{name}_{kind}.png" for kind in ("mask", "normal", "overlay")}
    write_png(out / files["mask"], np.asarray(result.mask))
    write_png(out / files["normal"], np.asarray(result.normal))
    write_png(out / files["overlay"], overlay(np.asarray(result.normal + result.anomaly), np.asarray(result.mask)))
    return {
        "image": str(path),
        "file": state_of(path),
        **files,
        "anomalous_pixels": int(result.mask.sum()),
        "anomalous_share": float(result.mask.mean()),
        "coarse_share": float(result.coarse_mask.mean()),
        "max_score": float(result.coarse_map.max()),
        "inpainter": result.inpainter,
        "steps": int(result.steps),
        "objective": float(result.objective),
        "outcome": outcome.name.lower(),
        "message": outcome.message,
    }
