"""Algorithm 1 for one part of an image: start, advance, draw and write back.

``decompose`` is the whole algorithm as one traceable function. The streaming package compiles ``start``, ``advance``,
``draw`` and ``write_back`` separately, to solve many parts side by side.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.images._views import scaled, scaled_mask, size_of
from f2pad_jax.images.pixels import denormalise, normalise
from f2pad_jax.inpainting.base import Inpainter
from f2pad_jax.method.coarse import Coarse, Given, look
from f2pad_jax.method.decision import Evidence, agreeing
from f2pad_jax.method.settings import Settings
from f2pad_jax.method.window import Window
from f2pad_jax.objective.problem import Problem
from f2pad_jax.solvers.loop import Iterate, Outcome, begin, finish
from f2pad_jax.solvers.loop import advance as advance_loop

MOST = 0.5
"""Share of the image above which the outcome says that the mask covers the image."""


class Refined(eqx.Module):
    """Result for one image, at its own size. A batch adds a leading axis; ``refine_many`` yields NumPy arrays."""

    mask: Bool[Array | np.ndarray, "*b h w"]
    """Pixel-accurate anomaly mask."""
    normal: Float[Array | np.ndarray, "*b h w 3"]
    """Normal image n in 0..1, bit-identical to the input outside the mask."""
    anomaly: Float[Array | np.ndarray, "*b h w 3"]
    """Anomaly a = x - n, in -1..1."""
    coarse_map: Float[Array | np.ndarray, "*b h w"]
    """Anomaly map of the detector in units of the mean score of normal images, or the given map with the levels of
    :class:`~f2pad_jax.method.Given`."""
    coarse_mask: Bool[Array | np.ndarray, "*b h w"]
    """Coarse mask m0: the map above the detector's threshold."""
    region: Bool[Array | np.ndarray, "*b h w"]
    """Suspect region: pixels that were allowed to change."""
    score: Float[Array | np.ndarray, "*b"]
    """Score of the image, in units of the limit: the image is defective if the score exceeds 1."""
    p_value: Float[Array | np.ndarray, "*b"]
    """Probability that a normal image has this score or a higher one; NaN without ``Calibration.normality``."""
    unlike: Bool[Array | np.ndarray, "*b"]
    """Whether the image is unlike the normal images as a whole: another batch, other light, a dirty lens. The mask
    then shows the pixels that stand out from the rest of the image."""
    sparsity: Float[Array | np.ndarray, "*b"]
    """Sparsity in force: ``Settings.sparsity`` times the factors of detector and tuning (:meth:`Settings.adapted`)."""
    steps: Int[Array | np.ndarray, "*b"]
    """Number of steps taken to find the mask; the re-estimation of n is not counted."""
    objective: Float[Array | np.ndarray, "*b"]
    """Value of Eq. (12) at the solution from which the mask was drawn."""
    outcome: Int[Array | np.ndarray, "*b"]
    """An :class:`~f2pad_jax.Outcome`."""
    probability: Float[Array | np.ndarray, "*b h w"]
    """Probability that a pixel is anomalous, from the decision; the mask is where it exceeds one half."""

    @property
    def defective(self) -> Bool[Array | np.ndarray, "*b"] | np.bool:
        """Verdict: whether the score exceeds 1."""
        return self.score > 1


class Solved(eqx.Module):
    """Solution of a whole image at its own size, or of one part at the size of its crop."""

    probability: Float[Array, "h w"]
    """Probability that a pixel is anomalous."""
    n: Float[Array, "h w 3"]
    """Normal image, normalised intensity."""
    steps: Int[Array, ""]
    """Number of steps taken to find the mask."""
    objective: Float[Array, ""]
    """Value of Eq. (12) at the solution from which the mask was drawn."""
    outcome: Int[Array, ""]
    """An :class:`~f2pad_jax.Outcome`."""

    @property
    def mask(self) -> Bool[Array, "h w"]:
        """Anomaly mask."""
        return self.probability > 0.5


