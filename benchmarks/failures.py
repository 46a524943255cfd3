"""Share of the lost pixels that were lost before refinement: ``python benchmarks/failures.py OUT``.

OUT is a folder of ``f2pad evaluate``. Each line stands for a protocol, a setting and a method, over all categories. It
gives the share of defects that the suspect region does not touch. It also gives the share of defects not wholly in it (98 %
of their pixels). Then it gives the mean IoU of all defects, and of the defects in the region.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from f2pad_jax.evaluation._store import load_images
from f2pad_jax.evaluation.cases import FULL
from f2pad_jax.images.metrics import iou


def main() -> None:
    """Prints a line for each protocol, setting and method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of f2pad evaluate")
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    for folder in sorted((arguments.out / "runs").iterdir()):
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
