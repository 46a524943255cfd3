"""Resumable training of CFLOW-AD's flows."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from f2pad_jax._storage import content_checksum, read_safetensors, write_safetensors
from f2pad_jax.backbones.backbone import Backbone
from f2pad_jax.detectors._flow import Flow
from f2pad_jax.detectors.base import NormalImages, extract
from f2pad_jax.errors import CheckpointError

ADAM = optax.scale_by_adam()
"""Adam without its learning rate."""


class Training(NamedTuple):
    """State of a training run."""

    flows: list[Flow]
    """Flow of each layer."""
    states: list[optax.OptState]
    """State of Adam for each layer."""
    losses: Float[np.ndarray, "e k"]
    """Mean loss of each meta-epoch and layer."""


class Resume:
    """File from which a training run is resumed. A digest ties the file to the run's images, weights and options."""

    def __init__(self, path: str | Path, images: NormalImages, backbone: Backbone, recipe: tuple):
        digest = hashlib.sha256(repr((images.size, backbone.name, backbone.layers, recipe)).encode())
        digest.update(np.asarray(backbone.checksum).tobytes())
        for i in range(len(images)):
            digest.update(images.pixels(i).tobytes())
        self.path, self.run = Path(path), digest.hexdigest()

    def read(self, training: Training) -> tuple[int, Training]:
        """Returns the number of completed meta-epochs and the state after them; 0 and ``training`` if there is no file."""
        if not self.path.exists():
            self.write(0, training)  # an unwritable path fails before the training, not after it
            return 0, training
        tensors, metadata = read_safetensors(self.path)
        if metadata.get("run") != self.run:
            raise CheckpointError(
                f"{self.path}: holds the state of another training (other images, weights or options); "
                "give the earlier images, weights and options again, or delete the file to start afresh"
            )
        if metadata.get("sha256") != content_checksum(tensors, epochs=metadata.get("epochs", "")):
            raise CheckpointError(f"{self.path}: damaged; delete the file to start afresh")
        leaves = [jnp.asarray(tensors[str(i)]) for i in range(len(tensors))]
        restored: Training = jax.tree.unflatten(jax.tree.structure(training), leaves)
        return int(metadata["epochs"]), restored._replace(losses=np.array(restored.losses))

    def write(self, epochs: int, training: Training) -> None:
        """Writes the state after ``epochs`` meta-epochs."""
        tensors = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(training))}
        metadata = {"run": self.run, "epochs": str(epochs), "sha256": content_checksum(tensors, epochs=str(epochs))}
        try:
            write_safetensors(self.path, tensors, metadata)
        except OSError as error:
            message = f"{self.path}: the state of the training can't be written ({error.strerror}); give another path"
            raise CheckpointError(message) from None


@jax.jit
def train(
    flow: Flow,
    state: optax.OptState,
    features: Float[Array, "n C"],
    conditions: Float[Array, "p d_c"],
    order: Int[Array, "s b"],
    learning_rates: Float[Array, " s"],
) -> tuple[Flow, optax.OptState, Float[Array, ""]]:
    """Takes Adam steps over batches of feature vectors.

    Args:
        flow: flow that is trained.
        state: state of Adam.
        features: feature vectors of all images, image by image, position by position.
        conditions: position encoding of each position of an image.
        order: indices into ``features``, one row per step.
        learning_rates: learning rate of each step.

    Returns:
        The flow and the state of Adam after the steps, and the mean loss.
    """

    def loss(flow: Flow, indices: Int[Array, " b"]) -> Float[Array, ""]:
        log_p = flow.log_likelihood(features[indices], flow.biases(conditions[indices % len(conditions)]))
        return jnp.mean(jax.nn.softplus(-log_p))

    def step(carry, inputs):
        flow, state = carry
        indices, rate = inputs
        value, gradient = jax.value_and_grad(loss)(flow, indices)
        updates, state = ADAM.update(gradient, state)
        return (jax.tree.map(lambda p, u: p - rate * u, flow, updates), state), value

    (flow, state), losses = jax.lax.scan(step, (flow, state), (order, learning_rates))
    return flow, state, jnp.mean(losses)


def batches(rng: np.random.Generator, count: int, batch_size: int) -> Int[np.ndarray, "s b"]:
    """Returns indices in random order, one row per batch; an incomplete last batch is left out."""
    batch_size = min(batch_size, count)
    steps = count // batch_size
    return rng.permutation(count)[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def rate_factors(epochs: Float[np.ndarray, " s"], total: int) -> Float[np.ndarray, " s"]:
    """Returns factors on the learning rate: two meta-epochs of linear warm-up, then one cosine value per meta-epoch."""

    def cosine(epoch):
        return 1e-3 + (1 - 1e-3) * (1 + np.cos(np.pi * epoch / total)) / 2

    warmup = min(2, total)
    ramp = 0.1 + (cosine(warmup) - 0.1) * epochs / warmup
    return np.where(epochs < warmup, ramp, cosine(np.floor(epochs))).astype(np.float32)


@jax.jit
def rotated_features(
    backbone: Backbone, image: Float[Array, "h w 3"], degrees: Float[Array | np.floating, ""]
) -> tuple[Float[Array, "_h_k _w_k _c_k"], ...]:
    """Returns the backbone's feature maps of a rotated image."""
    return extract(backbone, rotated(image, degrees))


def rotated(image: Float[Array, "h w 3"], degrees: Float[Array | np.floating, ""]) -> Float[Array, "h w 3"]:
    """Returns an image rotated about its centre, bilinearly; pixels from outside repeat the border."""
    h, w = image.shape[:2]
    radians = jnp.deg2rad(degrees)
    y, x = jnp.mgrid[:h, :w]
    y, x = y - (h - 1) / 2, x - (w - 1) / 2
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    coordinates = [cos * y - sin * x + (h - 1) / 2, sin * y + cos * x + (w - 1) / 2]
    channels = [jax.scipy.ndimage.map_coordinates(image[..., c], coordinates, order=1, mode="nearest") for c in range(3)]
    return jnp.stack(channels, axis=-1)
