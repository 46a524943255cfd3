"""Fig. 10 of the paper: ``python benchmarks/sharing_picture.py FOLDER --weights FILE --out FILE.png [--steps N]``.

The picture compares the paper's solver with gradient sharing (Eq. 13-14) and without. Without sharing it is plain Adan with
the adaptive step. The defect is cut-paste on a photograph of FOLDER (MVTec layout), and the detector is a PatchCore with
ResNet18. The picture shows the paths of the objective, and the masks as the paper draws them with their IoU. Step, clip and
penalty come from ``Settings.paper()``; the image is solved in a window.
"""

import argparse
import dataclasses
from pathlib import Path

from cutpaste import cut_paste
from matplotlib.figure import Figure

import f2pad_jax
from f2pad_jax import Settings
from f2pad_jax.backbones import load_backbone
from f2pad_jax.detectors import PatchCore
from f2pad_jax.images.metrics import iou
from f2pad_jax.method import Residual

COLOURS = {"with sharing": "tab:blue", "without": "tab:orange"}


def main() -> None:
    """Solves with sharing and without, and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--image", type=int, default=0, help="number of the image, of eight cut-paste images")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    backbone = load_backbone("resnet18", layers=("layer1", "layer2", "layer3"), weights=arguments.weights)
    train, defects = cut_paste(arguments.folder, 8)
    detector = f2pad_jax.fit(PatchCore, train, backbone, size=(224, 224))
    image, truth = defects[arguments.image]
    paper = Settings.paper().solver.without_stopping()
    solvers = {"with sharing": paper, "without": dataclasses.replace(paper, sharing=None)}
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplot_mosaic([["x", "truth", *solvers], ["curves"] * 4])
    for name, picture in (("x", image), ("truth", truth)):
        axes[name].imshow(picture, cmap="gray")
    axes["x"].set_title("input")
    axes["truth"].set_title("ground truth")
    for name, solver in solvers.items():
        settings = Settings(solver=solver, decision=Residual(), max_steps=arguments.steps)
        history = f2pad_jax.history(detector, image, settings=settings, every=50)
        score = iou(history.masks[-1], truth)
        print(f"{name}: objective {history.objective[0]:.1f} -> {history.objective[-1]:.2f}, IoU {score:.3f}", flush=True)
        axes[name].imshow(history.masks[-1], cmap="gray")
        axes[name].set_title(f"{name}: IoU {score:.3f}", color=COLOURS[name])
        axes["curves"].plot(history.objective, color=COLOURS[name], label=name)
    for name in ("x", "truth", *solvers):
        axes[name].axis("off")
    axes["curves"].set(xlabel="step", ylabel="objective, Eq. (12)", yscale="log")
    axes["curves"].legend()
    figure.savefig(arguments.out, dpi=90)


if __name__ == "__main__":
    main()
