"""Local gradient sharing as a fixed bilateral-weight convolution (paper, Eq. 13-14)."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float


class GradientSharing(eqx.Module):
    """Eq. (13): each pixel's direction is the weighted mean of its neighbours' gradients."""

    taps: tuple[tuple[int, int], ...] = eqx.field(static=True)
    """Offsets (row, column) of the neighbours."""
    weights: Float[Array, "taps h w"]
    """Eq. (14), one map per tap; the taps' weights sum to one at every pixel."""

    def __call__(self, gradient: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """g_ij = Σ w_i'j' ∇F at (i+i', j+j')."""
        total = jnp.zeros_like(gradient)
        for t, shifted in enumerate(_neighbours(gradient, self.taps, 0.0)):
            total = total + self.weights[t, :, :, None] * shifted
        return total


class Sharing(eqx.Module):
    """The constants of Eq. (14): w ∝ exp(-(i²+j²)/σ0)·exp(-|x_there - x_here|²/σ1)."""

    radius: int = eqx.field(static=True, default=5)
    """k_s, pixels, static. Paper: 5."""
    sigma0: float = eqx.field(static=True, default=1.1)
    """Spatial scale, pixels², static. Paper: 1.1."""
    sigma1: float | Float[Array, ""] = 3.0
    """Colour scale, squared normalised intensity. Paper: 3.0."""
    cutoff: float = eqx.field(static=True, default=2e-4)
    """Taps of smaller spatial weight are dropped (29 of 121 stay), static. Paper: 0, keeps all."""

    def __call__(self, x: Float[Array, "h w c"]) -> GradientSharing:
        """The weights around every pixel of the input ``x``, normalised intensity; none beyond the border."""
        span = range(-self.radius, self.radius + 1)
        spatial = {(i, j): math.exp(-(i * i + j * j) / self.sigma0) for i in span for j in span}
        taps = tuple(tap for tap, weight in spatial.items() if weight >= self.cutoff)
        weights = jnp.stack(
            [
                spatial[tap] * jnp.exp(-jnp.sum((shifted - x) ** 2, axis=-1) / self.sigma1)
                for tap, shifted in zip(taps, _neighbours(x, taps, jnp.inf), strict=True)
            ]
        )
        return GradientSharing(taps, weights / jnp.sum(weights, axis=0))


def _neighbours(
    image: Float[Array, "h w c"], taps: tuple[tuple[int, int], ...], beyond: float
) -> list[Float[Array, "h w c"]]:
    """The image shifted by each tap: pad once, slice."""
    h, w, _ = image.shape
    r = max(max(abs(i), abs(j)) for i, j in taps)
    padded = jnp.pad(image, ((r, r), (r, r), (0, 0)), constant_values=beyond)
    return [padded[r + i : r + i + h, r + j : r + j + w] for i, j in taps]
