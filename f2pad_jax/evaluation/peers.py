"""What an engineer would try first: other ways from the same coarse map to a sharper mask, to compare with."""

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float


def guided_filter(
    image: Float[np.ndarray, "h w 3"], values: Float[np.ndarray, "h w"], *, radius: int = 8, epsilon: float = 1e-3
) -> Float[np.ndarray, "h w"]:
    """Edge-aware smoothing of ``values`` by a local linear model in the colours of ``image`` (He et al., TPAMI 2013).

    Args:
        image: the guide, 0..1.
        values: what to smooth, such as a coarse map or mask.
        radius: of the windows, pixels.
        epsilon: ridge of the local model, squared units of the guide.
    """

    def mean(a: np.ndarray) -> np.ndarray:
        return scipy.ndimage.uniform_filter(a, 2 * radius + 1, mode="nearest", axes=(0, 1))

    image, values = image.astype(np.float64), values.astype(np.float64)
    mean_image, mean_values = mean(image), mean(values)
    outer = image[..., :, None] * image[..., None, :]
    covariance = mean(outer) - mean_image[..., :, None] * mean_image[..., None, :]
    shared = mean(image * values[..., None]) - mean_image * mean_values[..., None]
    slope = np.linalg.solve(covariance + epsilon * np.eye(3), shared[..., None])[..., 0]
    offset = mean_values - np.sum(slope * mean_image, axis=-1)
    return np.sum(mean(slope) * image, axis=-1) + mean(offset)


def guided_mask(image: Float[np.ndarray, "h w 3"], coarse_mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """m0 through :func:`guided_filter`, above one half."""
    return guided_filter(image, coarse_mask.astype(np.float64)) > 0.5


def grabcut(
    image: Float[np.ndarray, "h w 3"],
    coarse_mask: Bool[np.ndarray, "h w"],
    region: Bool[np.ndarray, "h w"],
    *,
    num_steps: int = 5,
) -> Bool[np.ndarray, "h w"]:
    """GrabCut (Rother et al. 2004, OpenCV's): m0 probably foreground, the rest of the region probably not, all else not.

    Needs OpenCV: ``pip install opencv-python-headless``.
    """
    import cv2

    if not coarse_mask.any():
        return coarse_mask.copy()
    labels = np.full(coarse_mask.shape, cv2.GC_BGD, np.uint8)
    labels[region] = cv2.GC_PR_BGD
    labels[coarse_mask] = cv2.GC_PR_FGD
    if not (labels != cv2.GC_PR_FGD).any():
        return coarse_mask.copy()
    pixels = np.ascontiguousarray(np.rint(255 * image).astype(np.uint8)[..., ::-1])
    cv2.setRNGSeed(0)
    cv2.grabCut(pixels, labels, (0, 0, 1, 1), np.zeros((1, 65)), np.zeros((1, 65)), num_steps, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def stable_mask(
    anomaly_map: Float[np.ndarray, "h w"], low: float, high: float, *, num_levels: int = 64, min_length: int = 4
) -> Bool[np.ndarray, "h w"]:
    """The map above the threshold at which its parts are the most stable, after MEBin (Huang et al., CVPR 2025).

    The threshold falls from ``high`` to ``low``. Of the intervals over which the number of connected parts (8-neighbours)
    stays the same and is not zero, the longest gives the mask, at its lower end; where none is as long as ``min_length``
    levels, the image is good. Departure: MEBin erodes the mask before it counts.

    Args:
        anomaly_map: of one image.
        low: the lowest value of all images' maps.
        high: their highest.
        num_levels: thresholds that are tried.
        min_length: the shortest interval that counts as stable.
    """
    levels = np.linspace(high, low, num_levels, endpoint=False)
    counts = np.array([scipy.ndimage.label(anomaly_map > t, np.ones((3, 3)))[1] for t in levels])  # pyright: ignore
    starts = np.flatnonzero(np.append(True, counts[1:] != counts[:-1]))
    lengths = np.diff(np.append(starts, num_levels)) * (counts[starts] > 0)
    best = int(np.argmax(lengths))
    if lengths[best] < min_length:
        return np.zeros(anomaly_map.shape, bool)
    return anomaly_map > levels[starts[best] + lengths[best] - 1]
