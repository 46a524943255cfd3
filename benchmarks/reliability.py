"""Bad files, each through the reader or the command that a user's file meets, and processes that are killed.

Files are made from good ones with a seed: cut short, with flipped bits, with another start, with hostile numbers, too
large when they are unpacked, or replaced by a folder, a pipe, a device or a loop of links. Each has one outcome:

- refused: one line says why, and nothing more is printed.
- read rightly: the result is that of the good file. Without a checksum in the format, no reader can know a changed value
  from a value that was written. The result may then also be what the file says: the pixels that Pillow or tifffile
  decodes from it, the bytes of a tensor that stand in it, the value of a constant that another parser finds in it.
  PNG, .npz, the archives of PyTorch and our models have checksums: only the result of the good file counts.
- traceback: an error that no user should see, or a refusal in several lines.
- hang: no end after SECONDS. The process of a decoder that can't be stopped is killed.
- memory: more than MEMORY bytes beyond what the process had, for files of a few megabytes at most.
- wrong: another result than those above, without a word.

``python benchmarks/reliability.py`` runs everything, ``--files`` and ``--processes`` a part of it. The tests run a
few of the files (tests/test_reliability.py). The processes are in ``interruptions.py``.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import tifffile
from bad_files import Bad, Refused, Workshop, command, inputs, write
from good_files import SIZE, drawn, heights, picture, save

SECONDS = 120
"""Time that a file may take, with the compilation of a program."""
MEMORY = 3 * 2**30
"""Memory that a file may take."""
OUTCOMES = ("refused", "read rightly", "traceback", "hang", "memory", "wrong")


# --- Reading, and what is right


class Bench(Workshop):
    """Good inputs on disk, and a method that reads each kind of input as the commands do, and returns the result."""

    def out(self) -> Path:
        """Returns a new output."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "out"

    def read_images(self, path: Path) -> Any:
        from f2pad_jax.images.files import check_images, read_image

        white = check_images([path], strict=True)[2]
        return read_image(path, white=white)

    def read_masks(self, path: Path) -> Any:
        from f2pad_jax.data.mvtec import read_mask

        return read_mask(path)

    def read_maps(self, path: Path) -> Any:
        from f2pad_jax.images.files import read_map
        from f2pad_jax.method.coarse import Given

        Given.of(values := read_map(path), None)
        return values

    def read_weights(self, path: Path) -> Any:
        import jax

        from f2pad_jax.backbones.backbone import load_backbone

        return [
            np.asarray(leaf)
            for leaf in jax.tree.leaves(load_backbone("efficientnet-lite0", layers=("stage1",), weights=path))
        ]

    def read_models(self, path: Path) -> Any:
        out = self.out()
        command("refine", path, self.image, "--out", out)
        return records(out)

    def read_checkpoints(self, path: Path) -> Any:
        out = self.out()
        folder = self.folder / "normal"
        if not folder.exists():
            folder.mkdir()
            for i in range(2):
                PIL.Image.fromarray(picture(i)[:, :48]).resize((64, 64)).save(folder / f"{i}.png")
        command("import", path, folder, "--out", out)
        return content_of(out)

    def read_settings(self, path: Path) -> Any:
        from f2pad_jax.commands._settings_file import as_toml, read_settings

        return as_toml(read_settings(path))

    def read_journals(self, path: Path) -> Any:
        command("refine", self.model, self.image, "--out", path.parent)
        return records(path.parent)

    def read_ignored(self, path: Path) -> Any:
        out = self.out()
        command("refine", self.model, self.image, "--out", out, "--ignore", path)
        return np.asarray(PIL.Image.open(out / "part_mask.png")) > 0

    def read_manifests(self, path: Path) -> Any:
        out = self.out()
        command("make-dataset", self.data(), "--out", out, "--manifest", path)
        return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.png"))}

    def read_folders(self, path: Path) -> Any:
        from f2pad_jax.data.mvtec import open_categories
        from f2pad_jax.images.files import check_images

        found = open_categories(path)
        check_images([file for category in found for file in category.train], strict=True)
        tests = [sample for category in found for sample in category.test]
        check_images([sample.path for sample in tests], strict=True)
        return [len(category.train) for category in found], [sample.truth(SIZE).tobytes() for sample in tests]

    def read_evaluations(self, path: Path) -> Any:
        out = path if path.is_dir() and (path / "runs").is_dir() else next(p for p in path.parents if (p / "runs").is_dir())
        command("evaluate", self.data(), "--out", out, "--protocol", "real", "--size", "64", "--images", "1")
        return [
            {k: v for k, v in r.items() if k != "seconds_per_image"} for r in json.loads((out / "results.json").read_text())
        ]

    def read_names(self, path: Path) -> Any:
        out = self.out()
        command("refine", self.model, path, "--out", out)
        return [{key: value for key, value in record.items() if key not in NAMED} for record in records(out)]


NAMED = ("image", "name", "mask", "normal", "overlay")
"""Values of a record that the name of an image changes."""


