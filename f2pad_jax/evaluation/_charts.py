"""Charts as SVG: embedded in a page, or standalone as a file beside tables."""

import html
from collections.abc import Mapping, Sequence

import numpy as np

WIDTH, HEIGHT = 460.0, 240.0
"""Size of a chart, pixels."""
LEFT, RIGHT, TOP, BOTTOM = 64.0, 18.0, 30.0, 40.0
"""Margins around the axes, pixels."""
NAMESPACE = ' xmlns="http://www.w3.org/2000/svg"'
"""Attribute that a file of SVG needs and a page does not."""
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


def line_chart(title: str, series: Mapping[str, Sequence[float]], *, x: str, y: str) -> str:
    """Draws curves over 0, 1, 2, ..., on common axes, to be embedded in a page."""
    values = np.concatenate([np.asarray(v, float) for v in series.values()])
    low, high = float(values.min()), float(values.max())
    count = max(len(v) for v in series.values())
    parts = [*_axes(low, high, y), _text(WIDTH / 2, HEIGHT - 6, x), *_ticks([k * (count - 1) / 3 for k in range(4)])]
    for k, curve in enumerate(series.values()):
        across = np.linspace(LEFT, WIDTH - RIGHT, count)
        points = " ".join(f"{a:.1f},{_y_of(v, low, high):.1f}" for a, v in zip(across, curve, strict=False))
        parts.append(f'<polyline fill="none" stroke="{COLOURS[k % len(COLOURS)]}" stroke-width="1.5" points="{points}"/>')
    return _figure(title, parts, list(series))


def bar_chart(title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], *, high: float, y: str) -> str:
    """Draws groups of bars from zero to at most ``high``, to be embedded in a page; NaN has no bar."""
    parts, step = _axes(0.0, high, y), (WIDTH - LEFT - RIGHT) / len(groups)
    width = 0.8 * step / len(series)
    for g, group in enumerate(groups):
        parts.append(_text(LEFT + (g + 0.5) * step, HEIGHT - BOTTOM + 14, group))
        for k, values in enumerate(series.values()):
            if np.isnan(values[g]):
                continue
            top, left = _y_of(values[g], 0.0, high), LEFT + (g + 0.1) * step + k * width
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{HEIGHT - BOTTOM - top:.1f}" '
                f'fill="{COLOURS[k % len(COLOURS)]}"/>'
            )
    return _figure(title, parts, list(series))


def histogram(title: str, scores: Mapping[str, Sequence[float]]) -> str:
    """Draws the shares of scores in bins of a fifth, to be embedded in a page; the last bin holds all scores above 3."""
    names = [f"{k // 5}" if k % 5 == 0 else "" for k in range(15)] + ["3+"]
    series = {}
    for name, values in scores.items():
        places = np.clip(np.floor(5 * np.asarray(values, float)), 0, 15).astype(int)
        series[name] = (100 * np.bincount(places, minlength=16) / max(len(values), 1)).tolist()
    return bar_chart(title, names, series, high=max(map(max, series.values())), y="% of images")


def standalone(chart: str) -> bytes:
    """Returns the content of a file with the chart."""
    return chart.replace("<svg", f"<svg{NAMESPACE}", 1).encode()


def embedded(file: str) -> str:
    """Returns the chart of a file, to be embedded in a page."""
    return file.replace(NAMESPACE, "", 1)


def _y_of(value: float, low: float, high: float) -> float:
    """Returns the distance of a value from the top of the chart, pixels."""
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / max(high - low, 1e-12))


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "currentColor") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'


def _axes(low: float, high: float, label: str) -> list[str]:
    """Draws lines at quarters of the height, their values and the label of the axis."""
    parts = [_text(4.0, TOP - 8, label, "start")]
    for value in np.linspace(low, high, 5):
        y = _y_of(value, low, high)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        parts.append(_text(LEFT - 5, y + 4, f"{value:.3g}", "end"))
    return parts


def _ticks(values: Sequence[float]) -> list[str]:
    across = np.linspace(LEFT, WIDTH - RIGHT, len(values))
    return [_text(a, HEIGHT - BOTTOM + 14, f"{v:.0f}") for a, v in zip(across, values, strict=True)]


def _figure(title: str, parts: list[str], names: list[str]) -> str:
    size = (WIDTH - LEFT - RIGHT) / max(len(names), 1)
    legend = [_text(LEFT + (k + 0.5) * size, TOP - 8, n, colour=COLOURS[k % len(COLOURS)]) for k, n in enumerate(names)]
    head = f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" width="{WIDTH:g}" font-size="11" '
    head += 'font-family="system-ui, sans-serif" role="img">'
    return "\n".join(
        [head, f"<title>{html.escape(title)}</title>", _text(WIDTH / 2, 12.0, title), *legend, *parts, "</svg>"]
    )
