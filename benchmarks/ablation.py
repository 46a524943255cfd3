"""Contribution of each part of the method: ``python benchmarks/ablation.py FOLDER ... --weights FILE [--images N]``.

PatchCore is fitted to normal images of folders in MVTec layout. Other normal images get cut-paste defects
(``cutpaste.py``). All images have 224x224 pixels, and thresholds need no label. Each line leaves out one part of the
default settings. It gives the mean IoU of the paper's mask, |a| > τ opened, and of the default mask. Both are drawn from
one solution. "Initialisation" takes no step.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from cutpaste import cut_paste

import f2pad_jax
from f2pad_jax import Settings
from f2pad_jax.backbones import load_backbone
from f2pad_jax.detectors import PatchCore
from f2pad_jax.images import STD, to_unit
from f2pad_jax.images._morphology import opened
from f2pad_jax.images.metrics import iou
from f2pad_jax.method import Residual, look
from f2pad_jax.solvers import Descent

VARIANTS = {
    "full": {},
    "without pixel prior": {"alpha1": 0.0},
    "without variation": {"alpha2": 0.0},
    "without sparsity": {"sparsity": 0.0},
    "without sharing": {"solver": Descent(sharing=None)},
    "without adaptive step": {"solver": Descent(gamma0=None)},
}
BACKBONES = {"resnet18": ("layer1", "layer2", "layer3"), "efficientnet-lite0": None}


def main() -> None:
    """Prints a table for each backbone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--weights", help="weight file of ResNet18")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=BACKBONES)
    parser.add_argument("--images", type=int, default=6, help="number of defective images of each folder")
    arguments = parser.parse_args()
    names = [folder.name for folder in arguments.folders]
    for network in arguments.backbones:
        weights = arguments.weights if network == "resnet18" else None
        backbone = load_backbone(network, layers=BACKBONES[network], weights=weights)
        found: dict[str, list] = {}
        for folder in arguments.folders:
            train, defects = cut_paste(folder, arguments.images)
            detector = f2pad_jax.fit(PatchCore, train, backbone, size=(224, 224))
            columns: dict[str, list] = {}
            for name, changes in VARIANTS.items():
                for image, truth in defects:
                    history = f2pad_jax.history(detector, image, settings=Settings(**changes), every=1000)
                    scores = [
                        (iou(residual(image, n), truth), iou(m, truth))
                        for n, m in zip(history.n, history.masks, strict=True)
                    ]
                    columns.setdefault(name, []).append(scores[-1])
                    if name == "full":
                        columns.setdefault("initialisation", []).append(scores[0])
                jax.clear_caches()  # each program takes memory maps, of which a process has few
                print(f"  {network} {folder.name} {name}: {np.mean(columns[name], axis=0).round(3)}", flush=True)
            coarse = [iou(np.asarray(look(detector, to_unit(x), Settings()).mask), truth) for x, truth in defects]
            columns["coarse"] = [(value, value) for value in coarse]
            for name, values in columns.items():
                found.setdefault(name, []).append(np.mean(values, axis=0))
        print(f"{network}, {arguments.images} images of each; IoU of the paper's mask / of ours")
        print(f"{'':22}" + "".join(f"{name:>16}" for name in [*names, "mean"]))
        for name, values in found.items():
            cells = [*values, np.mean(values, axis=0)]
            print(f"{name:22}" + "".join(f"{paper:9.3f} /{ours:5.3f}" for paper, ours in cells), flush=True)


def residual(image: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Returns the paper's mask of a decomposition, both images in 0..1."""
    return np.asarray(opened(np.linalg.norm((image - n) / STD, axis=-1) > Residual().tau))


if __name__ == "__main__":
    main()
