"""Processes that are killed at any moment, and disks, caches and networks that fail: the second part of ``reliability.py``.

A job is a command with a new output. It runs undisturbed first. Later runs are killed (SIGKILL) at moments drawn over the
whole time of the undisturbed run. The same command then goes on, and its results must be those of the undisturbed run: all
arrays and tables, without the seconds in them. A full disk is a tmpfs, a read-only cache is a mount that is read-only: root
may write to any other folder. Without the right to mount, these lines say that they did not run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from f2pad_jax._storage import read_safetensors

SIZE = 64


class Job(NamedTuple):
    """A command, and the results that count."""

    words: list[str]
    """Words of the command, without ``--out``."""
    results: Callable[[Path], Any]
    """Function that returns the results in an output folder or file, in a form that can be compared."""


def of_model(path: Path) -> Any:
    tensors, texts = read_safetensors(path)
    return texts, {name: (value.shape, value.tobytes()) for name, value in tensors.items()}


def of_refine(out: Path) -> Any:
    pictures = {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.png"))}
    tables = [(out / name).read_text() for name in ("results.csv", "regions.csv", "settings.toml")]
    return pictures, tables, json.loads((out / "results.json").read_text())["images"]


def of_evaluate(out: Path) -> Any:
    records = json.loads((out / "results.json").read_text())
    arrays = {}
    for file in sorted(out.rglob("*.npz")):
        with np.load(file) as found:
            arrays[str(file.relative_to(out))] = {n: found[n].tobytes() for n in found.files if not n.startswith("seconds")}
    models = {str(file.relative_to(out)): of_model(file) for file in sorted(out.rglob("*.model"))}
    # repr, since NaN differs from itself
    return repr([{k: v for k, v in record.items() if k != "seconds_per_image"} for record in records]), arrays, models


def jobs(folder: Path) -> dict[str, Job]:
    """Makes the inputs and returns the jobs. A new command is one entry here."""
    from f2pad_jax.data import load_texture
    from f2pad_jax.images import write_png

    texture = load_texture("brick", size=SIZE, num_train=6, num_test=4)
    train, test = folder / "data" / "brick" / "train" / "good", folder / "data" / "brick" / "test"
    for k, image in enumerate(texture.train):
        write_png(train / f"{k}.png", image)
    write_png(test / "good" / "0.png", texture.train[0])
    for k, defect in enumerate(texture.test):
        write_png(test / "spot" / f"{k}.png", np.asarray(defect.image))
        write_png(folder / "data" / "brick" / "ground_truth" / "spot" / f"{k}_mask.png", defect.mask)
    fit = [str(train), "--size", str(SIZE), "--layers", "stage2", "stage3"]
    flow = ["--method", "cflow", "--option", "meta_epochs=6", "sub_epochs=1", "num_blocks=2"]
    model = folder / "fit" / "out"
    return {
        "fit": Job(["fit", *fit], of_model),
        "fit (CFLOW-AD)": Job(["fit", *fit, *flow], of_model),
        "tune": Job(["tune", *fit], of_model),
        "refine": Job(["refine", str(model), str(test)], of_refine),
        "evaluate": Job(["evaluate", str(folder / "data"), "--protocol", "real", "--size", str(SIZE)], of_evaluate),
    }


def command(job: Job, out: Path) -> list[str]:
    return [sys.executable, "-m", "f2pad_jax.commands", *job.words, "--out", str(out)]


def run(words: Sequence[str], **changes: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | changes, timeout=900)


def in_one_line(done: subprocess.CompletedProcess) -> bool:
    """Returns whether a command was refused in one line."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("f2pad: error: ")]
    return done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr


def refused(done: subprocess.CompletedProcess) -> str:
    """Says whether a command was refused in one line."""
    return "refused in one line" if in_one_line(done) else f"WRONG, status {done.returncode}: {done.stderr[-1000:]}"


def isolated(script: str, words: Sequence[str], *, network: bool = True) -> list[str]:
    """Returns a command that runs after a script, in its own mounts (and without a network)."""
    return ["unshare", "-m", *([] if network else ["-n"]), "sh", "-c", script, "sh", *words]


def may_mount() -> bool:
    """Returns whether this process may mount a folder."""
    return bool(shutil.which("unshare")) and run(isolated("mount -t tmpfs none /mnt", [])).returncode == 0


def kill(job: Job, out: Path, moment: float) -> bool:
    """Runs a job and kills it after a number of seconds; returns whether it had not ended before."""
    words = command(job, out)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def leftovers(out: Path) -> list[Path]:
    """Returns temporary files, locks and unfinished states in and beside an output."""
    files = [file for file in out.parent.rglob("*") if file.is_file()]
    return [file for file in files if file.name.startswith(".") or file.suffix in (".lock", ".partial")]


