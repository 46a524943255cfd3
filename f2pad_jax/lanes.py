"""Many images at once: fixed lanes, each solving for a part of an image, refilled as they finish.

``vmap`` of a loop runs until its slowest member is done, and images take from 20 to 1200 steps. Here parts of images with
windows alike share a bucket of lanes. A bucket runs on the device until one of its lanes is done. That one goes on to its
next phase, or takes the next part from the queue; the others go on where they were. Nothing in a lane depends on its
neighbours.

On an accelerator a call costs about as much for eight parts as for one. So there lanes are filled, and masks drawn, in
groups, and a bucket runs until a group of lanes is done. On a CPU, one program keeps hardly more than one core busy. So
there every core has lanes of its own.
"""

import collections
import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

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
from f2pad_jax.window import Coarse, Refined, Solved, Window, compose, look, merged, phases, untouched

MOST_LANES = 64
"""Lanes of a bucket at most, where their number isn't given; fewer where the device's memory is small."""
SHARE = 0.8
"""Of the device's memory a bucket may need."""
GROUP = 8
"""Parts begun, and masks drawn, at a time on an accelerator; one on a CPU."""
AHEAD = 4
"""Images taken in for every lane, so that buckets fill up while results wait for those before them."""
PATIENCE = 0.05
"""Seconds that lanes which could run wait for an image to fill another."""
ROOM = 0.5
"""Of the memory maps a process may have, that may be taken when a bucket is opened."""
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

    def posed(self, detector: AbstractDetector) -> Problem:
        """The problem with its detector."""
        return eqx.tree_at(lambda p: p.detector, self.problem, detector, is_leaf=lambda leaf: leaf is None)

    def advanced(self, detector: AbstractDetector, settings: Settings) -> "Lane":
        """Some steps further, unless it is done."""
        solver = settings.solver.at_rate(self.learning_rate)

        def further() -> Iterate:
            return advance(solver, self.posed(detector), self.iterate, settings.steps_per_check)

        return dataclasses.replace(self, iterate=jax.lax.cond(self.going, further, lambda: self.iterate))

    @property
    def alone(self) -> bool:
        """Whether this is a bucket of one, which has no axis of lanes: that runs faster on a CPU."""
        return self.n0.ndim == 3

    def picked(self, places: Int[Array, "*g"]) -> "Lane":
        """One of a bucket, or some."""
        return self if self.alone else jax.tree.map(lambda leaf: leaf[places], self)


@dataclasses.dataclass
class Part:
    """A part of an image, on the host."""

    job: "Job"
    window: Window
    found: Solved | None = None
    """Once its first phase, which finds the mask, is over; n is then still that phase's."""


@dataclasses.dataclass
class Job:
    """An image being solved for."""

    number: int
    image: Float[Array, "h w 3"]
    coarse: Coarse
    solved: Solved
    waiting: int = 0
    """Parts not solved yet."""


class Start(NamedTuple):
    """A part at the start of a phase."""

    place: int
    """Its lane."""
    window: Window
    region: Bool[Array, "_h _w"]
    phase: int


@dataclasses.dataclass(frozen=True)
class Means:
    """What all parts are solved with, on one device."""

    detector: AbstractDetector
    settings: Settings
    inpaint: Inpainter
    num_lanes: int | None
    most: int
    """Lanes where their number isn't given, and memory allows."""
    call: "Calls"


class Calls:
    """Calls of programs by the threads that serve one device: the first of each is made alone, and so compiles alone."""

    def __init__(self):
        self.lock, self.made = threading.Lock(), set()

    def __call__(self, function: Callable, *inputs: Any, **options: Any) -> Any:
        """The function's outputs."""
        leaves, structure = jax.tree.flatten((inputs, options))
        key = function, structure, *((a.shape, a.dtype) if isinstance(a, (jax.Array, np.ndarray)) else a for a in leaves)
        if key not in self.made:
            with self.lock:
                if key not in self.made:
                    outputs = function(*inputs, **options)
                    self.made.add(key)
                    return outputs
        return function(*inputs, **options)


