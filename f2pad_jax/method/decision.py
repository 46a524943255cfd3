"""Decisions: rules that draw the mask from the decomposition x = n + a."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax.detectors.base import coarse_map
from f2pad_jax.images._morphology import filled, opened, reached
from f2pad_jax.images._smoothing import attracted, smoothed
from f2pad_jax.images.pixels import Scalar
from f2pad_jax.objective.problem import Problem
from f2pad_jax.solvers.base import AbstractSolver


class Evidence(NamedTuple):
    """Evidence from which a decision draws the mask."""

    problem: Problem
    """Problem that was solved."""
    n0: Float[Array, "h w 3"]
    """First guess, normalised intensity."""
    n: Float[Array, "h w 3"]
    """Solution, normalised intensity."""
    excess: Float[Array, "h w"]
    """Coarse map on a linear scale: 0 at the level of normal images or below, 1 at the border of m0, more inside m0."""
    threshold: Scalar = 1.0
    """Threshold of the detector, on the scale of ``excess``: 1, or less if m0 ends at half of the map's height instead."""


class AbstractDecision(eqx.Module):
    """Rule that draws the mask: the pixels whose probability exceeds one half."""

    @abc.abstractmethod
    def __call__(self, solver: AbstractSolver, evidence: Evidence) -> Float[Array, "h w"]:
        """Returns the probability that each pixel is anomalous, 0 outside the suspect region."""

    def prior(self, excess: Float[Array, "h w"]) -> Float[Array, "h w"]:
        """Returns the probability that the coarse map alone gives; here 0. Pixels outside the suspect region keep it."""
        return jnp.zeros_like(excess)


class Residual(AbstractDecision):
    """Rule of the paper: the pixels where the solver leaves a ≠ 0, opened 3x3 (Eq. 2, Section III-E3)."""

    tau: Scalar = 0.2
    """Threshold of |a|, normalised intensity. Paper: 0, but gradient steps on LOG never bring a to 0. The solver
    :class:`~f2pad_jax.solvers.Proximal` does, and ignores τ."""

    def __call__(self, solver: AbstractSolver, evidence: Evidence) -> Float[Array, "h w"]:
        """Returns 1 for the pixels with |a| > τ, opened, and 0 for the others."""
        return opened(solver.anomalous(evidence.problem, evidence.n, self.tau)).astype(jnp.float32)


