import jax
import jax.numpy as jnp
import numpy as np
import pytest

from f2pad_jax.objective import L0, L1, MCP, Log

PENALTIES = [Log(), Log(0.01), L1(), L0(), MCP(), MCP(0.1)]


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("weight", [1e-4, 0.01, 0.05, 0.3, 2.0])
def test_the_proximal_map_minimises_over_a_fine_grid(penalty, weight):
    """No point of a grid of 20 001 costs less than what the map returns."""
    grid = jnp.linspace(0, 2, 20001)
    for size in (0.0, 0.005, 0.02, 0.1, 0.3, 0.7, 1.0, 1.9):
        found = penalty.shrunk(jnp.array([size]), jnp.array([weight]))[0]
        assert 0 <= found <= size

        def cost(s, size=size):
            return weight * penalty(s) + (s - size) ** 2 / 2

        assert cost(found) <= jnp.min(cost(grid)) + 1e-9


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_no_weight_leaves_everything_and_enough_weight_nothing(penalty):
    sizes = jnp.array([0.0, 0.01, 0.4, 1.5])
    np.testing.assert_allclose(penalty.shrunk(sizes, jnp.zeros(4)), sizes, atol=1e-12)
    np.testing.assert_array_equal(penalty.shrunk(sizes, jnp.full(4, 1e3)), 0.0)


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_penalties_rise_from_their_value_at_zero(penalty):
    values = np.asarray(penalty(jnp.linspace(0, 3, 301)))
    assert (np.diff(values) >= 0).all() and values[-1] > values[0]


def test_values_against_the_formulas():
    r = np.array([0.0, 0.02, 0.4, 3.0])
    np.testing.assert_allclose(Log(1e-4)(jnp.asarray(r)), np.log(np.sqrt(r**2 + 1e-4) + r), rtol=1e-12)
    np.testing.assert_allclose(L1()(jnp.asarray(r)), r)
    np.testing.assert_array_equal(L0()(jnp.asarray(r)), r > 0)
    np.testing.assert_allclose(MCP(0.5)(jnp.asarray(r)), np.where(r < 0.5, r - r**2, 0.25), rtol=1e-12)


@pytest.mark.parametrize("penalty", [Log(), L1(), MCP()], ids=repr)
def test_slopes_equal_difference_quotients(penalty):
    at, step = jnp.array([0.003, 0.05, 0.3, 0.9]), 1e-7
    found = jax.vmap(jax.grad(lambda r: penalty(r)))(at)
    np.testing.assert_allclose(found, (penalty(at + step) - penalty(at - step)) / (2 * step), rtol=1e-5, atol=1e-8)
