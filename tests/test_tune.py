import numpy as np
import pytest

from f2pad_jax import NormalImages, load_detector
from f2pad_jax.cli import main
from f2pad_jax.data.images import write_png
from f2pad_jax.data.textures import load_texture
from f2pad_jax.detectors.fit import Trial
from f2pad_jax.evaluation import tune as tuning
from f2pad_jax.evaluation.tune import GAIN, synthetic_defects, trials_table

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
    table = trials_table([Trial(0.01, 1.5, 6, 0.8, False), Trial(0.01, 3.0, 6, 0.91234, True)])
    assert table.splitlines()[2].split() == ["3", "0.01", "6", "0.912", "chosen"] and table.count("chosen") == 1


def test_the_command_takes_the_best_of_what_it_tries_and_says_so(grass, tmp_path, monkeypatch, capsys):
    """Ten times less sparsity against the ordinary one; what is tried twice is run once."""
    monkeypatch.setattr(tuning, "SPARSITY", (1.5, 0.15))
    monkeypatch.setattr(tuning, "ALPHA1", (0.01, 0.01))
    monkeypatch.setattr(tuning, "COMPONENTS", (2,))
    monkeypatch.setattr(tuning, "NUM_IMAGES", 2)
    for k, crop in enumerate(grass.train):
        write_png(tmp_path / "good" / f"{k}.png", crop)
    model = tmp_path / "grass.model"
    assert main(["tune", str(tmp_path / "good"), "--out", str(model), "--size", "64"]) == 0
    printed = capsys.readouterr().out.splitlines()
    trials = [line.split() for line in printed if len(line.split()) in (4, 5) and line.split()[2] == "2"]
    assert [(t[0], t[1]) for t in trials] == [("1.5", "0.01"), ("0.15", "0.01")]
    first, second = (float(t[3]) for t in trials)
    assert [t[-1] == "chosen" for t in trials] == [second <= first + GAIN, second > first + GAIN]
    calibrated = load_detector(model).calibrated
    chosen = next(t for t in trials if t[-1] == "chosen")
    assert [float(v) for v in calibrated.tuned] == pytest.approx([1.0, float(chosen[0]) / 1.5])
    assert 1 <= calibrated.prior.num_components <= 2
