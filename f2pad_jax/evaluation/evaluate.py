"""``f2pad evaluate``: detectors, refined and not, on data in MVTec layout; resumable image by image.

Everything is kept under one folder, ``data/`` (generated defects), ``models/`` (one for all protocols that train on the
same images), ``runs/CASE/`` (a file for each image) and ``results.json``. What is there is not done again, so a run that
was killed goes on, and ends with the same figures; other methods, categories or protocols add to the tables of the ones
before.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8

import f2pad_jax
from f2pad_jax.backbones import Backbone, find_network, load_backbone
from f2pad_jax.checkpoints import file_sha256, write_atomically
from f2pad_jax.data.dataset import PROTOCOLS, make_dataset, read_manifest
from f2pad_jax.data.images import read_image
from f2pad_jax.data.mvtec import RESIZING, Category, Sample, open_categories, spread
from f2pad_jax.data.textures import TEXTURES, write_textures
from f2pad_jax.detectors import DETECTORS
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.detectors.fit import fit
from f2pad_jax.errors import DepthError, ImageError, OptionError
from f2pad_jax.evaluation import metrics, peers
from f2pad_jax.evaluation import tune as tuning
from f2pad_jax.history import history
from f2pad_jax.inpaint import in_full
from f2pad_jax.models import load_detector, save_detector
from f2pad_jax.progress import Progress, silent
from f2pad_jax.refine import refine_many
from f2pad_jax.settings import Settings
from f2pad_jax.solvers import Descent
from f2pad_jax.timing import compile_seconds
from f2pad_jax.units import resized, to_unit
from f2pad_jax.window import Refined

FULL = "full"
"""The variant that leaves nothing out."""
ABLATIONS = {
    "initialisation": Settings(max_steps=0, restore_steps=0),
    "no-prior": Settings(alpha1=0.0),
    "no-sparsity": Settings(sparsity=0.0),
    "no-sharing": Settings(solver=Descent(sharing=None)),
    "no-adaptive-step": Settings(solver=Descent(gamma0=None)),
    "paper": Settings.paper(),
}
"""What may be left out (paper, Table III and Fig. 10), and the paper's own settings."""
SETTINGS = {"normal": None, "few-shot": 16}
"""Training images of a setting; None: all (paper, Section IV-B)."""
CURVES = "curves.json"
"""What :func:`load_curves` reads."""
REAL = "real"
"""The protocol that takes the defects that are there."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One detector on one category."""

    category: str
    method: str
    backbone: str
    protocol: str
    setting: str

    @property
    def folder(self) -> str:
        """Its name under ``runs``."""
        return "-".join((self.protocol, self.setting, self.category, self.method, self.backbone))


@dataclasses.dataclass(frozen=True)
class Looked:
    """What is kept of one test image, at the detector's size."""

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    truth: Bool[np.ndarray, "h w"]
    coarse_map: Float[np.ndarray, "h w"]
    coarse_mask: Bool[np.ndarray, "h w"]
    region: Bool[np.ndarray, "h w"]
    normal: UInt8[np.ndarray, "h w 3"]
    """The image restored."""
    masks: dict[str, Bool[np.ndarray, "h w"]]
    """By variant."""
    steps: dict[str, int]
    seconds: dict[str, float]

    @property
    def good(self) -> bool:
        """Whether there is no defect."""
        return not self.truth.any()


