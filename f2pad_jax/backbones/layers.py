"""Convolutions written so that XLA runs them, and their input gradients, fast on a CPU and a GPU alike.

All take one channels-last image; batch with ``jax.vmap``. Batch norm is folded into kernel and bias at conversion.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding (before, after): asymmetric where the stride leaves an odd total."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad_same(image: Float[Array, "h w c"], kernel: int, stride: int) -> Float[Array, "h2 w2 c"]:
    """Pad with zeros as TensorFlow's SAME does."""
    pads = [same_padding(size, kernel, stride) for size in image.shape[:2]]
    return jnp.pad(image, (*pads, (0, 0)))


class Pointwise(nnx.Module):
    """1x1 convolution: a matrix product over channels."""

    def __init__(self, c_in: int, c_out: int):
        self.kernel = nnx.Param(jnp.zeros((c_in, c_out)))
        self.bias = nnx.Param(jnp.zeros(c_out))

    def __call__(self, x: Float[Array, "h w c_in"]) -> Float[Array, "h w c_out"]:
        """Channels mixed at each pixel."""
        return x @ self.kernel[...] + self.bias[...]


class Depthwise(nnx.Module):
    """Depthwise k x k convolution, SAME padding: pad once, add k² shifted products.

    XLA's CPU backend runs a grouped convolution many times slower than these fused multiply-adds.
    With stride 2 the padded image is first split into its four phases, so that every slice is dense.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int):
        self.kernel_size, self.stride = kernel_size, stride
        self.kernel = nnx.Param(jnp.zeros((kernel_size, kernel_size, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c"]:
        """Each channel filtered by itself."""
        kernel, k, s = self.kernel[...], self.kernel_size, self.stride
        h, w = -(-x.shape[0] // s), -(-x.shape[1] // s)
        phases = split_phases(pad_same(x, k, s), s)
        out = self.bias[...]
        for i in range(k):
            for j in range(k):
                top, left = i // s, j // s
                out = out + phases[i % s, j % s, top : top + h, left : left + w] * kernel[i, j]
        return out


def split_phases(x: Float[Array, "h w c"], stride: int) -> Float[Array, "s s h2 w2 c"]:
    """The pixels of each residue class of rows and columns: phase [i, j] holds x[i::s, j::s], zero-padded to one size."""
    h, w, c = x.shape
    x = jnp.pad(x, ((0, -h % stride), (0, -w % stride), (0, 0)))
    return x.reshape(x.shape[0] // stride, stride, x.shape[1] // stride, stride, c).transpose(1, 3, 0, 2, 4)


class Conv(nnx.Module):
    """Dense k x k convolution, SAME padding, as a sum of k² matrix products of shifted slices.

    Its input gradient is again matrix products, where the gradient of a strided ``conv_general_dilated`` is a dilated
    convolution that XLA's CPU backend runs slowly.
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int):
        self.kernel_size, self.stride = kernel_size, stride
        self.kernel = nnx.Param(jnp.zeros((kernel_size, kernel_size, c_in, c_out)))
        self.bias = nnx.Param(jnp.zeros(c_out))

    def __call__(self, x: Float[Array, "h w c_in"]) -> Float[Array, "h2 w2 c_out"]:
        """Channels mixed over each neighbourhood."""
        kernel, k, s = self.kernel[...], self.kernel_size, self.stride
        h, w = -(-x.shape[0] // s), -(-x.shape[1] // s)
        phases = split_phases(pad_same(x, k, s), s)
        columns = [phases[i % s, j % s, i // s : i // s + h, j // s : j // s + w] for i in range(k) for j in range(k)]
        return jnp.concatenate(columns, axis=-1) @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...]
