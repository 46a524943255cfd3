"""PatchCore (Roth et al., CVPR 2022) in the paper's form: multi-layer features, coreset memory bank, Eq. (4)-(5)."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from f2pad_jax.backbones import Backbone
from f2pad_jax.detectors.base import AbstractDetector, coarse_map
from f2pad_jax.prior import PixelPrior
from f2pad_jax.units import denormalise

BLOCK = 512
"""Positions handled at a time by the neighbour searches; bounds their memory."""


class Candidates(NamedTuple):
    """The part of the memory bank a window uses."""

    indices: Int[Array, "p k"]
    """M_ij of Eq. (5): the bank entries nearest to each position's features in n0."""
    nearest: Float[Array, "h_k w_k c"]
    """The features of the nearest candidate, per position."""


class PatchCore(AbstractDetector):
    """Distance to the nearest normal feature.

    Departure from the official repository, as in the paper: features are averaged 3x3, resized bilinearly to the largest
    map and concatenated; distances are squared L2.
    """

    backbone: Backbone
    memory_bank: Float[Array, "m c"]
    scale: Float[Array, ""]
    """Mean raw score of held-out normal images."""
    prior: PixelPrior
    threshold: Float[Array, ""]
    size: tuple[int, int] = eqx.field(static=True)
    num_candidates: int = eqx.field(static=True, default=50)
    """|M_ij|."""
    faint_threshold: Float[Array, ""] | float = float("inf")
    """Level for images that nowhere reach the threshold."""
    normals: UInt8[Array, "k h w 3"] | None = None
    """Some of the training images, for the inpainter."""

    @property
    def stride(self) -> int:
        """The backbone's coarsest stride."""
        return self.backbone.stride

    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """Coarse map over the whole memory bank, Eq. (4)."""
        features = embed(self.backbone, image)
        distances, _ = nearest(features.reshape(-1, features.shape[-1]), self.memory_bank, 1)
        return coarse_map(distances.reshape(features.shape[:2]) / self.scale, (image.shape[0], image.shape[1]))

    def coarse_mask(self, anomaly_map: Float[Array, "h w"]) -> Bool[Array, "h w"]:
        """m0: the map above the threshold or, in an image that nowhere reaches it, above the faint one."""
        glaring = jnp.any(anomaly_map > self.threshold)
        return anomaly_map > jnp.where(glaring, self.threshold, self.faint_threshold)

    def exemplars(self) -> UInt8[Array, "k h w 3"] | None:
        """Some of the training images."""
        return self.normals

    def locate(self, image: Float[Array, "h w 3"], corner: Int[Array, " 2"]) -> Candidates:
        """Candidates M_ij from the features of n0; PatchCore does not depend on ``corner``."""
        del corner
        features = embed(self.backbone, image)
        k = min(self.num_candidates, len(self.memory_bank))
        _, indices = nearest(features.reshape(-1, features.shape[-1]), self.memory_bank, k)
        return Candidates(indices, self.memory_bank[indices[:, 0]].reshape(features.shape))

    def refresh(self, image: Float[Array, "h w 3"], where: Candidates) -> Candidates:
        """Choose each position's nearest candidate again; between calls Eq. (5) keeps the last choice.

        Departure: the paper takes the minimum at every step. That is ``steps_per_check=1``; at 10 the distances to all
        candidates are computed a tenth as often.
        """
        features = embed(self.backbone, image)

        def choose(block):
            feature, indices = block
            candidates = self.memory_bank[indices]
            best = jnp.argmin(jnp.sum((candidates - feature[:, None]) ** 2, axis=-1), axis=1)
            return jnp.take_along_axis(candidates, best[:, None, None], axis=1)[:, 0]

        chosen = _blocked(choose, (features.reshape(-1, features.shape[-1]), where.indices))
        return Candidates(where.indices, chosen.reshape(features.shape))

    def scores(self, image: Float[Array, "h w 3"], where: Candidates) -> tuple[Float[Array, "_h_k _w_k"]]:
        """Squared L2 distance to the nearest candidate, Eq. (5), in units of the mean normal score."""
        return (jnp.sum((embed(self.backbone, image) - where.nearest) ** 2, axis=-1) / self.scale,)


