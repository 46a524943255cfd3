import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
from conftest import calibration

from f2pad_jax.backbones import Backbone
from f2pad_jax.detectors import AbstractDetector, Calibration, PixelPrior, fit_prior
from f2pad_jax.objective import Log, Problem
from f2pad_jax.objective.problem import (
    feature_loss,
    norm,
    paper_weight,
    pixel_prior_loss,
    sparsity_loss,
    sparsity_weight,
    total_variation,
)

EPSILON = 1e-4


class LinearDetector(AbstractDetector):
    """A detector of a user's own: squared distance of each cell's projected mean colour to a centre, at two cell sizes."""

    projection: jax.Array
    centre: jax.Array
    calibration: Calibration | None = None
    backbone: Backbone | None = None
    size: tuple[int, int] = eqx.field(static=True, default=(16, 24))

    @classmethod
    def fit(cls, images, backbone, *, seed, progress):
        raise NotImplementedError("made by hand here")

    @property
    def stride(self):
        return 8

    def raw_scores(self, image, context):
        h, w, _ = image.shape
        cells = [image.reshape(h // s, s, w // s, s, 3).mean((1, 3)) for s in (4, 8)]
        return tuple(jnp.sum((c @ self.projection - self.centre) ** 2, axis=-1) for c in cells)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def covariances(rng):
    roots = rng.standard_normal((4, 3, 3))
    return roots @ np.swapaxes(roots, 1, 2) + 0.3 * np.eye(3)


@pytest.fixture
def prior(rng, covariances):
    whitening = np.swapaxes(np.linalg.cholesky(np.linalg.inv(covariances)), 1, 2)
    return PixelPrior(jnp.asarray(rng.standard_normal((4, 3))), jnp.asarray(whitening))


@pytest.fixture
def detector(rng, prior):
    projection, centre = rng.standard_normal((3, 5)), rng.standard_normal(5)
    return LinearDetector(jnp.asarray(projection), jnp.asarray(centre), calibration(1.5, prior=prior))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((16, 24, 3)))


@pytest.fixture
def n(rng, x):
    return x + jnp.asarray(0.5 * rng.standard_normal(x.shape))


@pytest.fixture
def region(x):
    return jnp.zeros(x.shape[:2], bool).at[3:9, 2:12].set(True)


@pytest.fixture
def problem(detector, x, region, n):
    return Problem.make(detector, x, region, detector.locate(n, jnp.zeros(2, jnp.int32)), reach=1, beta=0.3)


def difference_quotients(function, at, step=1e-5):
    """Central differences along every coordinate."""
    shifts = step * np.eye(at.size).reshape(at.size, *at.shape)
    values = jax.jit(jax.vmap(function))
    return ((values(at + shifts) - values(at - shifts)) / (2 * step)).reshape(at.shape)


def naive_scores(detector, n):
    """Both layers' scores over their scale, cell by cell."""
    out = []
    for s in (4, 8):
        layer = np.zeros((n.shape[0] // s, n.shape[1] // s))
        for i, j in itertools.product(*map(range, layer.shape)):
            mean = n[i * s : (i + 1) * s, j * s : (j + 1) * s].reshape(-1, 3).mean(0)
            layer[i, j] = np.sum((mean @ np.asarray(detector.projection) - np.asarray(detector.centre)) ** 2)
        out.append(layer / float(detector.calibration.scale))
    return out


def naive_penalty(a, region, epsilon=EPSILON):
    """Eq. (8), pixel by pixel."""
    sizes = [np.linalg.norm(a[i, j]) for i, j in zip(*np.nonzero(region), strict=True)]
    return sum(np.log(np.sqrt(size**2 + epsilon) + size) for size in sizes)


def naive_prior(n, region, means, covariances):
    """Eq. (10), pixel by pixel."""
    inverses = np.linalg.inv(covariances)
    total = 0.0
    for i, j in zip(*np.nonzero(region), strict=True):
        total += min((n[i, j] - m) @ inverse @ (n[i, j] - m) for m, inverse in zip(means, inverses, strict=True))
    return total


def naive_variation(n):
    """Eq. (11), pixel by pixel."""
    h, w, _ = n.shape
    total = 0.0
    for i, j in itertools.product(range(h), range(w)):
        total += np.linalg.norm(n[i + 1, j] - n[i, j]) if i + 1 < h else 0.0
        total += np.linalg.norm(n[i, j + 1] - n[i, j]) if j + 1 < w else 0.0
    return total


def test_sparsity_equals_equation_8(x, n, region):
    expected = naive_penalty(np.asarray(x - n), np.asarray(region))
    np.testing.assert_allclose(sparsity_loss(Log(), x - n, region), expected, rtol=1e-12)


def test_sparsity_at_zero_is_half_the_logarithm_of_epsilon_a_pixel(x, region):
    np.testing.assert_allclose(sparsity_loss(Log(), 0 * x, region), 60 * 0.5 * np.log(EPSILON), rtol=1e-12)


def test_prior_loss_equals_equation_10(n, region, prior, covariances):
    expected = naive_prior(np.asarray(n), np.asarray(region), np.asarray(prior.means), covariances)
    np.testing.assert_allclose(pixel_prior_loss(prior, n, region), expected, rtol=1e-10)


def test_prior_is_zero_at_each_mean_and_positive_elsewhere(prior):
    np.testing.assert_allclose(prior(prior.means), 0.0, atol=1e-12)
    assert np.all(np.asarray(prior(prior.means + 0.1)) > 0)


def test_total_variation_equals_equation_11(n):
    np.testing.assert_allclose(total_variation(n), naive_variation(np.asarray(n)), rtol=1e-12)


def test_feature_loss_sums_the_affected_scores_of_every_layer(detector, n, problem):
    assert [int(a.sum()) for a in problem.affected] == [12, 4]
    expected = sum(
        np.sum(np.asarray(a) * s) for a, s in zip(problem.affected, naive_scores(detector, np.asarray(n)), strict=True)
    )
    np.testing.assert_allclose(feature_loss(detector, n, None, problem.affected), expected, rtol=1e-12)


def test_total_equals_equation_12(detector, prior, covariances, problem, x, n, region):
    n_, x_, region_ = (np.asarray(v) for v in (n, x, region))
    features = sum(np.sum(np.asarray(a) * s) for a, s in zip(problem.affected, naive_scores(detector, n_), strict=True))
    expected = (
        features
        + 0.01 * naive_prior(n_, region_, np.asarray(prior.means), covariances)
        + 1e-4 * naive_variation(n_)
        + 0.3 * naive_penalty(x_ - n_, region_)
    )
    np.testing.assert_allclose(problem(n), expected, rtol=1e-10)


def test_every_setting_of_equation_12_reaches_the_total(detector, problem, x, region, n):
    settings = {"alpha1": 2.0, "alpha2": 3.0, "penalty": Log(0.01), "reach": 1}
    t = problem.terms(n)
    other = Problem.make(detector, x, region, detector.locate(n, jnp.zeros(2, jnp.int32)), **settings).with_beta(5.0)
    expected = t.feature + 2.0 * t.prior + 3.0 * t.variation + 5.0 * sparsity_loss(Log(0.01), x - n, region)
    np.testing.assert_allclose(other(n), expected, rtol=1e-12)


def test_pixels_outside_the_region_add_nothing_to_the_pixelwise_terms(prior, x, n, region):
    changed = jnp.where(region[..., None], n, 7.0)
    np.testing.assert_array_equal(sparsity_loss(Log(), x - changed, region), sparsity_loss(Log(), x - n, region))
    np.testing.assert_array_equal(pixel_prior_loss(prior, changed, region), pixel_prior_loss(prior, n, region))


@pytest.mark.parametrize("term", ["feature", "prior", "variation", "sparsity"])
def test_gradient_of_each_term_equals_difference_quotients(problem, n, term):
    def value(n):
        return getattr(problem.terms(n), term)

    np.testing.assert_allclose(jax.jit(jax.grad(value))(n), difference_quotients(value, n), rtol=1e-6, atol=1e-7)


def test_gradient_of_the_total_equals_difference_quotients(problem, n):
    np.testing.assert_allclose(jax.jit(jax.grad(problem))(n), difference_quotients(problem, n), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_gradient_is_finite_where_nothing_was_changed(problem, x, precision):
    problem, x = jax.tree.map(lambda v: v.astype(precision) if eqx.is_inexact_array(v) else v, (problem, x))
    value, gradient = jax.jit(jax.value_and_grad(problem))(x)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    assert gradient.dtype == precision


def test_gradient_is_finite_on_a_flat_image(problem):
    flat = jnp.full((16, 24, 3), 0.25)
    problem = eqx.tree_at(lambda p: p.x, problem, flat)
    value, gradient = jax.jit(jax.value_and_grad(problem))(flat)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_penalty_variation_and_norm_are_level_at_zero(x, region):
    terms = (lambda a: sparsity_loss(Log(), a, region), total_variation, lambda v: norm(v).sum())
    for gradient in jax.jit(lambda a: [jax.grad(term)(a) for term in terms])(jnp.zeros_like(x)):
        np.testing.assert_array_equal(gradient, 0.0)


def test_total_is_the_same_under_jit_and_vmap(problem, x, n):
    found = jax.jit(jax.vmap(problem))(jnp.stack([x, n]))
    np.testing.assert_allclose(found, [problem(x), problem(n)], rtol=1e-12)


@pytest.fixture
def n0(x, region):
    return jnp.where(region[..., None], 0.0, x)


def beta(problem, n0, sparsity=0.5):
    return float(sparsity_weight(problem, n0, sparsity))


def evidence(problem):
    """Σ of the excess of the affected scores of x over the ordinary level."""
    scores = naive_scores(problem.detector, np.asarray(problem.x))
    return sum(np.sum(np.asarray(a) * np.maximum(s - 1, 0)) for a, s in zip(problem.affected, scores, strict=True))


def with_scale(problem, scale):
    return eqx.tree_at(lambda p: p.detector.calibration.scale, problem, jnp.asarray(scale))


@pytest.mark.parametrize("scale", [0.7, 1.5, 3.0])
@pytest.mark.parametrize("contrast", [0.1, 1.0])
def test_sparsity_ranges_over_a_fixed_multiple_of_the_evidence(problem, x, n0, scale, contrast):
    problem = with_scale(problem, scale)
    n0 = x + contrast * (n0 - x)
    scored = eqx.tree_at(lambda p: p.weights.beta, problem, beta(problem, n0, sparsity=4.0))
    top, bottom = (float(scored.weights.beta * scored.terms(v).sparsity) for v in (n0, x))
    assert top - bottom == pytest.approx(4.0 * evidence(problem), rel=1e-10)
    assert evidence(problem) > 1


def test_sparsity_weight_doubles_when_scores_far_above_the_ordinary_level_double(problem, n0):
    low, high = (beta(with_scale(problem, scale), n0) for scale in (1e-6, 0.5e-6))
    assert high == pytest.approx(2 * low, rel=1e-5)


def test_sparsity_weight_is_zero_where_the_input_scores_ordinary(problem, n0):
    assert beta(with_scale(problem, 1e3), n0) == 0.0


def test_sparsity_weight_is_proportional_to_its_setting(problem, n0):
    assert beta(problem, n0, sparsity=6.0) == pytest.approx(1.5 * beta(problem, n0, sparsity=4.0))


def test_sparsity_weight_is_finite_when_the_first_guess_is_the_input(problem, x):
    assert beta(problem, x) == pytest.approx(0.5 * evidence(problem))


@pytest.mark.parametrize(("area", "weight"), [(40, 7.5), (20, 15.0), (0, 300.0)])
def test_papers_rule_is_beta0_over_the_coarse_area(area, weight):
    mask = jnp.zeros((8, 8), bool).ravel().at[:area].set(True).reshape(8, 8)
    assert paper_weight(300.0, mask) == pytest.approx(weight)


def test_fitted_prior_is_the_mahalanobis_distance_to_the_pixels_it_saw(rng, covariances):
    pixels = rng.multivariate_normal([0.5, -1.0, 0.2], covariances[0], 4000)
    prior = fit_prior(pixels, num_components=1)
    inverse = np.linalg.inv(np.cov(pixels.T) + 0.05**2 * np.eye(3))
    expected = scipy.spatial.distance.cdist(pixels[:50], pixels.mean(0)[None], "mahalanobis", VI=inverse)[:, 0] ** 2
    np.testing.assert_allclose(prior(jnp.asarray(pixels[:50])), expected, rtol=0.02, atol=0.02)


def test_fitted_prior_keeps_the_colours_there_are_and_drops_the_components_too_many(rng):
    colours = np.array([[-2.0, 0.0, 1.0], [1.0, 2.0, -1.0]])
    pixels = np.concatenate([c + 0.1 * rng.standard_normal((500, 3)) for c in colours])
    prior = fit_prior(pixels, num_components=6)
    assert np.max(prior(jnp.asarray(colours))) < 1
    assert np.min(prior(jnp.asarray([[0.0, 0.0, 0.0], [3.0, -3.0, 0.0]]))) > 50
    assert 2 <= prior.num_components < 6 == len(prior.means) == len(prior.whitening)  # of one shape all the same


def test_prior_of_grey_pixels_is_finite_and_rejects_colour(rng):
    grey = np.repeat(rng.uniform(-1, 1, (500, 1)), 3, axis=1)
    prior = fit_prior(grey, num_components=3)
    assert np.all(np.isfinite(prior.whitening))
    assert float(prior(jnp.array([0.5, 0.5, 0.5]))) < 9 < float(prior(jnp.array([0.5, 0.0, -0.5])))


def test_prior_is_reproducible_by_its_seed(rng):
    pixels = rng.standard_normal((60, 3))
    first, second = (fit_prior(pixels, num_components=2, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.means, second.means)
    np.testing.assert_array_equal(first.whitening, second.whitening)
