"""``fit``: any method on normal images, calibrated without a label."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt16

from f2pad_jax.backbones import Backbone, find_network, load_backbone
from f2pad_jax.data.cutpaste import irregular_shape, paste_noise, paste_stain, paste_tint
from f2pad_jax.detectors.base import ORIGIN, AbstractDetector, Calibration, NormalImages, half_height
from f2pad_jax.errors import ImageError
from f2pad_jax.evaluation.metrics import best_threshold
from f2pad_jax.prior import fit_prior
from f2pad_jax.progress import Progress, silent
from f2pad_jax.units import denormalise, normalise

MAX_HELD_OUT = 32
"""Most images held out for calibration."""
NUM_DEFECTS = 24
"""Synthetic defects of each kind, at least."""
NUM_PIXELS = 20_000
"""Pixels the prior is fitted to."""


class Trial(NamedTuple):
    """What tuning tried, and how it did."""

    alpha1: float
    sparsity: float
    num_components: int
    """Most Gaussians of the pixel prior."""
    iou: float
    """Mean over synthetic defects, 0..1."""
    images: int
    """How many, the first ones."""
    gain: float
    """Mean IoU over that of the best before it, on the same defects."""
    error: float
    """Of the gain: its standard error."""
    chosen: bool


D = TypeVar("D", bound=AbstractDetector)


def fit(
    method: type[D],
    images: Iterable[Shaped[np.ndarray | Array, "..."]],
    backbone: Backbone | str,
    *,
    size: tuple[int, int] = (224, 224),
    num_components: int = 6,
    num_exemplars: int = 16,
    tuning: list[Trial] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> D:
    """Fit a detector to defect-free images, and calibrate it without a label.

    One image in five, at most 32, is held out at first. The method is fitted to the others, and the held-out images, as
    they are and with synthetic defects pasted on them, give the scale of the scores and the threshold. Then it is fitted
    again to all of them, if it can be (see :attr:`AbstractDetector.refits`; a flow takes too long).

    Args:
        method: :class:`~f2pad_jax.PaDiM`, :class:`~f2pad_jax.PatchCore`, :class:`~f2pad_jax.CFlow` or one of your own.
        images: at least two normal images, each as :func:`~f2pad_jax.units.to_unit` takes them; any sizes. They are read
            once and kept at the detector's size, 6 bytes a pixel.
        backbone: frozen feature extractor, or the name of one, with the layers the method taps by default.
        size: height and width images are resized to, multiples of the backbone's stride.
        num_components: most Gaussians of the pixel prior.
        num_exemplars: most training images kept for the inpainter to borrow from.
        tuning: a list, if the weights of the pixel prior and of sparsity and the number of Gaussians are to be tuned as
            well (:func:`f2pad_jax.evaluation.tune.tune`, some minutes); what was tried is appended to it.
        seed: of everything drawn at random.
        progress: told how far it is.
        options: the method's own, such as ``rank`` of :meth:`PaDiM.fit`.

    Raises:
        ImageError: fewer than two images, or one that can't be used; or the size doesn't suit the backbone.
        CheckpointError: the backbone's weights are missing.
    """
    normals = NormalImages(images, size)
    if len(normals) < 2:
        raise ImageError(
            f"fitting needs at least two normal images; got {len(normals)}: what ordinary scores are is measured on "
            "images held out of the fit"
        )
    if isinstance(backbone, str):
        layers = method.default_layers(find_network(backbone), len(normals))
        backbone = load_backbone(backbone, layers=layers)
    if any(side % backbone.stride or side <= 0 for side in size):
        raise ImageError(f"size {size} is not a multiple of the backbone's stride {backbone.stride}")
    held_out, others = split(len(normals), seed)
    within = (lambda stage, *count: progress(f"held-out fit: {stage}", *count)) if method.refits else progress
    detector = method.fit(normals.subset(others), backbone, seed=seed, progress=within, **options)
    settings = {"num_components": num_components, "num_exemplars": num_exemplars, "seed": seed, "progress": progress}
    detector = calibrate(detector, normals.subset(held_out), others=normals.subset(others), **settings)
    if tuning is not None:
        from f2pad_jax.evaluation.tune import tune  # which refines, and so needs detectors

        detector, trials = tune(detector, normals.subset(held_out), normals.subset(others), seed=seed, progress=progress)
        tuning += trials
    if "resume" in options:
        Path(options["resume"]).unlink(missing_ok=True)
    if not method.refits:
        return detector
    return with_calibration(method.fit(normals, backbone, seed=seed, progress=progress, **options), detector.calibrated)


def split(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices held out of ``count`` images, one in five and at most :data:`MAX_HELD_OUT`, and the others, ascending."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = min(max(count // 5, 1), MAX_HELD_OUT)
    return sorted(map(int, order[:held_out])), sorted(map(int, order[held_out:]))


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
    """Give a detector its scale, threshold, pixel prior and exemplars. No label is needed.

    The threshold is that of the best pixel F1, mean over synthetic defects, each with the normal image it is pasted on:
    tints from faint to opaque, stains, and foreign texture. (Flat patches of far colours, as in the paper's tests, would
    put it far above most real defects; so would the F1 of all pixels together, of which large and glaring defects have
    nearly all, and where a map saturates, as CFLOW's does, above every other.)

    Args:
        detector: fitted, calibrated or not.
        images: normal images it has not been fitted to, for the scale and the threshold.
        others: more normal images, for the pixel prior and the exemplars.
        num_components: most Gaussians of the pixel prior.
        num_exemplars: most images kept for the inpainter to borrow from.
        seed: of everything drawn at random.
        progress: told how far it is.
    """
    rng = np.random.default_rng(seed)
    stored = [*images.stored, *(others.stored if others else ())]
    progress("pixel prior", 0, 1)
    prior = fit_prior(sampled_pixels(rng, stored), num_components=num_components, seed=seed)
    progress("pixel prior", 1, 1)
    kept = np.sort(rng.permutation(len(stored))[:num_exemplars])
    normals = jnp.asarray(np.stack([np.rint(stored[i] / 257).astype(np.uint8) for i in kept])) if len(kept) else None

    scale = float(np.mean([_mean_score(detector, images[i]) for i in range(len(images))]))
    unset = jnp.float32(0)
    calibration = Calibration(jnp.float32(max(scale, 1e-6)), unset, unset, prior, normals)
    detector = with_calibration(detector, calibration)
    levels = [np.asarray(_map(detector, images[i])) for i in range(len(images))]
    ordinary = float(np.mean(levels))
    maps, masks = [], []
    for i in range(len(images)):
        progress("threshold", i, len(images))
        unit = np.asarray(denormalise(images[i]))
        for paste in (paste_tint, paste_stain, paste_noise) * -(-NUM_DEFECTS // len(images)):
            defective = paste(rng, unit, irregular_shape(rng, images.size))
            maps.append([levels[i], np.asarray(_map(detector, normalise(defective.image)))])
            masks.append([np.zeros(images.size, bool), defective.mask])
    progress("threshold", len(images), len(images))
    lowest = np.min(maps)  # what is in the lower half belongs to no mask, whatever the threshold
    maps = np.stack([[np.where(m > half_height(m, ordinary), m, lowest) for m in pair] for pair in maps])
    threshold = best_threshold(maps, np.stack(masks), each=True)
    threshold, ordinary = jnp.float32(threshold), jnp.float32(ordinary)
    return with_calibration(detector, dataclasses.replace(calibration, ordinary=ordinary, threshold=threshold))


def sampled_pixels(rng: np.random.Generator, stored: list[UInt16[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "n 3"]:
    """About :data:`NUM_PIXELS` values of some images, as many of each, in normalised intensity."""
    each = -(-NUM_PIXELS // len(stored))
    return np.asarray(normalise(np.concatenate([rng.choice(image.reshape(-1, 3), each) for image in stored]) / 65535))


def with_calibration(detector: D, calibration: Calibration) -> D:
    """The detector with another calibration."""
    return dataclasses.replace(detector, calibration=calibration)


@jax.jit
def _mean_score(detector: AbstractDetector, image: Float[Array, "h w 3"]) -> Float[Array, ""]:
    """Mean raw score over all positions of all layers."""
    scores = detector.raw_scores(image, detector.locate(image, ORIGIN))
    return sum((jnp.sum(s) for s in scores), jnp.zeros(())) / sum(s.size for s in scores)


@jax.jit
def _map(detector: AbstractDetector, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
    return detector.anomaly_map(image)
