"""The objective of Eq. (12) for one window of one image, one function per equation."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from f2pad_jax.detectors.base import AbstractDetector, Context
from f2pad_jax.detectors.prior import PixelPrior
from f2pad_jax.images._morphology import dilate
from f2pad_jax.images._views import View
from f2pad_jax.images.pixels import HIGHEST, LOWEST, Scalar
from f2pad_jax.objective.penalties import AbstractPenalty, Log


class Weights(NamedTuple):
    """Weights of Eq. (12)."""

    alpha1: Scalar
    """Weight of the pixel prior."""
    alpha2: Scalar
    """Weight of total variation."""
    beta: Scalar
    """Weight of sparsity, from :func:`sparsity_weight` or :func:`paper_weight`."""


class Terms(NamedTuple):
    """Values of the four terms of Eq. (12), without their weights."""

    feature: Float[Array, ""]
    """Feature loss l_n(n)."""
    prior: Float[Array, ""]
    """Pixel prior l_p1(n)."""
    variation: Float[Array, ""]
    """Total variation l_p2(n)."""
    sparsity: Float[Array, ""]
    """Sparsity l_a(x - n)."""


_IDENTITY = View()


class Problem(eqx.Module):
    """Eq. (12) for one window, a function of n at the image's own resolution. Images are in normalised intensity."""

    detector: AbstractDetector
    """Detector whose scores of n are minimised."""
    x: Float[Array, "h w 3"]
    """Input image."""
    region: Bool[Array, "h w"]
    """Pixels that may change; elsewhere n = x."""
    context: Context
    """Context of the detector for this window, from ``detector.locate``."""
    affected: tuple[Float[Array, "_h_k _w_k"], ...]
    """Feature positions that enter l_n: for each scored layer, a map that is 1 there and 0 elsewhere."""
    weights: Weights
    """Weights of the terms."""
    penalty: AbstractPenalty = Log()
    """Sparsity penalty l_a."""
    view: View = _IDENTITY
    """Linear map from n to the image that the network sees."""

    @staticmethod
    def make(
        detector: AbstractDetector,
        x: Float[Array, "h w 3"],
        region: Bool[Array, "h w"],
        context: Context,
        *,
        alpha1: Scalar = 0.01,
        alpha2: Scalar = 1e-4,
        beta: Scalar = 0.0,
        penalty: AbstractPenalty | None = None,
        reach: int | None = 8,
        view: View = _IDENTITY,
    ) -> "Problem":
        """Returns the problem of optimising the pixels of ``region``.

        Args:
            detector: detector whose scores of n are minimised.
            x: input image.
            region: pixels that may change.
            context: result of ``detector.locate`` for this window.
            alpha1: weight of the pixel prior, per pixel of the network. A smaller pixel of x counts by its relative area.
            alpha2: weight of total variation, per pixel of the network. A smaller pixel of x counts by its relative side.
            beta: weight of sparsity.
            penalty: sparsity penalty l_a; default: :class:`Log`.
            reach: distance from the region within which positions enter l_n, pixels of the network; None: all positions.
            view: map from n to the image that the network sees.
        """
        shapes = [scores.shape for scores in jax.eval_shape(detector.scores, jax.eval_shape(view, x), context)]
        affected = tuple(affected_positions(view.touched(region), shape, reach) for shape in shapes)
        weights = Weights(alpha1 * view.share, alpha2 * view.share**0.5, beta)
        return Problem(detector, x, region, context, affected, weights, penalty or Log(), view)

    def with_beta(self, beta: Scalar) -> "Problem":
        """Returns this problem with another weight of the sparsity term."""
        return eqx.tree_at(lambda p: p.weights.beta, self, beta)

    def project(self, n: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
        """Returns the nearest valid image: x outside the region, pixel values clipped to 0..1 inside."""
        return jnp.where(self.region[..., None], jnp.clip(n, LOWEST, HIGHEST), self.x)

    def scores(self, image: Float[Array, "h w 3"]) -> tuple[Float[Array, "_h_k _w_k"], ...]:
        """Returns the detector's scores of ``image`` in this window, with the context refreshed for ``image``."""
        seen = self.view(image)
        return self.detector.scores(seen, self.detector.refresh(seen, self.context))

    def excess(self, image: Float[Array, "h w 3"]) -> tuple[tuple[Float[Array, "_h_k _w_k"], ...], Float[Array, ""]]:
        """Returns the excess of each score over 1, the ordinary level, and the sum over the affected positions."""
        above = tuple(jnp.maximum(s - 1, 0) for s in self.scores(image))
        return above, sum((jnp.sum(a * s) for a, s in zip(self.affected, above, strict=True)), jnp.float32(0))

    def terms(self, n: Float[Array, "h w 3"]) -> Terms:
        """Returns the four terms at n."""
        return Terms(
            feature_loss(self.detector, self.view(n), self.context, self.affected),
            pixel_prior_loss(self.detector.calibrated.prior, n, self.region),
            total_variation(n),
            self.sparsity(n),
        )

    def __call__(self, n: Float[Array, "h w 3"]) -> Float[Array, ""]:
        """Returns Eq. (12): l_n(n) + α1·l_p1(n) + α2·l_p2(n) + β·l_a(x - n)."""
        return self.smooth(n) + self.weights.beta * self.sparsity(n)

    def weighted(self, terms: Terms) -> Terms:
        """Returns the terms times their weights, whose sum is Eq. (12)."""
        t, w = terms, self.weights
        return Terms(t.feature, w.alpha1 * t.prior, w.alpha2 * t.variation, w.beta * t.sparsity)

    def smooth(self, n: Float[Array, "h w 3"]) -> Float[Array, ""]:
        """Returns Eq. (12) without its sparsity term."""
        t = self.weighted(self.terms(n))
        return t.feature + t.prior + t.variation

    def sparsity(self, n: Float[Array, "h w 3"]) -> Float[Array, ""]:
        """Returns l_a(x - n)."""
        return sparsity_loss(self.penalty, self.x - n, self.region)


def sparsity_weight(problem: Problem, n0: Float[Array, "h w 3"], sparsity: Scalar) -> Float[Array, ""]:
    """Returns β of Eq. (12), in proportion to the evidence E of a defect in the input.

    β = sparsity · E / (l_a(x - n0) - l_a(0)). E is the excess of x's scores over 1, the ordinary level, summed over the
    affected positions. From n0 to x, the sparsity term then falls by ``sparsity`` times E. This holds for faint and glaring
    defects, and for any share of the defect in m0. The denominator is at least 1.

    Departure: the paper takes β0 / Σm0, with β0 tuned per category. Where m0 holds a third of a defect, the paper's β is
    three times too large and n returns to x. ``Settings.beta0`` selects :func:`paper_weight`.
    """
    _, evidence = problem.excess(problem.x)
    span = problem.sparsity(n0) - problem.sparsity(problem.x)
    return sparsity * evidence / jnp.maximum(span, 1.0)


def paper_weight(beta0: Scalar, coarse_mask: Bool[Array, "h w"]) -> Float[Array, ""]:
    """Returns the paper's β = β0 / Σm0 (Section III-E4)."""
    return beta0 / jnp.maximum(jnp.sum(coarse_mask), 1)


def feature_loss(
    detector: AbstractDetector, n: Float[Array, "h w 3"], context: Context, affected: tuple[Float[Array, "_h_k _w_k"], ...]
) -> Float[Array, ""]:
    """Returns l_n(n): the sum of the affected positions' scores (Section III-B), in units of the mean normal score."""
    return sum(
        (jnp.sum(weight * score) for weight, score in zip(affected, detector.scores(n, context), strict=True)),
        jnp.float32(0),
    )


def pixel_prior_loss(prior: PixelPrior, n: Float[Array, "h w 3"], region: Bool[Array, "h w"]) -> Float[Array, ""]:
    """Returns Eq. (10), summed over the region; elsewhere it is constant."""
    return jnp.sum(jnp.where(region, prior(n), 0.0))


def total_variation(n: Float[Array, "h w 3"]) -> Float[Array, ""]:
    """Returns Eq. (11): isotropic over channels, anisotropic over directions."""
    return jnp.sum(norm(n[1:] - n[:-1])) + jnp.sum(norm(n[:, 1:] - n[:, :-1]))


def sparsity_loss(penalty: AbstractPenalty, a: Float[Array, "h w 3"], region: Bool[Array, "h w"]) -> Float[Array, ""]:
    """Returns l_a of Eq. (8), summed over the region; elsewhere it is constant."""
    return jnp.sum(jnp.where(region, penalty(norm(a)), 0.0))


def norm(v: Float[Array, "*b 3"]) -> Float[Array, "*b"]:
    """Returns the Euclidean length over channels, with gradient 0 at 0."""
    square = jnp.sum(v**2, axis=-1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def affected_positions(region: Bool[Array, "h w"], shape: tuple[int, int], reach: int | None) -> Float[Array, "hk wk"]:
    """Returns a map of the feature positions that enter l_n: 1 within ``reach`` pixels of the region (None: all), else 0.

    Source: paper, Section III-E2. ``reach`` stands for the effective receptive field, far smaller than the theoretical one.
    """
    if reach is None:
        return jnp.ones(shape, jnp.float32)
    near = dilate(region, reach)
    (h, w), (hk, wk) = region.shape, shape
    cells = near.reshape(hk, h // hk, wk, w // wk)
    return jnp.any(cells, axis=(1, 3)).astype(jnp.float32)
