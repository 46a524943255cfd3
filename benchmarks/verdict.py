"""Verdicts on real parts: good and defective images that are marked, and whether p-values are as rare as they say.

``python benchmarks/verdict.py ROOT --weights FILE`` fits a detector to each category of a data set in MVTec layout, and
scores a half of its test images. Nothing is refined. The first table has a line for each category: AUROC of the image
score, and marked good images and defects at a false-alarm rate of 5 %. "Best limit" is the share of defects above the limit
that 5 % of these good images exceed. The second table has the share of good images whose p-value is at most p.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from f2pad_jax import Settings, fit
from f2pad_jax.backbones import find_network
from f2pad_jax.data import open_categories
from f2pad_jax.data.mvtec import HALVES, half_of
from f2pad_jax.detectors import DETECTORS
from f2pad_jax.evaluation._models import load_to_depth
from f2pad_jax.images.files import read_image
from f2pad_jax.images.metrics import auroc
from f2pad_jax.images.pixels import normalise, resized, to_unit

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""False-alarm rates of the second table."""


@jax.jit
def verdict(detector, image):
    """Returns score and p-value of an image in normalised intensity."""
    return detector.verdict(detector.anomaly_map(image), Settings().false_alarms)


def main() -> None:
    """Prints both tables for the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--categories", nargs="+")
    parser.add_argument("--method", choices=list(DETECTORS), default="patchcore")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--half", choices=HALVES, default=HALVES[0])
    parser.add_argument("--normals", type=int, nargs="+", help="numbers of training images (default: all)")
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    method, size, p_values = DETECTORS[arguments.method], (arguments.size, arguments.size), {}
    print(f"JAX {jax.__version__}, {jax.default_backend()}")
    print(f"{arguments.method}, {arguments.backbone}, {size}, half of the test images: {arguments.half}")
    print("category        normals  fit s  AUROC  good marked  defects marked  best limit")
    for category in open_categories(arguments.root, names=arguments.categories):
        samples = half_of(category.test, arguments.half)
        defective = np.array([sample.mask is not None for sample in samples])
        images = [normalise(resized(to_unit(read_image(sample.path)), size)) for sample in samples]
        for count in arguments.normals or [len(category.train)]:
            chosen = np.sort(np.random.default_rng(0).permutation(len(category.train))[:count])
            layers = method.default_layers(find_network(arguments.backbone), len(chosen))
            backbone = load_to_depth(arguments.backbone, layers, arguments.weights)
            start = time.perf_counter()
            detector = fit(method, (read_image(category.train[i]) for i in chosen), backbone, size=size)
            seconds = time.perf_counter() - start
            scores, p = np.array([verdict(detector, image) for image in images]).T
            good = scores[~defective]
            best = np.quantile(good, 1 - Settings().false_alarms, method="higher") if len(good) else np.nan
            area = auroc(scores[:, None, None], defective[:, None, None]) if len(good) else np.nan
            print(
                f"{category.name:15} {len(chosen):7} {seconds:6.0f} {area:6.3f} {np.sum(good > 1):6} of {len(good):2}"
                f" {np.mean(scores[defective] > 1):14.2f} {np.mean(scores[defective] > best):11.2f}",
                flush=True,
            )
            p_values.setdefault(count if arguments.normals else "all", []).append(p[~defective])
    print("\nshare of good images with a p-value of at most p, all categories together")
    print("normals  " + "  ".join(f"p {rate:5}" for rate in RATES))
    for count, parts in p_values.items():
        together = np.concatenate(parts)
        print(f"{count!s:>7}  " + "  ".join(f"{np.mean(together <= rate):7.3f}" for rate in RATES))


if __name__ == "__main__":
    main()
