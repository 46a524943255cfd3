"""Output folder of ``f2pad refine``: an archive of the results of all runs that wrote into it.

Its journal, ``results.jsonl``, has a line with a checksum for each image that is done. A stopped, repeated or larger run
does only the images that are missing or have changed. ``results.json`` is written from the journal at the end of every run.
"""

import contextlib
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from f2pad_jax._storage import regular, write_atomically
from f2pad_jax.commands._console import only_writer
from f2pad_jax.errors import F2padError, RunError
from f2pad_jax.images.files import is_address, state_of

Task = tuple[Path | str, str]
"""Path of an image, or its address in a bucket, and the name of its results."""
Record = dict[str, Any]
"""Figures of one image and the names of its files, as ``results.json`` has them; or the error of an image."""
ENDINGS = (
    "_input.png",
    "_mask.png",
    "_normal.png",
    "_overlay.png",
    "_probability.png",
    "_history.csv",
    "_history.gif",
    "_history.png",
)
"""Ends of the names of an image's files."""
CHECKSUM = "crc32"
"""Key of a line's checksum in the journal."""
OTHERS = ("results.json", "results.csv", "regions.csv", "report.html", "sheet.jpg", "settings.toml", "regions.geojson")
"""Files of the whole archive that no other program may have written before its first run."""


class Archive:
    """Results in a folder; while it is open (``with``), no other process may write there.

    Raises:
        RunError: another process writes into the folder; it holds results of another model or of other options, or files
            of another program.
    """

    def __init__(self, out: Path, recipe: Mapping[str, Any]):
        self.out, self.recipe, self.began = out, json.loads(json.dumps(recipe)), time.perf_counter()
        self.planned: dict[str, str] = {}
        """Absolute path of each image by the name of its results."""
        self.records: dict[str, Record] = {}
        """Record of each image that is done, by the name of its results."""
        self.unusable: list[Record] = []
        """Images of this run that can't be used."""
        self.num_refined = 0
        self.journal = out / "results.jsonl"
        self.lock = contextlib.ExitStack()

    def __enter__(self) -> "Archive":
        with contextlib.ExitStack() as lock:
            lock.enter_context(only_writer(self.out))
            self._read()
            self.lock = lock.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self.lock:
            if self.planned:
                self.write()

    def _read(self) -> None:
        """Reads the journal, and drops a line in which a run was stopped.

        Raises:
            RunError: the journal is damaged, or of a run with other options; or a file is another program's.
        """
        if not self.journal.exists():
            for name in OTHERS:
                if (self.out / name).exists():
                    raise RunError(f"{self.out / name}: not written by 'f2pad refine'; choose another folder")
            self._log({"recipe": self.recipe})
            return
        lines = self._lines()
        recipe = lines[0].get("recipe", {}) if lines else self.recipe
        differing = [key for key in {**recipe, **self.recipe} if key != "model" and recipe.get(key) != self.recipe.get(key)]
        if len(lines) < 2:  # no image was begun
            lines = [{"recipe": self.recipe}]
        elif differing:
            raise RunError(f"{self.out}: holds results of a run with another {', '.join(differing)}; choose another folder")
        write_atomically(self.journal, "".join(map(_signed, lines)).encode())
        for line in lines[1:]:
            self.planned |= line.get("planned", {})
            if "name" in line:
                self.records[line["name"]] = line

    def _lines(self) -> list[Record]:
        """Returns the lines of the journal, without an unfinished last line.

        Raises:
            RunError: a line is none that :meth:`_log` wrote.
        """
        text, lines = regular(self.journal).read_bytes(), []
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):  # a run was stopped here
                break
            try:
                record = json.loads(line)
                record.pop(CHECKSUM)
                sound = _signed(record).encode() == line
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                sound = False
            if not sound:
                raise RunError(f"{self.journal}: line {number} is damaged; choose another folder")
            lines.append(record)
        return lines

    def _log(self, line: Record) -> None:
        with self.journal.open("a") as journal:
            journal.write(_signed(line))

    def files(self) -> set[str]:
        """Returns the absolute paths of the files that runs into this folder write: they are no images."""
        folder = location(self.out)
        return {os.path.join(folder, f"{name}{ending}") for name in self.planned for ending in ENDINGS} | {
            os.path.join(folder, name) for name in OTHERS
        }

    def missing(self, tasks: Sequence[Task]) -> list[Task]:
        """Returns the images that are not done or have changed, and plans their files.

        Raises:
            RunError: a file of an image would replace another image's result, or a file that no run has written.
        """
        for path, name in tasks:
            if name not in self.planned:
                for file in (self.out / f"{name}{ending}" for ending in ENDINGS):
                    if file.exists():
                        raise RunError(f"{file}: not written by 'f2pad refine'; choose another folder")
            elif self.planned[name] != location(path):
                raise RunError(
                    f"{self.out}: '{name}' is the result of {self.planned[name]}; choose another folder for {path}"
                )

        def done(path: Path | str, name: str) -> bool:
            return name in self.records and self.records[name]["file"] == file_state(path)

        new = {name: location(path) for path, name in tasks if name not in self.planned}
        if new:
            self.planned |= new
            self._log({"planned": new})
        return [task for task in tasks if not done(*task)]

    def add(self, record: Record) -> None:
        """Adds the record of an image; it takes the place of an earlier record of this image."""
        self.unusable = [other for other in self.unusable if other["name"] != record["name"]]
        if "error" in record:
            self.unusable.append(record)
            self.records.pop(record["name"], None)
            return
        self.records[record["name"]] = record
        self.num_refined += 1
        self._log(record)

    def results(self) -> Record:
        """Returns the content of ``results.json``: the recipe, and the records of all images as they were planned."""
        images = [self.records[name] for name in self.planned if name in self.records]
        return {
            **self.recipe,
            "seconds": round(time.perf_counter() - self.began, 2),
            "refined_now": self.num_refined,
            "unusable": self.unusable,
            "images": [{key: value for key, value in record.items() if key != "file"} for record in images],
        }

    def write(self) -> None:
        """Writes ``results.json``, with a line for each value and for each image: outlines have many numbers."""
        results = self.results()
        images = ",\n".join(json.dumps(record) for record in results.pop("images"))
        write_atomically(
            self.out / "results.json", f'{json.dumps(results, indent=2)[:-2]},\n  "images": [\n{images}\n  ]\n}}'.encode()
        )


def _signed(line: Record) -> str:
    """Returns a line of the journal: JSON that ends with its own checksum."""
    return json.dumps(line | {CHECKSUM: zlib.crc32(json.dumps(line).encode())}) + "\n"


def location(path: Path | str) -> str:
    """Returns the absolute path of a file, or its address; it does not depend on how the path is spelled."""
    return str(path) if is_address(path) else os.path.realpath(path)


def file_state(path: Path | str) -> list[int | str] | None:
    """Returns values that change with the file; None if the file is gone."""
    try:
        return state_of(path)
    except (OSError, F2padError):
        return None
