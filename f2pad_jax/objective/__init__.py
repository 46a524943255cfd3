"""The objective of Eq. (12) and its sparsity penalties."""

from f2pad_jax.objective.penalties import L0, L1, MCP, AbstractPenalty, Log
from f2pad_jax.objective.problem import Problem, Terms, Weights

__all__ = ["L0", "L1", "MCP", "AbstractPenalty", "Log", "Problem", "Terms", "Weights"]