class Mixture(AbstractDecision):
    """Hidden Markov random field with two classes of pixels, anomalous and normal.

    Departure: the paper thresholds |a| and leaves the coarse map out. On real defects, a is 0 or noise where a part of the
    defect looks like the object, or where n keeps the defect. The rule has four stages:

    1. :meth:`posteriors`: the probability of each pixel, by expectation-maximisation from two starts.
    2. :meth:`selected`: the start whose mask explains the detector's scores with fewer pixels.
    3. :meth:`doubtful`: pixels of a high coarse map that the detector still finds abnormal once n replaces x in the mask.
       They join the mask where the scores fall if n replaces x there as well.
    4. :meth:`cleaned`: the mask with its border on the edges of x, without specks, holes and components that the coarse map
       does not reach.

    The page "The mask" of the documentation has the equations, their sources and the meaning of each constant.
    """

    steepness: Scalar = 3.0
    """Factor on the logarithm of the coarse map in the prior log-odds."""
    coupling: Scalar = 5.0
    """Strength of the Potts term: the log-odds a pixel gains if all its neighbours agree."""
    sigma: float = eqx.field(static=True, default=2.0)
    """Width of the Potts term's Gaussian neighbourhood, pixels, static."""
    tolerance: int = eqx.field(static=True, default=2)
    """Largest displacement of structure that is no anomaly, pixels, static."""
    floor: Scalar = 0.1
    """Difference that hardly counts, normalised intensity: it is added to residuals before the logarithm, and edges of x
    that are fainter do not attract the border of the mask."""
    spread: Scalar = 0.25
    """Least standard deviation of a log-residual within a class."""
    num_steps: int = eqx.field(static=True, default=15)
    """Number of rounds of expectation-maximisation, static."""
    area_exponent: Scalar = 0.25
    """Area exponent: the selected mask has the largest explained score / area**area_exponent."""
    unexplained: Scalar = 0.7
    """Share of the scores above 1 around a pixel. A pixel is doubtful if more remains there, and joins the mask if less
    than this share of the remaining scores is left after that."""
    reach: int = eqx.field(static=True, default=6)
    """Reach of the squares in which edges of x attract the border of the mask, to each side, pixels, static."""
    inertia: Scalar = 0.02
    """Share of the mask's variance that edges of x must explain, around a pixel, to attract the border."""
    temperature: Scalar = 4.0
    """Divisor of the posterior's log-odds in the probability: the evidence of neighbours is not independent. The mask does
    not depend on it."""

    def __call__(self, solver: AbstractSolver, evidence: Evidence) -> Float[Array, "h w"]:
        """Returns the tempered posterior of the selected start, on the mask's side of one half."""

        def weigh(masks: Bool[Array, "2 h w"], _):
            """Scores two masks; returns the selected one without and with its doubtful pixels, then scores and index."""
            total, around = remaining_scores(evidence, masks)
            best = self.selected(total, masks)
            grown = masks[best] | self.doubtful(evidence, around[best])
            return jnp.stack([masks[best], grown]), (masks, around, best)

        posteriors = self.posteriors(evidence)
        starts = jax.vmap(filled)(posteriors > 0.5)  # not opened yet: a speck can explain scores
        # round 1 scores both starts, round 2 the selected one without and with its doubtful pixels, in one program
        _, (masks, around, best) = jax.lax.scan(weigh, starts, length=2)
        (mask, grown), (before, after) = masks[1], around[1]
        mask = self.cleaned(evidence, mask | (grown & (after < self.unexplained * before)))
        log_odds = jax.scipy.special.logit(jnp.clip(posteriors[best[0]], 1e-6, 1 - 1e-6)) / self.temperature
        return agreeing(evidence.problem.region * jax.nn.sigmoid(log_odds), mask)

    def prior(self, excess: Float[Array, "h w"]) -> Float[Array, "h w"]:
        """Returns the prior probability, one half at the border of m0."""
        return jax.nn.sigmoid(self.prior_log_odds(excess))

    def prior_log_odds(self, excess: Float[Array, "h w"]) -> Float[Array, "h w"]:
        """Returns the prior log-odds, ``steepness`` · log(excess)."""
        return self.steepness * jnp.log(jnp.maximum(excess, 1e-3))

    def posteriors(self, evidence: Evidence) -> Float[Array, "2 h w"]:
        """Returns the posterior probability of the anomalous class for each start, 0 outside the region.

        x is compared with n0 and with n. A residual is the distance of a pixel to the most similar pixel at most
        ``tolerance`` pixels away. In each class, the logarithms of both residuals are jointly Gaussian. The coarse map
        gives the prior odds. Neighbours agree.

        The first start is the prior. It can fail if the map is a ring around a large defect or a blob around a thin
        scratch. The second start is the residual of n, split by two-means. It can find only a part of the defect.
        """
        x, region = evidence.problem.x, evidence.problem.region.astype(evidence.problem.x.dtype)
        images = jnp.stack([evidence.n0, evidence.n])
        features = jax.lax.map(lambda image: jnp.log(tolerant_residual(x, image, self.tolerance) + self.floor), images)
        prior = self.prior_log_odds(evidence.excess)

        def update(_, q: Float[Array, "h w"]) -> Float[Array, "h w"]:
            anomalous, normal = (log_density(features, region * weight, self.spread) for weight in (q, 1 - q))
            return region * jax.nn.sigmoid(prior + anomalous - normal + self.coupling * smoothed(2 * q - 1, self.sigma))

        split = (features[1] > two_means(features[1], region)).astype(x.dtype)
        starts = region * jnp.stack([jax.nn.sigmoid(prior), split])
        return jax.lax.map(lambda q: jax.lax.fori_loop(0, self.num_steps, update, q), starts)

    def selected(self, remaining: Float[Array, " k"], masks: Bool[Array, "k h w"]) -> Int[Array, ""]:
        """Returns the index of the mask that explains most of the scores, relative to its area."""
        area = jnp.maximum(jnp.sum(masks, axis=(1, 2)), 1)
        return jnp.argmax(jnp.log(jnp.maximum(1 - remaining, 1e-3)) - self.area_exponent * jnp.log(area))

    def doubtful(self, evidence: Evidence, remaining: Float[Array, "h w"]) -> Bool[Array, "h w"]:
        """Returns the pixels of a high coarse map around which the mask leaves most of the scores.

        Beside a glaring part of a defect, the residuals can miss its other parts. High is above half-way from the
        detector's threshold to the border of m0.
        """
        high = evidence.excess > (1 + evidence.threshold) / 2
        return evidence.problem.region & high & (remaining > self.unexplained)

    def cleaned(self, evidence: Evidence, mask: Bool[Array, "h w"]) -> Bool[Array, "h w"]:
        """Returns the mask with its border on edges of x, opened 2x2 and filled, without components of a low coarse map.

        Low is below the detector's threshold. Where the map is broad, n also changes normal structure.
        """
        x, region = evidence.problem.x, evidence.problem.region
        mask = region & attracted(mask, x, self.reach, self.floor, self.inertia)
        return reached(evidence.excess > evidence.threshold, filled(opened(mask, 2)))


