"""How the solver got there: Eq. (12) term by term, and n and the mask on the way. For looking, not for speed."""

from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Bool, Float, Int, Shaped

from f2pad_jax import region as regions
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.evaluation.pictures import overlay, to_uint8
from f2pad_jax.inpaint import Inpainter, choose
from f2pad_jax.masks import Evidence
from f2pad_jax.objective import Terms
from f2pad_jax.settings import Settings
from f2pad_jax.solvers import Outcome, Recorded, Solution, solve
from f2pad_jax.units import denormalise, to_unit
from f2pad_jax.window import Coarse, Window, look, untouched


class History(NamedTuple):
    """Of one image, as NumPy arrays; h and w are the image's own size."""

    image: Float[np.ndarray, "h w 3"]
    """The input, in 0..1."""
    objective: Float[np.ndarray, " t"]
    """Eq. (12) before every step. It and its sparsity term are counted from a = 0, where LOG is far below zero."""
    terms: dict[str, Float[np.ndarray, " t"]]
    """What its four terms add to it: feature, prior, variation, sparsity."""
    steps: Int[np.ndarray, " k"]
    """How many steps came before each of the following."""
    n: Float[np.ndarray, "k h w 3"]
    """The normal image, in 0..1; the first is n0, the last the solution."""
    masks: Bool[np.ndarray, "k h w"]
    """What the mask would be if the solver stopped there."""
    outcome: Outcome

    def save_csv(self, path: str | Path) -> None:
        """The objective and its terms, a line per step."""
        table = np.column_stack([np.arange(len(self.objective)), self.objective, *self.terms.values()])
        header = ",".join(["step", "objective", *self.terms])
        np.savetxt(path, table, fmt=["%d"] + ["%.6g"] * (table.shape[1] - 1), delimiter=",", header=header, comments="")

    def save_animation(self, path: str | Path, *, milliseconds: int = 150) -> None:
        """N on the way beside the input with its mask, as a GIF or whatever Pillow makes of the name."""
        frames = [
            PIL.Image.fromarray(np.concatenate([overlay(self.image, mask), to_uint8(n)], axis=1))
            for n, mask in zip(self.n, self.masks, strict=True)
        ]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)

    def save_figure(self, path: str | Path, *, columns: int = 6) -> None:
        """N and masks at some steps above the curves of the objective and its terms.

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


def figures() -> Any:
    """Matplotlib's ``Figure``.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("figures need matplotlib; run: pip install 'f2pad-jax[plots]'") from None
    return Figure


def history(
    detector: AbstractDetector,
    image: Shaped[Array | np.ndarray, "..."],
    *,
    settings: Settings | None = None,
    inpaint: Inpainter | str | None = None,
    every: int = 10,
) -> History:
    """Solve for one image, as :func:`f2pad_jax.refine` does before it re-estimates n, and keep what happened.

    Departure from ``refine``: all suspect pixels are solved for together, in one window.

    Args:
        detector: a fitted detector.
        image: ``(h, w)`` or ``(h, w, 3)``, as ``refine`` takes it.
        settings: as for ``refine``.
        inpaint: as for ``refine``.
        every: steps from one n and mask that is kept to the next.

    Raises:
        ImageError: several images, or as ``refine``.
        OptionError: ``every`` is less than 1.
    """
    if every < 1:
        raise OptionError(f"every={every}: keep n every 1 step or more")
    settings = settings or Settings()
    constants = jax.tree.map(jnp.asarray, settings)
    unit = to_unit(image)
    if unit.ndim == 4:
        raise ImageError("a history is one image's: pass them one at a time")
    _, inpaint = choose(inpaint, detector.calibrated.normals, traced=False)
    coarse = look(detector, unit, constants)
    region = np.asarray(coarse.region)
    if not region.any() or region.all():
        nothing = untouched(unit, coarse)
        outcome, mask = Outcome(int(nothing.outcome)), np.asarray(nothing.mask)
        none, kept = np.zeros(0, np.float32), np.asarray(unit)
        return History(kept, none, dict.fromkeys(Terms._fields, none), np.zeros(1, int), kept[None], mask[None], outcome)
    window, full = (region.shape[0], region.shape[1]), (unit.shape[0], unit.shape[1])
    if settings.margin is not None and detector.local:
        window = regions.window_size(region, settings.margin, detector.stride, regions.WINDOWS)
    own = regions.own_size(region, window, full, settings.margin)
    limit = -(-int(settings.max_steps) // settings.steps_per_check) * settings.steps_per_check
    solution, objective, terms, n, masks = _solve(detector, unit, coarse, constants, inpaint, (window, own), limit, every)
    count = int(solution.steps)
    steps = np.append(np.arange(0, count, every), count)
    rows = np.append(np.arange(len(steps) - 1), len(n) - 1)
    return History(
        np.asarray(unit),
        np.asarray(objective[:count]),
        {name: np.asarray(values[:count]) for name, values in terms._asdict().items()},
        steps,
        np.clip(np.asarray(n)[rows], 0.0, 1.0),
        np.asarray(masks)[rows],
        Outcome(int(solution.outcome)),
    )


@eqx.filter_jit
def _solve(
    detector, image, coarse: Coarse, settings: Settings, inpaint, sizes, limit: int, every: int
) -> tuple[Solution, Array, Terms, Array, Array]:
    s, w = settings, Window.around(detector, image, coarse, coarse.region, *sizes)
    problem, n0 = w.pose(detector, w.region, s, inpaint)
    solver = Recorded(solver=s.solver, max_steps=limit, every=every)  # pyright: ignore[reportCallIssue]
    solution = solve(solver, problem, n0, max_steps=s.max_steps, steps_per_check=s.steps_per_check)
    record = solution.memory
    kept = jnp.concatenate([record.n, solution.n[None]])
    masks = jax.lax.map(lambda n: s.decision(s.solver, Evidence(problem, n0, n, w.excess, w.threshold)), kept)
    least = problem.sparsity(problem.x)
    terms = problem.weighted(record.terms._replace(sparsity=record.terms.sparsity - least))
    objective = record.objective - problem.weights.beta * least
    empty = jnp.zeros(image.shape[:2], bool)
    images = jax.vmap(lambda n: denormalise(w.own.paste(n, w.image)))(kept)
    return solution, objective, terms, images, jax.vmap(lambda mask: w.own.paste(mask, empty))(masks)
