"""Memory against the number of images: ``python benchmarks/memory.py FOLDER [--weights FILE] [--images N]``.

FOLDER is in MVTec layout. ``refine_many`` with PatchCore goes through its training images over and over, every twentieth
image being one of its defects, a few steps each; before that, once through the defects, so that the programs for all their
windows are there. Printed: the most memory of the process after those, after 50 images and after all, and what a lane of
each window takes.
"""

import functools
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from fitted import command_line, fitted, peak

import f2pad_jax
from f2pad_jax import Settings, region
from f2pad_jax.data.images import read_image
from f2pad_jax.inpaint import choose
from f2pad_jax.lanes import enter
from f2pad_jax.units import resized, to_unit
from f2pad_jax.window import Window, look


def main() -> None:
    """Fit, refine, print."""
    parser = command_line(__doc__, images=1000)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    category, detector = fitted(arguments.folder, arguments)
    defective = [sample.path for sample in category.test if sample.mask]
    defects, good = itertools.cycle(defective), itertools.cycle(category.train)
    source = (next(defects) if k % 20 == 10 else next(good) for k in range(arguments.images))
    many = functools.partial(
        f2pad_jax.refine_many, detector, settings=Settings(max_steps=20, restore_steps=10), inpaint="exemplar"
    )
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; fitted: {peak():.2f} GiB", flush=True)
    began = time.perf_counter()
    print(f"{sum(1 for _ in many(defective))} defects: {peak():.2f} GiB, {time.perf_counter() - began:.0f} s", flush=True)
    began, refined = time.perf_counter(), 0
    for k, result in enumerate(many(source), 1):
        refined += bool(result.mask.any())
        if k in (50, 200, arguments.images):
            print(
                f"{k} images, {refined} with an anomaly: {peak():.2f} GiB, {time.perf_counter() - began:.0f} s", flush=True
            )
    settings = jax.tree.map(jnp.asarray, Settings())
    _, inpaint = choose("exemplar", detector.calibrated.normals)
    image = resized(to_unit(read_image(next(defects))), detector.size)
    coarse = look(detector, image, settings)
    whole = min(detector.size)
    for side in (*(side for side in region.WINDOWS if side < whole), whole):
        window = Window.around(detector, image, coarse, coarse.region, (side, side))
        lane = enter(detector, (window,), (window.region,), jnp.zeros(1, int), settings, inpaint, alone=True)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(lane))
        print(f"a lane of {side}x{side}: {size / 2**20:.1f} MiB of state", flush=True)


if __name__ == "__main__":
    main()