class Bucket:
    """Lanes for windows of one shape."""

    def __init__(self, means: Means):
        self.means = means
        self.queue: collections.deque[Part] = collections.deque()
        self.parts: list[Part | None] = []
        """What is in each lane."""
        self.starts: list[Start] = []
        """Parts that begin a phase at the next turn."""
        self.lanes: Lane | None = None
        """Where there are parts in them."""
        self.run: Callable = _run
        self.group = 1
        """Lanes filled, and seen to, at a time."""

    @property
    def load(self) -> int:
        """Parts here."""
        return len(self.queue) + sum(part is not None for part in self.parts)

    def turn(self) -> list[Job]:
        """Fill the lanes, run until a group of them is done, and see to those; returns the images that are complete."""
        m = self.means
        self._fill()
        busy = np.array([part is not None for part in self.parts])
        enough = min(self.group, int(busy.sum()))
        self.lanes, going = m.call(self.run, (m.detector, m.settings, jnp.asarray(busy), jnp.asarray(enough)), self.lanes)
        on = np.atleast_1d(np.asarray(going))
        done = [(place, part) for place, part in enumerate(self.parts) if part is not None and not on[place]]
        complete = self._end([(place, part) for place, part in done if part.found is not None])
        self._draw([(place, part) for place, part in done if part.found is None])
        if not self.load:  # of images of many sizes there are many buckets
            self.lanes = None
        return complete

    def _fill(self) -> None:
        """Put parts into the lanes that are free, and begin the phases of those that are at the start of one."""
        m = self.means
        if not self.parts:
            self._open(self.queue[0].window)
        for place, part in enumerate(self.parts):
            if part is None and self.queue:
                part = self.parts[place] = self.queue.popleft()
                self.starts.append(Start(place, part.window, part.window.region, 0))
        alone = len(self.parts) == 1
        for some in self._groups(self.starts):
            places, windows, regions, phase = zip(*some, strict=True)
            begun = m.call(enter, m.detector, windows, regions, jnp.asarray(phase), m.settings, m.inpaint, alone=alone)
            if alone:
                self.lanes = begun
            else:
                if self.lanes is None:
                    self.lanes = emptied(begun, len(self.parts))
                self.lanes = m.call(put, (begun, jnp.asarray(places)), self.lanes)
        self.starts = []

    def _draw(self, done: list[tuple[int, Part]]) -> None:
        """Masks of parts whose first phase is over; their second begins at the next turn."""
        m = self.means
        for some in self._groups(done):
            places, parts = zip(*some, strict=True)
            means = m.detector, tuple(part.window for part in parts), m.settings, jnp.asarray(places)
            for place, part, found in zip(places, parts, m.call(decide, means, self.lanes), strict=True):
                if part.found is None:  # not one that fills the group up
                    part.found = found
                    self.starts.append(Start(place, part.window, found.mask, 1))

    def _end(self, done: list[tuple[int, Part]]) -> list[Job]:
        """Take parts whose second phase is over out of their lanes; returns the images that are complete."""
        for place, part in done:
            what = part.job.solved, part.window, part.found, jnp.asarray(place)
            part.job.solved = self.means.call(settle, what, self.lanes)
            part.job.waiting -= 1
            self.parts[place] = None
        return [job for job in {part.job.number: part.job for _, part in done}.values() if not job.waiting]

    def _open(self, window: Window) -> None:
        """Choose the number of lanes, for windows like this one."""
        m = self.means
        if make_room():
            m.call.made.clear()
        first = (m.detector, (window,), (window.region,), jnp.zeros(1, int), m.settings, m.inpaint)
        shapes = eqx.filter_eval_shape(enter, *first, alone=True)
        lane = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (device,) = lane.n0.devices()
        self.run, count = compiled(m, lane, memory(device))
        self.group = min(group(device), count)
        self.parts = [None] * count

    def _groups(self, items: list) -> list[list]:
        """Groups of one size, so that one program serves; the last is filled up with its first."""
        groups = [items[i : i + self.group] for i in range(0, len(items), self.group)]
        return [group + [group[0]] * (self.group - len(group)) for group in groups]


def each(function: Callable, alone: bool) -> Callable:
    """The function for every lane, which a bucket of one has no axis of.

    For all at once; on a CPU, where that is slower, one after another: so each gets what it gets alone, to the last bit.
    """
    if alone:
        return function
    if jax.default_backend() == "cpu":
        return lambda *lanes: jax.lax.map(lambda lane: function(*lane), lanes)
    return jax.vmap(function)


def stacked(trees: Sequence[Any], alone: bool) -> Any:
    """Several of a kind as one with a leading axis; one alone as it is."""
    return trees[0] if alone else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@eqx.filter_jit
def enter(
    detector: AbstractDetector,
    windows: Sequence[Window],
    parts: Sequence[Bool[Array, "_h _w"]],
    phase: Int[Array, " g"],
    settings: Settings,
    inpaint: Inpainter,
    *,
    alone: bool,
) -> Lane:
    """Lines 1-3 of Algorithm 1 for parts of images."""

    def one(window: Window, region: Array, phase: Array) -> Lane:
        sparse, learning_rate, max_steps = (values[phase] for values in phases(settings))
        problem, n0 = window.pose(detector, region, settings, inpaint, sparse)
        solver = settings.solver.at_rate(learning_rate)
        shared = eqx.tree_at(lambda p: p.detector, problem, None)
        return Lane(shared, n0, begin(solver, problem, n0), learning_rate, max_steps)

    return each(one, alone)(stacked(windows, alone), stacked(parts, alone), phase[0] if alone else phase)


