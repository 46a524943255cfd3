"""Vision Transformer (Dosovitskiy et al. 2020), patch 16, in timm's form: pre-norm, exact GELU."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Shaped

from f2pad_jax.backbones._layers import Pointwise
from f2pad_jax.backbones.network import Network, Rules

PATCH = 16
GRID = 14
"""Number of patches along a side of the 224 x 224 training images."""


class LayerNorm(nnx.Module):
    """Normalisation of each token to mean 0 and variance 1, then scale and shift."""

    def __init__(self, width: int, eps: float = 1e-6):
        self.eps = eps
        self.scale = nnx.Param(jnp.zeros(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "*t c"]) -> Float[Array, "*t c"]:
        """Returns the normalised tokens."""
        return jax.nn.standardize(x, axis=-1, epsilon=self.eps) * self.scale[...] + self.bias[...]


class Attention(nnx.Module):
    """Multi-head self-attention; one matrix product gives queries, keys and values."""

    def __init__(self, width: int, num_heads: int):
        self.num_heads = num_heads
        self.qkv, self.proj = Pointwise(width, 3 * width), Pointwise(width, width)

    def __call__(
        self,
        x: Float[Array, "t c"],
        visible: Bool[Array, " t"] | None = None,
        angles: Float[Array, "t _half"] | None = None,
    ) -> Float[Array, "t c"]:
        """Returns each token as a mixture of the ``visible`` tokens (default: all tokens).

        With ``angles``, queries and keys are :func:`rotated`.
        """
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(len(x), 3, self.num_heads, -1), 1, 0)
        if angles is not None:
            q, k = rotated(q, angles), rotated(k, angles)
        mask = None if visible is None else jnp.broadcast_to(visible, (1, len(x), len(x)))
        return self.proj(jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(x.shape))


def rotated(x: Float[Array, "t n d"], angles: Float[Array, "t _half"]) -> Float[Array, "t n d"]:
    """Rotates the pair of channels (i, i + d/2) of every head by the token's i-th angle: RoPE of Su et al. (2021)."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Block(nnx.Module):
    """Transformer block: attention and a two-layer network, each with pre-norm and a shortcut."""

    def __init__(self, width: int, num_heads: int, eps: float = 1e-6):
        self.norm1, self.attn = LayerNorm(width, eps), Attention(width, num_heads)
        self.norm2 = LayerNorm(width, eps)
        self.fc1, self.fc2 = Pointwise(width, 4 * width), Pointwise(4 * width, width)

    def __call__(
        self,
        x: Float[Array, "t c"],
        visible: Bool[Array, " t"] | None = None,
        angles: Float[Array, "t _half"] | None = None,
    ) -> Float[Array, "t c"]:
        """Returns the transformed tokens; ``visible`` and ``angles`` are passed to :class:`Attention`."""
        x = x + self.attn(self.norm1(x), visible, angles)
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))


