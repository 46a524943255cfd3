"""``refine``: from coarse maps to pixel-accurate masks, Algorithm 1 of the paper."""

import dataclasses
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Shaped

from f2pad_jax import region as regions
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.inpaint import Inpainter, choose, exemplar
from f2pad_jax.masks import Evidence
from f2pad_jax.objective import Problem, paper_weight, sparsity_weight
from f2pad_jax.settings import Settings
from f2pad_jax.solvers import Outcome, solve
from f2pad_jax.units import denormalise, normalise, resized, to_unit

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
    mask: Bool[Array, "h w"]
    """m0: where ``excess`` is above 1."""
    region: Bool[Array, "h w"]


class Solved(eqx.Module):
    """What the solver makes of it, at the detector's size."""

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
    image is solved in the smallest window of :data:`WINDOWS` that holds its suspect region, which is several times faster;
    one program is compiled per window size and kept. An image's result never depends on the others of its batch.

    Args:
        detector: a fitted detector.
        images: ``(h, w)``, ``(h, w, 3)`` or ``(n, h, w, 3)``; uint8, uint16 or float in 0..1; any size. They are resized to
            the detector's size and the results back; at the detector's own size nothing is resized.
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
            return compose(image, coarse, solve_window(detector, coarse, constants, inpaint))

        results = jax.lax.map(whole, batch, batch_size=batch_size)
    else:
        results = _refine_on_host(detector, batch, constants, inpaint, batch_size, progress)
    results = dataclasses.replace(results, inpainter=inpainter)
    return results if unit.ndim == 4 else jax.tree.map(lambda leaf: leaf[0], results)


def look(detector: AbstractDetector, image: Float[Array, "h w 3"], settings: Settings) -> Coarse:
    """Coarse map, m0 and suspect region of an image in 0..1."""
    x = normalise(resized(image, detector.size))
    anomaly_map = detector.anomaly_map(x)
    excess = detector.excess(anomaly_map)
    mask = detector.coarse_mask(anomaly_map)
    return Coarse(x, anomaly_map, excess, mask, regions.suspect_region(mask, excess > settings.spill, settings.dilation))


def solve_window(
    detector: AbstractDetector,
    coarse: Coarse,
    settings: Settings,
    inpaint: Inpainter = exemplar,
    window: tuple[int, int] | None = None,
) -> Solved:
    """Algorithm 1 from the coarse result, inside a window of the given size (default: the whole image)."""
    size = window or (coarse.x.shape[0], coarse.x.shape[1])
    corner = regions.window_offset(coarse.region, size, detector.stride)

    def crop(image: Array) -> Array:
        return jax.lax.dynamic_slice(image, (*corner, *[0] * (image.ndim - 2)), (*size, *image.shape[2:]))

    def paste(part: Array, whole: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, part, (*corner, *[0] * (part.ndim - 2)))

    s, x = settings, crop(coarse.x)

    def decompose(region: Bool[Array, "h w"], phase):
        """Split x into n + a inside ``region``: lines 1-9."""
        sparse, learning_rate, limit = phase
        n0 = crop(inpaint(coarse.x, paste(region, jnp.zeros_like(coarse.mask))))  # line 1
        problem = Problem.make(  # line 2
            detector,
            x,
            region,
            detector.locate(n0, corner),
            alpha1=s.alpha1,
            alpha2=s.alpha2,
            penalty=s.penalty,
            reach=s.reach,
        )
        beta = paper_weight(s.beta0, coarse.mask) if s.beta0 is not None else sparsity_weight(problem, n0, s.sparsity)
        problem = problem.with_beta(sparse * beta)
        solver = eqx.tree_at(lambda s: s.learning_rate, s.solver, learning_rate)
        solution = solve(solver, problem, n0, max_steps=limit, steps_per_check=s.steps_per_check)  # lines 3-8
        evidence = Evidence(problem, n0, solution.n, crop(coarse.excess))
        mask = jax.lax.cond(sparse > 0, lambda: s.decision(solver, evidence), lambda: region)  # line 9
        return mask, (mask, solution)

    # first the mask; then n again inside it, with β = 0 and gentler steps (line 10): one program, run twice
    phases = (
        jnp.array([1.0, 0.0]),
        jnp.array([s.solver.learning_rate, s.restore_rate]),
        jnp.array([s.max_steps, s.restore_steps]),
    )
    _, (masks, solutions) = jax.lax.scan(decompose, crop(coarse.region), phases)
    mask, first = masks[0], jax.tree.map(lambda leaf: leaf[0], solutions)
    n = jnp.where(mask[..., None], solutions.n[1], x)
    return Solved(paste(mask, jnp.zeros_like(coarse.mask)), paste(n, coarse.x), first.steps, first.objective, first.outcome)


