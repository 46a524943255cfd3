"""Sparsity penalties l_a on the magnitude of the anomaly, and their proximal maps."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from f2pad_jax.images.pixels import Scalar


class AbstractPenalty(eqx.Module):
    """Penalty on each pixel's magnitude r = |a| ≥ 0 (``size``), its length over the channels, which become 0 together."""

    @abc.abstractmethod
    def __call__(self, size: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Returns the penalty of each pixel."""

    @abc.abstractmethod
    def shrunk(self, size: Float[Array, "*b"], weight: Float[Array, "*#b"]) -> Float[Array, "*b"]:
        """Returns the proximal map argmin_s weight·penalty(s) + (s - size)²/2 over s ≥ 0."""


class Log(AbstractPenalty):
    """LOG penalty of Eq. (8): log(√(r² + ε) + r)."""

    epsilon: Scalar = 1e-4
    """ε, squared normalised intensity. Paper: 1e-4."""

    def __call__(self, size: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Returns log(√(r² + ε) + r)."""
        return jnp.log(jnp.sqrt(size**2 + self.epsilon) + size)

    def shrunk(self, size: Float[Array, "*b"], weight: Float[Array, "*#b"]) -> Float[Array, "*b"]:
        """Returns zero or the largest stationary point, whichever has the lower cost.

        The penalty is concave: f(s) = s - size + weight/√(s² + ε) has at most two roots. Newton's method from ``size``
        reaches the larger root, since f is convex there.
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
    """Convex penalty r: large anomalies shrink as much as small ones."""

    def __call__(self, size: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Returns the magnitude."""
        return size

    def shrunk(self, size: Float[Array, "*b"], weight: Float[Array, "*#b"]) -> Float[Array, "*b"]:
        """Returns the magnitude after a soft threshold."""
        return jnp.maximum(size - weight, 0)


class L0(AbstractPenalty):
    """Penalty 1 where r > 0. Its slope is 0, and only a proximal solver reacts to it."""

    def __call__(self, size: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Returns 1 for each anomalous pixel, else 0."""
        return (size > 0).astype(size.dtype)

    def shrunk(self, size: Float[Array, "*b"], weight: Float[Array, "*#b"]) -> Float[Array, "*b"]:
        """Returns the magnitude after a hard threshold."""
        return jnp.where(size**2 > 2 * weight, size, 0.0)


class MCP(AbstractPenalty):
    """Minimax concave penalty (Zhang 2010): its slope falls from 1 at r = 0 to 0 at r = ``reach``."""

    reach: Scalar = 0.5
    """Magnitude from which the penalty is constant, normalised intensity."""

    def __call__(self, size: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Returns r - r²/(2·reach), and reach/2 for r > reach."""
        near = jnp.minimum(size, self.reach)
        return near - near**2 / (2 * self.reach)

    def shrunk(self, size: Float[Array, "*b"], weight: Float[Array, "*#b"]) -> Float[Array, "*b"]:
        """Returns the magnitude after a firm threshold, or after a hard one if the weight is at least ``reach``."""
        slope = 1 - weight / self.reach
        firm = jnp.maximum(size - weight, 0) / jnp.where(slope > 0, slope, 1.0)
        hard = jnp.where(size**2 > weight * self.reach, size, 0.0)
        return jnp.where(slope > 0, jnp.where(size > self.reach, size, firm), hard)
