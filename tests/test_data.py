import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import scipy.stats
import skimage

from f2pad_jax.data import load_texture, open_categories, write_textures
from f2pad_jax.data.cutpaste import FAR, irregular_shape, paste_flat, paste_noise, paste_stain, paste_tint
from f2pad_jax.data.textures import NAMES
from f2pad_jax.errors import ImageError
from f2pad_jax.images import HIGHEST, LOWEST, STD, denormalise, list_images, normalise, read_image, to_unit, write_png
from f2pad_jax.images.files import SUFFIXES, check_images, state_of
from f2pad_jax.images.pixels import resized

H, W = 24, 32


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)


@pytest.fixture
def smooth():
    """What JPEG keeps to a few levels."""
    yy, xx = np.mgrid[:H, :W]
    return np.stack([40 + 6 * yy, 30 + 5 * xx, 200 - 3 * yy - 2 * xx], axis=-1).astype(np.uint8)


# --- synthetic defects


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (64, 200), (150, 70), (16, 16)])
def test_irregular_shape_is_one_piece_without_holes_of_about_the_area_asked_for(size):
    h, w = size
    shares = []
    for seed in range(40):
        shape = irregular_shape(np.random.default_rng(seed), size)
        assert shape.shape == size and shape.dtype == bool
        assert scipy.ndimage.label(shape)[1] == 1
        np.testing.assert_array_equal(shape, scipy.ndimage.binary_fill_holes(shape))
        shares.append(shape.mean())
    assert max(shares) <= 1.3 * 0.06
    assert np.mean(np.array(shares) >= 0.5 * 0.005) >= 0.95
    assert min(shares) >= 1 / (h * w)
    assert max(shares) > 3 * min(shares)


def test_irregular_shape_has_the_area_asked_for():
    shares = [irregular_shape(np.random.default_rng(seed), (128, 128), area=(0.1, 0.1)).mean() for seed in range(40)]
    assert np.median(shares) == pytest.approx(0.1, rel=0.1)
    assert min(shares) > 0.05 and max(shares) < 0.13


def test_irregular_shape_is_ragged():
    """A disc has the shortest outline; these have a far longer one."""
    longer = []
    for seed in range(20):
        shape = irregular_shape(np.random.default_rng(seed), (224, 224), area=(0.03, 0.06))
        outline = np.sum(shape[1:] != shape[:-1]) + np.sum(shape[:, 1:] != shape[:, :-1])
        longer.append(outline / (8 * np.sqrt(shape.sum() / np.pi)))
    assert np.median(longer) > 1.2


def test_irregular_shape_is_reproducible_by_its_seed():
    one, same, other = (irregular_shape(np.random.default_rng(seed), (96, 96)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_pasting_changes_the_masked_pixels_only_to_one_colour_far_from_all_of_them():
    rng = np.random.default_rng(0)
    normal = rng.uniform(0.2, 0.6, (64, 64, 3)).astype(np.float32)
    kept = normal.copy()
    for seed in range(20):
        mask = irregular_shape(np.random.default_rng(seed), (64, 64))
        image, found = paste_flat(np.random.default_rng(seed), normal, mask)
        np.testing.assert_array_equal(found, mask)
        np.testing.assert_array_equal(image[~mask], normal[~mask])
        assert len(np.unique(image[mask], axis=0)) == 1
        assert np.linalg.norm((image - normal)[mask] / STD, axis=-1).min() >= FAR
        assert image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1
    np.testing.assert_array_equal(normal, kept)


def test_pasting_takes_the_farthest_colour_when_none_is_far_enough():
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 8)] * 3), axis=-1).reshape(64, 8, 3)  # every colour there is
    image, _ = paste_flat(np.random.default_rng(4), grid, np.ones((64, 8), bool))
    colours = np.random.default_rng(4).uniform(0, 1, (100, 3)).astype(np.float32)
    distances = [np.linalg.norm((colour - grid) / STD, axis=-1).min() for colour in colours]
    assert max(distances) < FAR
    np.testing.assert_array_equal(image[0, 0], colours[np.argmax(distances)])


