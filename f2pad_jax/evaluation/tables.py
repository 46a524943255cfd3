"""The paper's tables and figures from what :func:`~f2pad_jax.evaluation.evaluate.evaluate` kept."""

import csv
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import f2pad_jax
from f2pad_jax.checkpoints import write_atomically
from f2pad_jax.data.images import write_png
from f2pad_jax.data.mvtec import RESIZING
from f2pad_jax.evaluation import metrics
from f2pad_jax.evaluation.charts import as_file, bar_chart
from f2pad_jax.evaluation.evaluate import ABLATIONS, FULL, Case, Looked, load_images
from f2pad_jax.evaluation.pictures import gallery, overlay

Record = dict[str, Any]

TITLES = {"patchcore": "PatchCore", "cflow": "CFLOW-AD", "padim": "PaDiM"}
GROUPS = (0.0, 0.02, 0.04, 0.06, 0.08, 1.0)
"""Borders of the paper's five groups of anomaly size, shares of the image (Fig. 7)."""


def write_tables(out: str | Path, records: Sequence[Record]) -> list[Path]:
    """Write ``tables.md``, ``results.csv``, ``timing.md``, and pictures of masks and failures, into ``out``.

    What is in ``tables.md`` doesn't depend on the machine's speed; that is in ``timing.md``.
    """
    out = Path(out)
    written = [out / name for name in ("tables.md", "timing.md", "results.csv")]
    groups = sorted({(r["protocol"], r["setting"]) for r in records})
    text = [f"f2pad_jax {f2pad_jax.__version__}; IoU and DICE times 100, means over images; {RESIZING}.", ""]
    timing = ["Steps and seconds an image, compilation not counted, good images' seconds shared out (paper, Table IV).", ""]
    for protocol, setting in groups:
        part = [r for r in records if (r["protocol"], r["setting"]) == (protocol, setting)]
        columns = sorted({(r["method"], r["backbone"]) for r in part}, key=lambda c: (list(TITLES).index(c[0]), c[1]))
        runs = {c: _images(out, protocol, setting, c, part) for c in columns}
        text += [f"## {protocol}, {setting}", "", *_comparison(part, columns), *_peers(part, columns)]
        text += [*_ablation(part, columns), *_maps(part, columns), *_sizes(runs), *_tuned(out, part)]
        timing += [f"## {protocol}, {setting}", "", *_timing(part, columns)]
        for column, images in runs.items():
            stem = "-".join((protocol, setting, *column))
            written += _pictures(out, stem, images, f"{_title(column)}: {protocol}, {setting}") if images else []
    write_atomically(written[0], "\n".join(text).encode())
    write_atomically(written[1], "\n".join(timing).encode())
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(written[2], buffer.getvalue().encode())
    return written


Column = tuple[str, str]
"""Method and backbone."""


def _title(column: Column) -> str:
    return f"{TITLES[column[0]]} ({column[1]})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _value(records: Sequence[Record], key: str) -> float:
    return float(np.mean([r[key] for r in records])) if records else float("nan")


def _cell(value: float, scale: float = 100.0) -> str:
    return "-" if np.isnan(value) else f"{scale * value:.1f}"


