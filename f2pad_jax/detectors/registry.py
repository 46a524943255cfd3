"""Methods of this library by name."""

from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.detectors.cflow import CFlow
from f2pad_jax.detectors.padim import PaDiM
from f2pad_jax.detectors.patchcore import PatchCore

DETECTORS: dict[str, type[AbstractDetector]] = {"padim": PaDiM, "patchcore": PatchCore, "cflow": CFlow}
"""Class of each method, by the name that the command line uses."""
TITLES = {"patchcore": "PatchCore", "cflow": "CFLOW-AD", "padim": "PaDiM"}
"""Name of each method in the paper, in the order of the paper's tables."""
