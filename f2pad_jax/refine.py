"""``refine``: from coarse maps to pixel-accurate masks, Algorithm 1 of the paper."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Shaped

from f2pad_jax import region as regions
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.inpaint import Inpainter, choose, exemplar, harmonic
from f2pad_jax.masks import Evidence
from f2pad_jax.objective import Problem, paper_weight, sparsity_weight
from f2pad_jax.settings import Settings
from f2pad_jax.solvers import Outcome, solve
from f2pad_jax.units import denormalise, normalise, resized, to_unit
from f2pad_jax.views import Box, View, scaled, scaled_mask, view_of

WINDOWS = (64, 96, 128, 160, 192)
"""Sides of the square windows solved in; the whole image where none holds the region."""


class Refined(eqx.Module):
    """One image's result at the image's own size; a batch has a leading axis everywhere."""

    mask: Bool[Array, "*b h w"]
    """Pixel-accurate anomaly mask."""
    normal: Float[Array, "*b h w 3"]
    """n, the image without its anomaly, in 0..1; bit-identical to the input outside the mask."""
    anomaly: Float[Array, "*b h w 3"]
    """a = x - n, in -1..1."""
    coarse_map: Float[Array, "*b h w"]
    """The detector's map, in units of the mean normal score."""
    coarse_mask: Bool[Array, "*b h w"]
    """m0: the map above the detector's threshold."""
    region: Bool[Array, "*b h w"]
    """Pixels that were allowed to change."""
    steps: Int[Array, "*b"]
    """Solver steps taken to find the mask (those of the re-estimation of n not counted)."""
    objective: Float[Array, "*b"]
    """Eq. (12) where the mask was found."""
    outcome: Int[Array, "*b"]
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
    """What the solver makes of it, at the image's own size."""

    mask: Bool[Array, "h w"]
    n: Float[Array, "h w 3"]
    steps: Int[Array, ""]
    objective: Float[Array, ""]
    outcome: Int[Array, ""]


def refine(
    detector: AbstractDetector,
    images: Shaped[Array | np.ndarray, "..."] | Sequence,
    *,
    settings: Settings | None = None,
    inpaint: Inpainter | str | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Refined:
    """Segment anomalies to the pixel, and restore the image without them.

    Pure and traceable: inside ``jax.jit`` (or any transform) the whole image is solved for. Called on concrete arrays, each
    separate part of an image's suspect region is solved in the smallest window of :data:`WINDOWS` that holds it, which is
    several times faster; one program is compiled per window and image size, and kept. An image's result never depends on
    the others of its batch. The network sees the image resized, but n, and so the mask, has the image's own resolution.

    Args:
        detector: a fitted detector.
        images: ``(h, w)``, ``(h, w, 3)`` or ``(n, h, w, 3)``; uint8, uint16 or float in 0..1; any size.
        settings: constants of the method.
        inpaint: what makes the first guess n0: ``"mae"`` (the paper's), ``"exemplar"``, ``"harmonic"`` or any callable of
            (normalised image, region), a pytree or a function. Default: ``"mae"`` where a masked autoencoder's weights are
            installed and this is no trace, else ``"exemplar"``; the result says which.
        batch_size: images solved side by side by ``vmap``; default 1 on a CPU, 16 elsewhere.
        progress: called on the host as (done, total).

    Raises:
        ImageError: the images have a wrong shape, dtype or range.
        CheckpointError: the inpainter is unknown, or its weights are missing or damaged.
    """
    # arrays, not numbers, so that another value is no other program
    constants: Settings = jax.tree.map(jnp.asarray, settings or Settings())
    batch_size = batch_size or (1 if jax.default_backend() == "cpu" else 16)
    unit = to_unit(images)
    batch = unit if unit.ndim == 4 else unit[None]
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((detector, batch, constants, inpaint)))
    inpainter, inpaint = choose(inpaint, detector.calibrated.normals, traced=traced)
    if traced:

        def whole(image):
            coarse = look(detector, image, constants)
            untouched = _untouched(image, coarse)
            covered = untouched.outcome == Outcome.COVERS_IMAGE
            solved = solve_window(detector, image, coarse, coarse.region & ~covered, constants, inpaint)
            return compose(image, coarse, jax.tree.map(lambda a, b: jnp.where(covered, a, b), untouched, solved))

        results = jax.lax.map(whole, batch, batch_size=batch_size)
    else:
        results = _refine_on_host(detector, batch, constants, inpaint, batch_size, progress)
    results = dataclasses.replace(results, inpainter=inpainter)
    return results if unit.ndim == 4 else jax.tree.map(lambda leaf: leaf[0], results)