@eqx.filter_jit(donate="all-except-first")
def put(what: tuple[Lane, Int[Array, " g"]], lanes: Lane) -> Lane:
    """Lanes into their places."""
    some, places = what
    return jax.tree.map(lambda all, new: all.at[places].set(new), lanes, some)


def run(
    means: tuple[AbstractDetector, Settings, Bool[Array, " l"], Int[Array, ""]], lanes: Lane
) -> tuple[Lane, Bool[Array, "*l"]]:
    """Lines 4-8 until enough of the busy lanes are done; which go on."""
    detector, settings, busy, enough = means
    going = each(lambda lane: lane.going, lanes.alone)

    def unfinished(lanes: Lane) -> Bool[Array, ""]:
        return jnp.sum(busy & ~going(lanes)) < enough

    end = jax.lax.while_loop(unfinished, each(lambda lane: lane.advanced(detector, settings), lanes.alone), lanes)
    return end, going(end)


_run = eqx.filter_jit(run, donate="all-except-first")


def group(device: Any) -> int:
    """Parts seen to at a time."""
    return 1 if device.platform == "cpu" else GROUP


def make_room() -> bool:
    """Forget all compiled programs where they have taken many of the process's memory maps; whether that was so.

    Where none is left, XLA ends it. Linux gives a process 65530, and on a CPU the programs for one window take thousands.
    """
    taken, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    short = most.exists() and taken.read_bytes().count(b"\n") > ROOM * int(most.read_text())
    if short:
        jax.clear_caches()
    return short


def cores() -> int:
    """CPU cores this process may use: those of ``NPROC``, as for XLA, or of its affinity."""
    if asked := os.environ.get("NPROC", ""):
        return max(int(asked), 1)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(device: Any) -> int | None:
    """Bytes of an accelerator, where it says; 0 for a CPU."""
    return 0 if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def compiled(means: Means, lane: Lane, limit: int | None) -> tuple[Callable, int]:
    """:func:`run` and the number of lanes: that asked for, or as many as there is room for; one at least."""
    if means.num_lanes or limit is None:
        return _run, means.num_lanes or means.most
    count, bytes_each = means.most, sum(leaf.nbytes for leaf in jax.tree.leaves(lane))
    while limit and count > 1:
        if count * bytes_each <= SHARE * limit:
            busy = jnp.ones(count, bool), jnp.asarray(1)
            program = _run.lower((means.detector, means.settings, *busy), repeated(lane, count)).compile()
            if lane_bytes(program) <= SHARE * limit:
                return program, count
        count //= 2
    return _run, 1


