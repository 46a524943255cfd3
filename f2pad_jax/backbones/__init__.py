"""Feature extractors in Flax NNX with converted ImageNet weights."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped, UInt8

from f2pad_jax import checkpoints
from f2pad_jax.backbones import efficientnet, mae, resnet, vit
from f2pad_jax.backbones.conversion import convert, deepest
from f2pad_jax.backbones.layers import Conv
from f2pad_jax.backbones.network import Network
from f2pad_jax.errors import CheckpointError, DepthError

BACKBONES: dict[str, Network] = {**resnet.NETWORKS, **efficientnet.NETWORKS, **vit.NETWORKS}
NETWORKS: dict[str, Network] = {**BACKBONES, **mae.NETWORKS}


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
    """SHA-256 over the weights the tapped layers need; a saved detector refuses a backbone with another."""

    def __call__(self, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "_h_k _w_k _c_k"], ...]:
        """Maps of the tapped layers; ``h`` and ``w`` multiples of :attr:`stride`, ``image`` in network units.

        The map of ``logits`` is (1, 1, 1000), the ImageNet class scores.
        """
        if image.shape[0] % self.stride or image.shape[1] % self.stride:
            raise ValueError(f"{self.name} takes sides that are multiples of {self.stride}, not {image.shape[:2]}")
        maps = nnx.merge(self.graphdef, self.state)(image)
        return tuple(maps[layer] for layer in self.layers)

    def normalise(self, image: Shaped[Array | np.ndarray, "*b 3"]) -> Float[Array, "*b 3"]:
        """RGB as uint8, or as floats in 0..1, to network units."""
        values = jnp.asarray(image, jnp.float32) if image.dtype == np.uint8 else jnp.asarray(image) * 255
        return (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def denormalise(self, image: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
        """Network units to RGB in 0..1."""
        return (image * np.array(self.std, np.float32) + np.array(self.mean, np.float32)) / 255

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per position, per tapped layer."""
        return tuple(NETWORKS[self.name].strides[layer] for layer in self.layers)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels per tapped layer."""
        image = jax.ShapeDtypeStruct((self.stride, self.stride, 3), jnp.float32)
        return tuple(m.shape[-1] for m in jax.eval_shape(type(self).__call__, self, image))

    @property
    def local(self) -> bool:
        """Whether a window of an image has the image's features, but for those near the window's border."""
        return NETWORKS[self.name].local and "logits" not in self.layers

    @property
    def stride(self) -> int:
        """The coarsest stride tapped: image sides and window corners are multiples of it."""
        return max(self.strides)


def load_backbone(name: str, *, layers: tuple[str, ...] | None = None, weights: str | Path | None = None) -> Backbone:
    """A network with its ImageNet weights, built as deep as its deepest tapped layer.

    Args:
        name: one of :data:`BACKBONES`, such as ``resnet18``, ``wide-resnet50-2``, ``efficientnet-b6``, ``vit-tiny``; timm's
            spelling (``wide_resnet50_2``, ``tf_efficientnet_b6``) is understood.
        layers: the layers to tap; default: three of the network's. ``logits`` are the class scores.
        weights: a weight file (``.safetensors``, ``.pth`` or ``.bin``; original or converted); default: the one installed.

    Raises:
        CheckpointError: unknown name or layer, or the weights are missing, damaged or not this network's.
        DepthError: the weights end before a layer.
    """
    name, network = canonical_name(name), find_network(name)
    layers = tuple(layers or network.default_layers)
    if unknown := [layer for layer in layers if layer not in network.strides]:
        raise CheckpointError(f"{name} has no layer '{unknown[0]}'; it has {', '.join(network.strides)}")
    mean, std = checkpoints.preprocessing(name)
    graphdef, state, tensors = _load(name, max(layers, key=list(network.strides).index), weights)
    checksum = np.frombuffer(bytes.fromhex(checkpoints.content_checksum(tensors)), np.uint8)
    return Backbone(name, layers, mean, std, graphdef, state, checksum)


def find_network(name: str) -> Network:
    """What the registry knows of a backbone.

    Raises:
        CheckpointError: there is none of that name.
    """
    if canonical_name(name) not in BACKBONES:
        raise CheckpointError(f"unknown backbone '{canonical_name(name)}'; known: {', '.join(BACKBONES)}")
    return BACKBONES[canonical_name(name)]


def load_autoencoder(name: str, *, weights: str | Path | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    """A masked autoencoder's graph and weights; :class:`f2pad_jax.inpaint.MAE` is made of them.

    Raises:
        CheckpointError: unknown name, or the weights are missing, damaged, not this network's or without the decoder.
    """
    name = canonical_name(name)
    if name not in mae.NETWORKS:
        raise CheckpointError(f"unknown masked autoencoder '{name}'; known: {', '.join(mae.NETWORKS)}")
    return _load(name, deepest(NETWORKS[name]), weights)[:2]


def canonical_name(name: str) -> str:
    """Our spelling of a network's name: hyphens, and without timm's ``tf_``."""
    return name.replace("_", "-").removeprefix("tf-")


def _load(name: str, through: str, weights: str | Path | None) -> tuple[nnx.GraphDef, nnx.State, dict[str, np.ndarray]]:
    """The network through a layer: its graph, its weights as this backend takes them, and as they are in the file."""
    network = NETWORKS[name]
    tensors = checkpoints.load(name, lambda tensors: convert(network, tensors), weights)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: network.build(through)))
    used, filled = {}, []
    for path, variable in nnx.to_flat_state(shapes):
        key = ".".join(map(str, path))
        if key not in tensors:
            path = weights or checkpoints.cached_file(name)
            raise DepthError(f"{path}: these weights of {name} end before layer '{through}' ('{key}' is missing)")
        used[key] = tensors[key]
        filled.append((path, variable.replace(jnp.asarray(tensors[key]))))
    module = nnx.merge(graphdef, nnx.from_flat_state(filled))
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, Conv):
            layer.prepare()
    return *nnx.split(module), used
