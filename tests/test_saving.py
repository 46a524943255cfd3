import dataclasses
import json
import struct
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from f2pad_jax import load_detector, save_detector
from f2pad_jax._storage import content_checksum, read_safetensors, write_safetensors
from f2pad_jax.backbones import load_backbone
from f2pad_jax.backbones._weight_files import cached_file
from f2pad_jax.detectors import AbstractDetector, Calibration, CFlow, NormalImages, PaDiM, PatchCore, PixelPrior
from f2pad_jax.detectors.base import Factors
from f2pad_jax.detectors.padim import Full, LowRank
from f2pad_jax.detectors.saving import FORMAT
from f2pad_jax.errors import ModelError

SIZE = (32, 48)


class Own(AbstractDetector):
    """A detector of a user's own, with whatever else it keeps."""

    backbone: Any
    size: tuple[int, int] = eqx.field(static=True)
    extra: Any
    calibration: Calibration | None = None

    @classmethod
    def fit(cls, images, backbone, *, seed, progress):
        return cls(backbone, images.size, None)

    def raw_scores(self, image, context):
        return (jnp.sum(image**2, axis=-1),)


class Part(eqx.Module):
    """A module inside a user's detector."""

    weight: Any
    name: str = eqx.field(static=True)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("efficientnet-lite0", layers=("stage2", "stage1"))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return NormalImages(rng.integers(0, 256, (3, *SIZE, 3), np.uint8), SIZE)


@pytest.fixture(scope="module")
def calibration(images):
    rng = np.random.default_rng(1)
    prior = PixelPrior(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 3), (2, 3, 3))))
    normals = jnp.asarray(rng.integers(0, 256, (2, *SIZE, 3), np.uint8))
    factors = Factors(jnp.float32(0.3), jnp.float32(2.0))
    return Calibration(*map(jnp.float32, (0.1, 1.2, np.inf)), prior, normals, factors)


@pytest.fixture(scope="module")
def fitted(backbone, images, calibration):
    """A small detector of every method."""
    options = {
        "patchcore": (PatchCore, {"max_bank": 20, "num_candidates": 3}),
        "padim": (PaDiM, {"num_channels": 6}),
        "padim of low rank": (PaDiM, {"num_channels": 6, "rank": 2}),
        "cflow": (CFlow, {"num_blocks": 2, "meta_epochs": 1, "sub_epochs": 1}),
    }
    made = {name: method.fit(images, backbone, seed=0, **extra) for name, (method, extra) in options.items()}
    return {name: dataclasses.replace(detector, calibration=calibration) for name, detector in made.items()}


@pytest.fixture
def saved(fitted, tmp_path):
    path = tmp_path / "patchcore.model"
    save_detector(path, fitted["patchcore"])
    return path


