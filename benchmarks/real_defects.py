"""Masks of real defects: ``python benchmarks/real_defects.py FOLDER ... --weights FILE [--images N]``.

Fits PatchCore on ``train/good`` of folders in MVTec layout and prints the mean IoU over the defective images of ``test``,
at 224x224 (ground truth resized by nearest neighbour, > 0.5), of the coarse mask at its label-free threshold, of the guided
filter and GrabCut started from it, and of the refined mask; and how many good images keep an empty mask.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

import f2pad_jax
from f2pad_jax.data.images import read_image
from f2pad_jax.data.mvtec import open_category, spread
from f2pad_jax.evaluation.metrics import iou
from f2pad_jax.evaluation.peers import grabcut, guided_mask
from f2pad_jax.units import resized, to_unit


def measure(folder: Path, backbone: f2pad_jax.Backbone, limit: int | None) -> None:
    """One category."""
    category = open_category(folder)
    detector = f2pad_jax.fit(f2pad_jax.PatchCore, [read_image(path) for path in category.train], backbone)
    defective = spread([sample for sample in category.test if sample.mask], limit or None)  # over the kinds of defect
    good = [sample for sample in category.test if not sample.mask]
    if limit:
        good = good[:limit]
    rows, empty, began = [], [], time.perf_counter()
    for sample in [*defective, *good]:
        image = np.asarray(resized(to_unit(read_image(sample.path)), detector.size))
        result = jax.tree.map(np.asarray, f2pad_jax.refine(detector, image))
        if not sample.mask:
            empty.append((not result.coarse_mask.any(), not result.mask.any()))
            continue
        truth, m0 = sample.truth(detector.size), result.coarse_mask
        masks = (m0, guided_mask(image, m0), grabcut(image, m0, result.region), result.mask)
        rows.append([iou(mask, truth) for mask in masks])
        print(f"  {sample.name}: {' '.join(f'{v:.3f}' for v in rows[-1])}, {int(result.steps)} steps", flush=True)
    coarse, guided, cut, refined = np.mean(rows, axis=0)
    seconds = (time.perf_counter() - began) / (len(rows) + len(empty))
    print(
        f"{folder.name:12} {len(rows):3} defects  IoU coarse {coarse:.3f}, guided filter {guided:.3f}, GrabCut {cut:.3f}, "
        f"refined {refined:.3f}; of {len(empty)} good images {sum(e[0] for e in empty)} have an empty coarse mask and "
        f"{sum(e[1] for e in empty)} an empty refined one; {seconds:.1f} s an image",
        flush=True,
    )


def main() -> None:
    """All folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--layers", nargs="+", default=["layer1", "layer2", "layer3"])
    parser.add_argument("--weights")
    parser.add_argument("--images", type=int, help="at most this many defective and good images of a folder")
    arguments = parser.parse_args()
    backbone = f2pad_jax.load_backbone(arguments.backbone, layers=tuple(arguments.layers), weights=arguments.weights)
    for folder in arguments.folders:
        measure(folder, backbone, arguments.images)


if __name__ == "__main__":
    main()
