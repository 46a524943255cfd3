"""Segmentation metrics (paper, Eq. 17) and the F1-optimal threshold."""

import numpy as np
from jaxtyping import Bool, Float


def iou(mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """Intersection over union, 0..1; 1 where both are empty."""
    union = np.sum(mask | truth)
    return float(np.sum(mask & truth) / union) if union else 1.0


def dice(mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"]) -> float:
    """DICE coefficient, 0..1; 1 where both are empty."""
    total = np.sum(mask) + np.sum(truth)
    return float(2 * np.sum(mask & truth) / total) if total else 1.0


def best_threshold(maps: Float[np.ndarray, "n h w"], truth: Bool[np.ndarray, "n h w"]) -> float:
    """The threshold of best pixel F1 over all images together: a pixel is anomalous where its value exceeds it.

    The paper's protocol for backbones (Section IV-A3).
    """
    order = np.argsort(-maps, axis=None, kind="stable")
    values, hits = maps.ravel()[order], truth.ravel()[order]
    if not hits.any():
        return float(values[0])
    true_positives = np.cumsum(hits)
    f1 = 2 * true_positives / (np.arange(1, hits.size + 1) + true_positives[-1])
    f1[:-1][values[:-1] == values[1:]] = -1  # equal values can't be told apart
    best = int(np.argmax(f1))
    if best + 1 == values.size:
        return float(np.nextafter(values[best], values.dtype.type(-np.inf)))
    between = values[best + 1] + (values[best] - values[best + 1]) / 2
    return float(between if between < values[best] else values[best + 1])
