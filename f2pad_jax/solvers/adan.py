"""Adan as an optax transform, by the rule of its authors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class ScaleByAdanState(NamedTuple):
    """State of :func:`scale_by_adan`; the pytrees have the shape of the gradient."""

    count: Int[Array, ""]
    """Number of steps taken."""
    m: Any
    """Moment of the gradient."""
    v: Any
    """Moment of the gradient's change."""
    s: Any
    """Moment of the squared look-ahead gradient."""
    previous: Any
    """Gradient of the last step."""


def scale_by_adan(
    *, b1: float = 0.98, b2: float = 0.92, b3: float = 0.99, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns adaptive Nesterov momentum (Xie et al., TPAMI 2024; the paper's reference 46).

    With the gradient g of this step and the gradient g₀ of the last step:

    - ``d = g - g₀``, 0 at the first step
    - ``m ← b1·m + (1 - b1)·g``
    - ``v ← b2·v + (1 - b2)·d``
    - ``s ← b3·s + (1 - b3)·(g + b2·d)²``
    - direction ``(m̂ + b2·v̂) / (√ŝ + eps)``

    All three moments are bias-corrected. ``optax.adan`` (0.2.8) differs from the second step on: it weights ``d`` by
    ``1 - b2``, where the authors' code and paper have ``b2`` (optax pull request 1715).
    """

    def init(params: Any) -> ScaleByAdanState:
        zeros = optax.tree.zeros_like(params)
        return ScaleByAdanState(jnp.zeros((), jnp.int32), zeros, zeros, zeros, zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByAdanState]:
        del params
        grads, count = updates, jnp.asarray(optax.safe_increment(state.count))
        first = count == 1

        def moments(g, m, v, s, previous):
            d = jnp.where(first, 0, g - previous)
            return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d, b3 * s + (1 - b3) * (g + b2 * d) ** 2

        triples = jax.tree.map(moments, grads, state.m, state.v, state.s, state.previous)
        m, v, s = (jax.tree.map(lambda _, t, i=i: t[i], grads, triples) for i in range(3))

        def direction(m, v, s):
            t = count.astype(m.dtype)
            m_hat, v_hat, s_hat = m / (1 - b1**t), v / (1 - b2**t), s / (1 - b3**t)
            return (m_hat + b2 * v_hat) / (jnp.sqrt(s_hat) + eps)

        return jax.tree.map(direction, m, v, s), ScaleByAdanState(count, m, v, s, grads)

    return optax.GradientTransformation(init, update)


def adan() -> optax.GradientTransformation:
    """Returns Adan as an optax optimiser, with the authors' betas and learning rate 1."""
    return optax.chain(scale_by_adan(), optax.scale(-1.0))
