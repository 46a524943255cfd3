"""PatchCore (Roth et al., CVPR 2022) in the paper's form: multi-layer features, coreset memory bank, Eq. (4)-(5)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.spatial.distance import cdist

from f2pad_jax._storage import content_checksum
from f2pad_jax.backbones.backbone import Backbone
from f2pad_jax.detectors.base import AbstractDetector, Calibration, NormalImages, coarse_map, extract
from f2pad_jax.errors import OptionError
from f2pad_jax.progress import Progress, silent

BLOCK = 512
"""Number of positions that a nearest-neighbour search handles at a time; it bounds the memory."""
NUM_POINTS = 200_000
"""Number of features from which the coreset is selected; of more features, equally many are drawn from each image."""


class Candidates(NamedTuple):
    """Part of the memory bank that a window uses."""

    indices: Int[Array, "p k"]
    """Candidates M_ij of Eq. (5): indices of the features in the bank nearest to each position of the first guess n0."""
    nearest: Float[Array, "h_k w_k c"]
    """Features of the nearest candidate of each position."""


class PatchCore(AbstractDetector):
    """Detector by the squared L2 distance to the nearest feature of a memory bank.

    Departure from the official repository, as in the paper: features are averaged 3x3, resized bilinearly to the largest
    map and concatenated.
    """

    backbone: Backbone
    """Frozen feature extractor."""
    size: tuple[int, int] = eqx.field(static=True)
    """Height and width of the images of the fit, pixels, static."""
    memory_bank: Float[Array, "m c"]
    """Normal features of the coreset."""
    num_candidates: int = eqx.field(static=True, default=50)
    """Number |M_ij| of candidates per position, static."""
    calibration: Calibration | None = None
    """Calibration by :func:`f2pad_jax.fit`; None before the calibration."""

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
        """Fills the memory bank with a greedy coreset of the features of normal images.

        A temporary file keeps the drawn features, for other fits to these images: 4 bytes per feature and channel. Memory
        is 4·``projection`` bytes per feature, 0.1 GB at most.

        Args:
            images: normal images at the detector's size.
            backbone: frozen feature extractor.
            seed: seed of the projection, of the features drawn and of the first point of the coreset.
            progress: function that receives stage, number done and total.
            coreset_ratio: share of all features kept in the memory bank.
            max_bank: largest number of features kept.
            num_candidates: number |M_ij| of candidates, Eq. (5).
            projection: number of dimensions of the random projection.

        Raises:
            OptionError: the ratio is not above 0 and at most 1, or a count is not positive.
        """
        if not 0 < coreset_ratio <= 1:
            raise OptionError(f"coreset_ratio {coreset_ratio} must be above 0 and at most 1")
        if min(max_bank, num_candidates, projection) < 1:
            raise OptionError(
                f"max_bank {max_bank}, num_candidates {num_candidates} and projection {projection} must be at least 1"
            )
        rng = np.random.default_rng(seed)
        h, w, channels = jax.eval_shape(partial(embed, backbone), images[0]).shape
        matrix = None
        if channels > projection:
            matrix = (rng.standard_normal((channels, projection)) / np.sqrt(projection)).astype(np.float32)
        count = min(h * w, -(-NUM_POINTS // images.total))

        def drawn(i: int) -> Float[np.ndarray, "p c"]:
            order = np.random.default_rng([seed, images.numbers[i]]).permutation(h * w)
            rows = jnp.asarray(np.sort(order[:count]))
            return images.computed(("patchcore", backbone.key, seed), lambda image: _at(backbone, image, rows), i)

        points = np.empty((len(images), count, min(channels, projection)), np.float32)
        for i in range(len(images)):
            progress("features", i, len(images))
            points[i] = drawn(i) if matrix is None else drawn(i) @ matrix
        progress("features", len(images), len(images))
        points = points.reshape(len(images) * count, -1)
        bank_size = max(1, min(int(np.ceil(coreset_ratio * len(images) * h * w)), max_bank))
        indices = coreset(points, bank_size, int(rng.integers(len(points))), progress)
        bank = np.empty((len(indices), channels), np.float32)
        for i in range(len(images)):
            progress("memory bank", i, len(images))
            (rows,) = np.nonzero(indices // count == i)
            if len(rows):
                bank[rows] = drawn(i)[indices[rows] % count]
        progress("memory bank", len(images), len(images))
        return cls(backbone=backbone, size=images.size, memory_bank=jnp.asarray(bank), num_candidates=num_candidates)

    def extended(self, images: NormalImages) -> "PatchCore":
        """Returns the detector with features of further normal images in its memory bank.

        The greedy selection of the coreset goes on from the present bank: the farthest feature joins, again and again. It
        ends when all features lie within the bank's spacing. The spacing is the median distance of the bank's features to
        the nearest other feature. In the mean, at most as many features of an image join as the bank has per image.
        """
        normality = self.calibrated.normality
        per_image = len(self.memory_bank) / max(0 if normality is None else len(normality.scores), 1)
        radius, most = float(_spacing(self.memory_bank)), int(np.ceil(per_image * len(images)))
        key = ("patchcore", self.backbone.key, content_checksum({"bank": np.asarray(self.memory_bank)}))
        features, distances = [], []
        for i in range(len(images)):
            found = images.computed(key, partial(_with_distances, self.backbone, self.memory_bank), i)
            rows = np.argsort(-found[:, -1])[: max(NUM_POINTS // len(images), 1)]
            rows = rows[found[rows, -1] > radius]  # distances only fall: no other feature would be selected
            features.append(found[rows, :-1])
            distances.append(found[rows, -1])
        points = np.concatenate(features)
        if not len(points):
            return self
        chosen = coreset(points, most, None, distance=np.concatenate(distances), radius=radius)
        return dataclasses.replace(self, memory_bank=jnp.concatenate([self.memory_bank, points[chosen]]))

    def locate(self, image: Float[Array, "h w 3"], corner: Int[Array | np.ndarray, " 2"]) -> Candidates:
        """Returns the candidates M_ij for the first guess n0, here ``image``; they do not depend on ``corner``."""
        del corner
        features = embed(self.backbone, image)
        k = min(self.num_candidates, len(self.memory_bank))
        _, indices = nearest(features.reshape(-1, features.shape[-1]), self.memory_bank, k)
        return Candidates(indices, self.memory_bank[indices[:, 0]].reshape(features.shape))

    def refresh(self, image: Float[Array, "h w 3"], context: Candidates) -> Candidates:
        """Returns the context with the nearest candidates of a changed image. Eq. (5) keeps them until the next call.

        Departure: the paper takes the minimum over all candidates at every step, as ``steps_per_check=1`` does.
        With ``steps_per_check=10``, the distances to all candidates are computed a tenth as often.
        """
        features = embed(self.backbone, image)
        norms = jnp.sum(self.memory_bank**2, axis=-1)

        def choose(block):
            feature, indices = block
            products = jnp.einsum("pkc,pc->pk", self.memory_bank[indices], feature, precision="highest")
            best = jnp.argmax(2 * products - norms[indices], axis=1)
            return jnp.take_along_axis(indices, best[:, None], axis=1)[:, 0]

        # few positions at a time: their candidates stay in the processor's cache
        choice = _blocked(choose, (features.reshape(-1, features.shape[-1]), context.indices), block=64)
        return Candidates(context.indices, self.memory_bank[choice].reshape(features.shape))

    def raw_scores(self, image: Float[Array, "h w 3"], context: Candidates) -> tuple[Float[Array, "_h_k _w_k"]]:
        """Returns the squared L2 distance to the nearest candidate, Eq. (5)."""
        return (jnp.sum((embed(self.backbone, image) - context.nearest) ** 2, axis=-1),)

    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """Returns the coarse map of distances to the whole memory bank, Eq. (4)."""
        features = embed(self.backbone, image)
        distances, _ = nearest(features.reshape(-1, features.shape[-1]), self.memory_bank, 1)
        return coarse_map(distances.reshape(features.shape[:2]) / self.scale, (image.shape[0], image.shape[1]))


def embed(backbone: Backbone, image: Float[Array, "h w 3"]) -> Float[Array, "h_1 w_1 c"]:
    """Returns feature maps averaged 3x3, resized to the largest map and concatenated (paper, Section III-B1).

    ``image`` is in normalised intensity.
    """
    maps = extract(backbone, image)
    size = max(m.shape[:2] for m in maps)
    return jnp.concatenate([jax.image.resize(_average(m), (*size, m.shape[2]), "linear") for m in maps], axis=-1)


@jax.jit
def _at(backbone: Backbone, image: Float[Array, "h w 3"], rows: Int[Array, " p"]) -> Float[Array, "p c"]:
    """Returns the embedded features at these positions."""
    features = embed(backbone, image)
    return features.reshape(-1, features.shape[-1])[rows]


@jax.jit
def _with_distances(backbone: Backbone, bank: Float[Array, "m c"], image: Float[Array, "h w 3"]) -> Float[Array, "p d"]:
    """Returns the embedded features at all positions, and the squared distance of each to the bank in the last column."""
    features = embed(backbone, image)
    features = features.reshape(-1, features.shape[-1])
    return jnp.column_stack([features, nearest(features, bank, 1)[0]])


@jax.jit
def _spacing(bank: Float[Array, "m c"]) -> Float[Array, ""]:
    """Returns the median squared distance of a bank's features to the nearest other feature; 0 for a single feature."""
    if len(bank) < 2:
        return jnp.float32(0)
    _, indices = nearest(bank, bank, 2)
    return jnp.median(jnp.sum((bank[indices[:, 0]] - bank[indices[:, 1]]) ** 2, axis=-1))