def patches(image: Shaped[Array, "h w c"], side: int) -> Shaped[Array, "t d"]:
    """Returns non-overlapping squares in reading order, each flattened as rows, columns, channels."""
    h, w, c = image.shape
    return image.reshape(h // side, side, w // side, side, c).swapaxes(1, 2).reshape(-1, side * side * c)


def unpatched(tokens: Float[Array, "t d"], side: int, size: tuple[int, int]) -> Float[Array, "h w c"]:
    """Returns the image of ``size`` (h, w) from its :func:`patches`."""
    h, w = size[0] // side, size[1] // side
    return tokens.reshape(h, w, side, side, -1).swapaxes(1, 2).reshape(*size, -1)


class PatchEmbedding(nnx.Module):
    """k x k convolution of stride k, computed as one matrix product of patches."""

    def __init__(self, width: int, side: int):
        self.side = side
        self.kernel = nnx.Param(jnp.zeros((side * side * 3, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, image: Float[Array, "h w 3"]) -> Float[Array, "t c"]:
        """Returns one token per patch."""
        return patches(image, self.side) @ self.kernel[...] + self.bias[...]

    @staticmethod
    def from_torch(kernel: np.ndarray) -> np.ndarray:
        """Converts PyTorch's (out, 3, k, k) kernel to (k·k·3, out)."""
        return kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel)) if kernel.ndim == 4 else kernel


class ViT(nnx.Module):
    """Vision Transformer. ``blockN``: patch tokens after the N-th block, stride 16; ``logits``: from the class token."""

    def __init__(self, through: str, width: int, num_heads: int, depth: int = 12):
        num_blocks = depth if through == "logits" else int(through[len("block") :])
        self.patch_embed = PatchEmbedding(width, PATCH)
        self.cls_token = nnx.Param(jnp.zeros((1, width)))
        self.pos_embed = nnx.Param(jnp.zeros((1 + GRID * GRID, width)))
        self.blocks = nnx.List([Block(width, num_heads) for _ in range(num_blocks)])
        self.norm, self.head = (LayerNorm(width), Pointwise(width, 1000)) if through == "logits" else (None, None)

    def __call__(self, x: Float[Array, "h w 3"]) -> dict[str, Float[Array, "_h_k _w_k _c_k"]]:
        """Returns every layer's output, by name."""
        h, w = x.shape[0] // PATCH, x.shape[1] // PATCH
        positions = self.pos_embed[...]
        tokens = jnp.concatenate(
            [self.cls_token[...] + positions[:1], self.patch_embed(x) + resized_positions(positions[1:], (h, w))]
        )
        tokens, maps = through_blocks(self.blocks, tokens, (h, w))
        if self.norm is not None and self.head is not None:
            maps["logits"] = self.head(self.norm(tokens[:1]))[None]
        return maps


def through_blocks(
    blocks: Iterable[Block],
    tokens: Float[Array, "t c"],
    size: tuple[int, int],
    angles: Float[Array, "t _half"] | None = None,
) -> tuple[Float[Array, "t c"], dict[str, Float[Array, "h w c"]]]:
    """Returns the tokens after the last block, and ``blockN``: patch tokens (last in ``tokens``) after the N-th block."""
    h, w = size
    maps = {}
    for i, block in enumerate(blocks):
        tokens = block(tokens, angles=angles)
        maps[f"block{i + 1}"] = tokens[-h * w :].reshape(h, w, -1)
    return tokens, maps


def resized_positions(
    positions: Float[Array, "t c"], size: tuple[int, int], *, antialias: bool = False
) -> Float[Array, "t2 c"]:
    """Resizes position embeddings from their square training grid to another grid: bicubic, as in PyTorch.

    PyTorch has two bicubic kernels: a = -0.75 without ``antialias``, and a = -0.5 with ``antialias``.
    """
    side = round(len(positions) ** 0.5)
    if size == (side, side):
        return positions
    grid = positions.reshape(side, side, -1)
    if antialias:
        return jax.image.resize(grid, (*size, grid.shape[-1]), "cubic").reshape(-1, grid.shape[-1])
    rows, columns = (jnp.asarray(_bicubic(side, out), positions.dtype) for out in size)
    return jnp.einsum("ai,bj,ijc->abc", rows, columns, grid).reshape(-1, positions.shape[-1])


def _bicubic(size: int, out: int, a: float = -0.75) -> np.ndarray:
    """Returns (out, size) weights of PyTorch's bicubic interpolation: Keys' kernel, half-pixel centres, edges repeated."""
    centre = (np.arange(out) + 0.5) * size / out - 0.5
    matrix = np.zeros((out, size))
    for tap in range(-1, 3):
        source = np.floor(centre).astype(int) + tap
        d = np.abs(centre - source)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(matrix, (np.arange(out), np.clip(source, 0, size - 1)), np.where(d <= 1, near, far))
    return matrix


def hugging_face_block(theirs: str, ours: str) -> Rules:
    """Returns rules for the transformer blocks of Hugging Face's files, transformers 5 included."""
    block = rf"{theirs}\.(\d+)\."
    parts = {
        r"attention\.(?:attention\.)?q(?:uery|_proj)\.": "attn.q.",
        r"attention\.(?:attention\.)?k(?:ey|_proj)\.": "attn.k.",
        r"attention\.(?:attention\.)?v(?:alue|_proj)\.": "attn.v.",
        r"attention\.(?:output\.dense|o_proj)\.": "attn.proj.",
        r"(?:intermediate\.dense|mlp\.fc1|mlp\.up_proj)\.": "fc1.",
        r"(?:output\.dense|mlp\.fc2|mlp\.down_proj)\.": "fc2.",
        r"(?:layernorm_before|norm1)\.": "norm1.",
        r"(?:layernorm_after|norm2)\.": "norm2.",
    }
    return tuple((block + part, rf"{ours}.\1.{name}") for part, name in parts.items())


def fused_block(name: str) -> Rules:
    """Returns rules for the transformer blocks of timm's and Facebook's files: queries, keys and values in one tensor."""
    return (
        (rf"{name}\.\d+\.(?:norm[12]|attn\.qkv|attn\.proj)\.", r"\g<0>"),
        (rf"({name}\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
    )


HUGGING_FACE = (
    (r"vit\.embeddings\.cls_token$", "cls_token"),
    (r"vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed."),
    (r"vit\.layernorm\.", "norm."),
    *hugging_face_block(r"vit\.(?:encoder\.layer|layers)", "blocks"),
)
FUSED = (
    (r"(?:cls_token|pos_embed)$", r"\g<0>"),
    (r"patch_embed\.proj\.", "patch_embed."),
    (r"norm\.", "norm."),
    *fused_block("blocks"),
)


def _network(width: int, num_heads: int) -> Network:
    return Network(
        build=lambda through: ViT(through, width, num_heads),
        strides={**{f"block{i + 1}": PATCH for i in range(12)}, "logits": PATCH},
        default_layers=("block4", "block8", "block12"),
        deep_layers=("block4", "block8", "block12"),
        layouts={
            "timm": (*FUSED, (r"head\.", "head.")),
            "Hugging Face": (*HUGGING_FACE, (r"classifier\.", "head.")),
        },
        local=False,  # every token attends to all tokens
    )


NETWORKS = {"vit-tiny": _network(192, 3), "vit-small": _network(384, 6), "vit-base": _network(768, 12)}