def run_processes(folder: Path, seed: int, kills: int) -> None:
    """Runs everything and prints the tables."""
    folder.mkdir(parents=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    rng = np.random.default_rng(seed)
    known, expected, seconds = jobs(folder), {}, {}
    for name, job in known.items():
        for attempt in ("cold", name):  # the first run compiles
            out = folder / attempt / "out"
            shutil.rmtree(out.parent, ignore_errors=True)
            out.parent.mkdir()
            start = time.perf_counter()
            done = run(command(job, out))
            seconds[name] = time.perf_counter() - start
            assert done.returncode == 0, done.stderr
        expected[name] = job.results(out)
    print(f"\n{'command':<16}{'seconds':>9}{'kills':>7}{'alive':>7}{'resumed equal':>15}{'files left':>12}")
    for k, (name, job) in enumerate(known.items()):
        count = kills // len(known) + (k < kills % len(known))
        alive, equal, left = 0, 0, 0
        for number in range(count):
            out = folder / "killed" / f"{name}{number}" / "out"
            out.parent.mkdir(parents=True)
            alive += kill(job, out, float(rng.uniform(0, seconds[name])))
            done = run(command(job, out))
            same = done.returncode == 0 and job.results(out) == expected[name]
            if not same:
                print(f"{name}, kill {number}: status {done.returncode}, {done.stderr[-2000:]}")
            equal += same
            left += len(leftovers(out))
            shutil.rmtree(out.parent)
        print(f"{name:<16}{seconds[name]:9.1f}{count:7}{alive:7}{equal:15}{left:12}", flush=True)
    print()
    for text in faults(folder, known, expected):
        print(text, flush=True)


def faults(folder: Path, known: dict[str, Job], expected: dict[str, Any]) -> Any:
    """Yields a line for each fault of a disk, a cache, a home or a network."""
    mounts = may_mount()
    for name, job in known.items():
        yield f"two on one output, {name}: {two_on_one_output(folder / 'two', job, expected[name])}"
    fit, same = known["fit"], expected["fit"]

    def ended(done: subprocess.CompletedProcess, out: Path) -> str:
        if done.returncode == 0 and fit.results(out) == same:
            return "equal"
        return f"WRONG, status {done.returncode}: {done.stderr[-1000:]}"

    caches = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cold programs"), "F2PAD_CACHE": str(folder / "cold weights")}
    both = [folder / f"cache{k}" for k in range(2)]
    pair = [
        subprocess.Popen(
            command(fit, out), env=os.environ | caches, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for out in both
    ]
    texts = [process.communicate(timeout=900) for process in pair]
    found = [
        ended(subprocess.CompletedProcess([], p.returncode, *t), out) for p, t, out in zip(pair, texts, both, strict=True)
    ]
    yield f"two on one cache that is empty: {', '.join(found)}"
    if not mounts:
        yield "full disk, read-only caches, no home, no network: not run, no right to mount"
        return
    (folder / "frozen").mkdir()
    (folder / "passwd").touch()
    frozen = (
        f"mount --bind '{folder}/frozen' '{folder}/frozen' && mount -o remount,ro,bind '{folder}/frozen' && exec \"$@\""
    )
    out = folder / "read-only programs"
    done = run(
        isolated("unset JAX_COMPILATION_CACHE_DIR; " + frozen, command(fit, out)), XDG_CACHE_HOME=str(folder / "frozen")
    )
    yield f"read-only cache of programs: {ended(done, out)}"
    done = run(isolated(frozen, command(fit, folder / "read-only weights")), F2PAD_CACHE=str(folder / "frozen"))
    yield f"read-only cache of weights, empty: {refused(done)}"
    done = run(isolated(frozen, command(fit, folder / "frozen" / "x" / "out")))
    yield f"read-only output: {refused(done)}"
    out = folder / "homeless"
    homeless = (
        f"unset HOME XDG_CACHE_HOME JAX_COMPILATION_CACHE_DIR; mount --bind '{folder}/passwd' /etc/passwd && exec \"$@\""
    )
    yield f"no home: {ended(run(isolated(homeless, command(fit, out))), out)}"
    out = folder / "offline"
    plain = 'exec "$@"'
    yield f"no network: {ended(run(isolated(plain, command(fit, out), network=False)), out)}"
    fetch = [sys.executable, "-m", "f2pad_jax.commands", "weights", "fetch", "wide-resnet50-2"]
    done = run(isolated(plain, fetch, network=False), F2PAD_CACHE=str(folder / "fetched"))
    yield f"no network, a download: {refused(done)}"
    for name, job in known.items():
        yield f"full disk, {name}: {full_disk(folder / 'full', job, expected[name])}"


def full_disk(folder: Path, job: Job, expected: Any) -> str:
    """Runs a job on a disk that is too small, and again after the disk has grown."""
    for share in (0, 65536):  # bytes that are free
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "disk").mkdir(parents=True)
        script = (
            f"mount -t tmpfs -o size={max(share, 1)} none '{folder}/disk'; \"$@\" 2> '{folder}/said'; "
            f"echo $? > '{folder}/status'; "
            f"mount -o remount,size=1g '{folder}/disk'; \"$@\" && cp -r '{folder}/disk/out' '{folder}/out'"
        )
        again = run(isolated(script, command(job, folder / "disk" / "out")))
        said = (folder / "said").read_text()
        first = subprocess.CompletedProcess([], int((folder / "status").read_text()), "", said)
        if not in_one_line(first) or "No space left" not in said:
            return f"WRONG, {share} bytes free, status {first.returncode}: {said[-1500:]}"
        if again.returncode or job.results(folder / "out") != expected:
            return f"WRONG after {share} bytes: {again.stderr[-1500:]}"
    return "refused in one line, then equal (with 0 and 64 kB free)"


def two_on_one_output(folder: Path, job: Job, expected: Any) -> str:
    """Starts a job twice for one output, the second when the first has begun to write."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out = folder / "out"
    first = subprocess.Popen(command(job, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not list(folder.rglob("*.lock")):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)  # as long as the second takes to begin
    second = run(command(job, out))
    os.kill(first.pid, signal.SIGCONT)
    first.wait()
    if not in_one_line(second) or "another run" not in second.stderr:
        return f"WRONG, status {second.returncode}: {second.stderr[-1000:]}"
    return "the second refused in one line, the first equal" if job.results(out) == expected else "WRONG results"