class Phase(NamedTuple):
    """Constants of one phase, or of both phases along a leading axis."""

    sparse: Float[Array, "*p"]
    """Factor on β."""
    rate: Float[Array, "*p"]
    """Factor on the solver's learning rate."""
    max_steps: Int[Array, "*p"]
    """Limit of steps."""


def phases(settings: Settings) -> Phase:
    """Returns both phases: every part is solved with β for its mask, then with β = 0 inside it for n (Section III-E3)."""
    return Phase(
        jnp.array([1.0, 0.0], jnp.float32),
        jnp.array([1.0, settings.restore_rate], jnp.float32),
        jnp.array([settings.max_steps, settings.restore_steps], jnp.int32),
    )


class Run(eqx.Module):
    """State of one phase of one part. For parts solved side by side, every array has a leading axis of lanes."""

    problem: Problem
    """Problem without its detector, which all parts share."""
    n0: Float[Array, "*l h w 3"]
    """First guess, normalised intensity."""
    iterate: Iterate
    """State of the loop."""
    rate: Float[Array, "*l"]
    """Factor on the solver's learning rate."""
    max_steps: Int[Array, "*l"]
    """Limit of steps."""

    @property
    def going(self) -> Bool[Array, "*l"]:
        """Whether another step may be taken."""
        return self.iterate.going(self.max_steps)

    def with_detector(self, detector: AbstractDetector) -> Problem:
        """Returns the problem with its detector."""
        return eqx.tree_at(lambda p: p.detector, self.problem, detector, is_leaf=lambda leaf: leaf is None)


def start(
    detector: AbstractDetector,
    window: Window,
    region: Bool[Array, "_h _w"],
    phase: Int[Array, ""],
    settings: Settings,
    inpaint: Inpainter,
) -> Run:
    """Starts a phase (0 or 1) of a part: lines 1-3 of Algorithm 1."""
    sparse, rate, max_steps = (values[phase] for values in phases(settings))
    problem, n0 = window.pose(detector, region, settings, inpaint, sparse)
    iterate = begin(settings.solver.slowed(rate), problem, n0)
    return Run(eqx.tree_at(lambda p: p.detector, problem, None), n0, iterate, rate, max_steps)


def advance(detector: AbstractDetector, settings: Settings, run: Run) -> Run:
    """Takes ``settings.steps_per_check`` steps (lines 4-8 of Algorithm 1), unless the phase is over."""

    def further() -> Iterate:
        solver = settings.solver.slowed(run.rate)
        return advance_loop(solver, run.with_detector(detector), run.iterate, settings.steps_per_check)[0]

    return dataclasses.replace(run, iterate=jax.lax.cond(run.going, further, lambda: run.iterate))


def draw(detector: AbstractDetector, settings: Settings, run: Run, window: Window) -> Solved:
    """Draws the mask of a part whose first phase is over: line 9 of Algorithm 1."""
    problem = run.with_detector(detector)
    n, steps, objective, outcome, _ = finish(problem, run.iterate)
    evidence = Evidence(problem, run.n0, n, window.excess, window.threshold)
    return Solved(settings.decision(settings.solver, evidence), n, steps, objective, outcome)


def write_back(image: Solved, window: Window, part: Solved, n: Float[Array, "_h _w 3"]) -> Solved:
    """Adds a part, and its re-estimated ``n``, to the solution of its image.

    The image keeps x outside the masks. Objectives are summed over parts; of steps and outcomes, the largest is kept.
    """
    n = jnp.where(part.mask[..., None], n, window.crop.cut(window.image))
    probability = window.crop.paste(part.probability, jnp.zeros_like(image.probability))
    no_part_yet = image.outcome == Outcome.NOTHING_TO_REFINE
    return Solved(
        jnp.maximum(image.probability, probability),
        jnp.where(probability[..., None] > 0.5, window.crop.paste(n, window.image), image.n),
        jnp.maximum(image.steps, part.steps),
        image.objective + part.objective,
        jnp.where(no_part_yet, part.outcome, jnp.maximum(image.outcome, part.outcome)),
    )


