"""Compiled programs of Algorithm 1 for many parts side by side, and the memory they may take.

``start``, ``insert``, ``advance``, ``draw`` and ``write_back`` are the pieces of ``method.algorithm`` for a bucket of
lanes: a :class:`~f2pad_jax.method.algorithm.Run` whose arrays have a leading axis. A bucket of one lane has no such axis,
since a CPU runs faster without the axis.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from f2pad_jax._backend import on_cpu
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.inpainting.base import Inpainter
from f2pad_jax.method import algorithm, coarse
from f2pad_jax.method.algorithm import Run, Solved
from f2pad_jax.method.settings import Settings
from f2pad_jax.method.window import Window

MEMORY_SHARE = 0.8
"""Share of the device's memory that a bucket may take."""
GROUP = 8
"""Number of parts started or finished per call on an accelerator, where a call for one part costs about as much. On a
CPU it is 1."""
MAPS_SHARE = 0.5
"""Share of the memory maps that a process may have. Above it, all programs are dropped before others are compiled."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that a device needs to solve parts."""

    detector: AbstractDetector
    settings: Settings
    inpaint: Inpainter
    windows: bool
    """Whether parts are solved in windows, not in whole images."""
    num_lanes: int | None
    """Number of lanes of a bucket; None: as many as memory allows, up to ``max_lanes``."""
    max_lanes: int
    call: "Calls"
    budget: float | int | None = None
    """Time that the solver may take for an image, seconds; None: no limit."""


class Calls:
    """Caller of programs for all threads of a device. One thread makes the first call of a program, which compiles it."""

    def __init__(self):
        self.lock, self.seen = threading.Lock(), set()
        self.first_calls_s = 0.0
        """Time that first calls have taken, seconds."""

    def clock(self) -> float:
        """Returns a time that stands still while a program is compiled, seconds."""
        return time.monotonic() - self.first_calls_s

    def __call__(self, function: Callable, *inputs: Any, **options: Any) -> Any:
        """Returns the function's outputs."""
        leaves, structure = jax.tree.flatten((inputs, options))
        key = function, structure, *((a.shape, a.dtype) if isinstance(a, (jax.Array, np.ndarray)) else a for a in leaves)
        if key not in self.seen:
            with self.lock:
                if key not in self.seen:
                    began = time.monotonic()
                    outputs = function(*inputs, **options)
                    self.seen.add(key)
                    self.first_calls_s += time.monotonic() - began
                    return outputs
        return function(*inputs, **options)


look = coarse.look
around = eqx.filter_jit(Window.around)
compose = eqx.filter_jit(algorithm.compose)
untouched = eqx.filter_jit(algorithm.untouched)


def each(function: Callable, alone: bool) -> Callable:
    """Returns the function mapped over all lanes; ``alone``: unchanged, since a bucket of one lane has no axis of lanes.

    An accelerator runs all lanes at once. A CPU is faster with one after another, and each lane then gets the result that
    it has alone, to the last bit.
    """
    if alone:
        return function
    if on_cpu():
        return lambda *lanes: jax.lax.map(lambda lane: function(*lane), lanes)
    return jax.vmap(function)


def stacked(trees: Sequence[Any], alone: bool) -> Any:
    """Stacks trees along a leading axis; ``alone``: returns the only tree."""
    return trees[0] if alone else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def is_alone(lanes: Run) -> bool:
    """Returns whether this is a bucket of one lane."""
    return lanes.n0.ndim == 3


def picked(lanes: Run, places: Int[Array, "*g"]) -> Run:
    """Returns the lanes at these places."""
    return lanes if is_alone(lanes) else jax.tree.map(lambda leaf: leaf[places], lanes)


@eqx.filter_jit
def start(
    detector: AbstractDetector,
    windows: Sequence[Window],
    regions: Sequence[Bool[Array, "_h _w"]],
    phases: Int[Array, " g"],
    settings: Settings,
    inpaint: Inpainter,
    *,
    alone: bool,
) -> Run:
    """Starts phases of parts: lines 1-3 of Algorithm 1."""

    def one(window: Window, region: Bool[Array, "_h _w"], phase: Int[Array, ""]) -> Run:
        return algorithm.start(detector, window, region, phase, settings, inpaint)

    return each(one, alone)(stacked(windows, alone), stacked(regions, alone), phases[0] if alone else phases)


@eqx.filter_jit(donate="all-except-first")
def insert(started: tuple[Run, Int[Array, " g"]], lanes: Run) -> Run:
    """Inserts started parts into the lanes at their places."""
    runs, places = started
    return jax.tree.map(lambda old, new: old.at[places].set(new), lanes, runs)


