"""``f2pad demo``: fit, refine and compare on real photographs, from packages alone."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from f2pad_jax.backbones import load_backbone
from f2pad_jax.checkpoints import write_atomically
from f2pad_jax.data.images import write_png
from f2pad_jax.data.textures import NAMES, Texture, load_texture
from f2pad_jax.detectors.fit import fit
from f2pad_jax.detectors.patchcore import PatchCore
from f2pad_jax.evaluation.metrics import best_threshold, dice, iou
from f2pad_jax.evaluation.pictures import gallery, overlay
from f2pad_jax.progress import Progress, silent
from f2pad_jax.refine import refine
from f2pad_jax.timing import compile_seconds
from f2pad_jax.window import Refined


def run_demo(
    out: Path, *, seed: int = 0, names: tuple[str, ...] = NAMES, num_test: int = 4, progress: Progress = silent
) -> dict[str, Any]:
    """Fit a PatchCore per texture, refine its coarse masks, write ``gallery.png`` and ``summary.json`` into ``out``.

    "Before" is the backbone at the threshold of best pixel F1 on the test labels (the paper's protocol). "After" saw no
    label: refinement starts from the threshold calibrated at fit time, whose masks are reported as "start".

    Returns:
        what ``summary.json`` holds.
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
        result = refine(
            detector,
            np.stack([test.image for test in texture.test]),
            progress=lambda done, total, name=name: progress(f"{name}: refining", done, total),
        )
        result = jax.tree.map(np.asarray, result)
        seconds = time.perf_counter() - start - (compile_seconds() - compiled)
        categories[name], before = _compare(texture, result, seconds)
        for i, test in enumerate(texture.test):
            rows.append(
                [test.image, test.mask, before[i], result.mask[i], overlay(test.image, result.mask[i]), result.normal[i]]
            )
            labels.append(f"{name}\nIoU before {iou(before[i], test.mask):.3f}\nafter {iou(result.mask[i], test.mask):.3f}")
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
    titles = ("input", "ground truth", "coarse mask", "refined mask", "outline", "restored")
    write_png(out / "gallery.png", gallery(rows, titles, labels, cell=140))
    write_atomically(out / "summary.json", json.dumps(summary, indent=2).encode())
    return summary


def _compare(texture: Texture, result: Refined, seconds: float) -> tuple[dict[str, Any], np.ndarray]:
    """A category's figures, and the masks called "before"."""
    truth = np.stack([test.mask for test in texture.test])
    before = np.asarray(result.coarse_map) > best_threshold(np.asarray(result.coarse_map), truth)
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
