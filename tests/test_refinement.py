import dataclasses
import functools
import inspect
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from conftest import SIZE, MeanColour, bright_blocks, calibration

from f2pad_jax import Outcome, Settings, fit, refine, refine_many
from f2pad_jax.data import load_texture
from f2pad_jax.detectors import PatchCore
from f2pad_jax.detectors.base import Factors
from f2pad_jax.detectors.calibration import with_calibration
from f2pad_jax.errors import F2padError, ImageError, OptionError
from f2pad_jax.images import MEAN, STD, to_unit
from f2pad_jax.images._views import scaled_mask
from f2pad_jax.images.metrics import iou
from f2pad_jax.images.pixels import normalise, resized
from f2pad_jax.inpainting import exemplar
from f2pad_jax.inpainting._choice import choose
from f2pad_jax.method import Evidence, Mixture, Window, look, pose
from f2pad_jax.method import _tiling as tiling
from f2pad_jax.method._tiling import WINDOWS, crop_size, divided
from f2pad_jax.method.algorithm import Solved, compose, untouched
from f2pad_jax.solvers import Descent, Stopping


@pytest.fixture(scope="module")
def images(texture):
    """Three defective images and a good one."""
    return np.stack([*[test.image for test in texture.test], texture.train[0]])


@pytest.fixture(scope="module")
def result(detector, images):
    return jax.tree.map(np.asarray, refine(detector, images, windows=True))


def test_masks_are_sharper_than_the_coarse_ones(result, texture):
    coarse = [iou(result.coarse_mask[i], test.mask) for i, test in enumerate(texture.test)]
    refined = [iou(result.mask[i], test.mask) for i, test in enumerate(texture.test)]
    assert np.mean(refined) > 0.6  # at 96 pixels the coarse map, blurred over 8, is a poor guide
    assert np.mean(refined) > np.mean(coarse) + 0.15


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


def test_the_mask_is_where_the_probability_exceeds_one_half(result):
    """Outside the region it is the coarse map's: higher nearer to m0, and never above one half."""
    np.testing.assert_array_equal(result.probability > 0.5, result.mask)
    assert result.probability.min() >= 0 and result.probability.max() <= 1
    outside = ~result.region[0]
    order = np.argsort(result.coarse_map[0][outside])
    assert (np.diff(result.probability[0][outside][order]) >= -1e-6).all() and result.probability[0][outside].max() > 0.01


def test_a_good_image_has_an_empty_mask_and_says_so(result, images):
    assert result.outcome[-1] == Outcome.NOTHING_TO_REFINE
    assert "good" in Outcome(result.outcome[-1]).message
    assert not result.mask[-1].any() and result.steps[-1] == 0 and result.objective[-1] == 0
    np.testing.assert_array_equal(result.normal[-1], images[-1].astype(np.float32) / 255)


def test_an_image_alone_gets_what_it_gets_in_a_batch(detector, images, result):
    alone = jax.tree.map(np.asarray, refine(detector, images[1], windows=True))
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(result), strict=True):
        np.testing.assert_array_equal(one, many[1])


def test_side_by_side_gives_the_same_masks(detector, images, result):
    lanes = refine(detector, images[1:2], windows=True, lanes=2)
    np.testing.assert_array_equal(np.asarray(lanes.mask[0]), result.mask[1])


@pytest.fixture(scope="module")
def traces():
    """Shapes the inpainter was traced with."""
    return []


@pytest.fixture(scope="module")
def jitted(traces):
    """``refine`` inside a user's own ``jit``, where the whole image is solved for."""

    def run(detector, image, settings):
        default = choose("exemplar", detector.calibration.normals)

        def counting(image, region):
            traces.append(image.shape)
            return default(image, region)

        return refine(detector, image, settings=settings, inpaint=counting)

    return jax.jit(run)


def test_on_the_host_settings_are_no_new_program(detector, images):
    traced = []

    def counting(image, region):
        traced.append(image.shape)
        return exemplar(image, region)

    for settings in (Settings(max_steps=0, restore_steps=0), Settings(max_steps=10, restore_steps=10, alpha1=0.1)):
        refine(detector, images[0], settings=settings, inpaint=counting, windows=True)
    assert len(traced) == 1


