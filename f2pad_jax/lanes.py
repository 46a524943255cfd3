"""Many images at once: fixed lanes, each solving for a part of an image, refilled as they finish.

``vmap`` of a loop runs until its slowest member is done, and images take from 20 to 1200 steps. Here parts of images with
windows alike share a bucket of lanes. A bucket runs on the device until one of its lanes is done. That one goes on to its
next phase, or takes the next part from the queue; the others go on where they were. Nothing in a lane depends on its
neighbours.
"""

import collections
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from f2pad_jax import region as regions
from f2pad_jax.data.images import read_image
from f2pad_jax.detectors.base import AbstractDetector
from f2pad_jax.errors import F2padError, ImageError
from f2pad_jax.inpaint import Inpainter
from f2pad_jax.masks import Evidence
from f2pad_jax.objective import Problem
from f2pad_jax.settings import Settings
from f2pad_jax.solvers.loop import Iterate, advance, begin, finish
from f2pad_jax.units import to_unit
from f2pad_jax.window import Coarse, Found, Refined, Solved, Window, compose, look, merged, phases, untouched

MOST_LANES = 64
"""Lanes of a bucket at most, where their number isn't given; fewer where the device's memory is small."""
SHARE = 0.8
"""Of the device's memory a bucket may need."""
AHEAD = 4
"""Images taken in for every lane, so that buckets fill up while results wait for those before them."""
DONE = -1
"""What a thread gives in place of an image's number when it ends."""


class Lane(eqx.Module):
    """A part of an image on its way; in a bucket, every array has a leading axis of lanes."""

    problem: Problem
    """Without its detector, which all share."""
    n0: Float[Array, "*l h w 3"]
    iterate: Iterate
    learning_rate: Float[Array, "*l"]
    max_steps: Int[Array, "*l"]

    @property
    def going(self) -> Bool[Array, ""]:
        """Whether there is a step left to take."""
        return self.iterate.going(self.max_steps)

    def advanced(self, detector: AbstractDetector, settings: Settings) -> "Lane":
        """Some steps further, unless it is done."""
        problem = eqx.tree_at(lambda p: p.detector, self.problem, detector, is_leaf=lambda leaf: leaf is None)
        solver = eqx.tree_at(lambda s: s.learning_rate, settings.solver, self.learning_rate)
        further = advance(solver, problem, self.iterate, settings.steps_per_check)
        kept = jax.tree.map(lambda a, b: jnp.where(self.going, a, b), further, self.iterate)
        return dataclasses.replace(self, iterate=kept)


@dataclasses.dataclass
class Part:
    """A part of an image, on the host."""

    job: "Job"
    window: Window
    found: Found | None = None
    """Once its first phase, which finds the mask, is over."""


@dataclasses.dataclass
class Job:
    """An image being solved for."""

    number: int
    image: Float[Array, "h w 3"]
    coarse: Coarse
    solved: Solved
    waiting: int = 0
    """Parts not solved yet."""


@dataclasses.dataclass(frozen=True)
class Means:
    """What all parts are solved with, on one device."""

    detector: AbstractDetector
    settings: Settings
    inpaint: Inpainter
    num_lanes: int | None


class Bucket:
    """Lanes for windows of one shape."""

    def __init__(self, means: Means):
        self.means = means
        self.queue: collections.deque[Part] = collections.deque()
        self.parts: list[Part | None] = []
        self.lanes: Any = None
        self.run: Any = None

    @property
    def load(self) -> int:
        """Parts here."""
        return len(self.queue) + sum(part is not None for part in self.parts)

    def turn(self) -> list[Job]:
        """Fill the lanes, run until one is done, and see to it; returns the images that are complete."""
        while self.queue and (not self.parts or None in self.parts):
            part = self.queue.popleft()
            self._enter(self.parts.index(None) if self.parts else 0, part, part.window.region, 0)
        busy = jnp.asarray([part is not None for part in self.parts])
        self.lanes, going = self.run((self.means.detector, self.means.settings, busy), self.lanes)
        complete = []
        for i, (part, on) in enumerate(zip(self.parts, np.atleast_1d(np.asarray(going)), strict=True)):
            if part is None or on:
                continue
            s = self.means.settings
            if part.found is None:
                part.found = decide((self.means.detector, part.window, s, jnp.asarray(i)), self.lanes)
                self._enter(i, part, part.found.mask, 1)
                continue
            n = self.lanes.iterate.state.n
            part.job.solved = settle(part.job.solved, part.window, part.found, n if len(self.parts) == 1 else n[i])
            part.job.waiting -= 1
            self.parts[i] = None
            if not part.job.waiting:
                complete.append(part.job)
        return complete

    def _enter(self, i: int, part: Part, region: Bool[Array, "h w"], phase: int) -> None:
        """A part at the start of a phase into lane ``i``."""
        m = self.means
        lane = enter(m.detector, part.window, region, m.settings, m.inpaint, jnp.asarray(phase))
        if not self.parts:
            (device,) = lane.n0.devices()
            self.run, count = compiled(m, lane, memory(device))
            self.parts = [None] * count
            self.lanes = repeated(lane, count)
        self.parts[i] = part
        self.lanes = lane if len(self.parts) == 1 else put((lane, jnp.asarray(i)), self.lanes)


