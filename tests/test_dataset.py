import json

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage

from f2pad_jax.data import dataset, load_texture, make_dataset, open_category, protocols, read_mask, rebuild_dataset
from f2pad_jax.data.cutpaste import FAR, blend, paste_flat
from f2pad_jax.data.dataset import read_manifest
from f2pad_jax.data.protocols import AREA, foreground, scratch
from f2pad_jax.errors import ImageError, OptionError, RunError
from f2pad_jax.images import STD, read_image, write_png

SIZE = (64, 64)


def disc_on_black(seed):
    """A textured disc, like a part on a dark table."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    disc = np.hypot(y - 31, x - 33) < 24
    image = 0.03 + 0.01 * rng.random((64, 64, 3))
    texture = scipy.ndimage.gaussian_filter(rng.standard_normal((64, 64, 3)), (1, 1, 0))
    image[disc] = np.clip(0.5 + 0.15 * texture[disc], 0, 1)
    return image.astype(np.float32), disc


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Grass, a texture, and a capsule, an object, with one ground truth of a ring."""
    folder = tmp_path_factory.mktemp("root")
    for k, crop in enumerate(load_texture("grass", size=64, num_train=11, num_test=1).train):
        write_png(folder / "grass" / "train" / "good" / f"{k:03}.png", crop)
        write_png(folder / "capsule" / "train" / "good" / f"{k:03}.png", disc_on_black(k)[0])
    write_png(folder / "capsule" / "test" / "good" / "000.png", disc_on_black(99)[0])
    y, x = np.mgrid[:90, :80]
    ring = np.abs(np.hypot(y - 40, x - 40) - 14) < 5
    write_png(folder / "grass" / "ground_truth" / "hole" / "000_mask.png", ring)
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def pairs(out, manifest, category):
    for entry in manifest["categories"][category]["images"]:
        image = read_image(out / category / "test" / f"{entry['name']}.png") / 255
        yield entry, image, read_mask(out / category / "ground_truth" / f"{entry['name']}_mask.png")


def test_cut_paste_pastes_far_colours_in_resized_shapes_on_held_out_images(root, tmp_path):
    path = make_dataset(root, tmp_path, count=8, size=SIZE)
    manifest = read_manifest(path)
    assert not manifest["categories"]["grass"]["object"] and manifest["categories"]["capsule"]["object"]
    for name in ("grass", "capsule"):
        category = open_category(tmp_path / name)
        assert len(category.train) == 9 and len(category.test) == 8
        held_out = {entry["base"] for entry in manifest["categories"][name]["images"]}
        assert not held_out & set(manifest["categories"][name]["train"])
        areas = []
        for entry, image, mask in pairs(tmp_path, manifest, name):
            areas.append(mask.mean())
            assert AREA[0] <= areas[-1] <= AREA[1] and entry["area"] == pytest.approx(areas[-1])
            base = read_image(root / entry["base"]) / 255
            np.testing.assert_allclose(image[~mask], base[~mask], atol=1.01 / 255)
            if entry["name"].startswith("colour"):
                assert len(np.unique(image[mask], axis=0)) == 1
                assert np.linalg.norm((image - base)[mask] / STD, axis=-1).min() > FAR - 0.05
                assert scipy.ndimage.label(~mask)[1] == 2 or name == "capsule"  # a ring has a hole
        assert np.ptp(areas) > 0.03
    assert any(entry["base"].endswith("test/good/000.png") for entry in manifest["categories"]["capsule"]["images"])
    for entry, _, mask in pairs(tmp_path, manifest, "capsule"):
        assert (mask & foreground(read_image(root / entry["base"]) / np.float32(255))).sum() == mask.sum()


