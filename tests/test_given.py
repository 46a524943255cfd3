"""Coarse maps and masks from elsewhere: another detector, a box, points, a scribble."""

import dataclasses
import io
import json
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
from conftest import SIZE

from f2pad_jax import Outcome, fit, history, load_detector, refine, refine_batches, refine_many, save_detector
from f2pad_jax.commands import main
from f2pad_jax.detectors import PatchCore
from f2pad_jax.detectors.calibration import with_calibration
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images.files import read_map
from f2pad_jax.images.metrics import iou
from f2pad_jax.method import pose


@pytest.fixture(scope="module")
def featured(texture, shallow_backbone):
    """Detector with features only."""
    return fit(PatchCore, texture.train, shallow_backbone, size=SIZE, features_only=True)


def loose_box(truth, margin=8):
    """Returns the bounding box of a defect, wider by a margin."""
    box = np.zeros_like(truth)
    rows, columns = (np.flatnonzero(truth.any(axis=axis)) for axis in (1, 0))
    box[max(rows[0] - margin, 0) : rows[-1] + margin, max(columns[0] - margin, 0) : columns[-1] + margin] = True
    return box


def test_a_loose_box_becomes_a_mask_of_the_defect(featured, texture):
    boxes = [loose_box(test.mask) for test in texture.test]
    found = list(refine_many(featured, [test.image for test in texture.test], coarse_mask=boxes))
    before = np.mean([iou(box, test.mask) for box, test in zip(boxes, texture.test, strict=True)])
    after = np.mean([iou(r.mask, test.mask) for r, test in zip(found, texture.test, strict=True)])
    assert after > before + 0.3 and after > 0.5  # at 96 pixels, with six normal images
    for result, box in zip(found, boxes, strict=True):
        assert result.defective and np.isnan(result.p_value) and (result.coarse_mask == box).all()


def test_without_a_suspect_pixel_an_image_is_good(featured, texture):
    (result,) = refine_many(featured, [texture.train[0]], coarse_mask=[np.zeros((SIZE, SIZE), bool)])
    assert not result.defective and not result.mask.any() and result.outcome == Outcome.NOTHING_TO_REFINE
    (result,) = refine_many(featured, [texture.train[0]], coarse_map=[np.full((5, 7), 3.0)])
    assert not result.defective and not result.mask.any()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 255.0])
def test_a_map_of_any_size_and_scale_has_the_levels_of_its_image(featured, texture, scale):
    test = texture.test[0]
    heat = scipy.ndimage.gaussian_filter(test.mask.astype(np.float32), 3)[::2, ::2]
    (result,) = refine_many(featured, [test.image], coarse_map=[scale * heat - 7])
    assert result.defective and iou(result.coarse_mask, test.mask) > 0.6
    assert result.coarse_map.shape == test.mask.shape and abs(result.coarse_map.max() - 1) < 0.05


def test_maps_of_normal_images_give_the_verdict(texture, shallow_backbone, tmp_path):
    """... in the units of the other detector, and the model file keeps them."""
    rng = np.random.default_rng(0)
    maps = [100 + rng.normal(0, 1, (12, 12)) for _ in texture.train]
    detector = fit(PatchCore, texture.train, shallow_backbone, size=SIZE, coarse_maps=maps)
    save_detector(tmp_path / "model", detector)
    image, other = texture.test[0].image, 100 + rng.normal(0, 1, (12, 12))
    blob = scipy.ndimage.gaussian_filter(texture.test[0].mask.astype(np.float32), 4)
    found = 100 + 20 * blob[4::8, 4::8]
    good, bad = refine_many(load_detector(tmp_path / "model"), [image, image], coarse_map=[other, found])
    assert not good.defective and bad.defective and bad.p_value < 0.05
    assert bad.coarse_map.min() > 95 and bad.mask.any()


