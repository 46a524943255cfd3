"""``f2pad drift``: whether good images of late have the scores of the normal images of the fit."""

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from f2pad_jax._storage import file_sha256, write_atomically
from f2pad_jax.commands._console import add_model_weights, at_least
from f2pad_jax.commands._settings_file import read_settings
from f2pad_jax.detectors.saving import load_detector
from f2pad_jax.errors import ModelError, RunError
from f2pad_jax.evaluation._charts import histogram, line_chart

LEVEL = 0.01
"""Probability that images without drift are reported as drift."""
MOST = 0.5
"""Share of marked images above which the images have drifted, whatever the scores of the others are."""
RUN = 20
"""Number of consecutive images of each median in the chart."""


class Drift(NamedTuple):
    """Comparison of the scores of late images with the scores of normal images."""

    shift: float
    """p-value of the test that good images of late do not score higher than normal images (Mann & Whitney 1947)."""
    higher: float
    """Share of pairs of a good image of late and a normal image in which the late one scores higher; 0.5 without drift."""
    trend: float
    """p-value of the test that the scores of the good images do not rise with time (Kendall 1938)."""
    marked: float
    """Share of all late images that are marked."""

    @property
    def found(self) -> bool:
        """Whether there is drift. Each of both tests has half of :data:`LEVEL`."""
        return min(self.shift, self.trend) <= LEVEL / 2 or self.marked > MOST


def compared(normal: Float[np.ndarray, " n"], late: Float[np.ndarray, " m"]) -> Drift:
    """Compares scores, in units of the limit.

    Only scores up to the limit count, on both sides: real defects among the late images are then no drift. Without drift,
    both samples have one distribution. Only higher scores are drift: a change of light, focus or material lifts them.

    Args:
        normal: scores of the normal images of the fit.
        late: scores of the late images, oldest first.
    """
    from scipy.stats import kendalltau, mannwhitneyu  # takes half a second to import

    good, usual = late[late <= 1], normal[normal <= 1]
    if min(len(good), len(usual)) < 2:
        return Drift(1.0, 0.5, 1.0, float(np.mean(late > 1)))
    test: Any = mannwhitneyu(good, usual, alternative="greater")
    rising: Any = kendalltau(np.arange(len(good)), good, alternative="greater")
    trend = 1.0 if np.isnan(rising.pvalue) else float(rising.pvalue)  # all scores are equal
    return Drift(float(test.pvalue), float(test.statistic) / (len(good) * len(usual)), trend, float(np.mean(late > 1)))


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="model file that gave the results")
    text = "output folders of 'f2pad refine', or the file results.jsonl or results.json in one, oldest first"
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help=text)
    text = "number of images, the last ones (default: %(default)s)"
    parser.add_argument("--last", type=at_least(2), default=200, metavar="N", help=text)
    parser.add_argument("--out", type=Path, metavar="FILE", help="page with two charts to write, such as drift.html")
    parser.add_argument("--fail-on-drift", action="store_true", help="exit with status 1 if there is drift")
    add_model_weights(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the comparison, and draws it; the exit status is 1 if there is drift and ``--fail-on-drift`` is given."""
    checksum, scores, rates = file_sha256(arguments.model), [], set()
    for source in arguments.results:
        file = source / "results.jsonl" if source.is_dir() else source
        recipe, records = read_results(file)
        if recipe.get("sha256") != checksum:
            raise RunError(f"{file}: results of another model; give the model that refined these images")
        scores += [record["score"] for record in records if record["p_value"] is not None]
        rates.add(read_settings(file.with_name("settings.toml")).false_alarms)
    if len(rates) > 1:
        raise RunError(f"the results have several false-alarm rates: {', '.join(map(str, sorted(rates)))}; give one folder")
    detector, late = load_detector(arguments.model, weights=arguments.weights), np.asarray(scores[-arguments.last :])
    normality = detector.calibrated.normality
    if normality is None or not len(late):
        raise ModelError(f"{arguments.model}: no scores of normal images, or no score in the results; nothing to compare")
    normal = np.asarray(detector.in_units(normality.scores, rates.copy().pop()), float)
    drift = compared(normal, late)
    text = described(drift, len(normal), len(late), rates.pop())
    print(text)
    if arguments.out is not None:
        write_atomically(arguments.out, page(text, normal, late))
    return int(arguments.fail_on_drift and drift.found)


def read_results(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads the results of ``f2pad refine``; returns the recipe, and the last record of each image in their order.

    Raises:
        RunError: the file is missing or holds no such results.
    """
    try:
        text = file.read_text()
        if file.suffix != ".jsonl":
            content = json.loads(text)
            return content, content["images"]
        lines = text.splitlines()
        last = lines[-1:] if text.endswith("\n") else []  # a run that is going on, or was stopped, in its last line
        recipe, *rest = (json.loads(line) for line in [*lines[:-1], *last])
        records: dict[str, dict[str, Any]] = {}
        for record in rest:
            if "name" in record:
                records.pop(record["name"], None)
                records[record["name"]] = record
        return recipe["recipe"], list(records.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: no results of 'f2pad refine' ({error})") from None


def described(drift: Drift, num_normal: int, num_late: int, false_alarms: float) -> str:
    """Describes the comparison in a line."""
    shifted, rising = drift.shift <= LEVEL / 2, drift.trend <= LEVEL / 2
    return (
        f"{'drift' if drift.found else 'no drift'}: of the last {num_late} images, the good ones score "
        f"{'higher than' if shifted else 'like'} the {num_normal} normal images (p = {drift.shift:.2g}; higher in "
        f"{100 * drift.higher:.0f} % of all pairs), and their scores {'rise' if rising else 'do not rise'} with time "
        f"(p = {drift.trend:.2g}); {100 * drift.marked:.3g} % of the images are defective, {100 * false_alarms:g} % "
        "would be false alarms"
    )


def page(text: str, normal: Sequence[float] | np.ndarray, late: Sequence[float] | np.ndarray) -> bytes:
    """Draws the distributions of the scores, and their medians over time."""
    medians = [float(np.median(late[max(0, k - RUN + 1) : k + 1])) for k in range(len(late))]
    values = {"normal images": np.asarray(normal).tolist(), "last images": np.asarray(late).tolist()}
    charts = [
        histogram("image scores; above 1: defective", values),
        line_chart(f"median score of {RUN} images", {"last images": medians}, x="image", y="score"),
    ]
    body = f"<title>Drift</title>\n<p>{html.escape(text)}</p>\n" + "\n".join(charts)
    return f'<!doctype html>\n<meta charset="utf-8">\n{body}\n'.encode()
