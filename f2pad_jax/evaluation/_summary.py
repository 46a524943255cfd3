"""Metrics of a case over its images."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from f2pad_jax.evaluation._store import load_images
from f2pad_jax.evaluation.cases import ABLATIONS, FULL
from f2pad_jax.evaluation.peers import peer_masks
from f2pad_jax.images import metrics

Mask = Bool[np.ndarray, "h w"]
Record = dict[str, Any]
"""Names and metrics of one variant or peer of a case."""


def summarise(folder: Path) -> list[Record]:
    """Returns a record for each variant and peer of a case, with metrics in 0..1.

    IoU, DICE and boundary F1 are means over the defective images. AUROC, AP, F1-max and AUPRO pool all images.
    Seconds per image are the seconds of all images, good ones too, divided by the number of defective ones.
    ``backbone_iou`` and ``backbone_dice`` measure the coarse map at the threshold of best pixel F1 on the test labels, the
    paper's protocol. ``coarse_iou`` and ``coarse_dice`` measure m0, at the label-free threshold, where refinement starts.
    """
    if not (folder / "case.json").exists() or not (images := load_images(folder)):
        return []
    case = json.loads((folder / "case.json").read_text())
    maps, truth = np.stack([i.coarse_map for i in images]), np.stack([i.truth for i in images])
    defective = [i for i in images if not i.good]
    best = metrics.best_threshold(maps, truth)

    def mean(measure: Callable[[Mask, Mask], float], masks: Iterable[Mask]) -> float:
        pairs = [(m, i.truth) for m, i in zip(masks, images, strict=True) if not i.good]
        return float(np.mean([measure(m, t) for m, t in pairs])) if pairs else float("nan")

    m0 = [i.coarse_mask for i in images]
    common = {
        **{key: case[key] for key in ("category", "method", "backbone", "protocol", "setting", "seed", "inpainter")},
        "images": len(defective),
        "good_images": len(images) - len(defective),
        "coarse_iou": mean(metrics.iou, m0),
        "coarse_dice": mean(metrics.dice, m0),
        "backbone_iou": mean(metrics.iou, maps > best),
        "backbone_dice": mean(metrics.dice, maps > best),
        "f1_max": metrics.dice((maps > best).reshape(1, -1), truth.reshape(1, -1)),
        "ap": metrics.average_precision(maps, truth),
        "auroc": metrics.auroc(maps, truth),
        "aupro": metrics.aupro(maps, truth),
    }

    def record(variant: str, masks: list[Mask], steps: float, seconds: float) -> Record:
        return common | {
            "variant": variant,
            "iou": mean(metrics.iou, masks),
            "dice": mean(metrics.dice, masks),
            **{f"boundary_f1_{r}": mean(lambda m, t, r=r: metrics.boundary_f1(m, t, r), masks) for r in (1, 2, 3)},
            "false_alarms": sum(bool(m.any()) for m, i in zip(masks, images, strict=True) if i.good),
            "steps": steps,
            "seconds_per_image": seconds,
        }

    records = [
        record(
            variant,
            [i.masks[variant] for i in images],
            float(np.mean([i.steps[variant] for i in defective])),
            float(np.sum([i.seconds[variant] for i in images])) / len(defective),
        )
        for variant in (FULL, *ABLATIONS)
        if defective and all(variant in i.masks for i in images)
    ]
    return records + [record(name, masks, 0.0, 0.0) for name, masks in peer_masks(images).items() if defective]
