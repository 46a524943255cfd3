"""Tuning of the weights of Eq. (12) for a category, without a label, on synthetic defects."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from f2pad_jax.backbones.backbone import Backbone
from f2pad_jax.data.cutpaste import Defective
from f2pad_jax.data.protocols import PROTOCOLS, Sources, shows_objects
from f2pad_jax.detectors.base import Factors, NormalImages
from f2pad_jax.detectors.calibration import D, sampled_pixels, with_calibration
from f2pad_jax.detectors.fitting import fit
from f2pad_jax.detectors.prior import PixelPrior, fit_prior
from f2pad_jax.images.metrics import iou
from f2pad_jax.method.settings import Settings
from f2pad_jax.progress import Progress, silent
from f2pad_jax.refinement import refine_many

SPARSITY = (float(Settings().sparsity), 0.75, 3.0)
"""Values of the sparsity, the default first."""
ALPHA1 = (float(Settings().alpha1), 0.003, 0.03)
"""Values of the weight of the pixel prior, the default first."""
COMPONENTS = (6, 3, 12)
"""Limits of the number of Gaussians of the pixel prior, the default first."""
NUM_IMAGES = 16
"""Number of synthetic defects."""
ROUND = 8
"""Number of defects in a round of the race: a value with a gain below :data:`GAIN` after a round is given up."""
GAIN = 0.005
"""Least gain of mean IoU for which a value replaces the best value so far."""
SHORT = Settings(restore_steps=0, false_alarms=1.0)
"""Settings that leave out the re-estimation of n, since only the mask is compared, and the verdict: all have a defect."""


class Choice(NamedTuple):
    """Values of the tuned quantities."""

    alpha1: float
    """Weight of the pixel prior."""
    sparsity: float
    """Sparsity, as in :class:`~f2pad_jax.Settings`."""
    num_components: int
    """Limit of the number of Gaussians of the pixel prior."""


class Trial(NamedTuple):
    """A choice and its result."""

    alpha1: float
    """Weight of the pixel prior."""
    sparsity: float
    """Sparsity, as in :class:`~f2pad_jax.Settings`."""
    num_components: int
    """Limit of the number of Gaussians of the pixel prior."""
    iou: float
    """Mean IoU on synthetic defects, 0..1."""
    images: int
    """Number of synthetic defects that were refined."""
    gain: float
    """Mean IoU minus the mean IoU of the best choice so far, on these defects."""
    error: float
    """Standard error of the gain."""
    chosen: bool
    """Whether this choice is the final one."""


def tune(
    method: type[D],
    images: Iterable[Shaped[np.ndarray | Array, "..."]],
    backbone: Backbone | str,
    *,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> tuple[D, list[Trial]]:
    """Fits a detector like :func:`f2pad_jax.fit`, and chooses the weights of Eq. (12) that suit its images.

    :func:`tune_weights` chooses the weights on the held-out images, before the refit. This takes some minutes.

    Args:
        method: class of the detector.
        images: at least two normal images.
        backbone: frozen feature extractor, or its name.
        seed: seed of everything drawn at random.
        progress: function that receives stage, number done and total.
        options: other arguments of ``fit``.

    Returns:
        The detector, whose calibration holds the chosen factors, and all trials.

    Raises:
        ImageError: as ``fit``.
        CheckpointError: as ``fit``.
    """
    trials: list[Trial] = []

    def adjust(detector: D, held_out: NormalImages, others: NormalImages) -> D:
        detector, trials[:] = tune_weights(detector, held_out, others, seed=seed, progress=progress)
        return detector

    return fit(method, images, backbone, adjust=adjust, seed=seed, progress=progress, **options), trials


def tune_weights(
    detector: D,
    images: NormalImages,
    others: NormalImages,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[D, list[Trial]]:
    """Chooses the sparsity, α1 and the number of Gaussians of the pixel prior, one after the other.

    The values of each quantity are tried in turn, on synthetic defects of both protocols. A value is taken if its gain
    in mean IoU over the best choice is at least :data:`GAIN` and above the gain's standard error. The gain is
    a mean of differences, one for each defect (one-standard-error rule, Breiman et al. 1984). A value that gains less than
    :data:`GAIN` on the first defects is not tried on the others (a race, Maron & Moore 1994).

    Departure: the paper searches a grid on labelled defects. It also searches τ, which our mask rule does not need.

    Args:
        detector: calibrated detector that was not fitted to ``images``.
        images: normal images to paste defects on.
        others: more normal images, for misplaced parts and the pixel prior.
        seed: seed of everything drawn at random.
        progress: function that receives stage, number done and total.

    Returns:
        The detector with the final choice in its calibration, and all trials, the default first.
    """
    defects = synthetic_defects(images, others, NUM_IMAGES, seed)
    pixels = sampled_pixels(np.random.default_rng(seed), [*images.stored, *others.stored], images.ignored)
    scores: dict[Choice, list[float]] = {}
    total = len(SPARSITY) + len(ALPHA1) + len(COMPONENTS) - 2

    @functools.cache
    def prior_of(num_components: int) -> PixelPrior:
        return fit_prior(pixels, num_components=num_components, seed=seed)

    def with_choice(choice: Choice, prior: PixelPrior) -> D:
        factors = Factors(jnp.float32(choice.alpha1 / ALPHA1[0]), jnp.float32(choice.sparsity / SPARSITY[0]))
        return with_calibration(detector, dataclasses.replace(detector.calibrated, prior=prior, factors=factors))

    def measure(choice: Choice, count: int) -> np.ndarray:
        """Returns the IoU of the first ``count`` defects. All priors have one shape, so the solver is compiled once."""
        values = scores.setdefault(choice, [])
        while len(values) < count:
            progress("tuning", len(scores) - 1, total)
            prior = jax.tree.map(
                lambda leaf: np.resize(leaf, (max(COMPONENTS), *leaf.shape[1:])), prior_of(choice.num_components)
            )
            batch = defects[len(values) : len(values) + ROUND]
            results = refine_many(with_choice(choice, prior), [defect.image for defect in batch], settings=SHORT)
            values += [iou(np.asarray(result.mask), defect.mask) for result, defect in zip(results, batch, strict=True)]
        return np.asarray(values[:count])

    def race(challenger: Choice, best: Choice) -> np.ndarray:
        """Returns the gains of a challenger on all defects, or on the defects before it was given up."""
        for count in [*range(ROUND, NUM_IMAGES, ROUND), NUM_IMAGES]:
            gains = measure(challenger, count) - measure(best, count)
            if gains.mean() < GAIN:
                break
        return gains

    best = Choice(ALPHA1[0], SPARSITY[0], COMPONENTS[0])
    trials = [Trial(*best, float(measure(best, NUM_IMAGES).mean()), NUM_IMAGES, 0.0, 0.0, False)]
    for name, values in (("sparsity", SPARSITY), ("alpha1", ALPHA1), ("num_components", COMPONENTS)):
        for value in values[1:]:
            challenger = best._replace(**{name: value})
            gains = race(challenger, best)
            mean, error = float(gains.mean()), float(np.std(gains, ddof=1) / math.sqrt(len(gains)))
            trials.append(Trial(*challenger, float(np.mean(scores[challenger])), len(gains), mean, error, False))
            if is_gain(mean, error):
                best = challenger
    progress("tuning", total, total)
    trials = [trial._replace(chosen=trial[: len(best)] == best) for trial in trials]
    return with_choice(best, prior_of(best.num_components)), trials


def is_gain(mean: float, error: float) -> bool:
    """Returns whether a gain, by its mean and standard error, is large enough and beyond chance."""
    return mean >= GAIN and mean > error * (1 + 1e-6)  # if only one defect gains, mean and error are equal


def recipe() -> list[Any]:
    """Returns the constants that the final choice depends on, besides detector, images and inpainter."""
    return [SPARSITY, ALPHA1, COMPONENTS, NUM_IMAGES, ROUND, GAIN, SHORT.described()]


def synthetic_defects(images: NormalImages, others: NormalImages, count: int, seed: int) -> list[Defective]:
    """Pastes defects of each protocol in turn on normal images, rounded to 8 bits like a camera's image.

    Args:
        images: normal images to paste on.
        others: normal images to cut misplaced parts from; if empty, the parts are cut from ``images``.
        count: number of defects.
        seed: seed of everything drawn at random.
    """
    rng = np.random.default_rng(seed)
    stored = [*images.stored, *others.stored]
    normal = range(len(images), len(stored)) if len(others) else range(len(images))

    def image(i: int) -> np.ndarray:
        return np.asarray(stored[i] / 65535, np.float32)

    is_object = shows_objects(image(i) for i in normal[:8])
    sources = Sources("", image, range(len(images)), normal, (), [], is_object)
    protocols = list(PROTOCOLS.values())
    counts = np.ones(images.size, bool) if images.ignored is None else ~images.ignored
    examples: list[Defective] = []
    for k in itertools.count():
        pixels, mask = protocols[k % 2](rng, sources, k % len(images), k // 2).example
        if (mask & counts).any():
            examples.append(Defective(np.rint(pixels * 255).astype(np.float32) / 255, mask & counts))
        if len(examples) == count:
            return examples
    raise AssertionError


def trials_table(trials: list[Trial]) -> str:
    """Returns the trials as a table in plain text."""
    lines = [f"tuned on synthetic defects; a gain of {GAIN} or more, and above its standard error (±), is taken:"]
    lines += ["sparsity  alpha1  Gaussians  defects    IoU  gain over the best before"]
    for t in trials:
        gain = f"  {t.gain:+.3f} ± {t.error:.3f}" if t is not trials[0] else ""
        values = f"{t.sparsity:8g}  {t.alpha1:6g}  {t.num_components:9}  {t.images:7}  {t.iou:.3f}{gain}"
        lines.append(values + ("  chosen" if t.chosen else ""))
    return "\n".join(lines)
