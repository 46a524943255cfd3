"""Workers on Ray give the results of one process, and the images of a dead worker are refined again."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from f2pad_jax import save_detector
from f2pad_jax.commands import main
from f2pad_jax.commands._ray import ray_workers
from f2pad_jax.errors import OptionError


@pytest.fixture(scope="module")
def folder(request, texture, tmp_path_factory):
    """A folder with a model and six images; every other image is good."""
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


def test_two_workers_give_the_results_of_one_process(folder, alone):
    out = folder / "ray"
    assert main(["refine", str(folder / "m.model"), str(folder / "in"), "--out", str(out), "--ray", "2"]) == 0
    assert_same(folder, out, alone)


def test_workers_read_images_from_a_bucket(folder, alone, monkeypatch):
    """The bucket is on an S3 server on this machine."""
    server, s3fs = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        pytest.importorskip("ray").shutdown()  # workers inherit the environment in which Ray starts
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


def test_images_of_a_dead_worker_are_refined_again(folder, alone):
    out, marker = folder / "dead", folder / "died"
    # the first worker to look finds no marker, leaves one, and is killed
    script = f"""
import os, signal, sys
from f2pad_jax.commands import _ray as ray, main
call = ray.Refiner.__call__
class Mortal(ray.Refiner):
    def __call__(self, batch):
        try:
            os.close(os.open({str(marker)!r}, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return call(self, batch)
        os.kill(os.getpid(), signal.SIGKILL)
ray.Refiner = Mortal
sys.exit(main(["refine", {str(folder / "m.model")!r}, {str(folder / "in")!r}, "--out", {str(out)!r}, "--ray", "2"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    assert_same(folder, out, alone)


def test_there_is_at_least_one_worker(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(OptionError, match="0 workers"):
        ray_workers(tmp_path / "m.model", None, tmp_path, num_workers=0)


def test_a_missing_ray_is_refused_with_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"f2pad-jax\[ray\]"):
        ray_workers(tmp_path / "m.model", None, tmp_path, num_workers=2)
