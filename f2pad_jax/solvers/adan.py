"""Adan as an optax transform, by its authors' rule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class ScaleByAdanState(NamedTuple):
    """Moments of the gradient, of its change, and of the squared look-ahead gradient."""

    count: Int[Array, ""]
    m: Any
    v: Any
    s: Any
    previous: Any
    """The gradient of the last step."""


def scale_by_adan(b1: float = 0.98, b2: float = 0.92, b3: float = 0.99, eps: float = 1e-8) -> optax.GradientTransformation:
    r"""Adaptive Nesterov momentum (Xie et al., TPAMI 2024; the paper's reference 46).

    .. math::
        d &= g_t - g_{t-1} \quad (0 \text{ at the first step}) \\
        m &\leftarrow b_1 m + (1 - b_1) g, \quad
        v \leftarrow b_2 v + (1 - b_2) d, \quad
        s \leftarrow b_3 s + (1 - b_3)(g + b_2 d)^2 \\
        u &= (\hat m + b_2 \hat v) / (\sqrt{\hat s} + \epsilon)

    with all three moments bias-corrected. ``optax.adan`` (0.2.8) weighs ``d`` by ``1 - b2`` where the authors' code and
    paper have ``b2``: equal at the first step, wrong from the second (optax pull request 1715).
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