FAINT = pytest.mark.parametrize("paste", [paste_tint, paste_stain, paste_noise])
SOFT = 4
"""Pixels the soft edge of a stain or of noise reaches beyond the mask, and into it."""


def grown(mask, paste):
    """Where a defect may change pixels."""
    return mask if paste is paste_tint else scipy.ndimage.binary_dilation(mask, np.ones((2 * SOFT + 1, 2 * SOFT + 1)))


@FAINT
@pytest.mark.parametrize("levels", [(0.2, 0.6), (0.0, 1.0)], ids=["middling", "all levels"])
def test_fainter_defects_stay_in_their_mask_and_in_range(paste, levels):
    rng = np.random.default_rng(0)
    for seed in range(20):
        normal = rng.uniform(*levels, (48, 64, 3)).astype(np.float32)
        normal[20:24, 20:24], normal[24:28, 20:24] = levels
        mask = irregular_shape(np.random.default_rng(seed), (48, 64))
        kept, kept_mask = normal.copy(), mask.copy()
        image, found = paste(np.random.default_rng(seed), normal, mask)
        np.testing.assert_array_equal(found, kept_mask)
        np.testing.assert_array_equal(mask, kept_mask)
        np.testing.assert_array_equal(normal, kept)
        assert image.shape == normal.shape and image.dtype == np.float32
        outside = ~grown(mask, paste)
        np.testing.assert_array_equal(image[outside], normal[outside])
        assert image.min() >= 0 and image.max() <= 1
        assert np.mean(np.any(image != normal, axis=-1)[mask]) > 0.5  # black stays black


@FAINT
def test_fainter_defects_are_reproducible_by_their_seed(paste):
    normal = np.random.default_rng(0).uniform(0.2, 0.6, (48, 64, 3)).astype(np.float32)
    mask = irregular_shape(np.random.default_rng(1), (48, 64))
    one, same, other = (paste(np.random.default_rng(seed), normal, mask).image for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one[mask], other[mask])


def test_tints_are_one_far_colour_at_an_opacity_of_a_tenth_to_one_equally_often_in_every_octave():
    """What is left of the differences between pixels tells the opacity."""
    normal = np.random.default_rng(0).uniform(0.3, 0.5, (32, 32, 3)).astype(np.float32)
    mask = irregular_shape(np.random.default_rng(0), (32, 32), area=(0.2, 0.2))
    before = normal[mask].astype(np.float64)
    opacities, rng = [], np.random.default_rng(1)
    for _ in range(300):
        after = paste_tint(rng, normal, mask).image[mask].astype(np.float64)
        spread = before - before.mean(axis=0)
        opacities.append(1 - np.sum(spread * (after - after.mean(axis=0))) / np.sum(spread**2))
        colours = before + (after - before) / opacities[-1]
        np.testing.assert_allclose(colours, np.broadcast_to(colours.mean(axis=0), colours.shape), atol=1e-5)
        assert np.linalg.norm((colours - before) / STD, axis=-1).min() >= FAR - 1e-4
        assert colours.min() >= -1e-5 and colours.max() <= 1 + 1e-5
    assert 0.1 - 1e-5 <= min(opacities) < 0.12 and 0.9 < max(opacities) <= 1 + 1e-5
    assert scipy.stats.kstest(np.log(opacities) / np.log(10) + 1, "uniform").pvalue > 0.01


