"""EfficientNet-Lite: MBConv without squeeze-excite, ReLU6, TensorFlow SAME padding (Tan & Le 2019; Lite variant 2020)."""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from f2pad_jax.backbones.layers import Conv, Depthwise, Pointwise

BATCH_NORM_EPS = 1e-3

# kernel size, stride, expansion, output channels, repeats
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class MBConv(nnx.Module):
    """Inverted residual: expand (1x1), depthwise, project (1x1), and the shortcut where shapes allow."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int, expansion: int):
        self.shortcut = stride == 1 and c_in == c_out
        self.expand = Pointwise(c_in, c_in * expansion) if expansion > 1 else None
        self.depthwise = Depthwise(c_in * expansion, kernel_size, stride)
        self.project = Pointwise(c_in * expansion, c_out)

    def __call__(self, x: Float[Array, "h w c_in"]) -> Float[Array, "h2 w2 c_out"]:
        """Side divided by the stride."""
        y = x if self.expand is None else jax.nn.relu6(self.expand(x))
        y = self.project(jax.nn.relu6(self.depthwise(y)))
        return x + y if self.shortcut else y


class EfficientNetLite0(nnx.Module):
    """EfficientNet-Lite0. ``stageN`` (1..7) names the output of the N-th stage; strides 2, 4, 8, 16, 16, 32, 32."""

    strides: ClassVar = {f"stage{i + 1}": s for i, s in enumerate((2, 4, 8, 16, 16, 32, 32))}
    channels: ClassVar = {f"stage{i + 1}": stage[3] for i, stage in enumerate(STAGES)}

    def __init__(self):
        self.stem = Conv(3, 32, 3, 2)
        stages, c_in = [], 32
        for kernel_size, stride, expansion, c_out, repeats in STAGES:
            blocks = []
            for r in range(repeats):
                blocks.append(MBConv(c_in, c_out, kernel_size, stride if r == 0 else 1, expansion))
                c_in = c_out
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.head = Pointwise(c_in, 1280)
        self.classifier = Pointwise(1280, 1000)

    def __call__(self, x: Float[Array, "h w 3"]) -> dict[str, Float[Array, "_h_k _w_k _c_k"]]:
        """Every stage's output, by name."""
        maps = {}
        x = jax.nn.relu6(self.stem(x))
        for i, stage in enumerate(self.stages):
            for block in stage:
                x = block(x)
            maps[f"stage{i + 1}"] = x
        return maps

    def logits(self, x: Float[Array, "h w 3"]) -> Float[Array, " 1000"]:
        """ImageNet class scores."""
        pooled = jnp.mean(jax.nn.relu6(self.head(self(x)["stage7"])), axis=(0, 1))
        return self.classifier(pooled[None, None])[0, 0]

    @staticmethod
    def convert(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Weights in this module's names and layout from a PyTorch state dict with keys ``_blocks.N._expand_conv.weight``.

        Batch norm is folded in float64: kernel·γ/√(σ²+ε), β - μ·γ/√(σ²+ε).
        """
        left = dict(tensors)
        out: dict[str, np.ndarray] = {}

        def folded(target: str, conv: str, norm: str, layout) -> None:
            kernel = left.pop(f"{conv}.weight").astype(np.float64)
            gamma, beta, mean, var = (
                left.pop(f"{norm}.{name}").astype(np.float64) for name in ("weight", "bias", "running_mean", "running_var")
            )
            left.pop(f"{norm}.num_batches_tracked", None)
            if kernel.ndim != 4 or not all(v.shape == kernel.shape[:1] for v in (gamma, beta, mean, var)):
                raise ValueError(f"the shapes of '{conv}' and '{norm}' don't fit together")
            scale = gamma / np.sqrt(var + BATCH_NORM_EPS)
            out[f"{target}.kernel"] = layout(kernel * scale[:, None, None, None]).astype(np.float32)
            out[f"{target}.bias"] = (beta - mean * scale).astype(np.float32)

        def dense(kernel: np.ndarray) -> np.ndarray:  # O I k k -> k k I O
            return np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))

        def pointwise(kernel: np.ndarray) -> np.ndarray:  # O I 1 1 -> I O
            return np.ascontiguousarray(kernel[:, :, 0, 0].T)

        def depthwise(kernel: np.ndarray) -> np.ndarray:  # C 1 k k -> k k C
            return np.ascontiguousarray(kernel[:, 0].transpose(1, 2, 0))

        folded("stem", "_conv_stem", "_bn0", dense)
        block = 0
        for i, (_, _, expansion, _, repeats) in enumerate(STAGES):
            for r in range(repeats):
                source, target = f"_blocks.{block}.", f"stages.{i}.{r}."
                if expansion > 1:
                    folded(target + "expand", source + "_expand_conv", source + "_bn0", pointwise)
                folded(target + "depthwise", source + "_depthwise_conv", source + "_bn1", depthwise)
                folded(target + "project", source + "_project_conv", source + "_bn2", pointwise)
                block += 1
        folded("head", "_conv_head", "_bn1", pointwise)
        out["classifier.kernel"] = np.ascontiguousarray(left.pop("_fc.weight").T)
        out["classifier.bias"] = left.pop("_fc.bias")
        if left:
            raise KeyError(next(iter(left)))
        return out
