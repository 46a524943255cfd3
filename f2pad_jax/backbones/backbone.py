"""A frozen feature extractor and its weights."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped, UInt8

from f2pad_jax import _storage as storage
from f2pad_jax._cache import keep_programs
from f2pad_jax.backbones import _dino as dino
from f2pad_jax.backbones import _efficientnet as efficientnet
from f2pad_jax.backbones import _mae as mae
from f2pad_jax.backbones import _resnet as resnet
from f2pad_jax.backbones import _vit as vit
from f2pad_jax.backbones import _weight_files as weight_files
from f2pad_jax.backbones._conversion import convert, deepest
from f2pad_jax.backbones._layers import Conv
from f2pad_jax.backbones.network import Network
from f2pad_jax.errors import CheckpointError, DepthError

BACKBONES: dict[str, Network] = {**resnet.NETWORKS, **efficientnet.NETWORKS, **vit.NETWORKS, **dino.NETWORKS}
"""Networks of detectors, by name."""
NETWORKS: dict[str, Network] = {**BACKBONES, **mae.NETWORKS}
"""All networks by name, masked autoencoders included."""


class Backbone(eqx.Module):
    """Frozen network from an image in network units to a tuple of feature maps."""

    name: str = eqx.field(static=True)
    """Name in :data:`BACKBONES`."""
    layers: tuple[str, ...] = eqx.field(static=True)
    """Names of the tapped layers."""
    mean: tuple[float, ...] = eqx.field(static=True)
    """Mean of each channel, 0..255."""
    std: tuple[float, ...] = eqx.field(static=True)
    """Standard deviation of each channel, 0..255; network units are (value in 0..255 - mean) / std."""
    graphdef: nnx.GraphDef = eqx.field(static=True)
    """Structure of the network."""
    state: nnx.State
    """Weights of the network, traced: other weights need no new compilation."""
    checksum: UInt8[Array | np.ndarray, " 32"]
    """SHA-256 of the weights up to the deepest tapped layer; a saved detector refuses a backbone with other weights."""

    def __call__(self, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "_h_k _w_k _c_k"], ...]:
        """Returns the maps of the tapped layers, for an image in network units.

        Height and width are multiples of :attr:`stride`. The map of ``logits`` is (1, 1, 1000), the ImageNet class scores.
        """
        if image.shape[0] % self.stride or image.shape[1] % self.stride:
            raise ValueError(f"{self.name} takes sides that are multiples of {self.stride}, not {image.shape[:2]}")
        maps = nnx.merge(self.graphdef, self.state)(image)
        return tuple(maps[layer] for layer in self.layers)

    def normalise(self, image: Shaped[Array | np.ndarray, "*b 3"]) -> Float[Array, "*b 3"]:
        """Converts RGB (uint8, or float in 0..1) to network units."""
        values = jnp.asarray(image, jnp.float32) if image.dtype == np.uint8 else jnp.asarray(image) * 255
        return (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def denormalise(self, image: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
        """Converts network units to RGB in 0..1."""
        return (image * np.array(self.std, np.float32) + np.array(self.mean, np.float32)) / 255

    @property
    def key(self) -> tuple[str, tuple[str, ...], bytes]:
        """Name of network, tapped layers and weights, to keep features under."""
        return self.name, self.layers, np.asarray(self.checksum).tobytes()

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each tapped layer, pixels."""
        return tuple(NETWORKS[self.name].strides[layer] for layer in self.layers)

    @property
    def channels(self) -> tuple[int, ...]:
        """Number of channels of each tapped layer."""
        image = jax.ShapeDtypeStruct((self.stride, self.stride, 3), jnp.float32)
        return tuple(m.shape[-1] for m in jax.eval_shape(type(self).__call__, self, image))

    @property
    def local(self) -> bool:
        """Whether a window of an image has the image's features, except near the window's border."""
        return NETWORKS[self.name].local and "logits" not in self.layers

    @property
    def stride(self) -> int:
        """Coarsest stride of the tapped layers, pixels; image sides and window corners are multiples of it."""
        return max(self.strides)


