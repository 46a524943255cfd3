"""How much of what refinement loses was lost before it: ``python benchmarks/failures.py OUT``.

OUT is a folder of ``f2pad evaluate``. For each protocol, setting and method, over all categories: the share of defects the
suspect region does not touch, of those not wholly in it (98 % of their pixels), and mean IoU with and without these.
"""

import json
import sys
from pathlib import Path

import numpy as np

from f2pad_jax.evaluation.evaluate import FULL, load_images
from f2pad_jax.evaluation.metrics import iou


def main() -> None:
    """A line for each."""
    found: dict[str, list[tuple[float, float]]] = {}
    for folder in sorted((Path(sys.argv[1]) / "runs").iterdir()):
        if not (folder / "case.json").exists():  # still being fitted
            continue
        about = json.loads((folder / "case.json").read_text())
        rows = found.setdefault(" ".join(about[key] for key in ("protocol", "setting", "method")), [])
        for image in load_images(folder):
            if not image.good and FULL in image.masks:
                covered = float(np.mean(image.region[image.truth]))
                rows.append((covered, iou(image.masks[FULL], image.truth)))
    for name, rows in found.items():
        if not rows:  # only good images so far
            continue
        covered, values = np.array(rows).T
        inside = covered > 0.98
        print(
            f"{name:28} {len(rows):4} defects: {np.mean(covered == 0):.1%} untouched by the suspect region, "
            f"{np.mean(~inside):.1%} not wholly in it; IoU {values.mean():.3f}, of those in it {values[inside].mean():.3f}"
        )


if __name__ == "__main__":
    main()
