"""Verdict on a whole image: its score, and its p-value against the scores of normal images outside the fit."""

import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num
from scipy.special import betaincinv, ndtr, stdtrit

from f2pad_jax.images._smoothing import smoothed
from f2pad_jax.images.pixels import Scalar

TOP = 0.005
"""Share of the pixels whose mean deviation is the score: the highest ones."""
SMOOTHING = 8.0
"""Standard deviation of the Gaussian that smooths mean and variance of the maps, pixels."""
PRIOR_IMAGES = 8
"""Number of images that the variance over all pixels counts for beside the variance of each pixel."""
FOLDS = 5
"""Number of parts of the normal images; the scores of a part are measured with statistics of the other parts."""
PRIOR_EXCESSES = 4
"""Number of excesses that the prior mean counts for beside the excesses in the tail."""
PRIOR_EXCESS = 1.0
"""Prior mean excess of the tail, standard deviations: a few scores do not show how long the tail is."""
DEVIATIONS = 3.0
"""Number of standard deviations from the mean of many maps' medians to :attr:`Normality.level`."""


class Normality(eqx.Module):
    """Distribution of the anomaly maps of normal images that the detector was not fitted to."""

    mean: Float[Array, "h w"]
    """Mean of the maps at each pixel, smoothed."""
    spread: Float[Array, "h w"]
    """Standard deviation of the maps at each pixel, smoothed."""
    scores: Float[Array, " n"]
    """Scores of the normal images, ascending; statistics of other normal images gave each score."""
    defects: Float[Array, " k"]
    """Scores of synthetic defects, ascending."""
    level: Float[Array, ""]
    """Highest median of the map of an image that resembles the normal images as a whole."""
    medians: Float[Array, " n"]
    """Median of the map of each normal image, ascending."""
    maxima: Float[Array, " n"]
    """Maximum of the map of each normal image, ascending."""

    @staticmethod
    def of(
        maps: Num[np.ndarray, "n h w"],
        defects: Num[np.ndarray, "k h w"] | None = None,
        parts: Sequence[Sequence[int]] | None = None,
    ) -> "Normality":
        """Measures the distribution of maps of normal images.

        Args:
            maps: maps of images that the detector was not fitted to.
            defects: maps of synthetic defects on such images.
            parts: indices of the maps in each part; statistics of the other parts give the scores of a part. Default:
                :data:`FOLDS` parts.
        """
        parts = parts or [list(range(fold, len(maps), FOLDS)) for fold in range(min(FOLDS, len(maps)))]
        moments = [Moments.of(maps[i] for i in part) for part in parts]
        scores = np.zeros(len(maps), np.float32)
        for k, part in enumerate(parts):
            others = moments[:k] + moments[k + 1 :] or moments
            mean, spread = Moments.together(others).statistics()
            for i in part:
                scores[i] = image_score(jnp.asarray(maps[i], jnp.float32), mean, spread)
        mean, spread = Moments.together(moments).statistics()
        found = [image_score(jnp.asarray(m, jnp.float32), mean, spread) for m in (() if defects is None else defects)]
        return Normality._of(mean, spread, scores, found, *_levels(maps))

    @staticmethod
    def _of(mean: Array, spread: Array, scores, defects, medians, maxima) -> "Normality":
        """Sorts the values of all images, and adds the level of their medians."""
        scores, defects, medians, maxima = (
            jnp.asarray(np.sort(np.asarray(values, np.float32))) for values in (scores, defects, medians, maxima)
        )
        return Normality(mean, spread, scores, defects, jnp.float32(highest_level(medians.tolist())), medians, maxima)

    def extended(self, maps: Num[np.ndarray, "m h w"]) -> "Normality":
        """Returns the distribution with the maps of further normal images.

        Mean and spread stay: the scores of all images then have one unit.

        Args:
            maps: maps of images that neither the detector nor this distribution has seen.
        """
        values = [float(self.score(jnp.asarray(m, jnp.float32))) for m in maps], *_levels(maps)
        together = (np.append(old, new) for old, new in zip((self.scores, self.medians, self.maxima), values, strict=True))
        scores, medians, maxima = together
        return Normality._of(self.mean, self.spread, scores, self.defects, medians, maxima)

    def score(self, anomaly_map: Float[Array, "h w"]) -> Float[Array, ""]:
        """Returns the score of an image by its map: :func:`image_score`."""
        return image_score(anomaly_map, self.mean, self.spread)

    def p_value(self, score: Float[Array, ""]) -> Float[Array, ""]:
        """Returns the probability that a normal image has this score or a higher one.

        Let k = ⌈√n⌉ for n normal scores. Up to the k-th highest score, the p-value is the rank's. It needs no model
        (conformal prediction, Vovk et al. 2005)::

            p = (1 + number of scores at least as high) / (n + 1)

        Beyond, excesses are taken as exponential. Their rate has a gamma prior, and the p-value is predictive::

            p = (k + 1) / (n + 1) · (1 + excess / (K·M))**-K

        K is k + :data:`PRIOR_EXCESSES`. M averages the mean of the k excesses with :data:`PRIOR_EXCESS`. The mean is
        estimated by the median: a defective image among the normal ones hardly changes it.
        """
        k, start, mean, share = self._tail
        n = len(self.scores)
        rank = (1 + jnp.sum(self.scores >= score)) / (n + 1)
        tail = share * (1 + jnp.maximum(score - start, 0) / (k * mean)) ** -k
        return jnp.where(score > start, tail, rank)

    def limit(self, false_alarms: Scalar) -> Float[Array, ""]:
        """Returns the score that this share of normal images exceeds, the inverse of :meth:`p_value`; -inf for 1."""
        k, start, mean, share = self._tail
        n = len(self.scores)
        place = jnp.ceil((n + 1) * (1 - jnp.asarray(false_alarms)) - 1e-4).astype(int) - 1
        counted = jnp.where(place < 0, -jnp.inf, self.scores[jnp.clip(place, 0, n - 1)])
        tail = start + k * mean * ((share / jnp.maximum(false_alarms, 1e-12)) ** (1 / k) - 1)
        return jnp.where(jnp.asarray(false_alarms) >= share, counted, tail)

    @property
    def _tail(self) -> tuple[int, Float[Array, ""], Float[Array, ""], float]:
        """Number K and mean M of the excesses, start of the tail, and share of normal images beyond the start."""
        n = len(self.scores)
        k = math.ceil(math.sqrt(n))
        start = self.scores[max(n - k - 1, 0)]
        mean = jnp.median(self.scores[n - k :] - start) / math.log(2)
        total = k + PRIOR_EXCESSES
        mean = (k * mean + PRIOR_EXCESSES * PRIOR_EXCESS) / total
        return total, start, mean, (k + 1) / (n + 1)


