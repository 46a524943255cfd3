"""Lanes against other ways to refine many images: ``python benchmarks/lanes.py FOLDER ... [--weights FILE] [--images N]``.

Images come from ``test`` of folders in MVTec layout: the defective ones, spread evenly, then good ones if these are too
few. The detector is a PatchCore. Three ways are compared, one after another. The first is one image at a time: ``refine``
in a loop, in windows on a CPU. The second is lanes: ``refine_many`` with one and with several lanes, and with one in the
reverse order. The third is one ``vmap`` of all images at once, which solves whole images until the slowest is done. For
each way a line gives images per second without compiling, seconds of compiling, steps, and peak memory of the process so
far. It also gives the mean IoU, and the number of masks that differ from the first way's.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from fitted import command_line, defective_first, fitted, peak

import f2pad_jax
from f2pad_jax._backend import on_cpu
from f2pad_jax._timing import compile_seconds
from f2pad_jax.images import read_image, to_unit
from f2pad_jax.images.metrics import iou
from f2pad_jax.images.pixels import resized


def ways(detector, images, num_lanes: int):
    """Returns a function for each way, by name, that returns the results of all images."""
    vmapped = jax.jit(lambda detector, images: f2pad_jax.refine(detector, images, lanes=len(images)))

    def many(lanes):
        return lambda: list(f2pad_jax.refine_many(detector, images, lanes=lanes))

    return {
        "one at a time": lambda: [f2pad_jax.refine(detector, image, windows=on_cpu(), lanes=1) for image in images],
        "1 lane": many(1),
        f"{num_lanes} lanes": many(num_lanes),
        "1 lane, reversed": lambda: list(f2pad_jax.refine_many(detector, images[::-1], lanes=1))[::-1],
        "vmap of all": lambda: _split(vmapped(detector, jnp.asarray(images))),
    }


def _split(batch):
    """Returns the results of a batch one by one."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(len(batch.mask))]


def main() -> None:
    """Fits a detector, refines every way, and prints a line for each."""
    parser = command_line(__doc__, images=64)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--without", nargs="*", default=[], help="ways to leave out")
    arguments = parser.parse_args()
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}")
    for folder in arguments.folders:
        category, detector = fitted(folder, arguments, arguments.size)
        defective, good = defective_first(category, arguments.images)
        chosen = defective + good
        images = np.stack([np.asarray(resized(to_unit(read_image(sample.path)), detector.size)) for sample in chosen])
        truths = [sample.truth(detector.size) for sample in chosen]
        print(f"{folder.name}: {len(defective)} images with a defect, {len(good)} without", flush=True)
        first: list[np.ndarray] = []
        for name, way in ways(detector, images, arguments.lanes).items():
            if name in arguments.without:
                continue
            began, compiled = time.perf_counter(), compile_seconds()
            results = jax.block_until_ready(way())
            compiling = compile_seconds() - compiled
            took = time.perf_counter() - began - compiling
            masks = [np.asarray(result.mask) for result in results]
            first = first or masks
            right, alike = (list(map(iou, masks, others)) for others in (truths, first))
            steps = np.percentile([int(result.steps) for result in results], [0, 50, 100]).astype(int)
            print(
                f"  {name:16} {len(images) / took:7.3f} images/s, IoU {np.mean(right):.3f}, steps {steps}, "
                f"compiling {compiling:3.0f} s, {peak():.1f} GiB at most so far; "
                f"{sum(a < 1 for a in alike)} of {len(alike)} masks differ, IoU {np.mean(alike):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
