import bisect
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from f2pad_jax import Settings
from f2pad_jax.commands import main
from f2pad_jax.data import load_texture, open_category
from f2pad_jax.detectors.registry import DETECTORS, TITLES
from f2pad_jax.errors import OptionError, RunError
from f2pad_jax.evaluation import evaluate, write_tables
from f2pad_jax.evaluation._figures import GROUPS
from f2pad_jax.evaluation._store import load_images
from f2pad_jax.evaluation._summary import summarise
from f2pad_jax.evaluation.cases import FULL, Case, training_images
from f2pad_jax.evaluation.runs import generate_defects
from f2pad_jax.images import metrics, write_png
from f2pad_jax.method import Mixture
from f2pad_jax.progress import silent
from f2pad_jax.tuning import Trial

SIZE = 96
COLUMNS = "category method backbone protocol setting variant images iou dice coarse_iou coarse_dice steps seconds_per_image"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Brick with defects, in MVTec layout."""
    folder = tmp_path_factory.mktemp("root")
    # six to fit, as in other tests, so that programs are shared
    texture = load_texture("brick", size=SIZE, num_train=7, num_test=2)
    for k, crop in enumerate(texture.train[:-1]):
        write_png(folder / "brick" / "train" / "good" / f"{k:03}.png", crop)
    write_png(folder / "brick" / "test" / "good" / "000.png", texture.train[-1])
    for k, test in enumerate(texture.test):
        write_png(folder / "brick" / "test" / "patch" / f"{k:03}.png", np.asarray(test.image))
        write_png(folder / "brick" / "ground_truth" / "patch" / f"{k:03}_mask.png", test.mask)
    return folder


@pytest.fixture(scope="module")
def out(root, tmp_path_factory):
    """It evaluated as it is, by the command."""
    folder = tmp_path_factory.mktemp("out")
    options = f"--protocol real --size {SIZE} --ablations initialisation --curves 1".split()
    assert main(["evaluate", str(root), "--out", str(folder), *options]) == 0
    return folder


def without_time(records):
    return [{key: value for key, value in record.items() if key != "seconds_per_image"} for record in records]


def test_results_are_records_of_every_variant_and_peer(out):
    records = json.loads((out / "results.json").read_text())
    peers = {"threshold", "guided filter", "random walker", "MEBin", "GrabCut"}
    assert {r["variant"] for r in records} == {FULL, "initialisation", *peers}
    for record in records:
        assert set(COLUMNS.split()) <= set(record)
        assert (record["category"], record["method"]) == ("brick", "patchcore")
        assert record["images"] == 2 and record["good_images"] == 1
        assert 0 <= record["iou"] <= record["dice"] <= 1
    full, plain = (next(r for r in records if r["variant"] == variant) for variant in (FULL, "threshold"))
    assert full["iou"] > full["coarse_iou"] and full["iou"] > 0.4 and full["steps"] > 10
    assert full["boundary_f1_1"] <= full["boundary_f1_3"] and full["auroc"] > 0.9
    assert plain["iou"] == plain["coarse_iou"] == full["coarse_iou"]


def test_a_case_keeps_its_settings_and_the_sparsity_in_force(out):
    case = json.loads((out / "runs" / "real-normal-brick-patchcore-efficientnet-lite0" / "case.json").read_text())
    assert case["settings"] == Settings().described() and case["inpainter"] == "exemplar"
    assert case["sparsity"] == pytest.approx(Settings().sparsity)  # not tuned, and PatchCore's factor is 1


def test_good_images_alone_give_a_table_of_false_alarms(root, out, tmp_path, capsys):
    """A bad image among them is named, and stops nothing."""
    shutil.copytree(root / "brick" / "train", tmp_path / "data" / "brick" / "train")
    shutil.copytree(root / "brick" / "test" / "good", tmp_path / "data" / "brick" / "test" / "good")
    (tmp_path / "data" / "brick" / "test" / "good" / "001.png").write_text("no image")
    shutil.copytree(out / "models", tmp_path / "out" / "models")
    options = f"--protocol real --size {SIZE} --out {tmp_path / 'out'}".split()
    assert main(["evaluate", str(tmp_path / "data"), *options]) == 3
    text = capsys.readouterr()
    assert "001.png: not an image" in text.err
    assert re.search(r"\| brick, PatchCore .* \| - \| 0 of 0 \| [01] of 1 \| - \|", text.out)
    record = next(r for r in json.loads((tmp_path / "out" / "results.json").read_text()) if r["variant"] == FULL)
    assert (record["images"], record["good_images"], record["unusable_images"]) == (0, 1, 1) and np.isnan(record["iou"])


def test_every_method_has_a_title():
    assert set(TITLES) == set(DETECTORS)


def test_figures_are_those_of_the_masks_kept(root, out):
    folder = out / "runs" / "real-normal-brick-patchcore-efficientnet-lite0"
    images = load_images(folder)
    assert [i.name for i in images] == ["patch/000", "patch/001", "good/000"]
    record = next(r for r in summarise(folder) if r["variant"] == FULL)
    defective = images[:2]
    assert record["iou"] == pytest.approx(np.mean([metrics.iou(i.masks[FULL], i.truth) for i in defective]))
    assert record["coarse_dice"] == pytest.approx(np.mean([metrics.dice(i.coarse_mask, i.truth) for i in defective]))
    maps, truth = np.stack([i.coarse_map for i in images]), np.stack([i.truth for i in images])
    best = (maps > metrics.best_threshold(maps, truth))[:2]
    expected = np.mean([metrics.iou(*pair) for pair in zip(best, truth[:2], strict=True)])
    assert record["backbone_iou"] == pytest.approx(expected)
    assert record["aupro"] == metrics.aupro(maps, truth) and record["aupro_05"] == metrics.aupro(maps, truth, max_fpr=0.05)
    probability = np.stack([i.probability[FULL] for i in images])
    np.testing.assert_array_equal(probability > 0.5, np.stack([i.masks[FULL] for i in images]))
    assert record["probability_ap"] == metrics.average_precision(probability, truth)
    hits = [i.masks[FULL] & i.truth for i in images]
    assert record["mask_seg_f1"] == pytest.approx(2 * np.sum(hits) / (np.sum(probability > 0.5) + truth.sum()))
    assert images[2].good and record["marked_good"] == int(images[2].masks[FULL].any())


def test_tables_and_pictures_show_them(out):
    text = (out / "tables.md").read_text()
    record = next(r for r in json.loads((out / "results.json").read_text()) if r["variant"] == FULL)
    line = next(line for line in text.splitlines() if line.startswith("| brick | 2 |"))
    before, after = 100 * record["backbone_iou"], 100 * record["iou"]
    assert [f"{v:.1f}" for v in (before, 100 * record["backbone_dice"], after)] == line.split(" | ")[2:5]
    assert line.split(" | ")[5] == f"{after - before:.1f}"
    assert "Table III" in text and "nearest neighbour" in text
    assert len((out / "results.csv").read_text().splitlines()) == 1 + len(json.loads((out / "results.json").read_text()))
    assert "seconds" not in text and "seconds" in (out / "timing.md").read_text()
    assert len(list((out / "pictures").glob("*.png"))) == 2


PROBE = """<script>
const report = {};
try {
  const pairs = () => [...document.querySelectorAll(".pair")];
  report.pairs = pairs().length;
  report.start = pairs()[0].style.getPropertyValue("--at");
  pairs()[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  report.key = pairs()[0].style.getPropertyValue("--at");
  const box = pairs()[0].getBoundingClientRect();
  pairs()[0].dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 4}));
  report.pointer = pairs()[0].style.getPropertyValue("--at");
  const right = document.getElementById("right");
  right.value = "restored";
  right.dispatchEvent(new Event("change"));
  report.masks = pairs()[0].querySelectorAll(".right .mask").length;
  report.label = pairs()[0].getAttribute("aria-label");
  report.tables = document.querySelectorAll("table").length;
  report.curves = document.querySelectorAll("#charts polyline").length;
  report.bars = document.querySelectorAll("body > svg rect").length;
} catch (error) { report.error = String(error); }
Promise.all([...document.images].map(i => i.decode())).then(() => report.decoded = document.images.length,
  error => report.error = String(error)).then(() => document.title = JSON.stringify(report));
