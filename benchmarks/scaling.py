"""One process, two devices, two Ray workers: ``python benchmarks/scaling.py FOLDER [--weights FILE] [--images N]``.

FOLDER is in MVTec layout. A PatchCore is fitted to it, and ``f2pad refine`` runs on images of ``test``, the defective ones
first. It runs in one process, which has all cores; in one process to which XLA shows two CPU devices; in one process with
half the threads; and in two ``--ray`` workers, which have half the threads each. Each way runs once to compile, with a
cache on disk, and once more from a fresh process. A line gives the seconds of the second run from images to files. They
contain starting the workers and loading programs, but not loading the model. Then it gives images per second. For each way
before, it gives the number of masks that differ, and their mean IoU.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from fitted import command_line, defective_first, fitted

import f2pad_jax
from f2pad_jax.images import read_image
from f2pad_jax.images.metrics import iou

HALF = str(max(1, (os.cpu_count() or 1) // 2))
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "one process": ([], {}),
    "two devices": ([], {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}),
    "half the threads": ([], {"NPROC": HALF}),
    "two Ray workers": (["--ray", "2"], {}),
}
"""Options and environment variables added to the command, by the name of the way."""


def main() -> None:
    """Fits a detector, refines every way, and prints a line for each."""
    parser = command_line(__doc__, images=24)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    category, detector = fitted(arguments.folder, arguments)
    defective, good = defective_first(category, arguments.images)
    print(
        f"JAX {jax.__version__}, {os.cpu_count()} cores; {len(defective)} images with a defect, {len(good)} without",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        f2pad_jax.save_detector(temporary / "detector.model", detector)
        weights = ["--weights", arguments.weights] if arguments.weights else []
        masks: dict[str, list[np.ndarray]] = {}
        for way, (options, added) in WAYS.items():
            for turn in range(2):
                out = temporary / f"{way} {turn}"
                command = [sys.executable, "-m", "f2pad_jax.commands", "refine", str(temporary / "detector.model")]
                command += [*(str(sample.path) for sample in defective + good), "--out", str(out), *weights, *options]
                variables = {
                    "JAX_COMPILATION_CACHE_DIR": str(temporary / "programs"),
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    **added,
                }
                if "XLA_FLAGS" in added and (flags := os.environ.get("XLA_FLAGS")):
                    variables["XLA_FLAGS"] += f" {flags}"
                subprocess.run(command, check=True, env=os.environ | variables, stdout=subprocess.DEVNULL)
            results = json.loads((out / "results.json").read_text())
            found = [read_image(out / image["mask"]) > 0 for image in results["images"]]
            line = f"{way:16} {results['seconds']:6.1f} s, {len(found) / results['seconds']:.3f} images/s"
            for other, before in masks.items():
                agree = [iou(a, b) for a, b in zip(found, before, strict=True)]
                line += f"; {sum(one < 1 for one in agree)} masks differ from {other}'s, mean IoU {np.mean(agree):.4f}"
            print(line, flush=True)
            masks[way] = found


if __name__ == "__main__":
    main()
