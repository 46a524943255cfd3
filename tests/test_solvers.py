import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MeanColour, calibration
from jax.tree_util import Partial

from f2pad_jax import Outcome
from f2pad_jax.images import HIGHEST, LOWEST
from f2pad_jax.objective import Problem
from f2pad_jax.solvers import AbstractSolver, Descent, Proximal, Sharing, State, Stopping, solve
from f2pad_jax.solvers.base import outstanding


@pytest.fixture(autouse=True)
def double_precision():
    """Small differences grow along the path of a non-convex problem; in float64 two ways of computing it still agree."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def problem():
    key = jax.random.key(0)
    detector = MeanColour(jnp.zeros(3), calibration(0.25))
    x = 0.2 * jax.random.normal(key, (24, 24, 3))
    x = x.at[8:14, 9:17].add(1.5)
    region = jnp.zeros((24, 24), bool).at[5:18, 6:20].set(True)
    return Problem.make(detector, x, region, None, beta=0.02)


@pytest.mark.parametrize(("may_cross_input", "clip"), [(False, np.inf), (True, 0.01)])
def test_the_loop_equals_a_plain_python_one(problem, may_cross_input, clip):
    """Algorithm 1 written out step by step, in NumPy but for the objective's gradient."""
    solver = Descent(sharing=Sharing(cutoff=0.0), may_cross_input=may_cross_input, clip=clip).without_stopping()
    solution = solve(solver, problem, jnp.zeros_like(problem.x), max_steps=20, steps_per_check=1)

    x, region = np.asarray(problem.x, np.float64), np.asarray(problem.region)
    h, w, _ = x.shape
    n = np.where(region[..., None], 0.0, x)
    m = v = s = previous = np.zeros_like(x)
    clipped = 0.0
    for step in range(1, 21):
        gradient = np.asarray(jax.grad(problem)(jnp.asarray(n)), np.float64) * region[..., None]
        g = np.zeros_like(gradient)
        for i in range(h):
            for j in range(w):
                total = 0.0
                for a in range(max(i - 5, 0), min(i + 6, h)):
                    for b in range(max(j - 5, 0), min(j + 6, w)):
                        colour = np.sum((x[a, b] - x[i, j]) ** 2)
                        weight = np.exp(-((a - i) ** 2 + (b - j) ** 2) / 1.1) * np.exp(-colour / 3.0)
                        total += weight
                        g[i, j] += weight * gradient[a, b]
                g[i, j] /= total
        clipped += np.mean(np.abs(g[region]) > clip) / 20
        g = np.clip(g, -clip, clip)
        d = g - previous if step > 1 else np.zeros_like(g)
        m, v, s = 0.98 * m + 0.02 * g, 0.92 * v + 0.08 * d, 0.99 * s + 0.01 * (g + 0.92 * d) ** 2
        hats = m / (1 - 0.98**step), v / (1 - 0.92**step), s / (1 - 0.99**step)
        direction = (hats[0] + 0.92 * hats[1]) / (np.sqrt(hats[2]) + 1e-8)
        gamma = solver.learning_rate / np.maximum(np.abs(x - n), solver.delta)
        before, n = n, np.where(region[..., None], np.clip(n - gamma * direction, LOWEST, HIGHEST), x)
        if not may_cross_input:
            n = np.where(np.sum((before - x) * (n - x), axis=-1, keepdims=True) < 0, x, n)
        previous = g
    assert solution.steps == 20
    assert 0.1 < clipped < 0.9 or np.isinf(clip)
    assert np.any(n[region] == x[region]) != may_cross_input
    np.testing.assert_allclose(np.asarray(solution.n), n, atol=1e-6)


def test_the_objective_falls_and_the_rest_stays(problem):
    start = jnp.where(problem.region[..., None], 0.0, problem.x)
    solution = solve(Descent(), problem, start, max_steps=200)
    assert float(solution.objective) < float(problem(start))
    outside = ~np.asarray(problem.region)
    np.testing.assert_array_equal(np.asarray(solution.n)[outside], np.asarray(problem.x)[outside])


def test_pixels_stay_valid(problem):
    solution = solve(Descent(), problem, jnp.full_like(problem.x, 100.0), max_steps=20)
    n = np.asarray(solution.n)[np.asarray(problem.region)]
    assert (n >= LOWEST).all() and (n <= HIGHEST).all()


def test_it_stops_when_little_is_gained(problem):
    impatient = solve(Descent(stopping=Stopping(tolerance=1e9)), problem, problem.x, max_steps=500)
    assert impatient.outcome == Outcome.CONVERGED and impatient.steps == 20
    never = solve(Descent().without_stopping(), problem, problem.x, max_steps=30)
    assert never.outcome == Outcome.STEP_LIMIT and never.steps == 30