def _rows(part: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """The categories' records, then those of all as the mean."""
    names = sorted({r["category"] for r in part})
    rows = [(name, [r for r in part if r["category"] == name]) for name in names]
    return [*rows, ("mean", list(part))] if len(names) > 1 else rows


def _of(records: Sequence[Record], column: Column, variant: str) -> list[Record]:
    return [r for r in records if (r["method"], r["backbone"]) == column and r["variant"] == variant]


def _comparison(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Tables I and II: the backbone at its best threshold, F2PAD, and the difference."""
    header = ["category", "images"]
    for column in columns:
        header += [f"{_title(column)} IoU", "DICE", "F2PAD IoU", "Δ", "DICE", "Δ"]
    rows = []
    for name, records in _rows([r for r in part if r["variant"] == FULL]):
        row = [name, str(max(sum(r["images"] for r in _of(records, column, FULL)) for column in columns))]
        for column in columns:
            own = _of(records, column, FULL)
            for metric in ("iou", "dice"):
                before, after = _value(own, f"backbone_{metric}"), _value(own, metric)
                row += [_cell(before), _cell(after), _cell(after - before)]
        # backbone's two, then F2PAD's
        cells = [row[2 + 6 * k : 8 + 6 * k] for k in range(len(columns))]
        rows.append(row[:2] + [cell for b in cells for cell in (b[0], b[3], b[1], b[2], b[4], b[5])])
    note = "The backbone's masks are at the threshold of best F1 on the test labels; F2PAD has seen no label."
    return [note, "", *_table(header, rows)]


def _peers(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Other ways from the same label-free coarse mask."""
    variants = [v for v in dict.fromkeys(r["variant"] for r in part) if v != FULL and v not in ABLATIONS]
    header, rows = ["category", *(f"{_title(c)} {v}" for c in columns for v in (*variants, "F2PAD"))], []
    for name, records in _rows(part):
        rows.append([name, *(_cell(_value(_of(records, c, v), "iou")) for c in columns for v in (*variants, FULL))])
    return ["IoU of other ways to a mask from the same coarse map and mask.", "", *_table(header, rows)]


def _ablation(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Table III, of the categories that have all variants."""
    variants = [v for v in ABLATIONS if any(r["variant"] == v for r in part)]
    if not variants:
        return []
    complete = {
        c: set.intersection(*({r["category"] for r in _of(part, c, v)} for v in (*variants, FULL))) for c in columns
    }
    header = ["ablation", *(f"{_title(c)}, {len(complete[c])} categories, {m}" for c in columns for m in ("IoU", "DICE"))]
    rows = []
    for variant in (*variants, FULL):
        found = {c: [r for r in _of(part, c, variant) if r["category"] in complete[c]] for c in columns}
        rows.append([variant, *(_cell(_value(found[c], m)) for c in columns for m in ("iou", "dice"))])
    return ["What each part gives, mean of the categories that have all (paper, Table III).", "", *_table(header, rows)]


def _maps(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """What holds at every threshold, and boundaries."""
    boundaries = [f"boundary F1, {r} px" for r in (1, 2, 3)]
    header = ["category, method", "AUROC", "AP", "F1-max", "AUPRO", *boundaries, "false alarms"]
    rows = []
    for column in columns:
        for name, records in _rows([r for r in part if r["variant"] == FULL]):
            own = _of(records, column, FULL)
            cells = [_cell(_value(own, key)) for key in ("auroc", "ap", "f1_max", "aupro")]
            cells += [_cell(_value(own, f"boundary_f1_{r}")) for r in (1, 2, 3)]
            alarms, good = (sum(r[key] for r in own) for key in ("false_alarms", "good_images"))
            rows.append([f"{name}, {_title(column)}", *cells, f"{alarms} of {good}"])
    note = (
        "Of the coarse map: pixel AUROC, average precision, F1-max and AUPRO (to a false positive rate of 0.3), all images "
        "together. Of the refined masks: boundary F1, and good images with a mask that is not empty."
    )
    return [note, "", *_table(header, rows)]


def _by_size(images: list[tuple[str, Looked]]) -> list[tuple[str, int, float, float]]:
    """Each group of anomaly sizes, its number of images, and the mean IoU of m0 and of the refined mask."""
    groups = []
    for low, high in itertools.pairwise(GROUPS):
        inside = [i for _, i in images if low < i.truth.mean() <= high]
        means = []
        for masks in ([i.coarse_mask for i in inside], [i.masks[FULL] for i in inside]):
            values = [metrics.iou(m, i.truth) for m, i in zip(masks, inside, strict=True)]
            means.append(float(np.mean(values)) if values else float("nan"))
        name = f"{100 * low:.0f} to {100 * high:.0f}" if high < 1 else f"over {100 * low:.0f}"
        groups.append((name, len(inside), means[0], means[1]))
    return groups


def _sizes(runs: dict[Column, list[tuple[str, Looked]]]) -> list[str]:
    """Fig. 7."""
    header = ["anomaly, % of image", *(f"{_title(c)} {w}" for c in runs for w in ("images", "m0", "F2PAD"))]
    rows = [
        [cells[0][0], *(cell for _, count, before, after in cells for cell in (str(count), _cell(before), _cell(after)))]
        for cells in zip(*(_by_size(images) for images in runs.values()), strict=True)
    ]
    return ["By size of the anomaly (paper, Fig. 7).", "", *_table(header, rows)]


def _tuned(out: Path, part: Sequence[Record]) -> list[str]:
    """What tuning chose, and why."""
    header = ["category, method", "sparsity", "α1", "Gaussians", "IoU", "IoU with the defaults"]
    rows = []
    for r in (r for r in part if r["variant"] == FULL):
        case = Case(**{key: r[key] for key in ("category", "method", "backbone", "protocol", "setting")})
        file = out / "runs" / case.folder / "case.json"
        trials = json.loads(file.read_text())["tuning"] if file.exists() else []
        for chosen in (trial for trial in trials if trial["chosen"]):
            cells = [f"{chosen[key]:g}" for key in ("sparsity", "alpha1", "num_components")]
            rows.append([f"{r['category']}, {TITLES[r['method']]}", *cells, _cell(chosen["iou"]), _cell(trials[0]["iou"])])
    note = "What was chosen without a label, on synthetic defects of held-out normal images, and the mean IoU there."
    return [note, "", *_table(header, rows)] if rows else []


def _timing(part: Sequence[Record], columns: Sequence[Column]) -> list[str]:
    """Table IV."""
    header, rows = ["variant", *(f"{_title(c)} {w}" for c in columns for w in ("steps", "seconds"))], []
    for variant in (FULL, *ABLATIONS):
        if any(r["variant"] == variant for r in part):
            own = [_of(part, c, variant) for c in columns]
            rows.append([variant, *(_cell(_value(r, k), 1.0) for r in own for k in ("steps", "seconds_per_image"))])
    return _table(header, rows)


def _images(out: Path, protocol: str, setting: str, column: Column, part: Sequence[Record]) -> list[tuple[str, Looked]]:
    """The defective images of a column, with their categories."""
    names = sorted({r["category"] for r in part})
    folders = [(name, out / "runs" / Case(name, *column, protocol, setting).folder) for name in names]
    return [(n, i) for n, f in folders if (f / "case.json").exists() for i in load_images(f) if not i.good]


def _pictures(out: Path, stem: str, images: list[tuple[str, Looked]], title: str) -> list[Path]:
    """Fig. 6: some images of each category; Fig. 11: those of the lowest IoU; Fig. 7 as a chart."""
    chosen = []
    for name in dict.fromkeys(n for n, _ in images):
        own = [(n, i) for n, i in images if n == name]
        chosen += [own[k] for k in np.unique(np.linspace(0, len(own) - 1, 3).astype(int))]
    worst = sorted(images, key=lambda pair: metrics.iou(pair[1].masks[FULL], pair[1].truth))[:10]
    written = []
    for kind, some in (("examples", chosen), ("failures", worst)):
        rows, labels = [], []
        for name, i in some:
            mask = i.masks[FULL]
            rows.append([i.image, i.truth, i.coarse_mask, mask, overlay(i.image, mask), i.normal])
            before, after = metrics.iou(i.coarse_mask, i.truth), metrics.iou(mask, i.truth)
            labels.append(f"{name}\n{i.name}\nIoU m0 {before:.3f}\nrefined {after:.3f}")
        titles = ("input", "ground truth", "coarse mask", "refined mask", "outline", "restored")
        path = out / "pictures" / f"{stem}-{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, gallery(rows, titles, labels))
        written.append(path)
    groups = _by_size(images)
    series = {"m0": [100 * g[2] for g in groups], "F2PAD": [100 * g[3] for g in groups]}
    chart = bar_chart(title, [f"{g[0]} % ({g[1]})" for g in groups], series, high=100.0, y="IoU")
    path = out / "pictures" / f"{stem}-sizes.svg"
    write_atomically(path, as_file(chart))
    return [*written, path]
