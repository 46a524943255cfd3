"""One part of an image: the coarse result, the window around the part, and Algorithm 1 inside it."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax import region as regions
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.inpaint import Inpainter, exemplar, harmonic
from f2pad_jax.masks import Evidence
from f2pad_jax.objective import Problem, paper_weight, sparsity_weight
from f2pad_jax.settings import Settings
from f2pad_jax.solvers import Outcome, solve
from f2pad_jax.units import denormalise, normalise, resized
from f2pad_jax.views import Box, View, scaled, scaled_mask, view_of


class Refined(eqx.Module):
    """One image's result at the image's own size; a batch has a leading axis everywhere, a stream NumPy arrays."""

    mask: Bool[Array | np.ndarray, "*b h w"]
    """Pixel-accurate anomaly mask."""
    normal: Float[Array | np.ndarray, "*b h w 3"]
    """n, the image without its anomaly, in 0..1; bit-identical to the input outside the mask."""
    anomaly: Float[Array | np.ndarray, "*b h w 3"]
    """a = x - n, in -1..1."""
    coarse_map: Float[Array | np.ndarray, "*b h w"]
    """The detector's map, in units of the mean normal score."""
    coarse_mask: Bool[Array | np.ndarray, "*b h w"]
    """m0: the map above the detector's threshold."""
    region: Bool[Array | np.ndarray, "*b h w"]
    """Pixels that were allowed to change."""
    steps: Int[Array | np.ndarray, "*b"]
    """Solver steps taken to find the mask (those of the re-estimation of n not counted)."""
    objective: Float[Array | np.ndarray, "*b"]
    """Eq. (12) where the mask was found."""
    outcome: Int[Array | np.ndarray, "*b"]
    """An :class:`~f2pad_jax.Outcome`."""
    inpainter: str = eqx.field(static=True, default="")
    """What made the first guess n0."""


class Coarse(eqx.Module):
    """What the detector says of one image, at the detector's size."""

    x: Float[Array, "h w 3"]
    """Normalised intensity."""
    anomaly_map: Float[Array, "h w"]
    excess: Float[Array, "h w"]
    """The map above the ordinary level, over that of m0's border."""
    threshold: Float[Array, ""]
    """The detector's threshold in the same units: 1, or less where half of the map's height is above it."""
    mask: Bool[Array, "h w"]
    """m0: where ``excess`` is above 1."""
    region: Bool[Array, "h w"]


class Solved(eqx.Module):
    """What the solver makes of an image, at its own size, or of a part of one, at its window's."""

    mask: Bool[Array, "h w"]
    n: Float[Array, "h w 3"]
    steps: Int[Array, ""]
    objective: Float[Array, ""]
    outcome: Int[Array, ""]


class Phase(NamedTuple):
    """A part is solved for twice."""

    sparse: Float[Array, "*p"]
    """Factor on β."""
    learning_rate: Float[Array, "*p"]
    max_steps: Int[Array, "*p"]


def phases(settings: Settings) -> Phase:
    """With β for the mask m*, then with β = 0 inside it for n (Section III-E3)."""
    return Phase(
        jnp.array([1.0, 0.0]),
        jnp.array([settings.solver.learning_rate, settings.restore_rate]),
        jnp.array([settings.max_steps, settings.restore_steps]),
    )


@jax.jit
def look(detector: AbstractDetector, image: Float[Array, "h w 3"], settings: Settings) -> Coarse:
    """Coarse map, m0 and suspect region of an image in 0..1."""
    x = normalise(resized(image, detector.size))
    anomaly_map = detector.anomaly_map(x)
    excess = detector.excess(anomaly_map)
    threshold = detector.excess(anomaly_map, detector.calibrated.threshold)
    region = regions.suspect_region(excess, threshold, settings.spill, settings.dilation)
    return Coarse(x, anomaly_map, excess, threshold, detector.coarse_mask(anomaly_map), region)