def _average(image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Returns 3x3 means with zeros beyond the border, always divided by nine (default of PyTorch's ``avg_pool2d``)."""
    for axis in (0, 1):
        pads = [(1, 1) if a == axis else (0, 0) for a in range(3)]
        p, n = jnp.pad(image, pads), image.shape[axis]
        before, here, after = (jax.lax.slice_in_dim(p, i, i + n, axis=axis) for i in range(3))
        image = (before + here + after) / 3
    return image


def _blocked(function: Callable, arrays, block: int = BLOCK):
    """Maps ``function`` over ``block`` rows at a time; the last block is filled up with zeros."""
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
    """Finds the exact k nearest neighbours by squared L2 distance, nearest first, in blocks of positions.

    Args:
        features: query features.
        bank: features that are searched.
        k: number of neighbours.

    Returns:
        The squared distance to the nearest neighbour, recomputed without cancellation, and the indices of all ``k``.
    """
    norms = jnp.sum(bank**2, axis=-1)

    def search(feature):
        scores = 2 * jnp.matmul(feature, bank.T, precision="highest") - norms  # high precision, since large numbers cancel
        indices = jnp.argmax(scores, axis=-1)[:, None] if k == 1 else jax.lax.top_k(scores, k)[1]
        return jnp.sum((feature - bank[indices[:, 0]]) ** 2, axis=-1), indices

    return _blocked(search, features)


def coreset(
    points: Float[np.ndarray, "n d"],
    size: int,
    first: int | None,
    progress: Progress = silent,
    *,
    batch: int = 512,
    distance: Float[np.ndarray, " n"] | None = None,
    radius: float = -np.inf,
) -> Int[np.ndarray, " m"]:
    """Selects points by greedy k-centre (Sener & Savarese 2018, as in PatchCore).

    Each next point is the farthest from the selected points. The plain algorithm passes over all points for each selection.
    This function selects exactly these points in far fewer passes:

    1. One matrix product updates the distance of every point to the selected points.
    2. The ``batch`` farthest points become candidates. The level is the largest distance among the other points.
    3. Candidates are selected, farthest first, until the next distance is below the level. Distances only fall: each
       selected candidate is the farthest of all points.

    Args:
        points: vectors between which distances are measured.
        size: number of points to select; all if there are fewer.
        first: index of the first point; None: the farthest one.
        progress: function that receives stage, number of selected points and total.
        batch: number of candidates of a pass.
        distance: squared distance of each point to points that were selected before; default: there are none.
        radius: squared distance within which all points are left at the end, if ``size`` allows.

    Returns:
        Indices in the order of selection.
    """
    n, size = len(points), min(size, len(points))
    points = points - points.mean(axis=0)  # centred vectors are shorter, and fewer digits cancel
    norms = np.einsum("nd,nd->n", points, points)
    distance = np.full(n, np.inf, points.dtype) if distance is None else distance.copy()
    selected: list[int] = []
    new = [] if first is None else [first]
    while True:
        selected += new
        progress("coreset", len(selected), size)
        if len(selected) == size:
            return np.asarray(selected, int)
        for start in range(0, n if new else 0, 16384):
            block = slice(start, start + 16384)
            squares = norms[block, None] - 2 * points[block] @ points[new].T + norms[new]
            np.minimum(distance[block], squares.min(axis=1), out=distance[block])
        distance[new] = -np.inf
        if distance.max() <= radius:
            return np.asarray(selected, int)
        order = np.argpartition(-distance, min(batch, n - 1))
        candidates, level = order[:batch], distance[order[batch:]].max(initial=-np.inf)
        candidates = candidates[distance[candidates] > -np.inf]
        to_selected, mutual = distance[candidates], cdist(points[candidates], points[candidates], "sqeuclidean")
        new = []
        while len(selected) + len(new) < size and len(new) < len(candidates):
            farthest = int(np.argmax(to_selected))
            if (new and to_selected[farthest] < level) or to_selected[farthest] <= radius:
                break
            new.append(int(candidates[farthest]))
            to_selected = np.minimum(to_selected, mutual[farthest])
            to_selected[farthest] = -np.inf
