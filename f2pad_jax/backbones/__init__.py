"""Feature extractors in Flax NNX with converted ImageNet weights."""

from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from f2pad_jax import checkpoints
from f2pad_jax.backbones.efficientnet import EfficientNetLite0
from f2pad_jax.errors import CheckpointError

NETWORKS = {"efficientnet-lite0": EfficientNetLite0}
DEFAULT_LAYERS = {"efficientnet-lite0": ("stage2", "stage3", "stage5")}


class Backbone(eqx.Module):
    """A frozen network: images in its own units to a tuple of feature maps."""

    name: str = eqx.field(static=True)
    layers: tuple[str, ...] = eqx.field(static=True)
    mean: tuple[float, ...] = eqx.field(static=True)
    std: tuple[float, ...] = eqx.field(static=True)
    """Network units are (value in 0..255 - mean) / std, per channel."""
    graphdef: nnx.GraphDef = eqx.field(static=True)
    state: nnx.State
    """The weights: a traced argument, so another set of weights is no new trace."""
    checksum: UInt8[Array | np.ndarray, " 32"]
    """SHA-256 over the weights; a saved detector refuses a backbone with another."""

    def __call__(self, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "_h_k _w_k _c_k"], ...]:
        """Feature maps of the tapped layers; ``h`` and ``w`` multiples of :attr:`stride`, ``image`` in network units."""
        maps = nnx.merge(self.graphdef, self.state)(image)
        return tuple(maps[layer] for layer in self.layers)

    def logits(self, image: Float[Array, "h w 3"]) -> Float[Array, " 1000"]:
        """ImageNet class scores of an image in network units."""
        return nnx.merge(self.graphdef, self.state).logits(image)

    def normalise(self, unit: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
        """RGB in 0..1 to network units."""
        return (unit * 255 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def denormalise(self, image: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
        """Network units to RGB in 0..1."""
        return (image * np.array(self.std, np.float32) + np.array(self.mean, np.float32)) / 255

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per position, per tapped layer."""
        return tuple(NETWORKS[self.name].strides[layer] for layer in self.layers)

    @property
    def stride(self) -> int:
        """The coarsest stride tapped: image sides and window corners are multiples of it."""
        return max(self.strides)


def load_backbone(name: str, *, layers: tuple[str, ...] | None = None, weights: str | Path | None = None) -> Backbone:
    """A network with its ImageNet weights.

    Args:
        name: one of :data:`NETWORKS`.
        layers: the layers to tap, shallow to deep; default :data:`DEFAULT_LAYERS`.
        weights: a converted ``.safetensors`` file or an original weight file; default the one installed for ``name``.

    Raises:
        CheckpointError: unknown name or layer, or the weights are missing, damaged or not this network's.
    """
    if name not in NETWORKS:
        raise CheckpointError(f"unknown backbone '{name}'; known: {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    layers = tuple(layers or DEFAULT_LAYERS[name])
    if unknown := [layer for layer in layers if layer not in network.strides]:
        raise CheckpointError(f"{name} has no layer '{unknown[0]}'; it has {', '.join(network.strides)}")
    tensors = checkpoints.load(name, network.convert, weights)
    graphdef, shapes = nnx.split(nnx.eval_shape(network))
    entry = checkpoints.manifest()[name]
    return Backbone(
        name=name,
        layers=layers,
        mean=tuple(entry["preprocessing"]["mean"]),
        std=tuple(entry["preprocessing"]["std"]),
        graphdef=graphdef,
        state=_fill(name, shapes, tensors),
        checksum=np.frombuffer(bytes.fromhex(checkpoints.content_checksum(tensors)), np.uint8),
    )


def _fill(name: str, shapes: nnx.State, tensors: dict[str, np.ndarray]) -> nnx.State:
    """The network's state with each variable taken from ``tensors``, every name and shape accounted for."""
    left, filled = dict(tensors), []
    for path, variable in nnx.to_flat_state(shapes):
        key = ".".join(map(str, path))
        if key not in left:
            raise CheckpointError(f"weights for {name}: tensor '{key}' is missing")
        value = left.pop(key)
        if value.shape != variable.shape or value.dtype != np.float32:
            raise CheckpointError(
                f"weights for {name}: tensor '{key}' is {value.dtype}{list(value.shape)}, "
                f"expected float32{list(variable.shape)}"
            )
        filled.append((path, variable.replace(jnp.asarray(value))))
    if left:
        raise CheckpointError(f"weights for {name}: unexpected tensor '{next(iter(left))}'")
    return nnx.from_flat_state(filled)
