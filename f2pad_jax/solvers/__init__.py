"""Solvers of Eq. (12) and the loop that runs them."""

from f2pad_jax.solvers.adan import scale_by_adan
from f2pad_jax.solvers.base import AbstractSolver, State, Stopping, start
from f2pad_jax.solvers.descent import Descent
from f2pad_jax.solvers.loop import Outcome, Solution, solve
from f2pad_jax.solvers.proximal import Proximal
from f2pad_jax.solvers.sharing import GradientSharing, Sharing

__all__ = [
    "AbstractSolver", "Descent", "GradientSharing", "Outcome", "Proximal", "Sharing", "Solution", "State", "Stopping",
    "scale_by_adan", "solve", "start",
]  # fmt: skip
