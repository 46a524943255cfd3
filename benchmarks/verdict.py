"""Verdicts on real parts: good and defective images that are marked, and whether p-values are as rare as they say.

``python benchmarks/verdict.py ROOT --weights FILE`` fits a detector to each category of a data set in MVTec layout, and
scores a half of its test images. Nothing is refined. The first table has a line for each category and size: seconds of the
fit and of a map, AUROC of the image score, and marked good images and defects at a false-alarm rate of 5 %. "Best limit" is
the share of defects above the limit that 5 % of these good images exceed. "Best cut" is the mean IoU of the defects' maps,
each cut at its best threshold. The second table has the share of good images whose p-value is at most p.

``--sizes 160 224 320 auto`` compares sizes, and ``--picture FILE`` draws best cut and seconds of the fit over the pixels.
``--normals 5 16 160`` fits to fewer images. ``--contaminated N`` puts N defective images of the other half among them.
"""

import itertools
import time
from pathlib import Path

import jax
import numpy as np
from fitted import categories_command_line
from matplotlib.figure import Figure

from f2pad_jax import Settings, fit
from f2pad_jax.backbones import find_network
from f2pad_jax.commands.fit import grouped
from f2pad_jax.data import open_categories
from f2pad_jax.data.mvtec import half_of, spread
from f2pad_jax.detectors import DETECTORS
from f2pad_jax.evaluation._models import load_to_depth
from f2pad_jax.evaluation._summary import best_cut
from f2pad_jax.images.files import read_image
from f2pad_jax.images.metrics import auroc
from f2pad_jax.images.pixels import normalise, resized, to_unit

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""False-alarm rates of the second table."""


@jax.jit
def anomaly_map(detector, image):
    """Returns the coarse map of an image in normalised intensity."""
    return detector.anomaly_map(image)


def main() -> None:
    """Prints both tables for the arguments of the command line."""
    parser = categories_command_line(__doc__)
    parser.add_argument("--normals", type=int, nargs="+", help="numbers of training images (default: all)")
    parser.add_argument("--sizes", nargs="+", default=["auto"], help="auto, or sides of squares with as many pixels")
    parser.add_argument("--contaminated", type=int, default=0, help="number of defective images among the normal images")
    parser.add_argument("--groups", help="pattern of the groups of normal images, as for 'f2pad fit'")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    method, p_values, curves = DETECTORS[arguments.method], {}, {}
    print(f"JAX {jax.__version__}, {jax.default_backend()}")
    print(f"{arguments.method}, {arguments.backbone}, half of the test images: {arguments.half}")
    print("category        size     normals  fit s  s/map  AUROC  good marked  defects marked  best limit  best cut")
    for category in open_categories(arguments.root, names=arguments.categories):
        samples = half_of(category.test, arguments.half)
        defective = np.array([sample.mask is not None for sample in samples])
        others = [sample for sample in category.test if sample.mask and sample not in samples]
        contaminants = [sample.path for sample in spread(others, arguments.contaminated)]
        counts = arguments.normals or [len(category.train)]
        for count, size in itertools.product(counts, arguments.sizes):
            numbers = np.sort(np.random.default_rng(0).permutation(len(category.train))[:count])
            chosen = [*(category.train[i] for i in numbers), *contaminants]
            layers = method.default_layers(find_network(arguments.backbone), len(chosen))
            backbone = load_to_depth(arguments.backbone, layers, arguments.weights)
            start = time.perf_counter()
            options = {} if size == "auto" else {"size": int(size)}
            if arguments.groups:
                options["groups"] = grouped(chosen, arguments.groups)
            detector = fit(method, map(read_image, chosen), backbone, **options)
            seconds = time.perf_counter() - start
            images = [normalise(resized(to_unit(read_image(sample.path)), detector.size)) for sample in samples]
            jax.block_until_ready(anomaly_map(detector, images[0]))
            start = time.perf_counter()
            maps = [jax.block_until_ready(anomaly_map(detector, image)) for image in images]
            seconds_a_map = (time.perf_counter() - start) / len(maps)
            scores, p = np.array([detector.verdict(m, Settings().false_alarms) for m in maps]).T
            cuts = [best_cut(np.asarray(m), s.truth(detector.size)) for m, s in zip(maps, samples, strict=True) if s.mask]
            good = scores[~defective]
            best = np.quantile(good, 1 - Settings().false_alarms, method="higher") if len(good) else np.nan
            area = auroc(scores[:, None, None], defective[:, None, None]) if len(good) else np.nan
            print(
                f"{category.name:15} {'x'.join(map(str, detector.size)):8} {len(chosen):7} {seconds:6.0f}"
                f" {seconds_a_map:6.2f} {area:6.3f} {np.sum(good > 1):6} of {len(good):2}"
                f" {np.mean(scores[defective] > 1):14.2f} {np.mean(scores[defective] > best):11.2f}"
                f" {100 * np.mean(cuts):9.1f}",
                flush=True,
            )
            p_values.setdefault((size, count if arguments.normals else "all"), []).append(p[~defective])
            curves.setdefault(category.name, []).append((np.prod(detector.size) ** 0.5, 100 * np.mean(cuts), seconds))
    print("\nshare of good images with a p-value of at most p, all categories together")
    print("size  normals  " + "  ".join(f"p {rate:5}" for rate in RATES))
    for (size, count), parts in p_values.items():
        together = np.concatenate(parts)
        print(f"{size:>4} {count!s:>8}  " + "  ".join(f"{np.mean(together <= rate):7.3f}" for rate in RATES))
    if arguments.picture:
        draw(curves, arguments.picture)


def draw(curves, path):
    """Draws the best cut and the seconds of the fit over the size, a line for each category."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2), (1, 2), ("best cut of the map, IoU", "seconds of the fit"), strict=True
    ):
        for name, points in curves.items():
            x, *_ = values = np.array(sorted(points)).T
            axes.plot(x, values[column], "o-", label=name)
        axes.set(xlabel="side of a square with as many pixels", ylabel=label, ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
