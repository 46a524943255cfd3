import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from f2pad_jax import NormalImages, PatchCore, Settings, fit, load_detector, refine, save_detector
from f2pad_jax.cli import main
from f2pad_jax.data.images import write_png
from f2pad_jax.data.textures import load_texture
from f2pad_jax.detectors.fit import Trial
from f2pad_jax.evaluation import tune as tuning
from f2pad_jax.evaluation.metrics import iou
from f2pad_jax.evaluation.tune import GAIN, synthetic_defects, trials_table, tune

SIZE = (64, 64)


@pytest.fixture(scope="module")
def grass():
    return load_texture("grass", size=64, num_train=7, num_test=1)


@pytest.fixture(scope="module")
def detector(grass, backbone):
    return fit(PatchCore, grass.train[:5], backbone, size=SIZE)


@pytest.fixture
def held_out(grass):
    return NormalImages(grass.train[5:], SIZE), NormalImages(grass.train[:5], SIZE)


def test_the_best_of_what_is_tried_is_taken_and_used(detector, held_out, monkeypatch, tmp_path):
    """From no sparsity at all to the ordinary one; what is tried twice is run once."""
    monkeypatch.setattr(tuning, "SPARSITY", (0.0, 1.5))
    monkeypatch.setattr(tuning, "ALPHA1", (0.01, 0.01))
    monkeypatch.setattr(tuning, "COMPONENTS", (2,))
    monkeypatch.setattr(tuning, "NUM_IMAGES", 2)
    tuned, trials = tune(detector, *held_out)
    assert [(t.sparsity, t.num_components) for t in trials] == [(0.0, 2), (1.5, 2)]
    assert trials[0].iou != trials[1].iou
    best = trials[trials[1].iou > trials[0].iou + GAIN]
    assert [t.chosen for t in trials] == [t is best for t in trials]
    assert [float(v) for v in tuned.calibrated.tuned] == pytest.approx([0.01, best.sparsity])
    assert 1 <= len(tuned.calibrated.prior.means) <= 2
    defects = synthetic_defects(*held_out, 2, 0)
    found = [iou(np.asarray(refine(tuned, d.image, settings=Settings(restore_steps=0)).mask), d.mask) for d in defects]
    assert np.mean(found) == pytest.approx(best.iou, abs=1e-6)
    save_detector(tmp_path / "tuned.model", tuned)
    again = load_detector(tmp_path / "tuned.model").calibrated.tuned
    assert [float(v) for v in again] == [float(v) for v in tuned.calibrated.tuned]


def test_settings_given_overrule_the_tuned_ones(detector):
    calibration = detector.calibrated
    assert Settings().weights(calibration) == (0.01, 1.5)
    tuned = dataclasses.replace(calibration, tuned=(jnp.float32(0.25), jnp.float32(3.0)))
    assert Settings().weights(tuned) == (0.25, 3.0)
    assert Settings(alpha1=0.0).weights(tuned) == (0.0, 3.0)
    assert Settings(sparsity=0.5).weights(tuned) == (0.25, 0.5)


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


def test_the_command_tunes_and_says_what_it_tried(grass, tmp_path, monkeypatch, capsys):
    for name in ("SPARSITY", "ALPHA1", "COMPONENTS"):
        monkeypatch.setattr(tuning, name, getattr(tuning, name)[:1])
    monkeypatch.setattr(tuning, "NUM_IMAGES", 1)
    for k, crop in enumerate(grass.train):
        write_png(tmp_path / "good" / f"{k}.png", crop)
    model = tmp_path / "grass.model"
    assert main(["tune", str(tmp_path / "good"), "--out", str(model), "--size", "64"]) == 0
    assert "chosen" in capsys.readouterr().out
    assert [float(v) for v in load_detector(model).calibrated.tuned] == pytest.approx([0.01, 1.5])
