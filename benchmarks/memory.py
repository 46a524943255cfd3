"""Memory against the number of images: ``python benchmarks/memory.py FOLDER [--weights FILE] [--images N]``.

FOLDER is in MVTec layout. ``refine_many`` with PatchCore goes through its training images over and over, every twentieth
image being one of its defects, a few steps each. Printed: the most memory of the process after 50 images and after all, and
what one more lane of each window takes.
"""

import argparse
import itertools
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import f2pad_jax
from f2pad_jax import Settings, region
from f2pad_jax.data.images import read_image
from f2pad_jax.data.mvtec import open_category
from f2pad_jax.inpaint import choose
from f2pad_jax.lanes import enter
from f2pad_jax.units import resized, to_unit
from f2pad_jax.window import Window, look


def peak() -> float:
    """GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Fit, refine, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--layers", nargs="+", default=["layer1", "layer2", "layer3"])
    parser.add_argument("--weights")
    parser.add_argument("--images", type=int, default=1000)
    arguments = parser.parse_args()
    category = open_category(arguments.folder)
    backbone = f2pad_jax.load_backbone(arguments.backbone, layers=tuple(arguments.layers), weights=arguments.weights)
    detector = f2pad_jax.fit(f2pad_jax.PatchCore, [read_image(path) for path in category.train], backbone)
    defects = itertools.cycle([sample.path for sample in category.test if sample.mask])
    good = itertools.cycle(category.train)
    source = (next(defects) if k % 20 == 10 else next(good) for k in range(arguments.images))
    short = Settings(max_steps=20, restore_steps=10)
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; fitted: {peak():.2f} GiB", flush=True)
    began, refined = time.perf_counter(), 0
    for k, result in enumerate(f2pad_jax.refine_many(detector, source, settings=short, inpaint="exemplar"), 1):
        refined += bool(result.mask.any())
        if k in (50, 200, arguments.images):
            print(
                f"{k} images, {refined} with an anomaly: {peak():.2f} GiB, {time.perf_counter() - began:.0f} s", flush=True
            )
    settings = jax.tree.map(jnp.asarray, Settings())
    _, inpaint = choose("exemplar", detector.calibrated.normals)
    image = resized(to_unit(read_image(next(defects))), detector.size)
    coarse = look(detector, image, settings)
    for side in (*region.WINDOWS, detector.size[0]):
        window = Window.around(detector, image, coarse, coarse.region, (side, side))
        lane = enter(detector, (window,), (window.region,), jnp.zeros(1, int), settings, inpaint, alone=True)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(lane))
        print(f"a lane of {side}x{side}: {size / 2**20:.1f} MiB of state", flush=True)


if __name__ == "__main__":
    main()
