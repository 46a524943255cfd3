"""Runs of ``f2pad evaluate``: detectors with and without refinement on data in MVTec layout, resumable image by image.

One folder holds everything: ``data/`` (synthetic defects), ``models/`` (detectors), ``runs/CASE/`` (a file for each image)
and ``results.json``. Results on disk are not computed again: a stopped run goes on where it stopped and ends with the
results of an uninterrupted run. Other methods, categories or protocols add to the tables.
"""

import collections
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from f2pad_jax._storage import file_sha256, write_atomically
from f2pad_jax._timing import compile_seconds
from f2pad_jax._version import __version__
from f2pad_jax.data.dataset import make_dataset, read_manifest
from f2pad_jax.data.mvtec import HALVES, RESIZING, Category, Sample, half_of, open_categories, spread
from f2pad_jax.data.protocols import PROTOCOLS
from f2pad_jax.data.textures import TEXTURES, write_textures
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.detectors.registry import DETECTORS
from f2pad_jax.errors import ImageError, OptionError, RunError
from f2pad_jax.evaluation._models import load_or_fit
from f2pad_jax.evaluation._store import load_curves, read_case, save_curves, save_image, stored_variants
from f2pad_jax.evaluation._summary import summarise
from f2pad_jax.evaluation.cases import ABLATIONS, FULL, REAL, SETTINGS, Case
from f2pad_jax.images.files import read_image
from f2pad_jax.images.pixels import resized, to_unit
from f2pad_jax.inpainting._choice import INPAINTERS
from f2pad_jax.method.history import history
from f2pad_jax.method.settings import Settings
from f2pad_jax.progress import Progress, silent
from f2pad_jax.refinement import refine_many

COUNT = 54
"""Default number of synthetic defects in each category (paper: 54)."""
SIDE = 224
"""Default side of images with synthetic defects, pixels (paper: 224)."""