def content_of(model: Path) -> Any:
    """Returns the tensors and texts of a model file, which come in any order."""
    from f2pad_jax._storage import read_safetensors

    tensors, texts = read_safetensors(model)
    return sorted(texts.items()), [(name, tensors[name]) for name in sorted(tensors)]


def records(out: Path) -> list[dict]:
    """Returns the records of a run."""
    return json.loads((out / "results.json").read_text())["images"]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.shape == other.shape and bool(np.array_equal(one, other))
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


def said(kind: str, path: Path, value: Any) -> bool:
    """Returns whether a result is what a file without a checksum says, by another decoder."""
    if kind == "images":
        return bool(np.abs(value - decoded_image(path)).max() <= 1)
    if kind == "masks":
        return equal(value, decoded_mask(path))
    if kind == "maps":
        return equal(value, decoded_map(path).astype(np.float32))
    if kind == "weights":
        from f2pad_jax._storage import read_safetensors
        from f2pad_jax.backbones._torchfile import read_torch_file

        content = path.read_bytes()
        tensors = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_torch_file(path)
        return all(tensor.tobytes() in content and np.isfinite(tensor).all() for tensor in tensors.values())
    if kind == "settings":
        text, found = tomllib.loads(path.read_text()), tomllib.loads(value)
        text.pop("preset", None)
        return contained(text, found)
    if kind == "journals":  # the line of an image stands in the journal as it is reported
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return all(record in [{k: v for k, v in line.items() if k != "file"} for line in lines] for record in value)
    if kind == "models":  # the header was changed and signed again: another model, if its values have the right types
        return path.stem == "hostile"
    if kind == "evaluations":
        return path.name == "curves.json" or "case" in path.name
    return False


