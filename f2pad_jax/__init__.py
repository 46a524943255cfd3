"""F2PAD in JAX: pixel-accurate anomaly segmentation from feature-based detectors."""

from f2pad_jax.backbones import Backbone as Backbone
from f2pad_jax.backbones import load_backbone as load_backbone
from f2pad_jax.detectors.anomalib import load_anomalib as load_anomalib
from f2pad_jax.detectors.base import AbstractDetector as AbstractDetector
from f2pad_jax.detectors.base import Calibration as Calibration
from f2pad_jax.detectors.base import NormalImages as NormalImages
from f2pad_jax.detectors.cflow import CFlow as CFlow
from f2pad_jax.detectors.fit import calibrate as calibrate
from f2pad_jax.detectors.fit import fit as fit
from f2pad_jax.detectors.padim import PaDiM as PaDiM
from f2pad_jax.detectors.patchcore import PatchCore as PatchCore
from f2pad_jax.errors import (
    CheckpointError as CheckpointError,
)
from f2pad_jax.errors import (
    F2padError as F2padError,
)
from f2pad_jax.errors import (
    ImageError as ImageError,
)
from f2pad_jax.errors import (
    ModelError as ModelError,
)
from f2pad_jax.errors import (
    OptionError as OptionError,
)
from f2pad_jax.inpaint import MAE as MAE
from f2pad_jax.inpaint import exemplar as exemplar
from f2pad_jax.inpaint import harmonic as harmonic
from f2pad_jax.masks import AbstractDecision as AbstractDecision
from f2pad_jax.masks import Evidence as Evidence
from f2pad_jax.masks import Mixture as Mixture
from f2pad_jax.masks import Residual as Residual
from f2pad_jax.models import load_detector as load_detector
from f2pad_jax.models import save_detector as save_detector
from f2pad_jax.objective import Problem as Problem
from f2pad_jax.penalties import (
    L0 as L0,
)
from f2pad_jax.penalties import (
    L1 as L1,
)
from f2pad_jax.penalties import (
    MCP as MCP,
)
from f2pad_jax.penalties import (
    AbstractPenalty as AbstractPenalty,
)
from f2pad_jax.penalties import (
    Log as Log,
)
from f2pad_jax.prior import PixelPrior as PixelPrior
from f2pad_jax.prior import fit_prior as fit_prior
from f2pad_jax.refine import Refined as Refined
from f2pad_jax.refine import refine as refine
from f2pad_jax.settings import Settings as Settings
from f2pad_jax.solvers import (
    AbstractSolver as AbstractSolver,
)
from f2pad_jax.solvers import (
    Descent as Descent,
)
from f2pad_jax.solvers import (
    GradientSharing as GradientSharing,
)
from f2pad_jax.solvers import (
    Outcome as Outcome,
)
from f2pad_jax.solvers import (
    Proximal as Proximal,
)
from f2pad_jax.solvers import (
    Sharing as Sharing,
)
from f2pad_jax.solvers import (
    Solution as Solution,
)
from f2pad_jax.solvers import (
    State as State,
)
from f2pad_jax.solvers import (
    scale_by_adan as scale_by_adan,
)
from f2pad_jax.solvers import (
    solve as solve,
)

__version__ = "0.1.0"
