"""Constants of the method: the paper's value beside ours, and the reason where they differ."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import wadler_lindig
from jaxtyping import Array, Int

from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.errors import OptionError
from f2pad_jax.images.pixels import Scalar
from f2pad_jax.method.decision import AbstractDecision, Mixture, Residual
from f2pad_jax.objective.penalties import AbstractPenalty, Log
from f2pad_jax.solvers.base import AbstractSolver, Stopping
from f2pad_jax.solvers.descent import Descent
from f2pad_jax.solvers.sharing import Sharing


class Settings(eqx.Module):
    """Constants of :func:`f2pad_jax.refine`. Another value compiles no new program, except for a field marked "static".

    The constants of a step are fields of the solver, such as :class:`~f2pad_jax.solvers.Descent`. ``print(Settings())``
    shows all of them.
    """

    # Eq. (12)
    alpha1: Scalar = 0.01
    """Weight of the pixel prior; 0 for none. Paper: grid search per category, on labels."""
    alpha2: Scalar = 1e-4
    """Weight of total variation; 0 for none. Paper: 1e-4."""
    sparsity: Scalar = 1.5
    """Factor in β = sparsity · E / (l_a(x - n0) - l_a(0)), with E the sum of x's scores above 1, see
    :func:`f2pad_jax.objective.problem.sparsity_weight`; 0 for none."""
    beta0: Scalar | None = None
    """Numerator of the paper's β = beta0 / Σm0; if given, it replaces ``sparsity``. Paper: grid search per category."""
    penalty: AbstractPenalty = Log()
    """Sparsity penalty l_a. Paper: LOG, ε = 1e-4."""

    # the solver
    solver: AbstractSolver = Descent()
    """Method that minimises Eq. (12). Paper: the solver of :meth:`paper`."""
    max_steps: int | Int[Array, ""] = 150
    """Limit of steps, rounded up to a multiple of ``steps_per_check``. Paper: 1200."""
    steps_per_check: int = eqx.field(static=True, default=10)
    """Number of steps after which the stopping rules are checked and the detector's context refreshed, static. Paper: 1."""
    restore_rate: Scalar = 0.1
    """Learning rate of the re-estimation of n, as a ratio of the solver's. Short steps leave no noise. Only the kink of
    the sparsity term needs long steps, and this term is absent here. Paper: 1."""
    restore_steps: int | Int[Array, ""] = 50
    """Limit of steps of the re-estimation of n, with β = 0 inside the mask; 0 for none. Paper: to convergence."""

    # verdict, region and mask
    false_alarms: Scalar = 0.05
    """Share of normal images that may be called defective. A good image gets an empty mask. Paper: all (1)."""
    dilation: int = eqx.field(static=True, default=6)
    """Growth of m0, pixels, static. Paper: "simple morphological dilation"."""
    hysteresis: Scalar = 0.5
    """Lower hysteresis threshold of the suspect region, on the scale of ``Coarse.excess``: 1 is the border of m0. Connected
    pixels above this threshold are suspect too. Paper: none (infinity)."""
    reach: int | None = eqx.field(static=True, default=8)
    """Distance from the region within which feature positions enter l_n, pixels, static. Paper: all affected positions;
    None: all positions."""
    margin: int | None = eqx.field(static=True, default=8)
    """Context that a window keeps around the region, pixels, static; None: the whole image."""
    decision: AbstractDecision = Mixture()
    """Rule that draws the mask. Paper: :class:`~f2pad_jax.method.Residual`."""

    def __check_init__(self):
        """Refuses numbers that no program can use.

        Raises:
            OptionError: a number is out of its range.
        """
        ranges = {"steps_per_check": (1, math.inf), "hysteresis": (-math.inf, math.inf)}
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), ranges.get(field.name, (0, math.inf))
            if isinstance(value, (int, float)) and not low <= value <= high:
                raise OptionError(f"{field.name}={value:g}: must be between {low:g} and {high:g}")
        if isinstance(self.false_alarms, (int, float)) and not 0 < self.false_alarms <= 1:
            raise OptionError(f"false_alarms={self.false_alarms:g}: must be above 0 and at most 1")

    def adapted(self, detector: AbstractDetector) -> "Settings":
        """Returns the settings in force for a detector.

        α1 and the sparsity are multiplied by the factors found by tuning, and the sparsity by the ``sparsity_scale`` of the
        detector's class. Nothing else scales them.
        """
        factors = detector.calibrated.factors
        sparsity = factors.sparsity * detector.sparsity_scale * self.sparsity
        return dataclasses.replace(self, alpha1=factors.alpha1 * self.alpha1, sparsity=sparsity)

    def traced(self) -> "Settings":
        """Returns the settings with arrays of 32 bits in place of numbers, so that other values compile no new program."""
        types = {float: jnp.float32, int: jnp.int32}  # JAX may be set to 64 bits
        return jax.tree.map(lambda value: jnp.asarray(value, types.get(type(value))), self)

    def described(self) -> str:
        """Returns every constant with its value, in one line, to be kept with results."""
        return wadler_lindig.pformat(self, width=10**6, hide_defaults=False, short_arrays=False)

    def __str__(self) -> str:
        return wadler_lindig.pformat(self, width=100, hide_defaults=False, short_arrays=False)

    @staticmethod
    def fast() -> "Settings":
        """Returns settings without a step: the mask is drawn from the first guess n0, which also stays the normal image."""
        return Settings(max_steps=0, restore_steps=0)

    @staticmethod
    def paper(*, alpha1: Scalar = 0.01, beta0: Scalar = 3000.0) -> "Settings":
        """Returns the paper's settings, with our choice where the paper is silent.

        Args:
            alpha1: weight of the pixel prior; the paper searches a grid for each category.
            beta0: numerator of β; the paper searches a grid for each category.
        """
        solver = Descent(
            learning_rate=0.01,  # paper: not stated
            delta=0.05,  # paper: none, but the step then diverges as a approaches 0
            clip=0.03,
            sharing=Sharing(cutoff=0.0),
            may_cross_input=True,
            stopping=Stopping(mask_tolerance=0.0),
        )
        return Settings(
            alpha1=alpha1,
            beta0=beta0,
            solver=solver,
            max_steps=1200,
            steps_per_check=1,
            restore_rate=1.0,
            restore_steps=1200,
            false_alarms=1.0,
            hysteresis=float("inf"),
            reach=None,
            margin=None,
            decision=Residual(),
        )
