"""Record of a solve: Eq. (12) term by term at every step, and n and the mask at some. It is for inspection, not speed."""

from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images._views import size_of
from f2pad_jax.images.pictures import figures, overlay, to_uint8
from f2pad_jax.images.pixels import denormalise, to_unit
from f2pad_jax.inpainting._choice import choose
from f2pad_jax.inpainting.base import Inpainter
from f2pad_jax.method import _tiling as tiling
from f2pad_jax.method.algorithm import start, untouched
from f2pad_jax.method.coarse import Given, look
from f2pad_jax.method.decision import Evidence
from f2pad_jax.method.settings import Settings
from f2pad_jax.method.window import Window
from f2pad_jax.objective.problem import Problem, Terms
from f2pad_jax.solvers.base import AbstractSolver, State
from f2pad_jax.solvers.loop import Iterate, Outcome, advance, finish


class History(NamedTuple):
    """History of one image, as NumPy arrays; h and w are the image's own size."""

    image: Float[np.ndarray, "h w 3"]
    """Input, in 0..1."""
    objective: Float[np.ndarray, " t"]
    """Value of Eq. (12) before every step. Its sparsity term is shifted to 0 at a = 0, where LOG is far below zero."""
    terms: dict[str, Float[np.ndarray, " t"]]
    """Weighted value of each term before every step: feature, prior, variation, sparsity."""
    steps: Int[np.ndarray, " k"]
    """Number of steps before each recorded n and mask."""
    n: Float[np.ndarray, "k h w 3"]
    """Normal images, in 0..1; the first is n0, the last the solution."""
    masks: Bool[np.ndarray, "k h w"]
    """Masks that the decision draws from each recorded n."""
    outcome: Outcome
    """Outcome of the solve."""

    def save_csv(self, path: str | Path) -> None:
        """Writes the objective and its terms, one line per step."""
        table = np.column_stack([np.arange(len(self.objective)), self.objective, *self.terms.values()])
        header = ",".join(["step", "objective", *self.terms])
        np.savetxt(path, table, fmt=["%d"] + ["%.6g"] * (table.shape[1] - 1), delimiter=",", header=header, comments="")

    def save_animation(self, path: str | Path, *, milliseconds: int = 150) -> None:
        """Writes an animation of input, mask and n, in the format of the file's suffix, such as GIF."""
        frames = [
            PIL.Image.fromarray(np.concatenate([overlay(self.image, mask), to_uint8(n)], axis=1))
            for n, mask in zip(self.n, self.masks, strict=True)
        ]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)

    def save_figure(self, path: str | Path, *, columns: int = 6) -> None:
        """Draws n and masks at some steps above the curves of the objective and its terms.

        Raises:
            OptionError: matplotlib is not installed.
        """
        chosen = np.unique(np.linspace(0, len(self.steps) - 1, columns).round().astype(int))
        figure = figures()(figsize=(2 * columns, 7), layout="constrained")
        axes = figure.subplot_mosaic(
            [[f"n{k}" for k in chosen], [f"m{k}" for k in chosen], ["curves"] * len(chosen)], height_ratios=[1, 1, 1.4]
        )
        for k in chosen:
            axes[f"n{k}"].imshow(to_uint8(self.n[k]))
            axes[f"n{k}"].set_title(f"n after {self.steps[k]} steps", fontsize=9)
            axes[f"m{k}"].imshow(overlay(self.image, self.masks[k]))
            for row in "nm":
                axes[f"{row}{k}"].axis("off")
        curves = axes["curves"]
        curves.plot(self.objective, color="black", label="objective")
        for name, values in self.terms.items():
            curves.plot(values, label=name)
        curves.set(xlabel="step", ylabel="part of the objective", yscale="symlog")
        curves.legend()
        figure.savefig(path, dpi=110)


