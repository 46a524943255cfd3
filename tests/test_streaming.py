"""Many images in lanes get what each gets alone, in order, whatever the lanes and devices."""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeanColour, bright_blocks, calibration

from f2pad_jax import Outcome, Settings, refine, refine_many, refinement, warm_up
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images import write_png
from f2pad_jax.images.metrics import iou
from f2pad_jax.streaming import _buckets as buckets
from f2pad_jax.streaming import _programs as programs

SHORT = Settings(max_steps=30, restore_steps=10)


@pytest.fixture(scope="module")
def images(texture):
    """Three defective images and a good one."""
    return [*[test.image for test in texture.test], texture.train[0]]


@pytest.fixture(scope="module")
def alone(detector, images):
    return [jax.tree.map(np.asarray, refine(detector, image, settings=SHORT, windows=True)) for image in images]


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_in_any_order_each_image_gets_what_it_gets_alone(detector, images, alone):
    order = [2, 3, 0, 2, 1, 3, 3, 0]
    results = list(refine_many(detector, (images[i] for i in order), settings=SHORT))
    assert len(results) == len(order)
    for i, result in zip(order, results, strict=True):
        assert_same(result, alone[i])
        assert isinstance(result.mask, np.ndarray)
    assert results[1].outcome == Outcome.NOTHING_TO_REFINE


def test_several_lanes_give_the_same_as_one_whatever_their_neighbours(detector, images, alone):
    for order in ORDERS:
        results = refine_many(detector, [images[i] for i in order], settings=SHORT, lanes=2)
        for i, result in zip(order, results, strict=True):
            assert_same(result, alone[i])


def test_lanes_at_once_as_on_an_accelerator(detector, images, alone, monkeypatch):
    monkeypatch.setattr(programs, "each", lambda function, alone: function if alone else jax.vmap(function))
    # three, which no other test has traced
    first, second = (list(refine_many(detector, [images[i] for i in order], settings=SHORT, lanes=3)) for order in ORDERS)
    for i in range(len(images)):
        one, other = first[ORDERS[0].index(i)], second[ORDERS[1].index(i)]
        assert_same(one, other)
        # batched convolutions round otherwise, which decides single pixels of a small mask
        assert iou(one.mask, alone[i].mask) > 0.85 or not alone[i].mask.any()


ORDERS = [0, 1, 2, 3], [2, 1, 3, 0]


def test_paths_are_read_on_the_way(detector, images, alone, tmp_path):
    paths = []
    for i, image in enumerate(images[:2]):
        paths.append(tmp_path / f"{i}.png")
        write_png(paths[-1], image)
    for i, result in enumerate(refine_many(detector, [paths[0], str(paths[1])], settings=SHORT)):
        assert_same(result, alone[i])


@pytest.mark.parametrize("cores", [1, 3])
def test_no_more_images_are_taken_in_than_there_is_room_for(detector, images, cores, monkeypatch):
    monkeypatch.setattr(programs, "cores", lambda: cores)
    taken = []

    def source():
        for i in itertools.count():
            taken.append(i)
            yield images[3]  # good: nothing to wait for

    results = refine_many(detector, source(), settings=SHORT)
    for _ in range(3):
        next(results)
    assert len(taken) <= 3 + cores * (refinement.AHEAD + 2 * 2)  # delivered, taken in, and read ahead
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("f2pad")]


