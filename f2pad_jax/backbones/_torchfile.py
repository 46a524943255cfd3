"""Reader of the tensors in a PyTorch ``.pth`` file, without PyTorch.

A ``.pth`` file is a pickle, and a pickle is a program. No code of the file runs: each name that a state dict needs stands
for an inert object of this module. Any other name is refused before a call. In training checkpoints, which hold more than
tensors, an unknown name stands for an empty class that stores attributes.
Both layouts are read: the zip archive (PyTorch >= 1.6) and the older stream of pickles.
"""

import io
import math
import mmap
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from f2pad_jax._storage import regular
from f2pad_jax.errors import CheckpointError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_MAX_TUPLES = 30_000
"""Limit per pickle; a tensor takes four or five tuples."""
_MAX_CLASSES = 1000
_MAX_RATIO = 20
"""Largest ratio of the contents of a file to its size, where PyTorch has 1: it compresses nothing."""
_FORMAT_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)

_STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class _Dict(dict):
    """Stand-in for ``OrderedDict`` that ignores attributes, such as ``_metadata``."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Inert:
    """Object that the pickle can hold but not alter: setting attributes is refused."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it tries to alter an object")


class _Storage(_Inert):
    """Flat buffer of the file; ``data`` is None until its bytes are read."""

    __slots__ = ("data", "dtype", "key", "numel")

    def __init__(self, dtype: np.dtype, key: str, numel: int):
        self.dtype, self.key, self.numel = dtype, key, numel
        self.data: np.ndarray | None = None


class _Tensor(_Inert):
    """View of a storage, turned into an array after the storage is read."""

    __slots__ = ("offset", "shape", "storage", "stride")

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride


class _Name(_Inert):
    """Allowed name of the pickle: a function or a storage type."""

    __slots__ = ("call", "dtype")

    def __init__(self, call: Callable | None = None, dtype: np.dtype | None = None):
        self.call, self.dtype = call, dtype

    def __call__(self, *args: Any) -> Any:
        if self.call is None:
            raise pickle.UnpicklingError("it calls a storage type")
        return self.call(*args)


class Foreign(dict):
    """Stand-in for an object of an unknown class: a dictionary of its attributes, without behaviour."""

    def __init__(self, *_: Any):
        super().__init__()

    def __call__(self, *_: Any) -> "Foreign":
        """Returns an empty object in place of a method's result."""
        return Foreign()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)

    def append(self, item: Any) -> None:
        """Ignores its argument."""

    def extend(self, items: Any) -> None:
        """Ignores its argument."""

    def add(self, item: Any) -> None:
        """Ignores its argument."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = object.__eq__


def _rebuild_tensor(storage, offset, shape, stride, *_):
    ints = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(i) is int and i >= 0 for i in ints) or len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor's description is malformed")
    if 0 not in shape and offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) >= storage.numel:
        raise pickle.UnpicklingError("a tensor reaches past the end of its storage")
    if math.prod(shape) > storage.numel:
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor, *_):
    if not isinstance(tensor, _Tensor):
        raise pickle.UnpicklingError("a parameter does not hold a tensor")
    return tensor


_NAMES: dict[tuple[str, str], _Name] = {
    ("collections", "OrderedDict"): _Name(lambda *args: _Dict(*args)),
    ("torch._utils", "_rebuild_tensor"): _Name(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Name(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Name(_rebuild_parameter),
    **{("torch", name): _Name(dtype=dtype) for name, dtype in _STORAGES.items()},
}


def _quoted(text: str) -> str:
    """Returns text of the file, quoted, on one short line."""
    return repr(text if len(text) <= 100 else text[:99] + "…")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO | mmap.mmap, storages: dict[str, _Storage], strict: bool):
        super().__init__(file, encoding="utf-8")
        self.storages, self.strict = storages, strict
        self.foreign: dict[tuple[str, str], type[Foreign]] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            if not self.strict:
                if len(self.foreign) > _MAX_CLASSES:
                    raise pickle.UnpicklingError(f"it asks for over {_MAX_CLASSES} classes; nothing was run") from None
                if (module, name) not in self.foreign:
                    self.foreign[module, name] = type(name, (Foreign,), {})
                return self.foreign[module, name]
            full_name = _quoted(f"{module}.{name}")
            raise pickle.UnpicklingError(f"it asks for {full_name}, which is no tensor; nothing was run") from None

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _Name(dtype=np.dtype() as dtype), str(key), _, int(numel), *view) if numel >= 0 and view in (
                [],
                [None],
            ):
                storage = self.storages.setdefault(key, _Storage(dtype, key, numel))
            case _:
                raise pickle.UnpicklingError("a storage's description is malformed")
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise pickle.UnpicklingError(f"storage {_quoted(key)} is described twice, differently")
        return storage


def _load(file: io.BytesIO | mmap.mmap, storages: dict[str, _Storage], strict: bool = True) -> Any:
    """Checks every opcode of the next pickle of ``file``, then loads the pickle."""
    start, tuples = file.tell(), 0
    for opcode, argument, position in pickletools.genops(file):  # pyright: ignore[reportArgumentType]
        if opcode.name in ("EXT1", "EXT2", "EXT4"):  # these opcodes fetch objects without find_class
            raise pickle.UnpicklingError(f"it uses {opcode.name}, which no tensor needs; nothing was run")
        tuples += opcode.name.startswith("TUPLE")
        if tuples > _MAX_TUPLES:  # nested tuples would overflow the stack
            raise pickle.UnpicklingError(f"it holds over {_MAX_TUPLES} tuples; nothing was run")
        # the memo allocates memory up to this index
        if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) > (position or 0):
            raise pickle.UnpicklingError("its memo is malformed")
    file.seek(start)
    return _Unpickler(file, storages, strict).load()


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a ``.pth`` state dict, by name.

    A dictionary without tensors of its own is replaced by its entry ``state_dict`` or ``model``.

    Raises:
        CheckpointError: the file is missing, damaged, not PyTorch's, or holds anything besides tensors.
    """
    return _read(path, strict=True)[0]