def agreeing(probability: Float[Array, "h w"], mask: Bool[Array, "h w"]) -> Float[Array, "h w"]:
    """Returns the probabilities moved to the mask's side of one half, where they are on the other side."""
    return jnp.where(mask, jnp.maximum(probability, 0.5 + 2.0**-20), jnp.minimum(probability, 0.5))


def log_density(features: Float[Array, "2 h w"], weight: Float[Array, "h w"], spread: Scalar) -> Float[Array, "h w"]:
    """Returns the log-density, up to a constant, of the Gaussian fitted to both features of the weighted pixels.

    The square of ``spread`` is added to both variances.
    """
    weight = weight / jnp.maximum(jnp.sum(weight), 1e-6)
    u, v = (feature - jnp.sum(weight * feature) for feature in features)
    uu, vv, uv = (jnp.sum(weight * product) for product in (u * u, v * v, u * v))
    uu, vv = uu + spread**2, vv + spread**2
    determinant = uu * vv - uv**2
    return -0.5 * ((vv * u**2 - 2 * uv * u * v + uu * v**2) / determinant + jnp.log(determinant))


def two_means(values: Float[Array, "h w"], weight: Float[Array, "h w"], num_steps: int = 10) -> Float[Array, ""]:
    """Returns the threshold of two-means, half-way between both means, by Lloyd's iterations from the overall mean."""

    def mean(weight: Float[Array, "h w"]) -> Float[Array, ""]:
        return jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), 1e-6)

    def update(_, level: Float[Array, ""]) -> Float[Array, ""]:
        return (mean(weight * (values > level)) + mean(weight * (values <= level))) / 2

    return jax.lax.fori_loop(0, num_steps, update, mean(weight))


def remaining_scores(evidence: Evidence, masks: Bool[Array, "k h w"]) -> tuple[Float[Array, " k"], Float[Array, "k h w"]]:
    """Returns the shares of x's scores above 1 that remain with n inside each mask: in total, and around each pixel."""
    problem, _, n, *_ = evidence

    def scores_above_1(image: Float[Array, "h w 3"]) -> tuple[Float[Array, ""], Float[Array, "_h _w"]]:
        h, w, _ = jax.eval_shape(problem.view, image).shape
        above, total = problem.excess(image)
        return total, sum((coarse_map(s, (h, w)) for s in above), jnp.zeros((h, w), jnp.float32))

    images = jnp.concatenate([problem.x[None], jnp.where(masks[..., None], n, problem.x)])
    total, local = (values[1:] / jnp.maximum(values[0], 1e-6) for values in jax.vmap(scores_above_1)(images))
    return total, jax.vmap(problem.view.back)(local)


def tolerant_residual(x: Float[Array, "h w 3"], n: Float[Array, "h w 3"], radius: int) -> Float[Array, "h w"]:
    """Returns the distance of each pixel of x to the most similar pixel of n within ``radius`` rows and columns."""
    h, w, _ = x.shape
    padded = jnp.pad(n, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    least = jnp.full((h, w), jnp.inf, x.dtype)
    for i in range(2 * radius + 1):
        for j in range(2 * radius + 1):
            least = jnp.minimum(least, jnp.sum((x - padded[i : i + h, j : j + w]) ** 2, axis=-1))
    return jnp.sqrt(least)