KEPT = ("image", "truth", "coarse_map", "coarse_mask", "region", "normal")


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
    size: tuple[int, int] = (224, 224),
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Fit, refine and measure every case asked for; write ``results.json``; return its records.

    Args:
        root: a data set in MVTec layout, or ``"textures"``: the demonstration's photographs (``write_textures``).
        out: folder for everything.
        categories: default: all of the data set.
        methods: of :data:`~f2pad_jax.detectors.DETECTORS`.
        backbone: the network features are taken from.
        weights: its weight file; default: the one installed. Layers by default that the file ends before are left out.
        protocols: of :data:`~f2pad_jax.data.dataset.PROTOCOLS`, or :data:`REAL`.
        settings: of :data:`SETTINGS`.
        ablations: of :data:`ABLATIONS`.
        images: at most this many defective images of each category, spread evenly (real) or generated (paper: 54), and as
            many good ones.
        tune: whether to tune every detector (:func:`f2pad_jax.fit`).
        curves: of how many defective images of each case the objective is kept, step by step, for the report.
        size: height and width images are resized to.
        seed: of everything drawn at random.
        progress: told how far it is.

    Raises:
        ImageError: the data set is none, or ``out`` holds a run that was asked for otherwise.
        OptionError: something unknown was asked for.
        CheckpointError: the backbone's weights are missing.
    """
    known = (
        ("method", methods, DETECTORS),
        ("protocol", protocols, (*PROTOCOLS, REAL)),
        ("setting", settings, SETTINGS),
        ("ablation", ablations, ABLATIONS),
    )
    for what, asked, there in known:
        for name in asked:
            if name not in there:
                raise OptionError(f"{what} '{name}' is unknown; there are {', '.join(there)}")
    root, out = Path(root), Path(out)
    if str(root) == TEXTURES and not root.exists():
        root = write_textures(out / "data" / TEXTURES)
    of_all = {
        "size": list(size),
        "seed": seed,
        "tune": tune,
        "inpainter": in_full(None),
        "settings": Settings().described(),
    }
    for protocol in protocols:
        data = root if protocol == REAL else out / "data" / protocol
        if protocol != REAL:
            _generated(root, data, protocol, categories, images or 54, size, seed, progress)
        for category in open_categories(data, list(categories) if categories else None):
            for setting in settings:
                for method in methods:
                    case = Case(category.name, method, backbone, protocol, setting)
                    asked = dataclasses.asdict(case) | of_all
                    _run(case, category, out / "runs" / case.folder, asked, weights, ablations, images, curves, progress)
    records = [record for folder in sorted((out / "runs").iterdir()) for record in summarise(folder)]
    write_atomically(out / "results.json", json.dumps(records, indent=1).encode())
    return records


def _generated(root, data, protocol, categories, count, size, seed, progress) -> None:
    """The protocol's data set, made unless it is there."""
    manifest = data / "manifest.json"
    wanted = {"protocol": protocol, "count": count, "size": list(size), "seed": seed}
    if manifest.exists():
        there = read_manifest(manifest)
        if {key: there[key] for key in wanted} != wanted:
            raise ImageError(f"{data}: holds another data set than the one asked for; choose another output folder")
        if not set(categories or there["lenders"]) - set(there["categories"]):
            return
        categories = sorted(set(categories or there["lenders"]) | set(there["categories"]))
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


def _run(
    case: Case,
    category: Category,
    folder: Path,
    asked: dict[str, Any],
    weights: str | Path | None,
    ablations: Sequence[str],
    images: int | None,
    curves: int,
    progress: Progress,
) -> None:
    """Fit the case's detector and look at its test images, as far as this isn't done."""
    folder.mkdir(parents=True, exist_ok=True)
    size = tuple(asked["size"])
    file = folder / "case.json"
    if file.exists() and (there := json.loads(file.read_text())) | asked != there:
        raise ImageError(
            f"{folder}: holds a run with another size, seed, tuning, inpainter or settings; choose another folder"
        )
    defective = spread([sample for sample in category.test if sample.mask is not None], images or None)
    samples = defective + spread([sample for sample in category.test if sample.mask is None], images or None)
    missing = {sample.name: [v for v in (FULL, *ablations) if v not in _variants(folder, sample)] for sample in samples}
    drawn = load_curves(folder)
    undrawn = [sample for sample in spread(defective, curves) if sample.name not in drawn]
    if not any(missing.values()) and not undrawn and file.exists():
        return
    detector, fitting = _fitted(case, category, folder, asked, weights, progress)
    about = {
        **asked,
        "version": f2pad_jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        **fitting,
        "resizing": RESIZING,
        "samples": [sample.name for sample in samples],
    }
    write_atomically(file, json.dumps(about, indent=1).encode())
    for variant in (FULL, *ablations):
        todo = [sample for sample in samples if variant in missing[sample.name]]
        progress(f"{case.folder}: refining, {variant}", len(samples) - len(todo), len(samples))
        for k, _ in enumerate(_look(detector, todo, folder, variant, asked)):
            progress(f"{case.folder}: refining, {variant}", len(samples) - len(todo) + k + 1, len(samples))
    for k, sample in enumerate(undrawn):
        progress(f"{case.folder}: curves", k, len(undrawn))
        past = history(detector, _resized(sample, size), inpaint=asked["inpainter"], every=10**6)
        series = {"objective": past.objective, **past.terms}
        drawn[sample.name] = {name: np.round(np.asarray(values, float), 3).tolist() for name, values in series.items()}
        write_atomically(folder / CURVES, json.dumps(drawn).encode())
        progress(f"{case.folder}: curves", k + 1, len(undrawn))


def _training(case: Case, category: Category, seed: int) -> list[Path]:
    """The training images of a setting."""
    shots = SETTINGS[case.setting] or len(category.train)
    order = np.random.default_rng(seed).permutation(len(category.train))
    return [category.train[i] for i in sorted(order[:shots])]


