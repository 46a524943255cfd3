"""Algorithm 1: settings, coarse stage, window, decomposition and mask."""

from f2pad_jax.method.algorithm import Refined
from f2pad_jax.method.coarse import Coarse, Given, look
from f2pad_jax.method.decision import AbstractDecision, Evidence, Mixture, Residual
from f2pad_jax.method.history import History
from f2pad_jax.method.settings import Settings
from f2pad_jax.method.window import Posed, Window, pose

__all__ = [
    "AbstractDecision", "Coarse", "Evidence", "Given", "History", "Mixture", "Posed", "Refined", "Residual", "Settings",
    "Window", "look", "pose",
]  # fmt: skip
