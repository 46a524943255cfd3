"""Results beside the goals: ``python benchmarks/goals.py FOLDER ...``, folders of ``f2pad evaluate``.

Each row stands for a method, a protocol and a setting. It gives the mean over the categories of IoU (DICE) times 100, of
m0, of the best peer (m0 is one) and of F2PAD. F2PAD's value is bold where the goal is met. The goal is a value for
cut-paste, and a number of points above the best peer for the other protocols.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from f2pad_jax.detectors.registry import TITLES
from f2pad_jax.evaluation import ABLATIONS
from f2pad_jax.evaluation.cases import FULL

CUT_PASTE = {
    ("patchcore", "normal"): (95, 97.4),
    ("patchcore", "few-shot"): (94, 96.9),
    ("cflow", "normal"): (94, 96.9),
    ("cflow", "few-shot"): (91, 95),
    ("padim", "normal"): (95, 97.4),
    ("padim", "few-shot"): (93, 96),
}
ABOVE = {"hard": 10, "real": 5}


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of f2pad evaluate")
    arguments = parser.parse_args()
    rows = [row for folder in arguments.folders for row in csv.DictReader((folder / "results.csv").open())]
    print("| | categories | images | m0 | best peer | F2PAD | goal |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in dict.fromkeys((row["method"], row["protocol"], row["setting"]) for row in rows):
        method, protocol, setting = case
        mine = [row for row in rows if (row["method"], row["protocol"], row["setting"]) == case]
        variants = dict.fromkeys(row["variant"] for row in mine if row["variant"] not in ABLATIONS)
        iou, dice = (
            {v: float(np.mean([100 * float(row[key]) for row in mine if row["variant"] == v])) for v in variants}
            for key in ("iou", "dice")
        )
        best = max((v for v in variants if v != FULL), key=iou.__getitem__)
        images = [int(row["images"]) for row in mine if row["variant"] == FULL]
        if protocol == "cut-paste":
            goals = CUT_PASTE[method, setting]
            met, goal = iou[FULL] >= goals[0] and dice[FULL] >= goals[1], f"{goals[0]} ({goals[1]})"
        else:
            met, goal = iou[FULL] >= iou[best] + ABOVE[protocol], f"{iou[best] + ABOVE[protocol]:.1f}"
        reached = f"{iou[FULL]:.1f} ({dice[FULL]:.1f})"
        name = f"{TITLES[method]}, {protocol}" + (", 16-shot" if setting == "few-shot" else "")
        peer = f"{iou[best]:.1f}, {best}"
        shown = f"**{reached}**" if met else reached
        print(f"| {name} | {len(images)} | {sum(images)} | {iou['threshold']:.1f} | {peer} | {shown} | {goal} |")


if __name__ == "__main__":
    main()