def test_inside_jit_equals_outside_to_the_last_bit(jitted, detector, images):
    outside = refine(detector, images, settings=Settings())
    for i in range(len(images)):
        inside = jitted(detector, images[i], Settings())
        for one, other in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
            np.testing.assert_array_equal(one, other[i])


def test_the_context_that_a_window_leaves_out_changes_little(jitted, detector, images, result):
    for i in range(2):
        inside = jitted(detector, images[i], Settings())
        # nothing of the first image fits its region, and the fill borrowed for it is wrong: there masks differ more
        assert iou(np.asarray(inside.mask), result.mask[i]) > (0.75, 0.85)[i]
        np.testing.assert_array_equal(inside.coarse_mask, result.coarse_mask[i])
        np.testing.assert_array_equal(np.asarray(inside.normal)[~result.region[i]], result.normal[i][~result.region[i]])


def test_inside_jit_a_good_image_takes_no_step(jitted, detector, images):
    inside = jitted(detector, images[-1], Settings())
    assert inside.outcome == Outcome.NOTHING_TO_REFINE and inside.steps == 0 and inside.objective == 0
    assert not inside.mask.any()


def test_inside_jit_an_image_outside_0_to_1_has_no_mask(detector, images):
    unit = jax.jit(to_unit)(images[0].astype(np.float32))
    assert np.isnan(unit).all()
    coarse, settings = look(detector, unit, Settings()), Settings()
    out = eqx.filter_jit(compose)(detector, settings, unit, coarse, untouched(unit, coarse))
    assert np.isnan(out.score) and not out.mask.any() and out.outcome == Outcome.NON_FINITE


def test_a_derivative_is_refused_at_once(detector, images):
    def area(image):
        return refine(detector, image).anomaly.sum()

    image = images[0].astype(np.float32) / 255
    for function in (area, jax.jit(area)):
        with pytest.raises(OptionError, match="no derivative"):
            jax.grad(function)(image)


def test_a_detector_can_be_pickled(detector, images):
    again = pickle.loads(pickle.dumps(detector))
    jax.tree.map(np.testing.assert_array_equal, again, detector)
    image = normalise(to_unit(images[0]))
    np.testing.assert_array_equal(again.anomaly_map(image), detector.anomaly_map(image))


def test_arguments_of_wrong_types_are_refused(detector, images, shallow_backbone):
    """The checks of types that only tests make are taken off."""
    one, many = inspect.unwrap(refine), inspect.unwrap(refine_many)
    for call, message in (
        (lambda: one(images, detector), "first argument is a ndarray"),
        (lambda: one(detector, "part.png"), "part.png: this is a path"),
        (lambda: one(detector, images[0], settings={}), "settings is a dict"),
        (lambda: one(detector, images[0, :8, :8]), "smallest side allowed is 16"),
        (lambda: one(detector, images[..., 0]), "grey batch as"),
        (lambda: next(many(detector, images[0])), "takes several images"),
        (lambda: next(many(detector, "part.png")), "takes several images"),
        (lambda: inspect.unwrap(fit)("patchcore", images, shallow_backbone), "class of detectors"),
    ):
        with pytest.raises(F2padError, match=message):
            call()


@pytest.mark.parametrize(
    ("constant", "value"), [("sparsity", -2.0), ("false_alarms", 1.5), ("max_steps", -1), ("alpha1", float("nan"))]
)
def test_constants_out_of_range_are_refused(constant, value):
    with pytest.raises(OptionError, match=constant):
        Settings(**{constant: value})


def test_images_have_32_bits_where_jax_computes_with_64(detector, images):
    with jax.enable_x64(True):
        out = eqx.filter_eval_shape(refine, detector, images[0])
    assert out.normal.dtype == out.probability.dtype == jnp.float32


def test_a_blown_up_step_is_reported_and_the_last_finite_state_kept(jitted, detector, images):
    out = jitted(detector, images[0], Settings(solver=Descent(learning_rate=float("nan"))))
    assert out.outcome == Outcome.NON_FINITE
    assert np.isfinite(np.asarray(out.normal)).all()


def test_the_step_limit_is_reported(jitted, detector, images):
    out = jitted(detector, images[0], Settings(max_steps=10, solver=Descent(stopping=Stopping(tolerance=0.0))))
    assert out.outcome == Outcome.STEP_LIMIT and out.steps == 10


