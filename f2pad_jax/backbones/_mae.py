"""Masked autoencoder (He et al. 2021): a ViT encodes the visible patches, and a small ViT decodes the masked patches.

Written from the paper. Departure: masked patches are hidden from attention instead of dropped, so that one program serves
every mask. Positions are added before masking, so the visible tokens equal the paper's.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from f2pad_jax.backbones._layers import Pointwise
from f2pad_jax.backbones._vit import (
    FUSED,
    HUGGING_FACE,
    Block,
    LayerNorm,
    PatchEmbedding,
    fused_block,
    hugging_face_block,
    patches,
    unpatched,
)
from f2pad_jax.backbones.network import Network

SIDE = 224
"""Height and width of the images, pixels."""
DECODER = {"width": 512, "num_heads": 16, "depth": 8}


class MaskedAutoencoder(nnx.Module):
    """Encoder and decoder; input and output are images in ImageNet-normalised intensity."""

    def __init__(self, width: int, num_heads: int, depth: int, patch: int):
        self.patch = patch
        tokens, decoded = 1 + (SIDE // patch) ** 2, DECODER["width"]
        self.patch_embed = PatchEmbedding(width, patch)
        self.cls_token = nnx.Param(jnp.zeros((1, width)))
        self.pos_embed = nnx.Param(jnp.zeros((tokens, width)))
        self.blocks = nnx.List([Block(width, num_heads) for _ in range(depth)])
        self.norm = LayerNorm(width)
        self.decoder_embed = Pointwise(width, decoded)
        self.mask_token = nnx.Param(jnp.zeros((1, decoded)))
        self.decoder_pos_embed = nnx.Param(jnp.zeros((tokens, decoded)))
        self.decoder_blocks = nnx.List([Block(decoded, DECODER["num_heads"]) for _ in range(DECODER["depth"])])
        self.decoder_norm = LayerNorm(decoded)
        self.decoder_pred = Pointwise(decoded, patch * patch * 3)

    def encode(self, image: Float[Array, "h w 3"], visible: Bool[Array, " t"]) -> Float[Array, "_tokens c"]:
        """Returns class and patch tokens; tokens of hidden patches are meaningless, and no token attends to them."""
        positions = self.pos_embed[...]
        x = jnp.concatenate([self.cls_token[...] + positions[:1], self.patch_embed(image) + positions[1:]])
        keys = jnp.concatenate([jnp.ones(1, bool), visible])
        for block in self.blocks:
            x = block(x, keys)
        return self.norm(x)

    def decode(self, tokens: Float[Array, "_tokens c"], visible: Bool[Array, " t"]) -> Float[Array, "t d"]:
        """Returns the pixels of every patch, flattened as rows, columns, channels."""
        keys = jnp.concatenate([jnp.ones(1, bool), visible])
        x = jnp.where(keys[:, None], self.decoder_embed(tokens), self.mask_token[...]) + self.decoder_pos_embed[...]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[1:]

    def __call__(self, image: Float[Array, "h w 3"], mask: Bool[Array, "h w"]) -> Float[Array, "h w 3"]:
        """Decodes every patch that ``mask`` touches; returns the image with the masked pixels replaced."""
        visible = self.visible(mask)
        drawn = unpatched(self.decode(self.encode(image, visible), visible), self.patch, (SIDE, SIDE))
        return jnp.where(mask[..., None], drawn, image)

    def visible(self, mask: Bool[Array, "h w"]) -> Bool[Array, " t"]:
        """Returns the patches without a masked pixel."""
        return ~jnp.any(patches(mask[..., None], self.patch), axis=-1)


def _network(width: int, num_heads: int, depth: int, patch: int) -> Network:
    return Network(
        build=lambda through: MaskedAutoencoder(width, num_heads, depth, patch),
        strides={"decoder": patch},
        default_layers=("decoder",),
        layouts={
            "Hugging Face": (
                *HUGGING_FACE,
                (r"decoder\.(mask_token|decoder_pos_embed)$", r"\1"),
                (r"decoder\.(decoder_embed|decoder_norm|decoder_pred)\.", r"\1."),
                *hugging_face_block(r"decoder\.decoder_(?:layers|encoder\.layer)", "decoder_blocks"),
            ),
            "Facebook": (
                *FUSED,
                (r"(?:mask_token|decoder_pos_embed)$", r"\g<0>"),
                (r"(?:decoder_embed|decoder_norm|decoder_pred)\.", r"\g<0>"),
                *fused_block("decoder_blocks"),
            ),
        },
        missing_hint="; a file with the encoder only can't inpaint: use a file of the whole autoencoder",
    )


NETWORKS = {
    "mae-base": _network(768, 12, 12, 16),
    "mae-large": _network(1024, 16, 24, 16),
    "mae-huge": _network(1280, 16, 32, 14),
}