def test_it_stops_when_the_pixels_that_stand_out_no_longer_change(problem):
    """Long before the objective does: inside the patch n goes on to change. Not where there is no sparsity, nor from one
    step to the next."""
    n0 = jnp.where(problem.region[..., None], 0.0, problem.x)
    patch = np.zeros((24, 24), bool)
    patch[8:14, 9:17] = True
    solution = solve(Descent(stopping=Stopping(-jnp.inf)), problem, n0, max_steps=300)
    assert solution.outcome == Outcome.CONVERGED and 20 <= solution.steps < 100
    np.testing.assert_array_equal(outstanding(problem, solution.n), patch)
    later = solve(Descent().without_stopping(), problem, n0, max_steps=300)
    np.testing.assert_array_equal(outstanding(problem, later.n), patch)
    assert float(later.objective) < float(solution.objective) - 1
    for endless in (
        solve(Descent(stopping=Stopping(-jnp.inf, 0.0)), problem, n0, max_steps=100),
        solve(Descent(stopping=Stopping(-jnp.inf)), problem.with_beta(0.0), n0, max_steps=100),
        solve(Descent(stopping=Stopping(-jnp.inf)), problem, n0, max_steps=100, steps_per_check=1),
    ):
        assert endless.outcome == Outcome.STEP_LIMIT


def test_what_stands_out_is_above_half_the_level_and_inside_the_region(problem):
    inside = np.asarray(problem.region)
    a = np.where(np.random.default_rng(0).random((24, 24)) < 0.1, 1.0, 0.1)
    n = problem.x - jnp.asarray(a)[..., None] / np.sqrt(3)
    np.testing.assert_array_equal(outstanding(problem, n), inside & (a == 1.0))
    assert not outstanding(problem, problem.x).any()


def test_a_first_guess_that_is_right_is_not_thrown_away(problem):
    """Where n0 is x but for the patch, and β so large that it alone decides the first steps."""
    patch = jnp.zeros((24, 24, 1), bool).at[8:14, 9:17].set(True)
    good, noise = np.asarray(problem.region & ~patch[..., 0]), 0.01 * jax.random.normal(jax.random.key(1), (24, 24, 3))
    problem = problem.with_beta(2.0)
    n0 = problem.x + jnp.where(patch, -1.5, noise)
    on_x, objective = {}, {}
    for crossing in (False, True):
        solver = Descent(may_cross_input=crossing)
        n = solver.step(problem, solver.init(problem, n0)).n
        on_x[crossing], objective[crossing] = np.mean(np.all(n == problem.x, axis=-1)[good]), float(problem(n))
    assert on_x[False] > 0.95 and on_x[True] == 0
    assert objective[False] < float(problem(n0)) < objective[True]


def test_an_empty_region_takes_no_step(problem):
    empty = eqx.tree_at(lambda p: p.region, problem, jnp.zeros_like(problem.region))
    solution = solve(Descent(), empty, problem.x + 1, max_steps=100)
    assert solution.outcome == Outcome.NOTHING_TO_REFINE and solution.steps == 0
    np.testing.assert_array_equal(solution.n, problem.x)


def test_vmap_equals_one_at_a_time(problem):
    """Without the penalty's kink, around which rounding errors grow, lanes agree to the last digits."""
    problem = problem.with_beta(0.0)
    starts = jnp.stack([jnp.zeros_like(problem.x), problem.x * 0.5])
    together = jax.vmap(lambda n0: solve(Descent(stopping=Stopping(0.01)), problem, n0, max_steps=200))(starts)
    for i, start in enumerate(starts):
        alone = solve(Descent(stopping=Stopping(0.01)), problem, start, max_steps=200)
        assert alone.steps == together.steps[i]
        np.testing.assert_allclose(alone.n, together.n[i], atol=1e-9)


def test_the_clip_bounds_the_shared_gradient(problem):
    """Adan's first direction is g/|g|, whatever the clip; a zero clip stops all movement."""
    solver = Descent(clip=0.0)
    state = solver.step(problem, solver.init(problem, jnp.zeros_like(problem.x)))
    start = np.where(np.asarray(problem.region)[..., None], 0.0, np.asarray(problem.x))
    np.testing.assert_array_equal(
        np.asarray(state.n),
        start.clip(LOWEST, HIGHEST) * np.asarray(problem.region)[..., None]
        + start * ~np.asarray(problem.region)[..., None],
    )


VARIANTS = {
    "paper": Descent(),
    "plain Adan": Descent(sharing=None),
    "no adaptive step": Descent(gamma0=None),
    "Adam": Descent(optimiser=Partial(optax.adam, 0.05), learning_rate=1.0),
    "momentum": Descent(optimiser=Partial(optax.sgd, 0.01, 0.9), learning_rate=1.0),
    "L-BFGS": Descent(optimiser=Partial(optax.lbfgs), sharing=None, gamma0=None, learning_rate=1.0),
    "proximal": Proximal(),
    "proximal, shared": Proximal(sharing=Sharing()),
}


@pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_lowers_the_objective_inside_the_region_only(problem, solver):
    start = jnp.where(problem.region[..., None], 0.0, problem.x)
    solution = jax.jit(lambda p: solve(solver, p, start, max_steps=100))(problem)
    assert float(problem(solution.n)) < float(problem(start))
    assert solution.outcome in (Outcome.CONVERGED, Outcome.STEP_LIMIT)
    outside = ~np.asarray(problem.region)
    np.testing.assert_array_equal(np.asarray(solution.n)[outside], np.asarray(problem.x)[outside])


