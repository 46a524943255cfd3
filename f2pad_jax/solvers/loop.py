"""The loop of Algorithm 1, shared by all solvers."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax.detectors.base import Context
from f2pad_jax.objective.problem import Problem
from f2pad_jax.solvers.base import AbstractSolver, State


class Outcome(enum.IntEnum):
    """Outcome of one image."""

    CONVERGED = 0
    STEP_LIMIT = 1
    NOTHING_TO_REFINE = 2
    NON_FINITE = 3
    COVERS_IMAGE = 4
    COARSE_MASK = 5
    TIME_LIMIT = 6

    @property
    def message(self) -> str:
        """Sentence that explains the outcome to a user."""
        return _MESSAGES[self]


_MESSAGES = {
    Outcome.CONVERGED: "converged",
    Outcome.STEP_LIMIT: "stopped at the step limit; the mask is usable, more steps may sharpen it",
    Outcome.NOTHING_TO_REFINE: "the score of the image is at most 1: the image is good, the mask empty",
    Outcome.NON_FINITE: "the objective became non-finite, and the last finite state was kept (lower the learning rate); or "
    "the image has values outside 0..1",
    Outcome.COVERS_IMAGE: "the suspect region covers the image, or the mask covers more than half of it",
    Outcome.COARSE_MASK: "the solution leaves no anomaly in this defective image: the coarse mask stays",
    Outcome.TIME_LIMIT: "stopped at the time limit; the mask is usable, more time may sharpen it",
}


class Solution(NamedTuple):
    """Solution of Eq. (12) for one problem."""

    n: Float[Array, "h w 3"]
    """Normal image, normalised intensity."""
    steps: Int[Array, ""]
    """Number of steps taken."""
    objective: Float[Array, ""]
    """Value of Eq. (12) before the last step."""
    outcome: Int[Array, ""]
    """An :class:`Outcome`."""
    memory: Any
    """Memory of the solver after the last step."""


class Iterate(NamedTuple):
    """State of the loop between two checks of the stopping rules."""

    context: Context
    """Context of the detector, refreshed for n."""
    state: State
    """State of the solver."""
    steps: Int[Array, ""]
    """Number of steps taken."""
    failed: Bool[Array, ""]
    """Whether a step became non-finite."""
    converged: Bool[Array, ""]
    """Whether a stopping rule applied."""

    def going(self, max_steps: int | Int[Array, "*l"]) -> Bool[Array, "*l"]:
        """Returns whether another step may be taken."""
        return ~self.converged & ~self.failed & (self.steps < max_steps)


def begin(solver: AbstractSolver, problem: Problem, n0: Float[Array, "h w 3"]) -> Iterate:
    """Returns the loop's first state (line 3 of Algorithm 1), already converged where the region is empty."""
    empty = ~jnp.any(problem.region)
    return Iterate(problem.context, solver.init(problem, n0), jnp.zeros((), jnp.int32), jnp.zeros((), bool), empty)


Observe = Callable[[Problem, State, State], Any]
"""Function of the problem and of the states before and after a step; returns a pytree of arrays to record."""


def advance(
    solver: AbstractSolver, problem: Problem, iterate: Iterate, num_steps: int, observe: Observe = lambda *_: None
) -> tuple[Iterate, Any]:
    """Refreshes the context, takes ``num_steps`` steps (lines 5-7) and checks the stopping rules.

    Returns:
        The new state of the loop, and the observations of all steps, stacked.
    """
    problem = refreshed(problem, iterate)

    def one(carry: tuple, _) -> tuple[tuple, Any]:
        new = step(solver, problem, *carry)
        return new, observe(problem, carry[0], new[0])

    carry = iterate.state, iterate.steps, iterate.failed
    (state, steps, failed), record = jax.lax.scan(one, carry, length=num_steps)
    converged = solver.stopping(problem, iterate.state, state, num_steps)
    return Iterate(problem.context, state, steps, failed, converged), record


def refreshed(problem: Problem, iterate: Iterate) -> Problem:
    """Returns the problem with the detector's context refreshed for the current n."""
    context = problem.detector.refresh(problem.view(iterate.state.n), iterate.context)
    return dataclasses.replace(problem, context=context)


def step(
    solver: AbstractSolver, problem: Problem, state: State, steps: Int[Array, ""], failed: Bool[Array, ""]
) -> tuple[State, Int[Array, ""], Bool[Array, ""]]:
    """Takes one step; keeps the last finite n and objective if the step becomes non-finite."""
    new = solver.step(problem, state)
    failed = failed | ~(jnp.isfinite(new.objective) & jnp.all(jnp.isfinite(new.n)))
    n, objective = jax.tree.map(lambda a, b: jnp.where(failed, a, b), state[:2], new[:2])
    return State(n, objective, new.memory), steps + 1, failed


def finish(problem: Problem, iterate: Iterate) -> Solution:
    """Returns the solution at the end of the loop."""
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
    """Minimises Eq. (12) from n0: lines 3-8 of Algorithm 1.

    Every ``steps_per_check`` steps the detector refreshes its context and the stopping rules are checked. Departure: the
    paper checks after every step, as with ``steps_per_check=1``.

    Args:
        solver: method of minimisation.
        problem: objective and region.
        n0: first guess, normalised intensity.
        max_steps: limit of steps, rounded up to a multiple of ``steps_per_check``.
        steps_per_check: steps between two checks.
    """
    iterate = jax.lax.while_loop(
        lambda iterate: iterate.going(max_steps),
        lambda iterate: advance(solver, problem, iterate, steps_per_check)[0],
        begin(solver, problem, n0),
    )
    return finish(problem, iterate)
