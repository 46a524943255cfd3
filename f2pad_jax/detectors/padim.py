"""PaDiM (Defard et al., ICPR 2020): a Gaussian of the features at every position, Eq. (7)."""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int
from threadpoolctl import threadpool_limits

from f2pad_jax.backbones.backbone import Backbone
from f2pad_jax.detectors.base import ORIGIN, AbstractDetector, Calibration, NormalImages, coarse_map, extract
from f2pad_jax.errors import OptionError
from f2pad_jax.progress import Progress, silent

REGULARISER = 0.01
"""Variance added to every channel, on the diagonal of the covariances."""
CHUNK = 32
"""Number of images whose features are in memory at a time."""
BLOCK = 256
"""Number of positions whose covariances are decomposed at a time."""


class Full(eqx.Module):
    """Precision matrix of every position."""

    precision: Float[Array, "h_1 w_1 c c"]
    """Inverse covariances, symmetric."""

    def __call__(self, difference: Float[Array, "h_1 w_1 c"]) -> Float[Array, "h_1 w_1"]:
        """Returns the squared Mahalanobis distance dᵀ·Σ⁻¹·d."""
        return quadratic(self.precision, difference)

    @staticmethod
    def of(covariance: Float[np.ndarray, "p c c"]) -> tuple[np.ndarray, ...]:
        """Computes the fields from float64 covariances."""
        inverse = np.linalg.inv(covariance)
        return (((inverse + np.swapaxes(inverse, 1, 2)) / 2).astype(np.float32),)

    def covariance(self, row: int) -> Float[np.ndarray, "w_1 c c"]:
        """Returns the covariances of a row of positions, in float64."""
        return np.linalg.inv(np.asarray(self.precision[row], np.float64))


@jax.custom_jvp
def quadratic(matrix: Float[Array, "*b c c"], vector: Float[Array, "*b c"]) -> Float[Array, "*b"]:
    """Returns vᵀ·M·v for symmetric matrices. Value and gradient together read M, PaDiM's largest array, only once."""
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
    """Precision with few directions per position and one variance for all others (probabilistic PCA).

    The paper leaves this form to a future study (Section IV-D1). It is exact if there are no more images than directions.
    """

    basis: Float[Array, "h_1 w_1 r c"]
    """Directions of largest variance, orthonormal rows."""
    shrinkage: Float[Array, "h_1 w_1 r"]
    """Factor 1 - σ/√λ of each direction, where λ is its variance."""
    rest: Float[Array, "h_1 w_1"]
    """Inverse standard deviation 1/σ of all other directions."""

    def __call__(self, difference: Float[Array, "h_1 w_1 c"]) -> Float[Array, "h_1 w_1"]:
        """Returns the squared Mahalanobis distance ‖d - Uᵀ(shrinkage · U·d)‖² / σ²."""
        along = jnp.einsum("hwrc,hwc->hwr", self.basis, difference)
        white = difference - jnp.einsum("hwrc,hwr->hwc", self.basis, self.shrinkage * along)
        return jnp.sum((white * self.rest[..., None]) ** 2, axis=-1)

    @staticmethod
    def of(covariance: Float[np.ndarray, "p c c"], rank: int) -> tuple[np.ndarray, ...]:
        """Computes the fields from float64 covariances; the likeliest σ² is the mean variance of all other directions."""
        variances, directions = np.linalg.eigh(covariance)  # ascending
        variances = np.maximum(variances, REGULARISER)  # only rounding makes them smaller
        rest = variances[:, :-rank].mean(axis=1) if rank < variances.shape[1] else variances[:, 0]
        basis = np.swapaxes(directions[:, :, -rank:], 1, 2)
        shrinkage = 1 - np.sqrt(rest[:, None] / variances[:, -rank:])
        return basis.astype(np.float32), shrinkage.astype(np.float32), (1 / np.sqrt(rest)).astype(np.float32)

    def covariance(self, row: int) -> Float[np.ndarray, "w_1 c c"]:
        """Returns the covariances of a row of positions, in float64."""
        basis, shrinkage, rest = (np.asarray(a[row], np.float64) for a in (self.basis, self.shrinkage, self.rest))
        variance = 1 / rest[..., None] ** 2
        excess = variance * (1 / (1 - shrinkage) ** 2 - 1)
        along = np.swapaxes(basis, -1, -2) @ (excess[..., None] * basis)
        return along + variance[..., None] * np.eye(basis.shape[-1])


