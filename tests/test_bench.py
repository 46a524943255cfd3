import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeanColour, calibration

from f2pad_jax.commands import bench as command
from f2pad_jax.commands import main
from f2pad_jax.errors import OptionError


@pytest.fixture(scope="module")
def script():
    """The module ``benchmarks/bench.py``, loaded by its path, since ``anomalib.py`` beside it would hide a package."""
    spec = importlib.util.spec_from_file_location("bench", Path(__file__).parents[1] / "benchmarks" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_are_counted_through_loops_and_calls(script):
    def program(a, b, image, kernel):
        c = jax.lax.fori_loop(0, 5, lambda _, c: jax.jit(jnp.matmul)(c, b), a)
        return c, jax.lax.conv_general_dilated(image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    shapes = (3, 4), (4, 4), (2, 9, 9, 6), (3, 3, 6, 8)
    jaxpr = jax.make_jaxpr(program)(*map(jnp.zeros, shapes)).jaxpr
    assert script.flops(jaxpr) == 5 * 2 * 3 * 4 * 4 + 2 * (2 * 4 * 4 * 8) * (3 * 3 * 6)


def test_every_measurement_is_printed(script, monkeypatch):
    rng = np.random.default_rng(0)
    image = np.full((48, 48, 3), 0.45, np.float32) + rng.normal(0, 0.02, (48, 48, 3)).astype(np.float32)
    image[20:34, 16:30] = 0.9
    truth = np.zeros((48, 48), bool)
    truth[20:34, 16:30] = True
    monkeypatch.setattr(script, "load_work", lambda folder: script.Work([], [image], [truth]))
    monkeypatch.setattr(script, "fit_detector", lambda *_: MeanColour(jnp.zeros(3), calibration(0.25)))
    lines = []
    script.bench("folder", batches=(1, 3), parts=("images", "peaks", "stages"), say=lines.append)
    assert jax.__version__ in lines[0] and "TFLOP/s" in lines[1] and "GB/s" in lines[1]
    rates = [re.match(r"patchcore: (\d) images in 1 lanes: ([\d.]+) images/s, IoU ([\d.]+)", line) for line in lines[2:4]]
    assert [int(rate[1]) for rate in rates] == [1, 3] and all(float(rate[2]) > 0 and float(rate[3]) > 0.5 for rate in rates)
    stages = [re.match(r"patchcore: .*: ([\d.]+) ms", line) for line in lines[4:]]
    assert len(stages) == 5 and all(float(stage[1]) > 0 for stage in stages)


def test_unknown_names_and_small_numbers_are_refused(script):
    with pytest.raises(OptionError, match="part 'colour' is unknown"):
        script.bench("textures", parts=["colour"])
    with pytest.raises(OptionError, match="method 'magic' is unknown"):
        script.bench("textures", methods=["magic"])
    for numbers in ({"batches": (0, 1)}, {"lanes": 0}):
        with pytest.raises(OptionError, match="at least 1"):
            script.bench("textures", **numbers)


def test_the_command_passes_its_arguments_to_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SCRIPT", tmp_path / "bench.py")
    (tmp_path / "bench.py").write_text("def main(argv, prog):\n    print(prog, argv)\n")
    assert main(["bench", "--methods", "padim", "folder", "--help"]) == 0
    assert capsys.readouterr().out == "f2pad bench ['--methods', 'padim', 'folder', '--help']\n"


def test_the_command_finds_the_script_beside_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("usage: f2pad bench")


def test_the_command_is_refused_without_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SCRIPT", tmp_path / "bench.py")
    assert main(["bench"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("f2pad: error: ") and "source checkout" in line and "pip install -e ." in line
