"""The conditional normalizing flow of CFLOW-AD."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CONDITION_SIZE = 128
"""Number of channels of the condition, the encoding of a position."""
CLAMP = 1.9
"""Largest absolute logarithm of a coupling block's scale."""


class Coupling(eqx.Module):
    """Coupling block like FrEIA's ``AllInOneBlock``: affine coupling, global affine map, rotation.

    In the coupling, a network of the first half of the channels and the condition scales and shifts the second half.
    """

    weight1: Float[Array, "d 2*d"]
    """Weights of the hidden layer. Its inputs are the first half of the channels, C - C//2, then the condition."""
    bias1: Float[Array, " 2*d"]
    """Biases of the hidden layer."""
    weight2: Float[Array, "2*d e"]
    """Weights of the output layer, e = 2·(C//2): the scales of the second half of the channels, then the shifts."""
    bias2: Float[Array, " e"]
    """Biases of the output layer."""
    global_scale: Float[Array, " C"]
    """Parameter s of the global affine map, whose scale is 0.2·softplus(s/2)."""
    global_offset: Float[Array, " C"]
    """Offset of the global affine map."""
    rotation: Float[Array, "C C"]
    """Rotation drawn from SO(C), not trained."""

    def bias(self, condition: Float[Array, "*n d_c"]) -> Float[Array, "*n units"]:
        """Returns the biases of the hidden units, with the contribution of a condition."""
        return condition @ self.weight1[-condition.shape[-1] :] + self.bias1

    def __call__(
        self, features: Float[Array, "n C"], bias: Float[Array, "n units"]
    ) -> tuple[Float[Array, "n C"], Float[Array, " n"]]:
        """Returns the transformed features and the logarithm of the Jacobian's determinant."""
        half = self.weight2.shape[1] // 2
        first, second = features[:, :-half], features[:, -half:]
        hidden = jax.nn.relu(first @ self.weight1[: first.shape[1]] + bias)
        coefficients = 0.1 * (hidden @ self.weight2 + self.bias2)
        log_scale = CLAMP * jnp.tanh(coefficients[:, :half])
        second = second * jnp.exp(log_scale) + coefficients[:, half:]
        scale = 0.2 * jax.nn.softplus(0.5 * self.global_scale)
        out = jnp.concatenate([first, second], axis=1) * scale + self.global_offset
        out = out @ jax.lax.stop_gradient(self.rotation).T
        return out, jnp.sum(log_scale, axis=1) + jnp.sum(jnp.log(scale))

    @staticmethod
    def initial(rng: np.random.Generator, channels: int) -> "Coupling":
        """Returns an untrained block: weights in ±1/√fan_in as in PyTorch, global scale 1, offset 0, random rotation."""
        from scipy.stats import special_ortho_group  # takes half a second to import

        half = channels // 2
        d = channels - half + CONDITION_SIZE

        def uniform(fan_in: int, *shape: int) -> Array:
            return jnp.asarray(rng.uniform(-1, 1, shape) / np.sqrt(fan_in), jnp.float32)

        rotation = special_ortho_group.rvs(channels, random_state=rng)
        return Coupling(
            uniform(d, d, 2 * d),
            uniform(d, 2 * d),
            uniform(2 * d, 2 * d, 2 * half),
            uniform(2 * d, 2 * half),
            jnp.full(channels, 2 * np.log(np.exp(5.0) - 1), jnp.float32),
            jnp.zeros(channels),
            jnp.asarray(rotation, jnp.float32),
        )


class Flow(eqx.Module):
    """Sequence of coupling blocks that maps the features of one layer to a standard normal."""

    blocks: tuple[Coupling, ...]
    """Coupling blocks, first to last."""

    def biases(self, condition: Float[Array, "*n d_c"]) -> tuple[Float[Array, "*n units"], ...]:
        """Returns the biases of each block's hidden units, the only values that depend on the condition."""
        return tuple(block.bias(condition) for block in self.blocks)

    def __call__(
        self, features: Float[Array, "n C"], biases: tuple[Float[Array, "n units"], ...]
    ) -> tuple[Float[Array, "n C"], Float[Array, " n"]]:
        """Returns the latent z of each feature vector, and log |det ∂z/∂features|."""
        log_determinant = jnp.zeros(len(features), features.dtype)
        for block, bias in zip(self.blocks, biases, strict=True):
            features, summand = block(features, bias)
            log_determinant += summand
        return features, log_determinant

    @property
    def condition_size(self) -> int:
        """Number of channels of the condition."""
        first = self.blocks[0]
        return first.weight1.shape[0] - (len(first.global_scale) - len(first.global_scale) // 2)

    def log_likelihood(
        self, features: Float[Array, "n C"], biases: tuple[Float[Array, "n units"], ...]
    ) -> Float[Array, " n"]:
        """Returns the log-likelihood per channel: (log N(z; 0, 1) + log |det|) / C."""
        z, log_determinant = self(features, biases)
        c = features.shape[1]
        return (-0.5 * jnp.sum(z**2, axis=1) + log_determinant) / c - 0.5 * math.log(2 * math.pi)
