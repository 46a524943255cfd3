"""Real defects of one category: ``python benchmarks/real_defects.py FOLDER`` (MVTec layout).

Fits PatchCore on ``train/good``, refines everything under ``test``, and prints the mean IoU over defective images of the
coarse mask at its label-free threshold, of the coarse map at the F1-optimal threshold (labels), and of the refined mask,
all at the detector's 224x224 with ground truth resized by nearest neighbour; and how many good images keep an empty mask.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import PIL.Image
from detectors import read_mask

import f2pad_jax
from f2pad_jax.data.images import list_images, read_image
from f2pad_jax.evaluation.metrics import best_threshold, iou


def main(folder: Path) -> None:
    """Fit, refine, print."""
    normal = [read_image(path) for path, _ in list_images([folder / "train" / "good"])]
    detector = f2pad_jax.fit(f2pad_jax.PatchCore, normal, "efficientnet-lite0")
    print(f"{folder.name}: fitted on {len(normal)} images, threshold {float(detector.calibrated.threshold):.2f}")
    rows, maps, truths, good = [], [], [], []
    for path, relative in list_images([folder / "test"]):
        image = np.asarray(PIL.Image.fromarray(read_image(path)).resize(detector.size[::-1], PIL.Image.Resampling.BILINEAR))
        result = jax.tree.map(np.asarray, f2pad_jax.refine(detector, image))
        kind = relative.parts[0]
        if kind == "good":
            good.append((not result.coarse_mask.any(), not result.mask.any()))
            continue
        truth = read_mask(folder, path, relative)
        maps.append(result.coarse_map)
        truths.append(truth)
        rows.append((iou(result.coarse_mask, truth), iou(result.mask, truth)))
        print(f"  {relative}: coarse {rows[-1][0]:.3f}, refined {rows[-1][1]:.3f}, {int(result.steps)} steps", flush=True)
    best = best_threshold(np.stack(maps), np.stack(truths))
    optimal = np.mean([iou(m > best, t) for m, t in zip(maps, truths, strict=True)])
    coarse, refined = np.mean(rows, axis=0)
    print(
        f"mean IoU of {len(rows)} defects: coarse {coarse:.3f} (F1-optimal threshold {optimal:.3f}), refined {refined:.3f}"
    )
    print(
        f"of {len(good)} good images, {sum(g[0] for g in good)} have an empty coarse mask, "
        f"{sum(g[1] for g in good)} an empty refined mask"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
