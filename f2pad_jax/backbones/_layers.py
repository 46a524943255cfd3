"""Layers whose outputs and input gradients XLA computes fast, each with a conversion from PyTorch's kernel layout.

Each layer takes one channels-last image; ``jax.vmap`` adds a batch axis. Conversion folds batch norm into kernel and bias.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from f2pad_jax._backend import on_cpu


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Returns TensorFlow's SAME padding (before, after); ``after`` is larger by one where the total is odd."""
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


class Pointwise(nnx.Module):
    """1x1 convolution or dense layer: a matrix product over channels, at every ``stride``-th pixel.

    On a GPU, a strided layer calls XLA's convolution: JAX 0.11's compiler crashes on the product of a strided slice.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        self.stride = stride
        self.kernel = nnx.Param(jnp.zeros((c_in, c_out)))
        self.bias = nnx.Param(jnp.zeros(c_out))

    def __call__(self, x: Float[Array, "*hw c_in"]) -> Float[Array, "*_hw2 c_out"]:
        """Returns the product at each position."""
        if self.stride > 1:
            if not on_cpu():
                return convolved(x, self.kernel[...][None, None], self.stride, [(0, 0), (0, 0)]) + self.bias[...]
            x = x[:: self.stride, :: self.stride]
        return x @ self.kernel[...] + self.bias[...]

    @staticmethod
    def from_torch(kernel: np.ndarray) -> np.ndarray:
        """Converts PyTorch's (out, in) or (out, in, 1, 1) kernel to (in, out)."""
        if kernel.ndim == 4 and kernel.shape[2:] == (1, 1):
            kernel = kernel[:, :, 0, 0]
        return kernel.T


class Conv(nnx.Module):
    """Dense k x k convolution, zero-padded by ``padding`` pixels (None: TensorFlow's SAME).

    XLA's CPU convolution is several times slower inside a loop, such as a solver's, than outside. On a CPU, 3 x 3 kernels
    of stride 1 therefore take Winograd's form (by :meth:`prepare`), and strided convolutions are one matrix product.
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, padding: int | None = None):
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.kernel: nnx.Param | nnx.List = nnx.Param(jnp.zeros((kernel_size, kernel_size, c_in, c_out)))
        self.bias = nnx.Param(jnp.zeros(c_out))

    def __call__(self, x: Float[Array, "h w c_in"]) -> Float[Array, "h2 w2 c_out"]:
        """Returns the convolved image."""
        if isinstance(self.kernel, nnx.List):
            return jnp.asarray(winograd(x, tuple(matrix[...] for matrix in self.kernel))) + self.bias[...]
        kernel, k, s, p = self.kernel[...], self.kernel_size, self.stride, self.padding
        pads = [same_padding(size, k, s) if p is None else (p, p) for size in x.shape[:2]]
        y = strided_product(jnp.pad(x, (*pads, (0, 0))), kernel, s) if s > 1 and on_cpu() else convolved(x, kernel, s, pads)
        return y + self.bias[...]

    def prepare(self) -> None:
        """Converts the kernel, in place, to the fastest form on this backend."""
        suits = (self.kernel_size, self.stride) == (3, 1) and self.padding in (1, None) and on_cpu()
        if suits and isinstance(self.kernel, nnx.Param):
            # sixteen arrays, because XLA would copy each matrix out of a single array at every step
            self.kernel = nnx.List([nnx.Param(matrix) for matrix in winograd_kernel(self.kernel[...])])

    @staticmethod
    def from_torch(kernel: np.ndarray) -> np.ndarray:
        """Converts PyTorch's (out, in, k, k) kernel to (k, k, in, out)."""
        return kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel


