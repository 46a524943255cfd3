import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import calibration

from f2pad_jax import AbstractDetector, Backbone, Calibration, Outcome, Problem, Settings, solve
from f2pad_jax.solvers import Solver
from f2pad_jax.units import HIGHEST, LOWEST


class MeanColour(AbstractDetector):
    """A user's own detector: 4x4 block means against one colour."""

    colour: jax.Array
    calibration: Calibration | None = None
    backbone: Backbone | None = None
    size: tuple[int, int] = eqx.field(static=True, default=(24, 24))

    @classmethod
    def fit(cls, images, backbone, *, seed, progress):
        return cls(jnp.mean(jnp.stack([*images]), axis=(0, 1, 2)))

    @property
    def stride(self):
        return 4

    def anomaly_map(self, image):
        return jnp.repeat(jnp.repeat(self.scores(image, None)[0], 4, 0), 4, 1)

    def raw_scores(self, image, where):
        h, w, _ = image.shape
        blocks = image.reshape(h // 4, 4, w // 4, 4, 3).mean(axis=(1, 3))
        return (jnp.sum((blocks - self.colour) ** 2, axis=-1),)


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
    return Problem.make(detector, x, region, None, Settings()).with_beta(0.02)


def test_the_loop_equals_a_plain_python_one(problem):
    """Algorithm 1 written out step by step, in NumPy but for the objective's gradient."""
    settings = Settings(max_steps=20, steps_per_check=1, tolerance=-1e9, sharing_tolerance=0.0)
    solution = solve(problem, jnp.zeros_like(problem.x), settings, 20)

    x, region = np.asarray(problem.x, np.float64), np.asarray(problem.region)
    h, w, _ = x.shape
    n = np.where(region[..., None], 0.0, x)
    m = v = s = previous = np.zeros_like(x)
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
        d = g - previous if step > 1 else np.zeros_like(g)
        m, v, s = 0.98 * m + 0.02 * g, 0.92 * v + 0.08 * d, 0.99 * s + 0.01 * (g + 0.92 * d) ** 2
        hats = m / (1 - 0.98**step), v / (1 - 0.92**step), s / (1 - 0.99**step)
        direction = (hats[0] + 0.92 * hats[1]) / (np.sqrt(hats[2]) + 1e-8)
        gamma = settings.learning_rate / np.maximum(np.abs(x - n), settings.delta)
        n = np.where(region[..., None], np.clip(n - gamma * direction, LOWEST, HIGHEST), x)
        previous = g
    assert solution.steps == 20
    np.testing.assert_allclose(np.asarray(solution.n), n, atol=1e-6)


def test_the_objective_falls_and_the_rest_stays(problem):
    start = jnp.where(problem.region[..., None], 0.0, problem.x)
    solution = solve(problem, start, Settings(), 200)
    assert float(solution.objective) < float(problem(start))
    outside = ~np.asarray(problem.region)
    np.testing.assert_array_equal(np.asarray(solution.n)[outside], np.asarray(problem.x)[outside])


def test_pixels_stay_valid(problem):
    solution = solve(problem, jnp.full_like(problem.x, 100.0), Settings(), 20)
    n = np.asarray(solution.n)[np.asarray(problem.region)]
    assert (n >= LOWEST).all() and (n <= HIGHEST).all()


def test_it_stops_when_little_is_gained(problem):
    impatient = solve(problem, problem.x, Settings(tolerance=1e9), 500)
    assert impatient.outcome == Outcome.CONVERGED and impatient.steps == 20
    never = solve(problem, problem.x, Settings(tolerance=-1e9), 30)
    assert never.outcome == Outcome.STEP_LIMIT and never.steps == 30


def test_an_empty_region_takes_no_step(problem):
    empty = eqx.tree_at(lambda p: p.region, problem, jnp.zeros_like(problem.region))
    solution = solve(empty, problem.x + 1, Settings(), 100)
    assert solution.outcome == Outcome.NOTHING_TO_REFINE and solution.steps == 0
    np.testing.assert_array_equal(solution.n, problem.x)


def test_vmap_equals_one_at_a_time(problem):
    """Without the penalty's kink, around which rounding errors grow, lanes agree to the last digits."""
    problem = problem.with_beta(0.0)
    starts = jnp.stack([jnp.zeros_like(problem.x), problem.x * 0.5])
    together = jax.vmap(lambda n0: solve(problem, n0, Settings(tolerance=0.01), 200))(starts)
    for i, start in enumerate(starts):
        alone = solve(problem, start, Settings(tolerance=0.01), 200)
        assert alone.steps == together.steps[i]
        np.testing.assert_allclose(alone.n, together.n[i], atol=1e-9)


def test_the_clip_bounds_the_shared_gradient(problem):
    """Adan's first direction is g/|g|, whatever the clip; a zero clip stops all movement."""
    solver = Solver.make(problem.x, Settings(clip=0.0))
    state = solver.step(problem, solver.init(problem, jnp.zeros_like(problem.x)))
    start = np.where(np.asarray(problem.region)[..., None], 0.0, np.asarray(problem.x))
    np.testing.assert_array_equal(
        np.asarray(state.n),
        start.clip(LOWEST, HIGHEST) * np.asarray(problem.region)[..., None]
        + start * ~np.asarray(problem.region)[..., None],
    )
