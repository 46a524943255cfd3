"""Detectors: the interface, three methods behind it, and what fits and calibrates any of them."""

from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.detectors.cflow import CFlow
from f2pad_jax.detectors.padim import PaDiM
from f2pad_jax.detectors.patchcore import PatchCore

DETECTORS: dict[str, type[AbstractDetector]] = {"padim": PaDiM, "patchcore": PatchCore, "cflow": CFlow}
"""The methods this library brings, by the name the command line knows them by."""
