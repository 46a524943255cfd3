"""``f2pad bench``: what this machine does, and where its time goes."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from f2pad_jax.backbones import Backbone, find_network, load_backbone
from f2pad_jax.data.images import read_image
from f2pad_jax.data.mvtec import open_category
from f2pad_jax.data.textures import TEXTURES, load_texture
from f2pad_jax.detectors import DETECTORS
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.detectors.fit import fit
from f2pad_jax.errors import OptionError
from f2pad_jax.evaluation.evaluate import deep_as_the_file
from f2pad_jax.evaluation.metrics import iou
from f2pad_jax.inpaint import choose
from f2pad_jax.lanes import MOST_LANES, decide, each, enter
from f2pad_jax.objective import Problem
from f2pad_jax.progress import Progress, silent
from f2pad_jax.refine import refine_many
from f2pad_jax.settings import Settings
from f2pad_jax.solvers import AbstractSolver, Descent
from f2pad_jax.solvers.loop import advance, begin
from f2pad_jax.timing import compile_seconds
from f2pad_jax.units import denormalise, normalise, resized, to_unit
from f2pad_jax.window import Window, compose, look, untouched

SIZE = (224, 224)
PARTS = ("images", "peaks", "network", "step", "stages", "precision")
"""Images a second; the machine's own rates; the backbone's share of them; a solver step taken apart; what is done once for
an image; and on a GPU what its default, TensorFloat-32, does to the masks."""
STEPS = 20
"""Of a timed loop."""

Say = Callable[[str], None]


class Work(NamedTuple):
    """What is measured on."""

    train: list[np.ndarray]
    images: list[Float[np.ndarray, "h w 3"]]
    truths: list[Bool[np.ndarray, "h w"]]

    def batch(self, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """As many images and their ground truths, over and over."""
        places = [k % len(self.images) for k in range(count)]
        return [self.images[k] for k in places], [self.truths[k] for k in places]


def bench(
    folder: str | Path,
    *,
    methods: Sequence[str] = ("patchcore",),
    backbone: str = "efficientnet-lite0",
    layers: Sequence[str] | None = None,
    weights: str | Path | None = None,
    batches: Sequence[int] = (1, 4),
    lanes: int | None = None,
    parts: Sequence[str] = PARTS,
    progress: Progress = silent,
    say: Say = print,
) -> None:
    """Measure, and say a line at a time what came out.

    Seconds are the least of some runs, programs compiled before; compiling is told apart.

    Args:
        folder: a category in MVTec layout, whose real defects are refined at 224x224, or ``"textures"``: the
            demonstration's brick.
        methods: of :data:`~f2pad_jax.detectors.DETECTORS`.
        backbone: the network features are taken from.
        layers: its layers (default: as the method takes them).
        weights: its weight file (default: the one installed).
        batches: numbers of images.
        lanes: as for :func:`f2pad_jax.refine_many`; never more than images.
        parts: some of :data:`PARTS`.
        progress: told how far fitting is.
        say: takes a line.

    Raises:
        OptionError: a method or a part is unknown, or a number less than 1.
        ImageError: the folder is no category, or has no defects.
    """
    if min(batches) < 1 or (lanes is not None and lanes < 1):
        raise OptionError(f"batches {', '.join(map(str, batches))}, lanes {lanes}: at least 1 is needed")
    for what, asked, there in (("part", parts, PARTS), ("method", methods, DETECTORS)):
        for name in asked:
            if name not in there:
                raise OptionError(f"{what} '{name}' is unknown; there are {', '.join(there)}")
    on_cpu, work = jax.default_backend() == "cpu", _work(folder)
    count = lanes or (1 if on_cpu else MOST_LANES)
    say(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores")
    peaks = _peaks(say) if {"peaks", "network"} & set(parts) else {}
    for k, method in enumerate(methods):

        def told(line: str, method: str = method) -> None:
            say(f"{method}: {line}")

        detector = _fitted(method, work, backbone, layers, weights, progress)
        if "network" in parts and not k:
            _network(detector.backbone, batches, peaks, say)
        for batch in batches if "images" in parts else ():
            many = min(count, batch)
            images, truths = work.batch(batch)
            rate, first, compiling, masks, steps = _rate(detector, images, many)
            mean = np.mean([iou(mask, truth) for mask, truth in zip(masks, truths, strict=True)])
            told(
                f"{batch} images in {many} lanes: {rate:.2f} images/s, IoU {mean:.3f}, {steps:.0f} steps; "
                f"at first {first:.0f} s, of which {compiling:.0f} s compiling{_memory()}"
            )
        if "step" in parts:
            for many in sorted({1, min(count, max(batches))}):
                _step(detector, work.images[0], many, lambda line, n=many: told(f"{n} windows, {line}"))
        if "stages" in parts:
            _stages(detector, work.images[0], min(count, 8), told)
        if "precision" in parts and not on_cpu:
            _precision(
                detector, work.batch(max(batches)), min(count, max(batches)), lambda line, m=method: say(f"{m}: {line}")
            )


def _work(folder: str | Path) -> Work:
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


def _fitted(method: str, work: Work, name: str, layers, weights, progress: Progress) -> AbstractDetector:
    kind = DETECTORS[method]
    if layers:
        backbone = load_backbone(name, layers=tuple(layers), weights=weights)
    else:
        backbone = deep_as_the_file(name, kind.default_layers(find_network(name), len(work.train)), weights)
    return fit(kind, work.train, backbone, progress=progress)


def _seconds(function: Callable, *inputs: Any, turns: int = 3) -> float:
    """The least of some turns; the first call, which compiles, isn't counted."""
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - began)
    return min(times)


