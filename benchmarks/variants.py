"""Steps that solvers need to reach one IoU: ``python benchmarks/variants.py FOLDER ... --weights FILE [--images N]``.

Several solvers work on equal problems: PatchCore with ResNet18, cut-paste defects (``cutpaste.py``), 224x224, label-free
thresholds. All share region, window, n0 and weights. The mask is the paper's: |a| > τ opened, with exact zeros for the
proximal solver. The mean IoU is followed every five steps, without a stopping rule. A line gives the best IoU on the way,
and the steps to an IoU within a point of the best of the paper's solver. Then it gives the step at which the solver's own
rule stops, with the mean IoU there; the paper's rule compares single steps, the default one steps ten apart.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
from cutpaste import cut_paste
from jax.tree_util import Partial

import f2pad_jax
from f2pad_jax import Settings
from f2pad_jax.backbones import load_backbone
from f2pad_jax.detectors import PatchCore
from f2pad_jax.images.metrics import iou
from f2pad_jax.method import Residual
from f2pad_jax.solvers import Descent, Proximal

EVERY = 5
SOLVERS = {  # with the steps between two checks of the stopping rules
    "the paper's": (Settings.paper().solver, 1),
    "the paper's, unshared": (dataclasses.replace(Settings.paper().solver, sharing=None), 1),
    "Descent (default)": (Descent(), 10),
    "Descent, unshared": (Descent(sharing=None), 10),
    "Proximal": (Proximal(), 10),
    "Adam": (Descent(optimiser=Partial(optax.adam, 0.3), learning_rate=1.0), 10),
    "L-BFGS": (Descent(optimiser=Partial(optax.lbfgs), learning_rate=1.0, gamma0=None, sharing=None), 10),
}


def main() -> None:
    """Follows every solver, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--images", type=int, default=4, help="number of images of each folder")
    parser.add_argument("--steps", type=int, default=600, help="steps of the paper's solver; the others take half")
    arguments = parser.parse_args()
    backbone = load_backbone("resnet18", layers=("layer1", "layer2", "layer3"), weights=arguments.weights)
    paths: dict[str, list] = {name: [] for name in SOLVERS}
    stops: dict[str, list] = {name: [] for name in SOLVERS}
    for folder in arguments.folders:
        train, defects = cut_paste(folder, arguments.images)
        detector = f2pad_jax.fit(PatchCore, train, backbone, size=(224, 224))
        for name, (solver, steps_per_check) in SOLVERS.items():
            steps = arguments.steps if "paper" in name else arguments.steps // 2
            own = Settings(solver=solver, decision=Residual(), max_steps=steps, steps_per_check=steps_per_check)
            settings = dataclasses.replace(own, solver=solver.without_stopping(), steps_per_check=10)
            for image, truth in defects:
                history = f2pad_jax.history(detector, image, settings=settings, every=EVERY)
                path = np.array([iou(mask, truth) for mask in history.masks])
                path = np.pad(path, (0, steps // EVERY + 1 - len(path)), "edge")  # if it became non-finite
                paths[name].append(path)
                stopped = f2pad_jax.history(detector, image, settings=own, every=EVERY)
                stops[name].append((int(stopped.steps[-1]), iou(stopped.masks[-1], truth)))
            jax.clear_caches()  # each program takes memory maps, of which a process has few
            print(f"  {folder.name} {name}: {np.mean(paths[name][-len(defects) :], axis=0)[::10].round(3)}", flush=True)
    means = {name: np.mean(values, axis=0) for name, values in paths.items()}
    target = means["the paper's"].max() - 0.01
    print(f"{len(paths['Adam'])} images; target IoU {target:.3f}\n{'':22}   best  steps to target  own stop  IoU there")
    for name, mean in means.items():
        reached = f"{EVERY * np.argmax(mean >= target):15}" if mean.max() >= target else f"{'-':>15}"
        steps, there = np.mean(stops[name], axis=0)
        print(f"{name:22}  {mean.max():.3f}  {reached}  {steps:8.0f}  {there:9.3f}")


if __name__ == "__main__":
    main()
