"""Windows against whole images: ``python benchmarks/windows.py FOLDER --weights FILE --out FILE.png [--images N]``.

PatchCore with ResNet18 on a folder in MVTec layout, cut-paste defects (``cutpaste.py``), 224x224, label-free thresholds:
mean IoU and seconds a solve (compiled before) in the window ``refine`` chooses and in the whole image, taking turns; then
seconds of a hundred steps against the area of a round suspect region in the middle of an image, with a picture, and for a
disc of one size, in pixels, in images of 224, 512 and 896 pixels: with detectors of those sizes, and with the one of 224.
Of the latter two also the seconds of what is not a step: first guess, first look at the detector's candidates, mask.
``--parts`` leaves some out.
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
from f2pad_jax import Descent, Settings
from f2pad_jax.evaluation.metrics import iou
from f2pad_jax.region import WINDOWS, divided, own_size
from f2pad_jax.units import resized, to_unit
from f2pad_jax.window import look, solve_window

PARTS = ("images", "areas", "resolutions")
"""What is measured, in this order."""


def seconds(function, *arguments, turns: int = 5) -> tuple[float, object]:
    """The fastest of some calls after one that compiles, and the result."""
    result = jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times), result


def main() -> None:
    """Compare, then plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    backbone = f2pad_jax.load_backbone("resnet18", layers=("layer1", "layer2", "layer3"), weights=arguments.weights)
    train, defects = cut_paste(arguments.folder, arguments.images if "images" in arguments.parts else 0)
    detector = f2pad_jax.fit(f2pad_jax.PatchCore, train, backbone)
    rows = []
    for image, truth in defects:
        row = []
        for settings in (Settings(), Settings(margin=None)):
            took, result = seconds(lambda s, x=image: f2pad_jax.refine(detector, x, settings=s), settings, turns=1)
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


_solve = eqx.filter_jit(solve_window)


def hundred_steps(detector: f2pad_jax.AbstractDetector, image: jax.Array, radius: float) -> tuple[float, float, int, float]:
    """For a disc in the middle of an image, radius in pixels of the detector's.

    Returns seconds of the steps and of the rest, the window's side, and the disc's share of the image.
    """
    coarse = look(detector, image, Settings())
    h, w = coarse.mask.shape
    disc = np.hypot(*(np.mgrid[:h, :w] - np.array([h, w])[:, None, None] / 2)) < radius
    marked = eqx.tree_at(lambda c: (c.mask, c.region), coarse, (jnp.asarray(disc),) * 2)
    ((part, window),) = divided(disc, Settings().margin, detector.stride, WINDOWS)
    own, times = own_size(part, window, image.shape[:2], Settings().margin), []
    for steps in (0, 100):
        settings = Settings(solver=Descent().endless(), max_steps=jnp.asarray(steps), restore_steps=jnp.asarray(0))
        arguments = (detector, image, marked, jnp.asarray(part), settings, f2pad_jax.exemplar, window, own)
        times.append(seconds(_solve, *arguments)[0])
    rest, both = times
    return both - rest, rest, window[0], float(disc.mean())


def resolutions(detector: f2pad_jax.AbstractDetector, train: list[np.ndarray]) -> None:
    """Seconds for a disc of 40 pixels across in images of several sizes."""
    print("a disc of 40 pixels; seconds of 100 steps, times those at 224x224, and seconds of the rest")
    base = 0.0
    for side in (224, 512, 896):
        image = resized(to_unit(train[0]), (side, side))
        of_that_size = f2pad_jax.fit(f2pad_jax.PatchCore, train[:4], detector.backbone, size=(side, side))
        for name, fitted in ((f"of {side}", of_that_size), ("of 224", detector)):
            steps, rest, window, _ = hundred_steps(fitted, image, 20 * fitted.size[0] / side)
            base = base or steps
            times = f"{steps:.2f} s ({steps / base:.2f}), rest {rest:.2f} s"
            print(f"  image {side}, detector {name:6}: window {window:3}, {times}", flush=True)
        jax.clear_caches()


def plot(detector: f2pad_jax.AbstractDetector, image: jax.Array, path: Path) -> None:
    """Seconds of a hundred steps against the area of a disc to solve for."""
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
