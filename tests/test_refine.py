import jax
import jax.numpy as jnp
import numpy as np
import pytest

import f2pad_jax
from f2pad_jax import ImageError, Outcome, Settings, fit_patchcore, refine
from f2pad_jax.data.textures import load_texture
from f2pad_jax.evaluation.metrics import iou
from f2pad_jax.inpaint import harmonic
from f2pad_jax.refine import Coarse, look, solve_window
from f2pad_jax.units import to_unit

SIZE = 96


@pytest.fixture(scope="module")
def texture():
    return load_texture("brick", size=SIZE, num_train=6, num_test=3)


@pytest.fixture(scope="module")
def detector(texture, backbone):
    return fit_patchcore(texture.train, backbone, size=(SIZE, SIZE))


@pytest.fixture(scope="module")
def images(texture):
    """Three defective images and a good one."""
    return np.stack([*[test.image for test in texture.test], texture.train[0]])


@pytest.fixture(scope="module")
def result(detector, images):
    return jax.tree.map(np.asarray, refine(detector, images))


def test_masks_are_sharper_than_the_coarse_ones(result, texture):
    coarse = [iou(result.coarse_mask[i], test.mask) for i, test in enumerate(texture.test)]
    refined = [iou(result.mask[i], test.mask) for i, test in enumerate(texture.test)]
    assert np.mean(refined) > 0.85
    assert np.mean(refined) > np.mean(coarse) + 0.1


def test_pixels_outside_the_region_are_bit_identical(result, images):
    outside = ~result.region
    assert outside.any() and result.region.any()
    unit = images.astype(np.float32) / 255
    np.testing.assert_array_equal(result.normal[outside], unit[outside])
    np.testing.assert_array_equal((result.normal * 255).round().astype(np.uint8)[outside], images[outside])
    assert not result.anomaly[outside].any() and not result.mask[outside].any()


def test_input_is_normal_plus_anomaly(result, images):
    np.testing.assert_allclose(result.normal + result.anomaly, images.astype(np.float32) / 255, atol=1e-6)
    assert result.normal.min() >= 0 and result.normal.max() <= 1


def test_a_good_image_has_an_empty_mask_and_says_so(result, images):
    assert result.outcome[-1] == Outcome.NOTHING_TO_REFINE
    assert "good" in Outcome(result.outcome[-1]).message
    assert not result.mask[-1].any() and result.steps[-1] == 0 and result.objective[-1] == 0
    np.testing.assert_array_equal(result.normal[-1], images[-1].astype(np.float32) / 255)


def test_an_image_alone_gets_what_it_gets_in_a_batch(detector, images, result):
    alone = jax.tree.map(np.asarray, refine(detector, images[1]))
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(result), strict=True):
        np.testing.assert_array_equal(one, many[1])


def test_side_by_side_gives_the_same_masks(detector, images, result):
    lanes = refine(detector, images, batch_size=2)
    for i in range(3):
        assert iou(np.asarray(lanes.mask[i]), result.mask[i]) > 0.97


def test_inside_jit_equals_the_whole_image_solved_outside(detector, images):
    traced = jax.jit(refine)(detector, images[:1])
    coarse = jax.jit(look)(detector, to_unit(images[0]), Settings())
    solved = jax.jit(solve_window)(detector, coarse, Settings())
    assert iou(np.asarray(traced.mask[0]), np.asarray(solved.mask)) > 0.97
    assert traced.normal.shape == (1, SIZE, SIZE, 3)


def test_inside_jit_a_good_image_takes_no_step(detector, images):
    traced = jax.jit(refine)(detector, images[-1])
    assert traced.outcome == Outcome.NOTHING_TO_REFINE and traced.steps == 0 and traced.objective == 0
    assert not traced.mask.any()


def test_a_window_changes_little(detector, images):
    coarse = jax.jit(look)(detector, to_unit(images[2]), Settings())
    whole = jax.jit(solve_window)(detector, coarse, Settings())
    window = jax.jit(lambda d, c, s: solve_window(d, c, s, window=(80, 80)))(detector, coarse, Settings())
    assert iou(np.asarray(window.mask), np.asarray(whole.mask)) > 0.95


