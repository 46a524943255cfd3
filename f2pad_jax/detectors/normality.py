"""Verdict on a whole image: its score, and its p-value against the scores of normal images outside the fit."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num
from scipy.stats import beta

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


class Normality(eqx.Module):
    """Distribution of the anomaly maps of normal images that the detector was not fitted to."""

    mean: Float[Array, "h w"]
    """Mean of the maps at each pixel, smoothed."""
    spread: Float[Array, "h w"]
    """Standard deviation of the maps at each pixel, smoothed."""
    scores: Float[Array, " n"]
    """Scores of the normal images, ascending; statistics of other normal images gave each score."""

    @staticmethod
    def of(maps: Num[np.ndarray, "n h w"]) -> "Normality":
        """Measures the distribution of maps of normal images, in :data:`FOLDS` parts."""
        count, num_folds = len(maps), min(FOLDS, len(maps))
        parts = [np.arange(fold, count, num_folds) for fold in range(num_folds)]
        scores = np.zeros(count, np.float32)
        for part in parts:
            others = np.setdiff1d(np.arange(count), part) if num_folds > 1 else part
            mean, spread = statistics(maps[others])
            scores[part] = [image_score(jnp.asarray(maps[i], jnp.float32), mean, spread) for i in part]
        return Normality(*statistics(maps), jnp.asarray(np.sort(scores)))

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


def image_score(
    anomaly_map: Float[Array, "h w"], mean: Float[Array, "h w"], spread: Float[Array, "h w"]
) -> Float[Array, ""]:
    """Returns the mean of the highest deviations of a map from the maps of normal images, in standard deviations.

    The deviation of a pixel is (map - mean) / spread. The mean is over the share :data:`TOP` of the pixels. Normal parts
    vary more at some places than at others, and the highest value of the map itself would be high there.
    """
    deviations = ((anomaly_map - mean) / spread).ravel()
    return jnp.mean(jax.lax.top_k(deviations, max(int(TOP * deviations.size), 1))[0])


def statistics(maps: Num[np.ndarray, "n h w"]) -> tuple[Float[Array, "h w"], Float[Array, "h w"]]:
    """Returns the mean and the standard deviation of maps at each pixel, smoothed.

    The variance of each pixel is averaged with the variance of all values, which counts for :data:`PRIOR_IMAGES` images:
    a few images do not show the variance of every pixel.
    """
    n, maps = len(maps), np.asarray(maps, np.float32)
    variance = (n * maps.var(axis=0) + PRIOR_IMAGES * maps.var()) / (n + PRIOR_IMAGES)
    mean, variance = (smoothed(jnp.asarray(values), SMOOTHING) for values in (maps.mean(axis=0), variance))
    return mean, jnp.sqrt(jnp.maximum(variance, 1e-12))


def certified_rate(num_above: int, num_normals: int, confidence: float = 0.95) -> float:
    """Returns the upper bound of a false-alarm rate, if ``num_above`` of the normal images exceed the limit.

    The bound is exact for independent images (Clopper & Pearson 1934).
    """
    if num_above >= num_normals:
        return 1.0
    return float(beta.ppf(confidence, num_above + 1, num_normals - num_above))


def folds(count: int, seed: int, num_folds: int = FOLDS) -> Sequence[list[int]]:
    """Returns the ascending indices of each part of ``count`` images, drawn at random; at least one image a part."""
    order = np.random.default_rng(seed).permutation(count)
    return [sorted(map(int, part)) for part in np.array_split(order, min(num_folds, count))]
