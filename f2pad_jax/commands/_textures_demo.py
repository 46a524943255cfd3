"""The demonstration: fit, refine and compare on photographs that come with packages."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from f2pad_jax._storage import write_atomically
from f2pad_jax._timing import compile_seconds
from f2pad_jax.backbones.backbone import load_backbone
from f2pad_jax.data.textures import NAMES, Texture, load_texture
from f2pad_jax.detectors.fitting import fit
from f2pad_jax.detectors.patchcore import PatchCore
from f2pad_jax.images.files import write_png
from f2pad_jax.images.metrics import best_threshold, dice, iou
from f2pad_jax.images.pictures import gallery, overlay
from f2pad_jax.method.algorithm import Refined
from f2pad_jax.progress import Progress, silent
from f2pad_jax.refinement import refine_many

TITLES = ("input", "ground truth", "coarse mask", "refined mask", "outline", "restored")
"""Titles of the gallery's columns."""


def run_demo(
    out: Path, *, seed: int = 0, names: tuple[str, ...] = NAMES, num_test: int = 4, progress: Progress = silent
) -> dict[str, Any]:
    """Fits a PatchCore to each texture, refines its coarse masks, and writes ``gallery.png`` and ``summary.json``.

    Each image has three masks. The mask "before" is the coarse map at the threshold with the best pixel F1 on the test
    labels, as in the paper. The mask "start" is the coarse map at the calibrated threshold, without labels. The mask
    "after" is the refinement of "start".

    Args:
        out: folder to write to.
        seed: seed of the crops, the defects and the coreset.
        names: names of the textures.
        num_test: number of defective images of each texture.
        progress: function that is told how far the demonstration is.

    Returns:
        The content of ``summary.json``.
    """
    backbone = load_backbone("efficientnet-lite0")
    categories, rows, labels = {}, [], []
    compiling = compile_seconds()
    for name in names:
        texture = load_texture(name, seed=seed, num_test=num_test)
        detector = fit(
            PatchCore,
            texture.train,
            backbone,
            seed=seed,
            progress=lambda stage, done, total, name=name: progress(f"{name}: {stage}", done, total),
        )
        start, compiled = time.perf_counter(), compile_seconds()
        images = [test.image for test in texture.test]
        result = _collected(refine_many(detector, images), len(images), f"{name}: refining", progress)
        seconds = time.perf_counter() - start - (compile_seconds() - compiled)
        categories[name], before = _compared(texture, result, seconds)
        for i, test in enumerate(texture.test):
            mask = np.asarray(result.mask[i])
            rows.append([test.image, test.mask, before[i], mask, overlay(test.image, mask), result.normal[i]])
            labels.append(f"{name}\nIoU before {iou(before[i], test.mask):.3f}\nafter {iou(mask, test.mask):.3f}")
    summary = {
        "images": sum(c["images"] for c in categories.values()),
        **{
            when: {metric: float(np.mean([c[when][metric] for c in categories.values()])) for metric in ("iou", "dice")}
            for when in ("before", "start", "after")
        },
        "seconds_per_image": float(np.mean([c["seconds_per_image"] for c in categories.values()])),
        "compile_seconds": compile_seconds() - compiling,
        "seed": seed,
        "categories": categories,
    }
    write_png(out / "gallery.png", gallery(rows, TITLES, labels, cell=140))
    write_atomically(out / "summary.json", json.dumps(summary, indent=2).encode())
    return summary


def _collected(results: Iterable[Refined], total: int, stage: str, progress: Progress) -> Refined:
    """Collects results one by one, reports their number, and returns them as one batch."""
    found = []
    progress(stage, 0, total)
    for result in results:
        found.append(result)
        progress(stage, len(found), total)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def _compared(texture: Texture, result: Refined, seconds: float) -> tuple[dict[str, Any], Bool[np.ndarray, "b h w"]]:
    """Returns the figures of a category, and the masks called "before"."""
    truth = np.stack([test.mask for test in texture.test])
    coarse_map = np.asarray(result.coarse_map)
    before = coarse_map > best_threshold(coarse_map, truth)
    masks = {"before": before, "start": np.asarray(result.coarse_mask), "after": np.asarray(result.mask)}

    def mean(measure: Callable, masks: np.ndarray) -> float:
        return float(np.mean([measure(m, t) for m, t in zip(masks, truth, strict=True)]))

    figures: dict[str, Any] = {when: {"iou": mean(iou, m), "dice": mean(dice, m)} for when, m in masks.items()}
    figures |= {
        "images": len(truth),
        "steps": float(np.mean(result.steps)),
        "seconds_per_image": seconds / len(truth),
        "iou_per_image": [iou(m, t) for m, t in zip(masks["after"], truth, strict=True)],
    }
    return figures, before
