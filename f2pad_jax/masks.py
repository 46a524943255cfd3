"""From a decomposition x = n + a to the mask: what the paper thresholds, and what decides better on real defects."""

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from f2pad_jax.detectors.base import coarse_map
from f2pad_jax.objective import Problem
from f2pad_jax.region import filled, opened, reached
from f2pad_jax.smoothing import smoothed
from f2pad_jax.solvers import AbstractSolver
from f2pad_jax.units import Scalar


class Evidence(NamedTuple):
    """What is known when the mask is to be drawn."""

    problem: Problem
    n0: Float[Array, "h w 3"]
    """The first guess."""
    n: Float[Array, "h w 3"]
    """The solution."""
    excess: Float[Array, "h w"]
    """The coarse map over its level at the border of m0, from 0 (ordinary) over 1 (the border) upwards."""
    threshold: Scalar = 1.0
    """The detector's threshold in the same units; below 1 where m0 was cut at half of the map's height."""


class AbstractDecision(eqx.Module):
    """Draws the mask."""

    @abc.abstractmethod
    def __call__(self, solver: AbstractSolver, evidence: Evidence) -> Bool[Array, "h w"]:
        """The anomalous pixels."""


class Residual(AbstractDecision):
    """The paper's: a ≠ 0 as the solver sees it, opened 3x3 (Eq. 2, Section III-E3)."""

    tau: Scalar = 0.2
    """|a| counts as 0 up to this, normalised intensity. Paper: 0, which LOG under a gradient method never reaches;
    :class:`~f2pad_jax.Proximal` does, and needs no τ."""

    def __call__(self, solver: AbstractSolver, evidence: Evidence) -> Bool[Array, "h w"]:
        """|a| > τ, opened."""
        return opened(solver.postprocess(evidence.problem, evidence.n, self.tau))


class Mixture(AbstractDecision):
    """Residuals and coarse map weighed against each other, by what separates them in this very image.

    Departure from the paper, whose |a| > τ has no place for the coarse map: on real defects parts of which look like the
    object, or which n can't undo, a is 0 or noise where the map is plain.

    Each pixel of the region is anomalous or not, with prior odds from the coarse map. The logarithms of two residuals,
    of x from the first guess n0 and from the solution n, are Gaussian in either class. Expectation-maximisation finds the
    Gaussians and the posterior of every pixel, and a mean-field Potts term lets neighbours agree. Where the residual
    splits the region in two, as a pasted colour does, the Gaussians are far apart and it decides to the pixel; where it
    does not, they coincide and the map decides. No threshold, and nothing to calibrate.

    It starts twice, from the map's odds and from the residual of n alone, cut in two. A map that is a ring around a large
    defect, whose inside looks ordinary, or a blob around a thin scratch, holds the first fast; the second may see but a
    part of the defect. So both masks are tried: x with only the mask replaced by n must look normal to the network. The
    one that takes more of the scores for its size is the mask.

    A residual is the least distance of a pixel of x to those of n around it, so that structure restored a pixel or two
    from its place is no anomaly.

    A piece of the mask in which no pixel of the coarse map exceeds the detector's threshold is none: where the map is
    broad, n changes normal structure as well.

    Where the scores stay as they were although the coarse map stands out, the residual has missed a part, as it does where
    a glaring part of a defect passes for all of it. That is tried as well, and is kept where it takes scores.
    """

    steepness: Scalar = 3.0
    """Prior log-odds a factor e of the coarse map."""
    coupling: Scalar = 5.0
    """Log-odds of a pixel all of whose neighbours agree."""
    sigma: float = eqx.field(static=True, default=2.0)
    """Width of the neighbourhood, pixels, static."""
    tolerance: int = eqx.field(static=True, default=2)
    """Displacement that is no anomaly, pixels, static."""
    floor: Scalar = 0.05
    """Residual below which differences do not count, normalised intensity; or, where that is more, ``faint``."""
    faint: Scalar = 0.2
    """The same as a share of the level of n's residual in the region: its mean, weighted by itself. Below lies the soft rim
    of a defect, which, where n is x but for that, stands out from normal pixels as plainly as the defect does."""
    spread: Scalar = 0.25
    """Least standard deviation of a log-residual within a class."""
    num_steps: int = eqx.field(static=True, default=15)
    """Rounds of expectation-maximisation, static."""
    occam: Scalar = 0.25
    """By how much the logarithm of the share of the scores that a mask takes must grow for one larger by a factor e."""
    missed: Scalar = 0.7
    """Share of the excess score around a pixel: if more is left when the mask is replaced, the mask may have missed it, and
    has, if less than this share of that is left when what may be missed is replaced as well."""

    def __call__(self, solver: AbstractSolver, evidence: Evidence) -> Bool[Array, "h w"]:
        """Where the posterior exceeds one half and what that missed, opened 2x2, filled, and kept where the map reaches."""
        plain = evidence.problem.region & (evidence.excess > (1 + evidence.threshold) / 2)

        def tried(masks: Bool[Array, "2 h w"], _):
            """What each of two masks leaves around a pixel; the better one, without and with what it missed, comes next."""
            in_all, around = unexplained(evidence, masks)
            size = jnp.maximum(jnp.sum(masks, axis=(1, 2)), 1)
            chosen = jnp.argmax(jnp.log(jnp.maximum(1 - in_all, 1e-3)) - self.occam * jnp.log(size))
            missed = plain & (around[chosen] > self.missed)
            return jnp.stack([masks[chosen], masks[chosen] | missed]), (masks, around)

        found = jax.vmap(filled)(self.posteriors(evidence) > 0.5)  # not opened yet: specks too small for it explain scores
        # first the two starts are tried, then the better one beside itself and what it missed; the network is compiled once
        _, (masks, around) = jax.lax.scan(tried, found, length=2)
        (one, more), (before, after) = masks[1], around[1]
        mask = filled(opened(one | (more & (after < self.missed * before)), 2))
        return reached(evidence.excess > evidence.threshold, mask)

    def posteriors(self, evidence: Evidence) -> Float[Array, "2 h w"]:
        """The probability of an anomaly, 0 outside the region, from either start."""
        problem, n0, n, excess, _ = evidence
        x, region = problem.x, problem.region.astype(problem.x.dtype)
        residuals = jax.lax.map(lambda m: tolerant_residual(x, m, self.tolerance), jnp.stack([n0, n]))
        inside = region * residuals[1]
        level = jnp.sum(inside**2) / jnp.maximum(jnp.sum(inside), 1e-6)
        of_n0, of_n = jnp.log(residuals + jnp.maximum(self.floor, self.faint * level))
        prior = self.steepness * jnp.log(jnp.maximum(excess, 1e-3))

        def log_density(weight: Float[Array, "h w"]) -> Float[Array, "h w"]:
            """Of a Gaussian fitted with these weights."""
            weight = weight / jnp.maximum(jnp.sum(weight), 1e-6)
            u, v = (value - jnp.sum(weight * value) for value in (of_n0, of_n))
            uu, vv, uv = (jnp.sum(weight * product) for product in (u * u, v * v, u * v))
            uu, vv = uu + self.spread**2, vv + self.spread**2
            determinant = uu * vv - uv**2
            square = (vv * u**2 - 2 * uv * u * v + uu * v**2) / determinant
            return -0.5 * (square + jnp.log(determinant))

        def update(_, q: Float[Array, "h w"]) -> Float[Array, "h w"]:
            anomalous, normal = log_density(region * q), log_density(region * (1 - q))
            odds = prior + anomalous - normal + self.coupling * smoothed(2 * q - 1, self.sigma)
            return region * jax.nn.sigmoid(odds)

        high = of_n > two_means(of_n, region)
        starts = jnp.stack([jax.nn.sigmoid(prior), jnp.where(high, 0.99, 0.01)])
        return jax.lax.map(lambda q: jax.lax.fori_loop(0, self.num_steps, update, q), region * starts)