def test_one_trace_serves_many_images_and_settings(jitted, traces, detector, images):
    for image, settings in zip(
        images, [Settings(), Settings(decision=Mixture(steepness=3.0)), Settings(sparsity=2.0), Settings()], strict=True
    ):
        jitted(detector, image, settings)
    assert len(traces) == 1


def test_what_tuning_found_multiplies_the_weights(detector, images):
    """A problem posed for a tuned detector has the weights of another with the settings multiplied."""
    factors = Factors(jnp.float32(0.5), jnp.float32(3.0))
    tuned = with_calibration(detector, dataclasses.replace(detector.calibrated, factors=factors))

    def weights(detector, settings):
        return pose(detector, images[0], settings=settings, inpaint="harmonic").problem.weights

    plain, found = weights(detector, Settings(alpha1=0.005, sparsity=4.5)), weights(tuned, Settings())
    np.testing.assert_allclose([float(v) for v in found], [float(v) for v in plain], rtol=1e-5)
    quick = Settings(max_steps=0, restore_steps=0)
    assert [float(refine(d, images[0], settings=quick).sparsity) for d in (detector, tuned)] == pytest.approx([1.5, 4.5])


@pytest.mark.parametrize("kind", ["float", "uint16", "jax"])
def test_every_kind_of_array_gives_the_same(detector, images, result, kind):
    image = images[0]
    same = {
        "float": image.astype(np.float32) / 255,
        "uint16": image.astype(np.uint16) * 257,
        "jax": jnp.asarray(image),
    }[kind]
    np.testing.assert_array_equal(np.asarray(refine(detector, same, windows=True).mask), result.mask[0])


@pytest.fixture(scope="module")
def large(shallow_backbone):
    """A detector of images half as large as one with a defect."""
    texture = load_texture("grass", size=256, num_train=6, num_test=1)
    return fit(PatchCore, texture.train, shallow_backbone, size=(128, 128)), texture.test[0].image, texture.test[0].mask


def test_of_a_larger_image_only_the_pixels_around_the_region_are_worked_on(large):
    """What acts on pixels, and the network, find there what they would in the whole image."""
    detector, image, _ = large
    unit, settings = to_unit(image), jax.tree.map(jnp.asarray, Settings())
    coarse = look(detector, unit, settings)
    ((part, window), *_) = divided(np.asarray(coarse.region), settings.margin, detector.stride, WINDOWS)
    box = crop_size(part, window, (256, 256), settings.margin)
    assert box[0] < 2 * window[0]

    @functools.partial(jax.jit, static_argnums=1)
    def found(part, crop):
        w = Window.around(detector, unit, coarse, part, window, crop)
        problem, n0 = w.pose(detector, w.region, settings, exemplar)
        state = settings.solver.init(problem, n0)
        gradient = jax.grad(problem)(state.n)  # a step takes little but its sign, which of a small one rounding decides
        shared = state.memory.share(gradient)
        mask = settings.decision(settings.solver, Evidence(problem, n0, (n0 + problem.x) / 2, w.excess, w.threshold)) > 0.5
        empty = jnp.zeros((256, 256), bool)
        images = (w.crop.paste(problem.region[..., None] * v, jnp.zeros_like(unit)) for v in (gradient, shared, n0))
        return problem.weights.beta, w.crop.paste(mask, empty), *images

    few, all = (jax.tree.map(np.asarray, found(jnp.asarray(part), crop)) for crop in (box, None))
    for one, other, atol in zip(few, all, (0, 0, 1e-4, 1e-4, 1e-5), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=atol)
    assert few[1].any()


def test_masks_have_the_resolution_of_the_image(large):
    detector, image, truth = large
    out = jax.tree.map(np.asarray, refine(detector, image, settings=Settings(max_steps=60, restore_steps=0), windows=True))
    assert out.mask.shape == out.coarse_map.shape == out.region.shape == truth.shape
    assert iou(out.mask, truth) > max(0.85, iou(out.coarse_mask, truth) + 0.1)
    blocks = out.mask.reshape(128, 2, 128, 2).sum(axis=(1, 3))
    assert np.isin(blocks, [1, 3]).any()  # finer than the network's pixels
    unit = image.astype(np.float32) / 255
    np.testing.assert_array_equal(out.normal[~out.mask], unit[~out.mask])
    np.testing.assert_allclose(out.normal + out.anomaly, unit, atol=1e-6)


