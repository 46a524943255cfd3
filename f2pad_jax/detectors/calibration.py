"""Calibration of a fitted detector on normal images that it was not fitted to."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, UInt16

from f2pad_jax.data.cutpaste import irregular_shape, paste_noise, paste_stain, paste_tint
from f2pad_jax.detectors.base import ORIGIN, AbstractDetector, Calibration, Factors, NormalImages, counted
from f2pad_jax.detectors.normality import Normality
from f2pad_jax.detectors.prior import fit_prior
from f2pad_jax.images.pixels import normalise
from f2pad_jax.progress import Progress, silent

EXTENT = 0.7
"""Height of the threshold of m0 between the ordinary level and the limit of the maps' maxima."""
NUM_DEFECTS = 30
"""Number of synthetic defects, which show whether the detector suits the images."""
PASTES = (paste_tint, paste_stain, paste_noise)
"""Kinds of synthetic defects."""
TRIES = 50
"""Number of draws of a shape of which at least half counts; then all pixels that count are the shape."""
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
    """Returns the detector with its scale, pixel prior, images for the inpainter, threshold and normality, without a label.

    Args:
        detector: fitted detector, calibrated or not.
        images: normal images that the detector was not fitted to.
        others: more normal images, for the pixel prior and the exemplars.
        num_components: largest number of Gaussians of the pixel prior.
        num_exemplars: largest number of images kept for the inpainter.
        seed: seed of everything drawn at random.
        progress: function that receives stage, number done and total.
    """
    detector = with_scale(detector, images, others, num_components, num_exemplars, seed, progress)
    defects = maps_of(detector, faint_defects(images, seed), "maps of synthetic defects", progress)
    return with_maps(detector, maps_of(detector, images, "maps of normal images", progress), defects)


def with_scale(
    detector: D,
    images: NormalImages,
    others: NormalImages | None,
    num_components: int,
    num_exemplars: int,
    seed: int,
    progress: Progress,
) -> D:
    """Returns the detector with the part of the calibration that needs no map: scale, pixel prior and exemplars.

    It takes the arguments of :func:`calibrate`.
    """
    rng = np.random.default_rng(seed)
    stored = [*images.stored, *(others.stored if others else ())]
    progress("pixel prior", 0, 1)
    prior = fit_prior(sampled_pixels(rng, stored, images.ignored), num_components=num_components, seed=seed)
    progress("pixel prior", 1, 1)
    indices = np.sort(rng.permutation(len(stored))[:num_exemplars])
    normals = jnp.asarray(np.stack([np.rint(stored[i] / 257).astype(np.uint8) for i in indices])) if len(indices) else None
    scale = float(np.mean([_mean_score(detector, images[i]) for i in range(len(images))]))
    unset = jnp.float32(0)
    one = jnp.float32(1)  # an array, as in a tuned detector: both run the same programs
    factors = Factors(one, one)
    ignored = None if images.ignored is None else jnp.asarray(images.ignored)
    levels = jnp.float32(max(scale, 1e-6)), unset, unset
    return with_calibration(detector, Calibration(*levels, prior, normals, factors, ignored))


def faint_defects(images: NormalImages, seed: int) -> NormalImages:
    """Returns images with a synthetic defect each: a tint, a stain or noise, in turn, in an irregular shape."""

    def drawn_shape(rng: np.random.Generator) -> Bool[np.ndarray, "h w"]:
        counted = np.ones(images.size, bool) if images.ignored is None else ~images.ignored
        for _ in range(TRIES):
            shape = irregular_shape(rng, images.size)
            if np.mean(counted[shape]) >= 0.5:
                return shape & counted
        return counted

    def defective(k: int) -> Float[np.ndarray, "h w 3"]:
        rng, normal = np.random.default_rng([seed, k]), images.pixels(k % len(images)).astype(np.float32) / 65535
        return np.clip(PASTES[k % len(PASTES)](rng, normal, drawn_shape(rng)).image, 0, 1)

    return NormalImages((defective(k) for k in range(NUM_DEFECTS)), images.size)


def maps_of(
    detector: AbstractDetector, images: NormalImages, stage: str, progress: Progress
) -> Float16[np.ndarray, "n h w"]:
    """Returns the anomaly maps of images, with 16 bits a pixel."""
    maps = np.empty((len(images), *images.size), np.float16)
    for i in range(len(images)):
        progress(stage, i, len(images))
        maps[i] = np.minimum(_map(detector, images[i]), np.finfo(np.float16).max)
    progress(stage, len(images), len(images))
    return maps


def with_maps(
    detector: D,
    maps: Float[np.ndarray, "n h w"],
    defects: Float[np.ndarray, "k h w"],
    parts: Sequence[Sequence[int]] | None = None,
) -> D:
    """Returns the detector with ordinary level, threshold and normality, from maps of images that no fit had seen.

    The ordinary level is the mean of the maps. The threshold lies :data:`EXTENT` of the way from the ordinary level to
    the limit that the maxima of 5 % of the maps exceed. It says how far a defect reaches, not whether there is one.
    ``defects`` and ``parts`` are the arguments of :meth:`Normality.of`.
    """
    ordinary = float(np.mean(maps, dtype=np.float64))
    return _with_levels(detector, ordinary, Normality.of(maps, defects, parts))


def with_more_maps(detector: D, maps: Float[np.ndarray, "m h w"]) -> D:
    """Returns the detector with levels and normality of its maps and of maps of further images, as :func:`with_maps`."""
    c = detector.calibrated
    assert c.normality is not None
    before, count = len(c.normality.scores), len(c.normality.scores) + len(maps)
    ordinary = (before * float(c.ordinary) + float(np.sum(np.mean(maps, axis=(1, 2), dtype=np.float64)))) / count
    return _with_levels(detector, ordinary, c.normality.extended(maps))


def _with_levels(detector: D, ordinary: float, normality: Normality) -> D:
    """Returns the detector with these measurements of maps, and with the threshold that follows from them."""
    highest = float(np.quantile(normality.maxima, 0.95))
    threshold = jnp.float32(ordinary + EXTENT * (highest - ordinary))
    levels = {"ordinary": jnp.float32(ordinary), "threshold": threshold, "normality": normality}
    return with_calibration(detector, dataclasses.replace(detector.calibrated, **levels))


def sampled_pixels(
    rng: np.random.Generator, stored: list[UInt16[np.ndarray, "h w 3"]], ignored: Bool[np.ndarray, "h w"] | None
) -> Float[np.ndarray, "n 3"]:
    """Returns about :data:`NUM_PIXELS` pixels that count, equally many of each image, in normalised intensity."""
    each, kept = -(-NUM_PIXELS // len(stored)), slice(None) if ignored is None else ~ignored.ravel()
    pixels = [rng.choice(image.reshape(-1, 3)[kept], each) for image in stored]
    return np.asarray(normalise(np.concatenate(pixels) / 65535))


def with_calibration(detector: D, calibration: Calibration) -> D:
    """Returns the detector with another calibration."""
    return dataclasses.replace(detector, calibration=calibration)


@jax.jit
def _mean_score(detector: AbstractDetector, image: Float[Array, "h w 3"]) -> Float[Array, ""]:
    """Returns the mean raw score over all positions of all layers."""
    scores = detector.raw_scores(image, detector.locate(image, ORIGIN))
    return sum((jnp.sum(s) for s in scores), jnp.float32(0)) / sum(s.size for s in scores)


@jax.jit
def _map(detector: AbstractDetector, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
    return counted(detector.anomaly_map(image), detector.calibrated.ignored)
