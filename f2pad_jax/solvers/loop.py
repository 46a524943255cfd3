"""The loop of Algorithm 1: share the gradient, scale the step, move by Adan, until nothing is gained."""

import dataclasses
import enum
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax.objective import Problem
from f2pad_jax.settings import Settings
from f2pad_jax.solvers.adan import scale_by_adan
from f2pad_jax.solvers.sharing import GradientSharing, bilateral_sharing
from f2pad_jax.units import HIGHEST, LOWEST


class Outcome(enum.IntEnum):
    """What became of one image."""

    CONVERGED = 0
    STEP_LIMIT = 1
    NOTHING_TO_REFINE = 2
    NON_FINITE = 3

    @property
    def message(self) -> str:
        """The same in a sentence."""
        return _MESSAGES[self]


_MESSAGES = {
    Outcome.CONVERGED: "converged",
    Outcome.STEP_LIMIT: "stopped at the step limit; the mask is usable, more steps may sharpen it",
    Outcome.NOTHING_TO_REFINE: "no pixel of the coarse map exceeds the threshold: the image is good, the mask empty",
    Outcome.NON_FINITE: "the objective became non-finite; the last finite state was kept (lower the learning rate)",
}


class State(NamedTuple):
    """What the next step needs."""

    n: Float[Array, "h w 3"]
    moments: optax.OptState
    steps: Int[Array, ""]
    objective: Float[Array, ""]
    """Before the last step."""
    failed: Bool[Array, ""]


class Solution(NamedTuple):
    """Where the loop ended."""

    n: Float[Array, "h w 3"]
    """Normalised intensity."""
    steps: Int[Array, ""]
    objective: Float[Array, ""]
    outcome: Int[Array, ""]


class Solver(eqx.Module):
    """Adan on shared gradients with the adaptive step of Eq. (15)."""

    settings: Settings
    sharing: GradientSharing
    adan: optax.GradientTransformation = eqx.field(static=True)

    @staticmethod
    def make(x: Float[Array, "h w 3"], settings: Settings) -> "Solver":
        """The solver for input ``x``: line 3 of Algorithm 1."""
        s = settings
        sharing = bilateral_sharing(
            x, radius=s.sharing_radius, sigma0=s.sigma0, sigma1=s.sigma1, tolerance=s.sharing_tolerance
        )
        return Solver(s, sharing, _ADAN)

    def init(self, problem: Problem, n0: Float[Array, "h w 3"]) -> State:
        """Start at n0 inside the region, at x outside."""
        n = jnp.where(problem.region[..., None], n0, problem.x)
        return State(n, self.adan.init(n), jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, n.dtype), jnp.zeros((), bool))

    def step(self, problem: Problem, state: State) -> State:
        """Lines 5-7 of Algorithm 1."""
        s, inside = self.settings, problem.region[..., None]
        objective, gradient = jax.value_and_grad(problem)(state.n)
        g = self.sharing(jnp.where(inside, gradient, 0.0))  # Eq. (13)
        g = jnp.clip(g, -s.clip, s.clip)
        direction, moments = self.adan.update(g, state.moments)
        a = jnp.abs(problem.x - state.n)
        gamma = s.learning_rate * s.gamma0 / jnp.maximum(a, s.delta)  # Eq. (15)
        n = jnp.clip(state.n - gamma * jnp.asarray(direction), LOWEST, HIGHEST)
        n = jnp.where(inside, n, problem.x)
        ok = jnp.isfinite(objective) & jnp.all(jnp.isfinite(n)) & ~state.failed
        return State(jnp.where(ok, n, state.n), moments, state.steps + 1, jnp.where(ok, objective, state.objective), ~ok)


_ADAN = scale_by_adan()


def solve(problem: Problem, n0: Float[Array, "h w 3"], settings: Settings, max_steps: int | Int[Array, ""]) -> Solution:
    """Minimise Eq. (12) from n0: lines 3-8 of Algorithm 1.

    Every ``settings.steps_per_check`` steps the detector refreshes its view of n, and the loop ends where a step gained
    less than ``settings.tolerance`` on average since the last look (departure: the paper compares two successive steps;
    ``steps_per_check=1`` is that).
    """
    solver = Solver.make(problem.x, settings)
    k = settings.steps_per_check
    empty = ~jnp.any(problem.region)

    def chunk(carry):
        state, where, _ = carry
        where = problem.detector.refresh(state.n, where)
        now = dataclasses.replace(problem, where=where)
        new = jax.lax.fori_loop(0, k, lambda _, s: solver.step(now, s), state)
        converged = (state.objective - new.objective) / k < settings.tolerance  # never at the first look: inf - finite
        return new, where, converged

    def going(carry):
        state, _, converged = carry
        return ~converged & ~state.failed & (state.steps < max_steps)

    state, _, converged = jax.lax.while_loop(going, chunk, (solver.init(problem, n0), problem.where, empty))
    outcome = jnp.select(
        [empty, state.failed, converged],
        [int(Outcome.NOTHING_TO_REFINE), int(Outcome.NON_FINITE), int(Outcome.CONVERGED)],
        int(Outcome.STEP_LIMIT),
    )
    return Solution(state.n, state.steps, jnp.where(empty, 0.0, state.objective), outcome)
