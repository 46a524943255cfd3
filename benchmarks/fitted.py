"""What benchmarks share: a PatchCore fitted to a folder in MVTec layout, images of it, and the memory taken."""

import argparse
import resource
from pathlib import Path

import f2pad_jax
from f2pad_jax.data.images import read_image
from f2pad_jax.data.mvtec import Category, Sample, open_category, spread


def peak() -> float:
    """GiB this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def command_line(doc: str, images: int) -> argparse.ArgumentParser:
    """A network's options, and how many images by default."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--layers", nargs="+", default=["layer1", "layer2", "layer3"])
    parser.add_argument("--weights")
    parser.add_argument("--images", type=int, default=images)
    return parser


def fitted(folder: Path, arguments: argparse.Namespace, side: int = 224) -> tuple[Category, f2pad_jax.PatchCore]:
    """The folder's category, and a detector of its training images."""
    category = open_category(folder)
    backbone = f2pad_jax.load_backbone(arguments.backbone, layers=tuple(arguments.layers), weights=arguments.weights)
    train = [read_image(path) for path in category.train]
    return category, f2pad_jax.fit(f2pad_jax.PatchCore, train, backbone, size=(side, side))


def defective_first(category: Category, count: int) -> tuple[list[Sample], list[Sample]]:
    """Test images with a defect, spread evenly over them, and as many good ones as are wanting to ``count``."""
    defective = spread([sample for sample in category.test if sample.mask], count)
    return defective, spread([sample for sample in category.test if not sample.mask], count - len(defective))