def test_levels_of_a_map_come_from_the_pixels_that_count(featured, texture):
    test = texture.test[0]
    heat, hot = test.mask.astype(np.float32), np.zeros_like(test.mask)
    hot[:8, :8] = True
    (result,) = refine_many(featured, [test.image], coarse_map=[heat + 9 * hot], ignore=hot)
    assert result.defective and iou(result.coarse_mask, test.mask) > 0.8
    (result,) = refine_many(featured, [test.image], coarse_map=[1.0 * (np.arange(96) > 20) * np.ones((96, 1))])
    assert result.defective and result.coarse_mask[:, 30:].all()  # more than half of the pixels have the maximum


def test_normal_maps_leave_out_ignored_pixels_and_are_finite(texture, shallow_backbone):
    rng, hot = np.random.default_rng(0), np.zeros((SIZE, SIZE), bool)
    hot[:8, :8] = True
    maps = [rng.random((SIZE, SIZE)) + 50 * rng.random() * hot for _ in texture.train]
    options = {"size": SIZE, "num_components": 1}
    detector = fit(PatchCore, texture.train, shallow_backbone, coarse_maps=maps, ignore=hot, **options)
    assert float(detector.calibrated.threshold) < 1
    for bad in (np.full((4, 4), np.nan), np.zeros((1, 4, 4))):
        with pytest.raises(ImageError, match="coarse map 1 has the shape"):
            fit(PatchCore, texture.train, shallow_backbone, coarse_maps=[maps[0], bad, *maps[2:]], **options)


def test_a_jit_program_takes_the_map_too(featured, texture):
    test = texture.test[0]
    box = loose_box(test.mask)
    found = jax.jit(lambda d, i, m: refine(d, i, coarse_mask=m))(featured, test.image[None], box[None])
    assert iou(np.asarray(found.mask[0]), test.mask) > iou(box, test.mask)


def test_the_history_of_a_box_ends_with_its_mask(featured, texture):
    test = texture.test[0]
    box = loose_box(test.mask)
    alone, past = (
        refine(featured, test.image, coarse_mask=box, windows=True),
        history(featured, test.image, coarse_mask=box),
    )
    assert iou(np.asarray(alone.mask), past.masks[-1]) > 0.99


def test_the_own_map_of_a_detector_given_back_to_it_changes_nothing(detector, texture):
    own = refine(detector, texture.test[0].image, windows=True)
    units = with_calibration(detector, dataclasses.replace(detector.calibrated, maps="given"))
    again = refine(units, texture.test[0].image, windows=True, coarse_map=own.coarse_map)
    np.testing.assert_array_equal(own.mask, again.mask)
    np.testing.assert_allclose(own.score, again.score, rtol=1e-4)


def test_errors_name_what_is_missing(featured, detector, texture, shallow_backbone):
    image, heat = texture.test[0].image, np.zeros((8, 8))
    with pytest.raises(OptionError, match="no maps of its own"):
        refine(featured, image)
    with pytest.raises(OptionError, match="no maps of its own"):
        list(refine_many(featured, [image]))
    with pytest.raises(OptionError, match="no maps of its own"):
        pose(featured, image)
    with pytest.raises(OptionError, match="not both"):
        refine(detector, image, coarse_map=heat, coarse_mask=heat > 0)
    with pytest.raises(ImageError, match="not finite"):
        refine(detector, image, coarse_map=heat + np.nan)
    with pytest.raises(ImageError, match="coarse maps of shape"):
        refine(detector, image, coarse_map=heat[None])
    with pytest.raises(ImageError, match="one image at a time"):
        list(refine_many(detector, [image], coarse_map=[heat[None]]))
    with pytest.raises(OptionError, match="not as many masks or maps"):
        list(refine_many(detector, [image, image], coarse_map=[heat]))
    with pytest.raises(OptionError, match="not as many masks or maps"):
        list(refine_many(detector, [image], coarse_map=[heat, heat]))
    with pytest.raises(OptionError, match="1 coarse maps for"):
        fit(PatchCore, texture.train, shallow_backbone, size=SIZE, coarse_maps=[heat])


