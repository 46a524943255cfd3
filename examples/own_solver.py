"""A solver of one's own: signed gradient steps that shrink, beside the paper's, on a brick texture.

``python examples/own_solver.py`` prints the IoU of both. What a solver is: a pytree with ``init`` and ``step``.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import f2pad_jax
from f2pad_jax.data.textures import load_texture
from f2pad_jax.evaluation.metrics import iou
from f2pad_jax.units import HIGHEST, LOWEST


class SignDescent(f2pad_jax.AbstractSolver):
    """n ← n - rate/√(1 + k) · sign(shared gradient)."""

    learning_rate: float = 0.1
    tolerance: float = 0.05
    settled: float = 0.0015

    def init(self, problem: f2pad_jax.Problem, n0: Float[Array, "h w 3"]) -> f2pad_jax.State:
        """The count of steps and the weights of Eq. (14) are what it remembers."""
        return f2pad_jax.start(problem, n0, (jnp.zeros(()), f2pad_jax.Sharing()(problem.x)))

    def step(self, problem: f2pad_jax.Problem, state: f2pad_jax.State) -> f2pad_jax.State:
        """One step, inside the region and inside the range of valid images."""
        count, share = state.memory
        objective, gradient = jax.value_and_grad(problem)(state.n)
        inside = problem.region[..., None]
        direction = jnp.sign(share(jnp.where(inside, gradient, 0)))
        n = jnp.clip(state.n - self.learning_rate / jnp.sqrt(1 + count) * direction, LOWEST, HIGHEST)
        return f2pad_jax.State(jnp.where(inside, n, problem.x), objective, (count + 1, share))


def main() -> None:
    """Both solvers on the four defective images of the texture."""
    brick = load_texture("brick")
    detector = f2pad_jax.fit(f2pad_jax.PatchCore, brick.train, "efficientnet-lite0")
    for name, solver in (("paper's", f2pad_jax.Descent()), ("own", SignDescent())):
        found = [
            f2pad_jax.refine(detector, test.image, settings=f2pad_jax.Settings(solver=solver)).mask for test in brick.test
        ]
        print(name, " ".join(f"{iou(mask, test.mask):.3f}" for mask, test in zip(found, brick.test, strict=True)))


if __name__ == "__main__":
    main()
