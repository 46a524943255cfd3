"""Regions of masks: measurements against known shapes, and files read back as other programs read them."""

import csv
import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
from pycocotools.coco import COCO
from skimage import draw

from f2pad_jax import Refined, find_regions
from f2pad_jax.commands._results_page import write_page
from f2pad_jax.errors import ImageError
from f2pad_jax.images.metrics import iou
from f2pad_jax.regions import FORMATS
from f2pad_jax.regions.formats import COLUMNS, write_tables
from f2pad_jax.regions.measure import described, mask_of, run_lengths

SIZE = (60, 80)


def refined(mask, anomaly=None, heat=None):
    """Result with this mask; all else is 0."""
    batch, pixels = mask.shape[:-2], np.zeros((*mask.shape, 3), np.float32)
    number, count = np.zeros(batch, np.float32), np.zeros(batch, np.int32)
    return Refined(
        mask=mask,
        normal=pixels,
        anomaly=pixels if anomaly is None else anomaly,
        coarse_map=pixels[..., 0] if heat is None else heat,
        coarse_mask=mask,
        region=mask,
        score=number,
        p_value=number,
        unlike=np.zeros(batch, bool),
        sparsity=number,
        steps=count,
        objective=number,
        outcome=count,
        probability=np.asarray(mask, np.float32),
    )


@pytest.fixture(scope="module")
def mask():
    """A frame, a tilted bar and a single pixel."""
    mask = np.zeros(SIZE, bool)
    mask[10:20, 5:45] = True
    mask[12:15, 10:20] = False
    mask[draw.polygon([28, 34, 54, 48], [30, 24, 60, 66])] = True
    mask[58, 78] = True
    return mask


@pytest.fixture(scope="module")
def records(mask):
    """Records of an image with three regions and of a good image."""
    regions = [described(region, SIZE, 0.5) for region in find_regions(refined(mask))]
    common = {"height": SIZE[0], "width": SIZE[1]}
    return [
        {"image": "line 1/a.png", "name": "line 1/a", "verdict": "defective", "regions": regions, **common},
        {"image": "b.png", "name": "b", "verdict": "good", "regions": [], **common},
    ]


def test_measurements_of_known_shapes(mask):
    heat, anomaly = np.zeros(SIZE, np.float32), np.zeros((*SIZE, 3), np.float32)
    heat[10, 5], heat[58, 78], anomaly[58, 78] = 3, 2, [-0.3, 0, 0.6]
    frame, bar, dot = find_regions(refined(mask, anomaly, heat))
    assert (frame.box, frame.area, len(frame.outlines)) == ((10, 5, 20, 45), 370, 2)
    assert (frame.length, frame.width, frame.angle, frame.score) == (40, 10, 0, 3)
    assert abs(frame.perimeter - 2 * (40 + 10 + 10 + 3)) < 6  # corners are cut
    assert abs(bar.length - np.hypot(26, 36)) < 3 and abs(bar.width - np.hypot(6, 6)) < 3
    assert abs(bar.angle + np.degrees(np.arctan2(20, 36))) < 5  # downwards to the right
    assert (dot.area, dot.length, dot.width, dot.centroid, dot.score) == (1, 1, 1, (58.5, 78.5), 2)
    assert dot.contrast == pytest.approx(0.3) and frame.contrast == 0 and frame.probability == 1
    np.testing.assert_array_equal(mask_of([frame, bar, dot], SIZE), mask)


def test_an_upright_bar_is_longer_than_wide():
    mask = np.zeros(SIZE, bool)
    mask[10:50, 20:24] = True
    mask[50:, 20:24] = True  # to the last row: no run follows the last one
    (bar,) = find_regions(refined(mask))
    assert sum(run_lengths(bar.mask, bar.box[:2], SIZE)) == SIZE[0] * SIZE[1]
    mask[50:, 20:24] = False
    (bar,) = find_regions(refined(mask))
    assert (bar.length, bar.width, abs(bar.angle)) == (40, 4, 90)


def test_an_empty_mask_has_no_region_and_a_batch_is_refused():
    assert find_regions(refined(np.zeros(SIZE, bool))) == []
    with pytest.raises(ImageError, match="one at a time"):
        find_regions(refined(np.zeros((2, *SIZE), bool)))


@pytest.mark.parametrize("name", ["coco", "coco-rle"])
def test_pycocotools_reads_the_masks_back(name, records, mask, tmp_path, capsys):
    FORMATS[name](records, tmp_path)
    coco = COCO(tmp_path / f"{name.replace('-', '_')}.json")
    found = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    assert len(coco.imgs) == 2 and not coco.getAnnIds(imgIds=[2]) and [a["area"] for a in found][2] == 1
    pieces = [coco.annToMask(annotation).astype(bool) for annotation in found]
    whole = np.any(pieces, axis=0)
    assert (whole == mask).all() if name == "coco-rle" else iou(whole, mask) > 0.95
    for annotation, region in zip(found, records[0]["regions"], strict=True):
        left, top, width, height = annotation["bbox"]
        assert [top, left, top + height, left + width] == region["box"]


