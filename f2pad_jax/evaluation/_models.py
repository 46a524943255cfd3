"""Detectors of an evaluation: fitted once, kept under ``models``, shared by all protocols with equal training images."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from f2pad_jax._storage import file_sha256, write_atomically
from f2pad_jax.backbones.backbone import find_network, load_to_depth
from f2pad_jax.data.mvtec import Category, read_mask
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.detectors.fitting import fit
from f2pad_jax.detectors.registry import DETECTORS
from f2pad_jax.detectors.saving import load_detector, save_detector
from f2pad_jax.evaluation._store import read_record
from f2pad_jax.evaluation.cases import Case, training_images
from f2pad_jax.images.files import check_images, read_image
from f2pad_jax.method.settings import Settings
from f2pad_jax.progress import Progress
from f2pad_jax.tuning import recipe, tune


def load_or_fit(
    case: Case,
    category: Category,
    models: Path,
    request: dict[str, Any],
    *,
    weights: str | Path | None,
    progress: Progress,
) -> tuple[AbstractDetector, dict[str, Any]]:
    """Loads the detector of a case, or fits and saves it if there is no model yet.

    Args:
        case: detector and category.
        category: files of the category.
        models: folder of all models.
        request: sizes, seed, inpainter, and whether the detector is tuned.
        weights: weight file of the backbone; default: the installed one.
        progress: function that receives stage, number done and total.

    Returns:
        The detector, and the record of its fit.

    Raises:
        CheckpointError: the backbone's weights are missing.
        ImageError: there are too few training images.
    """
    paths = training_images(case, category, request["seed"])
    model = models / f"{_stem(case, paths, request)}.model"
    file = model.with_suffix(".json")
    if model.exists() and file.exists():
        return load_detector(model, weights=weights), read_record(file)
    models.mkdir(exist_ok=True)
    method, trials, start = DETECTORS[case.method], [], time.perf_counter()
    backbone = load_to_depth(case.backbone, method.default_layers(find_network(case.backbone), len(paths)), weights)
    usable, errors, white = check_images(paths)
    images = (read_image(path, white=white) for path in usable)
    options: dict[str, Any] = {
        "size": tuple(size) if isinstance(size := request["size"], list) else size,
        "smallest_defect": request["smallest_defect"],
        "ignore": None if request["ignore"] is None else read_mask(request["ignore"][0]),
        "border": request["border"],
        "resume": model.with_suffix(".partial"),
        "white": white,
        "seed": request["seed"],
        "progress": progress,
    }
    if request["tune"]:
        detector, trials = tune(method, images, backbone, **options)
    else:
        detector = fit(method, images, backbone, **options)
    save_detector(model, detector)
    record = {
        "fit_seconds": round(time.perf_counter() - start, 1),
        "training_images": len(usable),
        "unusable": [str(error) for error in errors],
        "layers": list(detector.backbone.layers),
        "detector_size": list(detector.size),
        "normal_scores": normal_scores(detector),
        "threshold": float(detector.calibrated.threshold),
        "pixel_components": detector.calibrated.prior.num_components,
        "tuning": [trial._asdict() for trial in trials],
    }
    write_atomically(file, json.dumps(record).encode())
    return detector, record


def normal_scores(detector: AbstractDetector) -> list[float]:
    """Returns the scores of the normal images in units of the limit, as the scores of test images are."""
    normality = detector.calibrated.normality
    if normality is None:
        return []
    scores = detector.in_units(normality.scores, Settings().false_alarms)
    return np.round(np.asarray(scores), 4).tolist()


def _stem(case: Case, paths: list[Path], request: dict[str, Any]) -> str:
    """Returns the name of a model without its suffix; it ends in a checksum of everything that the fit depends on."""
    parts = [request[key] for key in ("size", "smallest_defect", "ignore", "border", "seed", "tune")]
    if request["tune"]:
        parts += [request["inpainter"], recipe()]
    checksum = hashlib.sha256(json.dumps(parts).encode())
    for path in paths:
        checksum.update(file_sha256(path).encode())
    return "-".join((case.setting, case.category, case.method, case.backbone, checksum.hexdigest()[:8]))
