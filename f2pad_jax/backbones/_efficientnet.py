"""EfficientNet B0-B7 (Tan & Le 2019) in TensorFlow's form, and EfficientNet-Lite0-4 (2020).

Padding is TensorFlow's SAME, and batch norm has eps 1e-3, as in timm's ``tf_`` variants. Lite variants have ReLU6 in place
of swish, and no squeeze-and-excitation. Their stem, their head, and the repeats of the first and last stage are not scaled.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from f2pad_jax.backbones._layers import Conv, Depthwise, Pointwise
from f2pad_jax.backbones.network import Network, Rules

# kernel size, stride, expansion, output channels and repeats of B0; other variants scale channels and repeats
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STRIDES = (2, 4, 8, 16, 16, 32, 32)
LAYERS = {
    **{name: s for i, s in enumerate(STRIDES) for name in (f"stage{i + 1}.project", f"stage{i + 1}")},
    "logits": 32,
}

# scale of the channels, scale of the repeats
SCALES = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
    "lite0": (1.0, 1.0),
    "lite1": (1.0, 1.1),
    "lite2": (1.1, 1.2),
    "lite3": (1.2, 1.4),
    "lite4": (1.4, 1.8),
}


def scaled_channels(channels: int, width: float) -> int:
    """Rounds ``channels · width`` to the nearest multiple of 8, or to the next if the nearest is over 10 % smaller."""
    if width == 1:
        return channels
    nearest = max(8, int(channels * width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels * width else nearest


def scaled_depths(depth: float, lite: bool) -> list[int]:
    """Returns the number of blocks in each stage."""
    unscaled = (0, len(STAGES) - 1) if lite else ()
    return [repeats if i in unscaled else math.ceil(repeats * depth) for i, (*_, repeats) in enumerate(STAGES)]


class SqueezeExcite(nnx.Module):
    """Channel attention: a two-layer network of the channel means scales each channel."""

    def __init__(self, channels: int, squeezed: int):
        self.reduce, self.expand = Pointwise(channels, squeezed), Pointwise(squeezed, channels)

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """Returns the scaled channels."""
        mean = jnp.mean(x, axis=(0, 1), keepdims=True)
        return x * jax.nn.sigmoid(self.expand(jax.nn.swish(self.reduce(mean))))


def relu6(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Returns min(max(x, 0), 6). Unlike JAX's own function, a network that refers to it can be pickled."""
    return jax.nn.relu6(x)