def two_means(values: Float[Array, "h w"], weight: Float[Array, "h w"], num_steps: int = 10) -> Float[Array, ""]:
    """The level half-way between the means of the values above and below it, by Lloyd's iterations from the mean of all."""

    def mean(weight: Float[Array, "h w"]) -> Float[Array, ""]:
        return jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), 1e-6)

    def update(_, level: Float[Array, ""]) -> Float[Array, ""]:
        return (mean(weight * (values > level)) + mean(weight * (values <= level))) / 2

    return jax.lax.fori_loop(0, num_steps, update, mean(weight))


def unexplained(evidence: Evidence, masks: Bool[Array, "k h w"]) -> tuple[Float[Array, " k"], Float[Array, "k h w"]]:
    """The share of the excess scores (above 1) of x left once a mask is replaced by n: in all, and around each pixel."""
    problem, _, n, *_ = evidence

    def excess(image: Float[Array, "h w 3"]) -> tuple[Float[Array, ""], Float[Array, "_h _w"]]:
        h, w, _ = jax.eval_shape(problem.view, image).shape
        above, in_all = problem.excess(image)
        return in_all, sum((coarse_map(s, (h, w)) for s in above), jnp.zeros((h, w)))

    images = jnp.concatenate([problem.x[None], jnp.where(masks[..., None], n, problem.x)])
    in_all, around = (values[1:] / jnp.maximum(values[0], 1e-6) for values in jax.vmap(excess)(images))
    return in_all, jax.vmap(problem.view.back)(around)


def tolerant_residual(x: Float[Array, "h w 3"], n: Float[Array, "h w 3"], radius: int) -> Float[Array, "h w"]:
    """The distance of each pixel of x to the most similar one of n at most ``radius`` pixels away in either direction."""
    h, w, _ = x.shape
    padded = jnp.pad(n, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    least = jnp.full((h, w), jnp.inf, x.dtype)
    for i in range(2 * radius + 1):
        for j in range(2 * radius + 1):
            least = jnp.minimum(least, jnp.sum((x - padded[i : i + h, j : j + w]) ** 2, axis=-1))
    return jnp.sqrt(least)
