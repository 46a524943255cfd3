"""CFLOW-AD (Gudovskiy et al., WACV 2022): a conditional normalizing flow over every layer's features, Eq. (6)."""

import hashlib
import math
from pathlib import Path
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy.stats import special_ortho_group

from f2pad_jax.backbones import Backbone
from f2pad_jax.backbones.network import Network
from f2pad_jax.checkpoints import content_checksum, read_safetensors, write_safetensors
from f2pad_jax.detectors.base import ORIGIN, AbstractDetector, Calibration, NormalImages, extract
from f2pad_jax.errors import CheckpointError, OptionError
from f2pad_jax.progress import Progress, silent

CONDITION = 128
"""Channels of the position encoding."""
CLAMP = 1.9
"""Largest logarithm of a coupling's scale."""
ADAM = optax.scale_by_adam()
FEW_SHOT = 16
"""Up to so many images, the deepest default layer is left out (paper, Section IV-B2)."""


class Coupling(eqx.Module):
    """Affine coupling: half the channels scale and shift the other half; then a global affine map; then a rotation.

    As FrEIA's ``AllInOneBlock``. Weights are stored input first.
    """

    weight1: Float[Array, "d 2*d"]
    """d = C - C//2 + :data:`CONDITION`."""
    bias1: Float[Array, " 2*d"]
    weight2: Float[Array, "2*d e"]
    """e = 2·(C//2): a scale and a shift for each channel of the second half."""
    bias2: Float[Array, " e"]
    global_scale: Float[Array, " C"]
    """Before its softplus."""
    global_offset: Float[Array, " C"]
    rotation: Float[Array, "C C"]
    """Fixed, drawn from SO(C); not trained."""

    def bias(self, condition: Float[Array, "*n d_c"]) -> Float[Array, "*n units"]:
        """Of the hidden units, given the condition."""
        return condition @ self.weight1[-condition.shape[-1] :] + self.bias1

    def __call__(
        self, features: Float[Array, "n C"], bias: Float[Array, "n units"]
    ) -> tuple[Float[Array, "n C"], Float[Array, " n"]]:
        """The transformed features and the logarithm of the Jacobian's determinant."""
        half = self.weight2.shape[1] // 2
        first, second = features[:, :-half], features[:, -half:]
        hidden = jax.nn.relu(first @ self.weight1[: first.shape[1]] + bias)
        coefficients = 0.1 * (hidden @ self.weight2 + self.bias2)
        log_scale = CLAMP * jnp.tanh(coefficients[:, :half])
        second = second * jnp.exp(log_scale) + coefficients[:, half:]
        scale = 0.2 * jax.nn.softplus(0.5 * self.global_scale)
        out = (jnp.concatenate([first, second], axis=1) * scale + self.global_offset) @ jax.lax.stop_gradient(
            self.rotation
        ).T
        return out, jnp.sum(log_scale, axis=1) + jnp.sum(jnp.log(scale))

    @staticmethod
    def initial(rng: np.random.Generator, channels: int) -> "Coupling":
        """PyTorch's default for linear layers, U(±1/√fan_in); global scale 1, offset 0; a random rotation."""
        half = channels // 2
        d = channels - half + CONDITION

        def uniform(fan_in: int, *shape: int) -> Array:
            return jnp.asarray(rng.uniform(-1, 1, shape) / np.sqrt(fan_in), jnp.float32)

        rotation = special_ortho_group.rvs(channels, random_state=rng)
        return Coupling(
            uniform(d, d, 2 * d),
            uniform(d, 2 * d),
            uniform(2 * d, 2 * d, 2 * half),
            uniform(2 * d, 2 * half),
            jnp.full(channels, 2 * np.log(np.exp(5.0) - 1), jnp.float32),
            jnp.zeros(channels),
            jnp.asarray(rotation, jnp.float32),
        )