def evaluate(
    root: str | Path,
    out: str | Path,
    *,
    categories: Sequence[str] | None = None,
    methods: Sequence[str] = ("patchcore",),
    backbone: str = "efficientnet-lite0",
    weights: str | Path | None = None,
    protocols: Sequence[str] = ("cut-paste",),
    settings: Sequence[str] = ("normal",),
    ablations: Sequence[str] = (),
    images: int | None = None,
    tune: bool = False,
    curves: int = 0,
    half: str | None = None,
    size: tuple[int, int] | int | None = None,
    smallest_defect: float | int | None = None,
    ignore: str | Path | None = None,
    border: int = 0,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Runs every case (fit, refinement, metrics), writes ``results.json`` and returns the records of the cases.

    Args:
        root: data set in MVTec layout, or ``"textures"``, the photographs of the demonstration.
        out: folder for everything.
        categories: names of the categories; default: all of the data set.
        methods: names in :data:`~f2pad_jax.detectors.DETECTORS`.
        backbone: name of the network.
        weights: weight file of the network; default: the installed one. Default layers that the file does not reach are
            left out.
        protocols: names in :data:`~f2pad_jax.data.PROTOCOLS`, or ``"real"``.
        settings: names of training settings: ``"normal"`` (all images) or ``"few-shot"`` (16).
        ablations: names in :data:`~f2pad_jax.evaluation.ABLATIONS`.
        images: limit of defective images in each category, and of good ones; default: all real images, 54 synthetic ones.
            Real images are chosen evenly over all kinds of defects.
        tune: whether every detector is tuned (:func:`f2pad_jax.tune`).
        curves: number of defective images in each case whose objective is kept for the report, step by step.
        half: half of each test folder, ``"development"`` or ``"report"``; default: the whole folder. Constants are chosen
            on the first half (:func:`~f2pad_jax.data.mvtec.half_of`).
        size: size that images are resized to, as for :func:`f2pad_jax.fit`. Synthetic defects are made at this size: a
            square if one number is given, and 224x224 by default, as in the paper.
        smallest_defect: width of the smallest defect, as for ``fit``.
        ignore: picture of the pixels that do not count, white; they belong to no ground truth.
        border: width of a frame that does not count, pixels of the images.
        seed: seed of everything drawn at random.
        progress: function that receives stage, number done and total.

    Raises:
        ImageError: ``root`` is no data set, or an image can't be used.
        RunError: ``out`` holds a run with other options, or another data set.
        OptionError: a name is unknown.
        CheckpointError: the backbone's weights are missing.
    """
    choices = (
        ("method", methods, DETECTORS),
        ("protocol", protocols, (*PROTOCOLS, REAL)),
        ("setting", settings, SETTINGS),
        ("ablation", ablations, ABLATIONS),
        ("half", [half] if half else [], HALVES),
    )
    for kind, names, options in choices:
        for name in names:
            if name not in options:
                raise OptionError(f"{kind} '{name}' is unknown; there are {', '.join(options)}")
    root, out = Path(root), Path(out)
    if str(root) == TEXTURES and not root.exists():
        root = write_textures(out / "data" / TEXTURES)
    constants = {
        "size": list(size) if isinstance(size, tuple) else size,
        "smallest_defect": smallest_defect,
        "ignore": None if ignore is None else [str(ignore), file_sha256(Path(ignore))],
        "border": border,
        "seed": seed,
        "tune": tune,
        "half": half,
        "inpainter": INPAINTERS[0],
        "settings": Settings().described(),
    }
    extent = _Extent(ablations, images, curves)
    synthetic_size = size if isinstance(size, tuple) else (size or SIDE, size or SIDE)
    for protocol in protocols:
        data = root if protocol == REAL else out / "data" / protocol
        if protocol != REAL:
            generate_defects(root, data, protocol, categories, images or COUNT, synthetic_size, seed, progress)
        for category in open_categories(data, names=list(categories) if categories else None):
            if half:
                category = category._replace(test=half_of(category.test, half))
            for setting in settings:
                for method in methods:
                    case = Case(category.name, method, backbone, protocol, setting)
                    _run(case, category, out, dataclasses.asdict(case) | constants, extent, weights, progress)
    records = [record for folder in sorted((out / "runs").iterdir()) for record in summarise(folder)]
    write_atomically(out / "results.json", json.dumps(records, indent=1).encode())
    return records


def generate_defects(
    root: Path,
    data: Path,
    protocol: str,
    categories: Sequence[str] | None,
    count: int,
    size: tuple[int, int],
    seed: int,
    progress: Progress,
) -> None:
    """Makes the data set of a protocol, unless it is on disk with all categories.

    Raises:
        RunError: ``data`` holds another data set.
    """
    file = data / "manifest.json"
    options = {"protocol": protocol, "count": count, "size": list(size), "seed": seed}
    if file.exists():
        manifest = read_manifest(file)
        if {key: manifest[key] for key in options} != options:
            raise RunError(f"{data}: holds another data set, with other options; choose another output folder")
        requested, present = set(categories or manifest["lenders"]), set(manifest["categories"])
        if requested <= present:
            return
        categories = sorted(requested | present)
    make_dataset(
        root,
        data,
        categories=list(categories) if categories else None,
        protocol=protocol,
        count=count,
        size=size,
        seed=seed,
        progress=lambda name, done, total: progress(f"{protocol} defects: {name}", done, total),
    )


@dataclasses.dataclass(frozen=True)
class _Extent:
    """Ablations, and numbers of images and curves, of every case; a later run may enlarge them."""

    ablations: Sequence[str]
    images: int | None
    curves: int


def _run(
    case: Case,
    category: Category,
    out: Path,
    request: dict[str, Any],
    extent: _Extent,
    weights: str | Path | None,
    progress: Progress,
) -> None:
    """Fits the detector of a case, refines the test images and keeps curves, unless these results are on disk.

    Args:
        case: detector and category.
        category: files of the category.
        out: folder of the evaluation.
        request: names of the case, and options of all cases; both must agree with the files on disk.
        extent: ablations, and numbers of images and curves.
        weights: weight file of the backbone; default: the installed one.
        progress: function that receives stage, number done and total.

    Raises:
        RunError: the folder of the case holds a run with other options.
    """
    folder = out / "runs" / case.folder
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "case.json"
    if file.exists() and (record := read_case(folder)) | request != record:
        raise RunError(
            f"{folder}: holds a run with another size, seed, tuning, half, inpainter, settings or ignored pixels; "
            "choose another folder"
        )
    defective = spread([sample for sample in category.test if sample.mask is not None], extent.images or None)
    samples = defective + spread([sample for sample in category.test if sample.mask is None], extent.images or None)
    variants = (FULL, *extent.ablations)
    missing = {sample.name: set(variants) - set(stored_variants(folder, sample)) for sample in samples}
    curves = load_curves(folder)
    without_curves = [sample for sample in spread(defective, extent.curves) if sample.name not in curves]
    if not any(missing.values()) and not without_curves and file.exists():
        return

    def report(stage: str, done: int, total: int) -> None:
        progress(f"{case.folder}: {stage}", done, total)

    detector, fit_record = load_or_fit(case, category, out / "models", request, weights=weights, progress=report)
    record = {
        **request,
        "version": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        **fit_record,
        "sparsity": float(Settings().adapted(detector).sparsity),
        "resizing": RESIZING,
        "samples": [sample.name for sample in samples],
    }
    write_atomically(file, json.dumps(record, indent=1).encode())
    unusable: dict[str, str] = {}
    for variant in variants:
        remaining = [sample for sample in samples if variant in missing[sample.name] and sample.name not in unusable]
        count = len(samples) - len(remaining)
        report(f"refining, {variant}", count, len(samples))
        for k, _ in enumerate(_refine(detector, remaining, folder, variant, request["inpainter"], unusable)):
            report(f"refining, {variant}", count + k + 1, len(samples))
    record["unusable"] = [*fit_record.get("unusable", []), *unusable.values()]
    write_atomically(file, json.dumps(record, indent=1).encode())
    without_curves = [sample for sample in without_curves if sample.name not in unusable]
    for k, sample in enumerate(without_curves):
        report("curves", k, len(without_curves))
        course = history(detector, _resized(sample, detector), inpaint=request["inpainter"], every=10**6)
        series = {"objective": course.objective, **course.terms}
        curves[sample.name] = {name: np.round(np.asarray(values, float), 3).tolist() for name, values in series.items()}
        save_curves(folder, curves)
        report("curves", k + 1, len(without_curves))


def _refine(
    detector: AbstractDetector,
    samples: Sequence[Sample],
    folder: Path,
    variant: str,
    inpaint: str,
    unusable: dict[str, str],
) -> Iterator[Sample]:
    """Refines images and keeps the result of each; yields its sample. Errors of images are put into ``unusable``."""
    taken: collections.deque[Sample] = collections.deque()

    def images() -> Iterator[Float[np.ndarray, "h w 3"]]:
        for sample in samples:
            try:
                sample.truth(detector.size)
                image = _resized(sample, detector)
            except ImageError as error:
                unusable[sample.name] = str(error)
                continue
            taken.append(sample)
            yield image

    settings = None if variant == FULL else ABLATIONS[variant]
    start, compile_start = time.perf_counter(), compile_seconds()
    for result in refine_many(detector, images(), settings=settings, inpaint=inpaint):
        sample = taken.popleft()
        seconds = time.perf_counter() - start - (compile_seconds() - compile_start)
        save_image(result, sample, folder, variant, max(seconds, 0.0), detector.calibrated.ignored)
        yield sample
        start, compile_start = time.perf_counter(), compile_seconds()


def _resized(sample: Sample, detector: AbstractDetector) -> Float[np.ndarray, "h w 3"]:
    return np.asarray(resized(to_unit(read_image(sample.path, white=detector.calibrated.white)), detector.size))
