"""The files of a release: source archive, wheel, and the places that repeat its version and its dependencies."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import SIZE

from f2pad_jax import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def build(source, target, folder):
    """Returns the archive that the build backend makes of a source folder."""
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder), cwd=source)
    (archive,) = folder.iterdir()
    return archive


def run(*command, cwd, **environment):
    """Runs a command and returns what it printed; its error output shows if it fails."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, text=True, capture_output=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive of this checkout, and the wheel that is built from the unpacked archive."""
    folder = tmp_path_factory.mktemp("release")
    sdist = build(ROOT, "sdist", folder / "sdist")
    shutil.unpack_archive(sdist, folder / "source")  # Python before 3.11.4 has no extractall(filter=)
    (source,) = (folder / "source").iterdir()
    return sdist, build(source, "wheel", folder / "wheel")


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """A folder with the installed wheel, without its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", str(folder))
    run(sys.executable, "-m", "pip", "install", "-q", *options, str(archives[1]), cwd=folder)
    return folder


def test_the_wheel_from_the_source_archive_holds_the_package_and_nothing_else(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
        metadata = f"f2pad_jax-{__version__}.dist-info"
        assert f"Version: {__version__}\n" in wheel.read(f"{metadata}/METADATA").decode()
        assert json.loads(wheel.read("f2pad_jax/manifest.json")) == json.loads(
            (ROOT / "checkpoints" / "manifest.json").read_text("utf-8")
        )
    files = {name for name in names if name.startswith("f2pad_jax/")} - {"f2pad_jax/manifest.json"}
    package = {path for path in (ROOT / "f2pad_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files == {path.relative_to(ROOT).as_posix() for path in package}
    assert {Path(name).suffix for name in files} == {".py", ".pyi", ".html", ".typed"}
    others = {f"{metadata}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names - files - {"f2pad_jax/manifest.json"} == others


def test_the_source_archive_holds_the_tests_and_no_weights(archives):
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "SECURITY.md", "tests/conftest.py", "packaging/conda/recipe.yaml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".safetensors", ".model"))]


def test_the_installed_wheel_marks_a_defect_far_from_the_checkout(installed, texture, tmp_path):
    (tmp_path / "normal").mkdir()
    for i, image in enumerate(texture.train[:5]):
        PIL.Image.fromarray(image).save(tmp_path / "normal" / f"{i}.png")
    PIL.Image.fromarray(texture.test[0].image).save(tmp_path / "part.png")

    def python(*arguments):
        """Runs Python in another folder, where the installed package comes before an editable one."""
        place = {"PYTHONPATH": str(installed), "F2PAD_CACHE": str(tmp_path / "cache")}
        return run(sys.executable, *arguments, cwd=tmp_path, **place)

    used = python("-c", "import f2pad_jax.commands; print(f2pad_jax.__version__, f2pad_jax.commands.__file__)")
    assert used.split() == [__version__, str(installed / "f2pad_jax" / "commands" / "__init__.py")]
    command = ("-m", "f2pad_jax.commands")
    python(*command, "fit", "normal", "--out", "part.model", "--size", str(SIZE), "--layers", "stage2", "stage3")
    assert (tmp_path / "cache" / "efficientnet-lite0.safetensors").exists(), "converted from the weights' package"
    python(*command, "refine", "part.model", "part.png", "--out", "out")
    mask = np.asarray(PIL.Image.open(tmp_path / "out" / "part_mask.png")) > 0
    truth = texture.test[0].mask
    assert mask.shape == truth.shape and (mask & truth).sum() > 0.5 * (mask | truth).sum()


def test_the_version_is_repeated_right():
    """Other files need the version without running Python."""
    patterns = {"CITATION.cff": r"^version: (.*)$", "packaging/conda/recipe.yaml": r'^  version: "(.*)"$'}
    for file, pattern in patterns.items():
        assert re.findall(pattern, (ROOT / file).read_text("utf-8"), re.MULTILINE) == [__version__], file


def test_the_conda_recipe_has_the_dependencies_of_the_project():
    recipe = (ROOT / "packaging" / "conda" / "recipe.yaml").read_text("utf-8")
    needs = re.findall(r"^    - (\S+) (>=[\d.]+)$", recipe.partition("  run:")[2].partition("\ntests:")[0], re.MULTILINE)
    assert [name.replace("_", "-") + bound for name, bound in needs] == PROJECT["dependencies"]
    assert f'python_min: "{PROJECT["requires-python"].removeprefix(">=")}"' in recipe
    (entry,) = PROJECT["scripts"].items()
    assert f"      - {' = '.join(entry)}\n" in recipe
