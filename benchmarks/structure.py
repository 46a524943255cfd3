"""Structure of the package: imports between rooms, cycles, sizes and public names.

``python benchmarks/structure.py [PACKAGE]`` prints them for a folder of Python modules, by default ``f2pad_jax``. A room is
a folder, or a module of the top folder. An import is against the order if it goes from a room to one on its own line of
:data:`ORDER` or below. Only cycles are counted in a package with other rooms.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

ORDER = (
    ("errors",),
    ("progress", "_version", "_storage", "_timing", "_backend", "_cache"),
    ("images",),
    ("backbones",),
    ("data",),
    ("inpainting", "detectors"),
    ("objective",),
    ("solvers",),
    ("method",),
    ("streaming",),
    ("refinement", "regions"),
    ("batches", "tuning", "warmup"),
    ("evaluation",),
    ("commands",),
)
"""Rooms of the package, from the leaves upwards; a room imports from lines above its own."""


def modules(package: Path) -> dict[str, Path]:
    """Returns the files of a package by their dotted names below it; an ``__init__`` goes by its folder's name."""
    paths = {path.relative_to(package).with_suffix("").as_posix().replace("/", "."): path for path in package.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in paths.items()}


def imports(package: Path) -> Iterator[tuple[str, str]]:
    """Yields the pairs of modules (importing, imported) within a package, also of imports inside functions."""
    known = modules(package)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package.name:
                base = node.module.partition(".")[2]
                below = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
                targets = [full if full in known else base for full in below]
            elif isinstance(node, ast.Import):
                targets = [a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == package.name]
            yield from {(name, target) for target in targets if target in known and target != name}


def room(module: str) -> str:
    """Returns the room of a module: its folder, or itself in the top folder."""
    return module.partition(".")[0]


def cycles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """Returns the groups of names that import each other, directly or through others."""
    names = sorted({name for pair in pairs for name in pair})
    place = {name: i for i, name in enumerate(names)}
    if not names:
        return []
    rows, columns = zip(*((place[a], place[b]) for a, b in pairs), strict=True)
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(names), len(names)))
    count, labels = connected_components(graph, directed=True, connection="strong")
    groups = [[name for name, label in zip(names, labels, strict=True) if label == k] for k in range(count)]
    return [group for group in groups if len(group) > 1]


def against(pairs: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the imports from a room to one on its own line of :data:`ORDER` or below; the top ``__init__`` is free."""
    level = {name: k for k, line in enumerate(ORDER) for name in line}
    found = []
    for one, other in sorted(pairs):
        a, b = room(one), room(other)
        if one and a != b and level.get(b, len(ORDER)) >= level.get(a, len(ORDER) - 1):
            found.append((one, other))
    return found


def lines(path: Path) -> dict[str, int]:
    """Counts the lines of a file: all, docstrings, and code (no docstring, import, comment or blank line)."""
    text = path.read_text().splitlines()
    docs, imported = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno - 1, (node.end_lineno or node.lineno)))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= set(range(node.lineno - 1, (node.end_lineno or node.lineno)))
    code = [k for k, line in enumerate(text) if line.strip() and not line.strip().startswith("#")]
    return {"all": len(text), "docstrings": len(docs), "code": len(set(code) - docs - imported)}


def public_names(init: Path) -> list[str]:
    """Returns the public names of an ``__init__``: its ``__all__``, or else its imports of the form ``X as X``."""
    tree = ast.parse(init.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return [a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names if a.asname == a.name]


def main() -> None:
    """Prints the structure."""
    package = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "f2pad_jax").resolve()
    pairs, files = set(imports(package)), modules(package)
    rooms = {(room(a), room(b)) for a, b in pairs if a and room(a) != room(b)}
    counts = {name or "__init__": lines(path) for name, path in files.items()}
    total = {kind: sum(count[kind] for count in counts.values()) for kind in ("all", "code", "docstrings")}
    longest = max(counts, key=lambda name: counts[name]["all"])
    print(f"{len(files)} modules in {len({room(name) for name in files if name})} rooms")
    print(f"lines: {total['code']} of code, {total['docstrings']} of docstrings, {total['all']} in all")
    print(f"longest: {longest}, {counts[longest]['all']} lines")
    between = {(a, b) for a, b in pairs if a and room(a) != room(b)}
    print(f"{len(between)} imports between modules of different rooms, {len(rooms)} pairs of rooms")
    if {room(name) for name in files if name} <= {name for line in ORDER for name in line}:  # not of another package
        print(f"imports against the order: {len(against(pairs))}")
        for one, other in against(pairs):
            print(f"  {one} -> {other}")
    print(f"cycles of modules: {cycles({(a, b) for a, b in pairs if a and b}) or 'none'}")
    print(f"cycles of rooms: {cycles({(a, b) for a, b in rooms if b}) or 'none'}")
    for init in sorted(package.rglob("__init__.py")):
        if names := public_names(init):
            folder = ".".join((package.name, *init.parent.relative_to(package).parts))
            print(f"{folder}: {len(names)} public names: {' '.join(names)}")


if __name__ == "__main__":
    main()