@jax.jit
def look(detector: AbstractDetector, image: Float[Array, "h w 3"], settings: Settings) -> Coarse:
    """Coarse map, m0 and suspect region of an image in 0..1."""
    x = normalise(resized(image, detector.size))
    anomaly_map = detector.anomaly_map(x)
    excess = detector.excess(anomaly_map)
    mask = detector.coarse_mask(anomaly_map)
    region = regions.suspect_region(mask, excess > settings.spill, settings.dilation)
    threshold = detector.excess(anomaly_map, detector.calibrated.threshold)
    return Coarse(x, anomaly_map, excess, threshold, mask, region)


class Window(eqx.Module):
    """A part of the suspect region and what surrounds it, at the image's own resolution."""

    box: Box
    """Where the network looks, in the image of the detector's size."""
    own: Box
    """The same in the image itself."""
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
        detector: AbstractDetector, image: Array, coarse: Coarse, part: Array, size: tuple[int, int] | None
    ) -> "Window":
        """The window of ``size`` around a part of the coarse region; None: the whole image."""
        whole, full = _size(coarse.mask), _size(image)
        size = size or whole
        box = Box(regions.window_offset(part, size, detector.stride), size)
        own, view = view_of(box, whole, full)
        m0, region = (own.crop(scaled_mask(mask, full)) for mask in (coarse.mask & part, part))
        known = harmonic(coarse.x, coarse.region & ~part)
        excess = own.crop(scaled(coarse.excess, full))
        return Window(box, own, view, known, normalise(image), m0, region, excess, coarse.threshold)

    def pose(
        self, detector: AbstractDetector, region: Array, settings: Settings, inpaint: Inpainter, sparse: float | Array = 1.0
    ) -> tuple[Problem, Float[Array, "_h _w 3"]]:
        """The first guess inside ``region`` and the problem that starts from it (lines 1-2), β times ``sparse``."""
        s, empty = settings, jnp.zeros(_size(self.known), bool)
        prior_factor, sparsity_factor = detector.calibrated.tuned or (1.0, 1.0)
        hidden = self.box.paste(self.view.touched(region), empty)
        n0 = self.own.crop(scaled(inpaint(self.known, hidden), _size(self.image)))
        problem = Problem.make(
            detector,
            self.own.crop(self.image),
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
            else sparsity_weight(problem, n0, sparsity_factor * s.sparsity)
        )
        return problem.with_beta(sparse * beta), n0


def solve_window(
    detector: AbstractDetector,
    image: Float[Array, "H W 3"],
    coarse: Coarse,
    part: Bool[Array, "h w"],
    settings: Settings,
    inpaint: Inpainter = exemplar,
    window: tuple[int, int] | None = None,
) -> Solved:
    """Algorithm 1 for a part of the suspect region, inside a window of the given size (default: the whole image).

    ``part`` and ``window`` are at the detector's size; n is sought, and the mask drawn, at that of ``image`` (0..1).
    """
    s, w = settings, Window.around(detector, image, coarse, part, window)

    def decompose(region: Bool[Array, "_h _w"], phase):
        """Split x into n + a inside ``region``: lines 1-9."""
        sparse, learning_rate, limit = phase
        problem, n0 = w.pose(detector, region, s, inpaint, sparse)  # lines 1-2
        solver = eqx.tree_at(lambda s: s.learning_rate, s.solver, learning_rate)
        solution = solve(solver, problem, n0, max_steps=limit, steps_per_check=s.steps_per_check)  # lines 3-8
        evidence = Evidence(problem, n0, solution.n, w.excess, w.threshold)
        mask = jax.lax.cond(sparse > 0, lambda: s.decision(solver, evidence), lambda: region)  # line 9
        return mask, (mask, solution._replace(memory=None))

    # twice: with β for the mask m*; with β = 0 inside it for n. One loop, so that the solver is compiled once
    phases = (
        jnp.array([1.0, 0.0]),
        jnp.array([s.solver.learning_rate, s.restore_rate]),
        jnp.array([s.max_steps, s.restore_steps]),
    )
    _, (masks, solutions) = jax.lax.scan(decompose, w.region, phases)
    mask, first = masks[0], jax.tree.map(lambda leaf: leaf[0], solutions)
    n = jnp.where(mask[..., None], solutions.n[1], w.own.crop(w.image))
    mask = w.own.paste(mask, jnp.zeros(_size(image), bool))
    return Solved(mask, w.own.paste(n, w.image), first.steps, first.objective, first.outcome)


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


