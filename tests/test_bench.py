import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeanColour, calibration

from f2pad_jax import OptionError
from f2pad_jax.evaluation import bench as module
from f2pad_jax.evaluation.bench import bench, flops


def test_operations_are_counted_through_loops_and_calls():
    def program(a, b, image, kernel):
        c = jax.lax.fori_loop(0, 5, lambda _, c: jax.jit(jnp.matmul)(c, b), a)
        return c, jax.lax.conv_general_dilated(image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    shapes = (3, 4), (4, 4), (2, 9, 9, 6), (3, 3, 6, 8)
    jaxpr = jax.make_jaxpr(program)(*map(jnp.zeros, shapes)).jaxpr
    assert flops(jaxpr) == 5 * 2 * 3 * 4 * 4 + 2 * (2 * 4 * 4 * 8) * (3 * 3 * 6)


def test_what_is_measured_is_said(monkeypatch):
    rng = np.random.default_rng(0)
    image = np.full((48, 48, 3), 0.45, np.float32) + rng.normal(0, 0.02, (48, 48, 3)).astype(np.float32)
    image[20:34, 16:30] = 0.9
    truth = np.zeros((48, 48), bool)
    truth[20:34, 16:30] = True
    monkeypatch.setattr(module, "_work", lambda folder: module.Work([], [image], [truth]))
    monkeypatch.setattr(module, "_fitted", lambda *_: MeanColour(jnp.zeros(3), calibration(0.25)))
    lines = []
    bench("folder", batches=(1, 3), parts=("images", "peaks", "stages"), say=lines.append)
    assert jax.__version__ in lines[0] and "TFLOP/s" in lines[1] and "GB/s" in lines[1]
    rates = [re.match(r"patchcore: (\d) images in 1 lanes: ([\d.]+) images/s, IoU ([\d.]+)", line) for line in lines[2:4]]
    assert [int(rate[1]) for rate in rates] == [1, 3] and all(float(rate[2]) > 0 and float(rate[3]) > 0.5 for rate in rates)
    stages = [re.match(r"patchcore: .*: ([\d.]+) ms", line) for line in lines[4:]]
    assert len(stages) == 5 and all(float(stage[1]) > 0 for stage in stages)


def test_what_is_unknown_is_refused():
    with pytest.raises(OptionError, match="part 'colour' is unknown"):
        bench("textures", parts=["colour"])
    with pytest.raises(OptionError, match="method 'magic' is unknown"):
        bench("textures", methods=["magic"])
    for numbers in ({"batches": (0, 1)}, {"lanes": 0}):
        with pytest.raises(OptionError, match="at least 1"):
            bench("textures", **numbers)