class Flow(eqx.Module):
    """Coupling blocks in a row: features of one layer to a standard normal."""

    blocks: tuple[Coupling, ...]

    def biases(self, condition: Float[Array, "*n d_c"]) -> tuple[Float[Array, "*n units"], ...]:
        """Of each block's hidden units: all that the condition has a part in, and so the same whatever the features."""
        return tuple(block.bias(condition) for block in self.blocks)

    def __call__(
        self, features: Float[Array, "n C"], biases: tuple[Float[Array, "n units"], ...]
    ) -> tuple[Float[Array, "n C"], Float[Array, " n"]]:
        """The latent z, and log |det dz/df|."""
        log_determinant = jnp.zeros(len(features), features.dtype)
        for block, bias in zip(self.blocks, biases, strict=True):
            features, more = block(features, bias)
            log_determinant += more
        return features, log_determinant

    @property
    def condition(self) -> int:
        """Channels of the position encoding."""
        first = self.blocks[0]
        return first.weight1.shape[0] - (len(first.global_scale) - len(first.global_scale) // 2)

    def log_likelihood(
        self, features: Float[Array, "n C"], biases: tuple[Float[Array, "n units"], ...]
    ) -> Float[Array, " n"]:
        """Logarithm of the density, per channel: (log N(z; 0, 1) + log |det|) / C."""
        z, log_determinant = self(features, biases)
        c = features.shape[1]
        return (-0.5 * jnp.sum(z**2, axis=1) + log_determinant) / c - 0.5 * math.log(2 * math.pi)


class CFlow(AbstractDetector):
    """Score s = -log σ(log p), Eq. (6), of each layer's features given their position.

    Departures: the sign of Eq. (6), which as printed grows as features become normal; and the maps' maximum is that of the
    normal images, kept at fit time (the authors take that of the test set), so no result depends on its neighbours.
    """

    backbone: Backbone
    size: tuple[int, int] = eqx.field(static=True)
    flows: tuple[Flow, ...]
    peaks: Float[Array, " k"]
    """Largest log p per channel of the normal images, per layer."""
    losses: Float[Array, "e k"]
    """Mean training loss, per meta-epoch and layer."""
    calibration: Calibration | None = None

    refits: ClassVar[bool] = False
    emphasis: ClassVar[float] = 32.0
    """Eq. (6) saturates: the most anomalous position scores little more than an ordinary one."""

    @classmethod
    def default_layers(cls, network: Network, num_images: int) -> tuple[str, ...]:
        """The layers of the authors' code; without the deepest for 16 images or fewer."""
        return network.deep_layers[:-1] if num_images <= FEW_SHOT else network.deep_layers

    @classmethod
    def fit(
        cls,
        images: NormalImages,
        backbone: Backbone,
        *,
        seed: int = 0,
        progress: Progress = silent,
        num_blocks: int = 8,
        meta_epochs: int = 25,
        sub_epochs: int = 8,
        batch_size: int = 256,
        learning_rate: float = 2e-4,
        rotation: float = 5.0,
        resume: str | Path | None = None,
    ) -> "CFlow":
        """Train a flow per layer to the published recipe.

        Adam, cosine decay from ``learning_rate`` to a thousandth of it over the meta-epochs, linear warm-up from a tenth
        during the first two; feature vectors in random order, ``batch_size`` at a step.

        Departures: images are turned at random once a meta-epoch instead of at every sub-epoch, so that features are
        computed once for all of its sub-epochs; what turns in from outside repeats the border instead of being black; each
        layer's flow has an Adam of its own; vectors are drawn from all images at once, not from 32 at a time.

        Args:
            num_blocks: coupling blocks of each flow.
            meta_epochs: times the learning rate changes.
            sub_epochs: passes over all features in each of them.
            batch_size: feature vectors at a step.
            learning_rate: of Adam, at its highest.
            rotation: most degrees an image is turned.
            resume: file to keep the state in after every meta-epoch, and to go on from where it is there and of the same
                run. :func:`f2pad_jax.fit` removes it once it has calibrated, and tuned, what was trained.

        Raises:
            CheckpointError: ``resume`` is damaged, or of a run with other images, weights or options.
            OptionError: a count or the learning rate is not positive.
        """
        if min(num_blocks, meta_epochs, sub_epochs, batch_size) < 1 or learning_rate <= 0:
            raise OptionError(
                f"num_blocks {num_blocks}, meta_epochs {meta_epochs}, sub_epochs {sub_epochs}, batch_size {batch_size} and "
                f"learning_rate {learning_rate} must be positive"
            )
        rng = np.random.default_rng(seed)
        shapes = [m.shape for m in jax.eval_shape(extract, backbone, images[0])]
        conditions = [jnp.asarray(position_encoding(h, w).reshape(h * w, -1)) for h, w, _ in shapes]
        flows = [Flow(tuple(Coupling.initial(rng, c) for _ in range(num_blocks))) for *_, c in shapes]
        training = Training(
            flows,
            [ADAM.init(flow) for flow in flows],  # pyright: ignore[reportArgumentType]
            np.zeros((meta_epochs, len(flows)), np.float32),
        )
        recipe = (seed, num_blocks, meta_epochs, sub_epochs, batch_size, learning_rate, rotation)
        saved = Resume(resume, images, backbone, recipe) if resume else None
        first, training = saved.read(training) if saved else (0, training)

        for epoch in range(first, meta_epochs):
            progress("training", epoch * sub_epochs, meta_epochs * sub_epochs)
            rng = np.random.default_rng([seed, epoch])  # so that a resumed run draws what an uninterrupted one does
            angles = rng.uniform(-rotation, rotation, len(images)).astype(np.float32)
            maps = [turned(backbone, images[i], angle) for i, angle in enumerate(angles)]
            features = [jnp.concatenate([m[k].reshape(-1, m[k].shape[-1]) for m in maps]) for k in range(len(flows))]
            for sub in range(sub_epochs):
                for k, vectors in enumerate(features):
                    order = batches(rng, len(vectors), batch_size)
                    rates = learning_rates(epoch + (sub + np.arange(len(order)) / len(order)) / sub_epochs, meta_epochs)
                    flow, state, loss = train(
                        training.flows[k],
                        training.states[k],
                        vectors,
                        conditions[k],
                        jnp.asarray(order),
                        learning_rate * jnp.asarray(rates),
                    )
                    training.flows[k], training.states[k] = flow, state
                    training.losses[epoch, k] += float(loss) / sub_epochs
                done = epoch * sub_epochs + sub + 1
                loss = training.losses[epoch].sum() * sub_epochs / (sub + 1)
                progress(f"training, loss {loss:.4f}", done, meta_epochs * sub_epochs)
            if saved:
                saved.write(epoch + 1, training)

        return cls(
            backbone=backbone,
            size=images.size,
            flows=tuple(training.flows),
            peaks=jnp.zeros(len(flows)),
            losses=jnp.asarray(training.losses),
        ).with_peaks(images)

    def with_peaks(self, images: NormalImages) -> "CFlow":
        """The same with the peaks of these images."""
        found = jnp.asarray([highest(self, images[i]) for i in range(len(images))])
        return eqx.tree_at(lambda detector: detector.peaks, self, jnp.max(found, axis=0))

    def locate(
        self, image: Float[Array, "h w 3"], corner: Int[Array | np.ndarray, " 2"]
    ) -> tuple[tuple[Float[Array, "_h_k _w_k _units"], ...], ...]:
        """What the flows make of the position encodings of the window."""
        windows = []
        for stride, flow in zip(self.backbone.strides, self.flows, strict=True):
            encoding = jnp.asarray(position_encoding(self.size[0] // stride, self.size[1] // stride, flow.condition))
            shape = (image.shape[0] // stride, image.shape[1] // stride, flow.condition)
            first = jnp.append(jnp.asarray(corner) // stride, 0)
            windows.append(flow.biases(jax.lax.dynamic_slice(encoding, first, shape)))
        return tuple(windows)

    def log_likelihoods(
        self, image: Float[Array, "h w 3"], where: tuple[tuple[Float[Array, "_h_k _w_k _units"], ...], ...]
    ) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """Log-density per channel at every position of every layer."""
        out = []
        for flow, features, biases in zip(self.flows, self.features(image), where, strict=True):
            flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), (features, biases))
            out.append(flow.log_likelihood(*flat).reshape(features.shape[:2]))
        return tuple(out)

    def raw_scores(
        self, image: Float[Array, "h w 3"], where: tuple[tuple[Float[Array, "_h_k _w_k _units"], ...], ...]
    ) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """-log σ(log p), Eq. (6) with its sign turned."""
        return tuple(jax.nn.softplus(-log_p) for log_p in self.log_likelihoods(image, where))

    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """The coarse map as published: exp(log p - peak) per layer, enlarged, summed, and taken from the number of layers.

        Not smoothed; between 0 and the number of layers where nothing is likelier than the likeliest of the normal images.
        """
        log_ps = self.log_likelihoods(image, self.locate(image, ORIGIN))
        normality = [
            enlarged_aligned(jnp.exp(log_p - peak), (image.shape[0], image.shape[1]))
            for log_p, peak in zip(log_ps, self.peaks, strict=True)
        ]
        return len(normality) - jnp.sum(jnp.stack(normality), axis=0)


@jax.jit
def highest(detector: CFlow, image: Float[Array, "h w 3"]) -> list[Float[Array, ""]]:
    """Largest log-density of each layer of an image."""
    return [jnp.max(log_p) for log_p in detector.log_likelihoods(image, detector.locate(image, ORIGIN))]


class Training(NamedTuple):
    """What training alters, per layer."""

    flows: list[Flow]
    states: list[optax.OptState]
    losses: Float[np.ndarray, "e k"]


class Resume:
    """The file a training can be taken up from."""

    def __init__(self, path: str | Path, images: NormalImages, backbone: Backbone, recipe: tuple):
        digest = hashlib.sha256(repr((images.size, backbone.name, backbone.layers, recipe)).encode())
        digest.update(np.asarray(backbone.checksum).tobytes())
        for i in range(len(images)):
            digest.update(images.pixels(i).tobytes())
        self.path, self.run = Path(path), digest.hexdigest()

    def read(self, training: Training) -> tuple[int, Training]:
        """Meta-epochs done and the state after them; (0, ``training``) where there is no file."""
        if not self.path.exists():
            self.write(0, training)  # what can't be written is told before the work, not after
            return 0, training
        tensors, metadata = read_safetensors(self.path)
        if metadata.get("run") != self.run:
            raise CheckpointError(
                f"{self.path}: the state of another training (other images, weights or options); "
                "repeat those, or delete the file to start afresh"
            )
        if metadata.get("sha256") != content_checksum(tensors, epochs=metadata.get("epochs", "")):
            raise CheckpointError(f"{self.path}: damaged; delete the file to start afresh")
        leaves = [jnp.asarray(tensors[str(i)]) for i in range(len(tensors))]
        restored: Training = jax.tree.unflatten(jax.tree.structure(training), leaves)
        return int(metadata["epochs"]), restored._replace(losses=np.array(restored.losses))

    def write(self, epochs: int, training: Training) -> None:
        """Keep the state after so many meta-epochs."""
        tensors = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(training))}
        metadata = {"run": self.run, "epochs": str(epochs), "sha256": content_checksum(tensors, epochs=str(epochs))}
        try:
            write_safetensors(self.path, tensors, metadata)
        except OSError as error:
            raise CheckpointError(f"{self.path}: the training's state can't be written ({error.strerror})") from None


@jax.jit
def train(
    flow: Flow,
    state: optax.OptState,
    features: Float[Array, "n C"],
    conditions: Float[Array, "p d_c"],
    order: Int[Array, "s b"],
    learning_rates: Float[Array, " s"],
) -> tuple[Flow, optax.OptState, Float[Array, ""]]:
    """Adam steps over batches of feature vectors; returns the mean loss too.

    Args:
        flow: what to train.
        state: Adam's.
        features: of all images, image by image, position by position.
        conditions: position encoding of each of an image's positions.
        order: indices into ``features``, a row to a step.
        learning_rates: of each step.
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
    """All indices in random order, as many at a time; the rest that fills no batch is left for another epoch."""
    batch_size = min(batch_size, count)
    steps = count // batch_size
    return rng.permutation(count)[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def learning_rates(epochs: Float[np.ndarray, " s"], total: int) -> Float[np.ndarray, " s"]:
    """Factor of the learning rate at a moment counted in meta-epochs: cosine by whole ones, linear during the first two."""

    def cosine(epoch):
        return 1e-3 + (1 - 1e-3) * (1 + np.cos(np.pi * epoch / total)) / 2

    warm = min(2, total)
    warming = 0.1 + (cosine(warm) - 0.1) * epochs / warm
    return np.where(epochs < warm, warming, cosine(np.floor(epochs))).astype(np.float32)


def position_encoding(height: int, width: int, channels: int = CONDITION) -> Float[np.ndarray, "h w d_c"]:
    """Sines and cosines of the column in the first half of the channels, of the row in the second; base 10⁴."""
    half = channels // 2
    frequency = np.exp(np.arange(0, half, 2) * -(np.log(1e4) / half))
    out = np.zeros((height, width, channels), np.float32)
    for start, positions in ((0, np.arange(width)[None, :, None]), (half, np.arange(height)[:, None, None])):
        out[..., start : start + half : 2] = np.sin(positions * frequency)
        out[..., start + 1 : start + half : 2] = np.cos(positions * frequency)
    return out


def enlarged_aligned(scores: Float[Array, "h_k w_k"], size: tuple[int, int]) -> Float[Array, "h w"]:
    """Bilinear, the corner values at the corner pixels (PyTorch's ``align_corners=True``)."""

    def weights(n: int, m: int) -> Float[Array, "m n"]:
        at = np.arange(m) * ((n - 1) / max(m - 1, 1))
        return jnp.asarray(np.maximum(1 - np.abs(at[:, None] - np.arange(n)), 0), scores.dtype)

    rows, columns = (weights(n, m) for n, m in zip(scores.shape, size, strict=True))
    return rows @ scores @ columns.T


@jax.jit
def turned(
    backbone: Backbone, image: Float[Array, "h w 3"], degrees: Float[Array | np.floating, ""]
) -> tuple[Float[Array, "_h_k _w_k _c_k"], ...]:
    """The backbone's maps of an image that has been turned."""
    return extract(backbone, rotated(image, degrees))


def rotated(image: Float[Array, "h w 3"], degrees: Float[Array | np.floating, ""]) -> Float[Array, "h w 3"]:
    """Turned about its centre, bilinear; what comes in from outside repeats the border."""
    h, w = image.shape[:2]
    radians = jnp.deg2rad(degrees)
    y, x = jnp.mgrid[:h, :w]
    y, x = y - (h - 1) / 2, x - (w - 1) / 2
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    at = [cos * y - sin * x + (h - 1) / 2, sin * y + cos * x + (w - 1) / 2]
    channels = [jax.scipy.ndimage.map_coordinates(image[..., c], at, order=1, mode="nearest") for c in range(3)]
    return jnp.stack(channels, axis=-1)
