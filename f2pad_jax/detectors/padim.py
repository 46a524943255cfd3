"""PaDiM (Defard et al., ICPR 2020): a Gaussian at every position, Eq. (7)."""

import itertools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int
from threadpoolctl import threadpool_limits

from f2pad_jax.backbones import Backbone
from f2pad_jax.detectors.base import (
    ORIGIN,
    AbstractDetector,
    Calibration,
    NormalImages,
    coarse_map,
    extract,
)
from f2pad_jax.errors import OptionError
from f2pad_jax.progress import Progress, silent

REGULARISER = 0.01
"""Added to every variance."""
CHUNK = 32
"""Images whose features are held at a time."""
BLOCK = 256
"""Positions whose covariances are decomposed at a time."""


class Full(eqx.Module):
    """A precision matrix per position."""

    precision: Float[Array, "h_1 w_1 c c"]
    """The inverse covariance, symmetric."""

    def __call__(self, difference: Float[Array, "h_1 w_1 c"]) -> Float[Array, "h_1 w_1"]:
        """Squared Mahalanobis distance dᵀ·Σ⁻¹·d."""
        return quadratic(self.precision, difference)

    @staticmethod
    def of(covariance: Float[np.ndarray, "p c c"]) -> tuple[np.ndarray, ...]:
        """The fields, from float64 covariances."""
        inverse = np.linalg.inv(covariance)
        return (((inverse + np.swapaxes(inverse, 1, 2)) / 2).astype(np.float32),)


@jax.custom_jvp
def quadratic(matrix: Float[Array, "*b c c"], vector: Float[Array, "*b c"]) -> Float[Array, "*b"]:
    """vᵀ·M·v of symmetric matrices. Value and gradient read M, by far the largest array of PaDiM, but once."""
    return jnp.sum(vector * _product(matrix, vector), axis=-1)


