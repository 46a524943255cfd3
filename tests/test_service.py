"""Images over HTTP and from a folder that is being filled: every one has its answer once, whatever happens in between."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from conftest import MeanColour, bright_blocks, calibration
from pycocotools import mask as coco

from f2pad_jax import refine_many
from f2pad_jax.commands import _refine_options as refine_options
from f2pad_jax.commands import main, parser, serve
from f2pad_jax.commands._archive import Archive
from f2pad_jax.commands._live import Live
from f2pad_jax.commands._refine_files import worker
from f2pad_jax.commands.watch import refined
from f2pad_jax.errors import ImageError
from f2pad_jax.streaming._stream import Worker, stream

httpx = pytest.importorskip("httpx2")
testclient = pytest.importorskip("fastapi.testclient")
WHITE = 4095
LIMITS = serve.Limits(num_images=2, max_bytes=20_000, max_pixels=1200)
COMMAND = """
import sys
from test_service import detector
from f2pad_jax.commands import _refine_options, main
_refine_options.load_detector = lambda *_, **__: detector()
sys.exit(main(sys.argv[1:]))
"""
"""A process of the command with the detector of these tests, of a class that no model file can hold."""


def detector():
    return MeanColour(jnp.zeros(3), dataclasses.replace(calibration(0.25), white=WHITE))


def good(seed=0):
    return np.random.default_rng(seed).integers(110, 120, (24, 24, 3)).astype(np.uint8)


def defective(k=0):
    return (bright_blocks()[k] * 255).round().astype(np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def waited(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with an image, links, and a neighbour outside it."""
    folder = tmp_path_factory.mktemp("line")
    root, outside = folder / "root", folder / "outside"
    save(root / "in" / "a.png", defective())
    save(outside / "secret.png", good())
    (root / "large.png").write_bytes(bytes(LIMITS.max_bytes + 1))
    (root / "inside.png").symlink_to(root / "in" / "a.png")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside, target_is_directory=True)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.fixture(scope="module")
def client(root):
    with testclient.TestClient(serve.application(detector(), root=root, limits=LIMITS)) as client:
        waited(lambda: client.get("/health").status_code == 200)
        yield client


def upload(client, data, name="a.png", **query):
    return client.post("/refine", files={"image": (name, data)}, params=query)


def test_an_answer_has_the_result_of_refine_many(client):
    images = [defective(), good()]
    for image, expected in zip(images, refine_many(detector(), images), strict=True):
        whole = upload(client, png(image), mask="png")
        assert whole.status_code == 200
        answer = whole.json()
        assert answer["image"] == "a.png" and answer["name"] == "a"
        assert answer["verdict"] == ("defective" if expected.defective else "good")
        assert answer["score"] == round(float(expected.score), 4)
        assert sum(region["area"] for region in answer["regions"]) == expected.mask.sum() == answer["anomalous_pixels"]
        with PIL.Image.open(io.BytesIO(base64.b64decode(answer["mask"]))) as picture:
            np.testing.assert_array_equal(np.asarray(picture, bool), expected.mask)
        lengths = upload(client, png(image), mask="rle").json()["mask"]
        found = coco.decode(coco.frPyObjects(lengths, *lengths["size"]))
        np.testing.assert_array_equal(found.astype(bool), expected.mask)
        assert upload(client, png(image), mask="none").json() == {k: v for k, v in answer.items() if k != "mask"}
    assert expected.mask.sum() == 0 and not expected.defective  # an empty mask is among them


def test_deep_pixels_have_the_white_level_of_the_model(client):
    deep = np.rint(defective()[..., 0] * (WHITE / 255)).astype(np.uint16)
    shallow = np.repeat(np.rint(deep * (255 / WHITE)).astype(np.uint8)[..., None], 3, axis=-1)
    assert upload(client, png(deep)).json() == upload(client, png(shallow)).json()