def _fitted(
    case: Case, category: Category, folder: Path, asked: dict[str, Any], weights, progress: Progress
) -> tuple[AbstractDetector, dict[str, Any]]:
    """The case's detector, and what is to be told of its fit."""
    train = _training(case, category, asked["seed"])
    depends = [asked["size"], asked["seed"], asked["tune"]]
    if asked["tune"]:
        depends += [asked["inpainter"], tuning.recipe()]
    recipe = hashlib.sha256(json.dumps(depends).encode())
    for path in train:
        recipe.update(file_sha256(path).encode())
    stem = "-".join((case.setting, case.category, case.method, case.backbone, recipe.hexdigest()[:8]))
    model, told = (folder.parents[1] / "models" / f"{stem}{suffix}" for suffix in (".model", ".json"))
    model.parent.mkdir(exist_ok=True)
    if model.exists() and told.exists():
        return load_detector(model, weights=weights), json.loads(told.read_text())
    method = DETECTORS[case.method]
    backbone = deep_as_the_file(case.backbone, method.default_layers(find_network(case.backbone), len(train)), weights)
    options: dict[str, Any] = {"resume": model.with_suffix(".partial")} if case.method == "cflow" else {}
    began, trials = time.perf_counter(), []
    detector = fit(
        method,
        (read_image(path) for path in train),
        backbone,
        size=tuple(asked["size"]),
        tuning=trials if asked["tune"] else None,
        seed=asked["seed"],
        progress=lambda stage, done, total: progress(f"{case.folder}: {stage}", done, total),
        **options,
    )
    save_detector(model, detector)
    about = {
        "fit_seconds": round(time.perf_counter() - began, 1),
        "training_images": len(train),
        "layers": list(detector.backbone.layers),
        "threshold": float(detector.calibrated.threshold),
        "pixel_components": detector.calibrated.prior.num_components,
        "tuning": [trial._asdict() for trial in trials],
    }
    write_atomically(told, json.dumps(about).encode())
    return detector, about


def deep_as_the_file(name: str, layers: tuple[str, ...], weights) -> Backbone:
    """The backbone, without the layers that a weight file given for it doesn't reach."""
    while True:
        try:
            return load_backbone(name, layers=layers, weights=weights)
        except DepthError:
            if weights is None or len(layers) == 1:
                raise
            layers = layers[:-1]


def _file(folder: Path, sample: Sample) -> Path:
    return folder / "images" / f"{sample.name}.npz"


def _variants(folder: Path, sample: Sample) -> list[str]:
    """The variants an image has been refined by."""
    path = _file(folder, sample)
    if not path.exists():
        return []
    with np.load(path) as arrays:
        return _refined_by(arrays.files)


def _refined_by(names: Iterable[str]) -> list[str]:
    """The variants among the names of what is kept of an image."""
    return [name.removeprefix("mask ") for name in names if name.startswith("mask ")]


def _look(
    detector: AbstractDetector, samples: Sequence[Sample], folder: Path, variant: str, asked: dict[str, Any]
) -> Iterator[Sample]:
    """Refine images and keep what came of each, beside what was kept before."""
    images = (_resized(sample, tuple(asked["size"])) for sample in samples)
    settings = None if variant == FULL else ABLATIONS[variant]
    began, compiled = time.perf_counter(), compile_seconds()
    results = refine_many(detector, images, settings=settings, inpaint=asked["inpainter"])
    for sample, result in zip(samples, results, strict=True):
        now, compiling = time.perf_counter(), compile_seconds()
        _keep(result, sample, folder, variant, max(now - began - (compiling - compiled), 0.0))
        yield sample
        began, compiled = time.perf_counter(), compile_seconds()


def _resized(sample: Sample, size: tuple[int, int]) -> Float[np.ndarray, "h w 3"]:
    return np.asarray(resized(to_unit(read_image(sample.path)), size))


