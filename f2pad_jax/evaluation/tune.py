"""Weights of Eq. (12) chosen per category without a label, on synthetic defects."""

import dataclasses
import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from f2pad_jax.data.cutpaste import Defective
from f2pad_jax.data.dataset import PROTOCOLS, Sources, shows_objects
from f2pad_jax.detectors.base import AbstractDetector, NormalImages, Progress, silent
from f2pad_jax.detectors.fit import Trial, sampled_pixels, with_calibration
from f2pad_jax.evaluation.metrics import iou
from f2pad_jax.prior import PixelPrior, fit_prior
from f2pad_jax.refine import refine
from f2pad_jax.settings import Settings

SPARSITY = (float(Settings().sparsity), 0.75, 3.0)
ALPHA1 = (float(Settings().alpha1), 0.003, 0.03)
COMPONENTS = (6, 3, 12)
"""What is tried, the default first."""
NUM_IMAGES = 8
"""Synthetic defects."""
GAIN = 0.005
"""IoU by which another value must be better than the one before, to be taken: less is chance."""

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

    Each is set to the value of the best mean IoU on synthetic defects of both protocols, paper's and hard, in turn.

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
    trials: dict[Choice, float] = {}
    total = len(SPARSITY) + len(ALPHA1) + len(COMPONENTS) - 2

    @functools.cache
    def prior_of(num_components: int) -> PixelPrior:
        return fit_prior(pixels, num_components=num_components, seed=seed)

    def with_choice(choice: Choice, prior: PixelPrior) -> D:
        tuned = (jnp.float32(choice.alpha1 / ALPHA1[0]), jnp.float32(choice.sparsity / SPARSITY[0]))
        return with_calibration(detector, dataclasses.replace(detector.calibrated, prior=prior, tuned=tuned))

    def tried(choice: Choice) -> float:
        """The mean IoU. One shape of prior for all: the solver is compiled once."""
        if choice not in trials:
            progress("tuning", len(trials), total)
            prior = jax.tree.map(
                lambda leaf: np.resize(leaf, (max(COMPONENTS), *leaf.shape[1:])), prior_of(choice.num_components)
            )
            candidate = with_choice(choice, prior)
            masks = np.asarray(refine(candidate, np.stack([defect.image for defect in defects]), settings=SHORT).mask)
            values = [iou(mask, defect.mask) for mask, defect in zip(masks, defects, strict=True)]
            trials[choice] = float(np.mean(values))
        return trials[choice]

    best = Choice(ALPHA1[0], SPARSITY[0], COMPONENTS[0])
    tried(best)
    for name, values in (("sparsity", SPARSITY), ("alpha1", ALPHA1), ("num_components", COMPONENTS)):
        for value in values[1:]:
            candidate = best._replace(**{name: value})
            if tried(candidate) > tried(best) + GAIN:
                best = candidate
    progress("tuning", total, total)
    chosen = with_choice(best, prior_of(best.num_components))
    return chosen, [Trial(*choice, value, choice == best) for choice, value in trials.items()]


SHORT = Settings(restore_steps=0)
"""Nothing but the mask is looked at."""


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
    lines = ["sparsity  alpha1  Gaussians    IoU"]
    for t in trials:
        lines.append(f"{t.sparsity:8g}  {t.alpha1:6g}  {t.num_components:9}  {t.iou:.3f}{'  chosen' if t.chosen else ''}")
    return "\n".join(lines)
