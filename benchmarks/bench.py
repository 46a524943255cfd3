"""Images per second on this machine, and where the time goes: ``f2pad bench``, or ``python benchmarks/bench.py``.

The parts of the benchmark are in :data:`PARTS`. A time is the least of several runs after programs were compiled. The time
of compiling is printed separately.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from f2pad_jax import Settings, fit, refine_many
from f2pad_jax._backend import on_cpu
from f2pad_jax._timing import compile_seconds
from f2pad_jax.backbones import Backbone, find_network, load_backbone
from f2pad_jax.backbones.backbone import load_to_depth
from f2pad_jax.commands._console import add_network, at_least, shown_progress
from f2pad_jax.data import load_texture, open_category
from f2pad_jax.data.textures import TEXTURES
from f2pad_jax.detectors import DETECTORS, AbstractDetector
from f2pad_jax.errors import F2padError, OptionError
from f2pad_jax.images import denormalise, normalise, read_image, to_unit
from f2pad_jax.images.metrics import iou
from f2pad_jax.images.pixels import resized
from f2pad_jax.inpainting._choice import INPAINTERS, choose
from f2pad_jax.method.algorithm import untouched
from f2pad_jax.objective import Problem
from f2pad_jax.progress import Progress, silent
from f2pad_jax.refinement import MAX_LANES
from f2pad_jax.solvers import AbstractSolver, Descent
from f2pad_jax.solvers.loop import advance, begin
from f2pad_jax.streaming import _programs as programs

SIZE = (224, 224)
"""Height and width of the images."""
PARTS = {
    "images": "images per second",
    "peaks": "rates of matrix products and of copying",
    "network": "gradients of the backbone, beside the rate of matrix products",
    "step": "a solver step, from the bare backbone upwards",
    "stages": "the work done once for each image",
    "precision": "masks with products in float32 and in TensorFloat-32, on a GPU alone",
}
"""Parts of the benchmark."""
STEPS = 20
"""Number of steps in a timed loop."""

Say = Callable[[str], None]
"""Function that is given one line of results at a time."""


class Work(NamedTuple):
    """Images that are measured on."""

    train: list[np.ndarray]
    """Normal images."""
    images: list[Float[np.ndarray, "h w 3"]]
    """Defective images, in 0..1."""
    truths: list[Bool[np.ndarray, "h w"]]
    """Masks of their defects."""

    def batch(self, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Returns ``count`` images and their true masks, repeated where there are fewer."""
        places = [k % len(self.images) for k in range(count)]
        return [self.images[k] for k in places], [self.truths[k] for k in places]


class Rate(NamedTuple):
    """Result of refining a batch several times."""

    images_per_second: float
    first: float
    """Seconds of the first run."""
    compiling: float
    """Seconds of compiling in the first run."""
    masks: list[Bool[np.ndarray, "h w"]]
    steps: float
    """Mean number of steps."""