def embed(backbone: Backbone, image: Float[Array, "h w 3"]) -> Float[Array, "h_1 w_1 c"]:
    """Feature maps averaged 3x3, resized to the largest map, concatenated (paper, Section III-B1).

    ``image`` in normalised intensity.
    """
    maps = backbone(backbone.normalise(denormalise(image)))
    return jnp.concatenate(
        [jax.image.resize(_average(m), (*maps[0].shape[:2], m.shape[2]), "linear") for m in maps], axis=-1
    )


def _average(image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """3x3 mean with zeros beyond the border, divided by nine everywhere (PyTorch's ``avg_pool2d`` default)."""
    for axis in (0, 1):
        pads = [(1, 1) if a == axis else (0, 0) for a in range(3)]
        p, n = jnp.pad(image, pads), image.shape[axis]
        before, here, after = (jax.lax.slice_in_dim(p, i, i + n, axis=axis) for i in range(3))
        image = (before + here + after) / 3
    return image


def _blocked(function: Callable, arrays, block: int = BLOCK):
    """``function`` over the leading axis, ``block`` rows at a time; the rest is padded, so one shape serves."""
    n = len(jax.tree.leaves(arrays)[0])
    block = min(block, n)
    count = -(-n // block)
    blocks = jax.tree.map(
        lambda a: jnp.pad(a, ((0, count * block - n), *[(0, 0)] * (a.ndim - 1))).reshape(count, block, *a.shape[1:]), arrays
    )
    out = jax.lax.map(function, blocks)
    return jax.tree.map(lambda a: a.reshape(count * block, *a.shape[2:])[:n], out)


def nearest(
    features: Float[Array, "p c"], bank: Float[Array, "m c"], k: int, penalty: Float[Array, " m"] | float = 0.0
) -> tuple[Float[Array, "p"] | Float[Array, "p k"], Int[Array, "p k"]]:
    """Exact k nearest neighbours by squared L2, nearest first, in blocks of positions.

    Args:
        features: where to search from.
        bank: what to search.
        k: how many neighbours.
        penalty: added to each entry's squared distance; infinity leaves an entry out.

    Returns:
        the distance to the nearest, recomputed without cancellation, and the indices of all ``k``.
    """
    norms = jnp.sum(bank**2, axis=-1) + penalty

    def search(feature):
        scores = 2 * feature @ bank.T - norms
        indices = jnp.argmax(scores, axis=-1)[:, None] if k == 1 else jax.lax.top_k(scores, k)[1]
        return jnp.sum((feature - bank[indices[:, 0]]) ** 2, axis=-1), indices

    return _blocked(search, features)


def coreset(
    features: Float[np.ndarray, "n c"], size: int, *, seed: int = 0, projection: int = 128
) -> Int[np.ndarray, " m"]:
    """Greedy k-centre selection on randomly projected features (Sener & Savarese 2018, as in PatchCore).

    Args:
        features: all normal features.
        size: how many to keep.
        seed: of the projection and the first centre.
        projection: dimensions distances are measured in; fewer features' channels than this are used as they are.

    Returns:
        indices in the order they were chosen.
    """
    rng = np.random.default_rng(seed)
    n, c = features.shape
    size = min(size, n)
    if c > projection:
        features = features @ (rng.standard_normal((c, projection)) / np.sqrt(projection)).astype(np.float32)
    return np.asarray(_greedy(jnp.asarray(features), int(rng.integers(n)), size))


@functools.partial(jax.jit, static_argnames="size")
def _greedy(points: Float[Array, "n d"], first: Int[Array, ""], size: int) -> Int[Array, " m"]:
    norms = jnp.sum(points**2, axis=-1)

    def choose(i, carry):
        chosen, distance = carry
        last = chosen[i - 1]
        distance = jnp.minimum(distance, norms - 2 * points @ points[last] + norms[last])
        distance = distance.at[last].set(-1.0)
        return chosen.at[i].set(jnp.argmax(distance).astype(jnp.int32)), distance

    chosen = jnp.zeros(size, jnp.int32).at[0].set(first)
    return jax.lax.fori_loop(1, size, choose, (chosen, jnp.full(len(points), jnp.inf)))[0]