class LeftOut(eqx.Module):
    """Precision of the fit without an image, for this image.

    Without one of n vectors, the mean moves by d/(n-1) and the covariance loses the dyad of d. The distance follows from
    the distance q of the whole fit (Sherman & Morrison 1950)::

        n²(n-2) / (n-1)³ · q / (1 - n·q / (n-1)²)

    It is exact but for the regulariser, which counts (n-1)/(n-2) times.
    """

    precision: Full
    """Precision of the fit to all images."""
    num_images: int = eqx.field(static=True)
    """Number n of images of the fit, static."""

    def __call__(self, difference: Float[Array, "h_1 w_1 c"]) -> Float[Array, "h_1 w_1"]:
        """Returns the squared Mahalanobis distance of a training image to the fit without this image."""
        n, q = self.num_images, self.precision(difference)
        return n**2 * (n - 2) / (n - 1) ** 3 * q / jnp.maximum(1 - n * q / (n - 1) ** 2, 1e-4)


class PaDiM(AbstractDetector):
    """Detector by the squared Mahalanobis distance to the Gaussian of each position, Eq. (7).

    Feature maps are enlarged to the largest by nearest neighbour; a random subset of their channels is kept. The coarse map
    shows the distance without the square, as in the authors' code. The statistics hold for images of the fitted size only.
    """

    backbone: Backbone
    """Frozen feature extractor."""
    size: tuple[int, int] = eqx.field(static=True)
    """Height and width of the images of the fit, pixels, static."""
    channels: tuple[Int[Array, " _c_k"], ...]
    """Indices of the channels kept, ascending, per layer."""
    mean: Float[Array, "h_1 w_1 c"]
    """Mean features of every position."""
    precision: Full | LowRank | LeftOut
    """Precision of the features at every position."""
    num_images: int | None = eqx.field(static=True, default=None)
    """Number of images of the fit and of later updates, static; None: unknown."""
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
        num_channels: int = 100,
        rank: int | None = None,
    ) -> "PaDiM":
        """Fits mean and covariance of every position, with n - 1 in the denominator and 0.01 added to the diagonal.

        A temporary file keeps the features, for other fits to these images. Memory holds the features of 32 images and
        8·h₁·w₁·c² bytes of sums (0.25 GB at 224x224 with 100 channels).

        Args:
            images: normal images at the detector's size.
            backbone: frozen feature extractor.
            seed: seed of the random channels.
            progress: function that receives stage, number done and total.
            num_channels: number of channels kept, all layers together.
            rank: number of directions per position of :class:`LowRank`; None: the full covariance.

        Raises:
            OptionError: the rank is not between 1 and the number of channels.
        """
        available = sum(backbone.channels)
        drawn = np.random.default_rng(seed).choice(available, min(num_channels, available), replace=False)
        channels = by_layer(np.sort(drawn), backbone)
        if rank is not None and not 0 < rank <= len(drawn):
            raise OptionError(f"rank {rank} is not between 1 and the number of channels, {len(drawn)}")
        embed_jit, key = partial(jax.jit(embed), backbone, channels), ("padim", backbone.key, tuple(drawn))
        h, w, c = jax.eval_shape(embed, backbone, channels, images[0]).shape
        shift, total, squares = np.zeros((h, w, c)), np.zeros((h, w, c)), np.zeros((h, w, c, c))
        # small matrices gain nothing from a second BLAS thread
        with threadpool_limits(1):
            for start in range(0, len(images), CHUNK):
                chunk = []
                for i in range(start, min(start + CHUNK, len(images))):
                    progress("features", i, len(images))
                    chunk.append(images.computed(key, embed_jit, i))
                features = np.stack(chunk, axis=2).astype(np.float64)  # h w n c
                if start == 0:  # sums of differences from a typical value lose no digits
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
        precision, mean = _joined(parts, (h, w)), jnp.asarray(mean, jnp.float32)
        fields = {"channels": channels, "mean": mean, "precision": precision, "num_images": n}
        return cls(backbone=backbone, size=images.size, **fields)

    def extended(self, images: NormalImages) -> "PaDiM":
        """Returns the detector with mean and covariance of the images of the fit and these images together.

        Let d = x - mean for each of m new vectors, after n vectors of the fit. The squares about the new mean add up to::

            S' = S + Σ d·dᵀ - (Σ d)·(Σ d)ᵀ / (n + m)

        S is n - 1 times the stored covariance without the regulariser, which is added again at the end. A full covariance
        equals a refit's up to single precision. For a low rank, S has one mean variance for all directions that were
        dropped.

        Raises:
            OptionError: the number of images of the fit is unknown.
        """
        n, m, precision = self.num_images, len(images), self.precision
        if n is None or isinstance(precision, LeftOut):
            raise OptionError(
                "the number of images of the fit is unknown, as in a model of anomalib; fit a model to all images"
            )
        h, w, c = self.mean.shape
        key = ("padim", self.backbone.key, tuple(np.concatenate(self.channels)), "kept")
        features = [images.computed(key, partial(jax.jit(embed), self.backbone, self.channels), i) for i in range(m)]
        means, parts = [], []
        with threadpool_limits(1):
            for row in range(h):
                mean = np.asarray(self.mean[row], np.float64)
                d = np.stack([f[row] for f in features], axis=1) - mean[:, None]  # w m c
                total = d.sum(axis=1)
                covariance = precision.covariance(row) - REGULARISER * np.eye(c)
                scatter = (n - 1) * covariance + np.swapaxes(d, 1, 2) @ d - total[:, :, None] * total[:, None] / (n + m)
                covariance = scatter / (n + m - 1) + REGULARISER * np.eye(c)
                low = isinstance(precision, LowRank)
                parts.append(LowRank.of(covariance, precision.basis.shape[2]) if low else Full.of(covariance))
                means.append(mean + total / (n + m))
        mean = jnp.asarray(np.stack(means), jnp.float32)
        return dataclasses.replace(self, mean=mean, precision=_joined(parts, (h, w)), num_images=n + m)

    def left_out(self, num_images: int) -> "PaDiM | None":
        """Returns the detector with the precisions of :class:`LeftOut`; None for a low rank or fewer than three images."""
        if not isinstance(self.precision, Full) or num_images < 3:
            return None
        return dataclasses.replace(self, precision=LeftOut(self.precision, num_images))

    def locate(
        self, image: Float[Array, "h w 3"], corner: Int[Array | np.ndarray, " 2"]
    ) -> tuple[Float[Array, "_h _w c"], Full | LowRank | LeftOut]:
        """Returns the statistics of the window's positions."""
        stride = min(self.backbone.strides)
        first, shape = jnp.asarray(corner) // stride, (image.shape[0] // stride, image.shape[1] // stride)

        def cut(a: Array) -> Array:
            return jax.lax.dynamic_slice(a, jnp.pad(first, (0, a.ndim - 2)), (*shape, *a.shape[2:]))

        return jax.tree.map(cut, (self.mean, self.precision))

    def raw_scores(
        self, image: Float[Array, "h w 3"], context: tuple[Float[Array, "_h _w c"], Full | LowRank | LeftOut]
    ) -> tuple[Float[Array, "_h _w"]]:
        """Returns the squared Mahalanobis distance, Eq. (7)."""
        mean, precision = context
        return (precision(embed(self.backbone, self.channels, image) - mean),)

    def anomaly_map(self, image: Float[Array, "h w 3"]) -> Float[Array, "h w"]:
        """Returns the coarse map of the distance, the square root of the scores."""
        (scores,) = self.scores(image, self.locate(image, ORIGIN))
        return coarse_map(jnp.sqrt(scores), (image.shape[0], image.shape[1]))