def test_a_path_is_read_below_the_root(client):
    by_path = client.post("/refine/path", json={"path": "in/a.png"})
    assert by_path.status_code == 200
    expected = upload(client, png(defective())).json() | {"image": "in/a.png"}
    assert by_path.json() == expected
    assert client.post("/refine/path", json={"path": "inside.png"}).json()["mask"] == expected["mask"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../outside/secret.png", 403),
        ("in/../../outside/secret.png", 403),
        ("{outside}/secret.png", 403),
        ("/etc/passwd", 403),
        ("link.png", 403),
        ("linked/secret.png", 403),
        ("linked/../outside/missing.png", 403),
        ("", 404),
        ("in", 404),
        ("missing.png", 404),
        ("loop.png", 404),
        ("pipe.png", 404),
        ("a\0.png", 404),
        ("a" * 5000, 404),
        ("large.png", 413),
    ],
)
def test_no_path_leaves_the_root(client, root, path, status):
    answer = client.post("/refine/path", json={"path": path.format(outside=root.parent / "outside")})
    assert answer.status_code == status and "\n" not in answer.json()["detail"]
    assert "mask" not in answer.json()


def test_without_a_root_no_path_is_accepted(root):
    with pytest.raises(serve.Refusal, match="--root") as refusal:
        serve.read_inside(None, str(root / "in" / "a.png"), 10**6)
    assert refusal.value.args[0] == 403