def untouched(image: Float[Array, "h w 3"], coarse: Coarse) -> Solved:
    """Returns the solution of an image before any part is solved; it is final if there is no part to solve.

    If the suspect region is the whole image, no good pixel is left to start from, and the mask is m0.
    """
    covered = coarse.covered
    mask = (covered & scaled_mask(coarse.mask, size_of(image))).astype(jnp.float32)
    zero = jnp.zeros((), jnp.int32)
    outcome = jnp.where(covered, int(Outcome.COVERS_IMAGE), int(Outcome.NOTHING_TO_REFINE))
    return Solved(mask, normalise(image), zero, jnp.float32(0), outcome)


def compose(
    detector: AbstractDetector, settings: Settings, image: Float[Array, "h w 3"], coarse: Coarse, solved: Solved
) -> Refined:
    """Returns the result for an image in 0..1, with map, mask and region of the coarse stage scaled to its size.

    The mask of a defective image is never empty: if the solution leaves no anomaly, the mask is m0. The outcome tells if
    the mask has more than :data:`MOST` of the image.
    """
    size = size_of(image)
    counts = jnp.ones(size, bool) if coarse.ignored is None else ~scaled_mask(coarse.ignored, size)
    found = solved.mask & counts
    normal = jnp.where(found[..., None], jnp.clip(denormalise(solved.n), 0.0, 1.0), image)
    m0 = scaled_mask(coarse.mask, size)
    lost = ~jnp.any(found) & jnp.any(m0)
    mask = found | (lost & m0)
    outcome = jnp.where(lost, int(Outcome.COARSE_MASK), solved.outcome)
    outcome = jnp.where(jnp.isfinite(coarse.score), outcome, int(Outcome.NON_FINITE))
    share = jnp.sum(mask) / jnp.sum(counts)
    region = scaled_mask(coarse.region, size)
    outside = settings.decision.prior(scaled(coarse.excess, size))
    return Refined(
        mask=mask,
        normal=normal,
        anomaly=image - normal,
        coarse_map=scaled(coarse.anomaly_map, size),
        coarse_mask=m0,
        region=region,
        score=coarse.score,
        p_value=coarse.p_value,
        unlike=coarse.unlike,
        sparsity=jnp.asarray(settings.adapted(detector).sparsity, jnp.float32),
        steps=solved.steps,
        objective=solved.objective,
        outcome=jnp.where((share > MOST) & (outcome != Outcome.NON_FINITE), int(Outcome.COVERS_IMAGE), outcome),
        probability=counts * agreeing(jnp.where(region, solved.probability, outside), mask),
    )


def decompose(
    detector: AbstractDetector,
    image: Float[Array, "h w 3"],
    settings: Settings,
    inpaint: Inpainter,
    ignored: Bool[Array, "h w"] | None = None,
    given: Given | None = None,
) -> Refined:
    """Runs Algorithm 1 on a whole image in 0..1, as one traceable function.

    ``ignored`` pixels do not count. A ``given`` map takes the place of the detector's.
    """
    coarse = look(detector, image, settings, ignored, given)
    blank = untouched(image, coarse)
    covered = blank.outcome == Outcome.COVERS_IMAGE
    window = Window.around(detector, image, coarse, coarse.region & ~covered)

    def solve_phase(region: Bool[Array, "h w"], phase: Int[Array, ""]) -> tuple[Bool[Array, "h w"], Solved]:
        run = start(detector, window, region, phase, settings, inpaint)
        run = jax.lax.while_loop(lambda run: run.going, lambda run: advance(detector, settings, run), run)

        def restored() -> Solved:
            return Solved(region.astype(jnp.float32), *finish(run.with_detector(detector), run.iterate)[:4])

        found = jax.lax.cond(phase == 0, lambda: draw(detector, settings, run, window), restored)
        return found.mask, found

    # one loop over both phases, so that the solver is compiled once
    _, found = jax.lax.scan(solve_phase, window.region, jnp.arange(2))
    first, second = (jax.tree.map(lambda leaf, k=k: leaf[k], found) for k in (0, 1))
    solved = write_back(blank, window, first, second.n)
    solved = jax.tree.map(lambda a, b: jnp.where(covered, a, b), blank, solved)
    return compose(detector, settings, image, coarse, solved)
