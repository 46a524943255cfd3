import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import calibration
from test_solvers import MeanColour

from f2pad_jax.images._smoothing import smoothed
from f2pad_jax.method import Evidence, Mixture, Residual
from f2pad_jax.method.decision import remaining_scores, tolerant_residual, two_means
from f2pad_jax.objective import Problem
from f2pad_jax.solvers import Descent

SIZE = 48


def problem(x, region, scale=1.0):
    return Problem.make(MeanColour(jnp.zeros(3), calibration(scale)), jnp.asarray(x), jnp.asarray(region), None)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def region():
    region = np.zeros((SIZE, SIZE), bool)
    region[6:42, 6:42] = True
    return region


@pytest.fixture
def excess():
    """A blob around the middle, 1 on a circle of radius 12."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    return jnp.asarray(2 ** (1 - (y**2 + x**2) / 144), jnp.float32)


def drawn(decision, evidence):
    """Returns the mask."""
    return decision(Descent(), evidence) > 0.5


def iou(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return (a & b).sum() / (a | b).sum()


def naive_tolerant(x, n, radius):
    h, w, _ = x.shape
    out = np.empty((h, w))
    for i in range(h):
        for j in range(w):
            near = n[max(i - radius, 0) : i + radius + 1, max(j - radius, 0) : j + radius + 1]
            out[i, j] = np.sqrt(((near - x[i, j]) ** 2).sum(-1).min())
    return out


@pytest.mark.parametrize("radius", [0, 1, 3])
def test_tolerant_residual_equals_a_search_around_every_pixel(rng, radius):
    x, n = rng.standard_normal((2, 9, 13, 3)).astype(np.float32)
    np.testing.assert_allclose(
        tolerant_residual(jnp.asarray(x), jnp.asarray(n), radius), naive_tolerant(x, n, radius), rtol=1e-5
    )


def test_structure_displaced_within_the_tolerance_is_no_residual(rng):
    n = rng.standard_normal((20, 20, 3)).astype(np.float32)
    x = np.roll(n, (2, -1), axis=(0, 1))
    inner = np.s_[3:-3, 3:-3]
    assert float(np.max(np.asarray(tolerant_residual(jnp.asarray(x), jnp.asarray(n), 2))[inner])) < 1e-6
    assert float(np.mean(np.asarray(tolerant_residual(jnp.asarray(x), jnp.asarray(n), 1))[inner])) > 0.1


def test_a_sharp_residual_overrules_the_coarse_map(rng, region, excess):
    """A square patch off the map's centre comes out as the square, not as the map's disc."""
    truth = np.zeros((SIZE, SIZE), bool)
    truth[14:30, 18:36] = True
    n = 0.05 * rng.standard_normal((SIZE, SIZE, 3)).astype(np.float32)
    x = n + 0.03 * rng.standard_normal(n.shape).astype(np.float32) + 1.5 * truth[..., None]
    mask = drawn(Mixture(), Evidence(problem(x, region), jnp.asarray(n), jnp.asarray(n), excess))
    assert iou(mask, truth) > 0.97 > 0.8 > iou((excess > 1) & region, truth)


def test_a_map_that_is_a_ring_does_not_hide_the_inside_of_a_patch(rng, region):
    """The border of a large patch stands out, half inside and half outside of it; its inside looks ordinary."""
    truth = np.zeros((SIZE, SIZE), bool)
    truth[12:36, 12:36] = True
    y, x = np.abs(np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2)
    ring = np.where(np.abs(np.maximum(y, x) - 12) < 4, 2.0, 0.2) * np.where((y < 4) & (x > 6), 0.1, 1.0)  # in two pieces
    ring = jnp.asarray(ring, jnp.float32)
    n = 0.05 * rng.standard_normal((SIZE, SIZE, 3)).astype(np.float32)
    x = n + 0.03 * rng.standard_normal(n.shape).astype(np.float32) + 1.5 * truth[..., None]
    mask = drawn(Mixture(), Evidence(problem(x, region), jnp.asarray(n), jnp.asarray(n), ring))
    assert iou(mask, truth) > 0.97 > 0.5 > iou((ring > 1) & region, truth)


def test_a_glaring_part_does_not_stand_for_the_whole(rng, region, excess):
    """The residual alone would take the speckles and nothing else, which leaves the scores as they are."""
    disc, n = (excess > 1) & region, np.zeros((SIZE, SIZE, 3), np.float32)
    x = 0.05 * rng.standard_normal(n.shape).astype(np.float32) + 1.2 * np.asarray(disc)[..., None]
    n += 1.185 * np.asarray(disc)[..., None]  # the solver found little to change there
    x[20:24, 20:28] += 1.5 * (-1.0) ** np.indices((4, 8)).sum(0)[..., None]  # of the same mean
    evidence = Evidence(problem(x, region, 4.13), jnp.asarray(n), jnp.asarray(n), excess)
    _, by_residual = Mixture().posteriors(evidence) > 0.5
    assert iou(drawn(Mixture(), evidence), disc) > 0.4 > 0.15 > iou(by_residual, disc)


def test_a_thin_scratch_is_not_the_blob_that_the_map_makes_of_it(rng, region):
    """Three pixels wide and askew. Either mask takes all of the scores; the scratch is the smaller one."""
    scratch = np.zeros((SIZE, SIZE), bool)
    for i in range(12, 36):
        scratch[i, i : i + 3] = True
    blob = np.asarray(smoothed(jnp.asarray(scratch, jnp.float32), 4.0))
    n, noise = 0.3 * rng.standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    x = noise + np.float32(2.0) * scratch[..., None]
    excess = jnp.asarray(3 * blob / blob.max(), jnp.float32)
    evidence = Evidence(problem(x, region), jnp.asarray(n), jnp.asarray(n), excess)
    assert iou(drawn(Mixture(), evidence), scratch) > 0.95 > 0.5 > iou((excess > 1) & region, scratch)


def test_the_soft_rim_of_a_defect_is_no_part_of_it_where_n_is_x_but_for_that(rng, region):
    """The rim is an eighth of the defect, and twenty times what is left of normal pixels."""
    core, rim = np.zeros((2, SIZE, SIZE), bool)
    core[14:34, 16:32], rim[13:35, 15:33] = True, True
    alpha = np.where(core, 1.0, np.where(rim, 0.12, 0.0)).astype(np.float32)
    n = 0.3 * rng.standard_normal((SIZE, SIZE, 3)).astype(np.float32)
    x = n + 0.006 * rng.standard_normal(n.shape).astype(np.float32) + alpha[..., None]
    blob = np.asarray(smoothed(jnp.asarray(core, jnp.float32), 4.0))
    evidence = Evidence(problem(x, region), jnp.asarray(n), jnp.asarray(n), jnp.asarray(3 * blob / blob.max(), jnp.float32))
    by_prior, _ = Mixture(floor=0.01).posteriors(evidence) > 0.5
    assert iou(by_prior, rim) > 0.95
    assert iou(drawn(Mixture(), evidence), core) > 0.95


def test_two_means_cuts_where_the_squares_within_are_least(rng):
    values = np.concatenate([rng.normal(0, 1, 400), rng.normal(5, 0.5, 112)]).astype(np.float32).reshape(16, 32)
    weight = (rng.random((16, 32)) < 0.7).astype(np.float32)
    chosen = np.sort(values[weight > 0])
    squares = [a.var() * a.size + b.var() * b.size for a, b in (np.split(chosen, [k]) for k in range(1, len(chosen)))]
    cut = 1 + int(np.argmin(squares))
    assert chosen[cut - 1] <= float(two_means(jnp.asarray(values), jnp.asarray(weight))) <= chosen[cut]


def test_a_residual_that_says_nothing_leaves_the_coarse_map(rng, region, excess):
    n = np.zeros((SIZE, SIZE, 3), np.float32)
    x = 0.3 * rng.standard_normal(n.shape).astype(np.float32)
    by_prior, _ = Mixture().posteriors(Evidence(problem(x, region), jnp.asarray(n), jnp.asarray(n), excess)) > 0.5
    assert iou(by_prior, (excess > 1) & region) > 0.85


def test_the_border_of_the_mask_moves_to_the_edges_of_x(rng, region):
    """The mask is three pixels off. Without an edge in x, it stays."""
    disc = np.hypot(*(np.mgrid[:SIZE, :SIZE] - SIZE / 2)) < 9
    off = np.roll(disc, 3, axis=1)
    n = 0.02 * rng.standard_normal((SIZE, SIZE, 3)).astype(np.float32)
    excess = jnp.full((SIZE, SIZE), 2.0)
    for x, expected in ((n + disc[..., None] * np.float32([0.5, -0.3, 0.4]), disc), (n, off)):
        found = Mixture().cleaned(Evidence(problem(x, region), jnp.asarray(n), jnp.asarray(n), excess), jnp.asarray(off))
        assert iou(found, expected) > 0.98 > 0.75 > iou(off, disc)


def test_what_a_defect_encloses_belongs_to_it(rng, region, excess):
    ring = np.zeros((SIZE, SIZE), bool)
    ring[12:36, 12:36] = True
    hole = np.zeros_like(ring)
    hole[20:28, 20:28] = True
    n = np.zeros((SIZE, SIZE, 3), np.float32)
    x = n + 0.02 * rng.standard_normal(n.shape).astype(np.float32) + (ring & ~hole)[..., None]
    mask = np.asarray(drawn(Mixture(), Evidence(problem(x, region), jnp.asarray(n), jnp.asarray(n), excess)))
    assert mask[hole].all() and iou(mask, ring) > 0.97


@pytest.mark.parametrize("threshold", [1.0, 0.6])
def test_a_piece_the_coarse_map_does_not_reach_is_no_anomaly(rng, region, threshold):
    """Two alike in the residual; the map is above the border of m0 in one, above or below the threshold in the other."""
    one, other = np.zeros((2, SIZE, SIZE), bool)
    one[12:20, 12:20] = other[28:36, 28:36] = True
    n = 0.05 * rng.standard_normal((SIZE, SIZE, 3)).astype(np.float32)
    x = n + 1.5 * (one | other)[..., None].astype(np.float32)
    excess = jnp.asarray(np.where(one, 2.0, np.where(other, 0.8, 0.5)), jnp.float32)
    evidence = Evidence(problem(x, region), jnp.asarray(n), jnp.asarray(n), excess, threshold)
    assert all(iou(posterior > 0.5, one | other) > 0.97 for posterior in Mixture().posteriors(evidence))
    expected = one if threshold == 1.0 else one | other
    assert iou(drawn(Mixture(), evidence), expected) > 0.97


def test_posteriors_are_probabilities_and_zero_outside(rng, region, excess):
    x, n0, n = (jnp.asarray(a) for a in rng.standard_normal((3, SIZE, SIZE, 3)).astype(np.float32))
    posteriors = np.asarray(Mixture().posteriors(Evidence(problem(x, region), n0, n, excess)))
    assert (posteriors >= 0).all() and (posteriors <= 1).all() and (posteriors[:, ~region] == 0).all()


@pytest.mark.parametrize("decision", [Mixture(), Residual()], ids=["mixture", "residual"])
def test_extremes_give_finite_answers(decision, region, excess):
    """Nothing to explain, everything the same, no region at all."""
    x = jnp.zeros((SIZE, SIZE, 3))
    for n, where in ((x, region), (x + 2, region), (x, ~region & region), (x, region | True)):
        evidence = Evidence(problem(x, where), n, n, excess)
        mask = np.asarray(jax.jit(lambda e: drawn(decision, e))(evidence))
        assert not mask[~where].any()
        if isinstance(decision, Mixture):
            assert np.isfinite(np.asarray(decision.posteriors(evidence))).all()


def test_the_papers_mask_is_the_opened_residual_above_tau(region, excess):
    n = np.zeros((SIZE, SIZE, 3), np.float32)
    x = n.copy()
    x[10:20, 10:20, 0] = 0.5
    x[30, 30] = 0.5  # a dot the opening removes
    x[10:20, 30:38, 1] = 0.15
    found = drawn(Residual(0.2), Evidence(problem(x, region), jnp.asarray(n), jnp.asarray(n), excess))
    expected = np.zeros((SIZE, SIZE), bool)
    expected[10:20, 10:20] = True
    np.testing.assert_array_equal(found, expected)


def test_masks_of_a_batch_equal_those_alone(rng, region, excess):
    xs, ns = (jnp.asarray(a) for a in rng.standard_normal((2, 3, SIZE, SIZE, 3)).astype(np.float32))

    def posteriors(x, n):
        return Mixture().posteriors(Evidence(problem(x, region), n, n, excess))

    together = jax.jit(jax.vmap(posteriors))(xs, ns)
    for x, n, found in zip(xs, ns, together, strict=True):
        np.testing.assert_allclose(jax.jit(posteriors)(x, n), found, atol=1e-4)


@pytest.mark.parametrize("changed", [0.03, 0.01])
def test_what_the_residual_missed_is_added_where_it_takes_scores(rng, region, changed):
    """A defect of two parts, one glaring, one hardly off normal in the pixels yet as plain as the other to the network."""
    glaring, faint = np.zeros((2, SIZE, SIZE), bool)
    glaring[12:20, 12:20] = faint[28:36, 28:36] = True
    n = 0.02 * rng.standard_normal((SIZE, SIZE, 3)).astype(np.float32)
    x = jnp.asarray(n + 2.0 * glaring[..., None] + 0.02 * rng.standard_normal(n.shape).astype(np.float32))
    x = jnp.where(faint[..., None], 0.7, x)
    both = np.asarray(smoothed(jnp.asarray(glaring | faint, jnp.float32), 2.0))
    n = jnp.where(faint[..., None], 0.7 - changed, n)  # the solver found little to change there
    evidence = Evidence(problem(x, region, 1.3), n, n, jnp.asarray(2 * both), jnp.asarray(0.4))
    in_all, around = remaining_scores(evidence, jnp.stack([jnp.asarray(glaring), jnp.asarray(region)]))
    left = np.asarray(around[0])
    assert 0.01 < in_all[0] < 0.5 and in_all[1] <= in_all[0] and np.asarray(around[1])[glaring].max() < 0.5
    assert left[glaring].max() < 0.5 and left[faint].min() > 0.9
    assert iou(drawn(Mixture(unexplained=np.inf), evidence), glaring) > 0.9
    after = np.asarray(remaining_scores(evidence, jnp.asarray(glaring | faint)[None])[1])[0, 30:34, 30:34]
    assert after.max() < 0.5 if changed == 0.03 else after.min() > 0.75
    assert iou(drawn(Mixture(), evidence), glaring | faint if changed == 0.03 else glaring) > 0.75


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_speck_that_explains_the_scores_is_no_reason_to_fall_back_on_the_map(rng, region, width):
    """The mask is the speck, or empty where the opening removes it: not the map's wide blur of it."""
    speck = np.zeros((SIZE, SIZE), bool)
    speck[24 : 24 + width, 24:28] = True
    n = jnp.asarray(0.02 * rng.standard_normal((SIZE, SIZE, 3)).astype(np.float32))
    x = n + 3.0 * speck[..., None]
    blur = np.asarray(smoothed(jnp.asarray(speck, jnp.float32), 3.0))
    evidence = Evidence(problem(x, region), n, n, jnp.asarray(3 * blur / blur.max()), jnp.asarray(1.0))
    assert (np.asarray(Mixture().posteriors(evidence) > 0.5) == speck).all()
    assert np.asarray(evidence.excess > 1).sum() > 3 * speck.sum()
    np.testing.assert_array_equal(drawn(Mixture(), evidence), speck & (width > 1))