def _keep(result: Refined, sample: Sample, folder: Path, variant: str, seconds: float) -> None:
    """One image's result; ``seconds`` since the one before."""
    path, arrays = _file(folder, sample), {}
    if path.exists():
        with np.load(path) as there:
            arrays = dict(there)
    if variant == FULL or not arrays:
        arrays |= {
            "image": np.rint((result.normal + result.anomaly) * 255).astype(np.uint8),
            "truth": sample.truth((result.mask.shape[0], result.mask.shape[1])),
            "coarse_map": result.coarse_map,
            "coarse_mask": result.coarse_mask,
            "region": result.region,
            "normal": np.rint(result.normal * 255).astype(np.uint8),
        }
    arrays |= {f"mask {variant}": result.mask, f"steps {variant}": result.steps, f"seconds {variant}": np.float64(seconds)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def load_images(folder: Path) -> list[Looked]:
    """The images of a run, in their order; those not refined yet are left out."""
    found = []
    for name in json.loads((folder / "case.json").read_text())["samples"]:
        path = folder / "images" / f"{name}.npz"
        if not path.exists():
            continue
        with np.load(path) as arrays:
            variants = _refined_by(arrays.files)
            found.append(
                Looked(
                    name=name,
                    **{key: arrays[key] for key in KEPT},
                    masks={v: arrays[f"mask {v}"] for v in variants},
                    steps={v: int(arrays[f"steps {v}"]) for v in variants},
                    seconds={v: float(arrays[f"seconds {v}"]) for v in variants},
                )
            )
    return found


def load_curves(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Eq. (12) and its terms before every step, of the images of a run it was kept of."""
    path = folder / CURVES
    return json.loads(path.read_text()) if path.exists() else {}


def peer_masks(images: Sequence[Looked]) -> dict[str, list[Bool[np.ndarray, "h w"]]]:
    """What other ways make of the same coarse maps and masks; GrabCut only where OpenCV is installed."""
    low, high = min(i.coarse_map.min() for i in images), max(i.coarse_map.max() for i in images)
    masks = {
        "threshold": [i.coarse_mask for i in images],
        "guided filter": [peers.guided_mask(i.image / 255, i.coarse_mask) for i in images],
        "stable threshold": [peers.stable_mask(i.coarse_map, float(low), float(high)) for i in images],
    }
    with contextlib.suppress(ImportError):
        masks["GrabCut"] = [peers.grabcut(i.image / 255, i.coarse_mask, i.region) for i in images]
    return masks


def summarise(folder: Path) -> list[dict[str, Any]]:
    """A record for each variant and each peer of a run, figures in 0..1, means over its defective images.

    Seconds are those of all images, good ones too, over the number of defective ones.
    ``backbone_iou`` and ``backbone_dice`` are of the coarse map at the threshold of best pixel F1 on the test labels, the
    paper's protocol; ``coarse_iou`` and ``coarse_dice`` are of m0, at the label-free threshold, where refinement starts.
    """
    if not (folder / "case.json").exists() or not (images := load_images(folder)):
        return []
    about = json.loads((folder / "case.json").read_text())
    maps, truth = np.stack([i.coarse_map for i in images]), np.stack([i.truth for i in images])
    defective = [i for i in images if not i.good]
    best = metrics.best_threshold(maps, truth)

    def mean(measure, masks: Iterable[np.ndarray]) -> float:
        pairs = [(m, i.truth) for m, i in zip(masks, images, strict=True) if not i.good]
        return float(np.mean([measure(m, t) for m, t in pairs])) if pairs else float("nan")

    m0 = [i.coarse_mask for i in images]
    shared = {
        **{key: about[key] for key in ("category", "method", "backbone", "protocol", "setting", "seed", "inpainter")},
        "images": len(defective),
        "good_images": len(images) - len(defective),
        "coarse_iou": mean(metrics.iou, m0),
        "coarse_dice": mean(metrics.dice, m0),
        "backbone_iou": mean(metrics.iou, maps > best),
        "backbone_dice": mean(metrics.dice, maps > best),
        "f1_max": metrics.dice((maps > best).reshape(1, -1), truth.reshape(1, -1)),
        "ap": metrics.average_precision(maps, truth),
        "auroc": metrics.auroc(maps, truth),
        "aupro": metrics.aupro(maps, truth),
    }

    def record(variant: str, masks: list[np.ndarray], steps: float, seconds: float) -> dict[str, Any]:
        own = {
            "variant": variant,
            "iou": mean(metrics.iou, masks),
            "dice": mean(metrics.dice, masks),
            **{f"boundary_f1_{r}": mean(lambda m, t, r=r: metrics.boundary_f1(m, t, r), masks) for r in (1, 2, 3)},
            "false_alarms": sum(bool(m.any()) for m, i in zip(masks, images, strict=True) if i.good),
            "steps": steps,
            "seconds_per_image": seconds,
        }
        return shared | own

    records = [
        record(
            variant,
            [i.masks[variant] for i in images],
            float(np.mean([i.steps[variant] for i in defective])),
            float(np.sum([i.seconds[variant] for i in images])) / len(defective),
        )
        for variant in (FULL, *ABLATIONS)
        if defective and all(variant in i.masks for i in images)
    ]
    return records + [record(name, masks, 0.0, 0.0) for name, masks in peer_masks(images).items() if defective]