def read_training_checkpoint(path: str | Path) -> tuple[dict[str, np.ndarray], dict[Any, Any]]:
    """Reads a Lightning ``.ckpt`` file: the tensors of its state dict by name, and its other entries.

    An object of an unknown class becomes a :class:`Foreign` dictionary of its attributes.

    Raises:
        CheckpointError: the file is missing, damaged, not PyTorch's, or has no ``state_dict``.
    """
    tensors, root = _read(path, strict=False)
    if "state_dict" not in root:
        raise CheckpointError(f"{path}: not a training checkpoint: it holds no 'state_dict'")
    return tensors, {key: value for key, value in root.items() if key != "state_dict"}


def _read(path: str | Path, *, strict: bool) -> tuple[dict[str, np.ndarray], dict[Any, Any]]:
    path = Path(path)
    storages: dict[str, _Storage] = {}
    try:
        with regular(path).open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                root = _read_zip(file, storages, path.stat().st_size, strict)
            else:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    root = _read_legacy(content, storages)
        return _arrays(root, _MAX_RATIO * path.stat().st_size), root
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such weight file") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused: {error}") from None
    except (EOFError, struct.error, zipfile.BadZipFile, zlib.error):
        raise CheckpointError(f"{path}: the file is damaged or cut short; get it again") from None
    except _FORMAT_ERRORS as error:
        raise CheckpointError(f"{path}: not a PyTorch weight file ({type(error).__name__}: {error})") from None


def _read_zip(file: IO[bytes], storages: dict[str, _Storage], size: int, strict: bool) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("the archive holds no data.pkl")
        if any(member.compress_size > size for member in archive.infolist()):
            raise EOFError
        if sum(member.file_size for member in archive.infolist()) > _MAX_RATIO * size + 2**20:
            raise pickle.UnpicklingError("it is far larger when it is unpacked")
        folder = names[0].removesuffix("data.pkl")
        if folder + "byteorder" in archive.namelist() and archive.read(folder + "byteorder") != b"little":
            raise ValueError("it is big-endian")
        root = _load(io.BytesIO(archive.read(names[0])), storages, strict)
        for storage in storages.values():
            member = archive.getinfo(f"{folder}data/{storage.key}")
            if member.file_size != storage.numel * storage.dtype.itemsize:
                raise EOFError
            storage.data = np.frombuffer(archive.read(member), storage.dtype)
    return root


def _read_legacy(file: mmap.mmap, storages: dict[str, _Storage]) -> Any:
    def load() -> Any:
        return _load(file, storages)

    try:
        magic = load()
    except (pickle.UnpicklingError, EOFError, UnicodeError):
        raise ValueError("it does not begin with PyTorch's magic number") from None
    if magic != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
        raise ValueError("it does not begin with PyTorch's magic number")
    if load().get("little_endian") is not True:
        raise ValueError("it is big-endian")
    root, keys = load(), load()
    for key in keys:
        storage = storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        num_bytes = storage.numel * storage.dtype.itemsize
        if numel != storage.numel or num_bytes > file.size() - file.tell():
            raise EOFError
        storage.data = np.frombuffer(file.read(num_bytes), storage.dtype)
    return root


def _arrays(root: Any, most_bytes: int) -> dict[str, np.ndarray]:
    """Returns copies of the tensors of a dictionary, which together have at most this number of bytes."""
    if isinstance(root, dict) and not any(isinstance(value, _Tensor) for value in root.values()):
        root = next((root[key] for key in ("state_dict", "model") if key in root), root)
    if not isinstance(root, dict):
        raise pickle.UnpicklingError("it holds no dictionary of tensors")
    arrays = {}
    for name, tensor in root.items():
        if not isinstance(name, str):
            raise pickle.UnpicklingError("an entry has no name")
        if not isinstance(tensor, _Tensor):
            raise pickle.UnpicklingError(f"entry {_quoted(name)} is no tensor")
        data = tensor.storage.data
        if data is None:
            raise EOFError
        strides = [s * data.itemsize for s in tensor.stride]
        most_bytes -= math.prod(tensor.shape) * data.itemsize
        if most_bytes < 0:
            raise pickle.UnpicklingError("its tensors are far larger than the file")
        if 0 in tensor.shape:
            arrays[name] = np.zeros(tensor.shape, data.dtype)
        else:
            view = np.lib.stride_tricks.as_strided(data[tensor.offset :], tensor.shape, strides, writeable=False)
            arrays[name] = np.array(view)
    return arrays


if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("f2pad_jax reads weights on little-endian machines only")
