"""Local gradient sharing as a fixed bilateral-weight convolution (paper, Eq. 13-14)."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from f2pad_jax.units import Scalar


class GradientSharing(eqx.Module):
    """Eq. (13): each pixel's direction is the weighted mean of its neighbours' gradients."""

    taps: tuple[tuple[int, int], ...] = eqx.field(static=True)
    """Offsets (row, column) of the neighbours."""
    weights: Float[Array, "taps h w"]
    """Eq. (14), one map per tap; the taps' weights sum to one at every pixel."""

    def __call__(self, gradient: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """g_ij = Σ w_i'j' ∇F at (i+i', j+j')."""
        shifted = _shifts(gradient, self.taps, 0.0)

        def add(total, tap):
            weights, offset = tap
            return total + weights[..., None] * shifted(offset), None

        # on a CPU a loop: so cheap a sum XLA would work out anew for each of the moments that take it
        rounds = 1 if jax.default_backend() == "cpu" else len(self.taps)
        total, _ = jax.lax.scan(add, jnp.zeros_like(gradient), (self.weights, jnp.array(self.taps)), unroll=rounds)
        return total


class Sharing(eqx.Module):
    """The constants of Eq. (14): w ∝ exp(-(i²+j²)/σ0)·exp(-|x_there - x_here|²/σ1)."""

    radius: int = eqx.field(static=True, default=5)
    """k_s, pixels, static. Paper: 5."""
    sigma0: float = eqx.field(static=True, default=1.1)
    """Spatial scale, pixels², static. Paper: 1.1."""
    sigma1: Scalar = 3.0
    """Colour scale, squared normalised intensity. Paper: 3.0."""
    cutoff: float = eqx.field(static=True, default=2e-4)
    """Taps of smaller spatial weight are dropped (29 of 121 stay), static. Paper: 0, keeps all."""

    def __call__(self, x: Float[Array, "h w c"]) -> GradientSharing:
        """The weights around every pixel of the input ``x``, normalised intensity; none beyond the border."""
        span = range(-self.radius, self.radius + 1)
        spatial = {(i, j): math.exp(-(i * i + j * j) / self.sigma0) for i in span for j in span}
        taps = tuple(tap for tap, weight in spatial.items() if weight >= self.cutoff)
        shifted = _shifts(x, taps, jnp.inf)
        weights = jnp.stack(
            [spatial[tap] * jnp.exp(-jnp.sum((shifted(tap) - x) ** 2, axis=-1) / self.sigma1) for tap in taps]
        )
        return GradientSharing(taps, weights / jnp.sum(weights, axis=0))


def _shifts(
    image: Float[Array, "h w c"], taps: tuple[tuple[int, int], ...], beyond: float
) -> Callable[[tuple[int, int] | Int[Array, " 2"]], Float[Array, "h w c"]]:
    """What shifts the image by one of the taps: it is padded once, then sliced."""
    reach = max(max(abs(i), abs(j)) for i, j in taps)
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), constant_values=beyond)
    return lambda tap: jax.lax.dynamic_slice(padded, (reach + tap[0], reach + tap[1], 0), image.shape)