@pytest.mark.parametrize("lanes", [None, 3])
def test_a_camera_may_wait_for_a_result_before_it_gives_the_next_image(blocks, lanes):
    detector, images = blocks
    done = threading.Semaphore(1)

    def camera():
        for image in images[:3]:
            assert done.acquire(timeout=60), "no result of the image before"
            yield image

    several = []
    for result in refine_many(detector, camera(), settings=SHORT, lanes=lanes):
        several.append(result)
        done.release()
    for found, expected in zip(several, refine_many(detector, images[:3], settings=SHORT, lanes=lanes), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("lanes", [1, 2])
def test_lanes_that_nothing_is_in_take_no_memory(blocks, lanes, monkeypatch):
    """Images of many sizes have many buckets."""
    detector, images = blocks
    seen, turn = [], buckets.Device.turn

    def turning(self):
        jobs = turn(self)
        seen.append([(bucket.load, bucket.lanes is None) for bucket in self.buckets.values()])
        return jobs

    monkeypatch.setattr(programs, "cores", lambda: 1)
    monkeypatch.setattr(buckets.Device, "turn", turning)
    sizes = [np.pad(images[k], ((0, 4 * k), (0, 0), (0, 0)), mode="edge") for k in (0, 1, 0)]
    several = list(refine_many(detector, sizes, settings=SHORT, lanes=lanes))
    assert all(result.mask.any() for result in several)
    assert_same(several[0], several[2])
    assert all(empty == (load == 0) for buckets in seen for load, empty in buckets if load == 0 or lanes == 1)
    assert len(seen[-1]) > 1 and all(load == 0 for load, _ in seen[-1])


def test_an_image_that_can_not_be_read_is_told_after_those_before_it(detector, images, alone, tmp_path):
    results = refine_many(detector, [images[0], tmp_path / "missing.png", images[1]], settings=SHORT)
    assert_same(next(results), alone[0])
    with pytest.raises(ImageError, match=r"missing\.png"):
        next(results)


def test_what_the_source_raises_is_raised_after_the_results_before_it(detector, images, alone):
    def source():
        yield images[0]
        raise RuntimeError("camera unplugged")

    results = refine_many(detector, source(), settings=SHORT)
    assert_same(next(results), alone[0])
    with pytest.raises(RuntimeError, match="camera unplugged"):
        next(results)


def test_what_the_source_raises_is_raised(detector):
    def source():
        raise RuntimeError("camera unplugged")
        yield

    with pytest.raises(RuntimeError, match="camera unplugged"):
        list(refine_many(detector, source(), settings=SHORT))


def test_a_batch_is_no_image_of_a_stream(detector, images):
    with pytest.raises(ImageError, match="one at a time"):
        list(refine_many(detector, [np.stack(images)]))


@pytest.mark.parametrize("call", [refine, lambda *args, **kwargs: list(refine_many(*args, **kwargs))])
def test_there_is_at_least_one_lane(detector, images, call):
    with pytest.raises(OptionError, match="lanes=0"):
        call(detector, images, lanes=0)


@pytest.fixture(scope="module")
def blocks():
    """A detector of mean colours, of which programs are small, and twelve images with a bright block."""
    return MeanColour(jnp.zeros(3), calibration(0.25)), bright_blocks()


def test_there_are_as_many_lanes_as_memory_holds(blocks, monkeypatch):
    detector, images = blocks
    monkeypatch.setattr(programs, "cores", lambda: 1)
    real = programs.program_bytes
    monkeypatch.setattr(refinement, "MAX_LANES", 4)
    monkeypatch.setattr(programs, "memory", lambda: 2**40)
    chosen, choose = [], programs.compiled

    def choosing(*arguments):
        program, number = choose(*arguments)
        chosen.append(number)

        def counting(means, lanes):
            busy.append(int(means[2].sum()))
            return program(means, lanes)

        return counting, number

    busy = []
    monkeypatch.setattr(programs, "compiled", choosing)
    roomy = list(refine_many(detector, images))
    assert busy[0] == 4, "all lanes are filled before the first runs"
    sizes = []
    monkeypatch.setattr(programs, "program_bytes", lambda program: sizes.append(real(program)) or sizes[-1])
    monkeypatch.setattr(programs, "memory", lambda: 1)
    tight = list(refine_many(detector, images))
    assert not sizes  # the lanes themselves don't fit, so nothing is compiled to see what it needs
    monkeypatch.setattr(programs, "program_bytes", lambda program: sizes.append(real(program)) or 2**41 // len(sizes))
    monkeypatch.setattr(programs, "memory", lambda: 2**41)
    half = list(refine_many(detector, images))
    assert chosen == [4, 1, 2] and sizes[0] > sizes[1] > 0
    monkeypatch.setattr(programs, "memory", lambda: None)
    for some, lanes in ((images[:1], 1), (images[:2], 2), (images[:3], 4), (images, 4), (iter(images[:1]), 4)):
        list(refine_many(detector, some))
        assert chosen.pop() == lanes
    for one, *others in zip(roomy, tight, half, strict=True):
        assert one.mask.any() and all(iou(one.mask, other.mask) > 0.95 for other in others)


def test_without_time_or_steps_the_mask_is_drawn_from_the_first_guess(blocks, monkeypatch):
    """The program of the steps is then not even compiled."""
    detector, images = blocks

    def forbidden(*_):
        raise AssertionError("the program of the steps is called")

    monkeypatch.setattr(programs, "advance_jit", forbidden)
    fast = list(refine_many(detector, images, settings=Settings.fast()))
    late = list(refine_many(detector, images, budget=1e-9))
    for one, other in zip(fast, late, strict=True):
        assert one.mask.any() and one.steps == other.steps == 0
        assert (one.outcome, other.outcome) == (Outcome.STEP_LIMIT, Outcome.TIME_LIMIT)
        np.testing.assert_array_equal(one.probability, other.probability)
        np.testing.assert_array_equal(one.normal, other.normal)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_time_limit_that_no_image_reaches_changes_nothing(blocks, lanes):
    detector, images = blocks
    free = refine_many(detector, images, lanes=lanes)
    for one, other in zip(free, refine_many(detector, images, lanes=lanes, budget=1000), strict=True):
        assert one.steps > 10
        assert_same(one, other)


def test_a_time_limit_stops_the_steps_of_a_part(blocks, monkeypatch):
    """The clock goes on by one second a look; a limit of seven seconds leaves three checks of ten steps."""
    detector, images = blocks
    ticks = itertools.count()
    monkeypatch.setattr(programs.Calls, "clock", lambda self: float(next(ticks)))
    (one,) = refine_many(detector, images[:1], budget=7, settings=ENDLESS)
    assert one.outcome == Outcome.TIME_LIMIT and one.steps == 30
    (other,) = refine_many(detector, images[:1], settings=dataclasses.replace(ENDLESS, max_steps=30, restore_steps=0))
    np.testing.assert_array_equal(one.mask, other.mask)


ENDLESS = Settings(solver=Settings().solver.without_stopping())


@pytest.mark.parametrize("budget", [0, -1.0])
def test_a_time_limit_is_above_0(blocks, budget):
    with pytest.raises(OptionError, match="above 0"):
        next(refine_many(*blocks, budget=budget))


def test_after_warm_up_no_defect_compiles_a_program(blocks, monkeypatch):
    """The image is larger than the detector's, and its crops have sizes of their own."""
    monkeypatch.setattr(programs, "make_room", lambda: False)
    detector, images = blocks
    rng = np.random.default_rng(0)
    image = np.asarray(jax.image.resize(images[0], (70, 90, 3), "nearest"))
    masks = [np.zeros((24, 24), bool) for _ in range(4)]
    for mask, side in zip(masks, (1, 3, 6, 9), strict=True):
        i, j = rng.integers(0, 24 - side, 2)
        mask[i : i + side, j : j + side] = True
    stages = []
    assert warm_up(detector, image, settings=SHORT, progress=lambda *stage: stages.append(stage)) >= 1
    assert stages[-1][1] == stages[-1][2] == len(stages) - 1
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
    )
    found = [*refine_many(detector, [image] * len(masks), coarse_mask=masks), *refine_many(detector, iter([image]))]
    assert not compiled and all(result.region.any() for result in found)


def test_groups_are_begun_and_decided_together(blocks, monkeypatch):
    """As on an accelerator: the masks are those of one part at a time, also where the last group is not full."""
    detector, images = blocks
    monkeypatch.setattr(programs, "cores", lambda: 1)
    alone = list(refine_many(detector, images, lanes=5))
    monkeypatch.setattr(programs, "group_size", lambda: 3)
    calls, draw = [], programs.draw

    def deciding(means, lanes):
        calls.append(sorted(set(means[3].tolist())))
        return draw(means, lanes)

    monkeypatch.setattr(programs, "draw", deciding)
    for one, other in zip(alone, refine_many(detector, images, lanes=5), strict=True):
        assert one.mask.any()
        np.testing.assert_array_equal(one.mask, other.mask)
        np.testing.assert_allclose(one.normal, other.normal, atol=1e-4)
    assert sum(map(len, calls)) == len(images) and max(map(len, calls)) == 3


def test_the_same_programs_serve_every_lane(blocks, monkeypatch):
    """Which lane a part is in is no constant of a program."""
    monkeypatch.setattr(programs, "cores", lambda: 1)
    monkeypatch.setattr(programs, "make_room", lambda: False)  # other tests' programs may fill the memory maps
    traced = []

    class Counted(MeanColour):
        def raw_scores(self, image, context):
            traced.append(image.shape)
            return super().raw_scores(image, context)

    detector, images = blocks
    counts = []
    for lanes in (1, 2, 5, 7):
        before = len(traced)
        assert len(list(refine_many(Counted(detector.colour, detector.calibration), images, lanes=lanes))) == len(images)
        counts.append(len(traced) - before)
    assert counts[0] >= counts[1] > counts[2] == counts[3] > 0  # several have an axis, which the first of them brings


@pytest.mark.parametrize("lanes", [None, 2])
def test_all_cores_of_a_cpu_give_what_one_gives(blocks, lanes, monkeypatch):
    """The images are shared out one at a time, and no program is compiled by two of the cores."""
    detector, images = blocks
    traced, served = [], {}

    class Counted(MeanColour):
        def raw_scores(self, image, context):
            traced.append(image.shape)
            return super().raw_scores(image, context)

    together, turn = threading.Barrier(3, timeout=60), buckets.Device.turn

    def turning(self):
        name = threading.current_thread().name
        if name not in served:
            served[name] = 0
            together.wait()  # so that no core does all the work before the others start
        served[name] += 1
        assert self.load <= (1 if lanes is None else len(images))
        return turn(self)

    monkeypatch.setattr(programs, "make_room", lambda: False)  # other tests' programs may fill the memory maps
    monkeypatch.setattr(programs, "cores", lambda: 1)
    one = list(refine_many(Counted(detector.colour, detector.calibration), images, lanes=lanes))
    count = len(traced)
    traced.clear()
    jax.clear_caches()
    monkeypatch.setattr(programs, "cores", lambda: 3)
    monkeypatch.setattr(buckets.Device, "turn", turning)
    several = list(refine_many(Counted(detector.colour, detector.calibration), images, lanes=lanes))
    assert len(served) == 3 and min(served.values()) > 0
    for a, b in zip(one, several, strict=True):
        assert a.mask.any()
        assert_same(a, b)
    assert len(traced) == count > 0


def test_the_first_call_of_a_program_is_made_alone():
    inside, most, call = [], [], programs.Calls()

    def program(x):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return 2 * x

    with ThreadPoolExecutor(4) as pool:
        first = [f.result() for f in [pool.submit(call, program, jnp.ones(3)) for _ in range(4)]]
    assert most[0] == 1 and max(most) > 1 and all((x == 2).all() for x in first)
    most.clear()
    with ThreadPoolExecutor(4) as pool:  # of other shapes: each is a first call
        list(pool.map(lambda n: call(program, jnp.ones(n)), (4, 5, 6, 7)))
    assert most == [1, 1, 1, 1]
    most.clear()

    def of_size(x, size):
        return program(x)

    with ThreadPoolExecutor(2) as pool:  # and of other settings
        list(pool.map(lambda size: call(of_size, jnp.ones(3), size), ((64, 64), (96, 96))))
    assert most == [1, 1]


def test_cores_are_those_that_xla_has(monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    assert programs.cores() == 3
    monkeypatch.delenv("NPROC")
    assert 1 <= programs.cores() <= (os.cpu_count() or 1)


TWO_DEVICES = """
import threading
import jax, jax.numpy as jnp, numpy as np
from conftest import MeanColour, bright_blocks, calibration
from f2pad_jax import refine, refine_many
from f2pad_jax.streaming._buckets import Device

images = bright_blocks()
detector = MeanColour(jnp.zeros(3), calibration(0.25))
alone = [jax.tree.map(np.asarray, refine(detector, image, windows=True)) for image in images]
assert all(result.mask.any() and result.steps > 0 for result in alone)
used, turn, both = set(), Device.turn, threading.Barrier(2, timeout=60)
def turning(self):
    (device,) = self.setup.detector.colour.devices()
    if device not in used:
        used.add(device)
        both.wait()  # so that neither device does all the work before the other starts
    return turn(self)
Device.turn = turning
for one, many in zip(alone, refine_many(detector, images), strict=True):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b)
print("devices", len(used))
"""


def test_two_devices_give_what_one_gives():
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES],
        env=os.environ
        | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
            "PYTHONPATH": str(Path(__file__).parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "devices 2"


def test_a_stream_takes_the_programs_that_refine_has_compiled(blocks):
    detector, images = blocks
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
    )
    image = np.pad(images[0], ((0, 4), (0, 8), (0, 0)), mode="edge")  # of a size of its own
    one = refine(detector, image, windows=True, lanes=1)
    assert compiled
    compiled.clear()
    (other,) = refine_many(detector, [image], lanes=1)
    assert not compiled and other.mask.any()
    np.testing.assert_array_equal(one.mask, other.mask)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux counts memory maps")
def test_programs_are_forgotten_where_they_leave_no_room_for_more(blocks, monkeypatch):
    detector, images = blocks
    expected = list(refine_many(detector, images))
    other = jax.jit(lambda x: x + 1)
    for room in (1.0, 0.0):
        other(1.0)
        assert other._cache_size() == 1
        monkeypatch.setattr(programs, "MAPS_SHARE", room)
        for a, b in zip(expected, refine_many(detector, images), strict=True):
            assert_same(a, b)
        assert other._cache_size() == room
