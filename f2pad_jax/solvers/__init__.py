"""The solver of Algorithm 1, its parts and its kin."""

from f2pad_jax.solvers.adan import scale_by_adan as scale_by_adan
from f2pad_jax.solvers.descent import Descent as Descent
from f2pad_jax.solvers.descent import Proximal as Proximal
from f2pad_jax.solvers.loop import AbstractSolver as AbstractSolver
from f2pad_jax.solvers.loop import Outcome as Outcome
from f2pad_jax.solvers.loop import Solution as Solution
from f2pad_jax.solvers.loop import State as State
from f2pad_jax.solvers.loop import solve as solve
from f2pad_jax.solvers.loop import start as start
from f2pad_jax.solvers.recorded import Record as Record
from f2pad_jax.solvers.recorded import Recorded as Recorded
from f2pad_jax.solvers.sharing import GradientSharing as GradientSharing
from f2pad_jax.solvers.sharing import Sharing as Sharing