def _refine_on_host(detector, batch, settings, inpaint, batch_size, progress) -> Refined:
    """Divide each image's region, choose windows, and run parts with windows alike together, ``batch_size`` at a time."""
    total = len(batch)
    coarse = [look(detector, image, settings) for image in batch]
    solved, groups = [], {}
    for i, c in enumerate(coarse):
        solved.append(_untouched(batch[i], c))
        if solved[i].outcome == Outcome.NOTHING_TO_REFINE and np.any(c.region):
            for part, window in regions.divided(np.asarray(c.region), settings.margin, detector.stride, WINDOWS):
                groups.setdefault(window, []).append((i, part))
    waiting = Counter(i for members in groups.values() for i, _ in members)
    progress(total - len(waiting), total)
    for window, members in groups.items():
        for start in range(0, len(members), batch_size):
            chunk = members[start : start + batch_size]
            lanes = [(batch[i], coarse[i], part) for i, part in chunk + chunk[-1:] * (batch_size - len(chunk))]
            images, coarses, parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
            out = jax.block_until_ready(_solve_batch(detector, images, coarses, parts, settings, inpaint, window))
            for lane, (i, _) in enumerate(chunk):
                solved[i] = _merged(solved[i], jax.tree.map(lambda leaf, lane=lane: leaf[lane], out))
                waiting[i] -= 1
            progress(total - sum(count > 0 for count in waiting.values()), total)
    results = [compose(batch[i], coarse[i], solved[i]) for i in range(total)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _size(image: Array) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


@eqx.filter_jit
def _solve_batch(detector, images, coarse: Coarse, parts, settings, inpaint, window) -> Solved:
    def one(image, coarse: Coarse, part) -> Solved:
        return solve_window(detector, image, coarse, part, settings, inpaint, window)

    lanes = images, coarse, parts
    if len(images) == 1:  # no batch axis inside the loop: XLA's CPU backend runs it faster
        image, coarse, part = jax.tree.map(lambda leaf: leaf[0], lanes)
        return jax.tree.map(lambda leaf: leaf[None], one(image, coarse, part))
    return jax.vmap(one)(*lanes)


def _untouched(image: Float[Array, "h w 3"], coarse: Coarse) -> Solved:
    """The result before any part is solved for, and after where there is nothing to solve, or nothing else."""
    covered = jnp.all(coarse.region)
    mask = covered & scaled_mask(coarse.mask, _size(image))
    zero = jnp.zeros((), jnp.int32)
    outcome = jnp.where(covered, int(Outcome.COVERS_IMAGE), int(Outcome.NOTHING_TO_REFINE))
    return Solved(mask, normalise(image), zero, jnp.zeros(()), outcome)


def _merged(one: Solved, other: Solved) -> Solved:
    """Two parts of an image together: objectives add up, of steps and of outcomes the worse counts."""
    first = one.outcome == Outcome.NOTHING_TO_REFINE
    return Solved(
        one.mask | other.mask,
        jnp.where(other.mask[..., None], other.n, one.n),
        jnp.maximum(one.steps, other.steps),
        one.objective + other.objective,
        jnp.where(first, other.outcome, jnp.maximum(one.outcome, other.outcome)),
    )
