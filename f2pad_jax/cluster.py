"""Several machines or processes: images refined by Ray Data, one worker for each accelerator or group of cores."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from f2pad_jax.data.images import is_address
from f2pad_jax.errors import OptionError
from f2pad_jax.files import Task, Work, worker
from f2pad_jax.models import load_detector

IMAGES_A_CALL = 16
"""Images a worker is given at a time, which are what is done again where it fails."""


class Refiner:
    """A worker: the detector is loaded once, and programs are compiled once."""

    def __init__(self, model: Path, weights: Path | None, out: Path, options: dict[str, Any]):
        self.work = worker(load_detector(model, weights=weights), out, **options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Records, as JSON, of the images at ``batch["path"]``."""
        tasks = [(str(path), str(name)) for path, name in zip(batch["path"], batch["name"], strict=True)]
        return {"record": np.array([json.dumps(record) for record in self.work(tasks)])}


def ray_workers(
    model: Path,
    weights: Path | None,
    out: Path,
    *,
    num_workers: int,
    options: dict[str, Any] | None = None,
) -> Work:
    """Work on Ray: on the cluster that ``RAY_ADDRESS`` names, or else on this machine.

    Every worker has a GPU to itself where the cluster has any, else its share of the cores. Images (files, or in a bucket),
    the model and ``out`` lie where all workers see them. Images of a worker that dies are done again; the results are those
    of one process.

    Args:
        model: the model file.
        weights: its weight file; default: the one installed on each machine.
        out: folder for the results.
        num_workers: how many.
        options: of :func:`f2pad_jax.files.worker`.

    Raises:
        OptionError: Ray is not installed, or the cluster is too small.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise OptionError("this needs Ray; run: pip install 'f2pad-jax[ray]'") from None
    if num_workers < 1:
        raise OptionError(f"{num_workers} workers: at least 1 is needed")

    def work(tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        if not tasks:
            return
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        there = ray.cluster_resources()
        gpu = there.get("GPU", 0) > 0
        each = max(1, int(there["CPU"]) // num_workers)
        wanted, unit = (num_workers, "GPU") if gpu else (num_workers * each, "CPU")
        if there[unit] < wanted:
            raise OptionError(f"{num_workers} workers need {wanted} {unit}s; the cluster has {there[unit]:.0f}")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        variables = {} if gpu else {"NPROC": str(each)}  # XLA's threads
        if programs := jax.config.values["jax_compilation_cache_dir"]:
            variables["JAX_COMPILATION_CACHE_DIR"] = programs
        items = [{"path": _everywhere(path), "name": name} for path, name in tasks]
        given = {item["path"]: str(path) for item, (path, _) in zip(items, tasks, strict=True)}
        records = ray.data.from_items(items, override_num_blocks=min(len(items), 4 * num_workers)).map_batches(
            Refiner,  # pyright: ignore[reportArgumentType]
            fn_constructor_args=(model.absolute(), weights and weights.absolute(), out.absolute(), options or {}),
            batch_size=min(IMAGES_A_CALL, -(-len(items) // num_workers)),
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_gpus=1 if gpu else 0,
            num_cpus=0 if gpu else each,
            runtime_env={"env_vars": variables},
        )
        for row in records.iter_rows():
            record = json.loads(row["record"])
            yield record | {"image": given[record["image"]]}

    return work


def _everywhere(path: Path | str) -> str:
    """A path that doesn't depend on where a worker runs."""
    return str(path) if is_address(path) else str(Path(path).absolute())
