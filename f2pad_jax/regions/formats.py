"""Files of regions that other programs read: labelling tools, trainers of networks, map viewers.

A record is an image of ``results.json``, with its regions. Coordinates are (x, y) in pixels: the first pixel is the square
from (0, 0) to (1, 1).
"""

import csv
import io
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from f2pad_jax._storage import write_atomically
from f2pad_jax._version import __version__
from f2pad_jax.images.files import is_address
from f2pad_jax.regions.measure import run_lengths

Record = dict[str, Any]
"""Record of an image, as in ``results.json``."""
LABEL = "defect"
"""Name of the only class."""
COLUMNS = ("image", "region", "area", "length", "width", "angle", "perimeter", "contrast", "score", "probability")
"""First columns of ``regions.csv``, which are there without a region too."""
LABELME = "5.5.0"
"""Version of LabelMe's format."""


def write_coco(records: Sequence[Record], out: Path, polygons: bool = True) -> None:
    """Writes ``coco.json``: polygons, but run lengths (RLE) for a region with holes."""
    images = [
        {"id": i, "file_name": r["image"], "height": r["height"], "width": r["width"]} for i, r in enumerate(records, 1)
    ]
    annotations = []
    for image, record in zip(images, records, strict=True):
        for region in record["regions"]:
            (top, left, bottom, right), lines = region["box"], region["outlines"]
            rle = {"size": [record["height"], record["width"]], "counts": region["rle"]}
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": 1,
                "segmentation": [np.ravel(lines[0]).tolist()] if polygons and len(lines) == 1 else rle,
                "area": region["area"],
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0,
                "score": region["score"],
            }
            annotations.append(annotation)
    content = {
        "info": {"description": f"f2pad_jax {__version__}"},
        "images": images,
        "categories": [{"id": 1, "name": LABEL}],
        "annotations": annotations,
    }
    _write_json(out / ("coco.json" if polygons else "coco_rle.json"), content)


def write_coco_rle(records: Sequence[Record], out: Path) -> None:
    """Writes ``coco_rle.json``: run lengths for every region, exact to the pixel."""
    write_coco(records, out, polygons=False)


def write_labelme(records: Sequence[Record], out: Path) -> None:
    """Writes ``labelme/NAME.json`` for each image; the polygon of a hole has the label "hole" and its region's group."""
    for record in records:
        path, image = out / "labelme" / f"{record['name']}.json", record["image"]
        shapes = [
            {
                "label": "hole" if place else LABEL,
                "points": line[:-1],
                "group_id": number,
                "description": "",
                "shape_type": "polygon",
                "flags": {},
            }
            for number, region in enumerate(record["regions"])
            for place, line in enumerate(region["outlines"])
        ]
        content = {
            "version": LABELME,
            "flags": {"defective": record["verdict"] == "defective"},
            "shapes": shapes,
            "imagePath": image if is_address(image) else Path(os.path.relpath(image, path.parent)).as_posix(),
            "imageData": None,
            "imageHeight": record["height"],
            "imageWidth": record["width"],
        }
        _write_json(path, content)


def write_cvat(records: Sequence[Record], out: Path) -> None:
    """Writes ``cvat.xml`` ("CVAT for images 1.1"), with a mask for each region."""
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    for i, record in enumerate(records):
        size = {"width": str(record["width"]), "height": str(record["height"])}
        image = ET.SubElement(root, "image", {"id": str(i), "name": record["image"], **size})
        for region in record["regions"]:
            top, left, bottom, right = region["box"]
            whole = _decoded(region["rle"], record["height"], record["width"])
            rows = whole[top:bottom, left:right].T  # CVAT goes row by row
            runs = ", ".join(map(str, run_lengths(rows, (0, 0), rows.shape)))
            box = {"left": left, "top": top, "width": right - left, "height": bottom - top}
            common = {"label": LABEL, "source": "auto", "occluded": "0", "z_order": "0", "rle": runs}
            ET.SubElement(image, "mask", common | {name: str(value) for name, value in box.items()})
    ET.indent(root)
    write_atomically(out / "cvat.xml", ET.tostring(root, encoding="utf-8", xml_declaration=True))


def write_yolo(records: Sequence[Record], out: Path) -> None:
    """Writes ``labels/NAME.txt`` for each image: class 0 and the outline in 0..1, a line for each region, without holes."""
    for record in records:
        scale = np.array([record["width"], record["height"]])
        lines = [np.ravel(np.array(region["outlines"][0][:-1]) / scale) for region in record["regions"]]
        text = "".join(f"0 {' '.join(f'{value:.6f}' for value in line)}\n" for line in lines)
        path = out / "labels" / f"{record['name']}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


def write_geojson(records: Sequence[Record], out: Path) -> None:
    """Writes ``regions.geojson``: a polygon with its holes for each region; y grows downwards."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": region["outlines"]},
            "properties": {"image": record["image"], **_figures(region)},
        }
        for record in records
        for region in record["regions"]
    ]
    _write_json(out / "regions.geojson", {"type": "FeatureCollection", "features": features})


FORMATS: dict[str, Callable[[Sequence[Record], Path], None]] = {
    "coco": write_coco,
    "coco-rle": write_coco_rle,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "yolo": write_yolo,
    "geojson": write_geojson,
}
"""Functions that write records into a folder, by the name of their format."""


def write_tables(records: Sequence[Record], out: Path) -> None:
    """Writes ``results.csv``, a row for each image, and ``regions.csv``, a row for each region."""
    images = [_figures(record) | {"regions": len(record["regions"])} for record in records]
    rows = [{"image": r["image"], "region": i, **_figures(g)} for r in records for i, g in enumerate(r["regions"])]
    for name, table in (("results.csv", images), ("regions.csv", rows)):
        text = io.StringIO()
        names = dict.fromkeys([*(COLUMNS if name == "regions.csv" else ()), *(key for row in table for key in row)])
        writer = csv.DictWriter(text, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write_atomically(out / name, text.getvalue().encode(errors="surrogateescape"))  # a file's name may be any bytes


def _figures(record: Record) -> Record:
    """Returns the single values of a record; box and centroid are taken apart."""
    parts = {"box": ("top", "left", "bottom", "right"), "centroid": ("row", "column")}
    apart = {name: value for key, names in parts.items() for name, value in zip(names, record.get(key, ()), strict=False)}
    return {key: value for key, value in record.items() if not isinstance(value, (list, dict))} | apart


def _decoded(runs: Sequence[int], height: int, width: int) -> np.ndarray:
    """Returns the mask of run lengths, column by column."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content).encode())
