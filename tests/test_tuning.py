import numpy as np
import pytest
from scipy.stats import sem

from f2pad_jax import Settings, load_detector, tuning
from f2pad_jax.commands import main
from f2pad_jax.data import load_texture
from f2pad_jax.detectors import NormalImages
from f2pad_jax.images import write_png
from f2pad_jax.method import Residual
from f2pad_jax.tuning import GAIN, Trial, is_gain, synthetic_defects, trials_table

SIZE = (64, 64)


@pytest.fixture(scope="module")
def grass():
    return load_texture("grass", size=64, num_train=7, num_test=1)


@pytest.fixture
def held_out(grass):
    return NormalImages(grass.train[5:], SIZE), NormalImages(grass.train[:5], SIZE)


def test_synthetic_defects_are_of_both_protocols_and_on_held_out_images(held_out):
    defects = synthetic_defects(*held_out, 6, 0)
    bases = [np.asarray(held_out[0].pixels(k % 2)) / 65535 for k in range(6)]
    flat = [len(np.unique(d.image[d.mask], axis=0)) == 1 for d in defects]
    assert flat == [True, False] * 3
    for defect, base in zip(defects, bases, strict=True):
        assert defect.mask.any()
        changed = np.abs(defect.image - base).max(axis=-1) > 0.01
        assert changed[defect.mask].mean() > 0.8 and changed[~defect.mask].mean() < 0.2
    again = synthetic_defects(*held_out, 6, 0)
    assert all(np.array_equal(one.image, other.image) for one, other in zip(defects, again, strict=True))


def test_the_table_says_what_was_chosen():
    table = trials_table(
        [Trial(0.01, 1.5, 6, 0.8, 16, 0.0, 0.0, False), Trial(0.01, 3.0, 6, 0.91234, 16, 0.11, 0.02, True)]
    )
    assert table.splitlines()[3].split() == ["3", "0.01", "6", "16", "0.912", "+0.110", "±", "0.020", "chosen"]
    assert table.count("chosen") == 1 and len(table.splitlines()[2].split()) == 5


def test_the_command_takes_what_gains_more_than_chance_and_says_so(grass, tmp_path, monkeypatch, capsys):
    """From too little sparsity; a value that gains nothing on the first four defects isn't tried on the others."""
    monkeypatch.setattr(tuning, "SPARSITY", (0.15, 0.0015, 1.5))
    short = Settings(restore_steps=0, sparsity=0.15, false_alarms=1.0, decision=Residual())  # the mask needs sparsity
    monkeypatch.setattr(tuning, "SHORT", short)
    monkeypatch.setattr(tuning, "ALPHA1", (0.01,))
    monkeypatch.setattr(tuning, "COMPONENTS", (2,))
    monkeypatch.setattr(tuning, "NUM_IMAGES", 8)
    monkeypatch.setattr(tuning, "ROUND", 4)
    for k, crop in enumerate(grass.train):
        write_png(tmp_path / "good" / f"{k}.png", crop)
    model = tmp_path / "grass.model"
    command = ["tune", str(tmp_path / "good"), "--out", str(model), "--size", "64", "--seed", "0"]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    first, less, more = (line.split() for line in printed if line.split()[2:3] == ["2"])
    assert [first[0], less[0], more[0]] == ["0.15", "0.0015", "1.5"]
    assert [first[3], less[3], more[3]] == ["8", "4", "8"]
    assert float(less[5]) < GAIN <= float(more[5]) and float(more[5]) > float(more[7])
    assert float(more[5]) == pytest.approx(float(more[4]) - float(first[4]), abs=0.0015)  # three digits of each
    assert [row[-1] == "chosen" for row in (first, less, more)] == [False, False, True]
    calibrated = load_detector(model).calibrated
    factors = calibrated.factors
    assert [float(factors.alpha1), float(factors.sparsity)] == pytest.approx([1.0, 10.0])
    assert 1 <= calibrated.prior.num_components <= 2


@pytest.mark.parametrize(
    "gains, counts",
    [
        ([0.02] * 4, True),
        ([0.004] * 4, False),  # less than counts
        ([0.08, 0.0, 0.0, 0.0], False),  # one defect's
        ([0.18] + [0.0] * 15, False),  # of which the mean is a rounding error above its standard error
        ([0.08, 0.08, 0.0, 0.0], True),
        ([0.2, 0.2, -0.15, -0.15], False),
    ],
)
def test_a_gain_counts_beyond_its_standard_error(gains, counts):
    gains = np.asarray(gains)
    error = float(sem(gains))
    assert error == pytest.approx(gains.std(ddof=1) / np.sqrt(len(gains)))
    assert is_gain(float(gains.mean()), error) is counts
