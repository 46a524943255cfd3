"""Cases of an evaluation, with their training settings and ablations."""

import dataclasses
from pathlib import Path

import numpy as np

from f2pad_jax.data.mvtec import Category
from f2pad_jax.method.settings import Settings
from f2pad_jax.solvers.descent import Descent

FULL = "full"
"""Variant that leaves nothing out."""
ABLATIONS = {
    "initialisation": Settings(max_steps=0, restore_steps=0),
    "no-prior": Settings(alpha1=0.0),
    "no-sparsity": Settings(sparsity=0.0),
    "no-sharing": Settings(solver=Descent(sharing=None)),
    "no-adaptive-step": Settings(solver=Descent(gamma0=None)),
    "paper": Settings.paper(),
}
"""Settings of the other variants: one part left out (paper, Table III and Fig. 10), or the paper's own settings."""
SETTINGS = {"normal": None, "few-shot": 16}
"""Number of training images in each setting; None: all (paper, Section IV-B)."""
REAL = "real"
"""Protocol that takes the real defects of the data set."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One detector on one category."""

    category: str
    """Name of the category."""
    method: str
    """One of :data:`~f2pad_jax.detectors.DETECTORS`."""
    backbone: str
    """Name of the network."""
    protocol: str
    """One of :data:`~f2pad_jax.data.PROTOCOLS`, or :data:`REAL`."""
    setting: str
    """One of :data:`SETTINGS`."""

    @property
    def folder(self) -> str:
        """Name of the case's folder under ``runs``."""
        return "-".join((self.protocol, self.setting, self.category, self.method, self.backbone))


def training_images(case: Case, category: Category, seed: int) -> list[Path]:
    """Returns the training images of a case, drawn at random where its setting limits their number."""
    shots = SETTINGS[case.setting] or len(category.train)
    order = np.random.default_rng(seed).permutation(len(category.train))
    return [category.train[i] for i in sorted(order[:shots])]
