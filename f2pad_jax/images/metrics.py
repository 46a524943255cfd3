"""Metrics of masks (paper, Eq. 17, and of their outlines), and of anomaly maps over all thresholds."""

from collections.abc import Sequence

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float


def iou(mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """Returns the intersection over union, 0..1; 1 if both masks are empty."""
    union = np.sum(mask | truth)
    return float(np.sum(mask & truth) / union) if union else 1.0


def dice(mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """Returns the DICE coefficient, 0..1; 1 if both masks are empty."""
    total = np.sum(mask) + np.sum(truth)
    return float(2 * np.sum(mask & truth) / total) if total else 1.0


def best_threshold(maps: Float[np.ndarray, "n *p"], truth: Bool[np.ndarray, "n *p"]) -> float:
    """Returns the threshold with the best pixel F1 over all images pooled; pixels above the threshold are anomalous.

    This is the paper's protocol for backbones (Section IV-A3).
    """
    order = np.argsort(-maps, axis=None, kind="stable")
    values, hits = maps.ravel()[order], truth.ravel()[order]
    if not hits.any():
        return float(values[0])
    true_positives = np.cumsum(hits)
    f1 = 2 * true_positives / (np.arange(1, len(hits) + 1) + true_positives[-1])
    f1[:-1][values[:-1] == values[1:]] = -1  # no threshold separates equal values
    best = int(np.argmax(f1))
    if best + 1 == values.size:
        return float(np.nextafter(values[best], values.dtype.type(-np.inf)))
    between = values[best + 1] + (values[best] - values[best + 1]) / 2
    return float(between if between < values[best] else values[best + 1])


def f1_max(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"]) -> float:
    """Returns the best pixel F1 over all thresholds, all images pooled, 0..1."""
    return dice((maps > best_threshold(maps, truth)).reshape(1, -1), truth.reshape(1, -1))


def average_precision(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"]) -> float:
    """Returns the area under the pixel precision-recall curve, 0..1, all images pooled; NaN without a defect."""
    from sklearn.metrics import average_precision_score  # imported by the few who need it: it takes most of a second

    return float(average_precision_score(truth.ravel(), maps.ravel())) if truth.any() else float("nan")


def auroc(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"]) -> float:
    """Returns the area under the pixel ROC curve, 0..1, all images pooled; NaN if one class is missing."""
    from sklearn.metrics import roc_auc_score

    if truth.all() or not truth.any():
        return float("nan")
    return float(roc_auc_score(truth.ravel(), maps.ravel()))


def aupro(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"], *, max_fpr: float = 0.3) -> float:
    """Returns the area under the per-region overlap curve (Bergmann et al., IJCV 2021), 0..1; NaN if one class is missing.

    The overlap at a threshold is the mean detected share of the connected defects (8-neighbours). It is integrated over the
    false positive rate of all pixels, up to ``max_fpr``, and divided by ``max_fpr``.
    """
    (area,) = aupros(maps, truth, (max_fpr,))
    return area


def aupros(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"], limits: Sequence[float]) -> list[float]:
    """Returns :func:`aupro` up to each limit of the false positive rate, from one curve."""
    if truth.all() or not truth.any():
        return [float("nan")] * len(limits)
    weights = np.zeros(truth.shape)  # 1 / size of the pixel's defect
    regions = 0
    for weight, mask in zip(weights, truth, strict=True):
        labels = np.empty(mask.shape, np.int32)
        scipy.ndimage.label(mask, np.ones((3, 3)), output=labels)
        weight[mask] = 1 / np.bincount(labels.ravel())[labels[mask]]
        regions += int(labels.max())
    order = np.argsort(-maps, axis=None, kind="stable")
    values, overlap = maps.ravel()[order], np.cumsum(weights.ravel()[order]) / regions
    fpr = np.cumsum(~truth.ravel()[order]) / np.sum(~truth)
    last = np.append(values[:-1] != values[1:], True)  # no threshold separates equal values
    fpr, overlap = np.append(0.0, fpr[last]), np.append(0.0, overlap[last])

    def area(limit: float) -> float:
        inside = fpr <= limit
        x, y = np.append(fpr[inside], limit), np.append(overlap[inside], np.interp(limit, fpr, overlap))
        return float(np.trapezoid(y, x) / limit)

    return [area(limit) for limit in limits]


def boundary_f1(mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"], tolerance: float | int) -> float:
    """Returns the F1 of two outlines (Csurka et al., BMVC 2013), 0..1; 1 if both masks are empty, 0 if only one is empty.

    Precision is the share of the mask's outline within ``tolerance`` pixels (Euclidean) of the truth's outline. Recall
    exchanges mask and truth. An outline is the set of a mask's pixels with at least one of 4 neighbours outside the mask.
    """
    outlines = [m & ~np.asarray(scipy.ndimage.binary_erosion(m, border_value=1), bool) for m in (mask, truth)]
    if not all(outline.any() for outline in outlines):
        return float(np.array_equal(mask, truth))
    near = [np.asarray(scipy.ndimage.distance_transform_edt(np.logical_not(outline))) <= tolerance for outline in outlines]
    precision, recall = near[1][outlines[0]].mean(), near[0][outlines[1]].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0
