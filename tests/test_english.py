"""The docstrings of the package, as far as a rule can be checked: see "English" in CONTRIBUTING.md."""

import ast
import itertools
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "f2pad_jax"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MOST_WORDS = 25
VAGUE = re.compile(r"\b(those|what|the same)\b", re.IGNORECASE)


def docstrings(source):
    """Yields (name, kind, text) of every module, class, function, property, constant and field that has a docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            decorators = [getattr(d, "id", getattr(d, "attr", "")) for d in getattr(node, "decorator_list", [])]
            kind = "property" if "property" in decorators else type(node).__name__
            yield getattr(node, "name", "module"), kind, text
        for one, other in itertools.pairwise(node.body if isinstance(node, (ast.Module, ast.ClassDef)) else ()):
            text = getattr(getattr(other, "value", None), "value", None) if isinstance(other, ast.Expr) else None
            if isinstance(one, (ast.Assign, ast.AnnAssign)) and isinstance(text, str):
                yield ast.unparse(getattr(one, "target", None) or one.targets[0]), "field", text


def sentences(text):
    """The sentences and clauses of a docstring, code and formulas as one word each."""
    text = re.sub(r"\.\. math::\n(.*\n?)*", "", text)
    text = re.sub(r"``[^`]*``|:\w+:`[^`]*`", "X", text)
    for paragraph in re.split(r"\n\s*\n|\n\s*(?=[\w*]+(?: \([^)]*\))?: )|(?:Args|Raises|Returns|Yields):", text):
        yield from re.split(r"(?<=[.;:!?])\s+(?=[A-Z0-9])|[;:]\s", " ".join(paragraph.split()))


def faults(source):
    """What in a file's docstrings breaks the rules."""
    found = []
    for name, kind, text in docstrings(source):
        first = text.split()[0]
        if kind == "FunctionDef" and not re.fullmatch(r"[A-Z][a-z]+s", first):
            found.append(f"{name}: begins with '{first}', not with a verb in the third person")
        if kind in ("ClassDef", "field", "property") and first in ("Returns", "Gives", "Finds", "Holds"):
            found.append(f"{name}: begins with '{first}', not with a noun")
        for sentence in sentences(text):
            if len(sentence.split()) > MOST_WORDS:
                found.append(f"{name}: {len(sentence.split())} words: {sentence}")
            if vague := VAGUE.search(sentence):
                found.append(f"{name}: '{vague[0]}' in: {sentence}")
    return found


def test_faults_are_seen():
    long = " ".join(["word"] * 26)
    source = f'''
def f():
    """What it has come to."""

class A:
    """Returns nothing."""
    x: int
    """{long}."""
    y: int
    """Number of steps, ``{long}``."""
'''
    assert [fault.split(":")[0] for fault in faults(source)] == ["f", "f", "A", "x"]


@pytest.mark.parametrize("file", FILES)
def test_docstrings_are_plain(file):
    assert faults((PACKAGE / file).read_text()) == []
