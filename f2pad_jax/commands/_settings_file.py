"""Settings in a TOML file: ``f2pad refine --config FILE`` reads one, and every run writes its own."""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx

from f2pad_jax._storage import regular
from f2pad_jax.errors import OptionError
from f2pad_jax.method.decision import Mixture, Residual
from f2pad_jax.method.settings import Settings
from f2pad_jax.objective.penalties import L0, L1, MCP, Log
from f2pad_jax.solvers.base import Stopping
from f2pad_jax.solvers.descent import Descent
from f2pad_jax.solvers.proximal import Proximal
from f2pad_jax.solvers.sharing import Sharing

PARTS = {
    "penalty": (Log, L1, L0, MCP),
    "solver": (Descent, Proximal),
    "decision": (Mixture, Residual),
    "sharing": (Sharing,),
    "stopping": (Stopping,),
}
"""Classes that a table of the file may name as its ``class``, by the name of the table."""
PRESETS = {"normal": Settings, "fast": Settings.fast, "paper": Settings.paper}
"""Settings from which a file may start, as its ``preset``."""
NONE = "none"
"""Value of an absent constant."""


def read_settings(path: Path) -> Settings:
    """Reads settings; constants that the file does not name keep the values of its preset.

    Raises:
        OptionError: the file is missing or no TOML, or it has an unknown constant, a wrong type, or an unknown class.
    """
    try:
        table = tomllib.loads(regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a whole number of 4300 digits is a ValueError
        raise OptionError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    preset = table.pop("preset", "normal")
    try:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise OptionError(f"no preset '{preset}'; there are {', '.join(PRESETS)}")
        return _changed(PRESETS[preset](), table)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


def as_toml(settings: Settings) -> str:
    """Returns every constant as TOML, from which :func:`read_settings` makes equal settings."""
    return "\n".join(_lines(settings, "")) + "\n"


def _changed(value: Any, table: dict[str, Any], place: str = "") -> Any:
    """Returns a module with the constants of a table."""
    fields = {field.name: field for field in dataclasses.fields(value)}
    known = [name for name in fields if _fits_a_file(getattr(value, name)) or name in PARTS]
    changes = {}
    for name, new in table.items():
        where = f"{place}{name}"
        if name not in known:
            raise OptionError(f"no constant '{where}'; there are {', '.join(known)}")
        kind = fields[name].type
        kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
        if isinstance(new, dict) and name in PARTS:
            changes[name] = _part(name, getattr(value, name), dict(new), where)
        else:
            changes[name] = _constant(new, kinds, where)
    return dataclasses.replace(value, **changes)


def _part(name: str, old: Any, table: dict[str, Any], where: str) -> Any:
    """Returns the module of a table: the old one with changes, or one of the class that the table names."""
    classes = {cls.__name__: cls for cls in PARTS[name]}
    chosen = table.pop("class", type(old).__name__ if isinstance(old, eqx.Module) else next(iter(classes)))
    if not isinstance(chosen, str) or chosen not in classes:
        raise OptionError(f"{where}: no class '{chosen}'; there are {', '.join(classes)}")
    return _changed(old if type(old) is classes[chosen] else classes[chosen](), table, f"{where}.")


def _constant(new: Any, kinds: Sequence[Any], where: str) -> Any:
    """Returns a value of the file as one of the types of its field."""
    match new:
        case "none" if type(None) in kinds:
            return None
        case bool() if bool in kinds:
            return new
        case int() if not isinstance(new, bool) and int in kinds and 0 <= new < 2**31:
            return new
        case int() | float() if not isinstance(new, bool) and float in kinds and _is_number(new):
            return float(new)
        case list():
            for kind in (kind for kind in kinds if typing.get_origin(kind) is tuple):
                if len(new) == len(typing.get_args(kind)) and all(map(_is_number, new)):
                    return tuple(map(float, new))
    expected = " or ".join(_NAMES.get(kind, "a table") for kind in kinds if _named(kind)) or "a list of this length"
    raise OptionError(f"{where}: {new!r} is not {expected}")


def _is_number(value: Any) -> bool:
    """Returns whether a value of the file is a number that 64 bits hold; NaN is none, infinity is one."""
    if type(value) is float:
        return not math.isnan(value)
    return type(value) is int and abs(value) < 2**63


_NAMES = {bool: "true or false", int: "a whole number of at least 0", float: "a number", type(None): '"none"'}


def _named(kind: Any) -> bool:
    """Returns whether a type of a field has a form in the file: arrays have none."""
    return kind in _NAMES or (isinstance(kind, type) and issubclass(kind, eqx.Module))


def _fits_a_file(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, tuple, eqx.Module))


def _lines(value: Any, place: str) -> list[str]:
    """Returns the constants of a module, first its numbers, then a table for each module in it."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    parts = {name: part for name, part in fields.items() if isinstance(part, eqx.Module)}
    lines = [f"{name} = {_written(v)}" for name, v in fields.items() if name not in parts and _fits_a_file(v)]
    for name, part in parts.items():
        lines += ["", f"[{place}{name}]", f'class = "{type(part).__name__}"', *_lines(part, f"{place}{name}.")]
    return lines


def _written(value: Any) -> str:
    match value:
        case None:
            return f'"{NONE}"'
        case bool():
            return str(value).lower()
        case tuple():
            return f"[{', '.join(map(_written, value))}]"
    return repr(value)
