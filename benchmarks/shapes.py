"""Choice of the windows' sides: ``python benchmarks/shapes.py FOLDER ...``.

A window's side costs twice: every side in use compiles more programs, and the pixels between a suspect region and its
window take part in every step. FOLDER is the ``--out`` of ``decisions.py``, which keeps the suspect regions of a data set.
For each set of sides, a line gives the pixels of all windows, relative to the first set, and the number of shapes to
compile: in all, and in the mean of the categories.
"""

import argparse
import pickle
from pathlib import Path

import numpy as np

from f2pad_jax import Settings
from f2pad_jax.method._tiling import WINDOWS, divided

SETS = (
    (64, 96, 128, 160, 192, 256, 320, 384, 448, 512),
    (64, 96, 128, 192, 288, 448),
    (64, 96, 160, 256, 448),
    WINDOWS,
    (96, 192, 384),
    (128, 256, 448),
    (128, 320),
)
STRIDE = 8
"""Stride of the detectors, pixels: ResNet18 up to ``layer2``."""


def main() -> None:
    """Prints a line for each set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    regions: dict[str, list[np.ndarray]] = {}
    for folder in parser.parse_args().folders:
        for file in sorted((folder / "solutions").rglob("*.pkl")):
            category = file.relative_to(folder / "solutions").parts[0]
            region = pickle.loads(file.read_bytes())["region"]
            if region.any() and not region.all():
                regions.setdefault(category, []).append(region)
    print(f"{sum(map(len, regions.values()))} images of {len(regions)} categories")
    first = None
    for sides in SETS:
        windows = {
            category: [size for region in of_it for _, size in divided(region, Settings().margin, STRIDE, sides)]
            for category, of_it in regions.items()
        }
        pixels = {category: sum(h * w for h, w in sizes) for category, sizes in windows.items()}
        first = first or pixels
        cost = np.mean([pixels[category] / first[category] for category in first])
        shapes = [len(set(sizes)) for sizes in windows.values()]
        in_all = len(set().union(*map(set, windows.values())))
        print(f"pixels {cost:.2f}  shapes {in_all:2} in all, {np.mean(shapes):.1f} a category  sides {sides}")


if __name__ == "__main__":
    main()
