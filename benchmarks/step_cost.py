"""What a solver step costs over the bare backbone: ``python benchmarks/step_cost.py FOLDER --weights FILE``.

ms a step of ``solve`` (its refreshing of the detector's candidates every ten steps included) for PatchCore and PaDiM
fitted on FOLDER (MVTec layout), and ms of the gradient of the backbone's summed features in an equally long loop, on the
same window with the same suspect region; the fastest of some turns taken by each. Compilation is not counted. With
``--candidates``, ms a step of PatchCore with ResNet18 by the number of candidates of a position instead.
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
from f2pad_jax import Descent, PaDiM, PatchCore, Problem, Proximal, solve
from f2pad_jax.data.images import list_images, read_image
from f2pad_jax.units import denormalise, normalise, resized, to_unit

STEPS = 50
SOLVERS = {
    "Descent": Descent().endless(),
    "Descent, 121 taps": Descent(sharing=f2pad_jax.Sharing(cutoff=0.0)).endless(),
    "Descent, no sharing": Descent(sharing=None).endless(),
    "Proximal": Proximal().endless(),
}


@eqx.filter_jit
def bare(backbone, x):
    """Fifty gradients of the network alone."""

    def loss(n):
        return sum(jnp.sum(m) for m in backbone(backbone.normalise(denormalise(n))))

    def step(_, carry):
        n, total = carry
        value, gradient = jax.value_and_grad(loss)(n)
        return n - 1e-6 * gradient, total + value

    return jax.lax.fori_loop(0, STEPS, step, (x, jnp.zeros(())))


@eqx.filter_jit
def solved(solver, problem, n0):
    """Fifty steps."""
    return solve(solver, problem, n0, max_steps=STEPS, steps_per_check=10)


def posed(detector, image, side):
    """A square of 48 pixels to solve for in the middle of a window of the image."""
    start = (224 - side) // 2
    x = image[start : start + side, start : start + side]
    middle = slice(side // 2 - 24, side // 2 + 24)
    region = jnp.zeros((side, side), bool).at[middle, middle].set(True)
    n0 = jnp.where(region[..., None], 0.0, x)
    where = detector.locate(x, jnp.array([start, start]))
    return Problem.make(detector, x, region, where, alpha1=0.01, alpha2=1e-4, beta=0.1), n0


def fastest(runs, turns):
    """Milliseconds a step of each, of turns taken by each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, (function, *inputs) in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            if turn:  # the first compiles
                times[name].append(1000 * (time.perf_counter() - began) / STEPS)
    return {name: float(np.min(taken)) for name, taken in times.items()}


def main() -> None:
    """Fit, time by turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", help="of ResNet18")
    parser.add_argument("--images", type=int, default=16, help="to fit on")
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
        backbone = f2pad_jax.load_backbone(network, layers=layers, weights=weights)
        for method in methods:
            detector = f2pad_jax.fit(method, train, backbone)
            whole = normalise(resized(to_unit(train[0]), detector.size))
            for side in (128, 224):
                start = posed(detector, whole, side)
                runs = {"bare": (bare, detector.backbone, start[0].x)}
                runs |= {name: (solved, solver, *start) for name, solver in SOLVERS.items() if not arguments.candidates}
                for count in arguments.candidates:
                    of_count = dataclasses.replace(detector, num_candidates=count)
                    runs[f"{count} candidates"] = (solved, SOLVERS["Descent"], *posed(of_count, whole, side))
                times = fastest(runs, arguments.turns)
                base = times.pop("bare")
                cells = ", ".join(f"{name} {t:.1f} ({t / base:.2f})" for name, t in times.items())
                print(f"{network:18}  {method.__name__:9}  {side:3}  bare {base:.1f}  {cells}", flush=True)


if __name__ == "__main__":
    main()
