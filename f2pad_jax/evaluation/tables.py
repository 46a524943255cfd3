"""The paper's tables, written from the results that :func:`~f2pad_jax.evaluation.evaluate` keeps."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from f2pad_jax._storage import write_atomically
from f2pad_jax._version import __version__
from f2pad_jax.data.mvtec import RESIZING
from f2pad_jax.detectors.registry import TITLES
from f2pad_jax.evaluation._figures import Labelled, size_groups, write_figures
from f2pad_jax.evaluation._store import load_images, read_case
from f2pad_jax.evaluation._summary import Record
from f2pad_jax.evaluation.cases import ABLATIONS, FULL, Case

Column = tuple[str, str]
"""Method and backbone."""


def write_tables(out: str | Path, records: Sequence[Record]) -> list[Path]:
    """Writes ``tables.md``, ``timing.md``, ``results.csv`` and the figures of a run.

    ``tables.md`` does not depend on the speed of the machine; ``timing.md`` does.

    Args:
        out: folder of the run.
        records: records that ``evaluate`` returns.

    Returns:
        The paths of all files written.
    """
    out = Path(out)
    paths = [out / name for name in ("tables.md", "timing.md", "results.csv")]
    text = [f"f2pad_jax {__version__}; IoU and DICE times 100, means over images; {RESIZING}.", ""]
    timing = [
        "Steps and seconds per defective image, without compilation; the seconds of good images are included "
        "(paper, Table IV).",
        "",
    ]
    titles = list(TITLES)
    for protocol, setting in sorted({(r["protocol"], r["setting"]) for r in records}):
        part = [r for r in records if (r["protocol"], r["setting"]) == (protocol, setting)]
        columns = sorted({(r["method"], r["backbone"]) for r in part}, key=lambda c: (titles.index(c[0]), c[1]))
        images = {c: _defective_images(out, protocol, setting, c, part) for c in columns}
        text += [f"## {protocol}, {setting}", "", *_comparison(part, columns), *_peers(part, columns)]
        text += _ledger(part, columns)
        text += [*_ablation(part, columns), *_maps(part, columns), *_sizes(images), *_tuning(out, part)]
        timing += [f"## {protocol}, {setting}", "", *_timing(part, columns)]
        for column in columns:
            if images[column]:
                stem, title = "-".join((protocol, setting, *column)), f"{_title(column)}: {protocol}, {setting}"
                paths += write_figures(out / "pictures", stem, images[column], title)
    write_atomically(paths[0], "\n".join(text).encode())
    write_atomically(paths[1], "\n".join(timing).encode())
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(paths[2], buffer.getvalue().encode())
    return paths


def _title(column: Column) -> str:
    return f"{TITLES[column[0]]} ({column[1]})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table and an empty line."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _value(records: Sequence[Record], key: str) -> float:
    return float(np.mean([r[key] for r in records])) if records else float("nan")


def _cell(value: float, scale: float = 100.0) -> str:
    return "-" if np.isnan(value) else f"{scale * value:.1f}"


def _rows(part: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Returns the records of each category, and of all categories for the row of the mean."""
    names = sorted({r["category"] for r in part})
    rows = [(name, [r for r in part if r["category"] == name]) for name in names]
    return [*rows, ("mean", list(part))] if len(names) > 1 else rows


def _select(records: Sequence[Record], column: Column, variant: str) -> list[Record]:
    return [r for r in records if (r["method"], r["backbone"]) == column and r["variant"] == variant]


