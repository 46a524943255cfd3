"""Updates of a detector with further good images, against the detector before and against a refit with all images.

``python benchmarks/updating.py ROOT --weights FILE --categories capsule leather --from-test leather`` fits PatchCore to
half of the normal images of each category. It updates the detector with further good images: with those that the detector
marks (false alarms) alone, and with all of them. The further images are the other half of the training images. With
``--from-test`` they are the good test images of the half that is not measured, and the fit has all training images. The
table has the number of scores, the features of the bank, the limit, the marked images of a half of the test images, and
seconds of the processor.
"""

import time
from functools import partial

import jax
import numpy as np
from fitted import categories_command_line
from verdict import anomaly_map

from f2pad_jax import Settings, fit, update
from f2pad_jax.backbones import find_network, load_backbone
from f2pad_jax.data import open_categories
from f2pad_jax.data.mvtec import half_of
from f2pad_jax.detectors import DETECTORS
from f2pad_jax.images import read_image
from f2pad_jax.images.pixels import normalise, resized, to_unit


def scores(detector, paths):
    """Returns the score of each image, in units of the limit."""
    maps = (anomaly_map(detector, normalise(resized(to_unit(read_image(path)), detector.size))) for path in paths)
    return np.array([float(detector.verdict(found, Settings().false_alarms)[0]) for found in maps])


def main() -> None:
    """Prints the table for the arguments of the command line."""
    parser = categories_command_line(__doc__)
    parser.add_argument("--size", type=int, default=224, help="side of a square with as many pixels")
    parser.add_argument("--from-test", nargs="+", default=[], help="categories whose further images are test images")
    arguments = parser.parse_args()
    method = DETECTORS[arguments.method]
    print(f"JAX {jax.__version__}, {jax.default_backend()}; {arguments.method}, {arguments.backbone}")
    print("category  detector             scores  bank  limit  good marked  defects marked  CPU s")
    for category in open_categories(arguments.root, names=arguments.categories):
        samples = half_of(category.test, arguments.half)
        good, defects = ([s.path for s in samples if (s.mask is None) == wanted] for wanted in (True, False))
        first, more = category.train[::2], category.train[1::2]
        if category.name in arguments.from_test:
            first, more = category.train, [s.path for s in category.test if s.mask is None and s.path not in good]
        layers = method.default_layers(find_network(arguments.backbone), len(first))
        backbone = load_backbone(arguments.backbone, layers=layers, weights=arguments.weights)

        def fitted(paths, backbone=backbone):
            return fit(method, map(read_image, paths), backbone, size=arguments.size)

        def line(name, make, paths, category=category, good=good, defects=defects):
            start = time.process_time()
            detector = jax.block_until_ready(make(paths))
            seconds = time.process_time() - start
            normality, bank = detector.calibrated.normality, getattr(detector, "memory_bank", ())
            marked = [np.sum(scores(detector, paths) > 1) for paths in (good, defects)]
            print(
                f"{category.name:9} {name:20} {len(normality.scores):6} {len(bank):5}"
                f" {float(normality.limit(Settings().false_alarms)):6.2f} {marked[0]:5} of {len(good):2}"
                f" {marked[1]:8} of {len(defects):2} {seconds:8.0f}",
                flush=True,
            )
            return detector

        before = line("fit", fitted, first)
        alarms = [path for path, score in zip(more, scores(before, more), strict=True) if score > 1]
        print(f"{category.name:9} {len(alarms)} of {len(more)} further good images are marked")
        if alarms:
            line("+ false alarms", partial(update, before, force=True), alarms)
        line("+ all further images", partial(update, before, force=True), more)
        line("refit with all", fitted, [*first, *more])


if __name__ == "__main__":
    main()