def advance(
    inputs: tuple[AbstractDetector, Settings, Bool[Array, " l"], Int[Array, ""], Int[Array, ""]], lanes: Run
) -> tuple[Run, Bool[Array, "*l"]]:
    """Advances the lanes (lines 4-8) until ``enough`` busy lanes are done, at most ``most`` times.

    Returns all lanes, and which of them go on.
    """
    detector, settings, busy, enough, most = inputs
    alone = is_alone(lanes)

    def unfinished(state: tuple[Int[Array, ""], Run]) -> Bool[Array, ""]:
        return (state[0] < most) & (jnp.sum(busy & ~state[1].going) < enough)

    def further(state: tuple[Int[Array, ""], Run]) -> tuple[Int[Array, ""], Run]:
        return state[0] + 1, each(lambda run: algorithm.advance(detector, settings, run), alone)(state[1])

    _, end = jax.lax.while_loop(unfinished, further, (jnp.zeros((), jnp.int32), lanes))
    return end, end.going


advance_jit = eqx.filter_jit(advance, donate="all-except-first")


@eqx.filter_jit
def draw(inputs: tuple[AbstractDetector, Sequence[Window], Settings, Int[Array, " g"]], lanes: Run) -> list[Solved]:
    """Draws the masks of the lanes at some places: line 9 of Algorithm 1."""
    detector, windows, settings, places = inputs
    alone = is_alone(lanes)

    def one(run: Run, window: Window) -> Solved:
        return algorithm.draw(detector, settings, run, window)

    solved = each(one, alone)(picked(lanes, places), stacked(windows, alone))
    return [solved if alone else jax.tree.map(lambda leaf, k=k: leaf[k], solved) for k in range(len(windows))]


@eqx.filter_jit
def write_back(inputs: tuple[Solved, Window, Solved, Int[Array, ""]], lanes: Run) -> Solved:
    """Adds a part to the solution of its image, with the n that the lane at a place has re-estimated."""
    image, window, part, place = inputs
    return algorithm.write_back(image, window, part, picked(lanes, place).iterate.state.n)


def group_size() -> int:
    """Returns the number of parts started or finished per device call."""
    return 1 if on_cpu() else GROUP


def make_room() -> bool:
    """Drops all compiled programs if they take too many memory maps; returns whether it dropped them.

    Without a free memory map, XLA ends the process. Linux gives a process 65530 maps, and on a CPU the programs of one
    window take thousands.
    """
    taken, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    short = most.exists() and taken.read_bytes().count(b"\n") > MAPS_SHARE * int(most.read_text())
    if short:
        jax.clear_caches()
    return short


def cores() -> int:
    """Returns the number of CPU cores this process may use: ``NPROC``, as for XLA, if it is a number, or its affinity."""
    count = os.environ.get("NPROC", "")
    if count.isdecimal():
        return max(int(count), 1)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int | None:
    """Returns the memory of the default device in bytes; None if an accelerator does not state it, 0 for a CPU."""
    if on_cpu():
        return 0
    (device,) = jnp.zeros(()).devices()
    return (device.memory_stats() or {}).get("bytes_limit")


def compiled(setup: Setup, lane: Run, limit: int | None) -> tuple[Callable, int]:
    """Returns :func:`advance`, compiled, and the number of lanes: the number asked for, or all that fit ``limit`` bytes."""
    if setup.num_lanes or limit is None:
        return advance_jit, setup.num_lanes or setup.max_lanes
    count, bytes_each = setup.max_lanes, sum(leaf.nbytes for leaf in jax.tree.leaves(lane))
    while limit and count > 1:
        if count * bytes_each <= MEMORY_SHARE * limit:
            busy = jnp.ones(count, bool), jnp.asarray(1), jnp.asarray(1)
            program = advance_jit.lower((setup.detector, setup.settings, *busy), repeated(lane, count)).compile()
            if program_bytes(program) <= MEMORY_SHARE * limit:
                return program, count
        count //= 2
    return advance_jit, 1


def repeated(lane: Run, count: int) -> Run:
    """Returns a bucket of equal lanes."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), lane)


def emptied(lanes: Run, count: int) -> Run:
    """Returns a bucket of ``count`` empty lanes with the shapes of ``lanes``."""
    return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype), lanes)


def program_bytes(program: Any) -> int:
    """Returns the memory that a compiled bucket needs, all lanes and the detector together."""
    memory = program.compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes


def on_device(device: Any, tree: Any) -> Any:
    """Returns the tree with its arrays moved to a device; None: unchanged."""
    return tree if device is None else jax.tree.map(lambda a: jax.device_put(a, device) if eqx.is_array(a) else a, tree)
