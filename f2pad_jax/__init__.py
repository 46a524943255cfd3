"""F2PAD in JAX: pixel-accurate anomaly segmentation from feature-based detectors."""

from f2pad_jax import (
    backbones,
    data,
    detectors,
    errors,
    evaluation,
    images,
    inpainting,
    method,
    objective,
    progress,
    regions,
    solvers,
)
from f2pad_jax._version import __version__
from f2pad_jax.detectors import fit, load_detector, save_detector
from f2pad_jax.method import Refined, Settings
from f2pad_jax.method.history import history
from f2pad_jax.refinement import refine, refine_many
from f2pad_jax.regions import find_regions
from f2pad_jax.solvers import Outcome
from f2pad_jax.tuning import tune

__all__ = [
    "Outcome", "Refined", "Settings", "__version__", "backbones", "data", "detectors", "errors", "evaluation",
    "find_regions", "fit", "history", "images", "inpainting", "load_detector", "method", "objective", "progress", "refine",
    "refine_many", "regions", "save_detector", "solvers", "tune",
]  # fmt: skip