def contained(part: Any, whole: Any) -> bool:
    """Returns whether every value of a tree stands in another."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contained(part[key], whole[key]) for key in part)
    return part == whole or (isinstance(part, list) and part == list(whole))


def decoded_image(path: Path) -> np.ndarray:
    """Returns the pixels of an image, decoded by Pillow, or by tifffile where Pillow keeps 8 bits only."""
    with PIL.Image.open(path) as opened:
        tags = dict(getattr(opened, "tag_v2", {}))
        if opened.format == "TIFF" and (max(np.atleast_1d(tags.get(258, 8))) > 8):
            values = tifffile.imread(path)
            values = np.moveaxis(values, 0, -1) if values.ndim == 3 and tags.get(284) == 2 else values
            if tags.get(262) == 0:
                values = np.iinfo(values.dtype).max - values if values.dtype.kind == "u" else 65535 - values
            white = next(w for w in (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0) if values.max() <= w)
            values = np.rint(values * (255 / white)).astype(np.int16)
            return np.repeat(values[..., None], 3, -1) if values.ndim == 2 else values[..., :3]
        opened.load()
        return np.asarray(PIL.ImageOps.exif_transpose(opened).convert("RGB")).astype(np.int16)


def decoded_mask(path: Path) -> np.ndarray:
    """Returns a mask by the documented rule: above half of full scale, or above 0 if no value is."""
    with PIL.Image.open(path) as opened:
        inverted = opened.mode.startswith("I;16") and getattr(opened, "tag_v2", {}).get(262) == 0
        opened = PIL.ImageOps.exif_transpose(opened)
        opened = opened if opened.mode in ("1", "L", "F") or opened.mode[0] == "I" else opened.convert("RGB")
        values = np.asarray(opened)
    values = values.max(axis=2) if values.ndim == 3 else values
    values = 65535 - values if inverted else values
    half = {np.dtype(np.uint8): 127, np.dtype(np.uint16): 32767}.get(values.dtype, 0)
    return values > (half if values.max() > half else 0)


def decoded_map(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    values = tifffile.imread(path) if path.suffix == ".tif" else np.asarray(PIL.Image.open(path))
    return values * 255 if values.dtype == bool else values


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Ends the work after SECONDS, and lets it have MEMORY."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def outcome(bench: Bench, bad: Bad, goods: dict[str, Any], checked: bool) -> tuple[str, str]:
    """Reads an input; returns the outcome, one of OUTCOMES, and the message or the result."""
    from f2pad_jax.errors import F2padError, one_line

    bench.trap.unlink(missing_ok=True)
    try:
        with limits():
            value = getattr(bench, f"read_{bad.kind}")(bad.path)
    except TimeoutError as error:
        return "hang", str(error)
    except MemoryError as error:
        return "memory", repr(error)
    except (F2padError, Refused) as error:
        text = str(error) if isinstance(error, Refused) else one_line(error)  # as a command prints it
        if bench.trap.exists():
            return "wrong", f"code of the file was run: {text}"
        if f"no end after {SECONDS} s" in text:
            return "hang", text
        if re.search(r"[Uu]nable to allocate|MemoryError|annot allocate", text):
            return "memory", text
        return ("traceback" if len(text.splitlines()) != 1 or "Traceback" in text else "refused"), text
    except Exception:
        return "traceback", traceback.format_exc()
    if bench.trap.exists():
        return "wrong", "code of the file was run"
    if bad.good and equal(value, goods[bad.good]):
        return "read rightly", "equal"
    with contextlib.suppress(Exception):
        if not checked and said(bad.kind, bad.path, value):
            return "read rightly", "as the file says"
    return "wrong", repr(value)[:300]


# --- Running


def good_results(bench: Bench, found: list[tuple[Bad, bool]]) -> dict[str, dict[str, Any]]:
    """Reads every good input; returns the results by kind and name."""
    results: dict[str, dict[str, Any]] = {}
    for bad, _ in found:
        if bad.label.endswith("good") and bad.good:
            results.setdefault(bad.kind, {})[bad.good] = getattr(bench, f"read_{bad.kind}")(bad.path)
    mask = drawn()
    if "masks" in results:
        results["masks"] = dict.fromkeys(results["masks"], mask)  # known without a reader
    if "maps" in results:
        results["maps"] = dict.fromkeys(results["maps"], heights())
    if "images" in results:
        lossless = ("rgb", "alpha", "bmp", "lossless", "tiff", "tiff-lzw", "tiff-tiled")
        results["images"] |= dict.fromkeys(lossless, picture(0))
    return results


def serve(connection: Any, folder: Path, model: Path, found: list[tuple[Bad, bool]], kind: str) -> None:
    """Answers with the outcome of each input whose number arrives."""
    bench = Bench(folder, model)
    of_kind = [item for item in found if item[0].kind == kind]
    goods = good_results(bench, of_kind).get(kind, {})
    if kind == "names":
        goods = {"part": bench.read_names(bench.image)}
    if kind == "evaluations":
        goods = {"evaluated": bench.read_evaluations(bench.folder / "evaluated")}
    connection.send("ready")
    while (number := connection.recv()) is not None:
        bad, checked = found[number]
        connection.send(outcome(bench, bad, goods, checked))


class Worker:
    """Process that reads the inputs of a kind; a new one takes its place after a hang or a crash."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.process: Any = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, *self.arguments), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def ask(self, number: int) -> tuple[str, str]:
        if self.process is None:
            self.start()
        self.connection.send(number)
        try:
            if self.connection.poll(SECONDS + 20):
                return self.connection.recv()
            found = "hang", "the decoder can't be stopped"
        except EOFError:
            found = "traceback", "the process ended"
        self.stop()
        return found

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def run_files(folder: Path, seed: int, each: int, kinds: list[str], log: Path) -> list[tuple[Bad, str, str]]:
    """Reads all bad files; returns each with its outcome and message, and writes them to a log."""
    model = folder / "part.model"
    bench = Bench(folder, model)
    if not model.exists():
        for k in range(4):
            write(folder / "train" / f"{k}.png", save(PIL.Image.fromarray(picture(k)), "PNG"))
        command("fit", folder / "train", "--out", model, "--size", "48x64", "--layers", "stage2", "stage3")
    found = list(inputs(bench, seed, each, whole=True, kinds=kinds))
    results = []
    with log.open("w", errors="backslashreplace") as file:
        for kind in dict.fromkeys(bad.kind for bad, _ in found):
            worker = Worker(folder, model, found, kind)
            for number, (bad, _) in enumerate(found):
                if bad.kind == kind:
                    result, message = worker.ask(number)
                    results.append((bad, result, message))
                    print(
                        f"{kind}\t{bad.label!r}\t{result}\t{message if result != 'read rightly' else ''}\t{bad.path}",
                        file=file,
                        flush=True,
                    )
            worker.stop()
    return results


def table(results: list[tuple[Bad, str, str]]) -> str:
    """Returns the number of inputs of each kind by outcome."""
    lines = [f"{'kind of input':<14}{'tried':>7}" + "".join(f"{name:>14}" for name in OUTCOMES)]
    counts = Counter((bad.kind, result) for bad, result, _ in results)
    kinds = list(dict.fromkeys(bad.kind for bad, _, _ in results))
    for kind in [*kinds, "all"]:
        row = [sum(n for (k, r), n in counts.items() if kind in (k, "all") and r == name) for name in OUTCOMES]
        lines.append(f"{kind:<14}{sum(row):>7}" + "".join(f"{n:>14}" for n in row))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="store_true", help="bad files only")
    parser.add_argument("--processes", action="store_true", help="processes only")
    parser.add_argument("--kinds", nargs="+", default=[], help="kinds of files (default: all)")
    parser.add_argument("--each", type=int, default=4, help="damaged copies of each good file (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("reliability.log"), help="file for the outcome of each input")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if not arguments.processes:
            results = run_files(Path(temporary), arguments.seed, arguments.each, arguments.kinds, arguments.log)
            print(table(results))
        if not arguments.files:
            from interruptions import run_processes

            run_processes(Path(temporary) / "processes", arguments.seed, arguments.kills)


if __name__ == "__main__":
    sys.exit(main())
