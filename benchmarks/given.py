"""Boxes and true regions in place of the coarse map: ``python benchmarks/given.py ROOT --out FOLDER --weights FILE``.

Hard synthetic defects are made from a data set in MVTec layout, 224x224 pixels. One PatchCore refines each of them three
times: from its own map, from a box drawn around the defect (8 pixels wider), and from the truth grown by 12 pixels. GrabCut
starts from the box too; needs ``pip install opencv-python-headless``. A line gives the mean IoU of each category and of
all, times 100. With the grown truth, the whole loss is the method's; the distance to the own map is the coarse stage's.
"""

from pathlib import Path

import numpy as np
import scipy.ndimage
from fitted import categories_command_line, kept_detector

import f2pad_jax
from f2pad_jax.data import open_categories
from f2pad_jax.data.mvtec import spread
from f2pad_jax.evaluation import peers
from f2pad_jax.evaluation.runs import SIDE, generate_defects
from f2pad_jax.images import read_image
from f2pad_jax.images.metrics import iou
from f2pad_jax.images.pixels import to_unit

MARGIN, GROWTH = 8, 12


def box_around(truth: np.ndarray) -> np.ndarray:
    """Returns the bounding box of a mask, wider by :data:`MARGIN`."""
    (box,) = scipy.ndimage.find_objects(truth.astype(int))
    found = np.zeros_like(truth)
    found[tuple(slice(max(side.start - MARGIN, 0), side.stop + MARGIN) for side in box)] = True
    return found


def main() -> None:
    """Refines, and prints a line for each category."""
    parser = categories_command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10, help="number of defects of each category")
    arguments = parser.parse_args()
    data = arguments.out / "data"
    generate_defects(arguments.root, data, "hard", arguments.categories, arguments.images, (SIDE, SIDE), 0, lambda *_: None)
    names = ("m0", "own map", "box", "GrabCut of box", "refined box", "refined truth + 12")
    print(f"{'category':14}" + "".join(f"{name:>20}" for name in names), flush=True)
    everything = []
    for category in open_categories(data, names=arguments.categories):
        _, detector = kept_detector(category, arguments, arguments.out / "models", protocol="hard")
        samples = spread([sample for sample in category.test if sample.mask], arguments.images)
        images = [read_image(sample.path) for sample in samples]
        truths = [sample.truth((SIDE, SIDE)) for sample in samples]
        boxes = [box_around(truth) for truth in truths]
        grown = [scipy.ndimage.binary_dilation(truth, iterations=GROWTH) for truth in truths]
        own, of_boxes, of_truths = (
            list(f2pad_jax.refine_many(detector, images, **given))
            for given in ({}, {"coarse_mask": boxes}, {"coarse_mask": grown})
        )
        cut = [peers.grabcut(np.asarray(to_unit(i)), box, box) for i, box in zip(images, boxes, strict=True)]
        masks = (
            [result.coarse_mask for result in own],
            [result.mask for result in own],
            boxes,
            cut,
            [result.mask for result in of_boxes],
            [result.mask for result in of_truths],
        )
        rows = np.array([[iou(m, truth) for m, truth in zip(one, truths, strict=True)] for one in masks])
        everything.append(rows)
        print(f"{category.name:14}" + "".join(f"{100 * value:20.1f}" for value in rows.mean(axis=1)), flush=True)
    rows = np.concatenate(everything, axis=1)
    print(f"{'all':14}" + "".join(f"{100 * value:20.1f}" for value in rows.mean(axis=1)), flush=True)


if __name__ == "__main__":
    main()
