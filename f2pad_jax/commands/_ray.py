"""Refinement in several processes or machines by Ray Data: one worker for each accelerator or group of cores."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from f2pad_jax.commands._archive import Record, Task
from f2pad_jax.commands._refine_files import Work, worker
from f2pad_jax.detectors.saving import load_detector
from f2pad_jax.errors import OptionError
from f2pad_jax.images.files import is_address

BATCH_SIZE = 16
"""Largest number of images in a worker's batch. If the worker fails, the whole batch is refined again."""


class Refiner:
    """A worker. It loads the detector once, and compiles each program once."""

    def __init__(self, model: Path, weights: list[Path] | None, out: Path, options: dict[str, Any]):
        self.work = worker(load_detector(model, weights=weights), out, **options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the records of the images at ``batch["path"]``, as JSON."""
        tasks = [(str(path), str(name)) for path, name in zip(batch["path"], batch["name"], strict=True)]
        return {"record": np.array([json.dumps(record) for record in self.work(tasks)])}


def ray_workers(
    model: Path,
    weights: list[Path] | None,
    out: Path,
    *,
    num_workers: int,
    options: dict[str, Any] | None = None,
) -> Work:
    """Returns a function that refines in Ray workers. ``RAY_ADDRESS`` names the cluster; default: this machine.

    If the cluster has GPUs, every worker has a GPU of its own. Otherwise every worker has an equal share of the cores. All
    workers must see the images, the model file and ``out``. If a worker dies, its images are refined again. The results
    equal the results of one process with as many threads as a worker has.

    Args:
        model: model file.
        weights: weight file of each network of the model; default: the installed ones of each machine.
        out: folder for the results.
        num_workers: number of workers.
        options: options of :func:`~f2pad_jax.commands._refine_files.worker`.

    Raises:
        OptionError: Ray is not installed, or ``num_workers`` is less than 1. The function raises it if the cluster is too
            small.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise OptionError("refining in several processes needs Ray; run: pip install 'f2pad-jax[ray]'") from None
    if num_workers < 1:
        raise OptionError(f"--ray: {num_workers} workers are too few; give at least 1")

    def work(tasks: Sequence[Task]) -> Iterator[Record]:
        if not tasks:
            return
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        resources = ray.cluster_resources()
        gpu = resources.get("GPU", 0) > 0
        cores_each = max(1, int(resources["CPU"]) // num_workers)
        needed, unit = (num_workers, "GPU") if gpu else (num_workers * cores_each, "CPU")
        if resources[unit] < needed:
            raise OptionError(f"{num_workers} workers need {needed} {unit}s; the cluster has {resources[unit]:.0f}")
        ray.data.DataContext.get_current().enable_progress_bars = False
        variables = {} if gpu else {"NPROC": str(cores_each)}  # number of XLA's threads
        if programs := jax.config.values["jax_compilation_cache_dir"]:
            variables["JAX_COMPILATION_CACHE_DIR"] = programs
        items = [{"path": _absolute(path), "name": name} for path, name in tasks]
        given = {item["path"]: str(path) for item, (path, _) in zip(items, tasks, strict=True)}
        records = ray.data.from_items(items, override_num_blocks=min(len(items), 4 * num_workers)).map_batches(
            Refiner,  # pyright: ignore[reportArgumentType]
            fn_constructor_args=(
                model.absolute(),
                weights and [file.absolute() for file in weights],
                out.absolute(),
                options or {},
            ),
            batch_size=min(BATCH_SIZE, -(-len(items) // num_workers)),
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            num_gpus=1 if gpu else 0,
            num_cpus=0 if gpu else cores_each,
            runtime_env={"env_vars": variables},
        )
        for row in records.iter_rows():
            record = json.loads(row["record"])
            yield record | {"image": given[record["image"]]}

    return work


def _absolute(path: Path | str) -> str:
    """Returns a path that does not depend on the folder a worker runs in."""
    return str(path) if is_address(path) else str(Path(path).absolute())
