"""Report of a run: one HTML file that opens offline."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Bool, UInt8

from f2pad_jax._storage import write_atomically
from f2pad_jax.evaluation._charts import embedded, histogram, line_chart
from f2pad_jax.evaluation._store import ImageResult, load_curves, load_images, read_case
from f2pad_jax.evaluation.cases import FULL
from f2pad_jax.images import metrics

TEMPLATE = Path(__file__).with_name("report.html")
"""Page with places for tables and cases."""


def write_report(out: str | Path, *, limit: int | None = 60) -> Path:
    """Writes ``report.html``: the tables, and a gallery that compares input, masks and restored image.

    Args:
        out: folder of the run, with its ``tables.md``.
        limit: largest number of images of a case, lowest IoU first; None: all. An image takes about 25 kB.

    Returns:
        The path of the report.
    """
    out = Path(out)
    cases = [case for folder in sorted((out / "runs").iterdir()) if (case := _case(folder, limit))]
    sizes = "\n".join(embedded(path.read_text()) for path in sorted((out / "pictures").glob("*-sizes.svg")))
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("<!--TABLES-->", tables_html((out / "tables.md").read_text()) + sizes)
    path = out / "report.html"
    write_atomically(path, page.replace("/*CASES*/", script_data(cases)).encode())
    return path


def script_data(data: Any) -> str:
    """Returns data as JSON inside a script of a page, which no "</script>" in the data can end."""
    return json.dumps(data, separators=(",", ":")).replace("</", "<\\/")


def _case(folder: Path, limit: int | None) -> dict[str, Any] | None:
    """Returns the images of a case, defective ones of lowest IoU first, with its charts; None without images."""
    if not (folder / "case.json").exists():
        return None
    images = [i for i in load_images(folder) if FULL in i.masks]
    order = sorted(images, key=lambda i: (i.good, metrics.iou(i.masks[FULL], i.truth), i.name))[:limit]
    scores = {"normal images of the fit": read_case(folder).get("normal_scores", [])}
    scores |= {name: [i.score for i in images if i.good == good] for name, good in (("good", True), ("defective", False))}
    known = {name: values for name, values in scores.items() if values}
    charts = [histogram("Image scores; above 1: defective", known)] if known else []
    charts += [
        line_chart(f"{name}: Eq. (12) and its terms", series, x="step", y="")
        for name, series in load_curves(folder).items()
        if series["objective"]
    ]
    return {"name": folder.name, "images": [_entry(i) for i in order], "charts": charts} if order else None


def _entry(image: ImageResult) -> dict[str, Any]:
    mask = image.masks[FULL]
    return {
        "name": image.name,
        "coarseIou": round(metrics.iou(image.coarse_mask, image.truth), 3),
        "iou": round(metrics.iou(mask, image.truth), 3),
        "steps": image.steps[FULL],
        "photos": {"input": _photo(image.image), "restored": _photo(image.normal)},
        "masks": {"ground truth": _mask(image.truth), "coarse mask": _mask(image.coarse_mask), "refined mask": _mask(mask)},
    }


def _url(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _photo(image: UInt8[np.ndarray, "h w 3"]) -> str:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "JPEG", quality=88)
    return _url("jpeg", buffer)


def _mask(mask: Bool[np.ndarray, "h w"]) -> str:
    """Returns the address of a picture with anomalous pixels in red and the others transparent."""
    picture = PIL.Image.fromarray(mask.astype(np.uint8), "P")
    picture.putpalette([0, 0, 0, 255, 40, 40])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=0, bits=1)
    return _url("png", buffer)


def tables_html(text: str) -> str:
    """Converts ``tables.md`` to HTML: headings, tables and paragraphs."""
    parts, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            parts.append(_rows_html(rows))
            rows = []
        if line.startswith("## "):
            parts.append(f"<h2>{html.escape(line[3:])}</h2>")
        elif line:
            parts.append(f"<p>{html.escape(line)}</p>")
    return "\n".join(parts)


def _rows_html(rows: Sequence[Sequence[str]]) -> str:
    """Converts the rows of a table; the first is its header, the second the line below the header."""
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[2:])
    return f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'
