"""The paper's solver: descent along a shared gradient, with Adan or any other optax optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float

from f2pad_jax.images.pixels import Scalar
from f2pad_jax.objective.problem import Problem
from f2pad_jax.solvers.adan import adan
from f2pad_jax.solvers.base import AbstractSolver, State, Stopping, start
from f2pad_jax.solvers.sharing import GradientSharing, Sharing


class Memory(NamedTuple):
    """Memory of a descent."""

    share: GradientSharing | None
    """Sharing weights, fixed by the input (line 3 of Algorithm 1)."""
    moments: Any
    """State of the optimiser."""


class Descent(AbstractSolver):
    """The paper's solver (lines 3-8 of Algorithm 1), its ablations, and any optax optimiser in its place.

    ``Descent(sharing=None)`` is plain Adan (Fig. 10), and ``Descent(gamma0=None)`` has no adaptive step. With
    ``from jax.tree_util import Partial``, ``Descent(optimiser=Partial(optax.adam, 0.05), learning_rate=1.0)`` is Adam.
    An optimiser with a line search is given the objective:
    ``Descent(optimiser=Partial(optax.lbfgs), learning_rate=1.0, gamma0=None, sharing=None)``.
    """

    optimiser: Callable[[], optax.GradientTransformation] = Partial(adan)
    """Factory of the optimiser, a pytree such as ``Partial``: another number in it compiles no new program. The optimiser's
    updates times the step size are added to n. Paper: Adan."""
    learning_rate: Scalar = 0.3
    """Step size before Eq. (15), normalised intensity for Adan; 1 for an optimiser with its own rate. Paper: not stated."""
    gamma0: Scalar | None = 1.0
    """γ0 of Eq. (15); None for no adaptive step. Paper: 1.0."""
    delta: Scalar = 1.0
    """Floor of ``|a|`` in Eq. (15), normalised intensity. Paper: none, and the step diverges as a approaches 0."""
    clip: Scalar = float("inf")
    """Bound on each component of the shared gradient. Paper: 0.03, at a scale not stated; at our scale any bound hurts."""
    sharing: Sharing | None = Sharing()
    """Gradient sharing, Eq. (13)-(14); None for the plain gradient."""
    may_cross_input: bool = eqx.field(static=True, default=False)
    """Whether a step may take a pixel past x to its other side (a·a' < 0), static. If not, the pixel stops at x, where the
    penalty has its kink. It is free again at the next step, as in OWL-QN (Andrew & Gao 2007). The rule needs sparsity
    (β > 0). Paper: yes. But if n0 equals x except in the defect, β is large, and the first steps throw n past x."""
    stopping: Stopping = Stopping()
    """Stopping rules."""

    def init(self, problem: Problem, n0: Float[Array, "h w 3"]) -> State:
        """Returns n0 inside the region and x outside, with the weights of Eq. (14)."""
        state = start(problem, n0, None)
        share = None if self.sharing is None else self.sharing(problem.x)
        return state._replace(memory=Memory(share, self.optimiser().init(state.n)))

    def step(self, problem: Problem, state: State) -> State:
        """Takes lines 5-7 of Algorithm 1."""
        share, moments = state.memory
        objective, gradient = jax.value_and_grad(problem)(state.n)
        g = shared(problem, gradient, share, self.clip)
        optimiser = optax.with_extra_args_support(self.optimiser())
        updates, moments = optimiser.update(g, moments, state.n, value=objective, grad=g, value_fn=problem)
        a = problem.x - state.n
        gamma = step_size(self.learning_rate, self.gamma0, self.delta, a)
        n = problem.project(state.n + gamma * jnp.asarray(updates))
        crossed = jnp.sum(a * (problem.x - n), axis=-1, keepdims=True) < 0
        n = jnp.where(crossed & (problem.weights.beta > 0) & (not self.may_cross_input), problem.x, n)
        return State(n, objective, Memory(share, moments))


def shared(problem: Problem, gradient: Array, share: GradientSharing | None, clip: Scalar) -> Float[Array, "h w 3"]:
    """Returns the gradient inside the region, shared (Eq. 13) and clipped."""
    g = jnp.where(problem.region[..., None], gradient, 0.0)
    return jnp.clip(g if share is None else share(g), -clip, clip)


def step_size(learning_rate: Scalar, gamma0: Scalar | None, delta: Scalar, a: Float[Array, "h w 3"]) -> Array:
    """Returns the step size of Eq. (15) per channel, with a floor: γ = rate·γ0/max(``|a|``, δ)."""
    if gamma0 is None:
        return jnp.asarray(learning_rate)
    return learning_rate * gamma0 / jnp.maximum(jnp.abs(a), delta)