class Window(eqx.Module):
    """A part of the suspect region and what surrounds it, at the image's own resolution."""

    box: Box
    """Where the network looks, in the image of the detector's size."""
    own: Box
    """Where n lives, in the image itself: the same, or of a larger image what of it may change and a margin."""
    view: View
    known: Float[Array, "h w 3"]
    """The image at the detector's size, without what other defects there are: nothing to borrow from."""
    image: Float[Array, "H W 3"]
    """Normalised intensity."""
    m0: Bool[Array, "_h _w"]
    region: Bool[Array, "_h _w"]
    excess: Float[Array, "_h _w"]
    threshold: Float[Array, ""]

    @staticmethod
    def around(
        detector: AbstractDetector,
        image: Array,
        coarse: Coarse,
        part: Array,
        size: tuple[int, int] | None = None,
        own_size: tuple[int, int] | None = None,
    ) -> "Window":
        """The window of ``size`` around a part of the coarse region, n in a box of ``own_size``; None: the whole image."""
        whole, full, x = _size(coarse.mask), _size(image), normalise(image)
        own_size = own_size or full
        size = size or whole
        m0, region = (scaled_mask(mask, full) for mask in (coarse.mask & part, part))
        box = Box(regions.window_offset(part, size, detector.stride), size)
        own = box if whole == full else Box(regions.window_offset(region, own_size, 1), own_size)
        view = view_of(box, own, coarse.x, x)
        known = harmonic(coarse.x, coarse.region & ~part)
        m0, region, excess = (own.crop(values) for values in (m0, region, scaled(coarse.excess, full)))
        return Window(box, own, view, known, x, m0, region, excess, coarse.threshold)

    def pose(
        self, detector: AbstractDetector, region: Array, settings: Settings, inpaint: Inpainter, sparse: float | Array = 1.0
    ) -> tuple[Problem, Float[Array, "_h _w 3"]]:
        """The first guess inside ``region`` and the problem that starts from it (lines 1-2), β times ``sparse``."""
        s, empty = settings, jnp.zeros(_size(self.known), bool)
        prior_factor, sparsity_factor = detector.calibrated.tuned or (1.0, 1.0)
        hidden = self.box.paste(self.view.touched(region), empty)
        x = self.own.crop(self.image)
        n0 = jnp.where(region[..., None], self.own.crop(scaled(inpaint(self.known, hidden), _size(self.image))), x)
        problem = Problem.make(
            detector,
            x,
            region,
            detector.locate(self.view(n0), self.box.corner),
            alpha1=prior_factor * s.alpha1,
            alpha2=s.alpha2,
            penalty=s.penalty,
            reach=s.reach,
            view=self.view,
        )
        beta = (
            paper_weight(s.beta0, self.m0)
            if s.beta0 is not None
            else sparsity_weight(problem, n0, sparsity_factor * detector.emphasis * s.sparsity)
        )
        return problem.with_beta(sparse * beta), n0

    def pasted(self, part: Solved) -> Solved:
        """What was made of this part, in the image; n is the image outside the part's mask."""
        n = jnp.where(part.mask[..., None], part.n, self.own.crop(self.image))
        mask = self.own.paste(part.mask, jnp.zeros(_size(self.image), bool))
        return Solved(mask, self.own.paste(n, self.image), part.steps, part.objective, part.outcome)


def solve_window(
    detector: AbstractDetector,
    image: Float[Array, "H W 3"],
    coarse: Coarse,
    part: Bool[Array, "h w"],
    settings: Settings,
    inpaint: Inpainter = exemplar,
    window: tuple[int, int] | None = None,
    own_size: tuple[int, int] | None = None,
) -> Solved:
    """Algorithm 1 for a part of the suspect region, inside a window of the given size (default: the whole image).

    ``part`` and ``window`` are at the detector's size. n is sought, and the mask drawn, at that of ``image`` (0..1), in a
    box of ``own_size`` around the part.
    """
    s, w = settings, Window.around(detector, image, coarse, part, window, own_size)

    def decompose(region: Bool[Array, "_h _w"], phase: Phase):
        """Split x into n + a inside ``region``: lines 1-9."""
        sparse, learning_rate, limit = phase
        problem, n0 = w.pose(detector, region, s, inpaint, sparse)  # lines 1-2
        solver = s.solver.at_rate(learning_rate)
        solution = solve(solver, problem, n0, max_steps=limit, steps_per_check=s.steps_per_check)  # lines 3-8
        evidence = Evidence(problem, n0, solution.n, w.excess, w.threshold)
        mask = jax.lax.cond(sparse > 0, lambda: s.decision(solver, evidence), lambda: region)  # line 9
        return mask, (mask, solution._replace(memory=None))

    _, (masks, solutions) = jax.lax.scan(decompose, w.region, phases(s))  # one loop: the solver is compiled once
    first = jax.tree.map(lambda leaf: leaf[0], solutions)
    return w.pasted(Solved(masks[0], solutions.n[1], first.steps, first.objective, first.outcome))


@jax.jit
def compose(image: Float[Array, "h w 3"], coarse: Coarse, solved: Solved) -> Refined:
    """Results for an image in 0..1, the coarse ones at its size."""
    size = _size(image)
    normal = jnp.where(solved.mask[..., None], jnp.clip(denormalise(solved.n), 0.0, 1.0), image)
    return Refined(
        mask=solved.mask,
        normal=normal,
        anomaly=image - normal,
        coarse_map=scaled(coarse.anomaly_map, size),
        coarse_mask=scaled_mask(coarse.mask, size),
        region=scaled_mask(coarse.region, size),
        steps=solved.steps,
        objective=solved.objective,
        outcome=solved.outcome,
    )


def untouched(image: Float[Array, "h w 3"], coarse: Coarse) -> Solved:
    """The result before any part is solved for, and after where there is nothing to solve, or nothing else."""
    covered = jnp.all(coarse.region)
    mask = covered & scaled_mask(coarse.mask, _size(image))
    zero = jnp.zeros((), jnp.int32)
    outcome = jnp.where(covered, int(Outcome.COVERS_IMAGE), int(Outcome.NOTHING_TO_REFINE))
    return Solved(mask, normalise(image), zero, jnp.zeros(()), outcome)


def merged(one: Solved, other: Solved) -> Solved:
    """Two parts of an image together: objectives add up, of steps and of outcomes the worse counts."""
    first = one.outcome == Outcome.NOTHING_TO_REFINE
    return Solved(
        one.mask | other.mask,
        jnp.where(other.mask[..., None], other.n, one.n),
        jnp.maximum(one.steps, other.steps),
        one.objective + other.objective,
        jnp.where(first, other.outcome, jnp.maximum(one.outcome, other.outcome)),
    )


def _size(image: Array) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