def test_stains_multiply_each_channel_by_a_factor_which_a_soft_edge_fades_in():
    normal = np.random.default_rng(0).uniform(0.2, 0.5, (48, 48, 3)).astype(np.float32)
    mask = np.zeros((48, 48), bool)
    mask[12:36, 14:40] = True
    deep = scipy.ndimage.binary_erosion(mask, np.ones((2 * SOFT + 1, 2 * SOFT + 1)))
    factors = []
    for seed in range(200):
        image, _ = paste_stain(np.random.default_rng(seed), normal, mask)
        change = image / normal
        factors.append(np.median(change[deep], axis=0))
        np.testing.assert_allclose(change[deep], np.broadcast_to(factors[-1], change[deep].shape), rtol=1e-5)
        share = (change - 1) / (factors[-1] - 1)  # of the change that is there already
        if np.abs(factors[-1] - 1).min() > 0.05:
            rows, columns = (scipy.ndimage.gaussian_filter1d(mask.any(axis).astype(float), 1.0) for axis in (1, 0))
            np.testing.assert_allclose(share, np.broadcast_to(np.outer(rows, columns)[..., None], share.shape), atol=1e-4)
    low, high = np.exp(-0.6), np.exp(0.6)
    assert low < np.min(factors) < 0.65 and 1.5 < np.max(factors) < high
    assert np.mean(np.array(factors) < 1) == pytest.approx(0.5, abs=0.07)


def test_noise_has_3_to_20_percent_of_the_range_and_is_smooth_over_half_a_pixel_to_four():
    normal, everywhere = np.full((64, 64, 3), 0.5, np.float32), np.ones((64, 64), bool)
    strengths, alike = [], []
    for seed in range(60):
        noise = paste_noise(np.random.default_rng(seed), normal, everywhere).image - 0.5
        strengths.append(np.sqrt(np.mean(noise**2)))
        alike.append(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1])
        assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.5, "each channel has its own"
    assert 0.03 - 1e-4 < min(strengths) < 0.05 and 0.17 < max(strengths) < 0.2 + 1e-4
    assert 0.1 < min(alike) < 0.6 and 0.95 < max(alike) < 0.99  # exp(-1 / 4σ²), where σ is not small


def place(photo, crop, compared):
    """Where in the photograph the crop comes from, by its pixels in ``compared``: every (row, column) that fits."""
    h, w = crop.shape[:2]
    fits = np.ones((photo.shape[0] - h + 1, photo.shape[1] - w + 1), bool)
    for y, x in np.random.default_rng(0).permutation(np.argwhere(compared))[:300]:
        fits &= photo[y : y + fits.shape[0], x : x + fits.shape[1], 0] == crop[y, x, 0]
    return np.argwhere(fits)


@pytest.mark.parametrize("name", NAMES)
def test_texture_crops_for_training_and_testing_come_from_different_halves(name):
    texture = load_texture(name, size=96, num_train=7, num_test=3)
    photo = read_image(f"{skimage.__path__[0]}/data/{name}.png")
    middle = photo.shape[1] // 2
    assert len(texture.train) == 7 and len(texture.test) == 3 and texture.name == name
    for crop in texture.train:
        assert crop.shape == (96, 96, 3) and crop.dtype == np.uint8
        ((y, x),) = place(photo, crop, np.ones((96, 96), bool))
        np.testing.assert_array_equal(crop, photo[y : y + 96, x : x + 96])
        assert x + 96 <= middle
    for image, mask in texture.test:
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        ((y, x),) = place(photo, image, ~mask)
        np.testing.assert_array_equal(image[~mask], photo[y : y + 96, x : x + 96][~mask])
        assert x >= middle
        assert mask.any() and np.all(np.any(image != photo[y : y + 96, x : x + 96], axis=-1)[mask])


def test_texture_is_reproducible_by_its_seed():
    one, same, other = (load_texture("grass", size=64, num_train=2, num_test=2, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.train + [t.image for t in one.test], same.train + [t.image for t in same.test])
    assert not np.array_equal(one.train, other.train)
    assert not np.array_equal(one.test[0].mask, other.test[0].mask)


# --- reading


def save(path, array, mode=None, **options):
    image = PIL.Image.fromarray(array) if mode is None else PIL.Image.fromarray(array).convert(mode)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
def test_rgb_is_read_exactly_from_lossless_files(tmp_path, rgb, suffix):
    found = read_image(save(tmp_path / f"x{suffix}", rgb))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, rgb)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_files_are_read_to_a_few_levels(tmp_path, smooth, suffix):
    found = read_image(save(tmp_path / f"x{suffix}", smooth, quality=95))
    np.testing.assert_allclose(found.astype(int), smooth, atol=12)