def convolved(
    x: Float[Array, "h w c_in"], kernel: Float[Array, "k k c_in c_out"], stride: int, pads: list[tuple[int, int]]
) -> Float[Array, "h2 w2 c_out"]:
    """Returns XLA's convolution of one image."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x[None], kernel, (stride, stride), pads, dimension_numbers=dimensions)[0]


def strided_product(
    x: Float[Array, "h w c_in"], kernel: Float[Array, "k k c_in c_out"], stride: int
) -> Float[Array, "h2 w2 c_out"]:
    """Returns a strided convolution of a padded image, computed as one matrix product of shifted slices.

    With few channels, each square of stride x stride pixels first becomes one pixel of many channels: slices are longer.
    """
    k, s, (*_, c_in, c_out) = len(kernel), stride, kernel.shape
    h, w = ((size - k) // s + 1 for size in x.shape[:2])
    if c_in < 8:
        squares = -(-k // s)
        rows, columns = h + squares - 1, w + squares - 1
        x = jnp.pad(x, ((0, s), (0, s), (0, 0)))[: s * rows, : s * columns]
        x = x.reshape(rows, s, columns, s, c_in).swapaxes(1, 2)
        parts = [(i, j) for i in range(squares) for j in range(squares)]
        matrices = [kernel[s * i : s * (i + 1), s * j : s * (j + 1)] for i, j in parts]
        slices = [
            x[i : i + h, j : j + w, : m.shape[0], : m.shape[1]].reshape(h, w, -1)
            for (i, j), m in zip(parts, matrices, strict=True)
        ]
        kernel = jnp.concatenate([m.reshape(-1, c_out) for m in matrices])
    else:
        slices = [x[i : i + s * (h - 1) + 1 : s, j : j + s * (w - 1) + 1 : s] for i in range(k) for j in range(k)]
    return jnp.concatenate(slices, axis=-1) @ kernel.reshape(-1, c_out)


def winograd_kernel(kernel: Float[Array, "3 3 c_in c_out"]) -> Float[Array, "16 c_in c_out"]:
    """Returns the transformed kernel G g Gᵀ of Lavin & Gray (2015), F(2x2, 3x3)."""
    g = jnp.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], kernel.dtype)
    return jnp.einsum("ai,bj,ijcd->abcd", g, g, kernel).reshape(16, *kernel.shape[2:])


def _winograd(
    x: Float[Array, "h w c"], kernel: tuple[Float[Array, "c_in c_out"], ...], *, transposed: bool = False
) -> Float[Array, "h w _c"]:
    """Returns the 3 x 3 convolution with one pixel of zero padding: Aᵀ[(G g Gᵀ)(Bᵀ d B)]A of Lavin & Gray (2015).

    F(2x2, 3x3): each 4 x 4 tile gives 2 x 2 pixels with 16 products per channel pair instead of 36, as sixteen matrix
    products. ``kernel`` has the matrices of :func:`winograd_kernel`. ``transposed`` gives the transposed convolution. Its
    kernel is rotated by 180°, which exchanges rows 0 and 3, and columns 0 and 3, of G g Gᵀ.
    """
    order = (3, 1, 2, 0) if transposed else (0, 1, 2, 3)

    def product(tile: Float[Array, "_h _w c"], i: int, j: int) -> Float[Array, "_h _w _c"]:
        matrix = kernel[4 * order[i] + order[j]]
        return tile @ (matrix.T if transposed else matrix)

    h, w, _ = x.shape
    rows, columns = -(-h // 2), -(-w // 2)  # numbers of tiles
    x = jnp.pad(x, ((1, 2 * rows + 1 - h), (1, 2 * columns + 1 - w), (0, 0)))

    def tiled(x: Float[Array, "..."], axis: int) -> list[Float[Array, "..."]]:
        """Returns Bᵀd along one axis, for tiles of 4 pixels that overlap by 2."""
        x = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
        even, odd = jnp.moveaxis(x, axis + 1, 0)
        n = even.shape[axis] - 1
        d0, d2 = (jax.lax.slice_in_dim(even, i, i + n, axis=axis) for i in (0, 1))
        d1, d3 = (jax.lax.slice_in_dim(odd, i, i + n, axis=axis) for i in (0, 1))
        return [d0 - d2, d1 + d2, d2 - d1, d1 - d3]

    m = [[product(tile, i, j) for j, tile in enumerate(tiled(row, 1))] for i, row in enumerate(tiled(x, 0))]
    # Aᵀ m A: along the columns of the tiles, then along the rows
    m = [jnp.stack([a + b + c, b - c - d], axis=2) for a, b, c, d in m]
    a, b, c, d = m
    y = jnp.stack([a + b + c, b - c - d], axis=1)
    return y.reshape(2 * rows, 2 * columns, -1)[:h, :w]


def _winograd_forward(x, kernel):
    return _winograd(x, kernel), (x, kernel)


def _winograd_backward(residuals, g):
    """Returns the gradients of the input (a transposed convolution) and of the kernel."""
    x, kernel = residuals
    kernel_gradient = jax.vjp(lambda kernel: _winograd(x, kernel), kernel)[1](g)[0]
    return _winograd(g, kernel, transposed=True), kernel_gradient


winograd = jax.custom_vjp(_winograd)
winograd.defvjp(_winograd_forward, _winograd_backward)


class Depthwise(nnx.Module):
    """Depthwise k x k convolution with SAME padding, as k² shifted products, forward and backward.

    XLA's CPU backend runs a grouped convolution many times slower than these fused multiply-adds.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int):
        self.kernel_size, self.stride = kernel_size, stride
        self.kernel = nnx.Param(jnp.zeros((kernel_size, kernel_size, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c"]:
        """Returns each channel filtered by its own kernel."""
        return jnp.asarray(depthwise(x, self.kernel[...], self.stride)) + self.bias[...]

    @staticmethod
    def from_torch(kernel: np.ndarray) -> np.ndarray:
        """Converts PyTorch's (c, 1, k, k) kernel to (k, k, c)."""
        return kernel[:, 0].transpose(1, 2, 0) if kernel.ndim == 4 and kernel.shape[1] == 1 else kernel


def _depthwise(x: Float[Array, "h w c"], kernel: Float[Array, "k k c"], stride: int) -> Float[Array, "h2 w2 c"]:
    """Returns Σ_i x[s·t + i - before] · kernel[i] at position t, per channel and along both axes, with padding ``before``.

    The s² phases of the padded image (every s-th pixel) are laid out first, so that every slice is dense. The gradient is
    :func:`_depthwise_transposed`, because JAX's gradient of padded slices would add k² padded images.
    """
    k, s = len(kernel), stride
    h, w = (-(-size // s) for size in x.shape[:2])
    pads = [same_padding(size, k, s) for size in x.shape[:2]]
    pads = [(before, after + (-(size + before + after)) % s) for size, (before, after) in zip(x.shape, pads, strict=False)]
    x = jnp.pad(x, (*pads, (0, 0)))
    phases = x.reshape(x.shape[0] // s, s, x.shape[1] // s, s, -1).transpose(1, 3, 0, 2, 4)
    out = jnp.zeros((), x.dtype)
    for i in range(k):
        for j in range(k):
            out = out + phases[i % s, j % s, i // s : i // s + h, j // s : j // s + w] * kernel[i, j]
    return out


def _depthwise_forward(x, kernel, stride):
    return _depthwise(x, kernel, stride), (x, kernel)


def _depthwise_backward(stride, residuals, g):
    x, kernel = residuals
    return _depthwise_transposed(g, kernel, stride, x.shape[:2]), _depthwise_kernel_gradient(x, g, len(kernel), stride)


def _depthwise_kernel_gradient(
    x: Float[Array, "h w c"], g: Float[Array, "h2 w2 c"], k: int, stride: int
) -> Float[Array, "k k c"]:
    """Returns Σ_t x[s·t + i - before] · g[t] at tap i, as one grouped convolution: XLA removes it where it is unused."""
    pads = [same_padding(size, k, stride) for size in x.shape[:2]]
    c = x.shape[-1]
    found = jax.lax.conv_general_dilated(
        jnp.moveaxis(x, -1, 0)[None],
        jnp.moveaxis(g, -1, 0)[:, None],
        (1, 1),
        pads,
        rhs_dilation=(stride, stride),
        feature_group_count=c,
    )
    return jnp.moveaxis(found[0, :, :k, :k], 0, -1)


_differentiable_depthwise = jax.custom_vjp(_depthwise, nondiff_argnums=(2,))
_differentiable_depthwise.defvjp(_depthwise_forward, _depthwise_backward)
depthwise = jax.jit(_differentiable_depthwise, static_argnums=2)  # traced once for all blocks of one shape


def _depthwise_transposed(
    g: Float[Array, "h2 w2 c"], kernel: Float[Array, "k k c"], stride: int, size: tuple[int, int]
) -> Float[Array, "h w c"]:
    """Returns the input gradient by phases of the padded image: pixel s·t + r gets Σ_a g[t - a] · kernel[s·a + r]."""
    k, s = len(kernel), stride
    reach = -(-k // s)
    before = [same_padding(side, k, s)[0] for side in size]
    first = [b // s for b in before]
    count = [-(-(b + side) // s) - f for b, side, f in zip(before, size, first, strict=True)]
    pads = [(reach - 1 - f, f + n - out) for f, n, out in zip(first, count, g.shape, strict=False)]
    g = jnp.pad(g, (*pads, (0, 0)))

    def phase(r: int, q: int) -> Float[Array, "_h _w c"]:
        out = jnp.zeros((), g.dtype)
        for a in range(-(-(k - r) // s)):
            for b in range(-(-(k - q) // s)):
                top, left = reach - 1 - a, reach - 1 - b
                out = out + g[top : top + count[0], left : left + count[1]] * kernel[s * a + r, s * b + q]
        return jnp.broadcast_to(out, (*count, g.shape[-1]))

    phases = jnp.stack([jnp.stack([phase(r, q) for q in range(s)], axis=2) for r in range(s)], axis=1)
    x = phases.reshape(count[0] * s, count[1] * s, g.shape[-1])
    top, left = (b - s * f for b, f in zip(before, first, strict=True))
    return x[top : top + size[0], left : left + size[1]]


def max_pool(x: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c"]:
    """Returns the maximum over 3 x 3 pixels with stride 2 and padding 1, for values >= 0 and even sides.

    Dense slices of rows, then of columns, are faster on a CPU than XLA's windowed maximum and its gradient.
    """
    h, w, c = x.shape
    even, odd = x.reshape(h // 2, 2, w, c).swapaxes(0, 1)
    x = jnp.maximum(jnp.maximum(even, odd), jnp.pad(odd, ((1, 0), (0, 0), (0, 0)))[:-1])
    even, odd = x.reshape(h // 2, w // 2, 2, c).transpose(2, 0, 1, 3)
    return jnp.maximum(jnp.maximum(even, odd), jnp.pad(odd, ((0, 0), (1, 0), (0, 0)))[:, :-1])
