"""Proximal descent: the penalty's proximal map after every step, and so exact zeros in a."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from f2pad_jax.images.pixels import HIGHEST, LOWEST, Scalar
from f2pad_jax.objective.problem import Problem, norm
from f2pad_jax.solvers.adan import ScaleByAdanState, scale_by_adan
from f2pad_jax.solvers.base import AbstractSolver, State, Stopping, start
from f2pad_jax.solvers.descent import Memory, shared
from f2pad_jax.solvers.sharing import Sharing


class Proximal(AbstractSolver):
    """Adan on the smooth terms, then the penalty's proximal map: a pixel is anomalous exactly where a ≠ 0 (Eq. 2).

    The moments are Adan's, but the channels of a pixel share one step size. The proximal map then changes only a pixel's
    magnitude, on which the penalty acts. Departure: the paper descends LOG like the other terms.
    """

    learning_rate: Scalar = 0.3
    """Step, normalised intensity, as for :class:`Descent`."""
    momentum: tuple[float, float, float] = eqx.field(static=True, default=(0.98, 0.92, 0.99))
    """Adan's betas, static."""
    sharing: Sharing | None = None
    """Gradient sharing, Eq. (13)-(14); default: None. The proximal map holds good pixels at a = 0, and sharing would move
    them with their anomalous neighbours."""
    stopping: Stopping = Stopping()
    """Stopping rules."""

    def _adan(self) -> optax.GradientTransformation:
        b1, b2, b3 = self.momentum
        return scale_by_adan(b1=b1, b2=b2, b3=b3)

    def init(self, problem: Problem, n0: Float[Array, "h w 3"]) -> State:
        """Returns n0 inside the region and x outside, with the weights of Eq. (14)."""
        state = start(problem, n0, None)
        share = None if self.sharing is None else self.sharing(problem.x)
        return state._replace(memory=Memory(share, self._adan().init(state.n)))

    def step(self, problem: Problem, state: State) -> State:
        """Takes one proximal step, n ← x - prox(x - (n - η·d))."""
        share, moments = state.memory
        smooth, gradient = jax.value_and_grad(problem.smooth)(state.n)
        objective = smooth + problem.weights.beta * problem.sparsity(state.n)
        direction, updated = self._adan().update(shared(problem, gradient, share, jnp.inf), moments)
        assert isinstance(updated, ScaleByAdanState)
        # Adan divides each channel by the root of its own s. Here all channels are divided by the root of their mean s.
        root = jnp.sqrt(updated.s / (1 - self.momentum[2] ** updated.count))
        eta = self.learning_rate / (jnp.sqrt(jnp.mean(root**2, axis=-1, keepdims=True)) + 1e-8)
        d = root * jnp.asarray(direction)
        a = problem.x - jnp.clip(state.n - eta * d, LOWEST, HIGHEST)
        size = norm(a)
        kept = problem.penalty.shrunk(size, problem.weights.beta * eta[..., 0]) / jnp.maximum(size, 1e-8)
        n = jnp.where(kept[..., None] > 0, problem.x - kept[..., None] * a, problem.x)
        return State(jnp.where(problem.region[..., None], n, problem.x), objective, Memory(share, updated))

    def anomalous(self, problem: Problem, n: Float[Array, "h w 3"], tau: Scalar) -> Bool[Array, "h w"]:
        """Returns the pixels where a ≠ 0; ``tau`` is not needed."""
        del tau
        return problem.region & jnp.any(n != problem.x, axis=-1)