def test_a_path_may_be_a_string(tmp_path, rgb):
    np.testing.assert_array_equal(read_image(str(save(tmp_path / "x.png", rgb))), rgb)


def test_grey_is_repeated(tmp_path, rgb):
    found = read_image(save(tmp_path / "x.png", rgb[..., 0]))
    np.testing.assert_array_equal(found, np.repeat(rgb[..., :1], 3, axis=-1))


def test_grey_of_16_bits_is_scaled_to_8(tmp_path, rgb):
    deep = rgb[..., 0].astype(np.uint16) * 257
    deep[0, :2] = 0, 65535
    found = read_image(save(tmp_path / "x.png", deep))
    np.testing.assert_array_equal(found, np.repeat((deep >> 8)[..., None], 3, axis=-1))


def test_alpha_is_dropped(tmp_path, rgb):
    alpha = np.random.default_rng(1).integers(0, 256, (H, W, 1)).astype(np.uint8)
    np.testing.assert_array_equal(read_image(save(tmp_path / "x.png", np.concatenate([rgb, alpha], -1))), rgb)
    grey = np.concatenate([rgb[..., :1], alpha], -1)
    np.testing.assert_array_equal(read_image(save(tmp_path / "y.png", grey)), np.repeat(rgb[..., :1], 3, -1))


def palette_image(rgb):
    image = PIL.Image.fromarray(rgb).quantize(16)
    return image, np.asarray(image.convert("RGB"))


def test_palette_is_looked_up(tmp_path, rgb):
    image, expected = palette_image(rgb)
    image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), expected)


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 16))], ids=["one colour", "an alpha each"])
def test_transparency_of_a_palette_is_dropped_quietly(tmp_path, rgb, transparency):
    image, expected = palette_image(rgb)
    image.save(tmp_path / "x.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_image(tmp_path / "x.png")
    np.testing.assert_array_equal(found, expected)


def test_one_bit_becomes_black_and_white(tmp_path, rgb):
    mask = rgb[..., 0] > 128
    found = read_image(save(tmp_path / "x.png", mask))
    np.testing.assert_array_equal(found, np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1))


def test_cmyk_jpeg_becomes_rgb(tmp_path, smooth):
    found = read_image(save(tmp_path / "x.jpg", smooth, "CMYK", quality=95))
    np.testing.assert_allclose(found.astype(int), smooth, atol=15)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(tmp_path, smooth, orientation, turns):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    found = read_image(save(tmp_path / "x.jpg", smooth, exif=exif, quality=95))
    expected = np.rot90(smooth, turns)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(int), expected, atol=12)


def text(path, rgb):
    path.write_text("not an image\nat all\n")


def empty(path, rgb):
    path.write_bytes(b"")


def truncated_png(path, rgb):
    save(path, rgb, format="PNG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_jpeg(path, rgb):
    save(path, rgb, format="JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def header_only(path, rgb):
    save(path, rgb, format="PNG")
    path.write_bytes(path.read_bytes()[:20])


def damaged_png(path, rgb):
    save(path, rgb, format="PNG")
    data = bytearray(path.read_bytes())
    data[60:90] = bytes(30)
    path.write_bytes(data)


def one_pixel(path, rgb):
    save(path, rgb[:1, :1], format="PNG")


def narrow(path, rgb):
    save(path, rgb[:, :15], format="PNG")


def float_tiff(path, rgb):
    save(path, rgb[..., 0].astype(np.float32), format="TIFF")


def beyond_16_bits(path, rgb):
    save(path, rgb[..., 0].astype(np.int32) * 1000, format="TIFF")


def missing(path, rgb):
    pass


def folder(path, rgb):
    path.mkdir()


BAD = [
    text,
    empty,
    truncated_png,
    truncated_jpeg,
    header_only,
    damaged_png,
    one_pixel,
    narrow,
    float_tiff,
    beyond_16_bits,
    missing,
    folder,
]


@pytest.mark.parametrize("make", BAD, ids=lambda f: f.__name__)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path, rgb, make):
    path = tmp_path / "some image.png"
    make(path, rgb)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) > len(f"{path}: ") + 10