def history(
    detector: AbstractDetector,
    image: Shaped[Array | np.ndarray, "..."],
    *,
    settings: Settings | None = None,
    inpaint: Inpainter | str = "exemplar",
    ignore: Bool[Array | np.ndarray, "h w"] | None = None,
    coarse_map: Num[Array | np.ndarray, "_h _w"] | None = None,
    coarse_mask: Bool[Array | np.ndarray, "_H _W"] | None = None,
    every: int = 10,
) -> History:
    """Solves for the mask of one image, like :func:`f2pad_jax.refine`, and records the steps.

    Departures from ``refine``: the whole region is solved in one window, and n is not re-estimated.

    Args:
        detector: fitted detector.
        image: ``(h, w)`` or ``(h, w, 3)``, as ``refine`` takes it.
        settings: constants of the method.
        inpaint: inpainter of the first guess, as for ``refine``.
        ignore: pixels that do not count.
        coarse_map: coarse map from elsewhere, as for ``refine``.
        coarse_mask: coarse mask from elsewhere, as for ``refine``.
        every: steps between two recorded normal images and masks.

    Raises:
        ImageError: several images, or an image that ``refine`` refuses.
        OptionError: ``every`` is less than 1; or as for ``refine``.
    """
    if every < 1:
        raise OptionError(f"every={every}: at least 1 is needed")
    settings, unit = (settings or Settings()).traced(), to_unit(image)
    if unit.ndim == 4:
        raise ImageError("a history records one image: pass images one at a time")
    ignored, given = None if ignore is None else jnp.asarray(ignore, bool), Given.of(coarse_map, coarse_mask)
    coarse = look(detector, unit, settings, ignored, given)
    region = np.asarray(coarse.region)
    if not region.any() or coarse.covered:
        blank = untouched(unit, coarse)
        outcome, mask = Outcome(int(blank.outcome)), np.asarray(blank.mask)
        no_steps, pixels = np.zeros(0, np.float32), np.asarray(unit)
        return History(
            pixels, no_steps, dict.fromkeys(Terms._fields, no_steps), np.zeros(1, int), pixels[None], mask[None], outcome
        )
    size = size_of(region)
    if settings.margin is not None and detector.local:
        size = tiling.window_size(region, settings.margin, detector.stride, tiling.WINDOWS)
    crop = tiling.crop_size(region, size, size_of(unit), settings.margin)
    window = _around(detector, unit, coarse, coarse.region, size, crop)
    inpainter = choose(inpaint, detector.calibrated.normals)
    run = _start(detector, window, window.region, jnp.asarray(0), settings, inpainter)
    problem, iterate = run.with_detector(detector), run.iterate
    records = []
    while bool(iterate.going(run.max_steps)):
        iterate, record = _advance(settings.solver, problem, iterate, settings.steps_per_check)
        records.append(record)
    solution = finish(problem, iterate)
    n, objective, terms = (np.concatenate(leaves) for leaves in zip(*records, strict=True)) if records else _NO_RECORDS
    steps = np.append(np.arange(0, len(objective), every), len(objective))
    kept = [*n[steps[:-1]], solution.n]
    masks = [_mask(settings, problem, window, run.n0, n) for n in kept]
    empty = jnp.zeros(size_of(unit), bool)
    return History(
        np.asarray(unit),
        objective,
        dict(zip(Terms._fields, terms.T, strict=True)),
        steps,
        np.stack([np.clip(denormalise(window.crop.paste(jnp.asarray(n), window.image)), 0.0, 1.0) for n in kept]),
        np.stack([np.asarray(window.crop.paste(mask, empty)) for mask in masks]),
        Outcome(int(solution.outcome)),
    )


_around, _start = eqx.filter_jit(Window.around), eqx.filter_jit(start)
_NO_RECORDS = np.zeros((0, 0)), np.zeros(0, np.float32), np.zeros((0, len(Terms._fields)), np.float32)


@eqx.filter_jit
def _advance(solver: AbstractSolver, problem: Problem, iterate: Iterate, num_steps: int) -> tuple[Iterate, tuple]:
    """Advances the loop; records n, Eq. (12) and its terms before every step, with sparsity shifted to 0 at a = 0."""
    least = problem.sparsity(problem.x)

    def observe(problem: Problem, before: State, after: State) -> tuple[Array, Array, Array]:
        terms = problem.terms(before.n)
        terms = problem.weighted(terms._replace(sparsity=terms.sparsity - least))
        return before.n, after.objective - problem.weights.beta * least, jnp.stack(terms)

    return advance(solver, problem, iterate, num_steps, observe)


@eqx.filter_jit
def _mask(settings: Settings, problem: Problem, window: Window, n0: Array, n: Array) -> Bool[Array, "h w"]:
    return settings.decision(settings.solver, Evidence(problem, n0, n, window.excess, window.threshold)) > 0.5