def swish(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Returns x · sigmoid(x). Unlike JAX's own function, a network that refers to it can be pickled."""
    return jax.nn.swish(x)


class MBConv(nnx.Module):
    """Inverted residual: expand (1x1), depthwise, squeeze-excite, project (1x1), and a shortcut where shapes agree."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int, expansion: int, lite: bool):
        self.activation = relu6 if lite else swish
        self.shortcut = stride == 1 and c_in == c_out
        self.expand = Pointwise(c_in, c_in * expansion) if expansion > 1 else None
        self.depthwise = Depthwise(c_in * expansion, kernel_size, stride)
        self.excite = None if lite else SqueezeExcite(c_in * expansion, c_in // 4)
        self.project = Pointwise(c_in * expansion, c_out)

    def __call__(self, x: Float[Array, "h w c_in"]) -> tuple[Float[Array, "h2 w2 c_out"], Float[Array, "h2 w2 c_out"]]:
        """Returns the output with and without the shortcut added; the stride divides height and width."""
        y = x if self.expand is None else self.activation(self.expand(x))
        y = self.activation(self.depthwise(y))
        y = self.project(y if self.excite is None else self.excite(y))
        return x + y if self.shortcut else y, y


class EfficientNet(nnx.Module):
    """Network with the layers of :data:`LAYERS`, built up to the layer ``through``.

    ``stageN`` (1..7) is the N-th stage's output. ``stageN.project`` is the output of its last block before the
    shortcut is added, as CFLOW-AD's official code taps it.
    """

    def __init__(self, through: str, variant: str):
        lite = variant.startswith("lite")
        width, depth = SCALES[variant]
        self.activation = relu6 if lite else swish
        c_in = 32 if lite else scaled_channels(32, width)
        self.stem = Conv(3, c_in, 3, 2)
        stages = []
        num_stages = len(STAGES) if through == "logits" else int(through[len("stage")])
        depths = scaled_depths(depth, lite)[:num_stages]
        for (kernel_size, stride, expansion, channels, _), repeats in zip(STAGES, depths, strict=False):
            blocks, c_out = [], scaled_channels(channels, width)
            for r in range(repeats):
                blocks.append(MBConv(c_in, c_out, kernel_size, stride if r == 0 else 1, expansion, lite))
                c_in = c_out
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        c_out = 1280 if lite else scaled_channels(1280, width)
        whole = through == "logits"
        self.head, self.classifier = (Pointwise(c_in, c_out), Pointwise(c_out, 1000)) if whole else (None, None)

    def __call__(self, x: Float[Array, "h w 3"]) -> dict[str, Float[Array, "_h_k _w_k _c_k"]]:
        """Returns every layer's output, by name."""
        maps = {}
        x = self.activation(self.stem(x))
        for i, stage in enumerate(self.stages):
            for block in stage:
                x, maps[f"stage{i + 1}.project"] = block(x)
            maps[f"stage{i + 1}"] = x
        if self.head is not None and self.classifier is not None:
            pooled = jnp.mean(self.activation(self.head(x)), axis=(0, 1), keepdims=True)
            maps["logits"] = self.classifier(pooled)
        return maps


def _layouts(depths: list[int]) -> dict[str, Rules]:
    first = [sum(depths[:i]) for i in range(len(depths))]

    def numbered(part: str):
        """Returns a function that replaces a block's running number by its stage and its number in the stage."""

        def replacement(match) -> str:
            number = int(match[1])
            stage = sum(number >= f for f in first) - 1
            return f"stages.{stage}.{number - first[stage]}.{part}."

        return replacement

    timm_parts = {
        "0": {"conv_dw": "depthwise", "bn1": "depthwise.norm", "conv_pw": "project", "bn2": "project.norm"},
        "[1-6]": {
            "conv_pw": "expand",
            "bn1": "expand.norm",
            "conv_dw": "depthwise",
            "bn2": "depthwise.norm",
            "conv_pwl": "project",
            "bn3": "project.norm",
        },
    }
    timm = [
        (rf"blocks\.({stage})\.(\d+)\.{part}\.", rf"stages.\1.\2.{ours}.")
        for stage, parts in timm_parts.items()
        for part, ours in {**parts, "se.conv_reduce": "excite.reduce", "se.conv_expand": "excite.expand"}.items()
    ]
    flat = {
        "_expand_conv": "expand",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise",
        "_bn1": "depthwise.norm",
        "_se_reduce": "excite.reduce",
        "_se_expand": "excite.expand",
        "_project_conv": "project",
        "_bn2": "project.norm",
    }
    return {
        "timm": (
            (r"conv_stem\.", "stem."),
            (r"bn1\.", "stem.norm."),
            (r"conv_head\.", "head."),
            (r"bn2\.", "head.norm."),
            (r"classifier\.", "classifier."),
            *timm,
        ),
        "efficientnet-pytorch": (
            (r"_conv_stem\.", "stem."),
            (r"_bn0\.", "stem.norm."),
            (r"_conv_head\.", "head."),
            (r"_bn1\.", "head.norm."),
            (r"_fc\.", "classifier."),
            *((rf"_blocks\.(\d+)\.{part}\.", numbered(ours)) for part, ours in flat.items()),
        ),
    }


def _network(variant: str) -> Network:
    return Network(
        build=lambda through: EfficientNet(through, variant),
        strides=LAYERS,
        default_layers=("stage2", "stage3", "stage5"),
        deep_layers=("stage3.project", "stage5.project", "stage6.project"),
        layouts=_layouts(scaled_depths(SCALES[variant][1], variant.startswith("lite"))),
        batch_norm_eps=1e-3,
        local=variant.startswith("lite"),  # squeeze-and-excitation averages over the whole image
    )


NETWORKS = {f"efficientnet-{variant}": _network(variant) for variant in SCALES}
