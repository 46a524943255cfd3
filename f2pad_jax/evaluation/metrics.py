"""Segmentation metrics: of masks (paper, Eq. 17; boundaries), and of maps at every threshold."""

import numpy as np
import scipy.ndimage
import sklearn.metrics
from jaxtyping import Bool, Float


def iou(mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """Intersection over union, 0..1; 1 where both are empty."""
    union = np.sum(mask | truth)
    return float(np.sum(mask & truth) / union) if union else 1.0


def dice(mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """DICE coefficient, 0..1; 1 where both are empty."""
    total = np.sum(mask) + np.sum(truth)
    return float(2 * np.sum(mask & truth) / total) if total else 1.0


def best_threshold(maps: Float[np.ndarray, "n *p"], truth: Bool[np.ndarray, "n *p"], *, each: bool = False) -> float:
    """The threshold of best pixel F1 over all images together: a pixel is anomalous where its value exceeds it.

    The paper's protocol for backbones (Section IV-A3). With ``each``, the threshold of the best mean over ``n`` of every
    one's own F1, to which a small or faint defect counts as much as a large one.
    """
    rows = len(maps) if each else 1
    maps, truth = maps.reshape(rows, -1), truth.reshape(rows, -1)
    order = np.argsort(-maps, axis=1, kind="stable")
    values, hits = np.take_along_axis(maps, order, axis=1), np.take_along_axis(truth, order, axis=1)
    if not hits.any():
        return float(values.max())
    true_positives = np.cumsum(hits, axis=1)
    f1 = 2 * true_positives / (np.arange(1, hits.shape[1] + 1) + true_positives[:, -1:])
    gains = np.diff(f1, axis=1, prepend=0)  # what each pixel adds to its own F1 once it is above the threshold
    order = np.argsort(-values, axis=None, kind="stable")
    values, total = values.ravel()[order], np.cumsum(gains.ravel()[order])
    total[:-1][values[:-1] == values[1:]] = -1  # equal values can't be told apart
    best = int(np.argmax(total))
    if best + 1 == values.size:
        return float(np.nextafter(values[best], values.dtype.type(-np.inf)))
    between = values[best + 1] + (values[best] - values[best + 1]) / 2
    return float(between if between < values[best] else values[best + 1])


def f1_max(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"]) -> float:
    """The best pixel F1 of any threshold, pixels of all images pooled, 0..1."""
    return dice((maps > best_threshold(maps, truth)).reshape(1, -1), truth.reshape(1, -1))


def average_precision(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"]) -> float:
    """Area under the pixel precision-recall curve, all images pooled, 0..1 (scikit-learn's); NaN without a defect."""
    return float(sklearn.metrics.average_precision_score(truth.ravel(), maps.ravel())) if truth.any() else float("nan")


def auroc(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"]) -> float:
    """Area under the pixel ROC curve, all images pooled, 0..1 (scikit-learn's); NaN where all pixels are of one class."""
    if truth.all() or not truth.any():
        return float("nan")
    return float(sklearn.metrics.roc_auc_score(truth.ravel(), maps.ravel()))


def aupro(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"], *, max_fpr: float = 0.3) -> float:
    """Area under the per-region overlap (Bergmann et al., IJCV 2021), 0..1; NaN without a defect or a normal pixel.

    At every threshold: the share of each connected defect (8-neighbours) that is found, on average, against the false
    positive rate over all pixels; integrated up to ``max_fpr`` and divided by it.
    """
    if truth.all() or not truth.any():
        return float("nan")
    found = np.zeros(truth.shape)  # what each pixel adds to the mean overlap once it is above the threshold
    regions = 0
    for weight, mask in zip(found, truth, strict=True):
        labels = np.empty(mask.shape, np.int32)
        scipy.ndimage.label(mask, np.ones((3, 3)), output=labels)
        weight[mask] = 1 / np.bincount(labels.ravel())[labels[mask]]
        regions += int(labels.max())
    order = np.argsort(-maps, axis=None, kind="stable")
    values, overlap = maps.ravel()[order], np.cumsum(found.ravel()[order]) / regions
    fpr = np.cumsum(~truth.ravel()[order]) / np.sum(~truth)
    last = np.append(values[:-1] != values[1:], True)  # equal values can't be told apart
    fpr, overlap = np.append(0.0, fpr[last]), np.append(0.0, overlap[last])
    inside = fpr <= max_fpr
    fpr, overlap = np.append(fpr[inside], max_fpr), np.append(overlap[inside], np.interp(max_fpr, fpr, overlap))
    return float(np.trapezoid(overlap, fpr) / max_fpr)


def boundary_f1(mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"], tolerance: float | int) -> float:
    """How well two outlines agree (Csurka et al., BMVC 2013), 0..1; 1 where both masks are empty, 0 where one is.

    The F1 of two shares: of the mask's outline that lies within ``tolerance`` pixels (Euclidean) of the truth's, and of the
    truth's within that of the mask's. An outline is the pixels of a mask with one of four neighbours outside of it.
    """
    outlines = [m & ~np.asarray(scipy.ndimage.binary_erosion(m, border_value=1), bool) for m in (mask, truth)]
    if not all(outline.any() for outline in outlines):
        return float(np.array_equal(mask, truth))
    near = [np.asarray(scipy.ndimage.distance_transform_edt(np.logical_not(outline))) <= tolerance for outline in outlines]
    precision, recall = near[1][outlines[0]].mean(), near[0][outlines[1]].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0
