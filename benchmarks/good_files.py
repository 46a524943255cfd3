"""Good files of every kind, from which ``bad_files.py`` makes bad ones."""

import functools
import importlib.util
import io
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import safetensors.numpy
import tifffile

TORCHFILE = Path(__file__).parents[1] / "tests" / "test_torchfile.py"
"""Helpers of the tests that write files as PyTorch does."""
SIZE = (48, 64)
"""Height and width of the pictures."""


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


@functools.cache
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


def torch_files() -> Any:
    """Returns the module of the tests that writes files as PyTorch does."""
    spec = importlib.util.spec_from_file_location("torchfile", TORCHFILE)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def state_dict(name: str, tensors: dict[str, np.ndarray], **others: Any) -> bytes:
    """Returns a PyTorch file, written by the helpers of the tests."""
    script = torch_files()
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
    {
        "class_path": "torchvision.transforms.v2.Normalize",
        "init_args": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    },
]
PARAMETERS = {"backbone": "resnet18", "layers": ["layer1"]}


def checkpoint(parameters: Any = PARAMETERS, steps: Any = STEPS, **changes: np.ndarray) -> bytes:
    """Returns a checkpoint of anomalib's PaDiM."""
    config = {"transform": {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": steps}}}
    others = {"hyper_parameters": parameters, "anomalib_pre_processor_config": config}
    return state_dict("zip", {**resnet18(), **changes}, **others)


def settings_files() -> dict[str, Good]:
    from f2pad_jax import Settings
    from f2pad_jax.commands._settings_file import as_toml

    return {
        "default": Good(as_toml(Settings()).encode(), ".toml"),
        "paper": Good(as_toml(Settings.paper()).encode(), ".toml"),
    }
