"""Files with more than 8 bits, pages, palettes and links: every pixel has the value that the file means, or is refused."""

import os
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import tifffile

from f2pad_jax.data.mvtec import Sample, read_mask
from f2pad_jax.errors import ImageError
from f2pad_jax.images import list_images, read_image
from f2pad_jax.images.files import check_images, read_map

H, W = 20, 30


@pytest.fixture
def deep():
    """Colours of a camera with 12 bits; one pixel is white."""
    values = np.random.default_rng(0).integers(0, 4096, (H, W, 3)).astype(np.uint16)
    values[0, 0] = 4095
    return values


def in_8_bits(values, white):
    return np.rint(values * (255 / white)).astype(np.uint8)


def write_png16(path, values):
    """Writes a colour PNG with 16 bits, which Pillow can't write."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(png_of(header, zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))))


def png_of(header, rows):
    """A PNG file of a header and compressed rows."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def grey_png(path, values):
    PIL.Image.fromarray(values[..., 0]).save(path)


def alpha_png(path, values):
    write_png16(path, np.concatenate([values, values[..., :1]], axis=-1))


def tiff(**options):
    return lambda path, values: tifffile.imwrite(path, values, photometric="rgb", **options)


def planar(path, values):
    tifffile.imwrite(path, np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate")


FILES = {"grey.png": grey_png, "rgb.png": write_png16, "rgba.png": alpha_png, "rgb.tif": tiff(), "planar.tif": planar}
FILES["deflate.tif"] = tiff(compression="zlib", predictor=True)


@pytest.mark.parametrize("name", FILES)
def test_a_camera_with_12_bits_is_scaled_by_its_white(name, deep, tmp_path):
    path = tmp_path / name
    FILES[name](path, deep)
    usable, _, white = check_images([path])
    expected = in_8_bits(np.repeat(deep[..., :1], 3, -1) if name == "grey.png" else deep, 4095)
    assert usable == [path] and white == 4095
    np.testing.assert_array_equal(read_image(path, white=white), expected)
    assert read_image(path).max() == 16  # alone, without a white level: 16 bits


def test_the_white_level_is_that_of_the_whole_set(deep, tmp_path):
    grey_png(tmp_path / "dark.png", deep // 8)
    grey_png(tmp_path / "bright.png", deep)
    PIL.Image.new("L", (W, H)).save(tmp_path / "shallow.png")
    names = ["dark.png", "bright.png", "shallow.png"]
    assert check_images(tmp_path / name for name in names)[2] == 4095
    assert check_images([tmp_path / "shallow.png"])[2] is None
    with pytest.raises(ImageError, match=r"bright\.png: uint16 .* to 4095; white is 1023"):
        read_image(tmp_path / "bright.png", white=1023)


@pytest.mark.parametrize(
    ("dtype", "white", "full"),
    [("uint32", 255, 255), ("int16", 255, 255), ("int32", 60000, 65535), ("float32", 1, 1), ("float32", 250, 255)],
)
def test_other_numbers_have_the_least_white_that_holds_them(dtype, white, full, tmp_path):
    values = np.linspace(0, white, H * W).reshape(H, W).astype(dtype)
    tifffile.imwrite(tmp_path / "x.tif", values)
    assert check_images([tmp_path / "x.tif"])[2] == full
    expected = in_8_bits(np.repeat(values[..., None], 3, -1), full)
    np.testing.assert_allclose(
        read_image(tmp_path / "x.tif", white=full).astype(int), expected, atol=1 if white == 1 else 0
    )
    with pytest.raises(ImageError, match="white is unknown"):
        read_image(tmp_path / "x.tif")


def test_a_file_that_says_12_bits_or_that_0_is_white_is_believed(deep, tmp_path):
    grey = deep[..., 0]
    tifffile.imwrite(tmp_path / "stated.tif", grey // 4, extratags=[(281, "H", 1, 4095, True)])
    assert check_images([tmp_path / "stated.tif"])[2] == 4095
    tifffile.imwrite(tmp_path / "inverted.tif", 65535 - 16 * grey, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "inverted.tif")[..., 0], in_8_bits(16.0 * grey, 65535))


def test_pages_are_refused_and_copies_are_not(deep, tmp_path):
    small = (deep // 16).astype(np.uint8)
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([small, small]), photometric="rgb")
    PIL.Image.fromarray(small).save(tmp_path / "x.webp", save_all=True, append_images=[PIL.Image.new("RGB", (W, H))])
    for name in ("pages.tif", "x.webp"):
        with pytest.raises(ImageError, match="2 pages"):
            read_image(tmp_path / name)
    with tifffile.TiffWriter(tmp_path / "copies.tif") as file:
        file.write(small, photometric="rgb")
        file.write(small[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(read_image(tmp_path / "copies.tif"), small)


def test_negative_pixels_and_a_lost_strip_are_refused(deep, tmp_path):
    tifffile.imwrite(tmp_path / "negative.tif", -deep[..., 0].astype(np.int16))
    assert "int32 pixels of -4095 to" in str(check_images([tmp_path / "negative.tif"])[1][0])
    tifffile.imwrite(tmp_path / "cut.tif", deep, photometric="rgb", rowsperstrip=5)
    (tmp_path / "cut.tif").write_bytes((tmp_path / "cut.tif").read_bytes()[:-800])
    assert len(check_images([tmp_path / "cut.tif"])[1]) == 1


@pytest.mark.parametrize("kind", ["grey", "rgb", "planar", "tiled", "float", "16 bits"])
def test_a_tiff_with_fewer_rows_than_it_states_is_refused(kind, deep, tmp_path):
    values = (deep // 16).astype(np.uint8)
    options = {"rgb": {"photometric": "rgb"}, "tiled": {"photometric": "rgb", "tile": (16, 16)}}.get(kind, {})
    if kind == "planar":
        planar(tmp_path / "x.tif", values)
    else:
        one = {"float": np.float32(values[..., 0]), "16 bits": deep[..., 0]}.get(kind, values[..., 0])
        tifffile.imwrite(tmp_path / "x.tif", values if options else one, **options)
    assert check_images([tmp_path / "x.tif"])[0]
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as file:
        file.pages.first.tags[257].overwrite(3 * H)
    with pytest.raises(ImageError, match=r"x\.tif"):
        read_image(tmp_path / "x.tif", white=65535)


def test_linked_folders_are_listed_once_around_a_loop(tmp_path):
    (tmp_path / "parts" / "a").mkdir(parents=True)
    (tmp_path / "more").mkdir()
    for path in ("parts/a/1.png", "more/2.png"):
        PIL.Image.new("RGB", (W, H)).save(tmp_path / path)
    (tmp_path / "parts" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "parts" / "a" / "loop").symlink_to(tmp_path / "parts")
    assert [str(relative) for _, relative in list_images([tmp_path / "parts"])] == ["a/1.png", "more/2.png"]


def test_a_link_to_nothing_is_an_image_that_is_missing(tmp_path):
    PIL.Image.new("RGB", (W, H)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")
    usable, errors, _ = check_images(path for path, _ in list_images([tmp_path]))
    assert usable == [tmp_path / "a.png"] and [str(error) for error in errors] == [f"{tmp_path / 'b.png'}: no such file"]


@pytest.mark.parametrize("read", [read_image, read_mask, read_map])
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_a_pipe_or_a_device_is_refused_before_it_is_read(read, suffix, tmp_path):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(ImageError, match="a pipe or a device"):
            read(tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("read", [read_image, read_mask, read_map])
def test_an_altered_pixel_of_a_png_is_refused(read, tmp_path):
    """Pillow reads pixels without their checksum; some altered bits change a pixel and no more."""
    values = np.random.default_rng(0).integers(0, 6, (H, W)).astype(np.uint8) * 40
    path, silent = tmp_path / "x.png", 0
    PIL.Image.fromarray(values).save(path)
    content = path.read_bytes()
    for position in range(content.index(b"IDAT") + 6, len(content) - 12):
        altered = bytearray(content)
        altered[position] ^= 4
        path.write_bytes(altered)
        try:
            with PIL.Image.open(path) as picture:
                silent += not np.array_equal(np.asarray(picture), values)
        except (OSError, SyntaxError):
            pass
        with pytest.raises(ImageError, match=r"x\.png"):
            read(path)
    assert silent > 0


# --- masks


def drawn(mask, kind):
    """Returns a picture of a mask, as tools write it."""
    grey = mask.astype(np.uint8)
    if kind in ("1", "127", "255"):
        return PIL.Image.fromarray(grey * int(kind))
    if kind == "bilevel":
        return PIL.Image.fromarray(mask)
    if kind == "16 bits":
        return PIL.Image.fromarray(grey.astype(np.uint16) * 65535)
    if kind == "labels":
        return PIL.Image.fromarray(np.where(mask, 1 + np.arange(mask.shape[1]) % 3, 0).astype(np.uint8))
    if kind == "palette":
        picture = PIL.Image.fromarray(grey, "P")
        picture.putpalette([0, 0, 0, 64, 0, 0])
        return picture
    if kind == "alpha":
        return PIL.Image.merge("RGBA", [PIL.Image.new("L", mask.shape[::-1])] * 3 + [PIL.Image.fromarray(grey * 255)])
    if kind == "on its side":
        return PIL.Image.fromarray(np.rot90(grey) * 255)
    if kind == "cmyk":
        return PIL.Image.fromarray(grey * 255).convert("RGB").convert("CMYK")
    colour = {"red": (255, 0, 0), "blue": (0, 0, 255), "opaque": (255, 255, 255, 255)}[kind]
    picture = np.where(mask[..., None], colour, (0, 0, 0, 255)[: len(colour)])
    return PIL.Image.fromarray(picture.astype(np.uint8))


KINDS = ["1", "127", "255", "bilevel", "16 bits", "labels", "palette", "alpha", "red", "blue", "opaque"]
KINDS += ["on its side", "cmyk"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_read_as_it_was_meant(kind, tmp_path):
    mask = np.zeros((H, W), bool)
    mask[5:12, 3:20] = True
    path, options = tmp_path / ("mask.tif" if kind == "cmyk" else "mask.png"), {}
    if kind == "on its side":
        options["exif"] = PIL.Image.Exif()
        options["exif"][274] = 6
    drawn(mask, kind).save(path, **options)
    np.testing.assert_array_equal(read_mask(path), mask)
    half = read_mask(path, size=(H // 2, W // 2))
    assert half.shape == (H // 2, W // 2) and half.sum() == pytest.approx(mask.sum() / 4, rel=0.3)


def test_grey_rims_of_a_mask_end_at_half(tmp_path):
    values = np.tile(np.linspace(0, 255, W).astype(np.uint8), (H, 1))
    PIL.Image.fromarray(values).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), values > 127)


def test_a_mask_in_which_0_is_white_is_inverted(tmp_path):
    mask = np.arange(H * W).reshape(H, W) % 7 > 4
    tifffile.imwrite(tmp_path / "mask.tif", np.where(mask, 0, 65535).astype(np.uint16), photometric="miniswhite")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.tif"), mask)


def test_masks_and_maps_of_several_pages_of_no_numbers_or_far_too_large_are_refused(tmp_path):
    values = np.zeros((2, H, W), np.float32)
    tifffile.imwrite(tmp_path / "pages.tif", values, photometric="minisblack")
    values[0, 3, 3] = np.nan
    tifffile.imwrite(tmp_path / "nan.tif", values[0])
    side = 14_000
    rows = zlib.compress(bytes(side * (1 + side // 8)), 1)
    (tmp_path / "bomb.png").write_bytes(png_of(struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), rows))
    for name, said in {"pages.tif": "2 pages", "nan.tif": "not finite", "bomb.png": "too large"}.items():
        for read in (read_mask, read_map, read_image):
            with pytest.raises(ImageError, match=said):
                read(tmp_path / name)


def test_a_defect_without_an_anomalous_pixel_is_refused(tmp_path):
    PIL.Image.new("L", (W, H)).save(tmp_path / "mask.png")
    with pytest.raises(ImageError, match="no anomalous pixel"):
        Sample(tmp_path / "x.png", "crack", tmp_path / "mask.png").truth((H, W))


@pytest.mark.parametrize("read", [read_image, read_map])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(read, tmp_path):
    write_png16(tmp_path / "a.png", np.zeros((1, 1, 3), np.uint16))
    data = (tmp_path / "a.png").read_bytes()
    header = (
        b"IHDR" + struct.pack(">II", 20_000, 10_000) + data[24:29]
    )  # a bomb: few bytes, and a large picture in the header
    (tmp_path / "a.png").write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    with pytest.raises(ImageError, match="200000000 pixels"):
        read(tmp_path / "a.png")
