"""DINOv2 (Oquab et al. 2023), with registers (Darcet et al. 2023) or without, and DINOv3 (Siméoni et al. 2025).

Both are ViTs trained without labels. Written from the papers; the features equal the Python package ``transformers``'s.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from f2pad_jax.backbones._vit import (
    FUSED,
    Block,
    PatchEmbedding,
    hugging_face_block,
    resized_positions,
    through_blocks,
)
from f2pad_jax.backbones.network import Network
from f2pad_jax.errors import CheckpointError

GRID = 37
"""Number of patches along a side of the 518 x 518 images that DINOv2's positions were trained on."""
PATCH = {2: 14, 3: 16}
"""Side of a patch in DINOv2 and in DINOv3, pixels."""
EPS = {2: 1e-6, 3: 1e-5}
"""Constant ε of the layer norms."""


class DINO(nnx.Module):
    """DINOv2 or DINOv3. ``blockN``: patch tokens after the N-th block, without the final norm.

    The tokens are a class token, register tokens and patch tokens. DINOv2 adds learned positions to the patch tokens; the
    class token's position is part of the token here. DINOv3 has :func:`rotary_angles`.
    """

    def __init__(self, through: str, width: int, num_heads: int, version: int, num_registers: int):
        self.patch, self.head = PATCH[version], width // num_heads
        self.patch_embed = PatchEmbedding(width, self.patch)
        self.cls_token = nnx.Param(jnp.zeros((1, width)))
        self.register_tokens = nnx.Param(jnp.zeros((num_registers, width))) if num_registers else None
        self.pos_embed = nnx.Param(jnp.zeros((GRID * GRID, width))) if version == 2 else None
        num_blocks = int(through[len("block") :])
        self.blocks = nnx.List([Block(width, num_heads, EPS[version]) for _ in range(num_blocks)])

    def __call__(self, x: Float[Array, "h w 3"]) -> dict[str, Float[Array, "_h_k _w_k _c_k"]]:
        """Returns every layer's output, by name."""
        h, w = x.shape[0] // self.patch, x.shape[1] // self.patch
        before = [token[...] for token in (self.cls_token, self.register_tokens) if token is not None]
        patches, angles = self.patch_embed(x), None
        if self.pos_embed is None:
            unmoved = jnp.zeros((sum(map(len, before)), self.head // 2), x.dtype)
            angles = jnp.concatenate([unmoved, rotary_angles((h, w), self.head).astype(x.dtype)])
        else:  # the interpolation is antialiased in the models with registers only
            antialias = self.register_tokens is not None
            patches += resized_positions(self.pos_embed[...], (h, w), antialias=antialias)
        return through_blocks(self.blocks, jnp.concatenate([*before, patches]), (h, w), angles)[1]


def rotary_angles(size: tuple[int, int], num_channels: int) -> Float[Array, "t _half"]:
    """Returns the angles 2πy/p and 2πx/p of each patch, for heads of ``num_channels``.

    (y, x) is the patch's centre, from -1 to 1 along each side of the image. The d/4 periods are p = 100^(4k/d), k = 0, 1, …
    """
    centres = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in size), indexing="ij")
    frequencies = 100.0 ** -np.arange(0, 1, 4 / num_channels)
    parts = [2 * np.pi * jnp.asarray(centre.reshape(-1, 1)) * jnp.asarray(frequencies) for centre in centres]
    return jnp.concatenate(parts, axis=-1)