def _precisions() -> dict[str, str]:
    """What a product of float32 may be computed in, as JAX calls it (``JAX_DEFAULT_MATMUL_PRECISION``)."""
    on_cpu = jax.default_backend() == "cpu"
    return {"float32": "float32"} | ({} if on_cpu else {"TensorFloat-32": "tensorfloat32"})


def _peaks(say: Say) -> dict[str, float]:
    """FLOP/s of large matrix products, and bytes/s of a copy, read and written."""
    on_cpu = jax.default_backend() == "cpu"
    n, repeats = (1024, 2) if on_cpu else (8192, 10)
    square, found = jax.random.normal(jax.random.key(0), (n, n)), {}
    for name in [*_precisions(), "bfloat16"]:

        @jax.jit
        def product(a: Array) -> Array:
            return jax.lax.fori_loop(0, repeats, lambda _, b: jnp.matmul(a, b) / n**0.5, a)

        operand = square.astype(jnp.bfloat16) if name == "bfloat16" else square
        with jax.default_matmul_precision(_precisions().get(name, "default")):
            found[name] = 2 * n**3 * repeats / _seconds(product, operand)
    big = jnp.ones(2**24 if on_cpu else 2**30, jnp.float32)
    found["copy"] = 2 * big.nbytes / _seconds(jax.jit(lambda a: a + 1), big)
    products = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in found.items() if name != "copy")
    say(f"matrix products: {products}; copying {found['copy'] / 1e9:.3g} GB/s")
    return found


def _network(backbone: Backbone, batches: Sequence[int], peaks: dict[str, float], say: Say) -> None:
    """The gradient of the features with respect to a batch of images."""

    def loss(image: Array, backbone: Backbone) -> Array:
        return sum((jnp.sum(m**2) for m in backbone(image)), jnp.zeros(()))

    def gradient(images: Array, backbone: Backbone) -> Array:
        """As lanes do it."""
        return each(lambda image: jax.grad(loss)(image, backbone), images.ndim == 3)(images)

    for name, precision in _precisions().items():
        for batch in batches:
            with jax.default_matmul_precision(precision):
                alone = batch == 1 and jax.default_backend() == "cpu"
                images = jax.random.normal(jax.random.key(1), (*SIZE, 3) if alone else (batch, *SIZE, 3))
                work = flops(jax.make_jaxpr(gradient)(images, backbone).jaxpr)
                took = _seconds(jax.jit(gradient), images, backbone)
            say(
                f"{backbone.name}, {batch} images, {name}: {1000 * took / batch:.3g} ms an image, "
                f"{work / took / 1e12:.3g} TFLOP/s, {work / took / peaks[name]:.0%} of the product's"
            )


def flops(jaxpr: Any) -> float:
    """Floating-point operations of a program's products and convolutions, an addition counting as one."""
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


def _rate(detector: AbstractDetector, images: list[np.ndarray], lanes: int):
    """Images a second, seconds of the first run, of compiling in it, the masks, and the mean number of steps."""

    def run():
        return list(refine_many(detector, images, inpaint="exemplar", lanes=lanes))

    began, compiled = time.perf_counter(), compile_seconds()
    results = run()
    first, compiling, times = time.perf_counter() - began, compile_seconds() - compiled, []
    for _ in range(2):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    masks = [np.asarray(result.mask) for result in results]
    return len(images) / min(times), first, compiling, masks, float(np.mean([result.steps for result in results]))