def _comparison(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Returns Tables I and II: the backbone at its best threshold, F2PAD, and the difference."""
    header = ["category", "images"]
    for column in columns:
        header += [f"{_title(column)} IoU", "DICE", "F2PAD IoU", "Δ", "DICE", "Δ"]
    rows = []
    for name, records in _rows([r for r in part if r["variant"] == FULL]):
        row = [name, str(max(sum(r["images"] for r in _select(records, column, FULL)) for column in columns))]
        for column in columns:
            selection = _select(records, column, FULL)
            before = [_value(selection, f"backbone_{metric}") for metric in ("iou", "dice")]
            after = [_value(selection, metric) for metric in ("iou", "dice")]
            row += [_cell(value) for value in before]
            row += [_cell(v) for b, a in zip(before, after, strict=True) for v in (a, a - b)]
        rows.append(row)
    note = "The backbone's masks are at the threshold of best F1 on the test labels; F2PAD has seen no label."
    return [note, "", *_table(header, rows)]


def _peers(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Returns the table of the peers, which start from the label-free coarse mask as F2PAD does."""
    peers = [v for v in dict.fromkeys(r["variant"] for r in part) if v != FULL and v not in ABLATIONS]
    header, rows = ["category", *(f"{_title(c)} {v}" for c in columns for v in (*peers, "F2PAD"))], []
    for name, records in _rows(part):
        rows.append([name, *(_cell(_value(_select(records, c, v), "iou")) for c in columns for v in (*peers, FULL))])
    return ["IoU of other ways to a mask from the same coarse map and mask.", "", *_table(header, rows)]


def _ablation(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Returns Table III, over the categories that have all variants."""
    variants = [v for v in ABLATIONS if any(r["variant"] == v for r in part)]
    if not variants:
        return []
    categories = {
        c: set.intersection(*({r["category"] for r in _select(part, c, v)} for v in (*variants, FULL))) for c in columns
    }
    header = ["ablation", *(f"{_title(c)}, {len(categories[c])} categories, {m}" for c in columns for m in ("IoU", "DICE"))]
    rows = []
    for variant in (*variants, FULL):
        selection = {c: [r for r in _select(part, c, variant) if r["category"] in categories[c]] for c in columns}
        rows.append([variant, *(_cell(_value(selection[c], m)) for c in columns for m in ("iou", "dice"))])
    note = "Contribution of each part, mean over the categories that have all variants (paper, Table III)."
    return [note, "", *_table(header, rows)]


def _maps(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Returns the table of metrics over all thresholds, of the masks at thresholds without labels, and of outlines."""
    boundaries = [f"boundary F1, {r} px" for r in (1, 2, 3)]
    header = ["category, method", "", "AUROC", "AP", "F1-max", "AUPRO", "AUPRO 0.05", "SegF1", *boundaries]
    measures, rows = ("auroc", "ap", "f1_max", "aupro", "aupro_05"), []
    for column in columns:
        for name, records in _rows([r for r in part if r["variant"] == FULL]):
            selection, title = _select(records, column, FULL), f"{name}, {_title(column)}"
            of_map, of_mask = (
                [_cell(_value(selection, prefix + key)) for key in measures] for prefix in ("", "probability_")
            )
            outlines = [_cell(_value(selection, f"boundary_f1_{r}")) for r in (1, 2, 3)]
            rows.append([title, "coarse map", *of_map, _cell(_value(selection, "seg_f1")), "", "", ""])
            rows.append([title, "F2PAD", *of_mask, _cell(_value(selection, "mask_seg_f1")), *outlines])
    note = (
        "Pixel metrics of the coarse map and of F2PAD's probability, all images together: AUROC, average precision, F1-max "
        "and AUPRO to a false positive rate of 0.3 and 0.05. SegF1 is the pixel F1 of m0 and of the masks, at thresholds "
        "that have seen no label. Boundary F1 is the mean over the defective images."
    )
    return [note, "", *_table(header, rows)]


def _ledger(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Returns the table that shows where points are lost: verdict, region, map and mask."""
    header = ["category, method", "image AUROC", "marked defects", "marked good images"]
    header += ["truth in the region", "best cut of the map", "m0", "F2PAD"]
    rows = []
    for column in columns:
        for name, records in _rows([r for r in part if r["variant"] == FULL]):
            selection = _select(records, column, FULL)
            known = [r for r in selection if not np.isnan(r["image_auroc"])]
            cells = [_cell(_value(known, "image_auroc"))]
            for marked, all_images in (("marked_defects", "images"), ("marked_good", "good_images")):
                cells.append(f"{sum(r[marked] for r in selection)} of {sum(r[all_images] for r in selection)}")
            cells += [_cell(_value(selection, key)) for key in ("region_recall", "best_cut", "coarse_iou", "iou")]
            rows.append([f"{name}, {_title(column)}", *cells])
    note = (
        "Where points are lost, in percent. Images with a score above 1 are marked. The share of the truth inside the "
        "region, and the IoU of three masks: the map cut at the best threshold of each image (by the truth), m0, and F2PAD."
    )
    return [note, "", *_table(header, rows)]


def _sizes(images: dict[Column, list[Labelled]]) -> list[str]:
    """Returns Fig. 7 as a table."""
    header = ["anomaly, % of image", *(f"{_title(c)} {w}" for c in images for w in ("images", "m0", "F2PAD"))]
    rows = [
        [groups[0].name, *(cell for g in groups for cell in (str(g.count), _cell(g.coarse_iou), _cell(g.iou)))]
        for groups in zip(*(size_groups(part) for part in images.values()), strict=True)
    ]
    return ["By size of the anomaly (paper, Fig. 7).", "", *_table(header, rows)]


def _tuning(out: Path, part: Sequence[Record]) -> list[str]:
    """Returns the table of the weights that tuning chose, with their IoU on synthetic defects."""
    header = ["category, method", "sparsity", "α1", "Gaussians", "IoU", "IoU with the defaults"]
    rows = []
    for r in (r for r in part if r["variant"] == FULL):
        case = Case(**{key: r[key] for key in ("category", "method", "backbone", "protocol", "setting")})
        file = out / "runs" / case.folder / "case.json"
        trials = read_case(file.parent).get("tuning", []) if file.exists() else []
        for choice in (trial for trial in trials if trial["chosen"]):
            cells = [f"{choice[key]:g}" for key in ("sparsity", "alpha1", "num_components")]
            rows.append([f"{r['category']}, {TITLES[r['method']]}", *cells, _cell(choice["iou"]), _cell(trials[0]["iou"])])
    note = "Weights chosen without a label, on synthetic defects of held-out normal images, and the mean IoU there."
    return [note, "", *_table(header, rows)] if rows else []


def _timing(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Returns Table IV."""
    header, rows = ["variant", *(f"{_title(c)} {w}" for c in columns for w in ("steps", "seconds"))], []
    for variant in (FULL, *ABLATIONS):
        if any(r["variant"] == variant for r in part):
            selections = [_select(part, c, variant) for c in columns]
            rows.append([variant, *(_cell(_value(s, k), 1.0) for s in selections for k in ("steps", "seconds_per_image"))])
    return _table(header, rows)


def _defective_images(out: Path, protocol: str, setting: str, column: Column, part: Sequence[Record]) -> list[Labelled]:
    """Returns the defective images of a column, sorted by category."""
    names = sorted({r["category"] for r in part})
    folders = [(name, out / "runs" / Case(name, *column, protocol, setting).folder) for name in names]
    return [Labelled(n, i) for n, f in folders if (f / "case.json").exists() for i in load_images(f) if not i.good]