def bench(
    folder: str | Path,
    *,
    methods: Sequence[str] = ("patchcore",),
    backbone: str = "efficientnet-lite0",
    layers: Sequence[str] | None = None,
    weights: str | Path | None = None,
    batches: Sequence[int] = (1, 4),
    lanes: int | None = None,
    parts: Sequence[str] = tuple(PARTS),
    progress: Progress = silent,
    say: Say = print,
) -> None:
    """Measures, and passes the results to ``say`` line by line.

    Args:
        folder: category in MVTec layout, whose real defects are refined at 224x224, or ``"textures"``, the brick of
            ``f2pad demo``.
        methods: names in :data:`~f2pad_jax.detectors.DETECTORS`.
        backbone: name of the network.
        layers: layers of the network; default: chosen by the method.
        weights: weight file of the network; default: the installed one.
        batches: numbers of images.
        lanes: as for :func:`f2pad_jax.refine_many`, but never more than images.
        parts: names in :data:`PARTS`.
        progress: function that is told how far the fit is.
        say: function that is given each line.

    Raises:
        OptionError: a method or a part is unknown, a number is less than 1, or the folder holds no defect.
        ImageError: the folder is no category.
    """
    if min(batches) < 1 or (lanes is not None and lanes < 1):
        raise OptionError(f"batches {', '.join(map(str, batches))}, lanes {lanes}: at least 1 is needed")
    for kind, names, options in (("part", parts, PARTS), ("method", methods, DETECTORS)):
        for name in names:
            if name not in options:
                raise OptionError(f"{kind} '{name}' is unknown; there are {', '.join(options)}")
    work, most = load_work(folder), max(batches)
    max_lanes = lanes or (1 if on_cpu() else MAX_LANES)
    say(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores")
    peaks = measure_peaks(say) if {"peaks", "network"} & set(parts) else {}
    for k, method in enumerate(methods):
        detector, say_method = fit_detector(method, work, backbone, layers, weights, progress), prefixed(say, f"{method}: ")
        if "network" in parts and not k:
            measure_network(detector.backbone, batches, peaks, say)
        for batch in batches if "images" in parts else ():
            images, truths = work.batch(batch)
            num_lanes = min(max_lanes, batch)
            rate = measure_rate(detector, images, num_lanes)
            say_method(
                f"{batch} images in {num_lanes} lanes: {rate.images_per_second:.2f} images/s, "
                f"IoU {mean_iou(rate.masks, truths):.3f}, {rate.steps:.0f} steps; "
                f"at first {rate.first:.0f} s, of which {rate.compiling:.0f} s compiling{peak_memory()}"
            )
        if "step" in parts:
            for count in sorted({1, min(max_lanes, most)}):
                measure_step(detector, work.images[0], count, prefixed(say_method, f"{count} windows, "))
        if "stages" in parts:
            measure_stages(detector, work.images[0], min(max_lanes, 8), say_method)
        if "precision" in parts and not on_cpu():
            measure_precision(detector, *work.batch(most), min(max_lanes, most), say_method)


def prefixed(say: Say, prefix: str) -> Say:
    """Returns ``say`` with a prefix before each line."""
    return lambda line: say(prefix + line)


def mean_iou(masks: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> float:
    """Returns the mean IoU of masks and true masks."""
    return float(np.mean([iou(mask, truth) for mask, truth in zip(masks, truths, strict=True)]))


def load_work(folder: str | Path) -> Work:
    """Reads the images of a category, or of the brick texture."""
    if str(folder) == TEXTURES and not Path(folder).exists():
        texture = load_texture("brick")
        images = [np.asarray(to_unit(test.image)) for test in texture.test]
        return Work(texture.train, images, [test.mask for test in texture.test])
    category = open_category(folder)
    defective = [sample for sample in category.test if sample.mask is not None]
    if not defective:
        raise OptionError(f"{folder}: no defect in its test folder")
    images = [np.asarray(resized(to_unit(read_image(sample.path)), SIZE)) for sample in defective]
    return Work([read_image(path) for path in category.train], images, [sample.truth(SIZE) for sample in defective])


def fit_detector(
    method: str, work: Work, name: str, layers: Sequence[str] | None, weights: str | Path | None, progress: Progress
) -> AbstractDetector:
    """Fits a detector of a method to the normal images."""
    kind = DETECTORS[method]
    if layers:
        backbone = load_backbone(name, layers=tuple(layers), weights=weights)
    else:
        backbone = load_to_depth(name, kind.default_layers(find_network(name), len(work.train)), weights)
    return fit(kind, work.train, backbone, size=(224, 224), progress=progress)


def seconds_of(function: Callable, *inputs: Any, turns: int = 3) -> float:
    """Returns the least seconds of some turns, after a first call that compiles and is not counted."""
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - began)
    return min(times)


def precisions() -> dict[str, str]:
    """Returns the precisions of a float32 product on this device, with JAX's names (``JAX_DEFAULT_MATMUL_PRECISION``)."""
    return {"float32": "float32"} | ({} if on_cpu() else {"TensorFloat-32": "tensorfloat32"})


def measure_peaks(say: Say) -> dict[str, float]:
    """Measures large matrix products (FLOP/s, by precision) and ``"copy"`` (bytes/s read and written)."""
    n, repeats = (1024, 2) if on_cpu() else (8192, 10)
    square, found = jax.random.normal(jax.random.key(0), (n, n)), {}
    for name in [*precisions(), "bfloat16"]:

        @jax.jit
        def product(a: Array) -> Array:
            return jax.lax.fori_loop(0, repeats, lambda _, b: jnp.matmul(a, b) / n**0.5, a)

        operand = square.astype(jnp.bfloat16) if name == "bfloat16" else square
        with jax.default_matmul_precision(precisions().get(name, "default")):
            found[name] = 2 * n**3 * repeats / seconds_of(product, operand)
    big = jnp.ones(2**24 if on_cpu() else 2**30, jnp.float32)
    found["copy"] = 2 * big.nbytes / seconds_of(jax.jit(lambda a: a + 1), big)
    products = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in found.items() if name != "copy")
    say(f"matrix products: {products}; copying {found['copy'] / 1e9:.3g} GB/s")
    return found


