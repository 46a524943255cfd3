"""A solver that keeps a record of its way."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax.objective import Problem, Terms
from f2pad_jax.solvers.loop import AbstractSolver, State
from f2pad_jax.units import Scalar


class Record(NamedTuple):
    """The memory of :class:`Recorded`: what was seen, and the memory of the solver it watches."""

    steps: Int[Array, ""]
    terms: Terms
    """Of Eq. (12) without their weights, each ``(max_steps,)``; before every step."""
    objective: Float[Array, " t"]
    n: Float[Array, "k h w 3"]
    """Before the steps 0, every, 2·every, ..."""
    inner: Any


class Recorded(AbstractSolver):
    """Another solver, watched: its steps are the same, and ``Solution.memory`` is a :class:`Record` of them.

    A step costs one more evaluation of the objective.
    """

    solver: AbstractSolver
    max_steps: int = eqx.field(static=True)
    """Room for this many steps, static; later ones are not recorded."""
    every: int = eqx.field(static=True, default=10)
    """Steps from one n that is kept to the next, static."""

    @property
    def learning_rate(self) -> Scalar:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The solver's."""
        return self.solver.learning_rate

    @property
    def tolerance(self) -> Scalar:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The solver's."""
        return self.solver.tolerance

    @property
    def settled(self) -> Scalar:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The solver's."""
        return self.solver.settled

    def init(self, problem: Problem, n0: Float[Array, "h w 3"]) -> State:
        """The solver's start, and an empty record."""
        state = self.solver.init(problem, n0)
        blank = jnp.full(self.max_steps, jnp.nan, n0.dtype)
        kept = jnp.zeros((-(-self.max_steps // self.every), *n0.shape), n0.dtype)
        return state._replace(memory=Record(jnp.zeros((), jnp.int32), Terms(*[blank] * 4), blank, kept, state.memory))

    def step(self, problem: Problem, state: State) -> State:
        """The solver's step, from a state that is written down first."""
        record: Record = state.memory
        k, terms = record.steps, problem.terms(state.n)
        n = jax.lax.cond(
            k % self.every == 0, lambda: record.n.at[k // self.every].set(state.n, mode="drop"), lambda: record.n
        )
        after = self.solver.step(problem, _inner(state))
        return after._replace(
            memory=Record(
                k + 1,
                jax.tree.map(lambda all, one: all.at[k].set(one, mode="drop"), record.terms, terms),
                record.objective.at[k].set(after.objective, mode="drop"),
                n,
                after.memory,
            )
        )

    def terminate(self, problem: Problem, before: State, after: State, num_steps: int) -> Bool[Array, ""]:
        """As the solver says."""
        return self.solver.terminate(problem, _inner(before), _inner(after), num_steps)

    def postprocess(self, problem: Problem, n: Float[Array, "h w 3"], tau: Scalar) -> Bool[Array, "h w"]:
        """As the solver says."""
        return self.solver.postprocess(problem, n, tau)


def _inner(state: State) -> State:
    return state._replace(memory=state.memory.inner)
