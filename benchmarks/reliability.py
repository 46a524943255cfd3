"""Bad files, each through the reader or the command that a user's file meets, and processes that are killed.

Files are made from good ones with a seed: cut short, with flipped bits, with another start, with hostile numbers, too
large when they are unpacked, or replaced by a folder, a pipe, a device or a loop of links. Each has one outcome:

- refused: one line says why, and nothing more is printed.
- read rightly: the result is that of the good file. Without a checksum in the format, no reader can know a changed value
  from a value that was written. The result may then also be what the file says: the pixels that Pillow or tifffile
  decodes from it, the bytes of a tensor that stand in it, the value of a constant that another parser finds in it.
  PNG, .npz, the archives of PyTorch and our models have checksums: only the result of the good file counts.
- traceback: an error that no user should see, or a refusal in several lines.
- hang: no end after SECONDS. The process of a decoder that can't be stopped is killed.
- memory: more than MEMORY bytes beyond what the process had, for files of a few megabytes at most.
- wrong: another result than those above, without a word.

``python benchmarks/reliability.py`` runs everything, ``--files`` and ``--processes`` a part of it. The tests run a
few of the files (tests/test_reliability.py). The processes are in ``interruptions.py``.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import tomllib
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import safetensors.numpy
import tifffile

SECONDS = 30
"""Time that a file may take."""
MEMORY = 3 * 2**30
"""Memory that a file may take."""
OUTCOMES = ("refused", "read rightly", "traceback", "hang", "memory", "wrong")
SIZE = (48, 64)
"""Height and width of the pictures."""


class Bad(NamedTuple):
    """An input, and what is known of it."""

    kind: str
    label: str
    path: Path
    good: str
    """Name of the good input that it was made from; "": the input must be refused, or be read as the file says."""


class Good(NamedTuple):
    """A good input."""

    content: bytes
    suffix: str
    checked: bool = False
    """Whether the format has a checksum over everything that counts."""


# --- Good files


def save(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, data: bytes, more: bytes = b"") -> bytes:
    """Returns a PNG file with any header."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def picture(seed: int) -> np.ndarray:
    """Returns a photograph's part, RGB with 8 bits."""
    from f2pad_jax.data import load_texture

    return load_texture("brick", size=64, num_train=1, num_test=0, seed=seed).train[0][: SIZE[0]]