@pytest.fixture(scope="module")
def wide(texture, backbone):
    """A detector of images three times as wide as high, and one with a defect at either end."""

    def row(*images):
        return np.concatenate(images, axis=1)

    train = [row(*np.roll(texture.train, i, axis=0)[:3]) for i in range(6)]
    (first, _, last), good = texture.test, texture.train[0]
    masks = row(first.mask, np.zeros_like(first.mask), last.mask)
    return fit(PatchCore, train, backbone, size=(SIZE, 3 * SIZE)), row(first.image, good, last.image), masks


def test_separate_defects_are_solved_for_separately(wide, texture):
    detector, image, truth = wide
    settings = Settings(dilation=2, hysteresis=float("inf"), margin=4)
    both = refine(detector, image[None], settings=settings, windows=True)
    mask = np.asarray(both.mask[0])
    left, right = mask[:, :SIZE], mask[:, 2 * SIZE :]
    assert iou(left, truth[:, :SIZE]) > 0.5 and iou(right, truth[:, 2 * SIZE :]) > 0.5
    assert not mask[:, SIZE : 2 * SIZE].any()
    parts = divided(np.asarray(both.region[0]), settings.margin, detector.stride, WINDOWS)
    assert [window for _, window in parts] == [(96, 96), (96, 96)]
    restored = np.asarray(both.normal[0])
    assert all((restored != image / np.float32(255))[part].any() for part, _ in parts)


def test_a_network_that_sees_the_whole_image_is_shown_the_whole_image(detector, images, monkeypatch):
    windows, divided_by = [], tiling.divided

    def divide(*arguments):
        parts = divided_by(*arguments)
        windows.extend(window for _, window in parts)
        return parts

    monkeypatch.setattr(tiling, "divided", divide)
    quick = Settings(max_steps=0, restore_steps=0, hysteresis=jnp.inf, dilation=0, margin=0)
    for local, expected in ((True, {(64, 64)}), (False, {(SIZE, SIZE)})):
        monkeypatch.setattr(type(detector), "local", local)
        refine(detector, images[0], settings=quick, windows=True)
        assert set(windows) == expected
        windows.clear()


def test_a_region_that_covers_the_image_is_left_to_the_coarse_mask(detector, jitted, images):
    everywhere = Settings(hysteresis=-1.0)
    for out in (refine(detector, images[0], settings=everywhere), jitted(detector, images[0], everywhere)):
        assert out.outcome == Outcome.COVERS_IMAGE and out.steps == 0 and out.objective == 0
        assert "covers" in Outcome(int(out.outcome)).message
        np.testing.assert_array_equal(out.mask, out.coarse_mask)
        assert out.region.all() and out.mask.any()


def test_grey_images_work(detector, images):
    grey = images[0].mean(axis=-1).astype(np.uint8)
    out, expected = refine(detector, grey), refine(detector, np.repeat(grey[..., None], 3, axis=-1))
    assert out.mask.shape == (SIZE, SIZE) and out.mask.any()
    jax.tree.map(np.testing.assert_array_equal, out, expected)


def test_results_of_different_inpainters_stack(detector, images):
    quick = Settings(max_steps=0, restore_steps=0)
    results = [refine(detector, images[0], inpaint=name, settings=quick) for name in ("exemplar", "harmonic")]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    assert both.mask.shape == (2, SIZE, SIZE) and both.normal.shape == (2, SIZE, SIZE, 3)
    assert not np.array_equal(both.normal[0], both.normal[1])


def test_windows_inside_jit_are_refused(detector, images):
    with pytest.raises(OptionError, match="windows"):
        jax.jit(lambda image: refine(detector, image, windows=True))(images[0])


def test_the_detector_keeps_training_images_for_the_inpainter(detector, texture):
    normals = np.asarray(detector.calibration.normals)
    assert normals.dtype == np.uint8 and normals.shape == (len(texture.train), SIZE, SIZE, 3)
    assert {image.tobytes() for image in normals} == {image.tobytes() for image in texture.train}


