"""PatchCore (Roth et al., CVPR 2022) in the paper's form: multi-layer features, coreset memory bank, Eq. (4)-(5)."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.spatial.distance import cdist

from f2pad_jax.backbones import Backbone
from f2pad_jax.detectors.base import AbstractDetector, Calibration, NormalImages, coarse_map, extract
from f2pad_jax.errors import OptionError
from f2pad_jax.progress import Progress, silent

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
    size: tuple[int, int] = eqx.field(static=True)
    memory_bank: Float[Array, "m c"]
    num_candidates: int = eqx.field(static=True, default=50)
    """|M_ij|."""
    calibration: Calibration | None = None

    @classmethod
    def fit(
        cls,
        images: NormalImages,
        backbone: Backbone,
        *,
        seed: int = 0,
        progress: Progress = silent,
        coreset_ratio: float = 0.1,
        max_bank: int = 4096,
        num_candidates: int = 50,
        projection: int = 128,
    ) -> "PatchCore":
        """The features of a greedy coreset.

        Images are streamed twice, first for the projections the coreset is chosen on, then for the features chosen:
        memory is 4·``projection`` bytes a position and image (1.6 MB an image at 56x56), not their 448 channels.

        Args:
            coreset_ratio: share of all features kept in the memory bank.
            max_bank: most features kept.
            num_candidates: |M_ij| of Eq. (5).
            projection: dimensions of the random projection distances are measured in.

        Raises:
            OptionError: the ratio is not above 0 and at most 1, or a count not positive.
        """
        if not 0 < coreset_ratio <= 1:
            raise OptionError(f"coreset_ratio {coreset_ratio} is not above 0 and at most 1")
        if min(max_bank, num_candidates, projection) < 1:
            raise OptionError(
                f"max_bank {max_bank}, num_candidates {num_candidates} and projection {projection} must be at least 1"
            )
        rng = np.random.default_rng(seed)
        embed_jit, points, matrix, count = jax.jit(embed), None, None, 0
        for i in range(len(images)):
            progress("features", i, len(images))
            features = np.asarray(embed_jit(backbone, images[i]))
            features = features.reshape(-1, features.shape[-1])
            if points is None:
                count, channels = features.shape
                if channels > projection:
                    matrix = (rng.standard_normal((channels, projection)) / np.sqrt(projection)).astype(np.float32)
                points = np.empty((len(images) * count, min(channels, projection)), np.float32)
            points[i * count : (i + 1) * count] = features if matrix is None else features @ matrix
        progress("features", len(images), len(images))
        assert points is not None
        wanted = max(1, min(int(np.ceil(coreset_ratio * len(points))), max_bank))
        chosen = coreset(points, wanted, int(rng.integers(len(points))), progress)
        bank = np.empty((len(chosen), channels), np.float32)
        for i in range(len(images)):
            progress("memory bank", i, len(images))
            (mine,) = np.nonzero(chosen // count == i)
            if len(mine):
                bank[mine] = np.asarray(embed_jit(backbone, images[i])).reshape(count, -1)[chosen[mine] % count]
        progress("memory bank", len(images), len(images))
        return cls(backbone=backbone, size=images.size, memory_bank=jnp.asarray(bank), num_candidates=num_candidates)

    def locate(self, image: Float[Array, "h w 3"], corner: Int[Array | np.ndarray, " 2"]) -> Candidates:
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

        norms = jnp.sum(self.memory_bank**2, axis=-1)

        def choose(block):
            feature, indices = block
            products = jnp.einsum("pkc,pc->pk", self.memory_bank[indices], feature, precision="highest")
            best = jnp.argmax(2 * products - norms[indices], axis=1)
            return jnp.take_along_axis(indices, best[:, None], axis=1)[:, 0]

        # few positions at a time, so that their candidates stay in the cache
        chosen = _blocked(choose, (features.reshape(-1, features.shape[-1]), where.indices), block=64)
        return Candidates(where.indices, self.memory_bank[chosen].reshape(features.shape))

    def raw_scores(self, image: Float[Array, "h w 3"], where: Candidates) -> tuple[Float[Array, "_h_k _w_k"]]:
        """Squared L2 distance to the nearest candidate, Eq. (5)."""
        return (jnp.sum((embed(self.backbone, image) - where.nearest) ** 2, axis=-1),)

    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """Coarse map over the whole memory bank, Eq. (4)."""
        features = embed(self.backbone, image)
        distances, _ = nearest(features.reshape(-1, features.shape[-1]), self.memory_bank, 1)
        return coarse_map(distances.reshape(features.shape[:2]) / self.scale, (image.shape[0], image.shape[1]))


def embed(backbone: Backbone, image: Float[Array, "h w 3"]) -> Float[Array, "h_1 w_1 c"]:
    """Feature maps averaged 3x3, resized to the largest map, concatenated (paper, Section III-B1).

    ``image`` in normalised intensity.
    """
    maps = extract(backbone, image)
    size = max(m.shape[:2] for m in maps)
    return jnp.concatenate([jax.image.resize(_average(m), (*size, m.shape[2]), "linear") for m in maps], axis=-1)


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
    features: Float[Array, "p c"], bank: Float[Array, "m c"], k: int
) -> tuple[Float[Array, "p"], Int[Array, "p k"]]:
    """Exact k nearest neighbours by squared L2, nearest first, in blocks of positions.

    Args:
        features: where to search from.
        bank: what to search.
        k: how many neighbours.

    Returns:
        the distance to the nearest, recomputed without cancellation, and the indices of all ``k``.
    """
    norms = jnp.sum(bank**2, axis=-1)

    def search(feature):
        scores = 2 * jnp.matmul(feature, bank.T, precision="highest") - norms  # of large numbers: no digit to spare
        indices = jnp.argmax(scores, axis=-1)[:, None] if k == 1 else jax.lax.top_k(scores, k)[1]
        return jnp.sum((feature - bank[indices[:, 0]]) ** 2, axis=-1), indices

    return _blocked(search, features)


def coreset(
    points: Float[np.ndarray, "n d"],
    size: int,
    first: int,
    progress: Progress = silent,
    *,
    batch: int = 512,
) -> Int[np.ndarray, " m"]:
    """Greedy k-centre selection (Sener & Savarese 2018, as in PatchCore): each next point is the farthest from the chosen.

    The same choice as the plain algorithm, which passes over all points once for every one it chooses, in far fewer
    passes. Distances to the chosen only ever fall. So the farthest point is among the ``batch`` farthest of the last pass,
    for as long as the farthest of them is at least as far as all others were then; their distances to one another suffice
    to choose among them. One matrix product then brings all points up to date with every point chosen since.

    Args:
        points: where distances are measured.
        size: how many to choose; all, where there are fewer.
        first: index of the first.
        progress: told how many are chosen.
        batch: points considered between passes.

    Returns:
        indices in the order they were chosen.
    """
    n, size = len(points), min(size, len(points))
    points = points - points.mean(axis=0)  # the shorter, the fewer digits cancel
    norms = np.einsum("nd,nd->n", points, points)
    distance = np.full(n, np.inf, points.dtype)
    chosen, new = [first], [first]
    while True:
        progress("coreset", len(chosen), size)
        if len(chosen) == size:
            return np.asarray(chosen)
        for start in range(0, n, 16384):
            block = slice(start, start + 16384)
            apart = norms[block, None] - 2 * points[block] @ points[new].T + norms[new]
            np.minimum(distance[block], apart.min(axis=1), out=distance[block])
        distance[new] = -np.inf
        order = np.argpartition(-distance, min(batch, n - 1))
        candidates, level = order[:batch], distance[order[batch:]].max(initial=-np.inf)
        candidates = candidates[distance[candidates] > -np.inf]
        near, apart = distance[candidates], cdist(points[candidates], points[candidates], "sqeuclidean")
        new = []
        while len(chosen) + len(new) < size and len(new) < len(candidates):
            farthest = int(np.argmax(near))
            if new and near[farthest] < level:
                break
            new.append(int(candidates[farthest]))
            near = np.minimum(near, apart[farthest])
            near[farthest] = -np.inf
        chosen += new