def same(one, two):
    """Whether two detectors are of the same structure and hold the same bits."""
    assert type(one) is type(two)
    (first, structure), (second, other) = jax.tree.flatten(one), jax.tree.flatten(two)
    assert structure == other
    for a, b in zip(map(np.asarray, first), map(np.asarray, second), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", ["patchcore", "padim", "padim of low rank", "cflow"])
def test_a_saved_detector_is_loaded_to_the_bit(name, fitted, tmp_path):
    detector = fitted[name]
    for kept in (detector, dataclasses.replace(detector, calibration=None)):
        save_detector(tmp_path / "x.model", kept)
        same(load_detector(tmp_path / "x.model"), kept)
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_every_method_is_saved_with_what_makes_it(fitted):
    assert isinstance(fitted["padim"].precision, Full) and isinstance(fitted["padim of low rank"].precision, LowRank)
    assert fitted["patchcore"].num_candidates == 3 and len(fitted["cflow"].flows[0].blocks) == 2
    assert len(jax.tree.leaves(fitted["cflow"].flows)) == 2 * 2 * 7


def test_a_detector_of_one_s_own_keeps_modules_tuples_text_and_numbers(backbone, calibration, tmp_path):
    path = tmp_path / "own.model"
    weight = np.random.default_rng(0).standard_normal((3, 2))
    kinds = [np.float16, np.int8, np.uint16, np.int32, bool]
    parts = tuple(Part(jnp.asarray(10 * weight, kind), np.dtype(kind).name) for kind in kinds)
    extra = (*parts, (), (1, -2.5e-7, True, None, "größer\n"), jnp.float32(0.1), jnp.zeros((0, 3)))
    own = Own(backbone, SIZE, extra, calibration)
    save_detector(path, own)
    loaded = load_detector(path, classes=[Own, Part])
    same(loaded, own)
    assert loaded.extra[6] == extra[6] and list(map(type, loaded.extra[6])) == list(map(type, extra[6]))
    with pytest.raises(ModelError, match=r"own.model: holds a Own; .* classes=\(Own,\)"):
        load_detector(path)
    with pytest.raises(ModelError, match=r"own.model: holds a Part; .* classes=\(Part,\)"):
        load_detector(path, classes=(Own,))


@pytest.mark.parametrize("unsavable", [{"a": 1}, {1, 2}, jnp.tanh, 1j, b"bytes", object()], ids=lambda v: type(v).__name__)
def test_a_field_that_can_t_be_saved_is_named(unsavable, backbone, tmp_path):
    for extra, name in ((unsavable, "extra"), ((1, Part(unsavable, "x")), "extra.1.weight")):
        with pytest.raises(ModelError, match=rf"detector\.{name} is a .*{type(unsavable).__name__}, which a model file"):
            save_detector(tmp_path / "x.model", Own(backbone, SIZE, extra))
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_the_file_is_arrays_and_json_and_nothing_else(fitted, tmp_path):
    """Read by hand, to the last byte."""
    path = tmp_path / "x.model"
    for detector in fitted.values():
        save_detector(path, detector)
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        metadata = entries.pop("__metadata__")
        assert metadata["format"] == FORMAT
        leaves = jax.tree.leaves(eqx.tree_at(lambda d: d.backbone, detector, None))
        assert len(entries) == len(leaves)
        assert 8 + length + sum(np.asarray(leaf).nbytes for leaf in leaves) == len(data)
        header = json.loads(metadata["header"])
        assert header["detector"]["class"] == type(detector).__name__
        assert header["detector"]["fields"]["backbone"]["backbone"] == "efficientnet-lite0"


def test_other_weights_of_the_backbone_are_refused(saved, fitted, tmp_path):
    tensors, metadata = read_safetensors(cached_file("efficientnet-lite0"))
    same(load_detector(saved, weights=cached_file("efficientnet-lite0")), fitted["patchcore"])
    for layer, used in (("stem", True), ("head", False)):
        name = next(name for name in tensors if name.startswith(layer))
        altered = tensors[name].copy()
        altered.flat[0] = np.nextafter(altered.flat[0], np.inf, dtype=altered.dtype)
        path = tmp_path / f"{layer}.safetensors"
        write_safetensors(path, {**tensors, name: altered}, metadata)
        if used:
            with pytest.raises(ModelError, match=r"patchcore\.model: fitted with other weights of efficientnet-lite0"):
                load_detector(saved, weights=path)
        else:
            same(load_detector(saved, weights=path), fitted["patchcore"])


def test_a_file_altered_anywhere_is_refused(saved):
    data = saved.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for position in [*range(0, end, 11), *np.linspace(end, len(data) - 1, 60).astype(int)]:
        for bit in (0x01, 0x20):
            altered = bytearray(data)
            altered[position] ^= bit
            saved.write_bytes(altered)
            with pytest.raises(ModelError, match=r"patchcore\.model"):
                load_detector(saved)


def test_what_is_no_model_is_refused(saved, tmp_path):
    with pytest.raises(ModelError, match=r"gone\.model: no such file"):
        load_detector(tmp_path / "gone.model")
    data = saved.read_bytes()
    for content in (b"", b"this is text", data[:100], data[:-1], data + b"\0"):
        saved.write_bytes(content)
        with pytest.raises(ModelError, match="not a model"):
            load_detector(saved)
    with pytest.raises(ModelError, match="not a model"):
        load_detector(cached_file("efficientnet-lite0"))


def test_another_format_is_refused(saved):
    tensors, metadata = read_safetensors(saved)
    write_safetensors(saved, tensors, {**metadata, "format": "f2pad-model-2"})
    with pytest.raises(ModelError, match=f"patchcore.model: .*'f2pad-model-2', expected '{FORMAT}'"):
        load_detector(saved)


@pytest.mark.parametrize("name", ["system", "Path", "AbstractDetector", "Backbone", "NormalImages"])
def test_a_file_makes_nothing_but_the_classes_known(name, tmp_path):
    header = json.dumps({"detector": {"class": name, "fields": {}}})
    checksum = content_checksum({"header": np.frombuffer(header.encode(), np.uint8)})
    write_safetensors(tmp_path / "x.model", {}, {"format": FORMAT, "header": header, "sha256": checksum})
    with pytest.raises(ModelError, match=f"x.model: holds a {name}; "):
        load_detector(tmp_path / "x.model")


@pytest.mark.parametrize("header", ["[]", "{", '{"detector": [3]}', '{"detector": ' + "[" * 20000, "{}"])
def test_a_header_that_is_none_is_refused(header, tmp_path):
    write_model(tmp_path / "x.model", {}, header)
    with pytest.raises(ModelError, match=r"x\.model: "):
        load_detector(tmp_path / "x.model")


def write_model(path, tensors, header):
    """Writes a model with the checksum of any header."""
    texts = {"format": FORMAT, "header": header, "sha256": content_checksum(tensors, header=header)}
    write_safetensors(path, tensors, texts)


def test_a_field_of_another_type_is_refused(saved):
    """Whoever alters a model can give it a new checksum as well."""
    tensors, metadata = read_safetensors(saved)
    for change in ({"size": [96, "96"]}, {"size": [96]}, {"memory_bank": 3}, {"memory_bank": None}, {"calibration": []}):
        header = json.loads(metadata["header"])
        header["detector"]["fields"] |= change
        write_model(saved, tensors, json.dumps(header))
        with pytest.raises(ModelError, match=rf"patchcore\.model: holds no {next(iter(change))} of a PatchCore"):
            load_detector(saved)
    name = json.loads(metadata["header"])["detector"]["fields"]["memory_bank"]["tensor"]
    write_model(saved, {**tensors, name: tensors[name][0]}, metadata["header"])
    with pytest.raises(ModelError, match="holds no memory_bank"):
        load_detector(saved)