def measure_network(backbone: Backbone, batches: Sequence[int], peaks: dict[str, float], say: Say) -> None:
    """Measures the gradient of the features with respect to a batch of images, in lanes."""

    def loss(image: Array, backbone: Backbone) -> Array:
        return sum((jnp.sum(m**2) for m in backbone(image)), jnp.zeros(()))

    def gradient(images: Array, backbone: Backbone) -> Array:
        return programs.each(lambda image: jax.grad(loss)(image, backbone), images.ndim == 3)(images)

    for name, precision in precisions().items():
        for batch in batches:
            with jax.default_matmul_precision(precision):
                alone = batch == 1 and on_cpu()
                images = jax.random.normal(jax.random.key(1), (*SIZE, 3) if alone else (batch, *SIZE, 3))
                operations = flops(jax.make_jaxpr(gradient)(images, backbone).jaxpr)
                took = seconds_of(jax.jit(gradient), images, backbone)
            say(
                f"{backbone.name}, {batch} images, {name}: {1000 * took / batch:.3g} ms an image, "
                f"{operations / took / 1e12:.3g} TFLOP/s, {operations / took / peaks[name]:.0%} of the product's"
            )


def flops(jaxpr: Any) -> float:
    """Counts the floating-point operations of a program's products and convolutions; an addition counts as one."""
    total = 0.0
    for equation in jaxpr.eqns:
        parameters, operand = equation.params, equation.invars[-1].aval
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = parameters["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2.0 * float(np.prod(equation.outvars[0].aval.shape) * depth)
        elif equation.primitive.name == "conv_general_dilated":
            channels_out = operand.shape[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * float(np.prod(equation.outvars[0].aval.shape) * np.prod(operand.shape) / channels_out)
        repeats = parameters.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in parameters.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += repeats * flops(inner)
    return total


def measure_rate(detector: AbstractDetector, images: list[np.ndarray], lanes: int) -> Rate:
    """Refines the images three times; the first run compiles."""

    def run():
        return list(refine_many(detector, images, lanes=lanes))

    began, compiled = time.perf_counter(), compile_seconds()
    results = run()
    first, compiling, times = time.perf_counter() - began, compile_seconds() - compiled, []
    for _ in range(2):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    masks = [np.asarray(result.mask) for result in results]
    return Rate(len(images) / min(times), first, compiling, masks, float(np.mean([result.steps for result in results])))


def peak_memory() -> str:
    """Tells the most memory that an accelerator had in use; nothing on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return f", {stats['peak_bytes_in_use'] / 2**30:.1f} GiB at most so far" if "peak_bytes_in_use" in stats else ""


def measure_step(detector: AbstractDetector, image: np.ndarray, lanes: int, say: Say) -> None:
    """Measures the parts of a solver step for windows side by side, all with one fixed square region."""
    side, alone, stride = 128, lanes == 1, detector.stride
    corner = (224 - side) // 2 // stride * stride
    x = normalise(jnp.asarray(image))[corner : corner + side, corner : corner + side]
    region = jnp.zeros((side, side), bool).at[40:88, 40:88].set(True)
    n0 = jnp.where(region[..., None], 0.0, x)

    def posed(detector: AbstractDetector, shift: Array) -> Problem:
        return Problem.make(detector, x, region, detector.locate(n0 + shift, jnp.array([corner, corner])), beta=0.1)

    def bare(problem: Problem, n: Array) -> Array:
        backbone = problem.detector.backbone
        return sum((jnp.sum(m) for m in backbone(backbone.normalise(denormalise(n)))), jnp.zeros(()))

    def scored(problem: Problem, n: Array) -> Array:
        scores = problem.detector.scores(n, problem.context)
        return sum((jnp.sum(a * s) for a, s in zip(problem.affected, scores, strict=True)), jnp.zeros(()))

    def descended(objective: Callable) -> Callable:
        def run(problem: Problem, shift: Array) -> Array:
            gradient = jax.grad(objective, argnums=1)
            return jax.lax.fori_loop(0, STEPS, lambda _, n: n - 1e-6 * gradient(problem, n), n0 + shift)

        return run

    def solved(solver: AbstractSolver, steps: int) -> Callable:
        def run(problem: Problem, shift: Array) -> Array:
            iterate = begin(solver, problem, n0 + shift)
            return jax.lax.fori_loop(0, STEPS // steps, lambda _, it: advance(solver, problem, it, steps), iterate).state.n

        return run

    def timed(run: Callable) -> float:
        @eqx.filter_jit
        def all_lanes(detector: AbstractDetector, shifts: Array) -> Any:
            return programs.each(lambda shift: run(posed(detector, shift), shift), alone)(shifts[0] if alone else shifts)

        return seconds_of(all_lanes, detector, 1e-3 * jnp.arange(lanes, dtype=jnp.float32))

    rows = {
        "the network's gradient": descended(bare),
        "with the scores": descended(scored),
        "with prior, variation and sparsity": descended(Problem.__call__),
        "with Adan": solved(Descent(sharing=None).without_stopping(), STEPS),
        "with sharing": solved(Descent().without_stopping(), STEPS),
        "with candidates looked up again": solved(Descent().without_stopping(), Settings().steps_per_check),
    }
    once, first = timed(lambda problem, shift: problem.context), 0.0
    for name, run in rows.items():
        took = (timed(run) - once) / STEPS
        first = first or took
        say(f"{side}x{side}, {name}: {1000 * took:.3g} ms a step, {took / first:.2f} times")


def measure_stages(detector: AbstractDetector, image: np.ndarray, lanes: int, say: Say) -> None:
    """Measures the work done once for each image; first guesses and masks are made for ``lanes`` images at a time."""
    settings, alone, pixels = Settings().traced(), lanes == 1, jnp.asarray(image)
    inpaint = choose(INPAINTERS[0], detector.calibrated.normals)
    coarse = programs.look(detector, pixels, settings)
    side = min(128, *detector.size)
    around = detector, pixels, coarse, coarse.region, (side, side) if on_cpu() else None
    windows = (programs.around(*around),) * lanes
    inputs = detector, windows, tuple(window.region for window in windows), jnp.zeros(lanes, int), settings, inpaint
    bucket = programs.start(*inputs, alone=alone)
    drawn = detector, windows, settings, jnp.arange(lanes)

    def result() -> Any:
        return jax.device_get(programs.compose(detector, settings, pixels, coarse, untouched(pixels, coarse)))

    rows = {
        "coarse map and region": (lambda: programs.look(detector, pixels, settings), 1),
        "window": (lambda: programs.around(*around), 1),
        f"first guess ({INPAINTERS[0]}), candidates, β": (lambda: programs.start(*inputs, alone=alone), lanes),
        "mask": (lambda: programs.draw(drawn, bucket), lanes),
        "result": (result, 1),
    }
    for stage, (function, count) in rows.items():
        say(f"{stage}: {1000 * seconds_of(function) / count:.3g} ms")


def measure_precision(
    detector: AbstractDetector, images: list[np.ndarray], truths: list[np.ndarray], lanes: int, say: Say
) -> None:
    """Measures masks and rates with products in float32, and in the lower precision that a GPU takes by default."""
    before, exact = jax.config.values["jax_default_matmul_precision"], []
    try:
        for name, precision in precisions().items():
            jax.config.update("jax_default_matmul_precision", precision)  # for all threads
            rate = measure_rate(detector, images, lanes)
            exact = exact or rate.masks
            alike = np.mean([iou(a, b) for a, b in zip(exact, rate.masks, strict=True) if a.any() or b.any()])
            say(
                f"products in {name}: {rate.images_per_second:.2f} images/s, IoU {mean_iou(rate.masks, truths):.4f}, "
                f"with float32's masks {alike:.4f}"
            )
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Reads the arguments, measures and prints.

    Args:
        argv: arguments; default: those of the process.
        prog: name of the program in its help text.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description="Measure images per second on this machine, and where the time goes. Takes some minutes."
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path(TEXTURES),
        metavar="FOLDER",
        help="category in MVTec layout, whose real defects are refined (default: the brick of 'f2pad demo')",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(DETECTORS),
        default=["patchcore"],
        help="methods of the detectors (default: patchcore)",
    )
    add_network(parser)
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="layers of the network (default: those of the method)")
    parser.add_argument(
        "--batches", nargs="+", type=at_least(1), default=[1, 4], metavar="N", help="numbers of images (default: 1 4)"
    )
    parser.add_argument(
        "--lanes", type=at_least(1), help="number of parts of images solved side by side (default: as for 'f2pad refine')"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(PARTS),
        default=list(PARTS),
        metavar="PART",
        help=f"parts of the benchmark (default: all): {'; '.join(f'{name} ({text})' for name, text in PARTS.items())}",
    )
    arguments = parser.parse_args(argv)
    with shown_progress() as progress:
        bench(**vars(arguments), progress=progress, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    try:
        main()
    except F2padError as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
