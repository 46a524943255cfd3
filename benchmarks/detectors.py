"""Detectors on real defects: ``python benchmarks/detectors.py ../shared/data --weights resnet18=FILE --out DIR``.

A case is a method, a backbone, a category (MVTec layout) and a number of training images. For every case, the table gives
pixel AUROC, average precision, F1 and IoU at the F1-optimal threshold, and F1 at the label-free threshold. Pixels of all
test images, at 224x224, are pooled. Ground truth is resized by nearest neighbour, > 0.5. The table also gives seconds to
fit (compilation included), peak memory of the process, and ms for one coarse map. Each case runs in a process of its own
and leaves its figures, its model and its pixel maps in DIR. Cases found there are not run again, and an interrupted flow
goes on from its last state.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from fitted import peak
from sklearn.metrics import average_precision_score, roc_auc_score

import f2pad_jax
from f2pad_jax.backbones import find_network, load_backbone
from f2pad_jax.data import open_category
from f2pad_jax.detectors import DETECTORS
from f2pad_jax.images import normalise, read_image, to_unit
from f2pad_jax.images.metrics import best_threshold, dice, iou
from f2pad_jax.images.pixels import resized

SIZE = (224, 224)


def load(folder: Path, shots: int) -> tuple[list, list, np.ndarray]:
    """Returns training images (``shots`` of them drawn with seed 0, or all), test images and their masks."""
    category = open_category(folder)
    train = category.train
    if shots:
        train = [train[i] for i in np.random.default_rng(0).permutation(len(train))[:shots]]
    test = [read_image(sample.path) for sample in category.test]
    return [read_image(path) for path in train], test, np.stack([sample.truth(SIZE) for sample in category.test])


def run(folder: Path, method: str, network: str, shots: int, weights: str | None, out: Path) -> dict:
    """Runs one case and returns its figures."""
    cls = DETECTORS[method]
    train, test, masks = load(folder, shots)
    layers = cls.default_layers(find_network(network), len(train))
    if weights and network == "resnet18":  # the file in ../shared ends after layer3
        layers = tuple(layer for layer in layers if layer != "layer4")
    backbone = load_backbone(network, layers=layers, weights=weights)
    began, shown = time.perf_counter(), ""

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal shown
        if stage.split(",")[0] != shown or (method == "cflow" and done % 8 == 0):
            shown = stage.split(",")[0]
            print(f"  {time.perf_counter() - began:6.0f} s  {stage} {done}/{total}", flush=True)

    detector = f2pad_jax.fit(cls, train, backbone, size=(224, 224), resume=out.with_suffix(".partial"), progress=progress)
    seconds = time.perf_counter() - began
    f2pad_jax.save_detector(out.with_suffix(".model"), detector)
    images = [normalise(resized(to_unit(image), SIZE)) for image in test]
    anomaly_map = jax.jit(cls.anomaly_map)
    jax.block_until_ready(anomaly_map(detector, images[0]))
    began = time.perf_counter()
    maps = np.stack([np.asarray(anomaly_map(detector, image)) for image in images])
    per_map = (time.perf_counter() - began) / len(images)
    np.savez_compressed(out.with_suffix(".npz"), maps=maps.astype(np.float16))
    threshold = best_threshold(maps, masks)
    free = np.stack([np.asarray(detector.coarse_mask(m)) for m in maps])

    def pooled(measure, predicted) -> float:
        return measure(predicted.reshape(1, -1), masks.reshape(1, -1))

    return {
        "method": method,
        "backbone": network,
        "category": folder.name,
        "images": len(train),
        "auroc": float(roc_auc_score(masks.ravel(), maps.ravel())),
        "ap": float(average_precision_score(masks.ravel(), maps.ravel())),
        "f1_max": pooled(dice, maps > threshold),
        "iou": pooled(iou, maps > threshold),
        "f1_label_free": pooled(dice, free),
        "threshold": threshold,
        "threshold_label_free": float(detector.calibrated.threshold),
        "fit_seconds": seconds,
        "peak_gib": peak(),
        "map_ms": 1000 * per_map,
        "losses": np.asarray(getattr(detector, "losses", np.zeros(0))).tolist(),
    }


def table(results: list[dict]) -> str:
    """Returns the table of all cases."""
    lines = [
        f"{'method':9}  {'backbone':18}  {'category':8}  {'images':>6}  {'AUROC':>6}  {'AP':>5}  {'F1':>5}  {'IoU':>5}"
        f"  {'free F1':>7}  {'fit s':>6}  {'GiB':>4}  {'map ms':>6}"
    ]
    for r in results:
        lines.append(
            f"{r['method']:9}  {r['backbone']:18}  {r['category']:8}  {r['images']:6}  {100 * r['auroc']:6.2f}"
            f"  {r['ap']:.3f}  {r['f1_max']:.3f}  {r['iou']:.3f}  {r['f1_label_free']:7.3f}  {r['fit_seconds']:6.0f}"
            f"  {r['peak_gib']:4.1f}  {r['map_ms']:6.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the cases that are missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--categories", nargs="+", default=["bottle", "hazelnut", "leather"])
    parser.add_argument("--methods", nargs="+", default=list(DETECTORS))
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "efficientnet-lite0"])
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 16], help="numbers of training images; 0 for all")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    weights = dict(pair.split("=", 1) for pair in arguments.weights)
    if arguments.case:
        method, network, category, shots = arguments.case.split(":")
        out = arguments.out / f"{method}-{network}-{category}-{shots}"
        result = run(arguments.data / category, method, network, int(shots), weights.get(network), out)
        out.with_suffix(".json").write_text(json.dumps(result))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = [
        (method, network, category, shots)
        for shots in arguments.shots
        for category in arguments.categories
        for network in arguments.backbones
        for method in arguments.methods
    ]
    results = []
    for case in cases:
        file = arguments.out / ("-".join(map(str, case)) + ".json")
        if not file.exists():
            print(*case, flush=True)
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--case", ":".join(map(str, case))], check=True)
        results.append(json.loads(file.read_text()))
    print(table(results))


if __name__ == "__main__":
    main()
