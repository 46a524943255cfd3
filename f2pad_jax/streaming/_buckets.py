"""Buckets of lanes: which parts of images are solved side by side, on one device.

A bucket is a batch on the device, and a lane is one place in it. Parts of images whose windows have one shape share a
bucket. ``vmap`` of a loop runs until its slowest member is done, and images take from 20 to 1200 steps. A bucket runs until
some of its lanes are done. A done lane starts the second phase of its part, or takes the next part of the queue. The other
lanes go on where they were. No lane depends on another lane.
"""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from f2pad_jax.errors import ImageError
from f2pad_jax.images._views import size_of
from f2pad_jax.images.pixels import to_unit
from f2pad_jax.method import _tiling as tiling
from f2pad_jax.method.algorithm import Refined, Run, Solved
from f2pad_jax.method.coarse import Coarse
from f2pad_jax.method.window import Window
from f2pad_jax.solvers.loop import Outcome
from f2pad_jax.streaming import _programs as programs
from f2pad_jax.streaming._programs import Setup
from f2pad_jax.streaming._stream import Worker

NO_LIMIT = 2**30
"""Number of checks of the stopping rules that no part reaches."""


@dataclasses.dataclass
class Job:
    """Image whose parts are being solved."""

    number: int
    """Place of the image in the stream."""
    image: Float[Array, "h w 3"]
    coarse: Coarse
    solved: Solved
    """Solution of the parts that are done."""
    num_unfinished: int = 0
    """Number of parts that are not done."""


@dataclasses.dataclass
class Part:
    """Part of an image, on the host."""

    job: Job
    window: Window
    share: float
    """Share of the time that the solver may take for the image."""
    ends: float = math.inf
    """Time at which the solver stops, on the clock of :class:`~f2pad_jax.streaming._programs.Calls`."""
    found: Solved | None = None
    """Solution of the first phase, which finds the mask; None before its end."""


class Start(NamedTuple):
    """Part at the start of a phase."""

    place: int
    """Place of its lane in the bucket."""
    window: Window
    region: Bool[Array, "_h _w"]
    phase: int


