"""PaDiM with few directions per position: ``python benchmarks/padim_rank.py FOLDER --weights FILE`` (MVTec layout).

The network is ResNet18. For every rank, and for the full covariance, a line gives figures of the folder's test images:
pixel AUROC, average precision, and F1 at its best threshold. Then it gives the size of the statistics. The last figures are
ms for the gradient of the summed scores with respect to the image, at 224x224 and in a 112x112 window. The gradient is
taken in a loop, as the solver takes it. The last line is the gradient of the bare network's summed features.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from detectors import SIZE, load
from sklearn.metrics import average_precision_score, roc_auc_score

from f2pad_jax.backbones import load_backbone
from f2pad_jax.detectors import NormalImages, PaDiM
from f2pad_jax.detectors.base import ORIGIN, extract
from f2pad_jax.images import normalise, to_unit
from f2pad_jax.images.metrics import best_threshold, dice
from f2pad_jax.images.pixels import resized


def milliseconds(function, image, *arguments, steps: int = 10, repeats: int = 3) -> float:
    """Returns ms of one gradient inside a loop of ``steps``, the least of some repeats."""
    gradient = jax.grad(function)

    @jax.jit
    def loop(image, *arguments):
        return jax.lax.fori_loop(0, steps, lambda _, x: x - 1e-6 * gradient(x, *arguments), image)

    jax.block_until_ready(loop(image, *arguments))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(loop(image, *arguments))
        times.append(time.perf_counter() - began)
    return 1000 * min(times) / steps


def main() -> None:
    """Prints a line for every rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 5, 10, 20, 50])
    arguments = parser.parse_args()
    train, test, masks = load(arguments.folder, 0)
    backbone = load_backbone("resnet18", weights=arguments.weights)
    normals = NormalImages(train, SIZE)
    images = [normalise(resized(to_unit(image), SIZE)) for image in test]
    anomaly_map = jax.jit(PaDiM.anomaly_map)
    windows = (images[0], images[0][56:168, 56:168])

    def loss(image, detector, context):
        return jnp.sum(detector.raw_scores(image, context)[0])

    print(f"{arguments.folder.name}, {len(train)} images; JAX {jax.__version__}")
    print(f"{'rank':>5}  {'AUROC':>6}  {'AP':>5}  {'F1':>5}  {'MB':>6}  {'ms 224':>6}  {'ms 112':>6}")
    for rank in (*arguments.ranks, None):
        detector = PaDiM.fit(normals, backbone, rank=rank)
        maps = np.stack([np.asarray(anomaly_map(detector, image)) for image in images])
        f1 = dice((maps > best_threshold(maps, masks)).reshape(1, -1), masks.reshape(1, -1))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((detector.mean, detector.precision))) / 1e6
        times = [milliseconds(loss, window, detector, detector.locate(window, ORIGIN)) for window in windows]
        auroc, ap = roc_auc_score(masks.ravel(), maps.ravel()), average_precision_score(masks.ravel(), maps.ravel())
        print(
            f"{rank or 'full':>5}  {100 * auroc:6.2f}  {ap:.3f}  {f1:.3f}  {size:6.1f}  {times[0]:6.1f}  {times[1]:6.1f}",
            flush=True,
        )
    bare = [
        milliseconds(lambda x, b: sum((jnp.sum(m) for m in extract(b, x)), jnp.zeros(())), window, backbone)
        for window in windows
    ]
    print(f"{'bare':>5}  {'':6}  {'':5}  {'':5}  {'':6}  {bare[0]:6.1f}  {bare[1]:6.1f}")


if __name__ == "__main__":
    main()
