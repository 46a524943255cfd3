"""Memory against the number of images: ``python benchmarks/memory.py FOLDER [--weights FILE] [--images N]``.

FOLDER is in MVTec layout. ``refine_many`` with PatchCore takes a few steps for each image. First it runs once over the
defective images, so that the programs for all their windows are compiled. Then it runs over the training images again and
again, with a defective image in place of every twentieth. Lines give the most memory of the process after the defective
images, after 50 and 200 images, and after all. The last lines give the memory of the state of a lane, for each window size.
"""

import functools
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from fitted import command_line, fitted, peak

import f2pad_jax
from f2pad_jax import Settings
from f2pad_jax.images import read_image, to_unit
from f2pad_jax.images.pixels import resized
from f2pad_jax.inpainting._choice import choose
from f2pad_jax.method import Window, look
from f2pad_jax.method._tiling import WINDOWS
from f2pad_jax.streaming import _programs as programs


def main() -> None:
    """Fits a detector, refines, and prints the memory taken."""
    parser = command_line(__doc__, images=1000)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    category, detector = fitted(arguments.folder, arguments)
    defective = [sample.path for sample in category.test if sample.mask]
    defects, good = itertools.cycle(defective), itertools.cycle(category.train)
    source = (next(defects) if k % 20 == 10 else next(good) for k in range(arguments.images))
    many = functools.partial(f2pad_jax.refine_many, detector, settings=Settings(max_steps=20, restore_steps=10))
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
    settings = Settings().traced()
    inpaint = choose("exemplar", detector.calibrated.normals)
    image = resized(to_unit(read_image(next(defects))), detector.size)
    coarse = look(detector, image, settings)
    whole = min(detector.size)
    for side in (*(side for side in WINDOWS if side < whole), whole):
        window = Window.around(detector, image, coarse, coarse.region, (side, side))
        lane = programs.start(detector, (window,), (window.region,), jnp.zeros(1, int), settings, inpaint, alone=True)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(lane))
        print(f"a lane of {side}x{side}: {size / 2**20:.1f} MiB of state", flush=True)


if __name__ == "__main__":
    main()
