"""Cost of a solver step over the bare backbone: ``python benchmarks/step_cost.py FOLDER --weights FILE``.

PatchCore and PaDiM are fitted to FOLDER (MVTec layout). A line gives ms per step of ``solve``, which refreshes the
detector's candidates every ten steps. Beside it stand the ms of the gradient of the backbone's summed features, in an
equally long loop. Both work on one window with one suspect region and take turns; a time is the least of the turns.
Compiling is not counted. With ``--candidates``, lines give ms per step of PatchCore with ResNet18 by the number of
candidates of a position.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import f2pad_jax
from f2pad_jax.backbones import load_backbone
from f2pad_jax.detectors import PaDiM, PatchCore
from f2pad_jax.images import denormalise, list_images, normalise, read_image, to_unit
from f2pad_jax.images.pixels import resized
from f2pad_jax.objective import Problem
from f2pad_jax.solvers import Descent, Proximal, Sharing, solve

STEPS = 50
SOLVERS = {
    "Descent": Descent().without_stopping(),
    "Descent, 121 taps": Descent(sharing=Sharing(cutoff=0.0)).without_stopping(),
    "Descent, no sharing": Descent(sharing=None).without_stopping(),
    "Proximal": Proximal().without_stopping(),
}


@eqx.filter_jit
def bare(backbone, x):
    """Takes fifty gradients of the network alone."""

    def loss(n):
        return sum(jnp.sum(m) for m in backbone(backbone.normalise(denormalise(n))))

    def step(_, carry):
        n, total = carry
        value, gradient = jax.value_and_grad(loss)(n)
        return n - 1e-6 * gradient, total + value

    return jax.lax.fori_loop(0, STEPS, step, (x, jnp.zeros(())))


@eqx.filter_jit
def fifty_steps(solver, problem, n0):
    """Takes fifty steps."""
    return solve(solver, problem, n0, max_steps=STEPS, steps_per_check=10)


def posed(detector, image, side):
    """Returns the problem of a square of 48 pixels in the middle of a window of the image, and a first guess."""
    corner = (224 - side) // 2
    x = image[corner : corner + side, corner : corner + side]
    middle = slice(side // 2 - 24, side // 2 + 24)
    region = jnp.zeros((side, side), bool).at[middle, middle].set(True)
    n0 = jnp.where(region[..., None], 0.0, x)
    context = detector.locate(x, jnp.array([corner, corner]))
    return Problem.make(detector, x, region, context, alpha1=0.01, alpha2=1e-4, beta=0.1), n0


def fastest(runs, turns):
    """Returns ms per step of each run, the least of some turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, (function, *inputs) in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            if turn:  # the first compiles
                times[name].append(1000 * (time.perf_counter() - began) / STEPS)
    return {name: float(np.min(taken)) for name, taken in times.items()}


def main() -> None:
    """Times all runs by turns, and prints a line for each window."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", help="weight file of ResNet18")
    parser.add_argument("--images", type=int, default=16, help="number of images to fit to")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--candidates", type=int, nargs="+", default=[])
    arguments = parser.parse_args()
    train = [read_image(path) for path, _ in list_images([arguments.folder / "train" / "good"])][: arguments.images]
    print(f"JAX {jax.__version__} on {jax.default_backend()}; ms a step, and the ratio to the bare backbone")
    networks = (
        ("resnet18", ("layer1", "layer2", "layer3"), arguments.weights),
        ("efficientnet-lite0", None, None),
    )
    methods = (PatchCore, PaDiM)
    if arguments.candidates:
        networks, methods = networks[:1], methods[:1]
    for network, layers, weights in networks:
        backbone = load_backbone(network, layers=layers, weights=weights)
        for method in methods:
            detector = f2pad_jax.fit(method, train, backbone, size=(224, 224))
            whole = normalise(resized(to_unit(train[0]), detector.size))
            for side in (128, 224):
                start = posed(detector, whole, side)
                runs = {"bare": (bare, detector.backbone, start[0].x)}
                runs |= {
                    name: (fifty_steps, solver, *start) for name, solver in SOLVERS.items() if not arguments.candidates
                }
                for count in arguments.candidates:
                    of_count = dataclasses.replace(detector, num_candidates=count)
                    runs[f"{count} candidates"] = (fifty_steps, SOLVERS["Descent"], *posed(of_count, whole, side))
                times = fastest(runs, arguments.turns)
                base = times.pop("bare")
                cells = ", ".join(f"{name} {t:.1f} ({t / base:.2f})" for name, t in times.items())
                print(f"{network:18}  {method.__name__:9}  {side:3}  bare {base:.1f}  {cells}", flush=True)


if __name__ == "__main__":
    main()
