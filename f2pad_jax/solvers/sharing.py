"""Local gradient sharing as a fixed bilateral-weight convolution (paper, Eq. 13-14)."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from f2pad_jax._backend import on_cpu
from f2pad_jax.images.pixels import Scalar


class GradientSharing(eqx.Module):
    """Convolution of Eq. (13): each pixel's direction is the weighted mean of its neighbours' gradients."""

    taps: tuple[tuple[int, int], ...] = eqx.field(static=True)
    """Offsets (row, column) of the neighbours, pixels, static."""
    weights: Float[Array, "taps h w"]
    """Weights of Eq. (14), one map per tap. At every pixel they sum to one."""

    def __call__(self, gradient: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """Returns g_ij = Σ w_i'j' ∇F at (i+i', j+j')."""
        shifted = _shifts(gradient, self.taps, 0.0)

        def add(total, tap):
            weights, offset = tap
            return total + weights[..., None] * shifted(offset), None

        # a loop on a CPU: unrolled, XLA would compute the sum again for each moment of the optimiser
        unroll = 1 if on_cpu() else len(self.taps)
        total, _ = jax.lax.scan(add, jnp.zeros_like(gradient), (self.weights, jnp.array(self.taps)), unroll=unroll)
        return total


class Sharing(eqx.Module):
    """Constants of Eq. (14): w ∝ exp(-(i²+j²)/σ0)·exp(-|x_neighbour - x|²/σ1)."""

    radius: int = eqx.field(static=True, default=5)
    """Radius k_s of the neighbourhood, pixels, static. Paper: 5."""
    sigma0: float = eqx.field(static=True, default=1.1)
    """Spatial scale, pixels², static. Paper: 1.1."""
    sigma1: Scalar = 3.0
    """Colour scale, squared normalised intensity. Paper: 3.0."""
    cutoff: float = eqx.field(static=True, default=2e-4)
    """Least spatial weight of a tap that is kept, static: 2e-4 keeps 29 of 121 taps. Paper: 0, all taps."""

    def __call__(self, x: Float[Array, "h w c"]) -> GradientSharing:
        """Returns the convolution for the input ``x``, normalised intensity; weights are 0 beyond its border."""
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
    """Returns a function that shifts the image by one tap: the image is padded once, then sliced."""
    reach = max(max(abs(i), abs(j)) for i, j in taps)
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), constant_values=beyond)
    return lambda tap: jax.lax.dynamic_slice(padded, (reach + tap[0], reach + tap[1], 0), image.shape)
