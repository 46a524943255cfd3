"""Fig. 10 of the paper: ``python benchmarks/sharing_picture.py FOLDER --weights FILE --out FILE.png [--steps N]``.

The paper's solver with gradient sharing (Eq. 13-14) and without, which is plain Adan with its adaptive step, on a cut-paste
defect on a photograph of FOLDER (MVTec layout), PatchCore with ResNet18: the paths of the objective, masks as the paper
draws them, and IoU. Step, clip and penalty are those of ``Settings.paper()``, in a window.
"""

import argparse
from pathlib import Path

import equinox as eqx
from cutpaste import cut_paste
from matplotlib.figure import Figure

import f2pad_jax
from f2pad_jax import Residual, Settings
from f2pad_jax.evaluation.metrics import iou

COLOURS = {"with sharing": "tab:blue", "without": "tab:orange"}


def main() -> None:
    """Solve twice, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--image", type=int, default=0, help="which of eight cut-paste images")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    backbone = f2pad_jax.load_backbone("resnet18", layers=("layer1", "layer2", "layer3"), weights=arguments.weights)
    train, defects = cut_paste(arguments.folder, 8)
    detector = f2pad_jax.fit(f2pad_jax.PatchCore, train, backbone)
    image, truth = defects[arguments.image]
    paper = Settings.paper().solver.endless()
    solvers = {"with sharing": paper, "without": eqx.tree_at(lambda s: s.sharing, paper, None)}
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
