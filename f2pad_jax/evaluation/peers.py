"""Peers of refinement: other ways from the coarse map to a sharper mask, to compare with."""

import contextlib
import warnings
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float
from skimage.segmentation import random_walker

from f2pad_jax.evaluation._store import ImageResult
from f2pad_jax.images._smoothing import guided


def peer_masks(images: Sequence[ImageResult]) -> dict[str, list[Bool[np.ndarray, "h w"]]]:
    """Returns the masks that each peer draws from the coarse maps and masks; GrabCut only where OpenCV is installed."""
    peaks = [float(i.coarse_map.max()) for i in images]
    masks = {
        "threshold": [i.coarse_mask for i in images],
        "guided filter": [guided_mask(i.image / 255, i.coarse_mask) for i in images],
        "random walker": [walker_mask(i.image / 255, i.coarse_mask, i.region) for i in images],
        "MEBin": [mebin(i.coarse_map, min(peaks), max(peaks)) for i in images],
    }
    with contextlib.suppress(ImportError):
        masks["GrabCut"] = [grabcut(i.image / 255, i.coarse_mask, i.region) for i in images]
    return masks


def guided_mask(image: Float[np.ndarray, "h w 3"], coarse_mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels where the guided filter of m0 (He et al., TPAMI 2013) exceeds one half. The image is in 0..1."""
    guide, values = (jnp.asarray(a, jnp.float32) for a in (image, coarse_mask))
    return np.asarray(guided(values, guide, 8, 0.03)) > 0.5


def grabcut(
    image: Float[np.ndarray, "h w 3"],
    coarse_mask: Bool[np.ndarray, "h w"],
    region: Bool[np.ndarray, "h w"],
    *,
    num_steps: int = 5,
) -> Bool[np.ndarray, "h w"]:
    """Segments by GrabCut (Rother et al. 2004, in OpenCV).

    Needs OpenCV: ``pip install opencv-python-headless``.

    Args:
        image: input, in 0..1.
        coarse_mask: m0, probably foreground.
        region: suspect region; its other pixels are probably background, and pixels outside it certainly.
        num_steps: number of iterations.
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


def core(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Returns the quarter of a mask's pixels that lies deepest inside."""
    depth = np.asarray(scipy.ndimage.distance_transform_edt(mask))
    return mask & (depth >= np.quantile(depth[mask], 0.75)) if mask.any() else mask


def walker_mask(
    image: Float[np.ndarray, "h w 3"],
    coarse_mask: Bool[np.ndarray, "h w"],
    region: Bool[np.ndarray, "h w"],
    *,
    beta: float = 130.0,
) -> Bool[np.ndarray, "h w"]:
    """Segments by a random walk from m0 and from the pixels outside the suspect region (Grady 2006, in scikit-image).

    Args:
        image: input, in 0..1.
        coarse_mask: m0; its core is foreground.
        region: suspect region; pixels outside are background.
        beta: penalty of a walk across an edge.
    """
    if not coarse_mask.any() or region.all():
        return coarse_mask.copy()
    labels = np.where(core(coarse_mask), 1, np.where(region, 0, 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The probability range")  # of about 1e-3, from the iterative solver
        return random_walker(image, labels, beta=beta, mode="cg_j", channel_axis=-1) == 1


def mebin(
    anomaly_map: Float[np.ndarray, "h w"],
    low: float,
    high: float,
    *,
    num_levels: int = 64,
    min_length: int = 4,
    erosion: int = 6,
) -> Bool[np.ndarray, "h w"]:
    """Cuts a map at the threshold where its connected parts are most stable: MEBin (Huang et al., CVPR 2025).

    The threshold falls from ``high`` to ``low``. The map is cut and eroded, and its connected parts (8-neighbours) are
    counted. Over some intervals their number is constant and not zero. The threshold at the lower end of the longest such
    interval gives the mask, eroded too. Where no interval has ``min_length`` levels, the mask is empty.

    Args:
        anomaly_map: map of one image.
        low: least of the images' highest values.
        high: greatest of the images' highest values.
        num_levels: number of thresholds.
        min_length: length of the shortest stable interval, levels.
        erosion: side of the square that erodes, pixels.
    """

    def cut(level: float) -> Bool[np.ndarray, "h w"]:
        square = np.ones((erosion, erosion))
        return np.asarray(scipy.ndimage.binary_erosion(anomaly_map > level, square, border_value=1))

    levels = np.linspace(high, low, num_levels, endpoint=False).tolist()
    counts = np.array([scipy.ndimage.label(cut(t), np.ones((3, 3)))[1] for t in levels])  # pyright: ignore
    starts = np.flatnonzero(np.append(True, counts[1:] != counts[:-1]))
    lengths = np.diff(np.append(starts, num_levels)) * (counts[starts] > 0)
    best = int(np.argmax(lengths))
    if lengths[best] < min_length:
        return np.zeros(anomaly_map.shape, bool)
    return cut(levels[starts[best] + lengths[best] - 1])
