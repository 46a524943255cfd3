import xml.etree.ElementTree as ElementTree

import numpy as np

from f2pad_jax.evaluation._charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    bar_chart,
    embedded,
    line_chart,
    standalone,
)


def texts(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter("text")]


def test_a_curve_goes_through_its_values():
    svg = line_chart("a < b", {"one": [0.0, 4.0, 2.0], "two": [1.0, 1.0, 1.0]}, x="step", y="loss")
    one, two = ElementTree.fromstring(svg).iter("polyline")
    points = np.array([pair.split(",") for pair in one.get("points").split()], float)
    np.testing.assert_allclose(points[:, 0], [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT], atol=0.1)
    np.testing.assert_allclose(points[:, 1], [HEIGHT - BOTTOM, TOP, (HEIGHT - BOTTOM + TOP) / 2], atol=0.1)
    assert len(set(two.get("points").split()[k].split(",")[1] for k in range(3))) == 1
    assert {"a < b", "one", "two", "step", "loss", "0", "1", "2", "3", "4"} <= set(texts(svg))


def test_bars_stand_on_zero_and_what_is_missing_has_none():
    svg = bar_chart("sizes", ["small", "large"], {"m0": [20.0, float("nan")], "F2PAD": [40.0, 30.0]}, high=40.0, y="IoU")
    bars = [
        {key: float(bar.get(key)) for key in ("x", "y", "width", "height")}
        for bar in ElementTree.fromstring(svg).iter("rect")
    ]
    assert len(bars) == 3
    np.testing.assert_allclose(
        [bar["height"] for bar in bars], np.array([0.5, 1.0, 0.75]) * (HEIGHT - TOP - BOTTOM), atol=0.1
    )
    assert all(abs(bar["y"] + bar["height"] - (HEIGHT - BOTTOM)) < 0.2 for bar in bars)
    assert {"small", "large", "m0", "F2PAD", "40"} <= set(texts(svg))


def test_a_file_names_its_namespace_and_a_page_does_not():
    svg = line_chart("title", {"one": [0.0, 1.0]}, x="step", y="loss")
    assert ElementTree.fromstring(standalone(svg)).tag == "{http://www.w3.org/2000/svg}svg"
    assert ElementTree.fromstring(svg).tag == "svg" and embedded(standalone(svg).decode()) == svg