@pytest.fixture(scope="module")
def folders(texture, tmp_path_factory):
    """Folders of normal images, of two test images, and of loose boxes."""
    root = tmp_path_factory.mktemp("given")
    pictures = {f"normal/{i}.png": image for i, image in enumerate(texture.train)}
    for i, test in enumerate(texture.test[:2]):
        pictures |= {f"test/{i}.png": test.image, f"masks/{i}.png": 255 * loose_box(test.mask).astype(np.uint8)}
    for name, picture in pictures.items():
        (root / name).parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(picture).save(root / name)
    return root


def test_boxes_on_the_command_line(folders, texture, capsys, monkeypatch):
    small = ["--size", str(SIZE), "--layers", "stage2", "stage3"]
    model, out = str(folders / "model"), folders / "out"
    assert main(["fit", str(folders / "normal"), "--out", model, "--features-only", *small]) == 0
    assert "no false-alarm rate" in capsys.readouterr().out
    refining = ["refine", model, str(folders / "test"), "--out", str(out)]
    assert main(refining) == 2 and "give --maps or --masks" in capsys.readouterr().err
    exporting = ["--export", "coco", "yolo", "--mm-per-pixel", "0.5", "--min-area", "30"]
    assert main([*refining, "--masks", str(folders / "masks"), *exporting]) == 0
    for i, test in enumerate(texture.test[:2]):
        mask = np.asarray(PIL.Image.open(out / f"{i}_mask.png")) > 0
        assert iou(mask, test.mask) > iou(loose_box(test.mask), test.mask)
    records = json.loads((out / "results.json").read_text())["images"]
    assert [r["verdict"] for r in records] == ["defective"] * 2
    regions = [region for record in records for region in record["regions"]]
    assert len(json.loads((out / "coco.json").read_text())["annotations"]) == len(regions) >= 2
    assert all(r["area"] >= 30 and r["area_mm2"] == r["area"] / 4 for r in regions)
    assert len((out / "regions.csv").read_text().splitlines()) == 1 + len(regions)
    assert sum(r["area"] for r in records[1]["regions"]) == records[1]["anomalous_pixels"] == mask.sum()
    names = [str(folders / "test" / f"{i}.png") for i in range(2)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(names)))
    capsys.readouterr()
    listed = ["refine", model, "-", "--out", str(folders / "listed"), "--masks", str(folders / "masks")]
    assert main([*listed, "--json", "--fail-on-defect"]) == 1
    assert [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()] == names
    maps = ["refine", model, str(folders / "test"), "--maps", str(folders / "masks")]
    assert main([*maps, "--out", str(folders / "maps")]) == 0  # a map of 0 and 255 has the levels of its image
    (folders / "masks" / "1.png").rename(folders / "masks" / "2.png")
    assert main([*maps, "--out", str(folders / "more")]) == 3 and "no file 1 with" in capsys.readouterr().err
    assert main([*maps, "--out", str(folders / "strict"), "--strict"]) == 2 and "no file 1 with" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tif", ".png"])
def test_a_map_is_read_with_all_its_digits(suffix, tmp_path):
    values, path = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000, tmp_path / f"map{suffix}"
    if suffix == ".npz":
        np.savez(path, values)
    elif suffix == ".npy":
        np.save(path, values.astype(np.float64) / 7)
    else:
        PIL.Image.fromarray(values.astype(np.float32) / 7 if suffix == ".tif" else values).save(path)
    np.testing.assert_allclose(read_map(path), values / (7 if suffix in (".npy", ".tif") else 1), rtol=1e-6)


@pytest.mark.parametrize("content", [b"", b"abc", "colour", "palette", "stack"])
def test_bad_maps_are_refused(content, tmp_path):
    path = tmp_path / ("map.npy" if content == "stack" else "map.png")
    if content == "stack":
        np.save(path, np.zeros((2, 5, 7)))
    elif content in ("colour", "palette"):
        picture = PIL.Image.fromarray(np.zeros((5, 7, 3), np.uint8))
        (picture.quantize(4) if content == "palette" else picture).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ImageError):
        read_map(path)