def test_labelme_has_polygons_and_holes(records, mask, tmp_path):
    FORMATS["labelme"](records, tmp_path)
    content = json.loads((tmp_path / "labelme" / "line 1" / "a.json").read_text())
    assert {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"} == set(content)
    picture = PIL.Image.new("1", (8 * SIZE[1], 8 * SIZE[0]))
    for shape in content["shapes"]:
        assert shape["shape_type"] == "polygon" and len(shape["points"]) > 2
        PIL.ImageDraw.Draw(picture).polygon([(8 * x, 8 * y) for x, y in shape["points"]], fill=shape["label"] == "defect")
    assert iou(np.asarray(picture)[4::8, 4::8], mask) > 0.95
    assert (tmp_path / "labelme" / "line 1" / content["imagePath"]).resolve() == Path(records[0]["image"]).resolve()
    assert json.loads((tmp_path / "labelme" / "b.json").read_text())["shapes"] == []


def test_cvat_has_exact_masks(records, mask, tmp_path):
    FORMATS["cvat"](records, tmp_path)
    root = ET.parse(tmp_path / "cvat.xml").getroot()
    assert root.findtext("version") == "1.1" and [image.get("name") for image in root.iter("image")] == [
        "line 1/a.png",
        "b.png",
    ]
    found = np.zeros(SIZE, bool)
    for element in root.iter("mask"):
        left, top, width, height = (int(element.get(name)) for name in ("left", "top", "width", "height"))
        runs = [int(run) for run in element.get("rle").split(", ")]
        piece = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
        found[top : top + height, left : left + width] |= piece
    np.testing.assert_array_equal(found, mask)


def test_yolo_has_a_line_a_region(records, mask, tmp_path):
    FORMATS["yolo"](records, tmp_path)
    lines = (tmp_path / "labels" / "line 1" / "a.txt").read_text().splitlines()
    assert len(lines) == 3 and (tmp_path / "labels" / "b.txt").read_text() == ""
    for line, region in zip(lines, records[0]["regions"], strict=True):
        kind, *values = map(float, line.split())
        points = np.reshape(values, (-1, 2)) * [SIZE[1], SIZE[0]]
        np.testing.assert_allclose(points, region["outlines"][0][:-1], atol=1e-4)
        assert kind == 0 and np.all(np.array(values) >= 0) and np.all(np.array(values) <= 1)


def test_geojson_has_closed_rings(records, tmp_path):
    FORMATS["geojson"](records, tmp_path)
    features = json.loads((tmp_path / "regions.geojson").read_text())["features"]
    assert [len(feature["geometry"]["coordinates"]) for feature in features] == [2, 1, 1]
    assert all(ring[0] == ring[-1] for feature in features for ring in feature["geometry"]["coordinates"])
    assert features[0]["properties"]["area_mm2"] == 370 / 4 and features[0]["properties"]["image"] == "line 1/a.png"


PROBE = """<script>
const report = {};
try {
  const figures = () => [...document.querySelectorAll("figure")];
  report.first = figures()[0].querySelector("b").textContent;
  report.all = figures().length;
  function choose(id, value) {
    const field = document.getElementById(id);
    field.value = value;
    field.dispatchEvent(new Event("input"));
  }
  choose("show", "good");
  report.good = figures().length;
  choose("show", "all");
  choose("name", "part 1/");
  report.named = figures().length;
  choose("name", "");
  const picture = figures()[0].querySelector("img"), box = picture.getBoundingClientRect();
  report.lazy = [...document.images].every(image => image.loading === "lazy");
  report.seen = [];
  for (const place of [0.1, 0.4, 0.6, 0.9]) {
    picture.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + place * box.width}));
    report.seen.push(picture.alt.split(", ").at(-1));
  }
  report.rows = figures()[0].querySelectorAll("tr").length;
  picture.loading = "eager";
  picture.decode().then(() => report.decoded = true, error => report.error = String(error))
    .then(() => document.title = JSON.stringify(report));
} catch (error) { document.title = JSON.stringify({error: String(error)}); }
</script>"""


def test_the_page_works_in_a_browser_with_500_images(records, tmp_path):
    """Sorting, filters and the four views do what they say, and no picture loads before it is seen."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    common = {"p_value": 0.01, "message": "</script>", "anomalous_pixels": 4}
    many = []
    for i in range(500):
        name = f"part {i % 5}/{i}"
        files = {kind: f"{name}_{kind}.png" for kind in ("overlay", "mask", "normal")}
        of_image = {"name": name, "image": str(tmp_path / "in put" / f"{i}.png"), "score": i / 100}
        many.append(records[i % 2] | common | files | of_image)
    for path in [Path(many[499]["image"]), *(tmp_path / "out" / many[499][kind] for kind in files)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8)).save(path)
    page = write_page(many, tmp_path / "out").read_text()
    assert "http://" not in page and "https://" not in page
    probed = tmp_path / "out" / "probed.html"
    probed.write_text(page.replace("</body>", PROBE + "</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=30000", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    report = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    assert report == {
        "first": "part 4/499", "all": 500, "good": 250, "named": 100, "lazy": True, "rows": 0, "decoded": True,
        "seen": ["overlay", "input", "mask", "restored"],
    }  # fmt: skip


def test_tables_have_a_row_an_image_and_a_row_a_region(records, tmp_path):
    write_tables(records, tmp_path)
    images, regions = (list(csv.DictReader((tmp_path / f"{n}.csv").open())) for n in ("results", "regions"))
    assert [row["regions"] for row in images] == ["3", "0"]
    assert (regions[0]["image"], regions[0]["region"], regions[0]["area"]) == ("line 1/a.png", "0", "370")
    assert regions[0]["length_mm"] == "20.0" and regions[0]["top"] == "10"
    write_tables(records[1:], tmp_path)
    assert (tmp_path / "regions.csv").read_text() == ",".join(COLUMNS) + "\n"
