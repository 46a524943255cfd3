"""A few of the bad files that ``benchmarks/reliability.py`` makes: each is refused in a line, or read rightly."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest

KINDS = {"images": 55, "masks": 30, "maps": 45, "settings": 20, "manifests": 20, "folders": 35}
"""Kinds of files that need no detector, and the least number of them. Others are in test_cli.py and test_saving.py."""


@pytest.fixture(scope="module")
def script():
    """The module ``benchmarks/reliability.py``. Its folder comes last, since ``anomalib.py`` there would hide a package."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.append(folder)
    yield importlib.import_module("reliability")
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def bench(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reliability")
    return script.Bench(folder, folder / "no.model")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow names damage before it refuses the file
@pytest.mark.parametrize("kind", KINDS)
def test_no_bad_file_does_harm(script, bench, kind):
    found = list(script.inputs(bench, 0, 1, whole=False, kinds=[kind]))
    goods = script.good_results(bench, found)[kind]
    outcomes = [(bad, *script.outcome(bench, bad, goods, checked)) for bad, checked in found]
    assert [found for found in outcomes if found[1] not in ("refused", "read rightly")] == []
    counts = Counter(result for _, result, _ in outcomes)
    assert counts.total() >= KINDS[kind] and all(counts[name] for name in ("refused", "read rightly"))
    assert kind in script.table(outcomes)
