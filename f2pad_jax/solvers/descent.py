"""Solvers: descent along a shared gradient with any optax optimiser, and its proximal kin."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from f2pad_jax.objective import Problem, norm
from f2pad_jax.solvers.adan import ScaleByAdanState, scale_by_adan
from f2pad_jax.solvers.loop import AbstractSolver, State, start
from f2pad_jax.solvers.sharing import GradientSharing, Sharing
from f2pad_jax.units import HIGHEST, LOWEST, Scalar


class Memory(NamedTuple):
    """What a descent carries from step to step."""

    share: GradientSharing | None
    """Fixed by the input: line 3 of Algorithm 1."""
    moments: Any

    @staticmethod
    def of(
        sharing: Sharing | None, optimiser: optax.GradientTransformation, x: Float[Array, "h w 3"], n: Float[Array, "h w 3"]
    ) -> "Memory":
        """Before the first step from ``n`` on the input ``x``."""
        return Memory(None if sharing is None else sharing(x), optimiser.init(n))


class Descent(AbstractSolver):
    """The paper's solver, its ablations, and any optax optimiser in its place: lines 3-8 of Algorithm 1.

    ``Descent(sharing=None)`` is plain Adan (Fig. 10), ``Descent(gamma0=None)`` has no adaptive step, and
    ``Descent(optimiser=optax.adam(0.05), learning_rate=1.0)`` is another method. Optimisers that take the objective, as
    line searches do, are given it: ``Descent(optimiser=optax.lbfgs(), learning_rate=1.0, gamma0=None, sharing=None)``.
    """

    optimiser: optax.GradientTransformation = eqx.field(
        static=True, default=optax.chain(scale_by_adan(), optax.scale(-1.0))
    )
    """Its updates, times the step size, are added to n. Paper: Adan."""
    learning_rate: Scalar = 0.3
    """Step before Eq. (15), normalised intensity for Adan; 1 where the optimiser has a rate of its own.
    Paper: not stated."""
    gamma0: Scalar | None = 1.0
    """γ0 of Eq. (15); None for no adaptive step. Paper: 1.0."""
    delta: Scalar = 1.0
    """Floor of |a| in Eq. (15), normalised intensity. Paper: none, and the step diverges as a -> 0."""
    clip: Scalar = float("inf")
    """Bound on each component of the shared gradient. Paper: 0.03 at an unstated scale of the loss; at ours it hurts."""
    sharing: Sharing | None = Sharing()
    """Eq. (13)-(14); None for the gradient as it is."""
    crossing: bool = eqx.field(static=True, default=False)
    """Whether one step may take a pixel to the other side of x, so that a·a' < 0. If not it ends on x, where the penalty
    has its kink, and the next step is free again, as in OWL-QN (Andrew and Gao 2007) but a pixel at a time; without
    sparsity there is no kink. Paper: yes, but where n0 is x up to the defect β is large, and the first steps, as long
    everywhere, throw n away from x."""
    tolerance: Scalar = 0.05
    """Converged when the objective falls by less than this a step. Paper: 0.05, PaDiM 0.1, at an unstated scale."""
    settled: Scalar = 0.0015
    """Converged, too, when of the pixels that stand out in a less than this share comes or goes a step; not asked without
    sparsity, nor at looks less than five steps apart. Paper: none, 0."""

    def init(self, problem: Problem, n0: Float[Array, "h w 3"]) -> State:
        """n0 inside the region, x outside; the weights of Eq. (14)."""
        state = start(problem, n0, None)
        return state._replace(memory=Memory.of(self.sharing, self.optimiser, problem.x, state.n))

    def step(self, problem: Problem, state: State) -> State:
        """Lines 5-7 of Algorithm 1."""
        inside, (share, moments) = problem.region[..., None], state.memory
        objective, gradient = jax.value_and_grad(problem)(state.n)
        g = shared(gradient, inside, share, self.clip)
        optimiser = optax.with_extra_args_support(self.optimiser)
        updates, moments = optimiser.update(g, moments, state.n, value=objective, grad=g, value_fn=problem)
        a = problem.x - state.n
        gamma = step_size(self.learning_rate, self.gamma0, self.delta, a)
        n = jnp.clip(state.n + gamma * jnp.asarray(updates), LOWEST, HIGHEST)
        crossed = jnp.sum(a * (problem.x - n), axis=-1, keepdims=True) < 0
        stopped = crossed & (problem.weights.beta > 0) & (not self.crossing)
        n = jnp.where(inside & ~stopped, n, problem.x)
        return State(n, objective, Memory(share, moments))


class Proximal(AbstractSolver):
    """Adan on the smooth terms, then the penalty's proximal map: a pixel is anomalous exactly where a ≠ 0 (Eq. 2).

    The moments are Adan's, but a pixel's channels share one step size, the metric in which the penalty, which takes or
    leaves pixels whole, has its proximal map in closed form. Departure: the paper descends LOG like the rest.
    """

    learning_rate: Scalar = 0.3
    """As :class:`Descent`'s."""
    momentum: tuple[float, float, float] = eqx.field(static=True, default=(0.98, 0.92, 0.99))
    """Adan's betas."""
    sharing: Sharing | None = None
    """Eq. (13)-(14). Off: it moves the good pixels, which the map holds at zero, along with the bad ones beside them."""
    tolerance: Scalar = 0.05
    """As :class:`Descent`'s."""
    settled: Scalar = 0.0015
    """As :class:`Descent`'s."""

    def init(self, problem: Problem, n0: Float[Array, "h w 3"]) -> State:
        """n0 inside the region, x outside; the weights of Eq. (14)."""
        state = start(problem, n0, None)
        return state._replace(memory=Memory.of(self.sharing, scale_by_adan(*self.momentum), problem.x, state.n))

    def step(self, problem: Problem, state: State) -> State:
        """One proximal step, n ← x - prox(x - (n - η·d))."""
        inside, (share, moments) = problem.region[..., None], state.memory
        smooth, gradient = jax.value_and_grad(problem.smooth)(state.n)
        objective = smooth + problem.weights.beta * problem.sparsity(state.n)
        g = shared(gradient, inside, share, jnp.inf)
        direction, updated = scale_by_adan(*self.momentum).update(g, moments)
        assert isinstance(updated, ScaleByAdanState)
        # Adan divides each channel by a root of its own; that is undone, and all are divided by the root of their mean
        root = jnp.sqrt(updated.s / (1 - self.momentum[2] ** updated.count))
        eta = self.learning_rate / (jnp.sqrt(jnp.mean(root**2, axis=-1, keepdims=True)) + 1e-8)
        d = root * jnp.asarray(direction)
        a = problem.x - jnp.clip(state.n - eta * d, LOWEST, HIGHEST)
        size = norm(a)
        kept = problem.penalty.shrunk(size, problem.weights.beta * eta[..., 0]) / jnp.maximum(size, 1e-8)
        n = jnp.where(inside & (kept[..., None] > 0), problem.x - kept[..., None] * a, problem.x)
        return State(n, objective, Memory(share, updated))

    def postprocess(self, problem: Problem, n: Float[Array, "h w 3"], tau: Scalar) -> Any:
        """Where a ≠ 0; ``tau`` isn't needed."""
        del tau
        return problem.region & jnp.any(n != problem.x, axis=-1)


def shared(gradient: Array, inside: Array, share: GradientSharing | None, clip: Scalar) -> Float[Array, "h w 3"]:
    """The gradient inside the region, shared (Eq. 13), clipped."""
    g = jnp.where(inside, gradient, 0.0)
    return jnp.clip(g if share is None else share(g), -clip, clip)


def step_size(learning_rate: Scalar, gamma0: Scalar | None, delta: Scalar, a: Float[Array, "h w 3"]) -> Array:
    """Eq. (15), per channel, with |a| floored: γ = rate·γ0/max(|a|, δ)."""
    if gamma0 is None:
        return jnp.asarray(learning_rate)
    return learning_rate * gamma0 / jnp.maximum(jnp.abs(a), delta)
