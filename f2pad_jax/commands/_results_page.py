"""Page of an output folder, for a browser without a network, and a sheet of its highest scores."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import PIL.Image

from f2pad_jax._storage import write_atomically
from f2pad_jax.errors import one_line
from f2pad_jax.evaluation.report import script_data
from f2pad_jax.images.pictures import contact_sheet
from f2pad_jax.regions.formats import write_tables

TEMPLATE = Path(__file__).with_name("results.html")
"""Page with a place for the records."""
SHOWN = ("name", "verdict", "score", "p_value", "message", "anomalous_pixels")
"""Values of a record that the page shows."""
OF_REGION = ("area", "length", "width", "score", "area_mm2", "length_mm", "width_mm")
"""Values of a region that the page shows."""
ON_SHEET = 60
"""Largest number of images on the sheet."""
COLOURS = {"defective": "#c11", "good": "#176"}
"""Colour of each verdict on the sheet."""


def write_views(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Writes the tables, the page and the sheet of all images."""
    write_tables(records, out)
    write_page(records, out)
    write_sheet(records, out)


def write_page(records: Sequence[dict[str, Any]], out: Path) -> Path:
    """Writes ``report.html``. It refers to the images and to the pictures in ``out``, which load when they are seen."""
    path, data = out / "report.html", script_data([_entry(record, out) for record in records])
    write_atomically(path, TEMPLATE.read_text(encoding="utf-8").replace("/*RECORDS*/", data).encode())
    return path


def write_sheet(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Writes ``sheet.jpg``: the overlays of the images with the highest scores, at most :data:`ON_SHEET`, highest first."""
    shown = sorted(records, key=lambda record: -record["score"])[:ON_SHEET]
    overlays = (np.asarray(PIL.Image.open(out / record["overlay"])) for record in shown)
    captions = [(f"{one_line(record['name'])}  {record['score']:.2f}", COLOURS[record["verdict"]]) for record in shown]
    file = io.BytesIO()
    PIL.Image.fromarray(contact_sheet(overlays, captions)).save(file, "JPEG", quality=88)
    write_atomically(out / "sheet.jpg", file.getvalue())


def _entry(record: dict[str, Any], out: Path) -> dict[str, Any]:
    files = {"overlay": record["overlay"], "mask": record["mask"], "restored": record["normal"]}
    files["input"] = record.get("input") or os.path.relpath(record["image"], out)
    regions = [{key: region[key] for key in OF_REGION if key in region} for region in record["regions"]]
    pictures = {name: quote(os.fsencode(Path(file).as_posix())) for name, file in files.items()}
    return {key: record[key] for key in SHOWN} | {"pictures": pictures, "regions": regions}
