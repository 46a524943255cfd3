"""The paper's figures of a run: examples and failures as pictures, and IoU by size of the anomaly as a chart."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from f2pad_jax._storage import write_atomically
from f2pad_jax.evaluation._charts import bar_chart, standalone
from f2pad_jax.evaluation._store import ImageResult
from f2pad_jax.evaluation.cases import FULL
from f2pad_jax.images import metrics
from f2pad_jax.images.files import write_png
from f2pad_jax.images.pictures import gallery, overlay

GROUPS = (0.0, 0.02, 0.04, 0.06, 0.08, 1.0)
"""Borders of the paper's five groups of anomaly size, shares of the image (Fig. 7)."""


class Labelled(NamedTuple):
    """A test image with its category."""

    category: str
    image: ImageResult


class SizeGroup(NamedTuple):
    """Images whose anomalies are of similar size."""

    name: str
    """Range of the size, % of the image."""
    count: int
    """Number of images."""
    coarse_iou: float
    """Mean IoU of m0; NaN without images."""
    iou: float
    """Mean IoU of the refined mask; NaN without images."""


def size_groups(images: Sequence[Labelled]) -> list[SizeGroup]:
    """Returns the groups of :data:`GROUPS`, with their mean IoU."""
    groups = []
    for low, high in itertools.pairwise(GROUPS):
        members = [i for _, i in images if low < i.truth.mean() <= high]
        means = []
        for masks in ([i.coarse_mask for i in members], [i.masks[FULL] for i in members]):
            values = [metrics.iou(m, i.truth) for m, i in zip(masks, members, strict=True)]
            means.append(float(np.mean(values)) if values else float("nan"))
        name = f"{100 * low:.0f} to {100 * high:.0f}" if high < 1 else f"over {100 * low:.0f}"
        groups.append(SizeGroup(name, len(members), *means))
    return groups


def write_figures(folder: Path, stem: str, images: Sequence[Labelled], title: str) -> list[Path]:
    """Writes pictures of examples (Fig. 6) and of the lowest IoU (Fig. 11), and a chart of IoU by anomaly size (Fig. 7).

    Args:
        folder: folder of the pictures.
        stem: start of each file's name.
        images: defective images, sorted by category.
        title: title of the chart.

    Returns:
        The paths of two PNG files and one SVG file.
    """
    examples = []
    for category in dict.fromkeys(labelled.category for labelled in images):
        members = [labelled for labelled in images if labelled.category == category]
        examples += [members[k] for k in np.unique(np.linspace(0, len(members) - 1, 3).astype(int))]
    failures = sorted(images, key=lambda labelled: metrics.iou(labelled.image.masks[FULL], labelled.image.truth))[:10]
    paths = [folder / f"{stem}-{kind}" for kind in ("examples.png", "failures.png", "sizes.svg")]
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(paths, (examples, failures), strict=False):
        write_png(path, _gallery(part))
    groups = size_groups(images)
    series = {"m0": [100 * g.coarse_iou for g in groups], "F2PAD": [100 * g.iou for g in groups]}
    chart = bar_chart(title, [f"{g.name} % ({g.count})" for g in groups], series, high=100.0, y="IoU")
    write_atomically(paths[2], standalone(chart))
    return paths


def _gallery(images: Sequence[Labelled]) -> np.ndarray:
    """Returns a picture with a row for each image."""
    rows, labels = [], []
    for category, i in images:
        mask = i.masks[FULL]
        rows.append([i.image, i.truth, i.coarse_mask, mask, overlay(i.image, mask), i.normal])
        before, after = metrics.iou(i.coarse_mask, i.truth), metrics.iou(mask, i.truth)
        labels.append(f"{category}\n{i.name}\nIoU m0 {before:.3f}\nrefined {after:.3f}")
    titles = ("input", "ground truth", "coarse mask", "refined mask", "outline", "restored")
    return gallery(rows, titles, labels)