def compose(image: Float[Array, "h w 3"], coarse: Coarse, solved: Solved) -> Refined:
    """Results at the size of ``image`` (0..1); masks are resized bilinearly and cut at one half."""
    size = image.shape[:2]

    def enlarged(values: Array) -> Array:
        shape = (*size, *values.shape[2:])
        return values if values.shape == shape else jax.image.resize(values, shape, "linear")

    def enlarged_mask(mask: Bool[Array, "h w"], level: float = 0.5) -> Bool[Array, "h2 w2"]:
        return enlarged(mask.astype(jnp.float32)) > level

    mask = enlarged_mask(solved.mask)
    normal = jnp.where(mask[..., None], jnp.clip(enlarged(denormalise(solved.n)), 0.0, 1.0), image)
    return Refined(
        mask=mask,
        normal=normal,
        anomaly=image - normal,
        coarse_map=enlarged(coarse.anomaly_map),
        coarse_mask=enlarged_mask(coarse.mask),
        region=enlarged_mask(coarse.region, 0.0),
        steps=solved.steps,
        objective=solved.objective,
        outcome=solved.outcome,
    )


def _refine_on_host(detector, batch, settings, inpaint, batch_size, progress) -> Refined:
    """Choose each image's window, then run images of the same window together, ``batch_size`` at a time."""
    total = len(batch)
    coarse = [_look(detector, image, settings) for image in batch]
    groups: dict[tuple[int, int] | None, list[int]] = {}
    for i, c in enumerate(coarse):
        window = None
        if np.any(c.region):
            window = regions.window_size(np.asarray(c.region), settings.margin, detector.stride, WINDOWS)
        groups.setdefault(window, []).append(i)
    solved: dict[int, Solved] = {i: _unchanged(coarse[i]) for i in groups.pop(None, [])}
    progress(len(solved), total)
    for window, members in groups.items():
        for start in range(0, len(members), batch_size):
            chunk = members[start : start + batch_size]
            padded = chunk + chunk[-1:] * (batch_size - len(chunk))
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[coarse[i] for i in padded])
            out = _solve_batch(detector, stacked, settings, inpaint, window)
            for lane, i in enumerate(chunk):
                solved[i] = jax.tree.map(lambda leaf, lane=lane: leaf[lane], jax.block_until_ready(out))
            progress(len(solved), total)
    results = [_compose(batch[i], coarse[i], solved[i]) for i in range(total)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


_look = jax.jit(look)
_compose = jax.jit(compose)


@eqx.filter_jit
def _solve_batch(detector, coarse: Coarse, settings, inpaint, window) -> Solved:
    def one(coarse: Coarse) -> Solved:
        return solve_window(detector, coarse, settings, inpaint, window)

    if len(coarse.x) == 1:  # no batch axis inside the loop: XLA's CPU backend runs it faster
        return jax.tree.map(lambda leaf: leaf[None], one(jax.tree.map(lambda leaf: leaf[0], coarse)))
    return jax.vmap(one)(coarse)


def _unchanged(coarse: Coarse) -> Solved:
    """The result of an image whose coarse mask is empty; what the solver would return, without compiling it."""
    zero = jnp.zeros((), jnp.int32)
    return Solved(coarse.mask, coarse.x, zero, jnp.zeros(()), jnp.full_like(zero, int(Outcome.NOTHING_TO_REFINE)))
