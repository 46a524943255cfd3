from . import (
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
from ._version import __version__
from .batches import refine_batches
from .detectors import fit, load_detector, save_detector, update
from .method import Refined, Settings
from .method.history import history
from .refinement import refine, refine_many
from .regions import find_regions
from .solvers import Outcome
from .tuning import tune
from .warmup import warm_up

__all__ = [
    "Outcome", "Refined", "Settings", "__version__", "backbones", "data", "detectors", "errors", "evaluation",
    "find_regions", "fit", "history", "images", "inpainting", "load_detector", "method", "objective", "progress", "refine",
    "refine_batches", "refine_many", "regions", "save_detector", "solvers", "tune", "update",
    "warm_up",
]  # fmt: skip
