"""Bad files of every kind, made with a seed from good ones: the inputs of ``reliability.py`` and of its test."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import safetensors.numpy
from good_files import (
    PARAMETERS,
    SIZE,
    Good,
    checkpoint,
    chunk,
    drawn,
    heights,
    images,
    maps,
    masks,
    npy,
    npz,
    picture,
    png,
    resnet18,
    save,
    settings_files,
    small_network,
    state_dict,
    tiff,
    torch_files,
    weights,
)

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


REPLACEMENTS: dict[str, Callable[[Path], Any]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "empty": Path.touch,
    "text": lambda path: path.write_text("this is text\n" * 20),
}
"""Functions that put something in the place of a file."""


def replace(path: Path, label: str) -> None:
    """Puts something else in the place of a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    REPLACEMENTS[label](path)


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
    others = (
        None,
        True,
        -1,
        0,
        10**18,
        1e300,
        float("nan"),
        float("inf"),
        "",
        "../../x",
        "ä\n\0",
        [],
        {},
        [[]],
        {"": None},
    )
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
    side = 14_000
    yield "png bomb", png(side, side, 1, 0, zlib.compress(bytes(side * (side // 8 + 1)))), ".png"
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))
    yield "png text bomb", png(64, 48, 8, 0, zlib.compress(bytes(65 * 48)), text), ".png"
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26)))
    yield "png profile bomb", png(64, 48, 8, 0, zlib.compress(bytes(65 * 48)), profile), ".png"
    if whole:
        side = 5000
        yield "png of 25 megapixels", png(side, side, 1, 0, zlib.compress(bytes(side * (side // 8 + 1)))), ".png"
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
    for height, width in ((65535, 65535), (0, 0), *([(8000, 8000)] if whole else [])):
        yield f"jpeg {width}x{height}", jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :], ".jpg"
    bmp = save(colour, "BMP")
    for field, at, values in (
        ("width", 18, (2**31 - 1, -64, 0)),
        ("height", 22, (2**31 - 1, -48, 0)),
        ("bits", 28, (0, 5, 32)),
    ):
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


def hostile_maps(trap: Path, whole: bool) -> Iterator[tuple[str, bytes, str]]:
    values = heights()
    objects = np.array([Code(trap)], object)
    yield "npy pickle", npy(objects, pickled=True), ".npy"
    yield "npz pickle", npz(map=npy(objects, pickled=True)), ".npz"
    for shape in (
        "(1099511627776, 4)",
        "(-1, 64)",
        "(2147483647, 2147483647)",
        "(48, 64, 3)",
        "()",
        "'48'",
        "(1e9,)",
        "(None,)",
    ):
        yield f"npy shape {shape}", header(shape), ".npy"
        yield f"npz shape {shape}", npz(map=header(shape)), ".npz"
    yield "npy nested", header("(" * 4000 + "48" + ")" * 4000), ".npy"
    for kind in ("<c8", "<U4", "|V8", "<M8[s]", "|O", "xx"):
        yield f"npy of {kind}", header("(2, 2)", kind), ".npy"
    for bad in (np.nan, np.inf):
        yield f"npy with {bad}", npy(np.where(drawn(), bad, values).astype(np.float32)), ".npy"
        yield f"tiff with {bad}", tiff(np.where(drawn(), bad, values).astype(np.float32)), ".tif"
    if whole:
        yield "npz bomb", whole_bomb(), ".npz"
        yield "npz bomb cut", npz(map=header("(30000, 30000)")[:-64] + bytes(30_000 * 30_000 // 2)), ".npz"
    yield "npy beyond 32 bits", npy(np.where(drawn(), 1e300, 1.0)), ".npy"
    yield "npz of two", npz(a=npy(values), b=npy(values)), ".npz"
    yield "npz of none", npz(), ".npz"
    yield "npy empty", npy(np.zeros((0, 0), np.float32)), ".npy"
    yield "colours", save(PIL.Image.fromarray(picture(0)), "PNG"), ".png"
    yield "pages", tiff(np.stack([values, values + 1]), photometric="minisblack"), ".tif"
    yield "bomb", png(14_000, 14_000, 1, 0, zlib.compress(bytes(14_000 * 1751))), ".png"


def whole_bomb() -> bytes:
    """Returns an .npz file of 4 GB of zeros."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("map.npy", "w", force_zip64=True) as file,
    ):
        file.write(header("(32000, 32000)")[:-64])
        for _ in range(1000):
            file.write(bytes(32 * 32000 * 4))
    return buffer.getvalue()


def hostile_masks() -> Iterator[tuple[str, bytes, str]]:
    mask = drawn()
    yield "bomb", png(14_000, 14_000, 1, 0, zlib.compress(bytes(14_000 * 1751))), ".png"
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
    with (
        zipfile.ZipFile(io.BytesIO(root)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
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
    script = torch_files()
    count = 2**20
    entries = {f"w{i}": script.tensor(script.storage(count), (count,), (1,)) for i in range(2000)}
    return script.zip_file(script.ordered(**entries), {"0": np.zeros(count, np.float32)})


# --- Places


class Bad(NamedTuple):
    """An input, and what is known of it."""

    kind: str
    label: str
    path: Path
    good: str
    """Name of the good input that it was made from; "": the input must be refused, or be read as the file says."""


WHOLE = ("models", "manifests", "journals", "checkpoints")
"""Kinds of which the result may be that of the good file although a value has changed, since the value does not count."""
Family = tuple[dict[str, Good], Iterator[tuple[str, bytes, str]]]
"""Good files of a kind, and label, content and suffix of hostile ones."""


class Workshop:
    """Folder in which inputs are made."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model, self.trap = folder, model, folder / "trap"
        self.image = folder / "part.png"
        self.count = 0
        if not self.image.exists():
            values = picture(0).copy()
            values[10:20, 20:40] = (250, 20, 20)
            PIL.Image.fromarray(values).save(self.image)

    def new(self, name: str) -> Path:
        """Returns a new path."""
        self.count += 1
        folder = self.folder / "bad" / str(self.count)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

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


# --- Lists of inputs


def inputs(place: Workshop, seed: int, each: int, *, whole: bool, kinds: Sequence[str] = ()) -> Iterator[tuple[Bad, bool]]:
    """Writes every bad input; yields it, and whether its format has a checksum.

    Args:
        place: folder for the inputs.
        seed: seed of the damage.
        each: damaged copies of each good file.
        whole: whether large inputs are made too, which take seconds each.
        kinds: kinds of inputs; empty: all.
    """
    count = 40 if whole else 6
    families: dict[str, Callable[[np.random.Generator], Family]] = {
        "images": lambda rng: (images(), hostile_images(rng, whole)),
        "masks": lambda rng: (masks(), hostile_masks()),
        "maps": lambda rng: (maps(), hostile_maps(place.trap, whole)),
        "ignored": lambda rng: ({"grey": masks()["grey"]}, hostile_masks()),
        "weights": lambda rng: (weights(), hostile_weights(place.trap) if whole else iter(())),
        "models": lambda rng: (
            {"model": Good(place.model.read_bytes(), ".model", True)},
            hostile_models(rng, place.model, count),
        ),
        "checkpoints": lambda rng: ({"padim": Good(checkpoint(), ".ckpt", True)}, hostile_checkpoints(whole)),
        "settings": lambda rng: (settings_files(), hostile_settings(rng, count)),
        "manifests": lambda rng: manifests(place, rng, count),
        "journals": lambda rng: journals(place, rng, count),
    }
    for number, (kind, family) in enumerate(families.items()):
        if not kinds or kind in kinds:
            yield from of_family(kind, family(np.random.default_rng([seed, number])), place, [seed, number, 1], each, whole)
    others = (
        {"folders": folders, "names": names, "evaluations": evaluations} if whole else {"folders": folders, "names": names}
    )
    for kind, listed in others.items():
        if not kinds or kind in kinds:
            yield from ((bad, False) for bad in listed(place))


def of_family(
    kind: str, family: Family, place: Workshop, seed: list[int], each: int, whole: bool
) -> Iterator[tuple[Bad, bool]]:
    """Yields the inputs that are made from good files of a kind."""
    (goods, hostile), rng = family, np.random.default_rng(seed)
    file_name = "results.jsonl" if kind == "journals" else ""
    for name, good in goods.items():
        path = write(place.new(file_name or f"good{good.suffix}"), good.content)
        yield Bad(kind, f"{name} good", path, name), good.checked
        times = each if len(goods) > 1 else each * (12 if whole else 8)
        for label, content in damaged(rng, good.content, times):
            path = write(place.new(file_name or f"bad{good.suffix}"), content)
            yield Bad(kind, f"{name} {label}", path, name), good.checked
    for label, content, suffix in hostile:
        good_name = next(iter(goods)) if kind in WHOLE else ""
        yield Bad(kind, label, write(place.new(file_name or f"hostile{suffix}"), content), good_name), False
    suffix = next(iter(goods.values())).suffix
    for label in REPLACEMENTS:
        if (kind, label) == ("ignored", "folder"):  # a folder of pictures, which needs none for an image
            continue
        path = place.new(file_name or f"{label}{suffix}")
        replace(path, label)
        yield Bad(kind, label, path, next(iter(goods)) if kind == "journals" else ""), False  # no journal is a new folder


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


def hostile_checkpoints(whole: bool) -> Iterator[tuple[str, bytes, str]]:
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
    for label, index in (
        {"index beyond": np.full(4, 1e9, np.float32), "index negative": -np.ones(4, np.float32)}.items() if whole else ()
    ):
        yield label, checkpoint(**{"model.idx": index}), ".ckpt"


def hostile_settings(rng: np.random.Generator, count: int) -> Iterator[tuple[str, bytes, str]]:
    others = (
        "true",
        "-1",
        "0",
        "1e400",
        "nan",
        "inf",
        "-inf",
        '"x"',
        "[]",
        "{}",
        "[1, 2, 3]",
        "1979-05-27",
        "9" * 400,
        "'none'",
        "1e-320",
    )
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


def manifests(
    place: Workshop, rng: np.random.Generator, count: int
) -> tuple[dict[str, Good], Iterator[tuple[str, bytes, str]]]:
    out = place.folder / "made"
    if not out.exists():
        command("make-dataset", place.data(), "--out", out, "--count", 2, "--size", 32)
    content = (out / "manifest.json").read_bytes()

    def hostile() -> Iterator[tuple[str, bytes, str]]:
        for label, tree in retyped(rng, json.loads(content), count):
            yield label, json.dumps(tree).encode(), ".json"
        yield "nested", b"[" * NESTED + b"]" * NESTED, ".json"
        for key, value in (("count", 10**9), ("size", [10**6, 10**6]), ("size", [0, 0]), ("seed", -1), ("count", 0)):
            yield f"{key} {value}", json.dumps({**json.loads(content), key: value}).encode(), ".json"

    return {"manifest": Good(content, ".json")}, hostile()


def journals(
    place: Workshop, rng: np.random.Generator, count: int
) -> tuple[dict[str, Good], Iterator[tuple[str, bytes, str]]]:
    out = place.folder / "archive"
    if not out.exists():
        command("refine", place.model, place.image, "--out", out)
    content = (out / "results.jsonl").read_bytes()
    lines = content.decode().splitlines()

    def hostile() -> Iterator[tuple[str, bytes, str]]:
        for k, line in enumerate(lines):
            for label, tree in retyped(rng, json.loads(line), count // 3):
                yield (
                    f"line {k} {label}",
                    "\n".join([*lines[:k], json.dumps(tree), *lines[k + 1 :]]).encode() + b"\n",
                    ".jsonl",
                )
            for other in ("[]", "3", "null", '"x"', "{}", "[" * NESTED + "]" * NESTED):
                yield f"line {k} {other[:9]}", "\n".join([*lines[:k], other, *lines[k + 1 :]]).encode() + b"\n", ".jsonl"
        yield "not UTF-8", content.replace(b"part", b"p\xff\xfet"), ".jsonl"
        yield "no end of line", content[:-1], ".jsonl"
        yield "a line twice", content + content.splitlines(True)[-1], ".jsonl"

    return {"journal": Good(content, ".jsonl")}, hostile()


def folders(place: Workshop) -> Iterator[Bad]:
    """Yields data sets of which a part is missing, or something else."""

    def changed(label: str, change: Callable[[Path], Any], good: str = "") -> Bad:
        path = place.new("data")
        shutil.copytree(place.data(), path, symlinks=True)
        change(path / "brick")
        return Bad("folders", label, path, good)

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
    for name in (
        "train/good",
        "train/good/1.png",
        "test",
        "test/spot/0.png",
        "ground_truth",
        "ground_truth/spot/0_mask.png",
    ):
        for label, make in makers.items():
            if (name, label) not in {
                ("train/good/1.png", "missing"),
                ("test/spot/0.png", "missing"),
                ("train/good/1.png", "folder"),
                ("test/spot/0.png", "folder"),
            }:
                yield changed(f"{name}: {label}", replaced(name, make))
    black = save(PIL.Image.new("L", SIZE[::-1]), "PNG")
    yield changed("no anomalous pixel", lambda path: write(path / "ground_truth/spot/0_mask.png", black))
    yield changed("no kind", lambda path: write(path / "test" / "x.png", place.image.read_bytes()))
    yield changed("tiny", lambda path: write(path / "train/good/1.png", save(PIL.Image.new("L", (1, 1)), "PNG")))


def names(place: Workshop) -> Iterator[Bad]:
    """Yields images with unusual names; a bad image with such a name is refused in one line."""
    found = (
        b"a b.png",
        b"a\nb.png",
        b"-x.png",
        "ä☃.png".encode(),
        b"\xff\xfe.png",
        b"a'\"$(x)`.png",
        b"%s{0}.png",
        b"<b>.png",
        b"a\rb.png",
    )
    found += (
        b"\x1b[31m.png",
        b"[bold].png",
        b"a*b.png",
        b"x" * 240 + b".png",
        b".png",
        b"..png",
        b"a.png.png",
        b" .png",
        b"a\tb.PNG",
    )
    for name in found:
        path = Path(os.fsdecode(bytes(place.new("x").parent) + b"/" + name))
        yield Bad("names", repr(name)[:40], write(path, place.image.read_bytes()), "part")
        path = Path(os.fsdecode(bytes(place.new("x").parent) + b"/" + name))
        yield Bad("names", f"bad {name!r}"[:40], write(path, b"text"), "")


def evaluations(place: Workshop) -> Iterator[Bad]:
    """Yields folders of an evaluation of which one file is damaged."""
    rng = np.random.default_rng(0)
    out = place.folder / "evaluated"
    if not out.exists():
        command(
            "evaluate", place.data(), "--out", out, "--protocol", "real", "--size", "64", "--images", "1", "--curves", 1
        )
    files = [
        file.relative_to(out)
        for file in sorted((out / "runs").rglob("*")) + sorted((out / "models").iterdir())
        if file.is_file()
    ]
    for file in files:
        for label, content in damaged(rng, (out / file).read_bytes(), 6):
            path = place.new("out")
            shutil.copytree(out, path)
            yield Bad("evaluations", f"{file.name} {label}", write(path / file, content), "evaluated")
        for label in ("folder", "pipe", "empty"):
            path = place.new("out")
            shutil.copytree(out, path)
            replace(path / file, label)
            yield Bad("evaluations", f"{file.name} {label}", path / file, "evaluated")
