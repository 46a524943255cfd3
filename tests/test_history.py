import csv

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import SIZE

from f2pad_jax import Outcome, Settings, history, refine
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images.metrics import iou

SETTINGS = Settings(max_steps=55)


@pytest.fixture(scope="module")
def image(texture):
    return texture.test[1].image


@pytest.fixture(scope="module")
def found(detector, image):
    return history(detector, image, settings=SETTINGS)


def test_every_step_and_every_tenth_n(found, image):
    assert found.outcome == Outcome.STEP_LIMIT
    np.testing.assert_array_equal(found.steps, [0, 10, 20, 30, 40, 50, 60])  # looked at after every tenth step
    assert len(found.objective) == 60 and all(len(values) == 60 for values in found.terms.values())
    assert found.n.shape == (7, SIZE, SIZE, 3) and found.masks.shape == (7, SIZE, SIZE)
    np.testing.assert_allclose(found.image, image / 255, atol=1e-6)


def test_the_terms_add_up_to_the_objective(found):
    np.testing.assert_allclose(sum(found.terms.values()), found.objective, rtol=1e-4)
    assert found.objective[-1] < found.objective[0]
    assert found.terms["sparsity"][-1] < found.terms["sparsity"][0]  # n0 differs from x everywhere in the region


def test_it_is_what_refine_does(found, detector, image):
    result = jax.tree.map(np.asarray, refine(detector, image, settings=SETTINGS, windows=True))
    assert iou(found.masks[-1], result.mask) > 0.85
    outside = ~result.region
    np.testing.assert_allclose(found.n[:, outside], np.broadcast_to(found.image[outside], (7, outside.sum(), 3)), atol=1e-6)
    assert not found.masks[:, outside].any()
    assert np.abs(np.diff(found.n, axis=0)).max(axis=(1, 2, 3)).min() > 0.01


def test_files_to_look_at(found, tmp_path):
    found.save_csv(tmp_path / "history.csv")
    found.save_animation(tmp_path / "history.gif")
    found.save_figure(tmp_path / "history.png", columns=4)
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert len(rows) == 60 and rows[7]["step"] == "7"
    assert float(rows[7]["feature"]) == pytest.approx(found.terms["feature"][7], rel=1e-4)
    with PIL.Image.open(tmp_path / "history.gif") as animation:
        assert animation.n_frames == 7 and animation.size == (2 * SIZE, SIZE)
    with PIL.Image.open(tmp_path / "history.png") as figure:
        assert figure.width > 600 and len(np.unique(np.asarray(figure.convert("L")))) > 50


def test_a_good_image_has_no_history(detector, texture, tmp_path):
    nothing = history(detector, texture.train[0])
    assert nothing.outcome == Outcome.NOTHING_TO_REFINE
    assert len(nothing.objective) == 0 and not nothing.masks.any()
    np.testing.assert_array_equal(nothing.n[0], nothing.image)
    nothing.save_csv(tmp_path / "history.csv")
    nothing.save_figure(tmp_path / "history.png")
    assert (tmp_path / "history.csv").read_text().splitlines() == ["step,objective,feature,prior,variation,sparsity"]


def test_a_region_that_covers_the_image(detector, image):
    covered = history(detector, image, settings=Settings(hysteresis=-1.0))
    assert covered.outcome == Outcome.COVERS_IMAGE and covered.masks[0].any()


def test_one_image_and_a_positive_interval(detector, image):
    with pytest.raises(ImageError, match="one at a time"):
        history(detector, image[None])
    with pytest.raises(OptionError, match="every=0"):
        history(detector, image, every=0)