@pytest.mark.parametrize("kind", ["float", "uint16", "jax"])
def test_every_kind_of_array_gives_the_same(detector, images, result, kind):
    image = images[0]
    same = {
        "float": image.astype(np.float32) / 255,
        "uint16": image.astype(np.uint16) * 257,
        "jax": jnp.asarray(image),
    }[kind]
    np.testing.assert_array_equal(np.asarray(refine(detector, same).mask), result.mask[0])


def test_results_have_the_size_of_the_input(detector, images):
    large = np.asarray(jax.image.resize(images[0].astype(np.float32), (150, 130, 3), "linear")) / 255
    out = refine(detector, large.clip(0, 1))
    assert out.mask.shape == out.coarse_map.shape == out.region.shape == (150, 130)
    assert out.normal.shape == (150, 130, 3)
    np.testing.assert_array_equal(np.asarray(out.normal)[~np.asarray(out.mask)], large.clip(0, 1)[~np.asarray(out.mask)])
    assert out.mask.any()


def test_grey_images_work(detector, images):
    out = refine(detector, images[0].mean(axis=-1).astype(np.uint8))
    assert out.mask.shape == (SIZE, SIZE)


def test_one_trace_serves_many_images_and_settings(detector, images):
    traces = []

    def counting(image, region):
        traces.append(image.shape)
        return harmonic(image, region)

    @jax.jit
    def run(detector, image, settings):
        coarse = look(detector, image, settings)
        return solve_window(detector, coarse, settings, counting)

    for image, settings in zip(images, [Settings(), Settings(tau=0.2), Settings(sparsity=2.0), Settings()], strict=True):
        run(detector, to_unit(image), settings)
    assert len(traces) == 1


def test_a_blown_up_step_is_reported_and_the_last_finite_state_kept(detector, images):
    broken = Settings(learning_rate=float("nan"))
    out = refine(detector, images[0], settings=broken)
    assert out.outcome == Outcome.NON_FINITE
    assert np.isfinite(np.asarray(out.normal)).all()


def test_the_step_limit_is_reported(detector, images):
    out = refine(detector, images[0], settings=Settings(max_steps=10, tolerance=0.0))
    assert out.outcome == Outcome.STEP_LIMIT and out.steps == 10


def test_own_inpainter(detector, images):
    def flat(image, region):
        return jnp.where(region[..., None], 0.0, image)

    assert refine(detector, images[0], inpaint=flat).mask.any()


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4, 4, 4, 3), np.uint8),
        np.zeros((32, 32, 4), np.uint8),
        np.zeros((32, 32, 3), np.int64),
        np.full((32, 32, 3), 200.0),
        np.full((32, 32, 3), np.nan, np.float32),
        np.zeros((0, 32, 3), np.uint8),
        [np.zeros((32, 32, 3), np.uint8), np.zeros((48, 32, 3), np.uint8)],
    ],
)
def test_bad_arrays_are_refused(detector, bad):
    with pytest.raises(ImageError):
        refine(detector, bad)


def test_fitting_needs_two_images(texture, backbone):
    with pytest.raises(ImageError, match="at least two"):
        fit_patchcore(texture.train[:1], backbone, size=(SIZE, SIZE))
    with pytest.raises(ImageError, match="multiple"):
        fit_patchcore(texture.train, backbone, size=(100, 100))


def test_fitting_is_reproducible(texture, backbone, detector):
    again = fit_patchcore(texture.train, backbone, size=(SIZE, SIZE))
    for one, two in zip(jax.tree.leaves(detector), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)


def test_saved_and_loaded_detector_gives_the_same_map(tmp_path, detector, images):
    f2pad_jax.save_detector(tmp_path / "brick.model", detector)
    loaded = f2pad_jax.load_detector(tmp_path / "brick.model")
    x = to_unit(images[0])
    same = [np.asarray(look(d, x, Settings()).anomaly_map) for d in (detector, loaded)]
    np.testing.assert_array_equal(*same)
    assert isinstance(look(loaded, x, Settings()), Coarse)
