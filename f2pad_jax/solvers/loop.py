"""The loop of Algorithm 1, and what it asks of a solver."""

import abc
import dataclasses
import enum
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax.detectors.base import Where
from f2pad_jax.objective import Problem, norm
from f2pad_jax.units import Scalar


class Outcome(enum.IntEnum):
    """What became of one image."""

    CONVERGED = 0
    STEP_LIMIT = 1
    NOTHING_TO_REFINE = 2
    NON_FINITE = 3
    COVERS_IMAGE = 4

    @property
    def message(self) -> str:
        """The same in a sentence."""
        return _MESSAGES[self]


_MESSAGES = {
    Outcome.CONVERGED: "converged",
    Outcome.STEP_LIMIT: "stopped at the step limit; the mask is usable, more steps may sharpen it",
    Outcome.NOTHING_TO_REFINE: "no pixel of the coarse map exceeds the threshold: the image is good, the mask empty",
    Outcome.NON_FINITE: "the objective became non-finite; the last finite state was kept (lower the learning rate)",
    Outcome.COVERS_IMAGE: "the suspect region covers the image: nothing is left to go by; the mask is the coarse one",
}


class State(NamedTuple):
    """What the next step needs."""

    n: Float[Array, "h w 3"]
    objective: Float[Array, ""]
    """Before the last step."""
    memory: Any
    """The solver's own: moments, fixed weights."""


def start(problem: Problem, n0: Float[Array, "h w 3"], memory: Any) -> State:
    """The state with n0 inside the region, x outside, and an objective anything improves on."""
    n = jnp.where(problem.region[..., None], n0, problem.x)
    return State(n, jnp.asarray(jnp.inf, n.dtype), memory)


class Solution(NamedTuple):
    """Where the loop ended."""

    n: Float[Array, "h w 3"]
    """Normalised intensity."""
    steps: Int[Array, ""]
    objective: Float[Array, ""]
    outcome: Int[Array, ""]
    memory: Any
    """The solver's own, after the last step."""


FEW_STEPS = 5
"""In fewer, it may be by chance that no pixel comes or goes."""


class AbstractSolver(eqx.Module):
    """A way to minimise Eq. (12): a pytree of its constants with four methods, of which the last two have a default."""

    learning_rate: eqx.AbstractVar[Scalar]
    """Scale of the steps."""
    tolerance: eqx.AbstractVar[Scalar]
    """Converged when the objective falls by less than this a step."""
    settled: eqx.AbstractVar[Scalar]
    """Converged, too, when of the pixels that stand out in a less than this share comes or goes a step, on average between
    looks at least five steps apart, and with sparsity (β > 0) alone, which is what sets them apart; 0: never."""

    def at_rate(self, learning_rate: Scalar) -> "AbstractSolver":
        """The same solver with another learning rate."""
        return eqx.tree_at(lambda solver: solver.learning_rate, self, learning_rate)

    def endless(self) -> "AbstractSolver":
        """The same solver without its stopping rules."""
        return eqx.tree_at(lambda solver: (solver.tolerance, solver.settled), self, (-jnp.inf, 0.0))

    @abc.abstractmethod
    def init(self, problem: Problem, n0: Float[Array, "h w 3"]) -> State:
        """The state to start from: :func:`start` with what the solver remembers."""

    @abc.abstractmethod
    def step(self, problem: Problem, state: State) -> State:
        """One step; n stays x outside the region and a valid image inside."""

    def terminate(self, problem: Problem, before: State, after: State, num_steps: int) -> Bool[Array, ""]:
        """Whether to stop, ``num_steps`` after ``before``; never at the first look, before which the objective is inf.

        Departure: the paper has the first rule alone. Where a flat patch is cut out, n goes on to change inside it long
        after the last pixel has been told apart.
        """
        fall = (before.objective - after.objective) / num_steps
        if num_steps < FEW_STEPS:
            return fall < self.tolerance
        change = 1 - overlap(outstanding(problem, before.n), outstanding(problem, after.n))
        is_settled = (problem.weights.beta > 0) & jnp.isfinite(fall) & (change / num_steps < self.settled)
        return (fall < self.tolerance) | is_settled

    def postprocess(self, problem: Problem, n: Float[Array, "h w 3"], tau: Scalar) -> Bool[Array, "h w"]:
        """The anomalous pixels of a solution (Eq. 2), where |a| exceeds ``tau``."""
        return problem.region & (jnp.linalg.norm(problem.x - n, axis=-1) > tau)


