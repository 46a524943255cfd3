"""Settings in a TOML file."""

import dataclasses
import os

import pytest

from f2pad_jax import Settings
from f2pad_jax.commands._settings_file import as_toml, read_settings
from f2pad_jax.errors import OptionError
from f2pad_jax.method import Residual
from f2pad_jax.objective import L0
from f2pad_jax.solvers import Descent, Proximal, Sharing


def read(text, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return read_settings(path)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings.paper(),
        Settings(alpha1=0.0, beta0=5.0, penalty=L0(), solver=Proximal(momentum=(0.9, 0.8, 0.7)), reach=None),
        Settings(solver=Descent(sharing=None, gamma0=None), decision=Residual(tau=0.5), max_steps=7),
    ],
)
def test_every_constant_comes_back(settings, tmp_path):
    assert read(as_toml(settings), tmp_path).described() == settings.described()


def test_a_file_names_only_what_it_changes(tmp_path):
    assert read("", tmp_path).described() == Settings().described()
    found = read("false_alarms = 0.01\n[solver]\nlearning_rate = 1\n[solver.sharing]\nradius = 3", tmp_path)
    expected = Settings(false_alarms=0.01, solver=Descent(learning_rate=1.0, sharing=Sharing(radius=3)))
    assert found.described() == expected.described()
    found = read('preset = "paper"\nmax_steps = 100\n[decision]\nclass = "Mixture"', tmp_path)
    assert found.max_steps == 100 and found.reach is None
    assert type(found.decision).__name__ == "Mixture" and found.solver.clip == 0.03


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alpha3 = 1", "no constant 'alpha3'"),
        ("[solver]\nspeed = 1", "no constant 'solver.speed'"),
        ('[solver]\nclass = "Newton"', "no class 'Newton'; there are Descent, Proximal"),
        ('preset = "faster"', "no preset 'faster'"),
        ("max_steps = 1.5", "max_steps: 1.5 is not a whole number of at least 0"),
        ("dilation = -3", "dilation: -3 is not a whole number"),
        ("alpha1 = true", "alpha1: True is not a number"),
        ('alpha1 = "much"', "alpha1: 'much' is not a number"),
        ('max_steps = "none"', "max_steps: 'none' is not"),
        ("max_steps = [1, 2]", "max_steps"),
        ("penalty = 3", "penalty: 3 is not a table"),
        ("beta0 = true", "beta0: True is not a number or"),
        ("alpha1 = 1979-05-27", "alpha1"),
        ("false_alarms = 5.0", "false_alarms=5: must be above 0 and at most 1"),
        ('preset = ["x"]', "no preset"),
        ('[solver]\nclass = ["x"]', "no class"),
        ('[solver]\nclass = "Proximal"\nmomentum = [0.9]', "solver.momentum"),
        ("[alpha1]\nx = 1", "alpha1: {'x': 1} is not a number"),
        ("alpha1 = ", "settings.toml: Invalid value"),
        ("alpha1 = nan", "alpha1: nan is not a number"),
        (f"alpha1 = {'9' * 400}", "is not a number"),
        (f"alpha1 = {'9' * 5000}", "settings.toml: "),
        (f"max_steps = {2**31}", "is not a whole number"),
        (f"alpha1 = {'[' * 20000}", "settings.toml: "),
    ],
)
def test_wrong_files_are_refused(text, said, tmp_path):
    with pytest.raises(OptionError, match=said):
        read(text, tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"none\.toml: No such file"):
        read_settings(tmp_path / "none.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(OptionError, match=r"pipe\.toml: a pipe or a device"):
        read_settings(tmp_path / "pipe.toml")


def test_a_whole_number_may_stand_for_a_real_one(tmp_path):
    assert dataclasses.astuple(read("alpha1 = 1", tmp_path))[0] == 1.0
