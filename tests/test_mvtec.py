import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from f2pad_jax.data import open_categories, open_category, read_mask
from f2pad_jax.data.mvtec import Sample, half_of
from f2pad_jax.errors import ImageError


def picture(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(values).save(path)


@pytest.fixture
def root(tmp_path):
    """Two categories and a folder that is none."""
    image = np.full((20, 24, 3), 90, np.uint8)
    mask = np.zeros((20, 24), np.uint8)
    mask[4:9, 6:12] = 255
    for name in ("nut", "bolt"):
        for k in range(3):
            picture(tmp_path / name / "train" / "good" / f"{k:03}.png", image)
        picture(tmp_path / name / "test" / "good" / "000.png", image)
        picture(tmp_path / name / "test" / "crack" / "000.jpg", image)
        picture(tmp_path / name / "ground_truth" / "crack" / "000_mask.png", mask)
    (tmp_path / "papers").mkdir()
    return tmp_path


def test_a_data_set_is_its_categories_files(root):
    bolt, nut = open_categories(root)
    assert (bolt.name, nut.name) == ("bolt", "nut")
    assert [path.name for path in nut.train] == ["000.png", "001.png", "002.png"]
    assert [(sample.name, sample.kind, sample.mask is None) for sample in nut.test] == [
        ("crack/000", "crack", False),
        ("good/000", "good", True),
    ]
    assert nut.masks == [root / "nut" / "ground_truth" / "crack" / "000_mask.png"]
    assert nut.test[0].truth((20, 24)).sum() == 30 and not nut.test[1].truth((20, 24)).any()
    assert [category.name for category in open_categories(root, names=["nut"])] == ["nut"]


def test_ground_truth_is_resized_by_nearest_neighbour(root):
    path = root / "nut" / "ground_truth" / "crack" / "000_mask.png"
    mask = read_mask(path)
    np.testing.assert_array_equal(read_mask(path, size=(40, 48)), mask.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(read_mask(path, size=(20, 24)), mask)
    picture(path, np.where(mask, 128, 127).astype(np.uint8))
    np.testing.assert_array_equal(read_mask(path), mask)


def test_what_is_missing_is_named(root, tmp_path):
    with pytest.raises(ImageError, match="no such folder"):
        open_categories(root / "nowhere")
    with pytest.raises(ImageError, match="no category in it"):
        open_categories(root / "papers")
    with pytest.raises(ImageError, match="screw: no such folder"):
        open_categories(root, names=["screw"])
    mask = root / "nut" / "ground_truth" / "crack" / "000_mask.png"
    mask.rename(mask.with_name("other.png"))
    with pytest.raises(ImageError, match=r"000\.jpg: its ground truth .* is missing"):
        open_category(root / "nut")
    shutil.rmtree(root / "bolt" / "test")
    with pytest.raises(ImageError, match="test: no such"):
        open_category(root / "bolt")
    assert not open_category(root / "bolt", testing=False).test
    picture(root / "bolt" / "test" / "stray.png", np.zeros((20, 20), np.uint8))
    with pytest.raises(ImageError, match="in no folder"):
        open_category(root / "bolt")
    with pytest.raises(ImageError, match="no such file"):
        read_mask(root / "nothing.png")
    (root / "text.png").write_text("no image")
    with pytest.raises(ImageError, match="not an image"):
        read_mask(root / "text.png")


def test_halves_part_the_samples_of_each_kind():
    samples = [
        Sample(Path(f"{kind}/{k:03}.png"), kind, None) for kind, count in (("cut", 5), ("good", 4)) for k in range(count)
    ]
    development, report = half_of(samples[::-1], "development"), half_of(samples, "report")
    assert [s.name for s in development] == ["cut/000", "cut/002", "cut/004", "good/000", "good/002"]
    assert sorted(development + report) == sorted(samples)