@partial(quadratic.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    (matrix, vector), (d_matrix, d_vector) = primals, tangents
    product = _product(matrix, vector)
    tangent = jnp.zeros(vector.shape[:-1], vector.dtype)
    if not isinstance(d_vector, SymbolicZero):
        tangent += jnp.sum(2 * product * d_vector, axis=-1)
    if not isinstance(d_matrix, SymbolicZero):
        tangent += jnp.sum(vector * _product(d_matrix, vector), axis=-1)
    return jnp.sum(vector * product, axis=-1), tangent


def _product(matrix: Array, vector: Array) -> Array:
    return jnp.einsum("...ij,...j->...i", matrix, vector, precision="highest")


class LowRank(eqx.Module):
    """A precision of few directions per position, and one variance for all others (probabilistic PCA).

    The paper leaves it as a future study (Section IV-D1). Exact when there are no more images than directions.
    """

    basis: Float[Array, "h_1 w_1 r c"]
    """Orthonormal rows: the directions of largest variance."""
    shrinkage: Float[Array, "h_1 w_1 r"]
    """1 - σ/√λ for a direction of variance λ."""
    rest: Float[Array, "h_1 w_1"]
    """1/σ, the inverse standard deviation of all other directions."""

    def __call__(self, difference: Float[Array, "h_1 w_1 c"]) -> Float[Array, "h_1 w_1"]:
        """Squared Mahalanobis distance ‖d - Uᵀ(shrinkage · U·d)‖² / σ²."""
        along = jnp.einsum("hwrc,hwc->hwr", self.basis, difference)
        white = difference - jnp.einsum("hwrc,hwr->hwc", self.basis, self.shrinkage * along)
        return jnp.sum((white * self.rest[..., None]) ** 2, axis=-1)

    @staticmethod
    def of(covariance: Float[np.ndarray, "p c c"], rank: int) -> tuple[np.ndarray, ...]:
        """The fields, from float64 covariances: σ² is the mean of the variances left out, the likeliest value."""
        variances, directions = np.linalg.eigh(covariance)  # ascending
        rest = variances[:, :-rank].mean(axis=1) if rank < variances.shape[1] else variances[:, 0]
        basis = np.swapaxes(directions[:, :, -rank:], 1, 2)
        shrinkage = 1 - np.sqrt(rest[:, None] / variances[:, -rank:])
        return basis.astype(np.float32), shrinkage.astype(np.float32), (1 / np.sqrt(rest)).astype(np.float32)


class PaDiM(AbstractDetector):
    """Squared Mahalanobis distance to the Gaussian of the position, Eq. (7).

    Features are the layers enlarged to the largest by nearest neighbour, of which some channels, drawn once, are kept.
    The coarse map is that of the distance itself, as the authors publish it. Positions are bound to the fitted size.
    """

    backbone: Backbone
    size: tuple[int, int] = eqx.field(static=True)
    channels: tuple[Int[Array, " _c_k"], ...]
    """Channels kept of each layer, ascending."""
    mean: Float[Array, "h_1 w_1 c"]
    precision: Full | LowRank
    calibration: Calibration | None = None

    @classmethod
    def fit(
        cls,
        images: NormalImages,
        backbone: Backbone,
        *,
        seed: int = 0,
        progress: Progress = silent,
        num_channels: int = 100,
        rank: int | None = None,
    ) -> "PaDiM":
        """Mean and covariance (n - 1 in the denominator, plus 0.01 on the diagonal) of every position.

        Images are streamed: memory is 8·h₁·w₁·c² bytes for the sums (0.25 GB at 224x224 with 100 channels) and that of 32
        images' features, however many images there are.

        Args:
            num_channels: channels kept of all layers together.
            rank: directions per position of :class:`LowRank`; default: the full covariance.
        """
        available = sum(backbone.channels)
        drawn = np.random.default_rng(seed).choice(available, min(num_channels, available), replace=False)
        channels = by_layer(np.sort(drawn), backbone)
        if rank is not None and not 0 < rank <= len(drawn):
            raise OptionError(f"rank {rank} is not between 1 and the number of channels, {len(drawn)}")
        embed_jit = jax.jit(embed)
        h, w, c = jax.eval_shape(embed, backbone, channels, images[0]).shape
        shift, total, squares = np.zeros((h, w, c)), np.zeros((h, w, c)), np.zeros((h, w, c, c))
        # small matrices: a second BLAS thread only waits, for seconds where another process has its core
        with threadpool_limits(1):
            for start in range(0, len(images), CHUNK):
                chunk = []
                for i in range(start, min(start + CHUNK, len(images))):
                    progress("features", i, len(images))
                    chunk.append(np.asarray(embed_jit(backbone, channels, images[i])))
                features = np.stack(chunk, axis=2).astype(np.float64)  # h w n c
                if start == 0:  # sums about a typical value, so that no digits cancel
                    shift = features.mean(axis=2)
                features -= shift[:, :, None]
                total += features.sum(axis=2)
                squares += np.swapaxes(features, 2, 3) @ features
            progress("features", len(images), len(images))
            n, mean = len(images), shift + total / len(images)
            total, squares = total.reshape(h * w, c), squares.reshape(h * w, c, c)
            parts = []
            for start in range(0, h * w, BLOCK):
                progress("covariances", start, h * w)
                block = slice(start, start + BLOCK)
                t = total[block]
                covariance = (squares[block] - t[:, :, None] * t[:, None] / n) / max(n - 1, 1) + REGULARISER * np.eye(c)
                parts.append(Full.of(covariance) if rank is None else LowRank.of(covariance, rank))
            progress("covariances", h * w, h * w)
        fields = [
            jnp.asarray(np.concatenate(field).reshape(h, w, *field[0].shape[1:])) for field in zip(*parts, strict=True)
        ]
        precision = Full(*fields) if rank is None else LowRank(*fields)
        mean = jnp.asarray(mean, jnp.float32)
        return cls(backbone=backbone, size=images.size, channels=channels, mean=mean, precision=precision)

    def locate(
        self, image: Float[Array, "h w 3"], corner: Int[Array | np.ndarray, " 2"]
    ) -> tuple[Float[Array, "_h _w c"], Full | LowRank]:
        """The statistics of the window's positions."""
        stride = min(self.backbone.strides)
        first, shape = jnp.asarray(corner) // stride, (image.shape[0] // stride, image.shape[1] // stride)

        def cut(a: Array) -> Array:
            return jax.lax.dynamic_slice(a, jnp.pad(first, (0, a.ndim - 2)), (*shape, *a.shape[2:]))

        return jax.tree.map(cut, (self.mean, self.precision))

    def raw_scores(
        self, image: Float[Array, "h w 3"], where: tuple[Float[Array, "_h _w c"], Full | LowRank]
    ) -> tuple[Float[Array, "_h _w"]]:
        """Squared Mahalanobis distance, Eq. (7)."""
        mean, precision = where
        return (precision(embed(self.backbone, self.channels, image) - mean),)

    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """The coarse map, of the distance's root: square roots of the score's units."""
        (scores,) = self.scores(image, self.locate(image, ORIGIN))
        return coarse_map(jnp.sqrt(scores), (image.shape[0], image.shape[1]))


def by_layer(drawn: Int[np.ndarray, " c"], backbone: Backbone) -> tuple[Int[Array, " _c_k"], ...]:
    """Ascending channels of all layers together, as channels of each."""
    bounds = itertools.pairwise(np.cumsum([0, *backbone.channels]))
    return tuple(jnp.asarray(drawn[(drawn >= a) & (drawn < b)] - a, jnp.int32) for a, b in bounds)


def embed(
    backbone: Backbone, channels: tuple[Int[Array, " _c_k"], ...], image: Float[Array, "h w 3"]
) -> Float[Array, "h_1 w_1 c"]:
    """The chosen channels of every layer, enlarged to the largest map by nearest neighbour, concatenated."""
    maps = [m[..., kept] for m, kept in zip(extract(backbone, image), channels, strict=True)]
    size = max(m.shape[:2] for m in maps)
    return jnp.concatenate([jax.image.resize(m, (*size, m.shape[2]), "nearest") for m in maps], axis=-1)