def test_messages_tell_the_cases_apart(tmp_path, rgb):
    messages = {}
    for make in (text, truncated_png, one_pixel, missing, folder):
        path = tmp_path / make.__name__
        make(path, rgb)
        with pytest.raises(ImageError) as caught:
            read_image(path)
        messages[make] = str(caught.value)
    assert "not an image" in messages[text]
    assert "truncated" in messages[truncated_png]
    assert "1x1" in messages[one_pixel] and "16" in messages[one_pixel]
    assert "no such file" in messages[missing]
    assert "folder" in messages[folder]


def test_damage_anywhere_in_a_file_is_either_read_or_refused(tmp_path, smooth):
    """Whatever bytes are broken, nothing but ImageError comes out."""
    rng = np.random.default_rng(0)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    files = [
        save(tmp_path / "x.png", smooth),
        save(tmp_path / "x.jpg", smooth, exif=exif),
        save(tmp_path / "x.tif", smooth),
        save(tmp_path / "x.bmp", smooth),
        save(tmp_path / "x.webp", smooth),
    ]
    refused = 0
    for path in files:
        data = path.read_bytes()
        for _ in range(60):
            broken = bytearray(data)
            for at in rng.integers(0, min(len(data), 400), 4):
                broken[at] = rng.integers(256)
            path.write_bytes(broken[: rng.integers(len(data) // 2, len(data) + 1)])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    assert read_image(path).ndim == 3
            except ImageError:
                refused += 1
    assert refused > 100


# --- folders


def test_images_are_listed_sorted_with_their_path_below_the_source(tmp_path):
    names = ["b.png", "a.JPG", "sub/c.jpeg", "sub/deeper/d.tiff", "notes.txt", ".hidden.png", "sub/._e.png", "noend"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = list_images([tmp_path])
    assert [str(relative) for _, relative in found] == ["a.JPG", "b.png", "sub/c.jpeg", "sub/deeper/d.tiff"]
    assert all(path == tmp_path / relative for path, relative in found)
    assert list_images([str(tmp_path)]) == found


def test_every_suffix_is_found(tmp_path):
    for i, suffix in enumerate(SUFFIXES):
        (tmp_path / f"{i}{suffix}").write_bytes(b"x")
    assert len(list_images([tmp_path])) == len(SUFFIXES)


def test_a_folder_named_like_an_image_is_not_an_image(tmp_path):
    (tmp_path / "batch.png").mkdir()
    (tmp_path / "batch.png" / "x.png").write_bytes(b"x")
    assert [str(relative) for _, relative in list_images([tmp_path])] == ["batch.png/x.png"]


def test_sources_keep_their_order_and_a_file_named_outright_is_taken_as_it_is(tmp_path):
    for name in ("z/1.png", "a/2.png", "odd.dat", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = list_images([tmp_path / name for name in ("z", "odd.dat", "a", ".hidden.png")])
    assert [str(relative) for _, relative in found] == ["1.png", "odd.dat", "2.png", ".hidden.png"]


@pytest.fixture
def bucket(tmp_path, rgb):
    """Two images, a hidden one, some text and a file that claims to be an image, in memory as in a bucket."""
    system = pytest.importorskip("fsspec").filesystem("memory")
    for name in ("b.png", "sub/a.png", ".hidden/c.png"):
        system.pipe(f"/bucket/parts/{name}", save(tmp_path / "x.png", rgb).read_bytes())
    system.pipe("/bucket/parts/notes.txt", b"x")
    system.pipe("/bucket/bad/text.png", b"x")
    yield system
    system.rm("/bucket", recursive=True)


def test_images_in_a_bucket_are_listed_and_read_by_their_addresses(bucket, rgb):
    found = list_images(["memory://bucket/parts", "memory://bucket/parts/b.png"])
    assert [str(relative) for _, relative in found] == ["b.png", "sub/a.png", "b.png"]
    assert found[0][0].startswith("memory://") and found[1][0].endswith("/bucket/parts/sub/a.png")
    for address, _ in found:
        np.testing.assert_array_equal(read_image(address), rgb)


def test_another_file_at_an_address_has_another_state(bucket, tmp_path, rgb):
    address = "memory://bucket/parts/b.png"
    before = state_of(address)
    assert state_of(address) == before
    bucket.pipe("/bucket/parts/b.png", save(tmp_path / "x.png", 255 - rgb).read_bytes())
    assert state_of(address) != before


def test_what_is_wrong_in_a_bucket_is_told_in_a_line(bucket, monkeypatch):
    for address, said in (
        ("memory://bucket/nothing", "no such file or folder"),
        ("memory://bucket/parts/notes", "no such file or folder"),
        ("nonsense://bucket/parts", "nonsense"),
    ):
        with pytest.raises(ImageError, match=said) as caught:
            list_images([address])
        assert str(caught.value).startswith(f"{address}: ")
    bucket.pipe("/bucket/empty/notes.txt", b"x")
    with pytest.raises(ImageError, match="no images in this folder"):
        list_images(["memory://bucket/empty"])
    with pytest.raises(ImageError, match=r"memory://bucket/bad/text.png: not an image"):
        read_image("memory://bucket/bad/text.png")
    with pytest.raises(ImageError, match="no such file"):
        read_image("memory://bucket/parts/none.png")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImageError, match=r"f2pad-jax\[bucket\]"):
        list_images(["s3://bucket/parts"])


def test_a_missing_source_and_a_folder_without_images_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ImageError, match="no images in this folder"):
        list_images([tmp_path])
    with pytest.raises(ImageError, match="gone: no such file or folder"):
        list_images([tmp_path / "gone"])


def test_checking_reports_the_first_bad_image_and_counts_the_rest(tmp_path, rgb):
    good = save(tmp_path / "good.png", rgb)
    bad = [tmp_path / f"{i}.png" for i in range(3)]
    for path in bad:
        path.write_bytes(b"x")
    assert check_images([good]) == ([good], [], None)
    usable, errors, _ = check_images([good, *bad])
    assert usable == [good] and [str(path) in str(error) for path, error in zip(bad, errors, strict=True)] == [True] * 3
    with pytest.raises(ImageError, match=r"0\.png.*2 more bad images"):
        check_images([good, *bad], strict=True)
    with pytest.raises(ImageError) as caught:
        check_images([good, bad[1]], strict=True)
    assert "more" not in str(caught.value)


# --- writing


def test_png_round_trips(tmp_path, rgb):
    path = tmp_path / "new" / "folder" / "x.png"
    write_png(path, rgb)
    np.testing.assert_array_equal(read_image(path), rgb)
    write_png(path, rgb[..., 0])
    np.testing.assert_array_equal(read_image(path)[..., 1], rgb[..., 0])
    write_png(path, rgb.astype(np.float32) / 255)
    np.testing.assert_array_equal(read_image(path), rgb)
    write_png(path, rgb[..., 0] > 100)
    np.testing.assert_array_equal(read_image(path)[..., 2], np.where(rgb[..., 0] > 100, 255, 0))
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_floats_beyond_the_range_are_clipped_when_written(tmp_path):
    write_png(tmp_path / "x.png", np.linspace(-1, 2, H * W).reshape(H, W))
    found = read_image(tmp_path / "x.png")
    assert found[0, 0, 0] == 0 and found[-1, -1, 0] == 255


# --- arrays


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "float64", "float16", "jax", "list", "PIL"])
def test_every_kind_of_image_is_brought_to_zero_to_one(rgb, kind):
    image = {
        "uint8": rgb,
        "uint16": rgb.astype(np.uint16) * 257,
        "float32": rgb.astype(np.float32) / 255,
        "float64": rgb / 255,
        "float16": (rgb / 255).astype(np.float16),
        "jax": jnp.asarray(rgb),
        "list": [rgb],
        "PIL": [PIL.Image.fromarray(rgb)],
    }[kind]
    found = to_unit(image)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.reshape(found, rgb.shape), rgb / 255, atol=1e-3 if kind == "float16" else 1e-6)


