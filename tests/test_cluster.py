"""Workers on Ray give what one process gives, and what a dead one was at is done again."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from f2pad_jax import OptionError, save_detector
from f2pad_jax.cli import main
from f2pad_jax.cluster import ray_workers


@pytest.fixture(scope="module")
def folder(request, texture, tmp_path_factory):
    """A model, and six images of which every other is good."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("cluster")
    save_detector(folder / "m.model", request.getfixturevalue("detector"))
    (folder / "in").mkdir()
    for i in range(6):
        image = texture.test[i // 2].image if i % 2 else texture.train[i // 2]
        PIL.Image.fromarray(image).save(folder / "in" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    assert main(["refine", str(folder / "m.model"), str(folder / "in"), "--out", str(folder / "alone")]) == 0
    return json.loads((folder / "alone" / "results.json").read_text())["images"]


def assert_same(folder, out, alone):
    records = json.loads((out / "results.json").read_text())["images"]
    assert records == alone
    for record in records:
        for kind in ("mask", "normal"):
            one, other = (np.asarray(PIL.Image.open(where / record[kind])) for where in (folder / "alone", out))
            np.testing.assert_array_equal(one, other)


def test_two_workers_give_what_one_process_gives(folder, alone):
    out = folder / "ray"
    assert main(["refine", str(folder / "m.model"), str(folder / "in"), "--out", str(out), "--ray", "2"]) == 0
    assert_same(folder, out, alone)


def test_workers_read_images_from_a_bucket(folder, alone, monkeypatch):
    """A server that speaks S3, on this machine."""
    server, s3fs = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        pytest.importorskip("ray").shutdown()  # workers have the environment that Ray was started in
        system = s3fs.S3FileSystem()
        system.mkdir("parts")
        system.put(str(folder / "in"), "parts/today", recursive=True)
        out = folder / "bucket"
        assert main(["refine", str(folder / "m.model"), "s3://parts/today", "--out", str(out), "--ray", "2"]) == 0
    finally:
        running.stop()
    records = json.loads((out / "results.json").read_text())["images"]
    assert [record["image"] for record in records] == [f"s3://parts/today/{i}.png" for i in range(6)]
    for record, other in zip(records, alone, strict=True):
        one, another = (np.asarray(PIL.Image.open(p)) for p in (out / record["mask"], folder / "alone" / other["mask"]))
        np.testing.assert_array_equal(one, another)


def test_what_a_dead_worker_was_at_is_done_again(folder, alone):
    out, marker = folder / "dead", folder / "died"
    # a worker that meets the marker's absence leaves it and dies, as one without power would
    script = f"""
import os, signal, sys
from pathlib import Path
from f2pad_jax import cluster, cli
call = cluster.Refiner.__call__
class Mortal(cluster.Refiner):
    def __call__(self, batch):
        try:
            os.close(os.open({str(marker)!r}, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return call(self, batch)
        os.kill(os.getpid(), signal.SIGKILL)
cluster.Refiner = Mortal
sys.exit(cli.main(["refine", {str(folder / "m.model")!r}, {str(folder / "in")!r}, "--out", {str(out)!r}, "--ray", "2"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    assert_same(folder, out, alone)


def test_there_is_at_least_one_worker(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(OptionError, match="0 workers"):
        ray_workers(tmp_path / "m.model", None, tmp_path, num_workers=0)


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"f2pad-jax\[ray\]"):
        ray_workers(tmp_path / "m.model", None, tmp_path, num_workers=2)
