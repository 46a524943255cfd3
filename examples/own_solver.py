"""Your own solver: steps along the sign of the gradient. The step size falls with the number of steps.

``python examples/own_solver.py`` prints the IoU of this solver and of the paper's solver on a brick texture.
A solver is a pytree with the methods ``init`` and ``step``.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import f2pad_jax
from f2pad_jax import Settings
from f2pad_jax.data import load_texture
from f2pad_jax.detectors import PatchCore
from f2pad_jax.images.metrics import iou
from f2pad_jax.objective import Problem
from f2pad_jax.solvers import AbstractSolver, Descent, Sharing, State, Stopping, start

SIDE = 96
"""Height and width of the images, pixels: small, so that the example takes less than a minute."""


class SignDescent(AbstractSolver):
    """Descent along the sign of the shared gradient: n ← n - rate/√(1 + k)·sign(g)."""

    learning_rate: float = 0.1
    stopping: Stopping = Stopping()

    def init(self, problem: Problem, n0: Float[Array, "h w 3"]) -> State:
        """Returns the first state. Its memory holds the count k of steps and the weights of Eq. (14)."""
        return start(problem, n0, (jnp.zeros(()), Sharing()(problem.x)))

    def step(self, problem: Problem, state: State) -> State:
        """Takes one step. The new n has valid pixels, and equals x outside the region."""
        count, share = state.memory
        objective, gradient = jax.value_and_grad(problem)(state.n)
        direction = jnp.sign(share(jnp.where(problem.region[..., None], gradient, 0)))
        n = problem.project(state.n - self.learning_rate / jnp.sqrt(1 + count) * direction)
        return State(n, objective, (count + 1, share))


def main() -> None:
    """Runs both solvers on four defective images of the texture."""
    brick = load_texture("brick", size=SIDE, num_train=6, num_test=4)
    backbone = f2pad_jax.backbones.load_backbone("efficientnet-lite0", layers=("stage3",))
    detector = f2pad_jax.fit(PatchCore, brick.train, backbone, size=(SIDE, SIDE))
    images = np.stack([test.image for test in brick.test])
    for name, solver in (("paper's", Descent()), ("own", SignDescent())):
        result = f2pad_jax.refine(detector, images, settings=Settings(solver=solver))
        masks = np.asarray(result.mask)
        print(name, " ".join(f"{iou(mask, test.mask):.3f}" for mask, test in zip(masks, brick.test, strict=True)))


if __name__ == "__main__":
    main()
