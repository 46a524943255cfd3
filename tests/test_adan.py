import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from f2pad_jax.solvers import scale_by_adan

EPS = 1e-8


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def directions(gradients, b1=0.98, b2=0.92, b3=0.99, weight=None):
    """The rule of Xie et al. in plain NumPy; ``weight``, the factor on the gradient's change, is b2."""
    weight = b2 if weight is None else weight
    m = v = s = previous = np.zeros_like(gradients[0])
    out = []
    for t, g in enumerate(gradients, 1):
        d = g - previous if t > 1 else np.zeros_like(g)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * d
        s = b3 * s + (1 - b3) * (g + weight * d) ** 2
        m_hat, v_hat, s_hat = m / (1 - b1**t), v / (1 - b2**t), s / (1 - b3**t)
        out.append((m_hat + weight * v_hat) / (np.sqrt(s_hat) + EPS))
        previous = g
    return np.stack(out)


def updates(transform, gradients):
    """The directions of an optax transform for a sequence of gradients."""
    state, out = transform.init(jax.tree.map(jnp.zeros_like, gradients[0])), []
    update = jax.jit(transform.update)
    for g in gradients:
        u, state = update(g, state)
        out.append(u)
    return out


@pytest.fixture
def gradients():
    rng = np.random.default_rng(0)
    return rng.standard_normal((50, 4, 5, 3)) * np.exp(rng.normal(0, 3, (4, 5, 3)))


def test_equals_the_published_rule_over_fifty_steps(gradients):
    found = np.stack(updates(scale_by_adan(), list(gradients)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, directions(gradients), rtol=1e-12, atol=1e-12)


def test_each_leaf_of_a_pytree_moves_by_itself(gradients):
    trees = [{"a": g[0], "b": (g[1], {"c": g[2:]})} for g in gradients]
    found = updates(scale_by_adan(), trees)
    expected = directions(gradients)
    np.testing.assert_allclose(np.stack([u["a"] for u in found]), expected[:, 0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.stack([u["b"][0] for u in found]), expected[:, 1], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.stack([u["b"][1]["c"] for u in found]), expected[:, 2:], rtol=1e-12, atol=1e-12)


def test_first_step_is_the_gradient_over_its_size(gradients):
    (first,) = updates(scale_by_adan(), list(gradients[:1]))
    np.testing.assert_allclose(first, gradients[0] / (np.abs(gradients[0]) + EPS), rtol=1e-12)


def test_zero_gradients_give_zero_steps():
    found = np.stack(updates(scale_by_adan(), [np.zeros((2, 3))] * 5))
    np.testing.assert_array_equal(found, 0.0)


def test_optax_agrees_at_the_first_step_only_since_it_weighs_the_change_by_one_minus_b2(gradients):
    ours = np.stack(updates(scale_by_adan(), list(gradients)))
    theirs = np.stack(updates(optax.scale_by_adan(b1=0.98, b2=0.92, b3=0.99), list(gradients)))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
    difference = np.abs(ours[1:] - theirs[1:]).max(axis=(1, 2, 3))
    assert np.all(difference > 1e-3), "optax follows the published rule now: its own transform can replace ours"
    np.testing.assert_allclose(theirs, directions(gradients, weight=0.08), rtol=1e-12, atol=1e-12)


def test_chained_with_a_learning_rate_it_moves_against_the_direction(gradients):
    chain = optax.chain(optax.clip(0.5), scale_by_adan(), optax.scale_by_learning_rate(0.1))
    found = np.stack(updates(chain, list(gradients)))
    expected = -0.1 * directions(np.clip(gradients, -0.5, 0.5))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_chained_it_minimises_an_ill_conditioned_quadratic():
    scales = jnp.array([1.0, 30.0, 1000.0])
    optimiser = optax.chain(scale_by_adan(), optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.05, 500)))

    def step(carry, _):
        x, state = carry
        u, state = optimiser.update(scales * x, state, x)
        return (optax.apply_updates(x, u), state), None

    start = jnp.array([1.0, -2.0, 3.0])
    (x, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), length=500)
    np.testing.assert_allclose(x, 0.0, atol=1e-2)


def test_other_coefficients_are_used(gradients):
    found = np.stack(updates(scale_by_adan(b1=0.5, b2=0.7, b3=0.9), list(gradients)))
    np.testing.assert_allclose(found, directions(gradients, 0.5, 0.7, 0.9), rtol=1e-12, atol=1e-12)


def test_single_precision_stays_single_precision(gradients):
    single = gradients.astype(np.float32)
    found = updates(scale_by_adan(), list(single))
    assert {u.dtype for u in found} == {np.dtype(np.float32)}
    np.testing.assert_allclose(np.stack(found), directions(single.astype(np.float64)), rtol=1e-3, atol=1e-4)