def in_tiles(
    backbone: Backbone, image: Float[Array, "h w 3"], *, tile: int = 768, margin: int = 288
) -> tuple[Float[Array, "_h_k _w_k _c_k"], ...]:
    """Returns the feature maps of a large image, computed tile by tile in the memory of one tile.

    Each tile is seen with a margin of the image around it. The default margin covers half the receptive field of the
    default layers of ResNets and EfficientNet-Lite0, and no seam remains. In deeper networks, the rim of the receptive
    field has hardly any weight. Sides are multiples of the stride.

    Args:
        backbone: network whose receptive fields are bounded (:attr:`Backbone.local`).
        image: image in network units.
        tile: side of a tile, pixels.
        margin: width of the margin, pixels.
    """
    sides = image.shape[:2]
    core = [min(tile, side) for side in sides]
    window = [min(tile + 2 * margin, side) for side in sides]
    starts = [[min(start, side - size) for start in range(0, side, size)] for side, size in zip(sides, core, strict=True)]
    corners = jnp.asarray([(y, x) for y in starts[0] for x in starts[1]])
    shapes = jax.eval_shape(backbone, image)

    def add(maps: tuple[Array, ...], corner: Array) -> tuple[tuple[Array, ...], None]:
        first = jnp.clip(corner - margin, 0, jnp.asarray(sides) - jnp.asarray(window))
        seen = backbone(jax.lax.dynamic_slice(image, (*first, 0), (*window, 3)))
        done = []
        for stride, values, whole in zip(backbone.strides, seen, maps, strict=True):
            size = (core[0] // stride, core[1] // stride, values.shape[2])
            part = jax.lax.dynamic_slice(values, (*((corner - first) // stride), 0), size)
            done.append(jax.lax.dynamic_update_slice(whole, part, (*(corner // stride), 0)))
        return tuple(done), None

    # without the checkpoint, a gradient would keep the activations of all tiles
    return jax.lax.scan(jax.checkpoint(add), tuple(jnp.zeros(s.shape, s.dtype) for s in shapes), corners)[0]


def load_backbone(name: str, *, layers: tuple[str, ...] | None = None, weights: str | Path | None = None) -> Backbone:
    """Loads a network with its pretrained weights, built up to its deepest tapped layer.

    Args:
        name: one of :data:`BACKBONES`, such as ``resnet18``, ``wide-resnet50-2``, ``efficientnet-b6``, ``dinov2-small``;
            or timm's spelling (``wide_resnet50_2``, ``tf_efficientnet_b6``).
        layers: names of the layers to tap (default: three layers of the network); ``logits`` are the class scores.
        weights: weight file (``.safetensors``, ``.pth`` or ``.bin``), original or converted (default: installed weights).

    Raises:
        CheckpointError: the name or a layer is unknown, or the weights are missing, damaged or another network's.
        DepthError: the weights end before a tapped layer.
    """
    name, network = canonical_name(name), find_network(name)
    layers = tuple(layers or network.default_layers)
    if unknown := [layer for layer in layers if layer not in network.strides]:
        raise CheckpointError(f"{name} has no layer '{unknown[0]}'; it has {', '.join(network.strides)}")
    mean, std = weight_files.preprocessing(name)
    graphdef, state, tensors = _load(name, max(layers, key=list(network.strides).index), weights)
    checksum = np.frombuffer(bytes.fromhex(storage.content_checksum(tensors)), np.uint8)
    return Backbone(name, layers, mean, std, graphdef, state, checksum)


def find_network(name: str) -> Network:
    """Returns the entry of a backbone in :data:`BACKBONES`.

    Raises:
        CheckpointError: the name is unknown.
    """
    if canonical_name(name) not in BACKBONES:
        raise CheckpointError(f"unknown backbone '{canonical_name(name)}'; known: {', '.join(BACKBONES)}")
    return BACKBONES[canonical_name(name)]


def load_autoencoder(name: str, *, weights: str | Path | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    """Loads the graph and the weights of a masked autoencoder, for :class:`f2pad_jax.inpainting.MAE`.

    Raises:
        CheckpointError: the name is unknown, or the weights are missing, damaged, another network's or without decoder.
    """
    name = canonical_name(name)
    if name not in mae.NETWORKS:
        raise CheckpointError(f"unknown masked autoencoder '{name}'; known: {', '.join(mae.NETWORKS)}")
    return _load(name, deepest(NETWORKS[name]), weights)[:2]


def canonical_name(name: str) -> str:
    """Returns our spelling of a network's name: hyphens, without timm's ``tf_``."""
    return name.replace("_", "-").removeprefix("tf-")


def _load(name: str, through: str, weights: str | Path | None) -> tuple[nnx.GraphDef, nnx.State, dict[str, np.ndarray]]:
    """Loads a network up to a layer: its graph, its weights in this backend's form, and its tensors as in the file."""
    keep_programs()  # every detector needs a network, and loads it before it compiles
    network = NETWORKS[name]
    tensors = weight_files.load(name, lambda tensors: convert(network, tensors), weights)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: network.build(through)))
    used, filled = {}, []
    for path, variable in nnx.to_flat_state(shapes):
        key = ".".join(map(str, path))
        if key not in tensors:
            path = weights or weight_files.cached_file(name)
            raise DepthError(f"{path}: these weights of {name} end before layer '{through}'; tap earlier layers")
        used[key] = tensors[key]
        filled.append((path, variable.replace(jax.device_put(tensors[key]))))  # asarray compiles for each shape
    module = nnx.merge(graphdef, nnx.from_flat_state(filled))
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, Conv):
            layer.prepare()
    return *nnx.split(module), used


def load_to_depth(name: str, layers: tuple[str, ...], weights) -> Backbone:
    """Loads a backbone without the tapped layers that lie beyond the end of the file ``weights``."""
    while True:
        try:
            return load_backbone(name, layers=layers, weights=weights)
        except DepthError:
            if weights is None or len(layers) == 1:
                raise
            layers = layers[:-1]
