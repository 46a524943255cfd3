"""Good images that a fitted detector learns, the model files before and after, and drift of the scores."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import SIZE, MeanColour, bright_blocks, smooth_image

from f2pad_jax import Settings, load_detector, save_detector, update
from f2pad_jax._storage import file_sha256
from f2pad_jax.commands import main
from f2pad_jax.commands._archive import Archive
from f2pad_jax.commands._settings_file import as_toml
from f2pad_jax.commands.drift import LEVEL, compared
from f2pad_jax.detectors import AbstractDetector, CFlow, NormalImages, PaDiM, calibrate
from f2pad_jax.detectors.calibration import EXTENT
from f2pad_jax.detectors.padim import REGULARISER, LowRank, embed
from f2pad_jax.detectors.patchcore import _spacing, nearest
from f2pad_jax.detectors.patchcore import embed as patchcore_embed
from f2pad_jax.detectors.updating import RARE
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.images.pixels import normalise, resized, to_unit

ANOMALY_MAP = jax.jit(lambda detector, image: detector.anomaly_map(image))


def score(detector, image):
    """The score of an image: it is defective above 1."""
    found = ANOMALY_MAP(detector, normalise(resized(to_unit(image), detector.size)))
    return float(detector.verdict(found, 0.05)[0])


def smudged(image, column):
    """The image with a soft shadow, which the fit has not seen on good images."""
    y, x = np.mgrid[:SIZE, :SIZE]
    shadow = np.exp(-((y - 48) ** 2 + (x - column) ** 2) / 200)
    return np.clip(np.asarray(image) * (1 - 0.33 * shadow[..., None]), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def alarms(texture):
    """Good images that the detector marks, and another of their kind."""
    return [smudged(np.asarray(texture.train[i])[:, ::-1], column) for i, column in enumerate((40, 50, 45))]


@pytest.fixture(scope="module")
def updated(detector, alarms):
    return update(detector, np.stack(alarms[:2]))


@pytest.fixture
def files(alarms, tmp_path):
    """The folder of the alarms."""
    for i, image in enumerate(alarms[:2]):
        PIL.Image.fromarray(image).save(tmp_path / f"{i}.png")
    return tmp_path


def test_false_alarms_are_good_after_the_update_and_defects_remain_defects(detector, updated, alarms, texture):
    assert min(score(detector, image) for image in alarms) > 1
    assert max(score(updated, image) for image in alarms) < 1  # the third was not added, but is of their kind
    defects = [test.image for test in texture.test]
    assert min(score(detector, image) for image in defects) > 1 and min(score(updated, image) for image in defects) > 1


def test_the_bank_grows_by_the_farthest_features(detector, alarms):
    images, before = NormalImages(alarms[:2], (SIZE, SIZE)), detector.memory_bank
    features = np.concatenate([np.asarray(patchcore_embed(detector.backbone, image)).reshape(-1, 64) for image in images])
    expected, most = [], len(before) / len(detector.calibration.normality.scores) * 2
    distance, radius = np.asarray(nearest(jnp.asarray(features), before, 1)[0]), float(_spacing(before))
    while distance.max() > radius and len(expected) < most:
        expected.append(features[np.argmax(distance)])
        distance = np.minimum(distance, np.sum((features - expected[-1]) ** 2, axis=1))
    bank = np.asarray(detector.extended(images).memory_bank)
    np.testing.assert_array_equal(bank[: len(before)], before)
    np.testing.assert_allclose(bank[len(before) :], expected, atol=1e-4)


def test_scores_are_those_of_the_detector_that_learnt_the_other_images(detector, updated, alarms):
    images, old = NormalImages(alarms[:2], (SIZE, SIZE)), detector.calibration.normality
    alone = [
        float(old.score(ANOMALY_MAP(detector.extended(images.subset([1 - i])), images[i]).astype(np.float16)))
        for i in (0, 1)
    ]
    before = [record.before for record in updated.calibration.added]
    assert sum(alone) < 0.7 * sum(before)  # two of one kind vouch for each other
    expected = np.sort(np.append(old.scores, alone))
    np.testing.assert_allclose(updated.calibration.normality.scores, expected, rtol=2e-3)
    naive = eqx.tree_at(lambda n: n.scores, old, jnp.sort(jnp.append(old.scores, jnp.asarray(before))))
    assert 0.9 * float(old.limit(0.05)) < float(updated.calibration.normality.limit(0.05)) < float(naive.limit(0.05))


@pytest.fixture(scope="module")
def plain():
    """A detector that learns nothing after its fit, its normal images and further images."""
    rng = np.random.default_rng(0)
    images = np.clip(0.45 + rng.normal(0, 0.05, (12, 24, 24, 3)) + rng.normal(0, 0.02, (12, 1, 1, 3)), 0, 1)
    return calibrate(MeanColour(jnp.mean(normalise(images), axis=(0, 1, 2))), NormalImages(images[:8], (24, 24))), images


def test_without_statistics_to_extend_the_calibration_alone_changes(plain):
    """Levels and scores are those of all maps together; as many exemplars are a sample of all images."""
    assert CFlow.extended is AbstractDetector.extended
    detector, images = plain
    new = update(detector, images[8:])
    old, c = detector.calibration, new.calibration
    maps = np.stack([np.asarray(ANOMALY_MAP(detector, normalise(image)), np.float16) for image in images]).astype(
        np.float32
    )
    ordinary, highest = maps.mean(), np.quantile(maps.max(axis=(1, 2)), 0.95)
    assert float(c.ordinary) == pytest.approx(ordinary, rel=1e-3)
    assert float(c.threshold) == pytest.approx(ordinary + EXTENT * (highest - ordinary), rel=1e-3)
    np.testing.assert_allclose(c.normality.medians, np.sort(np.median(maps, axis=(1, 2))), rtol=1e-3)
    further = [float(old.normality.score(jnp.asarray(m))) for m in maps[8:]]
    np.testing.assert_allclose(c.normality.scores, np.sort(np.append(old.normality.scores, further)), rtol=1e-3)
    assert [a.before for a in c.added] == [a.after for a in c.added] == pytest.approx(further, rel=1e-3)
    np.testing.assert_array_equal(c.normality.mean, old.normality.mean)
    np.testing.assert_array_equal(new.colour, detector.colour)
    stored = np.rint(255 * images).astype(np.uint8)
    numbers = [
        int(np.argmin(np.abs(stored.astype(int) - exemplar).sum(axis=(1, 2, 3)))) for exemplar in c.normals.astype(int)
    ]
    assert len({*numbers}) == 8 and max(numbers) >= 8


def test_an_image_like_a_defect_is_refused_unless_forced(plain):
    detector, images = plain
    normality = detector.calibration.normality
    bound = max(float(normality.limit(RARE)), float(np.median(normality.defects)))
    blocks = bright_blocks()
    with pytest.raises(
        ImageError, match=rf"above {bound:.2f}: image 1 \(\d+\.\d\d\), image 2 \(\d+\.\d\d\); nothing was added"
    ):
        update(detector, [images[8], *blocks[:2]])
    assert len(update(detector, [images[8], *blocks[:2]], force=True).calibration.added) == 3


def test_an_image_just_above_the_limit_is_accepted(plain):
    detector, images = plain
    normality = detector.calibration.normality
    highest = max(a.before for a in update(detector, images[8:]).calibration.added)
    lowered = dataclasses.replace(normality, scores=normality.scores + (0.98 * highest - normality.limit(0.05)))
    lowered = dataclasses.replace(detector, calibration=dataclasses.replace(detector.calibration, normality=lowered))
    marked = [image for image in images[8:] if score(lowered, image) > 1]
    assert len(marked) and len(update(lowered, marked).calibration.added) == len(marked)


@pytest.mark.parametrize("rank", [None, 8, 4])
def test_padim_has_the_statistics_of_all_images(shallow_backbone, rank):
    """Against covariances in float64 of all images; a low rank is exact with at least as many directions as images."""
    images = NormalImages([smooth_image(seed) for seed in range(9)], (64, 64))
    options = {"seed": 0, "num_channels": 12, "rank": rank}
    extended = PaDiM.fit(images.subset(range(6)), shallow_backbone, **options).extended(images.subset([6, 7, 8]))
    features = np.stack([np.asarray(EMBED(shallow_backbone, extended.channels, image), np.float64) for image in images])
    np.testing.assert_allclose(extended.mean, features.mean(axis=0), atol=1e-6)
    d = features - features.mean(axis=0)
    covariance = np.einsum("nhwc,nhwd->hwcd", d, d) / 8 + REGULARISER * np.eye(12)
    (probe,) = NormalImages([smooth_image(99)], (64, 64))
    probe = EMBED(shallow_backbone, extended.channels, probe) - extended.mean
    if rank is None:
        expected = np.einsum("hwc,hwcd,hwd->hw", probe, np.linalg.inv(covariance), probe)
    else:
        fields = LowRank.of(covariance.reshape(-1, 12, 12), rank)
        expected = LowRank(*(jnp.asarray(f).reshape(16, 16, *f.shape[1:]) for f in fields))(probe)
    found = np.asarray(extended.precision(probe))
    assert np.median(np.abs(found / expected - 1)) < (0.1 if rank == 4 else 1e-4)
    np.testing.assert_allclose(found, expected, rtol=1.0 if rank == 4 else 1e-3)
    assert extended.num_images == 9


EMBED = jax.jit(embed)


def test_padim_of_an_unknown_number_of_images_is_refused(shallow_backbone):
    images = NormalImages([smooth_image(0)], (64, 64))
    unknown = dataclasses.replace(PaDiM.fit(images, shallow_backbone, num_channels=4), num_images=None)
    with pytest.raises(OptionError, match="number of images of the fit is unknown"):
        unknown.extended(images)


def test_an_image_is_added_once(plain, tmp_path):
    detector, images = plain
    pixels = np.rint(255 * images[8:10]).astype(np.uint8)
    paths = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "copy.png"]
    for path, image in zip(paths, pixels[[0, 1, 1]], strict=True):
        PIL.Image.fromarray(image).save(path)
    first = update(detector, paths[:1])
    both = update(first, paths)
    assert update(both, paths[1:]) is both
    assert [(a.name, a.sha256) for a in both.calibration.added] == [(str(p), file_sha256(p)) for p in paths[:2]]
    assert len(both.calibration.normality.scores) == 10
    (array,) = update(detector, [pixels[0], pixels[0]]).calibration.added
    assert (array.name, array.sha256) == ("image 0", hashlib.sha256(pixels[0].tobytes()).hexdigest())


def test_arguments_that_make_no_sense_are_refused(plain):
    detector, images = plain
    for wrong in (images[0], "a.png"):
        with pytest.raises(ImageError, match="several images"):
            update(detector, wrong)
    without = dataclasses.replace(detector, calibration=dataclasses.replace(detector.calibration, normality=None))
    with pytest.raises(OptionError, match="no scores of its own"):
        update(without, images)


@pytest.fixture
def model(updated, alarms, detector, files):
    """The model of the detector, and the bytes of its file."""
    save_detector(files / "part.model", detector)
    return files / "part.model", (files / "part.model").read_bytes()


def test_an_update_is_listed_and_undone_bit_for_bit(model, files, updated, capsys):
    path, before = model
    assert main(["update", str(path)]) == 0
    assert "no update added an image" in capsys.readouterr().out
    assert main(["update", str(path), str(files / "0.png"), str(files / "1.png"), "--out", str(files / "new.model")]) == 0
    assert path.read_bytes() == before and not (files / "new.model.before").exists()
    out = capsys.readouterr().out
    assert "2 images added; 2 of them were defective before, 0 are now" in out
    assert f"{len(updated.memory_bank)} now" in out and "limit" in out
    written = load_detector(files / "new.model")
    for one, other in zip(jax.tree.leaves(written), jax.tree.leaves(updated), strict=True):
        np.testing.assert_array_equal(one, other)
    shutil.copy(files / "new.model", path)
    (files / "part.model.before").write_bytes(before)
    assert main(["update", str(path)]) == 0
    listed = capsys.readouterr().out
    for record, name in zip(written.calibration.added, ("0.png", "1.png"), strict=True):
        assert record.sha256 == file_sha256(files / name)
        assert all(text in listed for text in (name, record.sha256[:12], record.date, f"{record.before:.2f}"))
    assert main(["update", str(path), str(files / "1.png")]) == 0
    assert "1 of 1 images were added before" in capsys.readouterr().out
    assert main(["update", str(path), "--undo"]) == 0
    assert path.read_bytes() == before and not (files / "part.model.before").exists()
    for reason in ("no update made this model", "is not beside it"):
        assert main(["update", str(path), "--undo"]) == 2
        assert reason in capsys.readouterr().err
        shutil.copy(files / "new.model", path)


@pytest.mark.parametrize("step", range(3))
def test_a_write_that_fails_leaves_the_model(model, updated, monkeypatch, capsys, step):
    """Whichever of the renames ends the command: of the new model, of the copy of the old model, or into place."""
    path, before = model
    replace, calls = os.replace, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == step + 1:
            raise OSError(28, "No space left on device", str(arguments[1]))
        replace(*arguments)

    monkeypatch.setattr("f2pad_jax.commands.update.update", lambda *_, **__: updated)  # its own tests are above
    monkeypatch.setattr(os, "replace", failing)
    assert main(["update", str(path), str(path.parent / "0.png")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main(["update", str(path), str(path.parent / "0.png")]) == 0
    assert Path(f"{path}.before").read_bytes() == before and path.read_bytes() != before
    assert {p.name for p in path.parent.iterdir()} == {
        "0.png", "1.png", "part.model", "part.model.before", "part.model.svg"
    }  # fmt: skip


def drawn(rng, count, *, shift=0.0, defects=0.0):
    """Scores of normal images about 0.6, of which 5 % exceed 1."""
    scores = 0.6 + 0.25 * rng.standard_normal(count) + shift
    return np.maximum(np.where(rng.random(count) < defects, 3.0, scores), 0)


def test_drift_is_as_rare_as_stated_without_drift_and_defects_are_no_drift():
    rng = np.random.default_rng(0)
    for defects in (0.0, 0.2):
        found = sum(compared(drawn(rng, 160), drawn(rng, 200, defects=defects)).found for _ in range(400))
        assert found <= 400 * LEVEL + 3 * np.sqrt(400 * LEVEL)


def test_drift_is_found():
    rng = np.random.default_rng(0)
    normal = drawn(rng, 160)
    higher = [compared(normal, drawn(rng, 200, shift=0.15)) for _ in range(20)]
    assert sum(drift.found for drift in higher) >= 18 and min(drift.higher for drift in higher) > 0.55
    rising = [compared(normal, drawn(rng, 200, shift=0.0) + np.linspace(-0.3, 0.2, 200)) for _ in range(20)]
    assert sum(drift.found and drift.trend < drift.shift for drift in rising) >= 18
    assert compared(normal, np.full(50, 2.0)).found  # no image is good any more
    assert not compared(normal, np.append(np.full(20, 2.0), drawn(rng, 30))).found
    assert not compared(normal, drawn(rng, 200, shift=-0.2)).found


def archived(out, checksum, scores):
    """Writes the files of 'f2pad refine' with these scores."""
    with Archive(out, {"sha256": checksum}) as archive:
        archive.missing([(f"{i}.png", f"{i}") for i in range(len(scores))])
        for i, value in enumerate(scores):
            verdict = "defective" if value > 1 else "good"
            archive.add({"name": f"{i}", "score": round(float(value), 4), "p_value": 0.5, "verdict": verdict, "file": None})
    (out / "settings.toml").write_text(as_toml(Settings()))
    return out


def test_drift_is_reported(plain, tmp_path, capsys, monkeypatch):
    detector, _ = plain
    monkeypatch.setattr("f2pad_jax.commands.drift.load_detector", lambda *_, **__: detector)  # without a network
    model = tmp_path / "part.model"
    model.write_bytes(b"model")
    for name in ("same", "higher"):
        (tmp_path / name).mkdir()
    limits = np.asarray(detector.in_units(detector.calibration.normality.scores, 0.05))
    same = archived(tmp_path / "same", file_sha256(model), np.tile(limits, 6))
    higher = archived(tmp_path / "higher", file_sha256(model), np.linspace(0.9, 0.99, 40))
    command, page = ["drift", str(model), "--fail-on-drift"], tmp_path / "drift.html"
    assert main([*command, str(same)]) == 0
    assert "no drift: of the last 48 images, the good ones score like the 8 normal images" in capsys.readouterr().out
    assert main([*command, str(same), str(higher), "--last", "40", "--out", str(page)]) == 1
    assert capsys.readouterr().out.startswith("drift: of the last 40 images, the good ones score higher than")
    assert page.read_text().count("<svg") == 2
    assert main([*command, str(higher / "results.json")]) == 1
    with (higher / "results.jsonl").open("a") as journal:
        journal.write('{"name": "cut')
    assert main([*command, str(higher)]) == 1
    model.write_bytes(b"another")
    capsys.readouterr()
    for wrong, reason in ((higher, "results of another model"), (tmp_path / "x.json", "no results of 'f2pad refine'")):
        assert main([*command, str(wrong)]) == 2
        assert reason in capsys.readouterr().err
    assert json.loads((same / "results.json").read_text())["sha256"] != file_sha256(model)