def test_masks_become_zero_and_one():
    np.testing.assert_array_equal(to_unit(np.eye(4, dtype=bool)), np.repeat(np.eye(4)[..., None], 3, -1))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((H, W), (H, W, 3)),
        ((H, W, 1), (H, W, 3)),
        ((H, W, 3), (H, W, 3)),
        ((2, H, W, 1), (2, H, W, 3)),
        ((2, H, W, 3), (2, H, W, 3)),
    ],
)
def test_shapes_become_rgb(shape, expected):
    grey = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    found = to_unit(grey)
    assert found.shape == expected
    if shape[-1] != 3:
        np.testing.assert_array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros(5, np.uint8), "shape"),
        (np.zeros((H, W, 4), np.uint8), "shape"),
        (np.zeros((3, H, W), np.uint8), "shape"),
        (np.zeros((2, 2, H, W, 3), np.uint8), "shape"),
        (np.zeros((0, W, 3), np.uint8), "shape"),
        (np.zeros((0, H, W, 3), np.uint8), "shape"),
        (np.zeros((H, W, 3), np.int32), "dtype"),
        (np.zeros((H, W, 3), complex), "dtype"),
        (np.full((H, W, 3), 255.0), "within 0..1"),
        (np.full((H, W, 3), -0.1), "within 0..1"),
        (np.full((H, W, 3), np.nan), "finite"),
        (np.full((H, W, 3), np.inf), "finite"),
        ([np.zeros((H, W), np.uint8), np.zeros((W, H), np.uint8)], "differ in size"),
        ([], "."),
    ],
)
def test_other_arrays_are_refused_in_one_line(image, said):
    with pytest.raises(ImageError, match=said) as caught:
        to_unit(image)
    assert "\n" not in str(caught.value)


