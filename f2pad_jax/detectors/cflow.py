"""CFLOW-AD (Gudovskiy et al., WACV 2022): a conditional normalizing flow over every layer's features, Eq. (6)."""

from pathlib import Path
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from f2pad_jax.backbones.backbone import Backbone
from f2pad_jax.backbones.network import Network
from f2pad_jax.detectors._flow import CONDITION_SIZE, Coupling, Flow
from f2pad_jax.detectors._training import ADAM, Resume, Training, batches, rate_factors, rotated_features, train
from f2pad_jax.detectors.base import ORIGIN, AbstractDetector, Calibration, NormalImages, extract
from f2pad_jax.errors import OptionError
from f2pad_jax.progress import Progress, silent

FEW_SHOT = 16
"""Largest number of images for which the deepest default layer is left out (paper, Section IV-B2)."""


class CFlow(AbstractDetector):
    """Detector by the score s = -log σ(log p), Eq. (6), of each layer's features given their position.

    Departures: the sign of Eq. (6) is changed, since the printed score grows as features become normal. Maps are relative
    to the maximum likelihood of the normal images of the fit. The authors take the maximum over the test set: the
    result for an image then depends on the other images.
    """

    backbone: Backbone
    """Frozen feature extractor."""
    size: tuple[int, int] = eqx.field(static=True)
    """Height and width of the images of the fit, pixels, static."""
    flows: tuple[Flow, ...]
    """Flow of each layer."""
    peaks: Float[Array, " k"]
    """Largest log-likelihood of the normal images in each layer, divided by the number of channels."""
    losses: Float[Array, "e k"]
    """Mean training loss of each meta-epoch and layer."""
    calibration: Calibration | None = None
    """Calibration by :func:`f2pad_jax.fit`; None before the calibration."""

    refits: ClassVar[bool] = False
    """No second fit, since the training is long."""
    resumable: ClassVar[bool] = True
    """Resumable training."""
    sparsity_scale: ClassVar[float] = 32.0
    """Large factor, since Eq. (6) saturates: the most anomalous position scores little more than an ordinary one."""

    @classmethod
    def default_layers(cls, network: Network, num_images: int) -> tuple[str, ...]:
        """Returns the layers of the authors' code, without the deepest for 16 images or fewer."""
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
        """Trains a flow per layer by the published recipe.

        Adam takes batches of feature vectors in random order. Its learning rate warms up from a tenth during two
        meta-epochs, then decays along a cosine to a thousandth.

        Departures: images are rotated once per meta-epoch, not at every sub-epoch, and features are computed once for all
        its sub-epochs. Pixels from outside the image repeat the border; the authors' are black. The flow of each layer has
        its own Adam. Batches are drawn from all images at once, not from 32 at a time.

        Args:
            images: normal images at the detector's size.
            backbone: frozen feature extractor.
            seed: seed of the first weights, the rotations and the batches.
            progress: function that receives stage, number done and total.
            num_blocks: number of coupling blocks of each flow.
            meta_epochs: number of meta-epochs; each has its rotations and, after the warm-up, one learning rate.
            sub_epochs: number of passes over all features per meta-epoch.
            batch_size: number of feature vectors per batch.
            learning_rate: highest learning rate of Adam.
            rotation: largest rotation of an image, degrees.
            resume: file of the state after every meta-epoch. A training with equal images, weights and options goes on from
                it. :func:`f2pad_jax.fit` removes it at the end.

        Raises:
            CheckpointError: ``resume`` is damaged, can't be written or belongs to another training.
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
        states = [ADAM.init(flow) for flow in flows]  # pyright: ignore[reportArgumentType]
        training = Training(flows, states, np.zeros((meta_epochs, len(flows)), np.float32))
        recipe = (seed, num_blocks, meta_epochs, sub_epochs, batch_size, learning_rate, rotation)
        saved = Resume(resume, images, backbone, recipe) if resume else None
        first, training = saved.read(training) if saved else (0, training)

        for epoch in range(first, meta_epochs):
            progress("training", epoch * sub_epochs, meta_epochs * sub_epochs)
            rng = np.random.default_rng([seed, epoch])  # a resumed training draws the numbers of an uninterrupted one
            angles = rng.uniform(-rotation, rotation, len(images)).astype(np.float32)
            maps = [rotated_features(backbone, images[i], angle) for i, angle in enumerate(angles)]
            features = [jnp.concatenate([m[k].reshape(-1, m[k].shape[-1]) for m in maps]) for k in range(len(flows))]
            for sub in range(sub_epochs):
                for k, vectors in enumerate(features):
                    order = jnp.asarray(batches(rng, len(vectors), batch_size))
                    times = epoch + (sub + np.arange(len(order)) / len(order)) / sub_epochs
                    rates = learning_rate * jnp.asarray(rate_factors(times, meta_epochs))
                    flow, state, loss = train(training.flows[k], training.states[k], vectors, conditions[k], order, rates)
                    training.flows[k], training.states[k] = flow, state
                    training.losses[epoch, k] += float(loss) / sub_epochs
                done = epoch * sub_epochs + sub + 1
                loss = training.losses[epoch].sum() * sub_epochs / (sub + 1)
                progress(f"training, loss {loss:.4f}", done, meta_epochs * sub_epochs)
            if saved:
                saved.write(epoch + 1, training)

        unset, losses = jnp.zeros(len(flows)), jnp.asarray(training.losses)
        detector = cls(backbone=backbone, size=images.size, flows=tuple(training.flows), peaks=unset, losses=losses)
        return detector.with_peaks(images)

    def with_peaks(self, images: NormalImages) -> "CFlow":
        """Returns the detector with the peaks of these normal images."""
        maxima = jnp.asarray([highest(self, images[i]) for i in range(len(images))])
        return eqx.tree_at(lambda detector: detector.peaks, self, jnp.max(maxima, axis=0))

    def locate(
        self, image: Float[Array, "h w 3"], corner: Int[Array | np.ndarray, " 2"]
    ) -> tuple[tuple[Float[Array, "_h_k _w_k _units"], ...], ...]:
        """Returns the biases of the flows' hidden units for the window's position encodings."""
        windows = []
        for stride, flow in zip(self.backbone.strides, self.flows, strict=True):
            encoding = jnp.asarray(position_encoding(self.size[0] // stride, self.size[1] // stride, flow.condition_size))
            shape = (image.shape[0] // stride, image.shape[1] // stride, flow.condition_size)
            first = jnp.append(jnp.asarray(corner) // stride, 0)
            windows.append(flow.biases(jax.lax.dynamic_slice(encoding, first, shape)))
        return tuple(windows)

    def log_likelihoods(
        self, image: Float[Array, "h w 3"], context: tuple[tuple[Float[Array, "_h_k _w_k _units"], ...], ...]
    ) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """Returns the log-likelihood per channel at every position of every layer."""
        out = []
        for flow, features, biases in zip(self.flows, self.features(image), context, strict=True):
            flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), (features, biases))
            out.append(flow.log_likelihood(*flat).reshape(features.shape[:2]))
        return tuple(out)

    def raw_scores(
        self, image: Float[Array, "h w 3"], context: tuple[tuple[Float[Array, "_h_k _w_k _units"], ...], ...]
    ) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """Returns -log σ(log p), Eq. (6) with its sign changed."""
        return tuple(jax.nn.softplus(-log_p) for log_p in self.log_likelihoods(image, context))

    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """Returns the coarse map as published: the number of layers minus the sum of exp(log p - peak) over the layers.

        Layers are enlarged bilinearly and not smoothed. The map is at least 0 if no log-likelihood exceeds its peak.
        """
        log_ps = self.log_likelihoods(image, self.locate(image, ORIGIN))
        normality = [
            enlarged_aligned(jnp.exp(log_p - peak), (image.shape[0], image.shape[1]))
            for log_p, peak in zip(log_ps, self.peaks, strict=True)
        ]
        return len(normality) - jnp.sum(jnp.stack(normality), axis=0)


@jax.jit
def highest(detector: CFlow, image: Float[Array, "h w 3"]) -> list[Float[Array, ""]]:
    """Returns the largest log-likelihood of an image in each layer, divided by the number of channels."""
    return [jnp.max(log_p) for log_p in detector.log_likelihoods(image, detector.locate(image, ORIGIN))]


def position_encoding(height: int, width: int, channels: int = CONDITION_SIZE) -> Float[np.ndarray, "h w d_c"]:
    """Returns sines and cosines of the column (first half of the channels) and of the row (second half), to base 10⁴."""
    half = channels // 2
    frequency = np.exp(np.arange(0, half, 2) * -(np.log(1e4) / half))
    out = np.zeros((height, width, channels), np.float32)
    for start, positions in ((0, np.arange(width)[None, :, None]), (half, np.arange(height)[:, None, None])):
        out[..., start : start + half : 2] = np.sin(positions * frequency)
        out[..., start + 1 : start + half : 2] = np.cos(positions * frequency)
    return out


def enlarged_aligned(scores: Float[Array, "h_k w_k"], size: tuple[int, int]) -> Float[Array, "h w"]:
    """Returns scores enlarged bilinearly, with corner values at corner pixels (PyTorch's ``align_corners=True``)."""

    def weights(n: int, m: int) -> Float[Array, "m n"]:
        positions = np.arange(m) * ((n - 1) / max(m - 1, 1))
        return jnp.asarray(np.maximum(1 - np.abs(positions[:, None] - np.arange(n)), 0), scores.dtype)

    rows, columns = (weights(n, m) for n, m in zip(scores.shape, size, strict=True))
    return rows @ scores @ columns.T
