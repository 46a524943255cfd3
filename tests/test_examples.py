import importlib.util
import inspect
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from f2pad_jax import Settings, fit, load_detector, refine, save_detector
from f2pad_jax.backbones import load_backbone
from f2pad_jax.data import load_texture
from f2pad_jax.detectors import NormalImages, PatchCore
from f2pad_jax.images.metrics import iou

SIDE = 128  # 8x8 positions of the vision transformer; with 64 pixels there are 4x4, and chance decides
EXAMPLES = Path(__file__).parents[1] / "examples"
FILE = EXAMPLES / "own_detector.py"


def imported(name):
    """Yields an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as known:
        known.setitem(sys.modules, name, module)  # inspect looks there for the source
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def example():
    yield from imported("own_detector")


@pytest.fixture(scope="module")
def solver_example():
    yield from imported("own_solver")


@pytest.fixture(scope="module")
def texture():
    return load_texture("brick", size=SIDE, num_train=6, num_test=4)


@pytest.fixture(scope="module", params=["efficientnet-lite0", "vit-tiny"])
def network(request):
    """A backbone, and its weight file if the weights are not installed."""
    if request.param == "efficientnet-lite0":
        return load_backbone(request.param, layers=("stage3",)), None
    weights = request.getfixturevalue("shared") / "weights" / "vit_tiny_patch16_224.safetensors"
    return load_backbone("vit-tiny", layers=("block8",), weights=weights), weights


@pytest.fixture(scope="module")
def detector(example, texture, network):
    return fit(example.TokenNeighbours, texture.train, network[0], size=(SIDE, SIDE), num_components=2)


def test_a_detector_of_ones_own_is_less_than_60_lines(example):
    assert len(inspect.getsource(example.TokenNeighbours).splitlines()) < 60
    assert len(FILE.read_text().splitlines()) < 80


def test_scores_are_squared_distances_to_the_nearest_token_kept(detector, texture):
    image = NormalImages([texture.test[0].image], (SIDE, SIDE))[0]
    tokens = np.asarray(detector.tokens(image), np.float64)
    np.testing.assert_allclose(np.linalg.norm(tokens, axis=1), 1, rtol=1e-5)
    (found,) = jax.jit(type(detector).raw_scores)(detector, image, None)
    side = SIDE // detector.backbone.stride
    assert found.shape == (side, side) and len(tokens) == side**2
    assert len(detector.bank) == 6 * side**2 / 2, "half of the tokens of all images"
    expected = cdist(tokens, detector.bank, "sqeuclidean").min(axis=1)
    np.testing.assert_allclose(found.ravel(), expected, rtol=0, atol=1e-4 * expected.max())


def test_it_is_refined_saved_and_loaded(example, detector, network, texture, tmp_path):
    path = tmp_path / "own.model"
    save_detector(path, detector)
    loaded = load_detector(path, weights=network[1], classes=(example.TokenNeighbours,))
    assert type(loaded) is example.TokenNeighbours
    images, settings = np.stack([test.image for test in texture.test]), Settings(false_alarms=0.2)
    found, again = (jax.tree.map(np.asarray, refine(d, images, settings=settings)) for d in (detector, loaded))
    np.testing.assert_array_equal(found.mask, again.mask)
    for i in range(len(texture.test)):
        assert found.region[i].any() and not found.mask[i][~found.region[i]].any()
    before, after = (
        np.mean([iou(masks[i], test.mask) for i, test in enumerate(texture.test)])
        for masks in (found.coarse_mask, found.mask)
    )
    assert after > 0.5 and after > before + 0.15


def test_a_solver_of_ones_own_is_less_than_40_lines_and_refines(solver_example, texture, shallow_backbone):
    assert len(inspect.getsource(solver_example.SignDescent).splitlines()) < 40
    detector = fit(PatchCore, texture.train, shallow_backbone, size=(SIDE, SIDE), num_components=2)
    test = texture.test[0]
    settings = Settings(solver=solver_example.SignDescent(), max_steps=50)
    found = jax.tree.map(np.asarray, refine(detector, test.image, settings=settings))
    assert found.steps > 0 and not found.mask[~found.region].any()
    assert iou(found.mask, test.mask) > iou(found.coarse_mask, test.mask) + 0.1
