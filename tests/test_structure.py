"""The structure of the package, and its public names."""

import ast
import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest

import f2pad_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "f2pad_jax"
NAMESPACES = ["", *sorted(name for name in f2pad_jax.__all__ if inspect.ismodule(getattr(f2pad_jax, name)))]


@pytest.fixture(scope="module")
def structure():
    spec = importlib.util.spec_from_file_location("structure", ROOT / "benchmarks" / "structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_package(tmp_path):
    """A package of which one room imports from above, in a cycle."""
    for name, text in {
        "__init__": "from small.method.loop import run",
        "method/loop": "from small.images import pixels",
        "method/other": "import small.evaluation.runs",
        "images/pixels": "def f():\n    from small.method.other import g",
        "evaluation/runs": "",
        "errors": "",
    }.items():
        path = tmp_path / "small" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "small" / "images" / "__init__.py").write_text("")
    return tmp_path / "small"


def test_imports_against_the_order_and_cycles_are_seen(structure, small_package):
    pairs = set(structure.imports(small_package))
    assert ("method.loop", "images.pixels") in pairs and ("method.other", "evaluation.runs") in pairs
    assert structure.against(pairs) == [("images.pixels", "method.other"), ("method.other", "evaluation.runs")]
    rooms = {(structure.room(a), structure.room(b)) for a, b in pairs if a}
    assert structure.cycles(rooms - {("method", "method")}) == [["images", "method"]]
    assert structure.cycles({("a", "b"), ("b", "c")}) == []


def test_imports_go_one_way(structure):
    pairs = {(one, other) for one, other in structure.imports(PACKAGE) if one}
    assert structure.against(pairs) == []
    assert structure.cycles({(one, other) for one, other in pairs if other}) == []
    rooms = {structure.room(name) for name in structure.modules(PACKAGE) if name}
    assert rooms == {name for line in structure.ORDER for name in line}  # every room has its place


def test_no_file_is_too_long_to_read():
    assert {path: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) >= 400} == {}


def namespace(name):
    return importlib.import_module(f"f2pad_jax.{name}".removesuffix("."))


@pytest.mark.parametrize("name", NAMESPACES)
def test_public_names_are_there_and_in_order(name):
    module = namespace(name)
    assert module.__doc__ and len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)
    if Path(module.__file__).name == "__init__.py":  # nothing else looks public
        objects = {n for n in vars(module) if not n.startswith("_") and not inspect.ismodule(getattr(module, n))}
        assert objects <= {*module.__all__}


def public_objects():
    for name in NAMESPACES:
        module = namespace(name)
        for public in module.__all__:
            yield f"{name}.{public}", getattr(module, public)


def test_everything_public_is_documented():
    bare = []
    for name, value in public_objects():
        if inspect.isclass(value) or inspect.isfunction(value):
            bare += [name] * (not value.__doc__)
        if inspect.isclass(value):
            own = {k: v for k, v in vars(value).items() if not k.startswith("_") and k not in ("fit", "count", "index")}
            members = {k: getattr(v, "fget", None) or v for k, v in own.items()}
            bare += [
                f"{name}.{k}" for k, v in members.items() if inspect.isfunction(v) and not inspect.getdoc(getattr(value, k))
            ]
    assert bare == []


def test_options_of_public_functions_are_keyword_only():
    loose = [
        f"{name}({parameter.name})"
        for name, value in public_objects()
        if inspect.isfunction(value)
        for parameter in inspect.signature(value).parameters.values()
        if parameter.default is not parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
    ]
    assert loose == []


def test_modules_without_a_public_name_begin_with_an_underscore():
    """Commands are public by what a user types."""
    public = {name.rpartition(".")[2] for name, _ in public_objects()}
    quiet = []
    for path in PACKAGE.rglob("*.py"):
        name = path.stem
        if name.startswith("_") or path.parent.name == "commands" or name in public:
            continue
        targets = [getattr(node, "targets", [getattr(node, "target", node)]) for node in ast.parse(path.read_text()).body]
        nodes = [node for several in targets for target in several for node in ast.walk(target)]
        if not public & {getattr(node, "id", getattr(node, "name", None)) for node in nodes}:
            quiet.append(path.relative_to(PACKAGE).as_posix())
    assert quiet == []


def test_no_function_hides_its_module():
    """``f2pad_jax.refine`` is a function, and no module of this name lies beneath."""
    hidden = []
    for name in NAMESPACES:
        folder = PACKAGE / name if name else PACKAGE
        for public in namespace(name).__all__ if folder.is_dir() else ():
            value = getattr(namespace(name), public)
            if not inspect.ismodule(value) and ((folder / f"{public}.py").exists() or (folder / public).is_dir()):
                hidden.append(f"{name}.{public}")
    assert hidden == []
