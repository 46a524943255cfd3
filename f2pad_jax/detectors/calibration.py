"""Calibration of a fitted detector on normal images and synthetic defects."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt16

from f2pad_jax.data.cutpaste import irregular_shape, paste_noise, paste_stain, paste_tint
from f2pad_jax.detectors.base import ORIGIN, AbstractDetector, Calibration, Factors, NormalImages, half_height
from f2pad_jax.detectors.prior import fit_prior
from f2pad_jax.images.metrics import best_threshold
from f2pad_jax.images.pixels import denormalise, normalise
from f2pad_jax.progress import Progress, silent

NUM_DEFECTS = 24
"""Smallest number of synthetic defects of each kind."""
NUM_PIXELS = 20_000
"""Number of pixels to which the prior is fitted."""

D = TypeVar("D", bound=AbstractDetector)


def calibrate(
    detector: D,
    images: NormalImages,
    *,
    others: NormalImages | None = None,
    num_components: int = 6,
    num_exemplars: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> D:
    """Returns the detector with its scale, threshold, pixel prior and images for the inpainter, measured without a label.

    The threshold has the best pixel F1 on average over synthetic defects, each evaluated with the normal image it is pasted
    on. The defects are tints from faint to opaque, stains and foreign texture. Flat patches of glaring colours, as in the
    paper's tests, would put the threshold far above most real defects. The F1 over all images pooled would also put it too
    high, since large and glaring defects dominate this F1.

    Args:
        detector: fitted detector, calibrated or not.
        images: normal images that the detector was not fitted to, for the scale and the threshold.
        others: more normal images, for the pixel prior and the exemplars.
        num_components: largest number of Gaussians of the pixel prior.
        num_exemplars: largest number of images kept for the inpainter.
        seed: seed of everything drawn at random.
        progress: function that receives stage, number done and total.
    """
    rng = np.random.default_rng(seed)
    stored = [*images.stored, *(others.stored if others else ())]
    progress("pixel prior", 0, 1)
    prior = fit_prior(sampled_pixels(rng, stored), num_components=num_components, seed=seed)
    progress("pixel prior", 1, 1)
    indices = np.sort(rng.permutation(len(stored))[:num_exemplars])
    normals = jnp.asarray(np.stack([np.rint(stored[i] / 257).astype(np.uint8) for i in indices])) if len(indices) else None

    scale = float(np.mean([_mean_score(detector, images[i]) for i in range(len(images))]))
    unset = jnp.float32(0)
    one = jnp.float32(1)  # an array, as in a tuned detector: both run the same programs
    calibration = Calibration(jnp.float32(max(scale, 1e-6)), unset, unset, prior, normals, Factors(one, one))
    detector = with_calibration(detector, calibration)
    normal_maps = [np.asarray(_map(detector, images[i])) for i in range(len(images))]
    ordinary = float(np.mean(normal_maps))
    maps, masks = [], []
    for i in range(len(images)):
        progress("threshold", i, len(images))
        unit = np.asarray(denormalise(images[i]))
        for paste in (paste_tint, paste_stain, paste_noise) * -(-NUM_DEFECTS // len(images)):
            defective = paste(rng, unit, irregular_shape(rng, images.size))
            maps.append([normal_maps[i], np.asarray(_map(detector, normalise(defective.image)))])
            masks.append([np.zeros(images.size, bool), defective.mask])
    progress("threshold", len(images), len(images))
    lowest = np.min(maps)  # pixels below half of a map's peak belong to no mask
    maps = np.stack([[np.where(m > half_height(m, ordinary), m, lowest) for m in pair] for pair in maps])
    threshold = best_threshold(maps, np.stack(masks), each=True)
    threshold, ordinary = jnp.float32(threshold), jnp.float32(ordinary)
    return with_calibration(detector, dataclasses.replace(calibration, ordinary=ordinary, threshold=threshold))


def sampled_pixels(rng: np.random.Generator, stored: list[UInt16[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "n 3"]:
    """Returns about :data:`NUM_PIXELS` pixels, equally many of each image, in normalised intensity."""
    each = -(-NUM_PIXELS // len(stored))
    return np.asarray(normalise(np.concatenate([rng.choice(image.reshape(-1, 3), each) for image in stored]) / 65535))


def with_calibration(detector: D, calibration: Calibration) -> D:
    """Returns the detector with another calibration."""
    return dataclasses.replace(detector, calibration=calibration)


@jax.jit
def _mean_score(detector: AbstractDetector, image: Float[Array, "h w 3"]) -> Float[Array, ""]:
    """Returns the mean raw score over all positions of all layers."""
    scores = detector.raw_scores(image, detector.locate(image, ORIGIN))
    return sum((jnp.sum(s) for s in scores), jnp.zeros(())) / sum(s.size for s in scores)


@jax.jit
def _map(detector: AbstractDetector, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
    return detector.anomaly_map(image)