def _memory() -> str:
    """The most an accelerator had in use."""
    stats = jax.devices()[0].memory_stats() or {}
    return f", {stats['peak_bytes_in_use'] / 2**30:.1f} GiB at most so far" if "peak_bytes_in_use" in stats else ""


def _step(detector: AbstractDetector, image: np.ndarray, lanes: int, say: Say) -> None:
    """What a step of some windows side by side is made of, from the bare network upwards."""
    side, alone, stride = 128, lanes == 1, detector.stride
    corner = (224 - side) // 2 // stride * stride
    x = normalise(jnp.asarray(image))[corner : corner + side, corner : corner + side]
    inside = jnp.zeros((side, side), bool).at[40:88, 40:88].set(True)
    n0 = jnp.where(inside[..., None], 0.0, x)

    def posed(detector: AbstractDetector, shift: Array) -> Problem:
        return Problem.make(detector, x, inside, detector.locate(n0 + shift, jnp.array([corner, corner])), beta=0.1)

    def bare(problem: Problem, n: Array) -> Array:
        backbone = problem.detector.backbone
        return sum((jnp.sum(m) for m in backbone(backbone.normalise(denormalise(n)))), jnp.zeros(()))

    def scored(problem: Problem, n: Array) -> Array:
        scores = problem.detector.scores(n, problem.where)
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
            return each(lambda shift: run(posed(detector, shift), shift), alone)(shifts[0] if alone else shifts)

        return _seconds(all_lanes, detector, 1e-3 * jnp.arange(lanes, dtype=jnp.float32))

    rows = {
        "the network's gradient": descended(bare),
        "with the scores": descended(scored),
        "with prior, variation and sparsity": descended(Problem.__call__),
        "with Adan": solved(Descent(sharing=None).endless(), STEPS),
        "with sharing": solved(Descent().endless(), STEPS),
        "with candidates looked up again": solved(Descent().endless(), Settings().steps_per_check),
    }
    once, first = timed(lambda problem, shift: problem.where), 0.0
    for name, run in rows.items():
        took = (timed(run) - once) / STEPS
        first = first or took
        say(f"{side}x{side}, {name}: {1000 * took:.3g} ms a step, {took / first:.2f} times")


def _stages(detector: AbstractDetector, image: np.ndarray, lanes: int, say: Say) -> None:
    """What is done once for an image, in groups of ``lanes`` where that is how it is done."""
    settings, alone = jax.tree.map(jnp.asarray, Settings()), lanes == 1
    name, inpaint = choose("exemplar", detector.calibrated.normals)
    pixels = jnp.asarray(image)
    coarse, around = look(detector, pixels, settings), eqx.filter_jit(Window.around)
    side = min(128, *detector.size)
    size = (side, side) if jax.default_backend() == "cpu" else None
    windows = (around(detector, pixels, coarse, coarse.region, size),) * lanes
    begun = (detector, windows, tuple(w.region for w in windows), jnp.zeros(lanes, int), settings, inpaint)
    bucket = enter(*begun, alone=alone)
    done = (detector, windows, settings, jnp.arange(lanes))
    rows = {
        "coarse map and region": (lambda: look(detector, pixels, settings), 1),
        "window": (lambda: around(detector, pixels, coarse, coarse.region, size), 1),
        f"first guess ({name}), candidates, β": (lambda: enter(*begun, alone=alone), lanes),
        "mask": (lambda: decide(done, bucket), lanes),
        "result": (lambda: jax.device_get(compose(pixels, coarse, untouched(pixels, coarse))), 1),
    }
    for stage, (function, count) in rows.items():
        say(f"{stage}: {1000 * _seconds(function) / count:.3g} ms")


def _precision(detector: AbstractDetector, batch: tuple[list, list], lanes: int, say: Say) -> None:
    """Masks and rates with products in float32, and in what a GPU takes instead."""
    images, truths = batch
    before, exact = jax.config.values["jax_default_matmul_precision"], []
    try:
        for name, precision in _precisions().items():
            jax.config.update("jax_default_matmul_precision", precision)  # that of all threads
            rate, _, _, masks, _ = _rate(detector, images, lanes)
            exact = exact or masks
            mean = np.mean([iou(mask, truth) for mask, truth in zip(masks, truths, strict=True)])
            alike = np.mean([iou(a, b) for a, b in zip(exact, masks, strict=True) if a.any() or b.any()])
            say(f"products in {name}: {rate:.2f} images/s, IoU {mean:.4f}, with float32's masks {alike:.4f}")
    finally:
        jax.config.update("jax_default_matmul_precision", before)
