"""The interface of a solver: its state, its steps and its stopping rules."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from f2pad_jax.images.pixels import Scalar
from f2pad_jax.objective.problem import Problem, norm

MIN_STEPS = 5
"""Fewest steps between two masks that are compared; over fewer steps, a mask may stay unchanged by chance."""


class State(NamedTuple):
    """State of a solver: everything the next step needs."""

    n: Float[Array, "h w 3"]
    """Normal image, normalised intensity."""
    objective: Float[Array, ""]
    """Value of Eq. (12) before the last step."""
    memory: Any
    """Other state of the solver, such as moments and fixed weights: any pytree."""


def start(problem: Problem, n0: Float[Array, "h w 3"], memory: Any) -> State:
    """Returns the first state: n0 inside the region, x outside, and an infinite objective."""
    n = jnp.where(problem.region[..., None], n0, problem.x)
    return State(n, jnp.asarray(jnp.inf, n.dtype), memory)


class Stopping(eqx.Module):
    """Stopping rules of the loop, checked every ``Settings.steps_per_check`` steps.

    Departure: the paper has only ``tolerance``, without ``mask_tolerance``. Inside a defect of one colour, n changes long
    after the mask has settled.
    """

    tolerance: Scalar = 0.05
    """Fall of the objective per step, below which the loop stops; -inf for never. Paper: 0.05 (PaDiM: 0.1), at a scale that
    is not stated."""
    mask_tolerance: Scalar = 0.0015
    """Change per step of the set of pixels with large ``|a|``, as a fraction of the set, below which the loop stops; 0 for
    never. The rule applies if β > 0, since sparsity separates these pixels, and if checks are at least five steps apart.
    Paper: none."""

    def __call__(self, problem: Problem, before: State, after: State, num_steps: int) -> Bool[Array, ""]:
        """Decides whether to stop, from two states ``num_steps`` apart; at the first check the answer is no."""
        fall = (before.objective - after.objective) / num_steps
        if num_steps < MIN_STEPS:
            return fall < self.tolerance
        change = 1 - overlap(outstanding(problem, before.n), outstanding(problem, after.n))
        settled = (problem.weights.beta > 0) & jnp.isfinite(fall) & (change / num_steps < self.mask_tolerance)
        return (fall < self.tolerance) | settled


class AbstractSolver(eqx.Module):
    """Method that minimises Eq. (12): a pytree of constants with ``init`` and ``step``."""

    learning_rate: eqx.AbstractVar[Scalar]
    """Scale of the steps."""
    stopping: eqx.AbstractVar[Stopping]
    """Stopping rules."""

    def slowed(self, ratio: Scalar) -> "AbstractSolver":
        """Returns this solver with its learning rate times ``ratio``."""
        return eqx.tree_at(lambda solver: solver.learning_rate, self, self.learning_rate * ratio)

    def without_stopping(self) -> "AbstractSolver":
        """Returns this solver with stopping rules that never apply."""
        return eqx.tree_at(lambda solver: solver.stopping, self, Stopping(-jnp.inf, 0.0))

    @abc.abstractmethod
    def init(self, problem: Problem, n0: Float[Array, "h w 3"]) -> State:
        """Returns the first state, made by :func:`start`, with the solver's memory."""

    @abc.abstractmethod
    def step(self, problem: Problem, state: State) -> State:
        """Takes one step and returns the new state, with n projected as by :meth:`Problem.project`."""

    def anomalous(self, problem: Problem, n: Float[Array, "h w 3"], tau: Scalar) -> Bool[Array, "h w"]:
        """Returns the pixels of the region whose anomaly is not zero; default: ``|a| > tau``, normalised intensity."""
        return problem.region & (jnp.linalg.norm(problem.x - n, axis=-1) > tau)


def outstanding(problem: Problem, n: Float[Array, "h w 3"]) -> Bool[Array, "h w"]:
    """Returns the pixels of the region whose ``|a|`` exceeds half of its level Σ|a|²/Σ|a|."""
    size = problem.region * norm(problem.x - n)
    return size > 0.5 * jnp.sum(size**2) / jnp.maximum(jnp.sum(size), 1e-6)


def overlap(one: Bool[Array, "h w"], other: Bool[Array, "h w"]) -> Float[Array, ""]:
    """Returns the intersection over union of two masks; 0 where both are empty."""
    return jnp.sum(one & other) / jnp.maximum(jnp.sum(one | other), 1)
