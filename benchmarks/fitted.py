"""Shared by several benchmarks: a PatchCore fitted to a folder in MVTec layout, its images, and the memory taken."""

import argparse
import resource
from pathlib import Path

import f2pad_jax
from f2pad_jax.backbones import load_backbone
from f2pad_jax.data import Category, Sample, open_category
from f2pad_jax.data.mvtec import HALVES, spread
from f2pad_jax.detectors import DETECTORS, AbstractDetector, PatchCore
from f2pad_jax.evaluation._models import load_or_fit
from f2pad_jax.evaluation.cases import REAL, Case
from f2pad_jax.images import read_image


def peak() -> float:
    """Returns the most memory this process has taken, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def command_line(doc: str, images: int) -> argparse.ArgumentParser:
    """Returns a parser with the options of a network and the number of images, by default ``images``."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--layers", nargs="+", default=["layer1", "layer2", "layer3"])
    parser.add_argument("--weights")
    parser.add_argument("--images", type=int, default=images)
    return parser


def categories_command_line(doc: str) -> argparse.ArgumentParser:
    """Returns a parser with the options of a data set in MVTec layout, a detector, and the half of the test images."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("root", type=Path)
    parser.add_argument("--categories", nargs="+")
    parser.add_argument("--method", choices=list(DETECTORS), default="patchcore")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--half", choices=HALVES, default=HALVES[0])
    return parser


def kept_detector(
    category: Category, arguments: argparse.Namespace, models: Path, *, protocol: str = REAL, seed: int = 0
) -> tuple[Case, AbstractDetector]:
    """Returns the detector of a category and its case; it is fitted as in an evaluation, once, and kept in ``models``."""
    case = Case(category.name, arguments.method, arguments.backbone, protocol, "normal")
    request = {"size": None, "smallest_defect": None, "ignore": None, "border": 0, "seed": seed, "tune": False}
    models.mkdir(parents=True, exist_ok=True)
    detector, _ = load_or_fit(case, category, models, request, weights=arguments.weights, progress=lambda *_: None)
    return case, detector


def fitted(folder: Path, arguments: argparse.Namespace, side: int = 224) -> tuple[Category, PatchCore]:
    """Returns the folder's category, and a detector fitted to its training images."""
    category = open_category(folder)
    backbone = load_backbone(arguments.backbone, layers=tuple(arguments.layers), weights=arguments.weights)
    train = [read_image(path) for path in category.train]
    return category, f2pad_jax.fit(PatchCore, train, backbone, size=(side, side))


def defective_first(category: Category, count: int) -> tuple[list[Sample], list[Sample]]:
    """Returns ``count`` test images in two lists: defective ones, spread evenly, and good ones if these are too few."""
    defective = spread([sample for sample in category.test if sample.mask], count)
    return defective, spread([sample for sample in category.test if not sample.mask], count - len(defective))