@eqx.filter_jit
def enter(detector, window: Window, region, settings: Settings, inpaint, phase) -> Lane:
    """Lines 1-3 of Algorithm 1 for a part of an image."""
    sparse, learning_rate, max_steps = (values[phase] for values in phases(settings))
    problem, n0 = window.pose(detector, region, settings, inpaint, sparse)
    solver = eqx.tree_at(lambda s: s.learning_rate, settings.solver, learning_rate)
    shared = eqx.tree_at(lambda p: p.detector, problem, None)
    return Lane(shared, n0, begin(solver, problem, n0), learning_rate, max_steps)


@eqx.filter_jit(donate="all-except-first")
def put(what: tuple[Lane, Int[Array, ""]], lanes: Lane) -> Lane:
    """A lane into its place."""
    lane, i = what
    return jax.tree.map(lambda all, one: all.at[i].set(one), lanes, lane)


def run(means: tuple[AbstractDetector, Settings, Bool[Array, " l"]], lanes: Lane) -> tuple[Lane, Bool[Array, "*l"]]:
    """Lines 4-8 until one of the busy lanes is done; which go on. One lane has no axis: that runs faster on a CPU."""
    detector, settings, busy = means
    if len(busy) == 1:
        end = jax.lax.while_loop(lambda lane: lane.going, lambda lane: lane.advanced(detector, settings), lanes)
        return end, end.going
    every = jax.vmap(lambda lane: lane.advanced(detector, settings))
    end = jax.lax.while_loop(lambda lanes: jnp.all(jax.vmap(lambda lane: lane.going)(lanes) | ~busy), every, lanes)
    return end, jax.vmap(lambda lane: lane.going)(end)


_run = eqx.filter_jit(run, donate="all-except-first")


def memory(device: Any) -> int | None:
    """Bytes of an accelerator, where it says; 0 for a CPU."""
    return 0 if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def compiled(means: Means, lane: Lane, limit: int | None) -> tuple[Callable, int]:
    """:func:`run` and the number of lanes: that asked for, or as many as there is room for; one at least."""
    if means.num_lanes or limit is None:
        return _run, means.num_lanes or MOST_LANES
    count, bytes_each = MOST_LANES, sum(leaf.nbytes for leaf in jax.tree.leaves(lane))
    while limit and count > 1:
        if count * bytes_each <= SHARE * limit:
            program = _run.lower((means.detector, means.settings, jnp.ones(count, bool)), repeated(lane, count)).compile()
            if lane_bytes(program) <= SHARE * limit:
                return program, count
        count //= 2
    return _run, 1