def test_bad_images_and_requests_are_refused_with_the_reason(client):
    whole = png(defective())
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3)).astype(np.uint8)
    too_large = {"files": {"image": ("a.png", png(noise))}}
    cases = {
        "not an image": upload(client, b"text"),
        "truncated": upload(client, whole[: len(whole) // 2]),
        "smallest side": upload(client, png(good()[:8])),
        "at most 1200 pixels": upload(client, png(np.zeros((40, 40, 3), np.uint8))),
        "white is 4095": upload(client, png(np.full((24, 24), 5000, np.uint16))),
    }
    for reason, answer in cases.items():
        assert answer.status_code == 422 and reason in answer.json()["detail"], (reason, answer.text)
        assert answer.json()["detail"].startswith("a.png: ") and "\n" not in answer.json()["detail"]
    assert upload(client, whole, mask="gif").status_code == 422
    assert client.post("/refine", data={"picture": "x"}).status_code == 422
    assert client.post("/refine", **too_large).status_code == 413
    body = httpx.Request("POST", "http://x", **too_large)
    headers = {"content-type": body.headers["content-type"]}
    unannounced = client.post("/refine", content=iter([body.read()]), headers=headers)  # without a content length
    assert unannounced.status_code == 413
    assert upload(client, whole).status_code == 200  # and the next image is refined


def test_a_full_queue_refuses_the_next_image(monkeypatch):
    may_go = threading.Event()

    def patient(detector, source, **options):
        return refine_many(detector, (image for image in source if may_go.wait(60)), **options)

    monkeypatch.setattr(serve, "refine_many", patient)
    with testclient.TestClient(serve.application(detector(), limits=LIMITS)) as client, ThreadPoolExecutor(2) as pool:
        try:
            assert client.get("/health").status_code == 503
            accepted = [pool.submit(upload, client, png(defective(k))) for k in range(2)]
            waited(lambda: "f2pad_queue_images 2.0" in client.get("/metrics").text)
            refused = upload(client, png(defective()))
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert "no answer yet" in refused.json()["detail"]
        finally:
            may_go.set()
        assert [answer.result().status_code for answer in accepted] == [200, 200]
        assert upload(client, png(defective())).status_code == 200
        assert client.get("/health").json()["status"] == "ready"
        metrics = client.get("/metrics").text
    for line in (
        'f2pad_requests_total{status="200"} 3.0',
        'f2pad_requests_total{status="429"} 1.0',
        'f2pad_images_total{verdict="defective"} 3.0',
        "f2pad_request_seconds_count 4.0",
        "f2pad_queue_images 0.0",
    ):
        assert line in metrics.splitlines()


class Fragile(Worker):
    """Doubles numbers; breaks at 0, and refuses 1."""

    load = 0

    def take(self, number, image):
        if image == 1:
            raise ImageError("1 can't be used")
        return [(number, 2 / image)]

    def turn(self):
        raise AssertionError("never has work left")


def fragile(source, on_error):
    for number, result in enumerate(stream(source, [Fragile] * 2, read=int, most_ahead=8, one_at_a_time=True)):
        if isinstance(result, Exception):
            on_error(number, result)
        else:
            yield result


def test_an_error_ends_no_stream():
    live = Live(fragile)
    for _ in range(20):
        assert live.submit(4).result(10) == 0.5
        with pytest.raises(ImageError):
            live.submit(1).result(10)
        with pytest.raises(ZeroDivisionError):
            live.submit(0).result(10)
        assert live.submit(2).result(10) == 1.0  # the thread that pulled for the failed call has not swallowed it
    cancelled = live.submit(3)
    cancelled.cancel()
    many = [live.submit(k) for k in (2, 0, 5, 5, 5, 1, 5)]
    live.close()
    assert all(result.done() for result in many)  # closing answers all


def test_images_keep_their_order_if_a_thread_still_pulls_for_a_call_that_failed():
    """Such a thread put its image back behind the end, where nobody answered it."""
    order, calls = [], 0

    def fails_once(source, on_error):
        nonlocal calls
        calls += 1
        if calls == 1:
            next(source)
            threading.Thread(target=lambda: next(source, None)).start()
            raise MemoryError("no room")
        for image in source:
            order.append(image)
            yield image

    for _ in range(50):
        order, calls = [], 0
        live = Live(fails_once)
        with pytest.raises(MemoryError):
            live.submit(0).result(10)
        many = [live.submit(k) for k in range(10)]
        live.close()
        assert order == list(range(10)) and all(result.done() for result in many)


def test_a_stream_that_cannot_start_still_answers():
    def broken(source, on_error):
        raise MemoryError("no room")

    live = Live(broken)
    for _ in range(3):
        with pytest.raises(MemoryError):
            live.submit(1).result(10)
    live.close()


def test_the_page_needs_no_other_site(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text and 'fetch("refine' in page.text


def started(tmp_path, *arguments):
    """A process of the command, and the file of its standard output."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    (tmp_path / "m.model").touch()
    output = (tmp_path / "stdout").open("a")
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=output,
        stderr=(tmp_path / "stderr").open("a"),
        cwd=tmp_path,
    )


def test_a_terminated_service_answers_what_it_has_accepted(tmp_path):
    process = started(tmp_path, "serve", "m.model", "--port", "0")
    try:
        waited(lambda: " at http" in (tmp_path / "stderr").read_text())
        address = (tmp_path / "stderr").read_text().split(" at ")[1].split(";")[0]
        with httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(4) as pool:
            accepted = [pool.submit(upload, client, png(defective(k))) for k in range(4)]  # while the programs are compiled
            waited(lambda: "f2pad_queue_images 4.0" in httpx.get(f"{address}/metrics").text)
            process.send_signal(signal.SIGTERM)
            assert [answer.result().json()["verdict"] for answer in accepted] == ["defective"] * 4
        assert process.wait(30) == 0
        assert "Traceback" not in (tmp_path / "stderr").read_text()
    finally:
        process.kill()


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path / "in", tmp_path / "out"


@contextlib.contextmanager
def watching(folder, out, settle=0.2):
    """Watches in a thread; yields the records that come."""
    stop, records = threading.Event(), []
    (model := folder.parent / "m.model").touch()
    arguments = parser(["watch"]).parse_args(["watch", str(model), str(folder), str(out)])
    recipe = refine_options.recipe_of(model, refine_options.method_options(arguments))

    def work():
        with Archive(out, recipe) as archive:
            for record in refined(folder, archive, worker(detector(), out), settle=settle, stop=stop):
                records.append(record)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        try:
            yield records
        finally:
            stop.set()
        done.result()


def test_each_file_is_done_once_and_only_when_it_is_whole(folders, monkeypatch, capsys):
    """The folder of results goes from refine to watch, and back."""
    folder, out = folders
    monkeypatch.setattr("f2pad_jax.commands.refine.load_detector", lambda *_, **__: detector())
    (folder.parent / "m.model").touch()
    refine = ["refine", str(folder.parent / "m.model"), str(folder), "--out", str(out)]
    save(folder / "earlier.png", good(3))
    assert main(refine) == 0
    save(folder / "before.png", good())
    with watching(folder, out) as records:
        waited(lambda: len(records) == 1)
        assert records[0]["name"] == "before"
        whole = png(defective())
        with (folder / "slow.png").open("wb") as file:  # a camera that writes slowly, longer than the settling time
            for start in range(0, len(whole), 1 + len(whole) // 8):
                file.write(whole[start : start + 1 + len(whole) // 8])
                file.flush()
                time.sleep(0.1)
        (folder / ".hidden.png").write_bytes(whole)
        (folder / "notes.txt").write_text("no image")
        (folder / "moved.part").write_bytes(whole)
        (folder / "moved.part").rename(folder / "moved.png")
        save(folder.parent / "new" / "deep" / "c.png", good(1))
        (folder.parent / "new").rename(folder / "new")  # a folder that comes with its files
        save(folder / "slow.jpg", good(2))  # the results of slow.png have this name
        waited(lambda: len(records) == 5)
        save(folder / "before.png", defective(1))  # another image in place of the first
        waited(lambda: len(records) == 6)
        time.sleep(0.5)
    found = {(Path(record["image"]).relative_to(folder).as_posix(), record["verdict"]) for record in records}
    assert len(records) == 6 and found == {
        *(("before.png", verdict) for verdict in ("good", "defective")),
        *((name, "defective") for name in ("slow.png", "moved.png")),
        *((name, "good") for name in ("new/deep/c.png", "slow.jpg")),
    }
    results = json.loads((out / "results.json").read_text())
    assert len({record["name"] for record in results["images"]}) == 6 and results["unusable"] == []
    assert all((out / record["mask"]).exists() for record in results["images"])
    capsys.readouterr()
    assert main(refine) == 0
    assert "6 images (6 of them before)" in capsys.readouterr().out


def test_a_file_that_stays_unreadable_is_named_once_and_taken_again_when_it_changes(folders):
    folder, out = folders
    whole = png(defective())
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "gone.png").write_bytes(b"")
    with watching(folder, out, settle=0.05) as records:
        time.sleep(0.3)
        assert records == []  # it may still be written
        (folder / "gone.png").unlink()
        waited(lambda: records)
        time.sleep(1.0)
        (record,) = records
        assert record["name"] == "half" and "truncated" in record["error"]
    assert [record["name"] for record in json.loads((out / "results.json").read_text())["unusable"]] == ["half"]
    with watching(folder, out, settle=0.05) as records:
        waited(lambda: records)
        (folder / "half.png").write_bytes(whole)
        waited(lambda: len(records) == 2)
    assert records[1]["verdict"] == "defective"
    results = json.loads((out / "results.json").read_text())
    assert results["unusable"] == [] and len(results["images"]) == 1


def test_a_killed_watch_loses_and_doubles_nothing(folders, tmp_path):
    folder, out = folders
    names = [f"{k:03}" for k in range(60)]
    for k in range(0, 60, 2):
        save(folder / f"{names[k]}.png", good(k))
    command = "watch", "m.model", "in", "out", "--settle", "0.2", "--json"
    journal = out / "results.jsonl"
    process = started(tmp_path, *command)
    try:
        waited(lambda: journal.exists() and journal.read_text().count('"verdict"') > 3)
    finally:
        process.kill()
    process.wait()
    with journal.open("a") as file:
        file.write('{"image": "stopped within a li')
    before = {record["name"] for record in map(json.loads, journal.read_text().splitlines()[:-1]) if "verdict" in record}
    process = started(tmp_path, *command)
    try:
        for k in range(1, 60, 2):
            save(folder / f"{names[k]}.png", good(k))
        waited(lambda: journal.read_text().count('"verdict"') >= 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
    done = [record["name"] for record in map(json.loads, journal.read_text().splitlines()) if "verdict" in record]
    assert sorted(done) == names and before
    printed = [json.loads(line)["name"] for line in (tmp_path / "stdout").read_text().splitlines()]
    assert len(printed) == len({*printed}) and {*names} - {*printed} <= before  # killed between journal and pipe, at most
    results = json.loads((out / "results.json").read_text())
    assert sorted(record["name"] for record in results["images"]) == names
    assert (out / "results.csv").read_text().count("\n") == 61 and (out / "report.html").exists()


def test_wrong_folders_and_missing_packages_are_refused(folders, tmp_path, monkeypatch, capsys):
    folder, out = folders
    monkeypatch.setattr(refine_options, "load_detector", lambda *_, **__: detector())
    model = str(tmp_path / "m.model")
    (tmp_path / "m.model").touch()

    def refused(*words):
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    assert "no such folder" in refused("watch", model, tmp_path / "missing", out)
    assert "inside the folder" in refused("watch", model, folder, folder / "out")
    assert "no such folder" in refused("serve", model, "--root", tmp_path / "missing")
    assert "no such file" in refused("serve", model, "--example", tmp_path / "missing.png")
    shutil.rmtree(out)
    for module, command in (("uvicorn", ("serve", model)), ("watchfiles", ("watch", model, folder, out))):
        monkeypatch.setitem(sys.modules, module, None)
        assert "f2pad-jax[serve]" in refused(*command)
    assert not out.exists()
