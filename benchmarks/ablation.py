"""What each part of the method gives: ``python benchmarks/ablation.py FOLDER ... --weights FILE [--images N]``.

PatchCore, fitted on normal images of folders in MVTec layout, and cut-paste defects on others of them (``cutpaste.py``);
224x224, label-free thresholds. Each line leaves out one part of the default settings; the mean IoU is that of the paper's
mask, |a| > τ opened, and of the default one, drawn from the same solution. "Initialisation" takes no step.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from cutpaste import cut_paste

import f2pad_jax
from f2pad_jax import Descent, Residual, Settings
from f2pad_jax.evaluation.metrics import iou
from f2pad_jax.region import opened
from f2pad_jax.units import STD

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
    """A table per backbone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--weights", help="of ResNet18")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=BACKBONES)
    parser.add_argument("--images", type=int, default=6, help="of each folder")
    arguments = parser.parse_args()
    names = [folder.name for folder in arguments.folders]
    for network in arguments.backbones:
        weights = arguments.weights if network == "resnet18" else None
        backbone = f2pad_jax.load_backbone(network, layers=BACKBONES[network], weights=weights)
        found: dict[str, list] = {}
        for folder in arguments.folders:
            train, defects = cut_paste(folder, arguments.images)
            detector = f2pad_jax.fit(f2pad_jax.PatchCore, train, backbone)
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
                jax.clear_caches()  # each program takes memory maps, of which there are few
                print(f"  {network} {folder.name} {name}: {np.mean(columns[name], axis=0).round(3)}", flush=True)
            coarse = [iou(np.asarray(f2pad_jax.refine(detector, x, settings=NO_STEP).coarse_mask), m) for x, m in defects]
            columns["coarse"] = [(value, value) for value in coarse]
            for name, values in columns.items():
                found.setdefault(name, []).append(np.mean(values, axis=0))
        print(f"{network}, {arguments.images} images of each; IoU of the paper's mask / of ours")
        print(f"{'':22}" + "".join(f"{name:>16}" for name in [*names, "mean"]))
        for name, values in found.items():
            cells = [*values, np.mean(values, axis=0)]
            print(f"{name:22}" + "".join(f"{paper:9.3f} /{ours:5.3f}" for paper, ours in cells), flush=True)


def residual(image: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The paper's mask of a decomposition."""
    return np.asarray(opened(np.linalg.norm((image - n) / STD, axis=-1) > Residual().tau))


NO_STEP = Settings(max_steps=0, restore_steps=0)

if __name__ == "__main__":
    main()
