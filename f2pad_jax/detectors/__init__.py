"""Detectors: the interface, three methods behind it, fitting, calibration and saving."""

from f2pad_jax.detectors.anomalib import load_anomalib
from f2pad_jax.detectors.base import AbstractDetector, Added, Calibration, NormalImages
from f2pad_jax.detectors.calibration import calibrate
from f2pad_jax.detectors.cflow import CFlow
from f2pad_jax.detectors.composed import Composed, compose
from f2pad_jax.detectors.fitting import fit
from f2pad_jax.detectors.normality import Normality
from f2pad_jax.detectors.padim import PaDiM
from f2pad_jax.detectors.patchcore import PatchCore
from f2pad_jax.detectors.prior import PixelPrior, fit_prior
from f2pad_jax.detectors.registry import DETECTORS
from f2pad_jax.detectors.saving import load_detector, save_detector
from f2pad_jax.detectors.updating import update

__all__ = [
    "DETECTORS", "AbstractDetector", "Added", "CFlow", "Calibration", "Composed", "NormalImages", "Normality", "PaDiM",
    "PatchCore", "PixelPrior", "calibrate", "compose", "fit", "fit_prior", "load_anomalib", "load_detector",
    "save_detector", "update",
]  # fmt: skip