def repeated(lane: Lane, count: int) -> Lane:
    """A bucket of lanes that are all the same."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), lane)


def lane_bytes(program) -> int:
    """Memory a compiled bucket needs, all lanes and the detector together."""
    memory = program.compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes


@eqx.filter_jit
def decide(means: tuple[AbstractDetector, Window, Settings, Int[Array, ""]], lanes: Lane) -> Found:
    """Line 9: the mask of a lane that is done."""
    detector, window, settings, i = means
    lane = lanes if lanes.n0.ndim == 3 else jax.tree.map(lambda a: a[i], lanes)
    problem = eqx.tree_at(lambda p: p.detector, lane.problem, detector, is_leaf=lambda leaf: leaf is None)
    solution = finish(problem, lane.iterate)
    mask = settings.decision(settings.solver, Evidence(problem, lane.n0, solution.n, window.excess, window.threshold))
    return Found(mask, solution.steps, solution.objective, solution.outcome)


@jax.jit
def settle(solved: Solved, window: Window, found: Found, n: Float[Array, "_h _w 3"]) -> Solved:
    """An image with one more part solved for."""
    return merged(solved, window.solved(found, n))


_frame = eqx.filter_jit(Window.around)


class Lanes:
    """Buckets for windows of every shape, on one device."""

    def __init__(self, means: Means):
        self.means = means
        self.buckets: dict[Any, Bucket] = {}

    @property
    def load(self) -> int:
        """Parts here."""
        return sum(bucket.load for bucket in self.buckets.values())

    def take(self, number: int, image: Any) -> list[Job]:
        """Look at an image and queue its parts; returns it where there is nothing to solve."""
        m, image = self.means, to_unit(image)
        if image.ndim != 3:
            raise ImageError(f"an image has shape {image.shape}; the images of a stream come one at a time")
        coarse = look(m.detector, image, m.settings)
        job = Job(number, image, coarse, untouched(image, coarse))
        region = np.asarray(coarse.region)
        if not region.any() or region.all():
            return [job]
        for part, size in regions.divided(region, m.settings.margin, m.detector.stride, regions.WINDOWS):
            window = _frame(m.detector, image, coarse, jnp.asarray(part), size)
            self.buckets.setdefault((size, image.shape), Bucket(m)).queue.append(Part(job, window))
            job.waiting += 1
        return []

    def turn(self) -> list[Job]:
        """Run the fullest bucket until one of its lanes is done; returns the images that are complete."""
        return max(self.buckets.values(), key=lambda bucket: bucket.load).turn()


def stream(
    detector: AbstractDetector,
    source: Iterable[Any],
    settings: Settings,
    inpaint: Inpainter,
    num_lanes: int | None,
    devices: Sequence[Any] = (),
) -> Iterator[Refined]:
    """Results as NumPy arrays, in the order of ``source``; one thread serves each device (none given: the default one).

    At most :data:`AHEAD` images a lane are taken in before the first of them is handed out.
    """
    servers: list[Any] = list(devices) or [jax.config.values["jax_default_device"]]
    cpu = (devices[0].platform if devices else jax.default_backend()) == "cpu"
    room = threading.Semaphore(AHEAD * (num_lanes or (1 if cpu else MOST_LANES)) * len(servers))
    results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    lock, stopped = threading.Lock(), threading.Event()

    def deliver(jobs: list[Job]) -> None:
        for job in jobs:
            results.put((job.number, jax.device_get(compose(job.image, job.coarse, job.solved))))

    def serve(device: Any) -> None:
        try:
            with jax.default_device(device):
                lanes = Lanes(Means(*_on(device, (detector, settings, inpaint)), num_lanes=num_lanes))
                more = True
                while not stopped.is_set():
                    while more and room.acquire(blocking=not lanes.load) and not stopped.is_set():
                        with lock:
                            number, image = next(images, (0, None))
                        if image is None:
                            more = False
                            room.release()
                            break
                        try:
                            deliver(lanes.take(number, image.result()))
                        except F2padError as error:
                            results.put((number, error))
                    if not lanes.load:
                        break
                    deliver(lanes.turn())
            results.put((DONE, None))
        except BaseException as error:  # raised where it is waited for
            results.put((DONE, error))

    with ThreadPoolExecutor(2 * len(servers), "f2pad") as readers, ThreadPoolExecutor(len(servers), "f2pad") as pool:
        images = enumerate(_read_ahead(source, readers, 2 * len(servers)))
        for device in servers:
            pool.submit(serve, device)
        waiting, serving, number = {}, len(servers), 0
        try:
            while serving or waiting:
                while number in waiting:
                    result = waiting.pop(number)
                    if isinstance(result, F2padError):
                        raise result
                    yield result
                    number += 1
                    room.release()
                if not serving:
                    break
                which, what = results.get()
                if which != DONE:
                    waiting[which] = what
                elif what is None:
                    serving -= 1
                else:
                    raise what
        finally:
            stopped.set()
            for _ in servers:
                room.release()


def _read_ahead(source: Iterable[Any], readers: ThreadPoolExecutor, depth: int) -> Iterator[Future]:
    """Images to come, paths being read."""
    waiting: collections.deque[Future] = collections.deque()
    for item in source:
        waiting.append(readers.submit(lambda item=item: read_image(item) if isinstance(item, (str, Path)) else item))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def _on(device: Any, tree: Any) -> Any:
    """The same with its arrays on a device."""
    return tree if device is None else jax.tree.map(lambda a: jax.device_put(a, device) if eqx.is_array(a) else a, tree)
