"""Windows against whole images: ``python benchmarks/windows.py FOLDER --weights FILE --out FILE.png [--images N]``.

PatchCore with ResNet18 is fitted to a folder in MVTec layout; defects are cut-paste (``cutpaste.py``), images have 224x224
pixels, and thresholds need no label. There are three parts, and ``--parts`` leaves some out. ``images`` gives mean IoU and
seconds of a solve (compiled before), in the windows of ``refine(windows=True)`` and in the whole image by turns. ``areas``
gives seconds of a hundred steps against the area of a round suspect region in the middle of an image, with a picture.
``resolutions`` gives them for a disc of one size, in pixels, in images of 224, 512 and 896 pixels. The detectors have the
images' size, and 224. The last two parts also give the seconds of the rest: first guess, first look at the detector's
candidates, mask.
"""

import argparse
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from cutpaste import cut_paste
from matplotlib.figure import Figure

import f2pad_jax
from f2pad_jax import Settings
from f2pad_jax.backbones import load_backbone
from f2pad_jax.detectors import AbstractDetector, PatchCore
from f2pad_jax.images import to_unit
from f2pad_jax.images.metrics import iou
from f2pad_jax.images.pixels import resized
from f2pad_jax.inpainting import exemplar
from f2pad_jax.method import Coarse, look
from f2pad_jax.method._tiling import WINDOWS, crop_size, divided
from f2pad_jax.method.algorithm import Solved, untouched
from f2pad_jax.solvers import Descent
from f2pad_jax.streaming import _programs as programs
from f2pad_jax.streaming._buckets import NO_LIMIT

PARTS = ("images", "areas", "resolutions")
"""Parts of the benchmark, in their order."""


def seconds(function, *arguments, turns: int = 5) -> tuple[float, object]:
    """Returns the least seconds of some calls after one that compiles, and the result."""
    result = jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times), result


def main() -> None:
    """Runs the parts, and prints their lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    backbone = load_backbone("resnet18", layers=("layer1", "layer2", "layer3"), weights=arguments.weights)
    train, defects = cut_paste(arguments.folder, arguments.images if "images" in arguments.parts else 0)
    detector = f2pad_jax.fit(PatchCore, train, backbone, size=(224, 224))
    rows = []
    for image, truth in defects:
        row = []
        for windows in (True, False):
            took, result = seconds(lambda w, x=image: f2pad_jax.refine(detector, x, windows=w), windows, turns=1)
            row += [iou(np.asarray(result.mask), truth), took]
        parts = divided(np.asarray(result.region), Settings().margin, detector.stride, WINDOWS)
        sides = " and ".join(str(window[0]) for _, window in parts)
        rows.append(row)
        print(
            f"  {100 * np.asarray(result.region).mean():4.1f} % suspect, window {sides}: IoU {row[0]:.3f}"
            f" in {row[1]:.1f} s; whole image {row[2]:.3f} in {row[3]:.1f} s",
            flush=True,
        )
    if rows:
        window, fast, whole, slow = np.mean(rows, axis=0)
        print(
            f"{len(rows)} images: IoU {window:.3f} in {fast:.1f} s; whole image {whole:.3f} in {slow:.1f} s"
            f" ({slow / fast:.1f} times)"
        )
    if "areas" in arguments.parts:
        plot(detector, resized(to_unit(train[0]), detector.size), arguments.out)
    if "resolutions" in arguments.parts:
        resolutions(detector, train)


def solve_part(
    detector: AbstractDetector,
    image: jax.Array,
    coarse: Coarse,
    part: jax.Array,
    settings: Settings,
    size: tuple[int, int],
    crop: tuple[int, int],
) -> Solved:
    """Runs Algorithm 1 for a part of an image in its window, with the programs of ``refine(windows=True)``."""
    window = programs.around(detector, image, coarse, part, size, crop)
    busy, enough, place = jnp.ones(1, bool), jnp.asarray(1), jnp.asarray(0)

    def run_phase(region: jax.Array, phase: int):
        phases = jnp.full(1, phase)
        lanes = programs.start(detector, (window,), (region,), phases, settings, exemplar, alone=True)
        return programs.advance_jit((detector, settings, busy, enough, jnp.asarray(NO_LIMIT)), lanes)[0]

    lanes = run_phase(window.region, 0)
    (found,) = programs.draw((detector, (window,), settings, place[None]), lanes)
    return programs.write_back((untouched(image, coarse), window, found, place), run_phase(found.mask, 1))


def hundred_steps(detector: AbstractDetector, image: jax.Array, radius: float) -> tuple[float, float, int, float]:
    """Times a hundred steps for a disc in the middle of an image.

    Args:
        detector: detector to solve with.
        image: image in 0..1.
        radius: radius of the disc, pixels at the detector's size.

    Returns:
        Seconds of the steps and of the rest, the side of the window, and the disc's share of the image.
    """
    coarse = look(detector, image, Settings())
    h, w = coarse.mask.shape
    disc = np.hypot(*(np.mgrid[:h, :w] - np.array([h, w])[:, None, None] / 2)) < radius
    marked = eqx.tree_at(lambda c: (c.mask, c.region), coarse, (jnp.asarray(disc),) * 2)
    ((part, window),) = divided(disc, Settings().margin, detector.stride, WINDOWS)
    crop, times = crop_size(part, window, image.shape[:2], Settings().margin), []
    for steps in (0, 100):
        settings = Settings(solver=Descent().without_stopping(), max_steps=steps, restore_steps=0).traced()
        times.append(seconds(solve_part, detector, image, marked, jnp.asarray(part), settings, window, crop)[0])
    rest, both = times
    return both - rest, rest, window[0], float(disc.mean())


def resolutions(detector: AbstractDetector, train: list[np.ndarray]) -> None:
    """Prints seconds for a disc of 40 pixels across in images of several sizes."""
    print("a disc of 40 pixels; seconds of 100 steps, times those at 224x224, and seconds of the rest")
    base = 0.0
    for side in (224, 512, 896):
        image = resized(to_unit(train[0]), (side, side))
        of_that_size = f2pad_jax.fit(PatchCore, train[:4], detector.backbone, size=(side, side))
        for name, fitted in ((f"of {side}", of_that_size), ("of 224", detector)):
            steps, rest, window, _ = hundred_steps(fitted, image, 20 * fitted.size[0] / side)
            base = base or steps
            times = f"{steps:.2f} s ({steps / base:.2f}), rest {rest:.2f} s"
            print(f"  image {side}, detector {name:6}: window {window:3}, {times}", flush=True)
        jax.clear_caches()


def plot(detector: AbstractDetector, image: jax.Array, path: Path) -> None:
    """Prints and draws seconds of a hundred steps against the area of a disc."""
    areas, times = [], []
    for radius in (4, 8, 14, 20, 26, 32, 38, 44, 50, 56, 64, 72, 84, 100):  # the last needs the whole image
        steps, rest, window, share = hundred_steps(detector, image, radius)
        areas.append(100 * share)
        times.append(steps)
        print(f"  {areas[-1]:5.1f} % of the image, window {window:3}: {steps:.2f} s, rest {rest:.2f} s", flush=True)
    slope, constant = np.polyfit(areas[:-1], times[:-1], 1)
    print(f"  fit: {constant:.2f} s + {slope:.3f} s for each % of the image")
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(areas, times, "o-", color="black")
    axes.axhline(times[-1], color="grey", linestyle=":", label="whole image")
    axes.set(xlabel="suspect region, % of the image", ylabel="seconds for 100 steps", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