def repeated(lane: Lane, count: int) -> Lane:
    """A bucket of lanes that are all the same."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), lane)


def emptied(lanes: Lane, count: int) -> Lane:
    """A bucket of lanes like these, with nothing in them."""
    return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype), lanes)


def lane_bytes(program) -> int:
    """Memory a compiled bucket needs, all lanes and the detector together."""
    memory = program.compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes


@eqx.filter_jit
def decide(means: tuple[AbstractDetector, Sequence[Window], Settings, Int[Array, " g"]], lanes: Lane) -> list[Solved]:
    """Line 9: the masks of lanes that are done."""
    detector, windows, settings, places = means

    def one(lane: Lane, window: Window) -> Solved:
        problem = lane.posed(detector)
        n, steps, objective, outcome, _ = finish(problem, lane.iterate)
        mask = settings.decision(settings.solver, Evidence(problem, lane.n0, n, window.excess, window.threshold))
        return Solved(mask, n, steps, objective, outcome)

    solved = each(one, lanes.alone)(lanes.picked(places), stacked(windows, lanes.alone))
    return [solved if lanes.alone else jax.tree.map(lambda leaf, k=k: leaf[k], solved) for k in range(len(windows))]


@eqx.filter_jit
def settle(what: tuple[Solved, Window, Solved, Int[Array, ""]], lanes: Lane) -> Solved:
    """An image with one more part, whose n has been estimated again in lane ``i``."""
    image, window, found, i = what
    return merged(image, window.pasted(dataclasses.replace(found, n=lanes.picked(i).iterate.state.n)))


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

    def take(self, number: int, image: Float[Array, "*b h w 3"]) -> list[Job]:
        """Look at an image and queue its parts; returns it where there is nothing to solve."""
        m = self.means
        if image.ndim != 3:
            raise ImageError(f"an image has shape {image.shape}; the images of a stream come one at a time")
        coarse = m.call(look, m.detector, image, m.settings)
        job = Job(number, image, coarse, untouched(image, coarse))
        region = np.asarray(coarse.region)
        if not region.any() or region.all():
            return [job]
        (device,) = coarse.x.devices()
        full, margin = (image.shape[0], image.shape[1]), m.settings.margin
        # whole images fill an accelerator's lanes best
        cpu = device.platform == "cpu"
        sides = regions.WINDOWS if cpu and m.detector.local else ()
        for part, size in regions.divided(region, margin, m.detector.stride, sides):
            own = regions.own_size(part, size, full, margin if cpu else None)
            window = m.call(_frame, m.detector, image, coarse, jnp.asarray(part), size, own)
            self.buckets.setdefault((size, own, full), Bucket(m)).queue.append(Part(job, window))
            job.waiting += 1
        return []

    def turn(self) -> list[Job]:
        """Run the fullest bucket until a group of its lanes is done; returns the images that are complete."""
        return max(self.buckets.values(), key=lambda bucket: bucket.load).turn()


def stream(
    detector: AbstractDetector,
    source: Iterable[Any],
    settings: Settings,
    inpaint: Inpainter,
    num_lanes: int | None,
    devices: Sequence[Any] = (),
) -> Iterator[Refined]:
    """Results as NumPy arrays, in the order of ``source``; one thread serves each device.

    No device given: the default one; if it is a CPU, as many threads serve it as there are cores, or images.

    At most :data:`AHEAD` images a lane are taken in before the first of them is handed out. Where their number isn't given,
    there are no more lanes than :data:`MOST_LANES`, nor many more than images, if ``source`` says how many there are.
    """
    count = max(len(source), 1) if isinstance(source, Sized) else MOST_LANES
    most = min(MOST_LANES, 1 << (count - 1).bit_length())  # few numbers, so few programs
    device = devices[0] if devices else next(iter(jnp.zeros(()).devices()))
    default = [jax.config.values["jax_default_device"]] * (min(cores(), count) if device.platform == "cpu" else 1)
    servers = [(device, Calls()) for device in devices] or list(zip(default, itertools.repeat(Calls())))
    lanes_each = num_lanes or (1 if memory(device) == 0 else most)
    room, ahead = threading.Semaphore(AHEAD * lanes_each * len(servers)), threading.Semaphore(2 * len(servers) - 1)
    images: queue.SimpleQueue[tuple[int, Future] | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    stopped = threading.Event()

    def pull() -> None:
        """Images to come, a few ahead; the source may take its time over each."""
        number = 0
        try:
            for item in source:
                images.put((number, readers.submit(_read, item)))
                number += 1
                ahead.acquire()
                if stopped.is_set():
                    break
        except BaseException as error:  # raised after the results of those before it
            results.put((number, error))
        images.put(None)

    def deliver(jobs: list[Job], call: Calls) -> None:
        for job in jobs:
            results.put((job.number, jax.device_get(call(compose, job.image, job.coarse, job.solved))))

    def serve(device: Any, call: Calls) -> None:
        try:
            with jax.default_device(device):
                means = _on(device, (detector, settings, inpaint))
                lanes = Lanes(Means(*means, num_lanes=num_lanes, most=most, call=call))
                more = True
                while not stopped.is_set():
                    # one lane has none beside it to fill: the next image is left to other cores
                    while more and not (lanes_each == 1 and lanes.load) and room.acquire(blocking=not lanes.load):
                        try:
                            found = images.get(timeout=PATIENCE if lanes.load else None)
                        except queue.Empty:
                            room.release()
                            break
                        if found is None or stopped.is_set():
                            images.put(None)  # to the other threads
                            room.release()
                            more = False
                            break
                        ahead.release()
                        number, image = found
                        try:
                            deliver(lanes.take(number, _on(device, to_unit(image.result()))), call)
                        except F2padError as error:
                            results.put((number, error))
                    if not lanes.load:
                        break
                    deliver(lanes.turn(), call)
            results.put((DONE, None))
        except BaseException as error:  # raised where it is waited for
            results.put((DONE, error))

    with ThreadPoolExecutor(2 * len(servers), "f2pad") as readers, ThreadPoolExecutor(len(servers), "f2pad") as pool:
        threading.Thread(target=pull, daemon=True).start()  # not waited for: a camera may never give another image
        for server in servers:
            pool.submit(serve, *server)
        waiting, serving, number = {}, len(servers), 0
        try:
            while serving or waiting:
                while number in waiting:
                    result = waiting.pop(number)
                    if isinstance(result, BaseException):
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
            ahead.release()
            images.put(None)
            for _ in servers:
                room.release()


def _read(item: Any) -> Any:
    """An image, or that of a path."""
    return read_image(item) if isinstance(item, (str, Path)) else item


def _on(device: Any, tree: Any) -> Any:
    """The same with its arrays on a device."""
    return tree if device is None else jax.tree.map(lambda a: jax.device_put(a, device) if eqx.is_array(a) else a, tree)