class Bucket:
    """Lanes for windows of one shape."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.queue: collections.deque[Part] = collections.deque()
        self.parts: list[Part | None] = []
        """Part in each lane."""
        self.starts: list[Start] = []
        """Parts that start a phase at the next turn."""
        self.lanes: Run | None = None
        """State of the lanes; None while no lane holds a part."""
        self.advance: Callable = programs.advance_jit
        self.group_size = 1
        """Number of parts started or finished per device call."""

    @property
    def load(self) -> int:
        """Number of parts in the queue and in the lanes."""
        return len(self.queue) + sum(part is not None for part in self.parts)

    def turn(self) -> list[Job]:
        """Fills the lanes, advances them until a group is done, and finishes this group; returns the complete images.

        With a time limit, lanes advance to the next check only, and parts that are late are done.
        """
        s = self.setup
        self._fill()
        busy = np.array([part is not None for part in self.parts])
        enough, most = min(self.group_size, int(busy.sum())), NO_LIMIT if s.budget is None else 1
        going = self._going()
        if (going & ~self._late()).any():  # with no steps to take, the program of the steps is not even compiled
            inputs = s.detector, s.settings, jnp.asarray(busy), jnp.asarray(enough), jnp.asarray(most)
            self.lanes, going = s.call(self.advance, inputs, self.lanes)
            going = np.atleast_1d(np.asarray(going))
        late = self._late()
        done = [(i, part) for i, part in enumerate(self.parts) if part is not None and (late[i] or not going[i])]
        complete = self._write_back([(place, part) for place, part in done if part.found is not None])
        self._draw([(place, part) for place, part in done if part.found is None], going)
        if not self.load:  # frees memory: images of many sizes have many buckets
            self.lanes = None
        return complete

    def _going(self) -> Bool[np.ndarray, " l"]:
        """Returns which lanes hold a part that may take another step."""
        assert self.lanes is not None
        return np.atleast_1d(np.asarray(self.lanes.going)) & [part is not None for part in self.parts]

    def _late(self) -> Bool[np.ndarray, " l"]:
        """Returns which lanes hold a part whose time is over."""
        now = self.setup.call.clock()
        return np.array([part is not None and part.ends <= now for part in self.parts])

    def _fill(self) -> None:
        """Puts parts of the queue into free lanes, and starts all phases that are due."""
        s = self.setup
        if not self.parts:
            self._open(self.queue[0].window)
        for place, part in enumerate(self.parts):
            if part is None and self.queue:
                part = self.parts[place] = self.queue.popleft()
                if s.budget is not None:
                    part.ends = s.call.clock() + part.share * s.budget
                self.starts.append(Start(place, part.window, part.window.region, 0))
        alone = len(self.parts) == 1
        for group in self._groups(self.starts):
            places, windows, regions, phases = zip(*group, strict=True)
            inputs = s.detector, windows, regions, jnp.asarray(phases), s.settings, s.inpaint
            started = s.call(programs.start, *inputs, alone=alone)
            if alone:
                self.lanes = started
            else:
                if self.lanes is None:
                    self.lanes = programs.emptied(started, len(self.parts))
                self.lanes = s.call(programs.insert, (started, jnp.asarray(places)), self.lanes)
        self.starts = []

    def _draw(self, done: list[tuple[int, Part]], going: Bool[np.ndarray, " l"]) -> None:
        """Draws the masks of parts whose first phase is over; their second phase starts at the next turn.

        A part that was still ``going`` is late.
        """
        s = self.setup
        for group in self._groups(done):
            places, parts = zip(*group, strict=True)
            inputs = s.detector, tuple(part.window for part in parts), s.settings, jnp.asarray(places)
            for place, part, found in zip(places, parts, s.call(programs.draw, inputs, self.lanes), strict=True):
                if part.found is None:  # a part that fills up the group comes twice
                    if going[place]:
                        found = dataclasses.replace(found, outcome=jnp.int32(Outcome.TIME_LIMIT))
                    part.found = found
                    self.starts.append(Start(place, part.window, found.mask, 1))

    def _write_back(self, done: list[tuple[int, Part]]) -> list[Job]:
        """Takes parts whose second phase is over out of their lanes; returns the complete images."""
        for place, part in done:
            inputs = part.job.solved, part.window, part.found, jnp.asarray(place)
            part.job.solved = self.setup.call(programs.write_back, inputs, self.lanes)
            part.job.num_unfinished -= 1
            self.parts[place] = None
        return [job for job in {part.job.number: part.job for _, part in done}.values() if not job.num_unfinished]

    def _open(self, window: Window) -> None:
        """Chooses the number of lanes for windows of this shape."""
        s = self.setup
        if programs.make_room():
            s.call.seen.clear()
        first = (s.detector, (window,), (window.region,), jnp.zeros(1, int), s.settings, s.inpaint)
        shapes = eqx.filter_eval_shape(programs.start, *first, alone=True)
        lane = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        self.advance, count = programs.compiled(s, lane, programs.memory())
        self.group_size = min(programs.group_size(), count)
        self.parts = [None] * count

    def _groups(self, items: list) -> list[list]:
        """Divides items into groups of one size, for one program; the last group is filled up with its first item."""
        size = self.group_size
        groups = [items[i : i + size] for i in range(0, len(items), size)]
        return [group + [group[0]] * (size - len(group)) for group in groups]


class Device(Worker):
    """Worker that refines images on one device, each in parts. Its methods run in one thread."""

    def __init__(self, device: Any, setup: Setup):
        self.device = device
        with jax.default_device(device):
            detector, settings, inpaint = programs.on_device(device, (setup.detector, setup.settings, setup.inpaint))
        self.setup = dataclasses.replace(setup, detector=detector, settings=settings, inpaint=inpaint)
        self.buckets: dict[Any, Bucket] = {}

    @property
    def load(self) -> int:
        """Number of parts that are not done."""
        return sum(bucket.load for bucket in self.buckets.values())

    def take(self, number: int, image: tuple[Any, Any, Any]) -> list[tuple[int, Refined]]:
        """Runs the coarse stage on an image and queues its parts; returns the result if there is nothing to solve.

        ``image`` has the pixels, the mask of the pixels that do not count or None, and a coarse map from elsewhere or None.

        Raises:
            ImageError: the image has a wrong shape, dtype or range.
        """
        with jax.default_device(self.device):
            s, (pixels, mask, given) = self.setup, image
            mask = None if mask is None else jnp.asarray(mask, bool)
            unit, ignored, given = programs.on_device(self.device, (to_unit(pixels), mask, given))
            if unit.ndim != 3:
                raise ImageError(f"an image of the stream has shape {unit.shape}; give images one at a time")
            coarse = s.call(programs.look, s.detector, unit, s.settings, ignored, given)
            blank = s.call(programs.untouched, unit, coarse)
            job = Job(number, unit, coarse, blank)
            region, full = np.asarray(coarse.region), size_of(unit)
            if not region.any() or np.asarray(blank.outcome) == Outcome.COVERS_IMAGE:
                return self._results([job])
            sizes = tiling.WINDOWS if s.windows and s.detector.local else ()
            parts = tiling.divided(region, s.settings.margin, s.detector.stride, sizes)
            total = sum(h * w for _, (h, w) in parts)
            for part, size in parts:
                crop = tiling.crop_size(part, size, full, s.settings.margin if s.windows else None)
                window = s.call(programs.around, s.detector, unit, coarse, jnp.asarray(part), size, crop)
                item = Part(job, window, size[0] * size[1] / total)
                self.buckets.setdefault((size, crop, full), Bucket(s)).queue.append(item)
                job.num_unfinished += 1
            return []

    def turn(self) -> list[tuple[int, Refined]]:
        """Advances the fullest bucket until a group of its lanes is done; returns the results of complete images."""
        with jax.default_device(self.device):
            return self._results(max(self.buckets.values(), key=lambda bucket: bucket.load).turn())

    def _results(self, jobs: list[Job]) -> list[tuple[int, Refined]]:
        s = self.setup
        arrays = [s.call(programs.compose, s.detector, s.settings, job.image, job.coarse, job.solved) for job in jobs]
        return [(job.number, jax.device_get(result)) for job, result in zip(jobs, arrays, strict=True)]
