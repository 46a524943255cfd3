"""Results of an evaluation on disk: one file for each image, and the curves of a few images."""

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from f2pad_jax._storage import regular, write_atomically
from f2pad_jax.data.mvtec import Sample
from f2pad_jax.errors import RunError
from f2pad_jax.evaluation.cases import FULL
from f2pad_jax.method.algorithm import Refined

CURVES = "curves.json"
"""Name of the file that :func:`save_curves` writes."""
SHARED_BY_VARIANTS = ("image", "truth", "coarse_map", "coarse_mask", "region", "normal")
"""Arrays of an image that are kept once for all variants."""

Curves = dict[str, list[float]]
"""Value of Eq. (12) and of each of its terms before every step, by name."""


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """Results for one test image, at the detector's size."""

    name: str
    """Name of the sample: ``KIND/STEM``."""
    image: UInt8[np.ndarray, "h w 3"]
    """Input."""
    truth: Bool[np.ndarray, "h w"]
    """Ground truth."""
    coarse_map: Float[np.ndarray, "h w"]
    """Anomaly map of the detector."""
    coarse_mask: Bool[np.ndarray, "h w"]
    """Coarse mask m0."""
    region: Bool[np.ndarray, "h w"]
    """Suspect region."""
    score: float
    """Score of the image; it is called defective if the score exceeds 1."""
    p_value: float
    """Probability that a normal image has this score or a higher one."""
    normal: UInt8[np.ndarray, "h w 3"]
    """Restored image."""
    steps: dict[str, int]
    """Number of steps of each variant."""
    seconds: dict[str, float]
    """Time of each variant, without compilation."""
    probability: dict[str, Float[np.ndarray, "h w"]]
    """Probability of an anomaly, by variant."""

    @functools.cached_property
    def masks(self) -> dict[str, Bool[np.ndarray, "h w"]]:
        """Returns the refined mask of each variant."""
        return {variant: values > 0.5 for variant, values in self.probability.items()}

    @property
    def marked(self) -> bool:
        """Whether the verdict is defective."""
        return self.score > 1

    @property
    def good(self) -> bool:
        """Whether the image has no defect."""
        return not self.truth.any()


def _file(folder: Path, name: str) -> Path:
    """Returns the file of an image's results, by the folder of its case and the name of its sample."""
    return folder / "images" / f"{name}.npz"


def stored_variants(folder: Path, sample: Sample) -> list[str]:
    """Returns the variants of an image that have results on disk."""
    path = _file(folder, sample.name)
    if not path.exists():
        return []
    with _reading(path), np.load(regular(path)) as arrays:
        return _variants(arrays.files)


def save_image(
    result: Refined,
    sample: Sample,
    folder: Path,
    variant: str,
    seconds: float,
    ignored: Bool[Array | np.ndarray, "h w"] | None = None,
) -> None:
    """Writes the results of one variant for an image, beside the results of the other variants.

    Args:
        result: result of the refinement.
        sample: test image.
        folder: folder of the case.
        variant: :data:`~f2pad_jax.evaluation.cases.FULL` or an ablation.
        seconds: time since the end of the previous image.
        ignored: pixels that do not count, and belong to no ground truth.
    """
    path, arrays = _file(folder, sample.name), {}
    if path.exists():
        with _reading(path), np.load(path) as file:
            arrays = dict(file)
    if variant == FULL or not arrays:
        arrays |= {
            "image": np.rint((result.normal + result.anomaly) * 255).astype(np.uint8),
            "truth": sample.truth((result.mask.shape[0], result.mask.shape[1])) & (ignored is None or ~np.asarray(ignored)),
            "coarse_map": result.coarse_map,
            "coarse_mask": result.coarse_mask,
            "region": result.region,
            "score": np.float64(result.score),
            "p_value": np.float64(result.p_value),
            "normal": np.rint(result.normal * 255).astype(np.uint8),
        }
    arrays |= {f"steps {variant}": result.steps, f"seconds {variant}": np.float64(seconds)}
    arrays |= {f"probability {variant}": result.probability}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def load_images(folder: Path) -> list[ImageResult]:
    """Returns the results for the images of a case, in the order of its samples, without images not refined yet."""
    results = []
    for name in read_case(folder)["samples"]:
        path = _file(folder, name)
        if not path.exists():
            continue
        with _reading(path), np.load(regular(path)) as arrays:
            variants = _variants(arrays.files)
            results.append(
                ImageResult(
                    name=name,
                    **{key: arrays[key] for key in SHARED_BY_VARIANTS},
                    score=float(arrays["score"]),
                    p_value=float(arrays["p_value"]),
                    steps={v: int(arrays[f"steps {v}"]) for v in variants},
                    seconds={v: float(arrays[f"seconds {v}"]) for v in variants},
                    probability={v: arrays[f"probability {v}"] for v in variants},
                )
            )
    return results


def unusable_images(out: Path) -> list[str]:
    """Returns the errors of the images of all cases that can't be used, each once."""
    cases = [read_case(file.parent) for file in sorted((out / "runs").glob("*/case.json"))]
    return list(dict.fromkeys(error for case in cases for error in case.get("unusable", [])))


def save_curves(folder: Path, curves: Mapping[str, Curves]) -> None:
    """Writes the curves of some images of a case, by the names of their samples."""
    write_atomically(folder / CURVES, json.dumps(curves).encode())


def load_curves(folder: Path) -> dict[str, Curves]:
    """Returns the curves of a case by the names of its samples; empty where none were kept."""
    path = folder / CURVES
    return read_record(path) if path.exists() else {}


def read_case(folder: Path) -> dict[str, Any]:
    """Returns the record of a case, ``case.json``.

    Raises:
        RunError: the file is damaged.
    """
    record = read_record(folder / "case.json")
    with _reading(folder / "case.json"):
        [_file(folder, name) for name in record["samples"]]
    return record


def read_record(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file of a run.

    Raises:
        RunError: the file is damaged.
    """
    with _reading(path):
        if isinstance(record := json.loads(regular(path).read_bytes()), dict):
            return record
        raise ValueError


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns every error of reading a file of a run into a RunError: NumPy, zipfile and JSON raise errors of many kinds."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise RunError(f"{path}: damaged ({reason}); delete it, and run the evaluation again") from None


def _variants(names: Iterable[str]) -> list[str]:
    return [name.removeprefix("probability ") for name in names if name.startswith("probability ")]
