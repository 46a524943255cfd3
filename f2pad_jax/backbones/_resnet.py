"""ResNet (He et al. 2015) in torchvision's form, and Wide ResNet (Zagoruyko & Komodakis 2016)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from f2pad_jax.backbones._layers import Conv, Pointwise, max_pool
from f2pad_jax.backbones.network import Network

LAYERS = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32, "logits": 32}


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1
    """Ratio of output channels to ``width``."""

    def __init__(self, c_in: int, width: int, stride: int):
        self.conv1 = Conv(c_in, width, 3, stride, padding=1)
        self.conv2 = Conv(width, width, 3, padding=1)
        self.downsample = Pointwise(c_in, width, stride) if stride > 1 or c_in != width else None

    def __call__(self, x: Float[Array, "h w c_in"]) -> Float[Array, "h2 w2 c_out"]:
        """Returns the block's output; the stride divides height and width."""
        y = self.conv2(jax.nn.relu(self.conv1(x)))
        return jax.nn.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nnx.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution, and a shortcut."""

    expansion = 4
    """Ratio of output channels to ``width``; ``widening`` does not change it."""

    def __init__(self, c_in: int, width: int, stride: int, widening: int = 1):
        c_out, width = width * 4, width * widening
        self.conv1 = Pointwise(c_in, width)
        self.conv2 = Conv(width, width, 3, stride, padding=1)
        self.conv3 = Pointwise(width, c_out)
        self.downsample = Pointwise(c_in, c_out, stride) if stride > 1 or c_in != c_out else None

    def __call__(self, x: Float[Array, "h w c_in"]) -> Float[Array, "h2 w2 c_out"]:
        """Returns the block's output; the stride divides height and width."""
        y = self.conv3(jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(x)))))
        return jax.nn.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nnx.Module):
    """Network with ``layer1`` to ``layer4`` (strides 4, 8, 16, 32) and ``logits``, built up to the layer ``through``."""

    def __init__(self, through: str, depths: Sequence[int], block: type, **block_options: int):
        self.conv1 = Conv(3, 64, 7, 2, padding=3)
        self.num_stages = min(list(LAYERS).index(through) + 1, 4)
        c_in = 64
        for i, depth in enumerate(depths[: self.num_stages]):
            width, blocks = 64 * 2**i, []
            for j in range(depth):
                blocks.append(block(c_in, width, 2 if i > 0 and j == 0 else 1, **block_options))
                c_in = width * block.expansion
            setattr(self, f"layer{i + 1}", nnx.List(blocks))
        self.fc = Pointwise(c_in, 1000) if through == "logits" else None

    def __call__(self, x: Float[Array, "h w 3"]) -> dict[str, Float[Array, "_h_k _w_k _c_k"]]:
        """Returns every layer's output, by name."""
        maps = {}
        x = max_pool(jax.nn.relu(self.conv1(x)))
        for i in range(self.num_stages):
            for block in getattr(self, f"layer{i + 1}"):
                x = block(x)
            maps[f"layer{i + 1}"] = x
        if self.fc is not None:
            maps["logits"] = self.fc(jnp.mean(x, axis=(0, 1), keepdims=True))
        return maps


# torchvision and timm name convolutions as this module does
_TORCHVISION = (
    (r"bn1\.", "conv1.norm."),
    (r"(layer\d\.\d+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"(layer\d\.\d+)\.downsample\.0\.", r"\1.downsample."),
    (r"(layer\d\.\d+)\.downsample\.1\.", r"\1.downsample.norm."),
    (r"conv1\.|layer\d\.\d+\.conv\d\.|fc\.", r"\g<0>"),
)
_STAGE = r"(?:resnet\.)?encoder\.stages\.(\d)\.layers\.(\d+)\."
_HUGGING_FACE = (
    (r"(?:resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
    (r"(?:resnet\.)?embedder\.embedder\.normalization\.", "conv1.norm."),
    (_STAGE + r"shortcut\.convolution\.", r"layer{\1+1}.\2.downsample."),
    (_STAGE + r"shortcut\.normalization\.", r"layer{\1+1}.\2.downsample.norm."),
    (_STAGE + r"layer\.(\d)\.convolution\.", r"layer{\1+1}.\2.conv{\3+1}."),
    (_STAGE + r"layer\.(\d)\.normalization\.", r"layer{\1+1}.\2.conv{\3+1}.norm."),
    (r"classifier\.1\.", "fc."),
)


def _network(depths: Sequence[int], block: type, **block_options: int) -> Network:
    return Network(
        build=lambda through: ResNet(through, depths, block, **block_options),
        strides=LAYERS,
        default_layers=("layer1", "layer2", "layer3"),
        deep_layers=("layer2", "layer3", "layer4"),
        layouts={"torchvision": _TORCHVISION, "Hugging Face": _HUGGING_FACE},
        batch_norm_eps=1e-5,
    )


NETWORKS = {
    "resnet18": _network((2, 2, 2, 2), BasicBlock),
    "resnet34": _network((3, 4, 6, 3), BasicBlock),
    "resnet50": _network((3, 4, 6, 3), Bottleneck),
    "wide-resnet50-2": _network((3, 4, 6, 3), Bottleneck, widening=2),
}
