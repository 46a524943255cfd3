"""The solver of Algorithm 1 and its parts."""

from f2pad_jax.solvers.adan import scale_by_adan as scale_by_adan
from f2pad_jax.solvers.loop import Outcome as Outcome
from f2pad_jax.solvers.loop import Solution as Solution
from f2pad_jax.solvers.loop import Solver as Solver
from f2pad_jax.solvers.loop import solve as solve
from f2pad_jax.solvers.sharing import GradientSharing as GradientSharing
from f2pad_jax.solvers.sharing import bilateral_sharing as bilateral_sharing
