"""Load test of ``serve`` and ``watch``: ``python benchmarks/service.py [--images N] [--watched N] [--clients N]``.

The model is PatchCore on crops of brick of 96x96 pixels. First, clients in threads send good images, and a defective one in
place of every fiftieth, to a server on the loopback. Verdict and score of each answer are compared with those of
``refine_many``. Then such images go into a folder that ``f2pad watch`` looks at. The process is killed ten times (SIGKILL)
while the folder is filled.
"""

import argparse
import collections
import concurrent.futures
import importlib.metadata
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import PIL.Image

import f2pad_jax
from f2pad_jax import save_detector
from f2pad_jax.data import load_texture
from f2pad_jax.detectors import PatchCore

SIZE, EVERY, KILLS = 96, 50, 10
"""Side of the images, pixels; one image of this number is defective; number of kills of the watching process."""
COMMAND = [sys.executable, "-m", "f2pad_jax.commands"]


def main() -> None:
    """Fits a small model, and prints the figures of both commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="number of requests (default: %(default)s)")
    parser.add_argument("--watched", type=int, default=2000, help="number of watched files (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="number of clients (default: %(default)s)")
    arguments = parser.parse_args()
    packages = "jax", "fastapi", "uvicorn", "watchfiles"
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages), flush=True)
    texture = load_texture("brick", size=SIZE, num_train=20, num_test=6)
    detector = f2pad_jax.fit(PatchCore, texture.train, "efficientnet-lite0", size=(SIZE, SIZE))
    kinds = [*texture.train, *(test.image for test in texture.test)]
    direct = [
        ("defective" if r.defective else "good", round(float(r.score), 4)) for r in f2pad_jax.refine_many(detector, kinds)
    ]
    good, bad = itertools.cycle(range(len(texture.train))), itertools.cycle(range(len(texture.train), len(kinds)))
    order = [next(bad) if k % EVERY == EVERY // 2 else next(good) for k in range(max(arguments.images, arguments.watched))]
    files = [encoded(image) for image in kinds]
    with tempfile.TemporaryDirectory() as folder:
        save_detector(model := Path(folder, "brick.model"), detector)
        serve(model, files, order[: arguments.images], direct, arguments.clients)
        watch(model, files, order[: arguments.watched], direct)


def encoded(image: np.ndarray) -> bytes:
    """Returns an image as PNG."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def resident(process: subprocess.Popen) -> str:
    """Returns the memory of a process."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return f"{pages * os.sysconf('SC_PAGE_SIZE') / 2**20:.0f} MiB"


def serve(model: Path, files: list[bytes], order: list[int], direct: list, num_clients: int) -> None:
    """Sends all images, each until it is accepted, and prints the figures."""
    process = subprocess.Popen([*COMMAND, "serve", str(model), "--port", "0"], stderr=subprocess.PIPE, text=True)
    address = next(line for line in process.stderr if " at http" in line).split(" at ")[1].split(";")[0]
    threading.Thread(target=process.stderr.read, daemon=True).start()
    while httpx2.get(f"{address}/health").status_code != 200:
        time.sleep(0.5)
    for data in files[-6:]:  # every window that the images have is compiled before the first figure
        httpx2.post(f"{address}/refine", files={"image": ("warm", data)}, timeout=600)
    numbers, answers, seconds, memory = iter(range(len(order))), [], [], {}
    lock = threading.Lock()
    marks = {0: "at the start", len(order) // 2: "in the middle", len(order) - 1: "at the end"}

    def client() -> None:
        with httpx2.Client(base_url=address, timeout=600) as http:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                if number in marks:
                    memory[marks[number]] = resident(process)
                began = time.perf_counter()
                while (answer := http.post("/refine", files={"image": (f"{number}.png", files[order[number]])})).is_error:
                    assert answer.status_code == 429, answer.text
                    time.sleep(float(answer.headers["retry-after"]))
                seconds.append((time.perf_counter() - began, order[number]))
                answers.append(answer.json())

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
        for done in [pool.submit(client) for _ in range(num_clients)]:
            done.result()
    taken = time.perf_counter() - began
    process.send_signal(signal.SIGTERM)
    status = process.wait(60)
    found = collections.Counter(int(answer["name"]) for answer in answers)
    wrong = sum((a["verdict"], a["score"]) != direct[order[int(a["name"])]] for a in answers)
    print(f"serve: {len(order)} requests of {num_clients} clients in {taken:.0f} s, {len(order) / taken:.1f} requests/s")
    for kind, chosen in (("good", range(len(files) - 6)), ("defective", range(len(files) - 6, len(files)))):
        times = [value for value, which in seconds if which in chosen]
        p50, p99 = 1000 * np.percentile(times, (50, 99))
        print(f"  {len(times)} {kind} images: p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    print("  resident memory " + ", ".join(f"{value} {mark}" for mark, value in memory.items()))
    doubled = sum(count - 1 for count in found.values())
    print(
        f"  lost {len(order) - len(found)}, doubled {doubled}, unlike refine_many {wrong}; exit status {status}", flush=True
    )


def watch(model: Path, files: list[bytes], order: list[int], direct: list) -> None:
    """Fills a folder, kills the watching process again and again, and prints the figures."""
    folder, out = model.parent / "in", model.parent / "out"
    folder.mkdir()
    journal = out / "results.jsonl"
    command = [*COMMAND, "watch", str(model), str(folder), str(out), "--settle", "0.5"]
    start, quiet = subprocess.Popen, {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def done() -> list[dict]:
        lines = journal.read_text().splitlines() if journal.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # the line in which the process was killed
                continue
        return [record for record in found if "verdict" in record]

    began, process, memory = time.perf_counter(), start(command, **quiet), []
    for part in range(KILLS + 1):
        for number in range(part * len(order) // (KILLS + 1), (part + 1) * len(order) // (KILLS + 1)):
            (folder / f"{number:05}.png").write_bytes(files[order[number]])
        most = len(order) if part == KILLS else len(order) * (part + 0.5) / (KILLS + 1)
        while len(done()) < most:
            time.sleep(0.05 if part < KILLS else 1)
        memory.append(resident(process))
        if part < KILLS:
            process.kill()
            process.wait()
            process = start(command, **quiet)
    taken = time.perf_counter() - began
    process.send_signal(signal.SIGTERM)
    status = process.wait(60)
    found = collections.Counter(record["name"] for record in done())
    records = json.loads((out / "results.json").read_text())["images"]
    wrong = sum((r["verdict"], r["score"]) != direct[order[int(r["name"])]] for r in records)
    print(f"watch: {len(order)} files in {taken:.0f} s with {KILLS} SIGKILLs, {len(order) / taken:.1f} files/s")
    print(f"  resident memory {memory[0]} at the first kill, {memory[-1]} at the end")
    doubled = sum(count - 1 for count in found.values())
    lost = len(order) - len({record["name"] for record in records})
    print(f"  lost {lost}, doubled {doubled}, unlike refine_many {wrong}; exit status {status}", flush=True)


if __name__ == "__main__":
    main()
