"""Every constant of the method in one place: the paper's value beside ours, and the reason where they differ."""

import equinox as eqx
import wadler_lindig
from jaxtyping import Array, Int

from f2pad_jax.masks import AbstractDecision, Mixture, Residual
from f2pad_jax.penalties import AbstractPenalty, Log
from f2pad_jax.solvers import AbstractSolver, Descent, Sharing
from f2pad_jax.units import Scalar


class Settings(eqx.Module):
    """Settings of :func:`f2pad_jax.refine`. Numbers are traced (changing one is no new compile) unless marked static.

    Those of the step are the solver's own: :class:`~f2pad_jax.Descent`, :class:`~f2pad_jax.Sharing`.
    """

    # Eq. (12)
    alpha1: Scalar = 0.01
    """Weight of the pixel prior, times the detector's own factor if it was tuned; 0 for none. Paper: grid search per
    category, on labels."""
    alpha2: Scalar = 1e-4
    """Weight of total variation; 0 for none. Paper: 1e-4."""
    sparsity: Scalar = 1.5
    """β = sparsity · Σ excess scores of x / (l_a(x - n0) - l_a(0)), see :func:`f2pad_jax.objective.sparsity_weight`, times
    the detector's own factor if it was tuned."""
    beta0: Scalar | None = None
    """If given, the paper's β = beta0 / Σm0 instead. Paper: grid search per category."""
    penalty: AbstractPenalty = Log()
    """l_a. Paper: LOG, ε = 1e-4."""

    solver: AbstractSolver = Descent()
    """How Eq. (12) is minimised. Paper: :meth:`paper`'s."""
    max_steps: int | Int[Array, ""] = 150
    """Most steps; rounded up to a multiple of ``steps_per_check``. Paper: 1200."""
    steps_per_check: int = eqx.field(static=True, default=10)
    """Steps between looks at the stopping rules and at the detector's candidates, static. Paper: 1."""

    # region and mask
    dilation: int = eqx.field(static=True, default=6)
    """Growth of m0, pixels, static. Paper: "simple morphological dilation"."""
    spill: Scalar = 0.5
    """Pixels around m0 whose coarse map stands out by this share of its border are suspect too. Paper: none, infinity."""
    reach: int | None = eqx.field(static=True, default=8)
    """Positions within this many pixels of the region enter l_n, static. Paper: all affected; None: all there are."""
    margin: int | None = eqx.field(static=True, default=8)
    """Pixels of context a window keeps around the region, static. Paper: whole image, which None is."""
    decision: AbstractDecision = Mixture()
    """How the mask is drawn. Paper: :class:`~f2pad_jax.Residual`."""
    restore_rate: Scalar = 0.03
    """Learning rate of the re-estimation of n: there is no sparsity term whose kink needs long steps, and short ones leave
    no noise. Paper: that of the first solve."""
    restore_steps: int | Int[Array, ""] = 50
    """Most steps of the re-estimation of n with β = 0 inside the mask; 0 leaves the first guess. Paper: to convergence."""

    def described(self) -> str:
        """Every constant with its value, in a line, to be kept with results."""
        return wadler_lindig.pformat(self, width=10**6, hide_defaults=False, short_arrays=False)

    @staticmethod
    def paper(*, alpha1: Scalar = 0.01, beta0: Scalar = 3000.0) -> "Settings":
        """The paper's own, to the letter where it says and marked where it does not.

        Args:
            alpha1: the paper searches a grid for each category.
            beta0: the same.
        """
        rate = 0.01  # Not stated
        solver = Descent(
            learning_rate=rate,
            delta=0.05,  # none, and the step diverges as a -> 0
            clip=0.03,
            sharing=Sharing(cutoff=0.0),
            settled=0.0,
            crossing=True,
        )
        return Settings(
            alpha1=alpha1,
            beta0=beta0,
            solver=solver,
            max_steps=1200,
            steps_per_check=1,
            spill=float("inf"),
            reach=None,
            margin=None,
            decision=Residual(),
            restore_rate=rate,
            restore_steps=1200,
        )
