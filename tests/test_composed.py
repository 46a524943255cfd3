"""One detector finds where, another judges the restored image."""

import dataclasses
import json

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import SIZE
from test_saving import same

from f2pad_jax import Settings, fit, load_detector, save_detector, update
from f2pad_jax.backbones._weight_files import cached_file
from f2pad_jax.commands import main
from f2pad_jax.detectors import PaDiM, PatchCore, compose
from f2pad_jax.detectors.base import ORIGIN
from f2pad_jax.detectors.calibration import with_calibration
from f2pad_jax.errors import CheckpointError, OptionError
from f2pad_jax.images.metrics import iou
from f2pad_jax.images.pixels import normalise, to_unit
from f2pad_jax.method import look


@pytest.fixture(scope="module")
def judge(texture, shallow_backbone):
    return fit(PaDiM, texture.train, shallow_backbone, size=SIZE, features_only=True, num_channels=20)


@pytest.fixture(scope="module")
def composed(detector, judge):
    return compose(detector, judge)


def test_the_map_and_the_verdict_are_the_coarse_detector_s_and_the_scores_the_judge_s(composed, detector, judge, texture):
    image = to_unit(texture.test[0].image)
    found, expected = (look(one, image, Settings().traced()) for one in (composed, detector))
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, rtol=1e-4)
    assert (found.mask == expected.mask).all() and (found.region == expected.region).all() and found.mask.any()
    np.testing.assert_allclose([found.score, found.p_value], [expected.score, expected.p_value], rtol=1e-3)
    scores = (one.scores(normalise(image), one.locate(normalise(image), ORIGIN)) for one in (composed, judge))
    jax.tree.map(np.testing.assert_array_equal, *scores)
    assert composed.size == judge.size and composed.stride == judge.stride == 8 and composed.local


def test_a_smaller_coarse_detector_keeps_its_verdict(detector, judge, texture, shallow_backbone):
    """... to what the scaling of image and map changes."""
    smaller = fit(PatchCore, texture.train, shallow_backbone, size=SIZE - 16, num_components=1)
    image = to_unit(texture.test[0].image)
    found, expected = (look(one, image, Settings().traced()) for one in (compose(smaller, judge), smaller))
    assert found.anomaly_map.shape == (SIZE, SIZE)
    np.testing.assert_allclose(found.score, expected.score, rtol=0.1)
    with pytest.raises(OptionError, match=r"size \(96, 96\), the judge \(80, 80\)"):
        compose(detector, smaller)


def test_the_command_composes_two_files_and_refines_with_the_third(detector, judge, texture, tmp_path):
    save_detector(tmp_path / "coarse.model", detector)
    save_detector(tmp_path / "judge.model", judge)
    for number, test in enumerate(texture.test):
        PIL.Image.fromarray(test.image).save(tmp_path / f"{number}.png")
    both, out = [str(tmp_path / f"{name}.model") for name in ("coarse", "judge")], str(tmp_path / "both.model")
    assert main(["compose", *both, "--out", out]) == 0
    same(load_detector(out), compose(detector, judge))
    assert (
        main(["refine", out, *(str(tmp_path / f"{number}.png") for number in range(3)), "--out", str(tmp_path / "out")])
        == 0
    )
    records = json.loads((tmp_path / "out" / "results.json").read_text())["images"]
    masks = [np.asarray(PIL.Image.open(tmp_path / "out" / record["mask"])) > 0 for record in records]
    coarse = [look(detector, to_unit(test.image), Settings().traced()).mask for test in texture.test]
    before, after = (
        np.mean([iou(np.asarray(m), t.mask) for m, t in zip(some, texture.test, strict=True)]) for some in (coarse, masks)
    )
    assert after > before + 0.05


def test_what_can_t_be_composed_is_refused(detector, judge, texture, shallow_backbone):
    with pytest.raises(OptionError, match="no maps of its own"):
        compose(judge, detector)
    other = with_calibration(judge, dataclasses.replace(judge.calibrated, white=4095))
    with pytest.raises(OptionError, match="white levels differ: None and 4095"):
        compose(detector, other)
    with pytest.raises(OptionError, match="compose them"):
        fit(type(compose(detector, judge)), texture.train, shallow_backbone, size=SIZE)


def test_each_network_takes_its_weights_from_one_of_several_files(composed, tmp_path):
    save_detector(tmp_path / "model", composed)
    other = tmp_path / "other.pth"
    other.write_bytes(b"no weights")
    same(load_detector(tmp_path / "model", weights=[other, cached_file("efficientnet-lite0")]), composed)
    with pytest.raises(CheckpointError, match=r"other\.pth"):
        load_detector(tmp_path / "model", weights=[other])


def test_both_detectors_learn_from_a_false_alarm(composed, texture):
    """... an image with another tint, whose like is good afterwards."""
    tinted = [np.clip(image * np.array([1.0, 0.8, 0.8]), 0, 255).astype(np.uint8) for image in texture.train[:4]]
    learnt = update(composed, tinted[:3], force=True)
    assert len(learnt.coarse.memory_bank) > len(composed.coarse.memory_bank)
    assert learnt.judge.num_images == composed.judge.num_images + 3
    before, after = (float(look(one, to_unit(tinted[3]), Settings().traced()).score) for one in (composed, learnt))
    assert after < before