def test_images_are_shrunk_in_integers_so_that_every_processor_makes_the_same(root, tmp_path):
    """Outside of a defect an image is Pillow's to the bit: no rounding of floats is left to a compiler."""
    size = (40, 48)
    manifest = read_manifest(make_dataset(root, tmp_path, categories=["grass"], count=3, size=size))
    for entry, image, mask in pairs(tmp_path, manifest, "grass"):
        with PIL.Image.open(root / entry["base"]) as base:
            small = np.asarray(base.resize((48, 40), PIL.Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(np.rint(255 * image[~mask]), small[~mask])


def test_every_second_of_the_capsules_defects_is_a_part_from_its_other_end(root, tmp_path):
    manifest = read_manifest(make_dataset(root, tmp_path, categories=["capsule"], count=4, size=SIZE))
    found = [(e, i, m) for e, i, m in pairs(tmp_path, manifest, "capsule") if e["name"].startswith("misplaced")]
    assert len(found) == 2
    for entry, image, mask in found:
        other = np.roll(read_image(root / entry["from"][-1]) / 255, 32, axis=1)
        np.testing.assert_allclose(image[mask], other[mask], atol=1.01 / 255)


def test_fewer_categories_change_none(root, tmp_path):
    make_dataset(root, tmp_path / "all", count=4, size=SIZE)
    make_dataset(root, tmp_path / "again", count=4, size=SIZE)
    assert files(tmp_path / "all") == files(tmp_path / "again")
    make_dataset(root, tmp_path / "one", categories=["grass"], count=4, size=SIZE)
    assert {k: v for k, v in files(tmp_path / "all").items() if k.startswith("grass")} == files(tmp_path / "one")
    make_dataset(root, tmp_path / "seed", count=4, size=SIZE, seed=1)
    assert files(tmp_path / "all") != files(tmp_path / "seed")


def test_data_sets_are_not_mixed(root, tmp_path, monkeypatch):
    make_dataset(root, tmp_path / "four", categories=["grass"], count=4, size=SIZE)
    expected = files(tmp_path / "four")

    def stop(path, image):
        if path.name.startswith("002"):
            raise KeyboardInterrupt
        write_png(path, image)

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(dataset, "write_png", stop)
        make_dataset(root, tmp_path / "killed", categories=["grass"], count=4, size=SIZE)
    (tmp_path / "own" / "grass").mkdir(parents=True)
    for folder, options in (("four", {"count": 2}), ("four", {"seed": 1}), ("killed", {"count": 2}), ("own", {"count": 4})):
        with pytest.raises(RunError, match="holds other images"):
            make_dataset(root, tmp_path / folder, categories=["grass"], size=SIZE, **{"count": 4, **options})
    assert files(tmp_path / "four") == expected
    for folder in ("four", "killed"):
        make_dataset(root, tmp_path / folder, categories=["grass"], count=4, size=SIZE)
        assert files(tmp_path / folder) == expected and not (tmp_path / folder / "manifest.partial").exists()


def test_a_manifest_rebuilds_its_data_set_or_says_why_it_cannot(root, tmp_path):
    path = make_dataset(root, tmp_path / "made", protocol="hard", count=5, size=SIZE)
    rebuild_dataset(path, root, tmp_path / "again")
    assert files(tmp_path / "made") == files(tmp_path / "again")
    manifest = json.loads(path.read_text())
    assert (tmp_path / "again" / "manifest.json").read_text() == path.read_text()
    source = next(iter(manifest["sources"]))
    altered = tmp_path / "altered.json"
    altered.write_text(json.dumps(manifest | {"sources": manifest["sources"] | {source: "0" * 64}}))
    with pytest.raises(ImageError, match="its checksum differs"):
        rebuild_dataset(altered, root, tmp_path / "other")
    altered.write_text(json.dumps(manifest | {"sources": {"grass/nothing.png": "0" * 64}}))
    with pytest.raises(ImageError, match=r"nothing\.png: missing"):
        rebuild_dataset(altered, root, tmp_path / "other")
    manifest["categories"]["grass"]["images"][2]["sha256"] = "0" * 64
    altered.write_text(json.dumps(manifest))
    with pytest.raises(ImageError, match="came out differently"):
        rebuild_dataset(altered, root, tmp_path / "other")
    altered.write_text("[]")
    with pytest.raises(ImageError, match="no manifest"):
        read_manifest(altered)


def test_hard_defects_are_seen_and_never_flat(root, tmp_path):
    manifest = read_manifest(make_dataset(root, tmp_path, protocol="hard", count=8, size=SIZE))
    kinds = {name: set() for name in ("grass", "capsule")}
    for name in kinds:
        for entry, image, mask in pairs(tmp_path, manifest, name):
            kinds[name].add(entry["name"].split("/")[0])
            base = read_image(root / entry["base"]) / 255
            difference = np.linalg.norm((image - base) / STD, axis=-1)
            assert np.mean(difference[mask] > 0.2) > 0.79
            far = scipy.ndimage.distance_transform_edt(~mask) > 6
            assert not difference[far].any()  # a soft edge, but no further
            assert len(np.unique(image[mask], axis=0)) > 1
    assert kinds == {"grass": {"texture", "tint", "scratch"}, "capsule": {"texture", "part", "tint", "scratch"}}


def test_scratches_are_two_or_three_pixels_wide():
    for seed in range(5):
        mask = scratch(np.random.default_rng(seed), None, (128, 128))
        assert mask.any() and scipy.ndimage.distance_transform_cdt(mask, "chessboard").max() <= 2
        assert scipy.ndimage.label(mask, np.ones((3, 3)))[1] == 1


def test_the_foreground_is_the_object_and_a_texture_has_none():
    image, disc = disc_on_black(0)
    found = foreground(image)
    assert (found & disc).sum() / (found | disc).sum() > 0.93
    assert foreground(load_texture("brick", size=64, num_train=2, num_test=1).train[0] / np.float32(255)) is None


def test_a_colour_that_cannot_be_far_from_all_is_corrected_pixel_by_pixel():
    """Every colour there is is covered at once: no single one is far from them all."""
    normal = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)
    made = paste_flat(np.random.default_rng(0), normal, np.ones((64, 64), bool))
    assert np.linalg.norm((made.image - normal) / STD, axis=-1).min() >= FAR
    assert 1 < len(np.unique(made.image.reshape(-1, 3), axis=0)) < 30  # one colour, lighter and darker


def test_blended_edges_are_anomalous_where_half_is_changed():
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    normal, changed = np.zeros((40, 40, 3), np.float32), np.ones((40, 40, 3), np.float32)
    made = blend(normal, changed, mask, 1.5)
    np.testing.assert_array_equal(made.mask, made.image[..., 0] >= 0.5)
    assert made.image[20, 20, 0] == pytest.approx(1, abs=1e-5) and 0.5 < made.image[20, 10, 0] < 0.8
    assert np.array_equal(made.mask[20], mask[20])


def test_what_cannot_be_made_is_refused(root, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="protocol 'easy' is unknown"):
        make_dataset(root, tmp_path, protocol="easy")
    with pytest.raises(OptionError, match="at least one image"):
        make_dataset(root, tmp_path, count=0)
    monkeypatch.setattr(protocols, "AREA", (0.9, 0.95))
    with pytest.raises(ImageError, match="no ground truth's shape fits"):
        make_dataset(root, tmp_path, categories=["capsule"], count=1, size=SIZE)


def test_an_altered_manifest_is_refused_before_an_image_is_made(root, tmp_path):
    """A count of a thousand million is refused at once, and so is a value of another type."""
    content = json.loads(make_dataset(root, tmp_path / "made", categories=["grass"], count=1, size=SIZE).read_text())
    path = tmp_path / "manifest.json"
    changes = [{"count": 10**9}, {"count": None}, {"size": [0, 0]}, {"size": [10**9, 64]}, {"size": 64}, {"seed": "1"}]
    changes += [{"protocol": []}, {"sources": []}, {"lenders": [3]}, {"categories": {"grass": 3}}]
    changes += [{"categories": {"grass": {"images": [{"name": 3}]}}}, {"sources": {"grass/train/good/000.png": 3}}]
    for change in changes:
        path.write_text(json.dumps(content | change))
        with pytest.raises(ImageError, match=r"manifest\.json: damaged or altered"):
            rebuild_dataset(path, root, tmp_path / "again")
    path.write_text("[" * 20000)
    with pytest.raises(ImageError, match=r"manifest\.json: no manifest"):
        rebuild_dataset(path, root, tmp_path / "again")
    assert not (tmp_path / "again").exists()
