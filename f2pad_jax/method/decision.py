"""Decisions: rules that draw the mask from the decomposition x = n + a."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from f2pad_jax.detectors.base import coarse_map
from f2pad_jax.images._morphology import filled, opened, reached
from f2pad_jax.images._smoothing import smoothed
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
    """Rule that draws the mask."""

    @abc.abstractmethod
    def __call__(self, solver: AbstractSolver, evidence: Evidence) -> Bool[Array, "h w"]:
        """Returns the anomalous pixels."""


class Residual(AbstractDecision):
    """Rule of the paper: the pixels where the solver leaves a ≠ 0, opened 3x3 (Eq. 2, Section III-E3)."""

    tau: Scalar = 0.2
    """Threshold of |a|, normalised intensity. Paper: 0, but gradient steps on LOG never bring a to 0. The solver
    :class:`~f2pad_jax.solvers.Proximal` does, and ignores τ."""

    def __call__(self, solver: AbstractSolver, evidence: Evidence) -> Bool[Array, "h w"]:
        """Returns the pixels with |a| > τ, opened."""
        return opened(solver.anomalous(evidence.problem, evidence.n, self.tau))


class Mixture(AbstractDecision):
    """Rule that combines residuals and coarse map in a model with two classes of pixels, anomalous and normal.

    Departure: the paper thresholds |a| and leaves the coarse map out. On real defects, a is 0 or noise where a part of the
    defect looks like the object, or where n keeps the defect. The model has no threshold to calibrate. Its stages:

    1. Residuals: x is compared with the first guess n0 and with the solution n. A residual is the distance of a pixel of x
       to the most similar pixel at most ``tolerance`` pixels away. Slightly displaced structure is thus no anomaly.
    2. Model: in each class, the logarithms of both residuals are jointly Gaussian. The coarse map gives the prior odds.
    3. Inference: expectation-maximisation fits the Gaussians and each pixel's posterior, with a mean-field Potts term
       between neighbours. If the residuals separate two classes, as for a patch of one colour, they set the border to the
       pixel. Otherwise the Gaussians coincide and the map decides.
    4. Two starts: inference starts from the prior odds, and from the residual of n split by two-means. The first start can
       fail if the map is a ring around a large defect or a blob around a thin scratch. The second start can find only a
       part of the defect.
    5. Selection: inside each of the two masks, n replaces x, and the detector scores the image. A mask explains the scores
       above 1 that are then gone. The mask that explains more, relative to its area, is selected.
    6. Extension: beside a glaring part of a defect, the residuals can miss its other parts. Pixels with a high coarse map
       and high remaining scores are therefore replaced by n as well. They are added where the scores then fall.
    7. Cleaning: the mask is opened 2x2 and filled. Connected components without a pixel of the coarse map above the
       detector's threshold are dropped: where the map is broad, n also changes normal structure.
    """

    steepness: Scalar = 3.0
    """Factor on the logarithm of the coarse map in the prior log-odds."""
    coupling: Scalar = 5.0
    """Strength of the Potts term: the log-odds a pixel gains if all its neighbours agree."""
    sigma: float = eqx.field(static=True, default=2.0)
    """Width of the Potts term's Gaussian neighbourhood, pixels, static."""
    tolerance: int = eqx.field(static=True, default=2)
    """Largest displacement of structure that is no anomaly, pixels, static."""
    absolute_floor: Scalar = 0.05
    """Floor of both residuals, normalised intensity: smaller differences hardly count. It is added before the logarithm."""
    relative_floor: Scalar = 0.2
    """Floor as a share of the level Σr²/Σr of n's residual r over the region. The larger of both floors counts. Without
    this floor, the soft rim of a defect could differ from normal pixels as clearly as the core."""
    spread: Scalar = 0.25
    """Least standard deviation of a log-residual within a class."""
    num_steps: int = eqx.field(static=True, default=15)
    """Number of rounds of expectation-maximisation, static."""
    area_exponent: Scalar = 0.25
    """Area exponent: the selected mask has the largest explained_score / area**area_exponent."""
    unexplained: Scalar = 0.7
    """Share of the scores above 1 around a pixel. The extension replaces pixels where the selected mask leaves more than
    this share. It keeps the pixels where the replacement leaves less than this share of the remaining scores."""

    def __call__(self, solver: AbstractSolver, evidence: Evidence) -> Bool[Array, "h w"]:
        """Returns the mask: inference from both starts, selection, extension and cleaning."""
        prominent = evidence.problem.region & (evidence.excess > (1 + evidence.threshold) / 2)

        def select(masks: Bool[Array, "2 h w"], _):
            """Selects one of two masks; returns it without and with its extension, then both masks and their scores."""
            total, local = remaining_scores(evidence, masks)
            area = jnp.maximum(jnp.sum(masks, axis=(1, 2)), 1)
            best = jnp.argmax(jnp.log(jnp.maximum(1 - total, 1e-3)) - self.area_exponent * jnp.log(area))
            extension = prominent & (local[best] > self.unexplained)
            return jnp.stack([masks[best], masks[best] | extension]), (masks, local)

        starts = jax.vmap(filled)(self.posteriors(evidence) > 0.5)  # not opened yet: a speck can explain scores
        # round 1 scores both starts, round 2 the selected mask without and with its extension; one program serves both
        _, (masks, local) = jax.lax.scan(select, starts, length=2)
        (mask, extended), (before, after) = masks[1], local[1]
        mask = filled(opened(mask | (extended & (after < self.unexplained * before)), 2))
        return reached(evidence.excess > evidence.threshold, mask)

    def posteriors(self, evidence: Evidence) -> Float[Array, "2 h w"]:
        """Returns the posterior probability of the anomalous class for each of the two starts, 0 outside the region."""
        problem, n0, n, excess, _ = evidence
        x, region = problem.x, problem.region.astype(problem.x.dtype)
        residuals = jax.lax.map(lambda m: tolerant_residual(x, m, self.tolerance), jnp.stack([n0, n]))
        inside = region * residuals[1]
        level = jnp.sum(inside**2) / jnp.maximum(jnp.sum(inside), 1e-6)
        log_r0, log_r = jnp.log(residuals + jnp.maximum(self.absolute_floor, self.relative_floor * level))
        prior = self.steepness * jnp.log(jnp.maximum(excess, 1e-3))

        def log_density(weight: Float[Array, "h w"]) -> Float[Array, "h w"]:
            """Returns the log-density, up to a constant, of a Gaussian fitted to both log-residuals with these weights."""
            weight = weight / jnp.maximum(jnp.sum(weight), 1e-6)
            u, v = (value - jnp.sum(weight * value) for value in (log_r0, log_r))
            uu, vv, uv = (jnp.sum(weight * product) for product in (u * u, v * v, u * v))
            uu, vv = uu + self.spread**2, vv + self.spread**2
            determinant = uu * vv - uv**2
            square = (vv * u**2 - 2 * uv * u * v + uu * v**2) / determinant
            return -0.5 * (square + jnp.log(determinant))

        def update(_, q: Float[Array, "h w"]) -> Float[Array, "h w"]:
            anomalous, normal = log_density(region * q), log_density(region * (1 - q))
            odds = prior + anomalous - normal + self.coupling * smoothed(2 * q - 1, self.sigma)
            return region * jax.nn.sigmoid(odds)

        high = log_r > two_means(log_r, region)
        starts = jnp.stack([jax.nn.sigmoid(prior), jnp.where(high, 0.99, 0.01)])
        return jax.lax.map(lambda q: jax.lax.fori_loop(0, self.num_steps, update, q), region * starts)


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
        return total, sum((coarse_map(s, (h, w)) for s in above), jnp.zeros((h, w)))

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
