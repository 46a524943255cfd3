"""Sparsity penalties l_a on the magnitude of the anomaly, and their proximal maps."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from f2pad_jax.units import Scalar


class AbstractPenalty(eqx.Module):
    """A function of each pixel's magnitude |a| ≥ 0 (the Euclidean length over channels, so pixels vanish whole)."""

    @abc.abstractmethod
    def __call__(self, size: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The penalty, a pixel at a time."""

    @abc.abstractmethod
    def shrunk(self, size: Float[Array, "*b"], weight: Float[Array, "*#b"]) -> Float[Array, "*b"]:
        """The proximal map argmin_s weight·penalty(s) + (s - size)²/2 over s ≥ 0."""


class Log(AbstractPenalty):
    """Eq. (8): log(√(r² + ε) + r)."""

    epsilon: Scalar = 1e-4
    """ε, squared normalised intensity. Paper: 1e-4."""

    def __call__(self, size: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """log(√(r² + ε) + r)."""
        return jnp.log(jnp.sqrt(size**2 + self.epsilon) + size)

    def shrunk(self, size: Float[Array, "*b"], weight: Float[Array, "*#b"]) -> Float[Array, "*b"]:
        """Zero or the largest stationary point, whichever costs less.

        The penalty is concave: s = size - weight/√(s² + ε) has at most two roots. Newton's method from ``size`` falls
        onto the larger one, where the left side less the right is convex.
        """

        def newton(_, s):
            root = jnp.sqrt(s**2 + self.epsilon)
            slope = 1 - weight * s / root**3
            change = (s - size + weight / root) / jnp.where(slope > 0.01, slope, jnp.inf)
            return jnp.clip(s - change, 0, size)

        s = jax.lax.fori_loop(0, 8, newton, jnp.broadcast_to(size, jnp.broadcast_shapes(size.shape, weight.shape)))
        gain = size**2 / 2 - (size - s) ** 2 / 2 + weight * (self(jnp.zeros_like(s)) - self(s))
        return jnp.where(gain > 0, s, 0.0)


class L1(AbstractPenalty):
    """r, the convex one: large anomalies shrink as much as small ones."""

    def __call__(self, size: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The magnitude itself."""
        return size

    def shrunk(self, size: Float[Array, "*b"], weight: Float[Array, "*#b"]) -> Float[Array, "*b"]:
        """Soft threshold."""
        return jnp.maximum(size - weight, 0)


class L0(AbstractPenalty):
    """1 where r > 0. It has no slope, so only a proximal solver feels it."""

    def __call__(self, size: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The number of anomalous pixels, a pixel at a time."""
        return (size > 0).astype(size.dtype)

    def shrunk(self, size: Float[Array, "*b"], weight: Float[Array, "*#b"]) -> Float[Array, "*b"]:
        """Hard threshold."""
        return jnp.where(size**2 > 2 * weight, size, 0.0)


class MCP(AbstractPenalty):
    """Minimax concave penalty (Zhang 2010): slope 1 at zero, falling to none at r = ``reach``."""

    reach: Scalar = 0.5
    """Where it levels off, normalised intensity."""

    def __call__(self, size: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """R - r²/(2·reach), and reach/2 beyond."""
        near = jnp.minimum(size, self.reach)
        return near - near**2 / (2 * self.reach)

    def shrunk(self, size: Float[Array, "*b"], weight: Float[Array, "*#b"]) -> Float[Array, "*b"]:
        """Firm threshold; a hard one where the weight outdoes the parabola."""
        slope = 1 - weight / self.reach
        firm = jnp.maximum(size - weight, 0) / jnp.where(slope > 0, slope, 1.0)
        hard = jnp.where(size**2 > weight * self.reach, size, 0.0)
        return jnp.where(slope > 0, jnp.where(size > self.reach, size, firm), hard)