def _levels(maps: Num[np.ndarray, "n h w"]) -> tuple[list[float], list[float]]:
    """Returns the median and the maximum of each map."""
    return [float(np.median(m)) for m in maps], [float(m.max()) for m in maps]


def image_score(
    anomaly_map: Float[Array, "h w"], mean: Float[Array, "h w"], spread: Float[Array, "h w"]
) -> Float[Array, ""]:
    """Returns the mean of the highest deviations of a map from the maps of normal images, in standard deviations.

    The deviation of a pixel is (map - mean) / spread. The mean is over the share :data:`TOP` of the pixels. Normal parts
    vary more at some places than at others, and the highest value of the map itself would be high there.
    """
    deviations = ((anomaly_map - mean) / spread).ravel()
    return jnp.mean(jax.lax.top_k(deviations, max(int(TOP * deviations.size), 1))[0])


def highest_level(levels: Sequence[float]) -> float:
    """Returns the level that a further Gaussian value exceeds as rarely as :data:`DEVIATIONS` standard deviations.

    Mean and deviation are estimated from the values (Student's prediction interval). Infinity for a single value.
    """
    n = len(levels)
    if n < 2:
        return math.inf
    factor = stdtrit(n - 1, ndtr(DEVIATIONS)) * math.sqrt(1 + 1 / n)
    return float(np.mean(levels) + factor * np.std(levels, ddof=1))


class Moments(NamedTuple):
    """Sums over maps."""

    count: int
    """Number of maps."""
    total: Float[np.ndarray, "h w"]
    """Sum of the maps."""
    squares: Float[np.ndarray, "h w"]
    """Sum of their squares."""

    @staticmethod
    def of(maps: Iterable[Num[np.ndarray, "h w"]]) -> "Moments":
        """Computes the sums, one map at a time."""
        exact = (np.asarray(m, np.float64) for m in maps)
        return Moments.together(Moments(1, m, m * m) for m in exact)

    @staticmethod
    def together(moments: Iterable["Moments"]) -> "Moments":
        """Returns the sums over all maps."""
        return functools.reduce(lambda a, b: Moments(a.count + b.count, a.total + b.total, a.squares + b.squares), moments)

    def statistics(self) -> tuple[Float[Array, "h w"], Float[Array, "h w"]]:
        """Returns the mean and the standard deviation of the maps at each pixel, smoothed.

        The variance of each pixel is averaged with the variance of all values, which counts for :data:`PRIOR_IMAGES`
        images: a few images do not show the variance of every pixel.
        """
        mean, square = self.total / self.count, self.squares / self.count
        of_all = square.mean() - mean.mean() ** 2
        variance = (self.count * (square - mean**2) + PRIOR_IMAGES * of_all) / (self.count + PRIOR_IMAGES)
        smooth_mean, variance = (smoothed(jnp.asarray(v, jnp.float32), SMOOTHING) for v in (mean, variance))
        return smooth_mean, jnp.sqrt(jnp.maximum(variance, 1e-12))


def certified_rate(num_above: int, num_normals: int, confidence: float = 0.95) -> float:
    """Returns the upper bound of a false-alarm rate, if ``num_above`` of the normal images exceed the limit.

    The bound is exact for independent images (Clopper & Pearson 1934).
    """
    if num_above >= num_normals:
        return 1.0
    return float(betaincinv(num_above + 1, num_normals - num_above, confidence))


def folds(count: int, seed: int, num_folds: int = FOLDS, groups: Sequence[Hashable] | None = None) -> Sequence[list[int]]:
    """Returns the ascending indices of each part of ``count`` images, drawn at random; at least one image a part.

    Args:
        count: number of images.
        seed: seed of the draw.
        num_folds: largest number of parts.
        groups: group of each image; all images of a group are in one part. Default: every image is a group.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups if groups is not None else range(count)):
        members.setdefault(group, []).append(i)
    names = list(members)
    parts: list[list[int]] = [[] for _ in range(min(num_folds, len(names)))]
    for k in np.random.default_rng(seed).permutation(len(names)):
        min(parts, key=len).extend(members[names[k]])
    return [sorted(part) for part in parts]