def _joined(parts: Sequence[tuple[np.ndarray, ...]], size: tuple[int, int]) -> Full | LowRank:
    """Returns the precisions of all positions from the precisions of consecutive blocks of positions."""
    fields = [jnp.asarray(np.concatenate(field).reshape(*size, *field[0].shape[1:])) for field in zip(*parts, strict=True)]
    return Full(*fields) if len(fields) == 1 else LowRank(*fields)


def by_layer(channels: Int[np.ndarray, " c"], backbone: Backbone) -> tuple[Int[Array, " _c_k"], ...]:
    """Converts ascending channel indices of the concatenated layers to channel indices within each layer."""
    bounds = itertools.pairwise(np.cumsum([0, *backbone.channels]))
    return tuple(jnp.asarray(channels[(channels >= a) & (channels < b)] - a, jnp.int32) for a, b in bounds)


def embed(
    backbone: Backbone, channels: tuple[Int[Array, " _c_k"], ...], image: Float[Array, "h w 3"]
) -> Float[Array, "h_1 w_1 c"]:
    """Returns the kept channels of all layers, enlarged to the largest map by nearest neighbour and concatenated."""
    maps = [m[..., kept] for m, kept in zip(extract(backbone, image), channels, strict=True)]
    size = max(m.shape[:2] for m in maps)
    return jnp.concatenate([jax.image.resize(m, (*size, m.shape[2]), "nearest") for m in maps], axis=-1)
