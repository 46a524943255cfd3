"""Metrics of a case over its images."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from f2pad_jax.evaluation._store import load_images, read_case
from f2pad_jax.evaluation.cases import ABLATIONS, FULL
from f2pad_jax.evaluation.peers import peer_masks
from f2pad_jax.images import metrics

Mask = Bool[np.ndarray, "h w"]
Record = dict[str, Any]
"""Names and metrics of one variant or peer of a case."""


def summarise(folder: Path) -> list[Record]:
    """Returns a record for each variant and peer of a case, with metrics in 0..1.

    IoU, DICE and boundary F1 are means over the defective images. AUROC, AP, F1-max, AUPRO and SegF1 pool all images. The
    first four measure a map over all thresholds: the coarse map, and the probability of each variant. SegF1 measures
    masks whose threshold has seen no label: m0, and the masks of each variant.
    Seconds per image are the seconds of all images, good ones too, divided by the number of defective ones. Without a
    defective image, only the numbers of images and of marked images are no NaN.
    ``backbone_iou`` and ``backbone_dice`` measure the coarse map at the threshold of best pixel F1 on the test labels, the
    paper's protocol. ``coarse_iou`` and ``coarse_dice`` measure m0, at the label-free threshold, where refinement starts.
    """
    if not (folder / "case.json").exists() or not (images := load_images(folder)):
        return []
    case = read_case(folder)
    maps, truth = np.stack([i.coarse_map for i in images]), np.stack([i.truth for i in images])
    defective = [i for i in images if not i.good]
    best = metrics.best_threshold(maps, truth) if defective else float("inf")

    def mean(measure: Callable[[Any, Mask], float], masks: Iterable[Any]) -> float:
        pairs = [(m, i.truth) for m, i in zip(masks, images, strict=True) if not i.good]
        return float(np.mean([measure(m, t) for m, t in pairs])) if pairs else float("nan")

    m0 = [i.coarse_mask for i in images]
    labels, scores = np.array([[[not i.good]] for i in images]), np.array([[[i.score]] for i in images])
    image_auroc = metrics.auroc(scores, labels) if 0 < labels.sum() < len(images) else float("nan")
    common = {
        **{key: case[key] for key in ("category", "method", "backbone", "protocol", "setting", "seed", "inpainter")},
        "images": len(defective),
        "good_images": len(images) - len(defective),
        "unusable_images": len(case.get("unusable", [])),
        "coarse_iou": mean(metrics.iou, m0),
        "coarse_dice": mean(metrics.dice, m0),
        "backbone_iou": mean(metrics.iou, maps > best),
        "backbone_dice": mean(metrics.dice, maps > best),
        **over_thresholds(maps, truth, best),
        "seg_f1": pooled_f1(m0, truth),
        "image_auroc": image_auroc,
        "marked_defects": sum(i.marked for i in defective),
        "marked_good": sum(i.marked for i in images if i.good),
        "region_recall": mean(lambda region, t: float((region & t).sum() / t.sum()), [i.region for i in images]),
        "best_cut": mean(best_cut, [i.coarse_map for i in images]),
    }

    def record(variant: str, masks: list[Mask], steps: float, seconds: float) -> Record:
        return common | {
            "variant": variant,
            "iou": mean(metrics.iou, masks),
            "dice": mean(metrics.dice, masks),
            "mask_seg_f1": pooled_f1(masks, truth),
            **{f"boundary_f1_{r}": mean(lambda m, t, r=r: metrics.boundary_f1(m, t, r), masks) for r in (1, 2, 3)},
            "steps": steps,
            "seconds_per_image": seconds,
        }

    def of_probability(variant: str) -> Record:
        probability = np.stack([i.probability[variant] for i in images])
        best = metrics.best_threshold(probability, truth) if defective else float("inf")
        values = over_thresholds(probability, truth, best)
        return {f"probability_{name}": value for name, value in values.items()}

    records = [
        record(
            variant,
            [i.masks[variant] for i in images],
            float(np.mean([i.steps[variant] for i in defective])) if defective else float("nan"),
            float(np.sum([i.seconds[variant] for i in images])) / len(defective) if defective else float("nan"),
        )
        | of_probability(variant)
        for variant in (FULL, *ABLATIONS)
        if all(variant in i.masks for i in images)
    ]
    return records + [record(name, masks, 0.0, 0.0) for name, masks in peer_masks(images).items()]


def over_thresholds(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"], best: float) -> Record:
    """Returns the metrics of maps over all thresholds, all images pooled; ``best`` is the threshold of best F1."""
    if not truth.any():
        return dict.fromkeys(("auroc", "ap", "f1_max", "aupro", "aupro_05"), float("nan"))
    aupro, aupro_05 = metrics.aupros(maps, truth, (0.3, 0.05))
    return {
        "auroc": metrics.auroc(maps, truth),
        "ap": metrics.average_precision(maps, truth),
        "f1_max": pooled_f1(maps > best, truth),
        "aupro": aupro,
        "aupro_05": aupro_05,
    }


def pooled_f1(masks: Sequence[Mask] | Bool[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"]) -> float:
    """Returns the pixel F1 of masks, all images pooled; NaN without an anomalous pixel."""
    if not np.any(truth):
        return float("nan")
    return metrics.dice(np.concatenate(masks), truth.reshape(-1, truth.shape[-1]))


def best_cut(anomaly_map: Float[np.ndarray, "h w"], truth: Mask) -> float:
    """Returns the IoU of the map cut at the threshold that suits the truth best: a bound for any threshold."""
    order = np.argsort(-anomaly_map, axis=None)
    both = np.cumsum(truth.ravel()[order])
    return float(np.max(both / (truth.sum() + np.arange(1, truth.size + 1) - both)))
