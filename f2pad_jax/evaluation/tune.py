"""Weights of Eq. (12) chosen per category without a label, on synthetic defects."""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import sem

from f2pad_jax.data.cutpaste import Defective
from f2pad_jax.data.dataset import PROTOCOLS, Sources, shows_objects
from f2pad_jax.detectors.base import AbstractDetector, NormalImages
from f2pad_jax.detectors.fit import Trial, sampled_pixels, with_calibration
from f2pad_jax.evaluation.metrics import iou
from f2pad_jax.prior import PixelPrior, fit_prior
from f2pad_jax.progress import Progress, silent
from f2pad_jax.refine import refine
from f2pad_jax.settings import Settings

SPARSITY = (float(Settings().sparsity), 0.75, 3.0)
ALPHA1 = (float(Settings().alpha1), 0.003, 0.03)
COMPONENTS = (6, 3, 12)
"""What is tried, the default first."""
NUM_IMAGES = 16
"""Synthetic defects."""
HEAT = 8
"""As many at a time: a value that gains less than :data:`GAIN` on those so far is given up."""
GAIN = 0.005
"""Mean IoU by which another value must be better than the one before to be taken, and by more than its standard error."""

D = TypeVar("D", bound=AbstractDetector)


class Choice(NamedTuple):
    """What is tuned."""

    alpha1: float
    sparsity: float
    num_components: int


def tune(
    detector: D,
    images: NormalImages,
    others: NormalImages,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[D, list[Trial]]:
    """Choose the sparsity, α1 and the number of Gaussians of the pixel prior, one after the other.

    For each in turn, the values are tried on synthetic defects of both protocols, paper's and hard. One that has a better
    mean IoU than the best before it is taken, if it gains more than chance would give (the one-standard-error rule, Breiman
    et al. 1984, on the differences of the same defects' IoU); one that gains less than :data:`GAIN` on the first defects
    isn't tried on the others (a race, Maron & Moore 1994).

    Departure: the paper searches its grid on labelled defects, and τ as well, which the default mask does without.

    Args:
        detector: calibrated, and not fitted to ``images``.
        images: normal images to paste defects on.
        others: more normal images, to cut parts from and for the pixel prior.
        seed: of everything drawn at random.
        progress: told how far it is.

    Returns:
        The detector with what was chosen in its calibration, and all that was tried, the first with the defaults.
    """
    defects = synthetic_defects(images, others, NUM_IMAGES, seed)
    pixels = sampled_pixels(np.random.default_rng(seed), [*images.stored, *others.stored])
    measured: dict[Choice, list[float]] = {}
    total = len(SPARSITY) + len(ALPHA1) + len(COMPONENTS) - 2

    @functools.cache
    def prior_of(num_components: int) -> PixelPrior:
        return fit_prior(pixels, num_components=num_components, seed=seed)

    def with_choice(choice: Choice, prior: PixelPrior) -> D:
        tuned = (jnp.float32(choice.alpha1 / ALPHA1[0]), jnp.float32(choice.sparsity / SPARSITY[0]))
        return with_calibration(detector, dataclasses.replace(detector.calibrated, prior=prior, tuned=tuned))

    def measure(choice: Choice, count: int) -> np.ndarray:
        """IoU of the first ``count`` defects. One shape of prior for all: the solver is compiled once."""
        values = measured.setdefault(choice, [])
        while len(values) < count:
            progress("tuning", len(measured) - 1, total)
            prior = jax.tree.map(
                lambda leaf: np.resize(leaf, (max(COMPONENTS), *leaf.shape[1:])), prior_of(choice.num_components)
            )
            heat = defects[len(values) : len(values) + HEAT]
            images = np.stack([defect.image for defect in heat])
            masks = np.asarray(refine(with_choice(choice, prior), images, settings=SHORT).mask)
            values += [iou(mask, defect.mask) for mask, defect in zip(masks, heat, strict=True)]
        return np.asarray(values[:count])

    def race(challenger: Choice, best: Choice) -> np.ndarray:
        """What it gains, on all defects or on those after which it was given up."""
        for count in [*range(HEAT, NUM_IMAGES, HEAT), NUM_IMAGES]:
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
            mean, error = float(gains.mean()), float(sem(gains))
            trials.append(Trial(*challenger, float(np.mean(measured[challenger])), len(gains), mean, error, False))
            if is_gain(mean, error):
                best = challenger
    progress("tuning", total, total)
    trials = [trial._replace(chosen=trial[: len(best)] == best) for trial in trials]
    return with_choice(best, prior_of(best.num_components)), trials


def is_gain(mean: float, error: float) -> bool:
    """Whether a gain is large enough to count, and beyond chance."""
    return mean >= GAIN and mean > error * (1 + 1e-6)  # one defect's gain among zeros has a mean of one standard error


SHORT = Settings(restore_steps=0)
"""Nothing but the mask is looked at."""


def recipe() -> list[Any]:
    """What a choice depends on, besides the detector, the images and what inpaints."""
    return [SPARSITY, ALPHA1, COMPONENTS, NUM_IMAGES, HEAT, GAIN, SHORT.described()]


def synthetic_defects(images: NormalImages, others: NormalImages, count: int, seed: int) -> list[Defective]:
    """Defects of each protocol in turn on ``images``; parts are cut from ``others``. 8 bits, as from a camera."""
    rng = np.random.default_rng(seed)
    stored = [*images.stored, *others.stored]
    normal = range(len(images), len(stored)) if len(others) else range(len(images))

    def image(i: int) -> np.ndarray:
        return np.asarray(stored[i] / 65535, np.float32)

    is_object = shows_objects(image(i) for i in normal[:8])
    sources = Sources("", image, range(len(images)), normal, (), [], is_object)
    made = [list(PROTOCOLS.values())[k % 2](rng, sources, k % len(images), k // 2)[1] for k in range(count)]
    return [Defective(np.rint(image * 255).astype(np.float32) / 255, mask) for image, mask in made]


def trials_table(trials: list[Trial]) -> str:
    """What was tried, for reading."""
    lines = [f"tuned on synthetic defects; a gain of {GAIN} or more, and above its standard error (±), is taken:"]
    lines += ["sparsity  alpha1  Gaussians  defects    IoU  gain over the best before"]
    for t in trials:
        gain = f"  {t.gain:+.3f} ± {t.error:.3f}" if t is not trials[0] else ""
        values = f"{t.sparsity:8g}  {t.alpha1:6g}  {t.num_components:9}  {t.images:7}  {t.iou:.3f}{gain}"
        lines.append(values + ("  chosen" if t.chosen else ""))
    return "\n".join(lines)
