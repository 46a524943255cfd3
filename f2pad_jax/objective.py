"""The objective of Eq. (12) for one window of one image, a function to each equation."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from f2pad_jax.detectors.base import AbstractDetector, Where
from f2pad_jax.penalties import AbstractPenalty, Log
from f2pad_jax.prior import PixelPrior
from f2pad_jax.region import affected_positions
from f2pad_jax.units import Scalar
from f2pad_jax.views import View


class Weights(NamedTuple):
    """The weights of Eq. (12)."""

    alpha1: Scalar
    """Pixel prior."""
    alpha2: Scalar
    """Total variation."""
    beta: Scalar
    """Sparsity; see :func:`sparsity_weight`."""


class Terms(NamedTuple):
    """The four terms of Eq. (12), unweighted."""

    feature: Float[Array, ""]
    prior: Float[Array, ""]
    variation: Float[Array, ""]
    sparsity: Float[Array, ""]


_AS_IT_IS = View()


class Problem(eqx.Module):
    """Eq. (12) for one window: find n, at the image's own resolution. All images in normalised intensity."""

    detector: AbstractDetector
    x: Float[Array, "h w 3"]
    """The input."""
    region: Bool[Array, "h w"]
    """Pixels that may change; elsewhere n = x."""
    where: Where
    """What the detector needs to score this window."""
    affected: tuple[Float[Array, "_h_k _w_k"], ...]
    """Positions that enter l_n, one map per scored layer."""
    weights: Weights
    penalty: AbstractPenalty = Log()
    view: View = _AS_IT_IS
    """How the network sees n."""

    @staticmethod
    def make(
        detector: AbstractDetector,
        x: Float[Array, "h w 3"],
        region: Bool[Array, "h w"],
        where: Where,
        *,
        alpha1: Scalar = 0.01,
        alpha2: Scalar = 1e-4,
        beta: Scalar = 0.0,
        penalty: AbstractPenalty | None = None,
        reach: int | None = 8,
        view: View = _AS_IT_IS,
    ) -> "Problem":
        """The problem of optimising ``region``; ``where`` is what the detector needs to score this window.

        Args:
            detector: what tells normal from anomalous.
            x: the input.
            region: pixels that may change.
            where: of ``detector.locate``.
            alpha1: weight of the pixel prior, for pixels of the network's size; so is
            alpha2: that of total variation. At another resolution there are more pixels, of less weight each.
            beta: of sparsity.
            penalty: l_a.
            reach: positions within this many of the network's pixels of the region enter l_n; None: all.
            view: how the network sees n.
        """
        shapes = [scores.shape for scores in jax.eval_shape(detector.scores, jax.eval_shape(view, x), where)]
        affected = tuple(affected_positions(view.touched(region), shape, reach) for shape in shapes)
        weights = Weights(alpha1 * view.share, alpha2 * view.share**0.5, beta)
        return Problem(detector, x, region, where, affected, weights, penalty or Log(), view)

    def with_beta(self, beta: Scalar) -> "Problem":
        """The same problem with another weight of the sparsity term."""
        return eqx.tree_at(lambda p: p.weights.beta, self, beta)

    def scores(self, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """The scores of another image of this window, looked up afresh."""
        seen = self.view(image)
        return self.detector.scores(seen, self.detector.refresh(seen, self.where))

    def excess(self, image: Float[Array, "h w 3"]) -> tuple[tuple[Float[Array, "_h_k _w_k"], ...], Float[Array, ""]]:
        """The scores above the ordinary level 1, and their sum over the affected positions: the evidence against it."""
        above = tuple(jnp.maximum(s - 1, 0) for s in self.scores(image))
        return above, sum((jnp.sum(a * s) for a, s in zip(self.affected, above, strict=True)), jnp.zeros(()))

    def terms(self, n: Float[Array, "h w 3"]) -> Terms:
        """The four terms at n."""
        return Terms(
            feature_loss(self.detector, self.view(n), self.where, self.affected),
            pixel_prior_loss(self.detector.calibrated.prior, n, self.region),
            total_variation(n),
            self.sparsity(n),
        )

    def __call__(self, n: Float[Array, "h w 3"]) -> Float[Array, ""]:
        """Eq. (12): l_n(n) + α1·l_p1(n) + α2·l_p2(n) + β·l_a(x - n)."""
        return self.smooth(n) + self.weights.beta * self.sparsity(n)

    def weighted(self, terms: Terms) -> Terms:
        """What each of the four adds to Eq. (12)."""
        t, w = terms, self.weights
        return Terms(t.feature, w.alpha1 * t.prior, w.alpha2 * t.variation, w.beta * t.sparsity)

    def smooth(self, n: Float[Array, "h w 3"]) -> Float[Array, ""]:
        """Eq. (12) without its sparsity term."""
        t = self.weighted(self.terms(n))
        return t.feature + t.prior + t.variation

    def sparsity(self, n: Float[Array, "h w 3"]) -> Float[Array, ""]:
        """l_a(x - n)."""
        return sparsity_loss(self.penalty, self.x - n, self.region)


def sparsity_weight(problem: Problem, n0: Float[Array, "h w 3"], sparsity: Scalar) -> Float[Array, ""]:
    """β of Eq. (12), from what the input has to lose.

    β = sparsity · E / (l_a(x - n0) - l_a(0)), where E is the sum over the affected positions of the input's scores above
    the ordinary level 1. So the sparsity term's whole range, from n0 to x, is a fixed multiple of the evidence against x,
    for faint defects and glaring ones, and however much of the defect m0 has found. (The
    denominator is floored at 1, which only an n0 equal to x reaches.)

    Departure: the paper takes β0 / Σm0 with β0 tuned per category; where m0 has found a third of a defect, that β is three
    times too large and n returns to x. ``Settings.beta0`` selects :func:`paper_weight`.
    """
    _, evidence = problem.excess(problem.x)
    span = problem.sparsity(n0) - problem.sparsity(problem.x)
    return sparsity * evidence / jnp.maximum(span, 1.0)


def paper_weight(beta0: Scalar, coarse_mask: Bool[Array, "h w"]) -> Float[Array, ""]:
    """β = β0 / Σm0 (Section III-E4)."""
    return beta0 / jnp.maximum(jnp.sum(coarse_mask), 1)


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


def sparsity_loss(penalty: AbstractPenalty, a: Float[Array, "h w 3"], region: Bool[Array, "h w"]) -> Float[Array, ""]:
    """l_a of Eq. (8), summed over the region (elsewhere it is constant)."""
    return jnp.sum(jnp.where(region, penalty(norm(a)), 0.0))


def norm(v: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
    """Euclidean length over channels, with gradient 0 at 0."""
    square = jnp.sum(v**2, axis=-1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
