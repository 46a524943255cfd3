import json

import numpy as np
import PIL.Image
import pytest

from f2pad_jax.commands import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out)]) == 0
    return out


def test_the_demo_reaches_pixel_accuracy(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["images"] == 12 and set(summary["categories"]) == {"brick", "grass", "gravel"}
    assert summary["after"]["iou"] >= 0.95
    assert summary["after"]["iou"] >= summary["before"]["iou"] + 0.12
    assert all(category["after"]["iou"] >= 0.93 for category in summary["categories"].values())
    for category in [summary, *summary["categories"].values()]:
        for when in ("before", "start", "after"):
            assert 0 < category[when]["iou"] < category[when]["dice"] <= 1
    assert summary["seconds_per_image"] > 0 and summary["compile_seconds"] >= 0


def test_the_gallery_is_a_picture_of_all_images(folder):
    picture = np.asarray(PIL.Image.open(folder / "gallery.png"))
    assert picture.shape[0] > 12 * 100 and picture.shape[1] > 6 * 100
    assert picture.std() > 20