def test_own_inpainter(detector, images):
    def flat(image, region):
        return jnp.where(region[..., None], 0.5, image)

    out = refine(detector, images[0], inpaint=flat, settings=Settings(max_steps=0, restore_steps=0))
    filled = np.asarray(out.normal)[np.asarray(out.mask)]
    np.testing.assert_allclose(filled, np.broadcast_to(0.5 * STD + MEAN, filled.shape), atol=1e-6)


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


def test_real_defects_are_found(shared, backbone):
    """An ink stain on a hazelnut, from a fit on six real photographs."""
    from f2pad_jax.images import read_image

    folder = shared / "data" / "hazelnut_toy"
    normal = [read_image(path) for path in sorted((folder / "train" / "good").glob("*"))[:6]]
    detector = fit(PatchCore, normal, backbone, size=(SIZE, SIZE))
    name = sorted((folder / "test" / "colour").glob("*"))[6]
    image = np.asarray(resized(to_unit(read_image(name)), (SIZE, SIZE)))  # of its own size it takes twice as long
    truth = read_image(folder / "ground_truth" / "colour" / f"{name.stem}_mask.png")[..., 0] > 127
    out = jax.tree.map(np.asarray, refine(detector, image, windows=True))
    assert iou(np.asarray(scaled_mask(jnp.asarray(out.mask), truth.shape)), truth) > 0.2
    np.testing.assert_array_equal(out.normal[~out.mask], image[~out.mask])


def test_a_detector_may_ask_for_more_sparsity():
    class Saturating(MeanColour):
        sparsity_scale = 4.0

    betas = []
    for kind in (MeanColour, Saturating):
        problem, _ = pose(kind(jnp.zeros(3), calibration(0.25)), bright_blocks()[0], inpaint="harmonic")
        betas.append(float(problem.weights.beta))
    assert betas[1] == pytest.approx(4 * betas[0]) and betas[0] > 0


# --- pixels that do not count


@pytest.mark.parametrize("windows", [False, True])
def test_ignored_pixels_are_never_marked_and_give_no_verdict(detector, texture, windows):
    image, truth = texture.test[1].image, texture.test[1].mask
    settings = Settings(max_steps=10, restore_steps=0)
    plain = refine(detector, image, settings=settings, windows=windows)
    assert plain.defective and plain.mask.any()
    wide = scipy.ndimage.binary_dilation(truth, iterations=24)
    without = refine(detector, image, settings=settings, windows=windows, ignore=wide)
    assert float(without.score) < float(plain.score)
    assert not (np.asarray(without.mask | without.coarse_mask | without.region) & wide).any()
    half = wide & (np.arange(image.shape[1]) < np.flatnonzero(truth.any(axis=0)).mean())
    part = refine(detector, image, settings=settings, windows=windows, ignore=half)
    assert part.mask.any() and not (np.asarray(part.mask) & half).any()
    np.testing.assert_array_equal(np.asarray(part.normal)[half], np.asarray(to_unit(image))[half])


def test_each_image_has_its_own_ignored_pixels(detector, texture):
    images = [texture.test[1].image, texture.test[1].image]
    masks = [None, np.ones(images[0].shape[:2], bool)]
    masks[1][:8, :8] = False
    first, second = refine_many(detector, images, ignore=masks, settings=Settings(max_steps=10, restore_steps=0))
    assert first.mask.any() and not second.mask.any()
    with pytest.raises(OptionError, match="as many masks"):
        list(refine_many(detector, images, ignore=masks[:1], settings=Settings(max_steps=10)))
    (none,) = refine_many(detector, images[:1], ignore=np.ones((8, 8), bool))
    assert not none.defective and np.isfinite(none.score) and none.outcome == Outcome.NOTHING_TO_REFINE


def test_a_mask_of_most_of_the_image_is_said(detector, texture):
    coarse = look(detector, to_unit(texture.test[1].image), Settings().traced())
    image = to_unit(texture.test[1].image)
    most = jnp.ones(image.shape[:2]).at[:30].set(0)
    solved = Solved(most, normalise(image), jnp.zeros((), int), jnp.zeros(()), jnp.asarray(int(Outcome.CONVERGED)))
    assert compose(detector, Settings(), image, coarse, solved).outcome == Outcome.COVERS_IMAGE
    few = dataclasses.replace(solved, probability=1 - most)
    assert compose(detector, Settings(), image, coarse, few).outcome == Outcome.CONVERGED