def images() -> dict[str, Good]:
    rgb = picture(0)
    colour, grey = PIL.Image.fromarray(rgb), PIL.Image.fromarray(rgb[..., 0])
    deep = (rgb.astype(np.uint16) << 8) + np.roll(rgb, 1, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep))
    exif = PIL.Image.Exif()
    exif[274] = 6
    return {
        "grey": Good(save(grey, "PNG"), ".png", True),
        "rgb": Good(save(colour, "PNG"), ".png", True),
        "palette": Good(save(colour.quantize(64), "PNG"), ".png", True),
        "alpha": Good(save(colour.convert("RGBA"), "PNG"), ".png", True),
        "grey16": Good(save(PIL.Image.fromarray(deep[..., 0]), "PNG"), ".png", True),
        "rgb16": Good(png(SIZE[1], SIZE[0], 16, 2, rows), ".png", True),
        "jpeg": Good(save(colour, "JPEG"), ".jpg"),
        "rotated": Good(save(colour, "JPEG", exif=exif), ".jpg"),
        "progressive": Good(save(colour, "JPEG", progressive=True), ".jpeg"),
        "cmyk": Good(save(colour.convert("CMYK"), "JPEG"), ".jpg"),
        "bmp": Good(save(colour, "BMP"), ".bmp"),
        "webp": Good(save(colour, "WEBP"), ".webp"),
        "lossless": Good(save(colour, "WEBP", lossless=True), ".webp"),
        "tiff": Good(tiff(rgb, photometric="rgb"), ".tif"),
        "tiff-lzw": Good(save(colour, "TIFF", compression="tiff_lzw"), ".tif"),
        "tiff-tiled": Good(tiff(rgb, photometric="rgb", tile=(16, 16)), ".tif"),
        "tiff16": Good(tiff(deep[..., 0]), ".tif"),
        "tiff16-rgb": Good(tiff(deep, photometric="rgb", rowsperstrip=8), ".tiff"),
        "tiff16-planar": Good(tiff(np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate"), ".tif"),
        "tiff16-deflate": Good(tiff(deep, photometric="rgb", compression="zlib", predictor=True), ".tif"),
        "tiff-float": Good(tiff(deep[..., 0].astype(np.float32) / 65535), ".tif"),
    }


def drawn() -> np.ndarray:
    """Returns a mask."""
    mask = np.zeros(SIZE, bool)
    mask[5:20, 10:40] = True
    return mask


def masks() -> dict[str, Good]:
    mask = drawn()
    grey = PIL.Image.fromarray(mask.astype(np.uint8) * 255)
    alpha = PIL.Image.merge("RGBA", [PIL.Image.new("L", grey.size)] * 3 + [grey])
    exif = PIL.Image.Exif()
    exif[274] = 6  # drawn on its side
    return {
        "grey": Good(save(grey, "PNG"), ".png", True),
        "bilevel": Good(save(grey.convert("1"), "PNG"), ".png", True),
        "palette": Good(save(grey.convert("P"), "PNG"), ".png", True),
        "alpha": Good(save(alpha, "PNG"), ".png", True),
        "grey16": Good(save(PIL.Image.fromarray(mask.astype(np.uint16) * 65535), "PNG"), ".png", True),
        "rotated": Good(save(grey.transpose(PIL.Image.Transpose.ROTATE_90), "PNG", exif=exif), ".png", True),
        "bmp": Good(save(grey, "BMP"), ".bmp"),
        "webp": Good(save(grey.convert("RGB"), "WEBP", lossless=True), ".webp"),
        "tiff": Good(tiff(mask.astype(np.uint8) * 255), ".tif"),
        "tiff-float": Good(tiff(mask.astype(np.float32)), ".tif"),
        "tiff16-inverted": Good(tiff(65535 * (1 - mask.astype(np.uint16)), photometric="miniswhite"), ".tif"),
        "cmyk": Good(save(grey.convert("RGB").convert("CMYK"), "TIFF"), ".tif"),
    }


def heights() -> np.ndarray:
    """Returns a coarse map."""
    return np.add.outer(np.arange(SIZE[0]), 2 * np.arange(SIZE[1])).astype(np.float32)


def npy(values: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=pickled)
    return buffer.getvalue()


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def maps() -> dict[str, Good]:
    values = heights()
    return {
        "npy": Good(npy(values), ".npy"),
        "npy-f8": Good(npy(np.asfortranarray(values, np.float64)), ".npy"),
        "npz": Good(npz(map=npy(values)), ".npz", True),
        "tiff-float": Good(tiff(values), ".tif"),
        "tiff16": Good(tiff(values.astype(np.uint16)), ".tif"),
        "png16": Good(save(PIL.Image.fromarray(values.astype(np.uint16)), "PNG"), ".png", True),
    }


def state_dict(name: str, tensors: dict[str, np.ndarray], **others: Any) -> bytes:
    """Returns a PyTorch file, written by the helpers of the tests."""
    path = Path(__file__).parents[1] / "tests" / "test_torchfile.py"
    spec = importlib.util.spec_from_file_location("torchfile", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    layout = script.legacy_file if name == "legacy" else script.zip_file
    if not others:
        return script.state_dict_file(tensors, layout)
    root: dict[str, bytes] = {key: script.plain(value) for key, value in others.items()}
    entries = {
        key: script.tensor(script.storage(value.size, str(i)), value.shape, tuple(s // 4 for s in value.strides))
        for i, (key, value) in enumerate(tensors.items())
    }
    root["state_dict"] = script.ordered(**entries)
    return layout(script.ordered(**root), {str(i): value.ravel() for i, value in enumerate(tensors.values())})


def small_network() -> dict[str, np.ndarray]:
    """Returns the weights of the network up to its first layer, as they are kept."""
    from f2pad_jax.backbones._weight_files import cached_file
    from f2pad_jax.backbones.backbone import load_backbone

    load_backbone("efficientnet-lite0", layers=("stage1",))  # converts the installed weights
    return {
        name: value
        for name, value in safetensors.numpy.load_file(cached_file("efficientnet-lite0")).items()
        if re.match(r"stem|stages\.0|blocks\.0\.|stage1", name)
    }


def weights() -> dict[str, Good]:
    tensors = small_network()
    return {
        "safetensors": Good(safetensors.numpy.save(tensors), ".safetensors"),
        "zip": Good(state_dict("zip", tensors), ".pth", True),
        "legacy": Good(state_dict("legacy", tensors), ".pth"),
    }


def resnet18() -> dict[str, np.ndarray]:
    """Returns random weights of a ResNet18 through its first layer, and PaDiM's statistics of 64x64 pixels."""
    rng = np.random.default_rng(0)
    state: dict[str, np.ndarray] = {}
    convolutions = [("conv1", "bn1", 3, 7)] + [
        (f"layer1.{i}.conv{k}", f"layer1.{i}.bn{k}", 64, 3) for i in range(2) for k in (1, 2)
    ]
    for convolution, norm, channels, side in convolutions:
        shape = (64, channels, side, side)
        state[f"{convolution}.weight"] = rng.normal(size=shape) / np.sqrt(channels * side**2)
        state |= {f"{norm}.weight": np.ones(64), f"{norm}.bias": np.zeros(64)}
        state |= {f"{norm}.running_mean": np.zeros(64), f"{norm}.running_var": np.ones(64)}
    named = {f"model.feature_extractor.feature_extractor.{name}": value for name, value in state.items()}
    named["model.idx"] = np.arange(4)
    named["model.gaussian.mean"] = rng.uniform(size=(4, 256))
    named["model.gaussian.inv_covariance"] = np.tile(np.eye(4), (256, 1, 1))
    return {name: np.ascontiguousarray(value, np.float32) for name, value in named.items()}


STEPS = [
    {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [64, 64]}},
    {"class_path": "torchvision.transforms.v2.Normalize", "init_args": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}},
]
PARAMETERS = {"backbone": "resnet18", "layers": ["layer1"]}


def checkpoint(parameters: Any = PARAMETERS, steps: Any = STEPS, **changes: np.ndarray) -> bytes:
    """Returns a checkpoint of anomalib's PaDiM."""
    config = {"transform": {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": steps}}}
    others = {"hyper_parameters": parameters, "anomalib_pre_processor_config": config}
    return state_dict("zip", {**resnet18(), **changes}, **others)


# --- Damage that any file may have


def damaged(rng: np.random.Generator, content: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """Yields damaged copies of a file, of every kind of damage in turn."""
    size = len(content)

    def flipped(number: int, within: int) -> bytes:
        changed = bytearray(content)
        for position in rng.integers(0, within, number):
            changed[position] ^= 1 << int(rng.integers(8))
        return bytes(changed)

    def replaced(value: int) -> bytes:
        start = int(rng.integers(size))
        length = int(min(size - start, rng.integers(1, 65)))
        return content[:start] + bytes([value]) * length + content[start + length :]

    def without() -> bytes:
        start, end = sorted(rng.integers(0, size, 2))
        return content[:start] + content[end:]

    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: content[: int(rng.integers(size))],
        "one bit": lambda: flipped(1, size),
        "header bit": lambda: flipped(1, min(size, 64)),
        "end lost": lambda: content[: -int(rng.integers(1, 9))],
        "bits": lambda: flipped(20, size),
        "zeros": lambda: replaced(0),
        "header bits": lambda: flipped(4, min(size, 256)),
        "ones": lambda: replaced(255),
        "a part lost": without,
        "another start": lambda: rng.bytes(8) + content[8:],
        "twice": lambda: content + content,
        "half": lambda: content[: size // 2],
    }
    for k in range(count):
        way = list(ways)[(k + int(rng.integers(2))) % len(ways)]
        yield way, ways[way]()


def replacements(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Yields what may stand in the place of a file."""
    places = {key: folder / f"{key}-{name}" for key in ("folder", "pipe", "device", "loop", "nowhere", "empty", "text")}
    places["folder"].mkdir()
    os.mkfifo(places["pipe"])
    places["device"].symlink_to("/dev/zero")
    places["loop"].symlink_to(places["loop"])
    places["nowhere"].symlink_to(folder / "not there")
    places["empty"].touch()
    places["text"].write_text("this is text\n" * 20)
    yield from places.items()


NESTED = 20_000
"""Depth of nested lists that no parser follows."""


def retyped(rng: np.random.Generator, tree: Any, count: int) -> Iterator[tuple[str, Any]]:
    """Yields copies of a tree of JSON in which one value is lost, or has another type or a hostile number."""
    places: list[tuple] = []

    def visit(value: Any, place: tuple) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            places.append((*place, key))
            visit(item, (*place, key))

    visit(tree, ())
    others = (None, True, -1, 0, 10**18, 1e300, float("nan"), float("inf"), "", "../../x", "ä\n\0", [], {}, [[]], {"": None})
    for _ in range(count):
        place = places[int(rng.integers(len(places)))]
        copy = json.loads(json.dumps(tree))
        parent = copy
        for key in place[:-1]:
            parent = parent[key]
        other = int(rng.integers(len(others) + 1))
        if other == len(others):
            del parent[place[-1]]
        else:
            parent[place[-1]] = others[other]
        said = "lost" if other == len(others) else repr(others[other])
        yield f"{'.'.join(map(str, place))}: {said}", copy


# --- Hostile files


def hostile_images(rng: np.random.Generator, whole: bool) -> Iterator[tuple[str, bytes, str]]:
    """Yields label, content and suffix."""
    for width, height in ((2**31 - 1, 2**31 - 1), (0, 10), (100_000, 100_000), (2**31 - 1, 1)):
        yield f"png {width}x{height}", png(width, height, 8, 2, zlib.compress(bytes(100))), ".png"
    for depth, colour in ((3, 0), (16, 3), (8, 7), (32, 2)):
        yield f"png depth {depth} colour {colour}", png(64, 48, depth, colour, zlib.compress(bytes(99999))), ".png"
    side = 30_000
    yield "png bomb", png(side, side, 1, 0, zlib.compress(bytes(side * (side // 8 + 1)))), ".png"
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28)))
    yield "png text bomb", png(64, 48, 8, 0, zlib.compress(bytes(65 * 48)), text), ".png"
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28)))
    yield "png profile bomb", png(64, 48, 8, 0, zlib.compress(bytes(65 * 48)), profile), ".png"
    if whole:
        side = 13_000
        yield "png of 169 megapixels", png(side, side, 1, 0, zlib.compress(bytes(side * (side // 8 + 1)))), ".png"
    colour = PIL.Image.fromarray(picture(1))
    other = PIL.Image.fromarray(picture(2))
    yield "animation", save(colour, "PNG", save_all=True, append_images=[other]), ".png"
    yield "pages", tiff(np.stack([picture(1), picture(2)]), photometric="rgb"), ".tif"
    yield "gif pages", save(colour, "GIF", save_all=True, append_images=[other]), ".png"
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='64' height='48'/>", ".png"
    yield "not finite", tiff(np.full(SIZE, np.nan, np.float32)), ".tif"
    yield "infinite", tiff(np.where(drawn(), np.inf, 0.5).astype(np.float32)), ".tif"
    jpeg = save(colour, "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    for height, width in ((65535, 65535), (0, 0), (13_000, 13_000)):
        yield f"jpeg {width}x{height}", jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :], ".jpg"
    bmp = save(colour, "BMP")
    for field, at, values in (("width", 18, (2**31 - 1, -64, 0)), ("height", 22, (2**31 - 1, -48, 0)), ("bits", 28, (0, 5, 32))):
        for value in values:
            code = "<h" if field == "bits" else "<i"
            packed = struct.pack(code, value)
            yield f"bmp {field} {value}", bmp[:at] + packed + bmp[at + len(packed) :], ".bmp"
    yield from hostile_tiffs(rng, 60 if whole else 4)


def hostile_tiffs(rng: np.random.Generator, count: int) -> Iterator[tuple[str, bytes, str]]:
    """Yields TIFF files of which a field of a tag has a hostile number."""
    goods = {name: good for name, good in images().items() if name.startswith("tiff")}
    for _ in range(count):
        name = list(goods)[int(rng.integers(len(goods)))]
        content = bytearray(goods[name].content)
        (offset,) = struct.unpack_from("<I", content, 4)
        (entries,) = struct.unpack_from("<H", content, offset)
        tag = offset + 2 + 12 * int(rng.integers(entries + 1))
        if tag == offset + 2 + 12 * entries:  # the offset of the next page
            value = (offset, 8, 2**32 - 1)[int(rng.integers(3))]
            struct.pack_into("<I", content, tag, value)
            yield f"{name} next page {value}", bytes(content), ".tif"
            continue
        field = (2, 4, 8)[int(rng.integers(3))]
        value = (0, 1, 3, 255, 65535, 2**31 - 1, 2**32 - 1)[int(rng.integers(7))]
        struct.pack_into("<H" if field == 2 else "<I", content, tag + field, value & 0xFFFF if field == 2 else value)
        (number,) = struct.unpack_from("<H", content, tag)
        yield f"{name} tag {number} {('type', 'count', 'value')[field // 4]} {value}", bytes(content), ".tif"


class Code:
    """Object whose pickle writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def header(shape: str, descr: str = "<f4") -> bytes:
    """Returns an .npy file of any shape, with a few bytes of data."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)


def hostile_maps(trap: Path) -> Iterator[tuple[str, bytes, str]]:
    values = heights()
    objects = np.array([Code(trap)], object)
    yield "npy pickle", npy(objects, pickled=True), ".npy"
    yield "npz pickle", npz(map=npy(objects, pickled=True)), ".npz"
    for shape in ("(1099511627776, 4)", "(-1, 64)", "(2147483647, 2147483647)", "(48, 64, 3)", "()", "'48'", "(1e9,)", "(None,)"):
        yield f"npy shape {shape}", header(shape), ".npy"
        yield f"npz shape {shape}", npz(map=header(shape)), ".npz"
    yield "npy nested", header("(" * 4000 + "48" + ")" * 4000), ".npy"
    for kind in ("<c8", "<U4", "|V8", "<M8[s]", "|O", "xx"):
        yield f"npy of {kind}", header("(2, 2)", kind), ".npy"
    bomb = b"\x93NUMPY\x01\x00" + header("(30000, 30000)")[8:-64] + bytes(30_000 * 30_000 * 4 // 8)
    yield "npz bomb cut", npz(map=bomb), ".npz"
    for bad in (np.nan, np.inf):
        yield f"npy with {bad}", npy(np.where(drawn(), bad, values).astype(np.float32)), ".npy"
        yield f"tiff with {bad}", tiff(np.where(drawn(), bad, values).astype(np.float32)), ".tif"
    yield "npy beyond 32 bits", npy(np.where(drawn(), 1e300, 1.0)), ".npy"
    yield "npz of two", npz(a=npy(values), b=npy(values)), ".npz"
    yield "npz of none", npz(), ".npz"
    yield "npy empty", npy(np.zeros((0, 0), np.float32)), ".npy"
    yield "colours", save(PIL.Image.fromarray(picture(0)), "PNG"), ".png"
    yield "pages", tiff(np.stack([values, values + 1]), photometric="minisblack"), ".tif"
    yield "bomb", png(30_000, 30_000, 1, 0, zlib.compress(bytes(30_000 * 3751))), ".png"


def whole_bomb() -> bytes:
    """Returns an .npz file of 4 GB of zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive, archive.open("map.npy", "w", force_zip64=True) as file:
        file.write(header("(32000, 32000)")[:-64])
        for _ in range(1000):
            file.write(bytes(32 * 32000 * 4))
    return buffer.getvalue()


def hostile_masks() -> Iterator[tuple[str, bytes, str]]:
    mask = drawn()
    yield "bomb", png(30_000, 30_000, 1, 0, zlib.compress(bytes(30_000 * 3751))), ".png"
    yield "pages", tiff(np.stack([mask, ~mask]).astype(np.uint8) * 255, photometric="minisblack"), ".tif"
    yield "not finite", tiff(np.where(mask, np.nan, 0).astype(np.float32)), ".tif"
    yield "complex", tiff(mask.astype(np.complex64)), ".tif"
    yield "0 wide", png(0, 48, 8, 0, zlib.compress(b"")), ".png"


def hostile_weights(trap: Path) -> Iterator[tuple[str, bytes, str]]:
    tensors = small_network()
    name = next(iter(tensors))
    for bad in (np.nan, np.inf):
        changed = {**tensors, name: np.full_like(tensors[name], bad)}
        yield f"safetensors of {bad}", safetensors.numpy.save(changed), ".safetensors"
        yield f"zip of {bad}", state_dict("zip", changed), ".pth"
    good = safetensors.numpy.save({"a": np.ones(4, np.float32)})
    text = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    for label, change in {
        "offset": {"data_offsets": [0, 2**63]},
        "negative": {"data_offsets": [-16, 0]},
        "backwards": {"data_offsets": [16, 0]},
        "huge shape": {"shape": [2**31, 2**31]},
        "kind": {"dtype": "X"},
        "no shape": {"shape": None},
    }.items():
        changed = json.dumps({"a": {**text["a"], **change}}).encode()
        yield f"safetensors {label}", struct.pack("<Q", len(changed)) + changed + good[-16:], ".safetensors"
    overlapping = json.dumps({"a": text["a"], "b": text["a"]}).encode()
    yield "safetensors overlapping", struct.pack("<Q", len(overlapping)) + overlapping + good[-16:], ".safetensors"
    nested = b'{"__metadata__":' + b'{"a":' * NESTED + b"1" + b"}" * NESTED + b"}"
    yield "safetensors nested", struct.pack("<Q", len(nested)) + nested, ".safetensors"
    yield "safetensors long header", struct.pack("<Q", 2**62) + b"{}", ".safetensors"
    import pickle

    yield "pickle", pickle.dumps(Code(trap)), ".pth"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"w": Code(trap)}, 2))
    yield "zip of a pickle", buffer.getvalue(), ".pth"
    yield "zip bomb", zip_bomb("data.pkl"), ".pth"
    yield "zip bomb of zeros", zip_bomb("data/0"), ".pth"
    yield "one storage many times", many_views(), ".pth"


def zip_bomb(place: str) -> bytes:
    """Returns an archive of PyTorch of which one member has 4 GB when it is unpacked."""
    count = 4 * 2**30 // 4
    root = state_dict("zip", {"w": np.zeros(4, np.float32)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(root)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = content.replace(b"K\x04", b"J" + struct.pack("<i", count))
            with new.open(name, "w", force_zip64=True) as file:
                file.write(content)
                if name.endswith(place):
                    for _ in range(4 * 2**10 - (place == "data/0")):
                        file.write(bytes(2**20))
                    file.write(bytes(2**20 - 16 if place == "data/0" else 0))
    return buffer.getvalue()


def many_views() -> bytes:
    """Returns a file of a few megabytes with 2000 tensors, which all lie in one storage."""
    path = Path(__file__).parents[1] / "tests" / "test_torchfile.py"
    spec = importlib.util.spec_from_file_location("torchfile", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    count = 2**20
    entries = {f"w{i}": script.tensor(script.storage(count), (count,), (1,)) for i in range(2000)}
    return script.zip_file(script.ordered(**entries), {"0": np.zeros(count, np.float32)})


# --- Reading, and what is right


class Bench:
    """Good inputs on disk, and what is right for each."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model, self.trap = folder, model, folder / "trap"
        self.image = folder / "part.png"
        self.count = 0
        if not self.image.exists():
            values = picture(0).copy()
            values[10:20, 20:40] = (250, 20, 20)
            PIL.Image.fromarray(values).save(self.image)

    def place(self, name: str) -> Path:
        """Returns a new path."""
        self.count += 1
        folder = self.folder / "bad" / str(self.count)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def out(self, path: Path) -> Path:
        """Returns a new output folder for an input."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "out"

    # each method reads an input as the command does, and returns the result

    def read_images(self, path: Path) -> Any:
        from f2pad_jax.images.files import check_images, read_image

        white = check_images([path], strict=True)[2]
        return read_image(path, white=white)

    def read_masks(self, path: Path) -> Any:
        from f2pad_jax.data.mvtec import read_mask

        return read_mask(path)

    def read_maps(self, path: Path) -> Any:
        from f2pad_jax.images.files import read_map
        from f2pad_jax.method.coarse import Given

        Given.of(values := read_map(path), None)
        return values

    def read_weights(self, path: Path) -> Any:
        import jax

        from f2pad_jax.backbones.backbone import load_backbone

        return [np.asarray(leaf) for leaf in jax.tree.leaves(load_backbone("efficientnet-lite0", layers=("stage1",), weights=path))]

    def read_models(self, path: Path) -> Any:
        out = self.out(path)
        command("refine", path, self.image, "--out", out)
        return records(out)

    def read_checkpoints(self, path: Path) -> Any:
        out = self.out(path)
        folder = self.folder / "normal"
        if not folder.exists():
            folder.mkdir()
            for i in range(2):
                PIL.Image.fromarray(picture(i)[:, :48]).resize((64, 64)).save(folder / f"{i}.png")
        command("import", path, folder, "--out", out)
        return content_of(out)

    def read_settings(self, path: Path) -> Any:
        from f2pad_jax.commands._settings_file import as_toml, read_settings

        return as_toml(read_settings(path))

    def read_journals(self, path: Path) -> Any:
        command("refine", self.model, self.image, "--out", path.parent)
        return records(path.parent)

    def read_ignored(self, path: Path) -> Any:
        out = self.out(path)
        command("refine", self.model, self.image, "--out", out, "--ignore", path)
        return np.asarray(PIL.Image.open(out / "part_mask.png")) > 0

    def read_manifests(self, path: Path) -> Any:
        out = self.out(path)
        command("make-dataset", self.data(), "--out", out, "--manifest", path)
        return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.png"))}

    def read_folders(self, path: Path) -> Any:
        from f2pad_jax.data.mvtec import open_categories
        from f2pad_jax.images.files import check_images

        found = open_categories(path)
        check_images([file for category in found for file in category.train], strict=True)
        tests = [sample for category in found for sample in category.test]
        check_images([sample.path for sample in tests], strict=True)
        return [len(category.train) for category in found], [sample.truth(SIZE).tobytes() for sample in tests]

    def read_evaluations(self, path: Path) -> Any:
        out = path if path.is_dir() and (path / "runs").is_dir() else next(p for p in path.parents if (p / "runs").is_dir())
        command("evaluate", self.data(), "--out", out, "--protocol", "real", "--size", "64", "--images", "1")
        return [{k: v for k, v in r.items() if k != "seconds_per_image"} for r in json.loads((out / "results.json").read_text())]

    def read_names(self, path: Path) -> Any:
        out = self.out(path)
        command("refine", self.model, path, "--out", out)
        return [{key: value for key, value in record.items() if key not in NAMED} for record in records(out)]

    def data(self) -> Path:
        """Returns a small data set in MVTec layout."""
        root = self.folder / "data"
        if not root.exists():
            for k in range(4):
                write(root / "brick" / "train" / "good" / f"{k}.png", save(PIL.Image.fromarray(picture(k)), "PNG"))
            write(root / "brick" / "test" / "good" / "0.png", save(PIL.Image.fromarray(picture(5)), "PNG"))
            write(root / "brick" / "test" / "spot" / "0.png", self.image.read_bytes())
            truth = np.zeros(SIZE, np.uint8)
            truth[10:20, 20:40] = 255
            write(root / "brick" / "ground_truth" / "spot" / "0_mask.png", save(PIL.Image.fromarray(truth), "PNG"))
        return root


WHOLE = ("models", "manifests", "journals", "checkpoints")
"""Kinds of which the result may be that of the good file although a value has changed, since the value does not count."""
NAMED = ("image", "name", "mask", "normal", "overlay")
"""Values of a record that the name of an image changes."""


def content_of(model: Path) -> Any:
    """Returns the tensors and texts of a model file, which come in any order."""
    from f2pad_jax._storage import read_safetensors

    tensors, texts = read_safetensors(model)
    return sorted(texts.items()), [(name, tensors[name]) for name in sorted(tensors)]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Refused(Exception):
    """Refusal by a command."""


def command(*words: Any) -> None:
    """Runs a command in this process.

    Raises:
        Refused: its exit status is 2 or 3; the message is everything that it printed on standard error.
    """
    from f2pad_jax.commands import main

    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        status = main([str(word) for word in words])
    if status:
        raise Refused(error.getvalue().strip())


def records(out: Path) -> list[dict]:
    """Returns the records of a run."""
    return json.loads((out / "results.json").read_text())["images"]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.shape == other.shape and bool(np.array_equal(one, other))
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


def said(kind: str, path: Path, value: Any) -> bool:
    """Returns whether a result is what a file without a checksum says, by another decoder."""
    if kind == "images":
        return bool(np.abs(value.astype(int) - decoded_image(path)).max() <= 1)
    if kind == "masks":
        return equal(value, decoded_mask(path))
    if kind == "maps":
        return equal(value, decoded_map(path).astype(np.float32))
    if kind == "weights":
        from f2pad_jax._storage import read_safetensors
        from f2pad_jax.backbones._torchfile import read_torch_file

        content = path.read_bytes()
        tensors = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_torch_file(path)
        return all(tensor.tobytes() in content and np.isfinite(tensor).all() for tensor in tensors.values())
    if kind == "settings":
        text, found = tomllib.loads(path.read_text()), tomllib.loads(value)
        text.pop("preset", None)
        return contained(text, found)
    if kind == "journals":  # the line of an image stands in the journal as it is reported
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return all(record in [{k: v for k, v in line.items() if k != "file"} for line in lines] for record in value)
    if kind == "evaluations":
        return path.name == "curves.json" or "case" in path.name
    return False


def contained(part: Any, whole: Any) -> bool:
    """Returns whether every value of a tree stands in another."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contained(part[key], whole[key]) for key in part)
    return part == whole or (isinstance(part, list) and part == list(whole))


def decoded_image(path: Path) -> np.ndarray:
    """Returns the pixels of an image, decoded by Pillow, or by tifffile where Pillow keeps 8 bits only."""
    with PIL.Image.open(path) as opened:
        tags = dict(getattr(opened, "tag_v2", {}))
        if opened.format == "TIFF" and (max(np.atleast_1d(tags.get(258, 8))) > 8):
            values = tifffile.imread(path)
            values = np.moveaxis(values, 0, -1) if values.ndim == 3 and tags.get(284) == 2 else values
            if tags.get(262) == 0:
                values = np.iinfo(values.dtype).max - values if values.dtype.kind == "u" else 65535 - values
            white = next(w for w in (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0) if values.max() <= w)
            values = np.rint(values * (255 / white)).astype(int)
            return np.repeat(values[..., None], 3, -1) if values.ndim == 2 else values[..., :3]
        opened.load()
        return np.asarray(PIL.ImageOps.exif_transpose(opened).convert("RGB")).astype(int)


def decoded_mask(path: Path) -> np.ndarray:
    """Returns a mask by the documented rule: above half of full scale, or above 0 if no value is."""
    with PIL.Image.open(path) as opened:
        opened = PIL.ImageOps.exif_transpose(opened)
        opened = opened if opened.mode in ("1", "L", "F") or opened.mode[0] == "I" else opened.convert("RGB")
        values = np.asarray(opened)
    values = values.max(axis=2) if values.ndim == 3 else values
    half = {np.dtype(np.uint8): 127, np.dtype(np.uint16): 32767}.get(values.dtype, 0)
    return values > (half if values.max() > half else 0)


def decoded_map(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    return tifffile.imread(path) if path.suffix == ".tif" else np.asarray(PIL.Image.open(path))


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Ends the work after SECONDS, and lets it have MEMORY."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def outcome(bench: Bench, bad: Bad, goods: dict[str, Any], checked: bool) -> tuple[str, str]:
    """Reads an input; returns the outcome, one of OUTCOMES, and the message or the result."""
    from f2pad_jax.errors import F2padError, one_line

    bench.trap.unlink(missing_ok=True)
    try:
        with limits():
            value = getattr(bench, f"read_{bad.kind}")(bad.path)
    except TimeoutError as error:
        return "hang", str(error)
    except MemoryError as error:
        return "memory", repr(error)
    except (F2padError, Refused) as error:
        text = str(error) if isinstance(error, Refused) else one_line(error)  # as a command prints it
        if bench.trap.exists():
            return "wrong", f"code of the file was run: {text}"
        if f"no end after {SECONDS} s" in text:
            return "hang", text
        if re.search(r"[Uu]nable to allocate|MemoryError|annot allocate", text):
            return "memory", text
        return ("traceback" if len(text.splitlines()) != 1 or "Traceback" in text else "refused"), text
    except Exception:
        return "traceback", traceback.format_exc()
    if bench.trap.exists():
        return "wrong", "code of the file was run"
    if bad.good and equal(value, goods[bad.good]):
        return "read rightly", "equal"
    with contextlib.suppress(Exception):
        if not checked and said(bad.kind, bad.path, value):
            return "read rightly", "as the file says"
    return "wrong", repr(value)[:300]


# --- Lists of inputs


def inputs(bench: Bench, seed: int, each: int, *, whole: bool) -> Iterator[tuple[Bad, bool]]:
    """Writes every bad input; yields it, and whether its format has a checksum.

    Args:
        bench: good inputs.
        seed: seed of the damage.
        each: damaged copies of each good file.
        whole: whether large inputs are made too, which take seconds each.
    """
    rng = np.random.default_rng(seed)
    families: dict[str, tuple[dict[str, Good], Iterator[tuple[str, bytes, str]]]] = {
        "images": (images(), hostile_images(rng, whole)),
        "masks": (masks(), hostile_masks()),
        "maps": (maps(), hostile_maps(bench.trap)),
        "ignored": ({"grey": masks()["grey"]}, hostile_masks()),
        "weights": (weights(), hostile_weights(bench.trap) if whole else iter(())),
        "models": ({"model": Good(bench.model.read_bytes(), ".model", True)}, hostile_models(rng, bench.model, 40 if whole else 6)),
        "checkpoints": ({"padim": Good(checkpoint(), ".ckpt", True)}, hostile_checkpoints(bench.trap, whole)),
        "settings": (settings_files(), hostile_settings(rng, 40 if whole else 6)),
        "manifests": manifests(bench, rng, 40 if whole else 6),
        "journals": journals(bench, rng, 40 if whole else 6),
    }
    for kind, (goods, hostile) in families.items():
        file_name = "results.jsonl" if kind == "journals" else ""
        for name, good in goods.items():
            checked = good.checked
            yield Bad(kind, f"{name} good", write(bench.place(file_name or f"good{good.suffix}"), good.content), name), checked
            times = each * (1 if len(goods) > 1 else 12 if whole else 8)
            for label, content in damaged(rng, good.content, times):
                path = write(bench.place(file_name or f"bad{good.suffix}"), content)
                yield Bad(kind, f"{name} {label}", path, name), checked
        for label, content, suffix in hostile:
            good_name = next(iter(goods)) if kind in WHOLE else ""
            yield Bad(kind, label, write(bench.place(file_name or f"hostile{suffix}"), content), good_name), False
        suffix = next(iter(goods.values())).suffix
        folder = bench.place("x").parent
        for label, path in replacements(folder, f"x{suffix}"):
            if file_name:
                moved = bench.place(file_name)
                os.rename(path, moved)
                if label == "loop":
                    moved.unlink()
                    moved.symlink_to(moved)
                path = moved
            yield Bad(kind, label, path, ""), False
    yield from folders(bench)
    yield from names(bench)
    if whole:
        yield Bad("maps", "npz bomb", write(bench.place("bomb.npz"), whole_bomb()), ""), False
        yield from evaluations(bench, rng)


def hostile_models(rng: np.random.Generator, model: Path, count: int) -> Iterator[tuple[str, bytes, str]]:
    """Yields models with a valid checksum of which the header is hostile."""
    from f2pad_jax._storage import content_checksum, read_safetensors

    tensors, metadata = read_safetensors(model)

    def signed(header: str) -> bytes:
        texts = {**metadata, "header": header, "sha256": content_checksum(tensors, header=header)}
        return safetensors.numpy.save(tensors, texts)

    for label, tree in retyped(rng, json.loads(metadata["header"]), count):
        yield f"header {label}", signed(json.dumps(tree)), ".model"
    yield "header nested", signed('{"detector": ' + "[" * NESTED + "]" * NESTED + "}"), ".model"
    yield "header no JSON", signed("{"), ".model"
    yield "header a list", signed("[]"), ".model"
    yield "no header", safetensors.numpy.save(tensors, {"format": metadata["format"]}), ".model"


def hostile_checkpoints(trap: Path, whole: bool) -> Iterator[tuple[str, bytes, str]]:
    changes = [
        {"backbone": 3, "layers": ["layer1"]},
        {"backbone": "resnet18", "layers": "layer1"},
        {"backbone": "resnet18", "layers": [3]},
        {"backbone": "resnet18", "layers": [["layer1"]]},
        {"backbone": "../../x", "layers": ["layer1"]},
        {"backbone": "resnet18"},
        [],
        None,
    ]
    for parameters in changes if whole else changes[:3]:
        yield f"parameters {parameters}", checkpoint(parameters), ".ckpt"
    for size in ([2**31, 2**31], [0, 0], [-64, 64], ["64", "64"], [64.5, 64], [float("nan")] * 2, [65536, 65536], 64, None):
        steps = [{"class_path": "x.Resize", "init_args": {"size": size}}]
        yield f"size {size}", checkpoint(PARAMETERS, steps), ".ckpt"
        if not whole:
            break
    for steps in ([3], {}, "steps", [{}], [{"class_path": 3, "init_args": 3}]):
        yield f"steps {steps}", checkpoint(PARAMETERS, steps), ".ckpt"
        if not whole:
            break
    mean = resnet18()["model.gaussian.mean"]
    wrong = {"mean of nan": mean * np.nan, "mean of a number": mean[0, :1], "mean too short": mean[:, :3].copy()}
    for label, value in wrong.items() if whole else ():
        yield label, checkpoint(**{"model.gaussian.mean": value}), ".ckpt"
    for label, index in {"index beyond": np.full(4, 1e9, np.float32), "index negative": -np.ones(4, np.float32)}.items() if whole else ():
        yield label, checkpoint(**{"model.idx": index}), ".ckpt"


def settings_files() -> dict[str, Good]:
    from f2pad_jax import Settings
    from f2pad_jax.commands._settings_file import as_toml

    return {
        "default": Good(as_toml(Settings()).encode(), ".toml"),
        "paper": Good(as_toml(Settings.paper()).encode(), ".toml"),
    }


def hostile_settings(rng: np.random.Generator, count: int) -> Iterator[tuple[str, bytes, str]]:
    others = ("true", "-1", "0", "1e400", "nan", "inf", "-inf", '"x"', "[]", "{}", "[1, 2, 3]", "1979-05-27", "9" * 400, "'none'", "1e-320")
    lines = settings_files()["default"].content.decode().splitlines()
    places = [k for k, line in enumerate(lines) if " = " in line]
    for _ in range(count):
        k, other = places[int(rng.integers(len(places)))], others[int(rng.integers(len(others)))]
        changed = [*lines]
        changed[k] = f"{lines[k].split(' = ')[0]} = {other}"
        yield changed[k][:60], "\n".join(changed).encode(), ".toml"
    yield "nested", b"alpha1 = " + b"[" * NESTED + b"]" * NESTED, ".toml"
    yield "nested tables", ("[" + ".".join("a" * NESTED) + "]\nx = 1").encode(), ".toml"
    yield "twice", b"alpha1 = 1\nalpha1 = 2", ".toml"
    yield "byte order mark", b"\xef\xbb\xbfalpha1 = 0.1", ".toml"
    yield "UTF-16", "alpha1 = 0.1".encode("utf-16"), ".toml"
    yield "a newline in a name", b'"a\\nb" = 1', ".toml"


def manifests(bench: Bench, rng: np.random.Generator, count: int) -> tuple[dict[str, Good], Iterator[tuple[str, bytes, str]]]:
    out = bench.folder / "made"
    if not out.exists():
        command("make-dataset", bench.data(), "--out", out, "--count", 2, "--size", 32)
    content = (out / "manifest.json").read_bytes()

    def hostile() -> Iterator[tuple[str, bytes, str]]:
        for label, tree in retyped(rng, json.loads(content), count):
            yield label, json.dumps(tree).encode(), ".json"
        yield "nested", b"[" * NESTED + b"]" * NESTED, ".json"
        for key, value in (("count", 10**9), ("size", [10**6, 10**6]), ("size", [0, 0]), ("seed", -1), ("count", 0)):
            yield f"{key} {value}", json.dumps({**json.loads(content), key: value}).encode(), ".json"

    return {"manifest": Good(content, ".json")}, hostile()


def journals(bench: Bench, rng: np.random.Generator, count: int) -> tuple[dict[str, Good], Iterator[tuple[str, bytes, str]]]:
    out = bench.folder / "archive"
    if not out.exists():
        command("refine", bench.model, bench.image, "--out", out)
    content = (out / "results.jsonl").read_bytes()
    lines = content.decode().splitlines()

    def hostile() -> Iterator[tuple[str, bytes, str]]:
        for k, line in enumerate(lines):
            for label, tree in retyped(rng, json.loads(line), count // 3):
                yield f"line {k} {label}", "\n".join([*lines[:k], json.dumps(tree), *lines[k + 1 :]]).encode() + b"\n", ".jsonl"
            for other in ("[]", "3", "null", '"x"', "{}", "[" * NESTED + "]" * NESTED):
                yield f"line {k} {other[:9]}", "\n".join([*lines[:k], other, *lines[k + 1 :]]).encode() + b"\n", ".jsonl"
        yield "not UTF-8", content.replace(b"part", b"p\xff\xfet"), ".jsonl"
        yield "no end of line", content[:-1], ".jsonl"
        yield "a line twice", content + content.splitlines(True)[-1], ".jsonl"

    return {"journal": Good(content, ".jsonl")}, hostile()


def folders(bench: Bench) -> Iterator[tuple[Bad, bool]]:
    """Yields data sets of which a part is missing, or something else."""
    import shutil

    def changed(label: str, change: Callable[[Path], Any], good: str = "") -> tuple[Bad, bool]:
        path = bench.place("data")
        shutil.copytree(bench.data(), path, symlinks=True)
        change(path / "brick")
        return Bad("folders", label, path, good), False

    def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
        def change(category: Path) -> None:
            place = category / name
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()
            make(place)

        return change

    yield changed("good", lambda path: None, "data")
    yield changed("hidden file", lambda path: write(path / "train" / "good" / ".x.png", b""), "data")
    yield changed("text beside", lambda path: write(path / "train" / "good" / "x.txt", b""), "data")
    yield changed("loop of folders", lambda path: (path / "train" / "good" / "loop").symlink_to(path / "train"), "data")
    makers: dict[str, Callable[[Path], Any]] = {
        "missing": lambda place: None,
        "file": lambda place: place.write_bytes(b"text"),
        "pipe": os.mkfifo,
        "loop": lambda place: place.symlink_to(place),
        "dangling": lambda place: place.symlink_to("nowhere"),
        "device": lambda place: place.symlink_to("/dev/zero"),
        "folder": lambda place: place.mkdir(),
    }
    for name in ("train/good", "train/good/1.png", "test", "test/spot/0.png", "ground_truth", "ground_truth/spot/0_mask.png"):
        for label, make in makers.items():
            if (name, label) not in {("train/good/1.png", "missing"), ("test/spot/0.png", "missing"), ("train/good/1.png", "folder"), ("test/spot/0.png", "folder")}:
                yield changed(f"{name}: {label}", replaced(name, make))
    black = save(PIL.Image.new("L", SIZE[::-1]), "PNG")
    yield changed("no anomalous pixel", lambda path: write(path / "ground_truth/spot/0_mask.png", black))
    yield changed("no kind", lambda path: write(path / "test" / "x.png", bench.image.read_bytes()))
    yield changed("tiny", lambda path: write(path / "train/good/1.png", save(PIL.Image.new("L", (1, 1)), "PNG")))


def names(bench: Bench) -> Iterator[tuple[Bad, bool]]:
    """Yields images with unusual names; a bad image with such a name is refused in one line."""
    found = (b"a b.png", b"a\nb.png", b"-x.png", "ä☃.png".encode(), b"\xff\xfe.png", b"a'\"$(x)`.png", b"%s{0}.png", b"<b>.png", b"a\rb.png")
    found += (b"\x1b[31m.png", b"[bold].png", b"a*b.png", b"x" * 240 + b".png", b".png", b"..png", b"a.png.png", b" .png", b"a\tb.PNG")
    for name in found:
        path = Path(os.fsdecode(bytes(bench.place("x").parent) + b"/" + name))
        yield Bad("names", repr(name)[:40], write(path, bench.image.read_bytes()), "part"), False
        path = Path(os.fsdecode(bytes(bench.place("x").parent) + b"/" + name))
        yield Bad("names", f"bad {name!r}"[:40], write(path, b"text"), ""), False


def evaluations(bench: Bench, rng: np.random.Generator) -> Iterator[tuple[Bad, bool]]:
    """Yields folders of an evaluation of which one file is damaged."""
    import shutil

    out = bench.folder / "evaluated"
    if not out.exists():
        command("evaluate", bench.data(), "--out", out, "--protocol", "real", "--size", "64", "--images", "1", "--curves", 1)
    files = [file.relative_to(out) for file in sorted((out / "runs").rglob("*")) + sorted((out / "models").iterdir()) if file.is_file()]
    for file in files:
        for label, content in damaged(rng, (out / file).read_bytes(), 6):
            path = bench.place("out")
            shutil.copytree(out, path)
            yield Bad("evaluations", f"{file.name} {label}", write(path / file, content), "evaluated"), False
        for label in ("folder", "pipe", "empty"):
            path = bench.place("out")
            shutil.copytree(out, path)
            (path / file).unlink()
            {"folder": Path.mkdir, "pipe": os.mkfifo, "empty": Path.touch}[label](path / file)
            yield Bad("evaluations", f"{file.name} {label}", path / file, "evaluated"), False


# --- Running


def good_results(bench: Bench, found: list[tuple[Bad, bool]]) -> dict[str, dict[str, Any]]:
    """Reads every good input; returns the results by kind and name."""
    results: dict[str, dict[str, Any]] = {}
    for bad, _ in found:
        if bad.label.endswith("good") and bad.good:
            results.setdefault(bad.kind, {})[bad.good] = getattr(bench, f"read_{bad.kind}")(bad.path)
    mask = drawn()
    if "masks" in results:
        results["masks"] = dict.fromkeys(results["masks"], mask)  # known without a reader
    if "maps" in results:
        results["maps"] = dict.fromkeys(results["maps"], heights())
    if "images" in results:
        lossless = ("rgb", "alpha", "bmp", "lossless", "tiff", "tiff-lzw", "tiff-tiled")
        results["images"] |= dict.fromkeys(lossless, picture(0))
    return results


def serve(connection: Any, folder: Path, model: Path, found: list[tuple[Bad, bool]], kind: str) -> None:
    """Answers with the outcome of each input whose number arrives."""
    bench = Bench(folder, model)
    of_kind = [item for item in found if item[0].kind == kind]
    goods = good_results(bench, of_kind).get(kind, {})
    if kind == "names":
        goods = {"part": bench.read_names(bench.image)}
    if kind == "evaluations":
        goods = {"evaluated": bench.read_evaluations(bench.folder / "evaluated")}
    connection.send("ready")
    while (number := connection.recv()) is not None:
        bad, checked = found[number]
        connection.send(outcome(bench, bad, goods, checked))


class Worker:
    """Process that reads the inputs of a kind; a new one takes its place after a hang or a crash."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.process: Any = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, *self.arguments), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def ask(self, number: int) -> tuple[str, str]:
        if self.process is None:
            self.start()
        self.connection.send(number)
        try:
            if self.connection.poll(SECONDS + 20):
                return self.connection.recv()
            found = "hang", "the decoder can't be stopped"
        except EOFError:
            found = "traceback", "the process ended"
        self.stop()
        return found

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def run_files(folder: Path, seed: int, each: int, kinds: list[str], log: Path) -> list[tuple[Bad, str, str]]:
    """Reads all bad files; returns each with its outcome and message, and writes them to a log."""
    model = folder / "part.model"
    bench = Bench(folder, model)
    if not model.exists():
        for k in range(4):
            write(folder / "train" / f"{k}.png", save(PIL.Image.fromarray(picture(k)), "PNG"))
        command("fit", folder / "train", "--out", model, "--size", "48x64", "--layers", "stage2", "stage3")
    found = list(inputs(bench, seed, each, whole=True))
    results = []
    with log.open("w", errors="backslashreplace") as file:
        for kind in dict.fromkeys(bad.kind for bad, _ in found):
            if kinds and kind not in kinds:
                continue
            worker = Worker(folder, model, found, kind)
            for number, (bad, _) in enumerate(found):
                if bad.kind == kind:
                    result, message = worker.ask(number)
                    results.append((bad, result, message))
                    print(f"{kind}\t{bad.label!r}\t{result}\t{message if result != 'read rightly' else ''}\t{bad.path}", file=file, flush=True)
            worker.stop()
    return results


def table(results: list[tuple[Bad, str, str]]) -> str:
    """Returns the number of inputs of each kind by outcome."""
    lines = [f"{'kind of input':<14}{'tried':>7}" + "".join(f"{name:>14}" for name in OUTCOMES)]
    counts = Counter((bad.kind, result) for bad, result, _ in results)
    kinds = list(dict.fromkeys(bad.kind for bad, _, _ in results))
    for kind in [*kinds, "all"]:
        row = [sum(n for (k, r), n in counts.items() if kind in (k, "all") and r == name) for name in OUTCOMES]
        lines.append(f"{kind:<14}{sum(row):>7}" + "".join(f"{n:>14}" for n in row))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="store_true", help="bad files only")
    parser.add_argument("--processes", action="store_true", help="processes only")
    parser.add_argument("--kinds", nargs="+", default=[], help="kinds of files (default: all)")
    parser.add_argument("--each", type=int, default=4, help="damaged copies of each good file (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("reliability.log"), help="file for the outcome of each input")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if not arguments.processes:
            results = run_files(Path(temporary), arguments.seed, arguments.each, arguments.kinds, arguments.log)
            print(table(results))
        if not arguments.files:
            from interruptions import run_processes

            run_processes(Path(temporary) / "processes", arguments.seed, arguments.kills)


if __name__ == "__main__":
    sys.exit(main())
