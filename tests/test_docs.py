"""The code of the README, of every page of ``docs/`` and of the notebooks runs, and its command lines are understood."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import SIZE

import f2pad_jax
from f2pad_jax.commands import parser
from f2pad_jax.data import load_texture

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```", re.M | re.S)
INCLUDED = re.compile(r"^--8<--\n(.+)\n--8<--$", re.M)
MOST_NOT_RUN = 5


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.relative_to(ROOT).as_posix() for path in paths])


def blocks(path, *languages):
    """The code blocks of a page, as (code, line, reason not to run it)."""
    text = path.read_text()
    for found in BLOCK.finditer(text):
        if found["language"] in languages:
            code = INCLUDED.sub(lambda name: (ROOT / name[1]).read_text(), found["code"])
            yield code, text[: found.start("code")].count("\n") + 1, found["reason"]


def commands(path):
    """The command lines of a page that call f2pad."""
    for code, line, _ in blocks(path, "sh", "bash", "console"):
        for part in re.split(r"\n|&&", code.replace("\\\n", " ")):
            words = shlex.split(part.removeprefix("$ "), comments=True)
            if words[:1] == ["f2pad"]:
                yield words[1:], line


@pytest.fixture
def small(shallow_backbone, monkeypatch):
    """Whatever is loaded and fitted is small, and alike, so that all pages share programs: six images of 96 pixels."""

    def load(name, **options):
        return load_texture(name, **options | {"size": SIZE, "num_train": 6, "num_test": 3})

    def fit(method, images, backbone, **options):
        backbone = shallow_backbone if isinstance(backbone, str) else backbone
        return f2pad_jax.detectors.fit(
            method, images, backbone, **options | {"size": (SIZE, SIZE), "smallest_defect": None}
        )

    monkeypatch.setattr(f2pad_jax, "fit", fit)
    monkeypatch.setattr(f2pad_jax.data, "load_texture", load)


@pytest.fixture
def prelude(texture, detector, small, tmp_path, monkeypatch):
    """Names and folders that pages use without making them."""
    for folder, images in (("normal_images", texture.train), ("new_images", [test.image for test in texture.test])):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(images):
            PIL.Image.fromarray(np.asarray(image)).save(tmp_path / folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    images = np.stack([test.image for test in texture.test])
    return {"brick": texture, "detector": detector, "images": images, "image": images[0]}


@named([path for path in PAGES if any(reason is None for *_, reason in blocks(path, "python"))])
def test_blocks_of_a_page_run_in_order(path, prelude):
    names = {"__name__": path.stem} | prelude
    for code, line, reason in blocks(path, "python"):
        if reason is None:
            exec(compile("\n" * line + code, str(path), "exec"), names)


def test_few_blocks_are_not_run():
    reasons = {(path.name, line): reason for path in PAGES for _, line, reason in blocks(path, "python") if reason}
    assert len(reasons) <= MOST_NOT_RUN, reasons
    for path in PAGES:  # a block that is not run is Python all the same
        for code, line, _ in blocks(path, "python"):
            compile("\n" * line + code, str(path), "exec")


@named([path for path in PAGES if any(commands(path))])
def test_command_lines_are_understood(path):
    for words, line in commands(path):
        try:
            parser(words).parse_args(words)
        except SystemExit:
            pytest.fail(f"{path.name}, block at line {line}: f2pad {shlex.join(words)}")


def test_a_wrong_command_line_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```sh\npip install x && f2pad fit good/ --oout m  # comment\n```\n")
    ((words, _),) = commands(page)
    assert words == ["fit", "good/", "--oout", "m"]
    with pytest.raises(SystemExit):
        parser(words).parse_args(words)


@named(NOTEBOOKS)
def test_cells_of_a_notebook_run_in_order(path, small):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    names = {"__name__": path.stem}
    for i, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None, "outputs are made by the site's build"
            exec(compile("".join(cell["source"]), f"{path.name}, cell {i}", "exec"), names)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(
    "namespace", sorted(path.stem for path in (DOCS / "reference").glob("*.md") if path.stem != "index")
)
def test_every_public_name_is_in_the_reference(namespace):
    page = (DOCS / "reference" / f"{namespace}.md").read_text()
    if namespace != "f2pad_jax":
        assert f"::: f2pad_jax.{namespace}\n" in page
        return
    listed = re.findall(r"^::: f2pad_jax\.(\w+)$", page, re.M)
    modules = {path.stem for path in (DOCS / "reference").glob("*.md")} | {"progress", "__version__"}
    assert set(listed) == set(f2pad_jax.__all__) - modules