def test_the_proximal_solver_finds_the_patch_by_exact_zeros(problem):
    """On a quadratic objective: where the pasted patch is, and nowhere else, a ≠ 0; no threshold is applied."""
    patch = np.zeros((24, 24), bool)
    patch[8:14, 9:17] = True
    solution = solve(Proximal(sharing=Sharing()), problem, jnp.zeros_like(problem.x), max_steps=300)
    mask = np.asarray(Proximal().anomalous(problem, solution.n, np.inf))
    np.testing.assert_array_equal(mask, np.any(np.asarray(solution.n != problem.x), axis=-1))
    assert 0 < mask.sum() < np.asarray(problem.region).sum()
    assert (mask & patch).sum() / (mask | patch).sum() > 0.75  # blocks of four pixels say no more


def test_the_proximal_step_equals_a_plain_numpy_one(problem):
    solver = Proximal()
    state = solver.init(problem, jnp.zeros_like(problem.x))
    x, region, n = np.asarray(problem.x), np.asarray(problem.region), np.asarray(state.n)
    for _ in range(9):
        state = solver.step(problem, state)
    m = v = s = previous = np.zeros_like(x)
    for step in range(1, 10):
        g = np.asarray(jax.grad(problem.smooth)(jnp.asarray(n))) * region[..., None]
        d = g - previous if step > 1 else np.zeros_like(g)
        m, v, s = 0.98 * m + 0.02 * g, 0.92 * v + 0.08 * d, 0.99 * s + 0.01 * (g + 0.92 * d) ** 2
        hats = m / (1 - 0.98**step), v / (1 - 0.92**step), s / (1 - 0.99**step)
        eta = 0.3 / (np.sqrt(hats[2].mean(-1)) + 1e-8)
        root = np.sqrt(hats[2])
        a = x - np.clip(n - eta[..., None] * root * (hats[0] + 0.92 * hats[1]) / (root + 1e-8), LOWEST, HIGHEST)
        size = np.linalg.norm(a, axis=-1)
        kept = np.asarray(problem.penalty.shrunk(jnp.asarray(size), jnp.asarray(0.02 * eta)))
        n = np.where(region[..., None], x - a * (kept / np.maximum(size, 1e-8))[..., None], x)
        previous = g
    np.testing.assert_allclose(state.n, n, atol=1e-9)


class SignDescent(AbstractSolver):
    """A solver of one's own."""

    learning_rate: float = 0.05
    stopping: Stopping = Stopping(1e-3, 0.0)

    def init(self, problem, n0):
        return State(jnp.where(problem.region[..., None], n0, problem.x), jnp.asarray(jnp.inf), None)

    def step(self, problem, state):
        objective, gradient = jax.value_and_grad(problem)(state.n)
        return State(problem.project(state.n - self.learning_rate * jnp.sign(gradient)), objective, None)


def test_a_solver_of_ones_own_runs_in_the_same_loop(problem):
    solution = solve(SignDescent(), problem, problem.x, max_steps=200)
    assert float(problem(solution.n)) < float(problem(problem.x))
    assert solution.outcome == Outcome.CONVERGED and 0 < solution.steps < 200


def test_another_rate_of_an_optax_optimiser_is_no_new_program(problem):
    traced = []

    @jax.jit
    def run(solver, problem):
        traced.append(solver)
        return solve(solver, problem, jnp.zeros_like(problem.x), max_steps=10).n

    found = [run(Descent(optimiser=Partial(optax.adam, rate), learning_rate=1.0), problem) for rate in (0.05, 0.01)]
    assert len(traced) == 1
    assert not np.allclose(*found)


@pytest.mark.parametrize("solver", VARIANTS.values(), ids=VARIANTS)
def test_the_restore_rate_is_a_ratio_of_each_solver_s_own_rate(problem, solver):
    """Without sparsity, as in the re-estimation of n: a tenth of the rate still lowers the objective, by shorter steps."""
    problem = problem.with_beta(0.0)
    first = solver.init(problem, jnp.zeros_like(problem.x))
    whole, tenth = (s.step(problem, first).n - first.n for s in (solver, solver.slowed(0.1)))
    np.testing.assert_allclose(tenth, 0.1 * np.asarray(whole), rtol=1e-6, atol=1e-12)
    solution = jax.jit(lambda p: solve(solver.slowed(0.1), p, first.n, max_steps=50))(problem)
    assert float(problem(solution.n)) < float(problem(first.n))


def test_a_projected_image_is_valid_inside_and_x_outside(problem):
    n = np.asarray(problem.project(jnp.full_like(problem.x, 100.0)))
    inside = np.asarray(problem.region)
    np.testing.assert_allclose(n[inside], np.broadcast_to(HIGHEST, n[inside].shape))
    np.testing.assert_array_equal(n[~inside], np.asarray(problem.x)[~inside])