def test_to_unit_traces(rgb):
    found = jax.jit(to_unit)(rgb / np.float32(255))
    np.testing.assert_allclose(found, rgb / 255, atol=1e-6)


def test_normalised_intensity_and_back(rgb):
    unit = to_unit(rgb)
    np.testing.assert_allclose(denormalise(normalise(unit)), unit, atol=1e-6)
    np.testing.assert_allclose(normalise(np.float32([[0, 0, 0], [1, 1, 1]])), [LOWEST, HIGHEST], rtol=1e-6)
    np.testing.assert_allclose(normalise(np.float32([0.485, 0.456, 0.406])), 0, atol=1e-6)


def test_resizing_keeps_an_image_of_the_right_size_and_the_range_of_others(rgb):
    unit = to_unit(rgb)
    assert resized(unit, (H, W)) is unit
    for size in ((H // 2, W // 2), (2 * H, 3 * W)):
        found = np.asarray(resized(unit, size))
        assert found.shape == (*size, 3) and found.min() >= 0 and found.max() <= 1
        np.testing.assert_allclose(found.mean((0, 1)), np.mean(unit, (0, 1)), atol=0.02)


def test_textures_are_a_data_set(tmp_path):
    root = write_textures(tmp_path / "textures", num_train=3, num_test=2)
    categories = open_categories(root)
    assert [category.name for category in categories] == ["brick", "grass", "gravel"]
    for category in categories:
        assert len(category.train) == 3
        for sample, test in zip(category.test, load_texture(category.name, num_train=3, num_test=2).test, strict=True):
            np.testing.assert_array_equal(read_image(sample.path), test.image)
            np.testing.assert_array_equal(sample.truth((224, 224)), test.mask)