def outstanding(problem: Problem, n: Float[Array, "h w 3"]) -> Bool[Array, "h w"]:
    """The pixels where |a| is more than half its level, which is its mean weighted by itself.

    Of a glaring defect and a faint one in the same problem, that is the glaring one alone.
    """
    size = problem.region * norm(problem.x - n)
    return size > 0.5 * jnp.sum(size**2) / jnp.maximum(jnp.sum(size), 1e-6)


def overlap(one: Bool[Array, "h w"], other: Bool[Array, "h w"]) -> Float[Array, ""]:
    """Intersection over union; 0 of nothing and nothing."""
    return jnp.sum(one & other) / jnp.maximum(jnp.sum(one | other), 1)


class Iterate(NamedTuple):
    """The loop between two looks at the stopping rule."""

    where: Where
    """The detector's view of n."""
    state: State
    steps: Int[Array, ""]
    failed: Bool[Array, ""]
    converged: Bool[Array, ""]

    def going(self, max_steps: int | Int[Array, ""]) -> Bool[Array, ""]:
        """Whether there is a step left to take."""
        return ~self.converged & ~self.failed & (self.steps < max_steps)


def begin(solver: AbstractSolver, problem: Problem, n0: Float[Array, "h w 3"]) -> Iterate:
    """Line 3 of Algorithm 1; already converged where the region is empty."""
    empty = ~jnp.any(problem.region)
    return Iterate(problem.where, solver.init(problem, n0), jnp.zeros((), jnp.int32), jnp.zeros((), bool), empty)


def advance(solver: AbstractSolver, problem: Problem, iterate: Iterate, num_steps: int) -> Iterate:
    """``num_steps`` times lines 5-7 on a view of n that the detector refreshes first, and a look at the stopping rule."""
    before = iterate.state
    where = problem.detector.refresh(problem.view(before.n), iterate.where)
    now = dataclasses.replace(problem, where=where)

    def one(_, carry):
        state, steps, failed = carry
        new = solver.step(now, state)
        failed = failed | ~(jnp.isfinite(new.objective) & jnp.all(jnp.isfinite(new.n)))
        n, objective = jax.tree.map(lambda a, b: jnp.where(failed, a, b), state[:2], new[:2])
        return State(n, objective, new.memory), steps + 1, failed

    state, steps, failed = jax.lax.fori_loop(0, num_steps, one, (before, iterate.steps, iterate.failed))
    return Iterate(where, state, steps, failed, solver.terminate(now, before, state, num_steps))


def finish(problem: Problem, iterate: Iterate) -> Solution:
    """What the loop has come to."""
    _, state, steps, failed, converged = iterate
    empty = ~jnp.any(problem.region)
    outcome = jnp.select(
        [empty, failed, converged],
        [int(Outcome.NOTHING_TO_REFINE), int(Outcome.NON_FINITE), int(Outcome.CONVERGED)],
        int(Outcome.STEP_LIMIT),
    )
    return Solution(state.n, steps, jnp.where(empty, 0.0, state.objective), outcome, state.memory)


def solve(
    solver: AbstractSolver,
    problem: Problem,
    n0: Float[Array, "h w 3"],
    *,
    max_steps: int | Int[Array, ""] = 150,
    steps_per_check: int = 10,
) -> Solution:
    """Minimise Eq. (12) from n0: lines 3-8 of Algorithm 1.

    Every ``steps_per_check`` steps the detector refreshes its view of n, and the loop ends where the solver says so
    (departure: the paper compares two successive steps; ``steps_per_check=1`` is that).
    """
    iterate = jax.lax.while_loop(
        lambda iterate: iterate.going(max_steps),
        lambda iterate: advance(solver, problem, iterate, steps_per_check),
        begin(solver, problem, n0),
    )
    return finish(problem, iterate)