def amend(tensors: dict[str, np.ndarray]) -> None:
    """Brings the tensors of a file to this network's form, in place.

    The class token's position is added to the token, as in timm's files of models with registers. In DINOv3, absent biases
    of queries, keys and values are 0, and Facebook's mask multiplies them. LayerScale is folded into the layer before it:
    γ·(Wx + b) = (γW)x + γb, in float64. Tensors without influence on the layers are dropped, such as the final norm.

    Raises:
        CheckpointError: the file has no LayerScale, or a shape is wrong.
    """
    for name in [name for name in tensors if name.startswith(("norm.", "mask_token", "rope_embed."))]:
        del tensors[name]
    try:
        if (positions := tensors.get("pos_embed")) is None:
            _complete_biases(tensors)
        elif positions.shape[1:2] == (1 + GRID * GRID,):
            tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
            tensors["pos_embed"] = positions[:, 1:]
        before_scales = [name for name in tensors if name.endswith((".attn.proj.weight", ".fc2.weight"))]
        for layer in [name.removesuffix(".weight") for name in before_scales]:
            scale = tensors.pop(f"{layer}.layer_scale").astype(np.float64)
            for name, factor in ((f"{layer}.weight", scale[:, None]), (f"{layer}.bias", scale)):
                tensors[name] = (tensors[name] * factor).astype(np.float32)
    except KeyError as error:
        raise CheckpointError(f"tensor '{error.args[0]}' is missing") from None
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"the shapes of the tensors don't fit each other: {error}") from None


def _complete_biases(tensors: dict[str, np.ndarray]) -> None:
    """Fills in the biases of queries, keys and values as one tensor, in place."""
    for attention in [name.removesuffix(".proj.weight") for name in tensors if name.endswith(".attn.proj.weight")]:
        absent = np.zeros(len(tensors[f"{attention}.proj.weight"]), np.float32)
        separate = np.concatenate([tensors.pop(f"{attention}.{part}.bias", absent) for part in ("q", "k", "v")])
        mask = tensors.pop(f"{attention}.qkv.bias_mask", np.float32(1))
        tensors[f"{attention}.qkv.bias"] = tensors.get(f"{attention}.qkv.bias", separate) * mask


HUGGING_FACE = (
    (r"embeddings\.(cls_token|register_tokens|mask_token)$", r"\1"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed."),
    (r"(?:layer)?norm\.", "norm."),
    (r"(?:encoder\.|model\.)?layer\.(\d+)\.layer_scale1\.lambda1$", r"blocks.\1.attn.proj.layer_scale"),
    (r"(?:encoder\.|model\.)?layer\.(\d+)\.layer_scale2\.lambda1$", r"blocks.\1.fc2.layer_scale"),
    *hugging_face_block(r"(?:encoder\.|model\.)?layer", "blocks"),
)
TIMM_OR_FACEBOOK = (
    (r"(?:mask_token$|rope_embed\.)", r"\g<0>"),
    (r"(?:reg_token|register_tokens|storage_tokens)$", "register_tokens"),
    (r"(blocks\.\d+)\.(?:ls1\.gamma|gamma_1)$", r"\1.attn.proj.layer_scale"),
    (r"(blocks\.\d+)\.(?:ls2\.gamma|gamma_2)$", r"\1.fc2.layer_scale"),
    (r"(blocks\.\d+)\.attn\.([qv])_bias$", r"\1.attn.\2.bias"),
    *FUSED,
)


def _network(width: int, num_heads: int, depth: int, version: int, num_registers: int) -> Network:
    thirds = tuple(f"block{depth * i // 3}" for i in (1, 2, 3))
    return Network(
        build=lambda through: DINO(through, width, num_heads, version, num_registers),
        strides={f"block{i + 1}": PATCH[version] for i in range(depth)},
        default_layers=thirds,
        deep_layers=thirds,
        layouts={"timm or Facebook": TIMM_OR_FACEBOOK, "Hugging Face": HUGGING_FACE},
        local=False,  # every token attends to all tokens
        amend=amend,
    )


_SIZES = {"small": (384, 6, 12), "base": (768, 12, 12), "large": (1024, 16, 24)}
NETWORKS = {
    **{f"dinov2-{size}": _network(*shape, 2, 0) for size, shape in _SIZES.items()},
    **{f"dinov2-{size}-registers": _network(*shape, 2, 4) for size, shape in _SIZES.items()},
    **{f"dinov3-{size}": _network(*shape, 3, 4) for size, shape in _SIZES.items()},
}