</script>"""


def test_the_report_works_in_a_browser_offline(out, tmp_path):
    """One file, without a network: images decode, and the slider and the choice of views do what they say."""
    page = (out / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    probed = tmp_path / "report.html"
    probed.write_text(page.replace("</body>", PROBE + "</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=30000", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr
    report = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    assert "error" not in report, report
    assert report["pairs"] == 3 and report["decoded"] >= 9 and report["tables"] >= 4
    assert (report["start"], report["key"], report["pointer"]) == ("50%", "55%", "25%")
    groups = {bisect.bisect_left(GROUPS, i.truth.mean()) for i in load_images(next((out / "runs").iterdir())) if not i.good}
    assert report["curves"] == 5 and report["bars"] == 2 * len(groups)  # Eq. (12) and its four terms; m0 and refined
    assert report["masks"] == 0 and report["label"].endswith("coarse mask against restored")


def test_a_run_killed_half_way_goes_on_and_ends_with_the_same_tables(root, out, tmp_path):
    whole = evaluate(root, out, protocols=["real"], size=SIZE)
    shutil.copytree(out, tmp_path / "part")
    run = tmp_path / "part" / "runs" / "real-normal-brick-patchcore-efficientnet-lite0"
    (run / "images" / "patch" / "001.npz").unlink()
    kept = run / "images" / "patch" / "000.npz"
    (model,) = (tmp_path / "part" / "models").glob("*.model")
    before = model.stat().st_mtime_ns, kept.stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        evaluate(root, tmp_path / "part", protocols=["real"], size=SIZE, progress=interrupt)
    again = evaluate(root, tmp_path / "part", protocols=["real"], size=SIZE, ablations=["initialisation"])
    assert without_time(again) == without_time(whole)
    assert before == (model.stat().st_mtime_ns, kept.stat().st_mtime_ns)
    write_tables(tmp_path / "part", again)
    assert (tmp_path / "part" / "tables.md").read_text() == (out / "tables.md").read_text()


def test_a_damaged_file_of_a_run_is_named(root, out, tmp_path, capsys):
    run = Path("runs") / "real-normal-brick-patchcore-efficientnet-lite0"
    shutil.copytree(out, tmp_path / "part")
    (record,) = (tmp_path / "part" / "models").glob("*.json")
    files = [tmp_path / "part" / run / name for name in ("case.json", "curves.json", "images/patch/000.npz")]
    for file in [*files, record]:
        content = file.read_bytes()
        half = bytearray(content)
        half[len(half) // 2] ^= 1
        for altered in (b"", content[:-9], b"[]" if file.suffix == ".json" else bytes(half), b"\xff" + content[1:]):
            file.write_bytes(altered)
            options = ["--protocol", "real", "--size", str(SIZE), "--ablations", "initialisation", "paper"]
            evaluating = ["evaluate", str(root), "--out", str(tmp_path / "part"), *options]
            assert main(evaluating[: 8 if file in files else None]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{file.name}: damaged" in line and "delete it" in line
        file.write_bytes(content)


def test_tables_have_a_row_for_the_mean_and_columns_for_every_method(tmp_path):
    shared = {"protocol": "hard", "setting": "normal", "variant": FULL, "images": 3, "good_images": 1}
    shared |= {"marked_good": 0, "marked_defects": 3}
    keys = [
        "coarse_iou",
        "coarse_dice",
        "backbone_iou",
        "backbone_dice",
        "auroc",
        "ap",
        "f1_max",
        "aupro",
        "aupro_05",
        *(f"probability_{key}" for key in ("auroc", "ap", "f1_max", "aupro", "aupro_05")),
        "seg_f1",
        "mask_seg_f1",
        "dice",
        "steps",
        "seconds_per_image",
        "image_auroc",
        "region_recall",
        "best_cut",
    ]
    records = [
        {"category": c, "method": m, "backbone": b, "iou": v, **dict.fromkeys(keys, 0.5), **shared}
        | {f"boundary_f1_{r}": 0.25 * r for r in (1, 2, 3)}
        for c, m, b, v in (("nut", "padim", "x", 0.8), ("bolt", "padim", "x", 0.6), ("nut", "cflow", "y", 0.9))
    ]
    tried = [Trial(0.01, 1.5, 6, 0.8, 16, 0.0, 0.0, False), Trial(0.003, 1.5, 6, 0.9, 16, 0.1, 0.02, True)]
    (folder := tmp_path / "runs" / "hard-normal-nut-padim-x").mkdir(parents=True)
    about = {"category": "nut", "method": "padim", "tuning": [t._asdict() for t in tried], "samples": []}
    (folder / "case.json").write_text(json.dumps(about))
    lines = write_tables(tmp_path, records)[0].read_text().splitlines()
    assert "| nut, PaDiM | 1.5 | 0.003 | 6 | 90.0 | 80.0 |" in lines
    header = next(line for line in lines if line.startswith("| category | images"))
    assert header.split(" | ")[2:9:6] == ["CFLOW-AD (y) IoU", "PaDiM (x) IoU"]
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in lines[: lines.index(header) + 5]}
    assert rows["bolt"][2:8] == ["-"] * 6  # CFLOW-AD was not run there
    assert rows["nut"][4] == "90.0" and rows["nut"][10] == "80.0" and rows["nut"][11] == "30.0"
    assert rows["mean"][4] == "90.0" and rows["mean"][10] == "70.0"
    assert not list(tmp_path.glob("pictures/*"))


def interrupt(stage, done, total):
    if "refining" in stage:
        raise KeyboardInterrupt


def test_another_seed_is_another_run_and_so_are_other_settings(root, out, monkeypatch):
    another = pytest.raises(
        RunError, match="holds a run with another size, seed, tuning, half, inpainter, settings or ignored pixels"
    )
    with another:
        evaluate(root, out, protocols=["real"], size=SIZE, seed=1)
    monkeypatch.setattr("f2pad_jax.evaluation.runs.Settings", lambda: Settings(decision=Mixture(floor=0.2)))
    with another:
        evaluate(root, out, protocols=["real"], size=SIZE)


def test_generated_defects_are_made_once(root, tmp_path):
    data = tmp_path / "data"
    generate_defects(root, data, "cut-paste", None, 2, (SIZE, SIZE), 0, silent)
    assert len(open_category(data / "brick").test) == 2
    written = (data / "manifest.json").stat().st_mtime_ns
    generate_defects(root, data, "cut-paste", ["brick"], 2, (SIZE, SIZE), 0, silent)
    assert (data / "manifest.json").stat().st_mtime_ns == written
    for changed in ((3, (SIZE, SIZE), 0), (2, (64, 64), 0), (2, (SIZE, SIZE), 1)):
        with pytest.raises(RunError, match="another data set"):
            generate_defects(root, data, "cut-paste", None, *changed, silent)


def test_few_shots_are_sixteen_of_the_training_images(root):
    paths = [Path(f"{k}.png") for k in range(40)]
    category = open_category(root / "brick")._replace(train=paths)
    normal, few = (Case("brick", "patchcore", "resnet18", "real", s) for s in ("normal", "few-shot"))
    assert training_images(normal, category, 0) == paths
    chosen = training_images(few, category, 0)
    assert len(set(chosen)) == 16 and set(chosen) < set(paths) and chosen == training_images(few, category, 0)
    assert chosen != training_images(few, category, 1)


def test_what_is_unknown_is_refused(root, tmp_path, capsys):
    for asked in ({"methods": ["svm"]}, {"protocols": ["soft"]}, {"settings": ["some"]}, {"ablations": ["all"]}):
        with pytest.raises(OptionError, match="is unknown; there are"):
            evaluate(root, tmp_path, **asked)
    assert main(["evaluate", str(root / "brick"), "--out", str(tmp_path)]) == 2
    assert "no category in it" in capsys.readouterr().err


def test_the_command_makes_a_data_set_and_makes_it_again(root, tmp_path, capsys):
    made, again = tmp_path / "made", tmp_path / "again"
    command = ["make-dataset", str(root), "--out", str(made), "--protocol", "hard", "--count", "2", "--size", str(SIZE)]
    assert main(command) == 0 and "2 defective images in each category (brick)" in capsys.readouterr().out
    assert main(["make-dataset", str(root), "--out", str(again), "--manifest", str(made / "manifest.json")]) == 0
    pictures = {path.relative_to(made): path.read_bytes() for path in made.rglob("*.png")}
    assert pictures == {path.relative_to(again): path.read_bytes() for path in again.rglob("*.png")}