def test_a_map_larger_than_its_file_is_refused_before_it_takes_memory(tmp_path):
    for shape in ("(1099511627776, 4)", "(60000, 60000)", "(40, 50)"):
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)
        (tmp_path / "map.npy").write_bytes(content)
        with zipfile.ZipFile(tmp_path / "map.npz", "w") as archive:
            archive.writestr("map.npy", content)
        for name in ("map.npy", "map.npz"):
            with pytest.raises(ImageError, match=r"too large|truncated"):
                read_map(tmp_path / name)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_map_that_32_bits_do_not_hold_is_refused_by_name(value, tmp_path):
    np.save(tmp_path / "map.npy", np.full((5, 7), value))
    with pytest.raises(ImageError, match=r"map\.npy: holds values that are not finite"):
        read_map(tmp_path / "map.npy")


@dataclasses.dataclass
class Predicted:
    """Batch with the fields of anomalib's ``ImageBatch``."""

    image_path: list[str] | None
    anomaly_map: Any
    pred_label: Any
    pred_score: Any = None
    pred_mask: Any = None

    def update(self, in_place=True, **changes):
        assert not in_place
        return dataclasses.replace(self, **changes)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_batches_of_anomalib_come_back_with_masks(featured, texture, tmp_path, library):
    """... a batch at a time, of the library's own arrays; what the model calls good stays good."""
    array = np.asarray if library == "numpy" else pytest.importorskip("torch").tensor
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, test in zip(paths, texture.test, strict=True):
        PIL.Image.fromarray(test.image).save(path)
    heat = np.stack([scipy.ndimage.gaussian_filter(t.mask.astype(np.float32), 3)[::2, ::2] for t in texture.test])
    batches = [
        Predicted(paths[:2], array(heat[:2, None]), array([True, False]), array([0.9, 0.1])),
        Predicted(paths[2:], array(heat[2:, None]), array([True]), array([0.8])),
    ]
    taken = []
    refined = list(refine_batches(featured, (taken.append(batch) or batch for batch in batches)))
    assert taken == batches and [len(results) for _, results in refined] == [2, 1]
    for (batch, results), given in zip(refined, batches, strict=True):
        assert type(batch.pred_mask) is type(given.anomaly_map) and batch.pred_mask.shape == (len(results), 48, 48)
        assert batch.pred_score is given.pred_score and batch.pred_label is given.pred_label
        np.testing.assert_array_equal(np.asarray(batch.pred_mask), np.asarray(batch.anomaly_map) > 0.5)
    (first, good), (last,) = (results for _, results in refined)
    assert not good.defective and not good.mask.any() and not np.asarray(refined[0][0].pred_mask[1]).any()
    for result, test in ((first, texture.test[0]), (last, texture.test[2])):
        assert iou(result.mask, test.mask) > iou(result.coarse_mask, test.mask) and result.mask.shape == test.mask.shape
    with pytest.raises(OptionError, match="no image_path"):
        next(refine_batches(featured, [Predicted(None, heat, None)]))


def test_levels_of_normal_maps_give_batches_a_verdict(featured, texture, tmp_path):
    PIL.Image.fromarray(texture.test[0].image).save(tmp_path / "0.png")
    levels = dataclasses.replace(featured.calibrated, maps="given", ordinary=jnp.float32(0), threshold=jnp.float32(0.5))
    heat = texture.test[0].mask.astype(np.float32)[None]
    batch = Predicted([str(tmp_path / "0.png")], heat, np.array([False]), np.array([0.1]))
    ((found, (result,)),) = refine_batches(with_calibration(featured, levels), [batch])
    assert found.pred_label.tolist() == [True] and found.pred_score[0] == np.float32(result.score) and result.mask.any()
