"""The objective of Eq. (12) for one window of one image, a function to each equation."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax.detectors.base import AbstractDetector, Where
from f2pad_jax.prior import PixelPrior
from f2pad_jax.region import affected_positions
from f2pad_jax.settings import Settings


class Weights(NamedTuple):
    """The weights of Eq. (12)."""

    alpha1: Float[Array, ""]
    """Pixel prior."""
    alpha2: Float[Array, ""]
    """Total variation."""
    beta: Float[Array, ""]
    """Sparsity; see :func:`sparsity_weight`."""
    epsilon: Float[Array, ""]
    """ε of Eq. (8), squared normalised intensity."""


class Terms(NamedTuple):
    """The four terms of Eq. (12), unweighted."""

    feature: Float[Array, ""]
    prior: Float[Array, ""]
    variation: Float[Array, ""]
    sparsity: Float[Array, ""]


class Problem(eqx.Module):
    """Eq. (12) for one window: find n. All images in normalised intensity."""

    detector: AbstractDetector
    x: Float[Array, "h w 3"]
    region: Bool[Array, "h w"]
    """Pixels that may change; elsewhere n = x."""
    where: Where
    """What the detector needs to score this window."""
    affected: tuple[Float[Array, "_h_k _w_k"], ...]
    """Positions that enter l_n, one map per scored layer."""
    weights: Weights

    @staticmethod
    def make(
        detector: AbstractDetector, x: Float[Array, "h w 3"], region: Bool[Array, "h w"], where: Where, settings: Settings
    ) -> "Problem":
        """The problem of optimising ``region``, with β = 0; ``where`` is the detector's view of the window."""
        shapes = [scores.shape for scores in jax.eval_shape(detector.scores, x, where)]
        affected = tuple(affected_positions(region, shape, settings.reach) for shape in shapes)
        values = (settings.alpha1, settings.alpha2, 0.0, settings.epsilon)
        return Problem(detector, x, region, where, affected, Weights(*map(jnp.asarray, values)))

    def with_beta(self, beta: Float[Array, ""] | float) -> "Problem":
        """The same problem with another weight of the sparsity term."""
        return eqx.tree_at(lambda p: p.weights.beta, self, jnp.asarray(beta))

    def terms(self, n: Float[Array, "h w 3"]) -> Terms:
        """The four terms at n."""
        return Terms(
            feature_loss(self.detector, n, self.where, self.affected),
            pixel_prior_loss(self.detector.calibrated.prior, n, self.region),
            total_variation(n),
            log_penalty(self.x - n, self.region, self.weights.epsilon),
        )

    def __call__(self, n: Float[Array, "h w 3"]) -> Float[Array, ""]:
        """Eq. (12): l_n(n) + α1·l_p1(n) + α2·l_p2(n) + β·l_a(x - n)."""
        t, w = self.terms(n), self.weights
        return t.feature + w.alpha1 * t.prior + w.alpha2 * t.variation + w.beta * t.sparsity


def sparsity_weight(
    problem: Problem, n0: Float[Array, "h w 3"], coarse_area: Int[Array, ""], settings: Settings
) -> Float[Array, ""]:
    """β of Eq. (12), from what the input has to lose.

    β = sparsity · E / (l_a(x - n0) - l_a(0)), where E is the sum over the affected positions of the input's scores above
    the ordinary level 1. So the sparsity term's whole range, from n0 to x, is a fixed multiple of the evidence against x,
    for faint defects and glaring ones, and however much of the defect m0 has found. (The
    denominator is floored at 1, which only an n0 equal to x reaches.)

    Departure: the paper takes β0 / Σm0 with β0 tuned per category; where m0 has found a third of a defect, that β is three
    times too large and n returns to x. ``settings.beta0`` selects the paper's rule.
    """
    if settings.beta0 is not None:
        return settings.beta0 / jnp.maximum(coarse_area, 1)
    where = problem.detector.refresh(problem.x, problem.where)
    scores = problem.detector.scores(problem.x, where)
    evidence = sum(jnp.sum(a * jnp.maximum(s - 1, 0)) for a, s in zip(problem.affected, scores, strict=True))
    region, epsilon = problem.region, problem.weights.epsilon
    zero = jnp.zeros_like(problem.x)
    span = log_penalty(problem.x - n0, region, epsilon) - log_penalty(zero, region, epsilon)
    return settings.sparsity * evidence / jnp.maximum(span, 1.0)


def feature_loss(
    detector: AbstractDetector, n: Float[Array, "h w 3"], where: Where, affected: tuple[Float[Array, "_h_k _w_k"], ...]
) -> Float[Array, ""]:
    """l_n(n): the sum of the anomaly scores of the affected positions (Section III-B), in units of a mean normal score."""
    return sum(
        (jnp.sum(weight * score) for weight, score in zip(affected, detector.scores(n, where), strict=True)), jnp.zeros(())
    )


def pixel_prior_loss(prior: PixelPrior, n: Float[Array, "h w 3"], region: Bool[Array, "h w"]) -> Float[Array, ""]:
    """Eq. (10), summed over the region (elsewhere it is constant)."""
    return jnp.sum(jnp.where(region, prior(n), 0.0))


def total_variation(n: Float[Array, "h w 3"]) -> Float[Array, ""]:
    """Eq. (11): isotropic over channels, anisotropic over directions."""
    return jnp.sum(norm(n[1:] - n[:-1])) + jnp.sum(norm(n[:, 1:] - n[:, :-1]))


def log_penalty(
    a: Float[Array, "h w 3"], region: Bool[Array, "h w"], epsilon: Float[Array, ""] | float
) -> Float[Array, ""]:
    """Eq. (8): Σ log(√(|a|² + ε) + |a|), summed over the region (elsewhere it is constant)."""
    size = norm(a)
    return jnp.sum(jnp.where(region, jnp.log(jnp.sqrt(size**2 + epsilon) + size), 0.0))


def norm(v: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
    """Euclidean length over channels, with gradient 0 at 0."""
    square = jnp.sum(v**2, axis=-1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
