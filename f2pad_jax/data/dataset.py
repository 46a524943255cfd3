"""Data sets of ``f2pad make-dataset``: synthetic defects on real normal images, with a manifest that rebuilds them.

There are two protocols. ``cut-paste`` is the paper's (Section IV-A, Eq. 16): flat colours far from the pixels under them,
in shapes of ground truths. For the capsule, it also pastes parts of another capsule's opposite end. ``hard`` has defects
that colour alone can't separate: foreign texture, misplaced parts, faint tints and thin scratches, all with soft edges.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from f2pad_jax._storage import file_sha256, regular, write_atomically
from f2pad_jax._version import __version__
from f2pad_jax.data.mvtec import Category, open_categories
from f2pad_jax.data.protocols import PROTOCOLS, Image, Mask, Sources, shows_objects
from f2pad_jax.errors import ImageError, OptionError, RunError
from f2pad_jax.images.files import check_images, read_image, write_png
from f2pad_jax.progress import Progress, silent

FORMAT = "f2pad-dataset-2"
"""Name of the manifest's format, with its version."""


def make_dataset(
    root: str | Path,
    out: str | Path,
    *,
    categories: list[str] | None = None,
    protocol: str = "cut-paste",
    count: int = 54,
    size: tuple[int, int] = (224, 224),
    seed: int = 0,
    lenders: list[str] | None = None,
    progress: Progress = silent,
) -> Path:
    """Writes a data set of synthetic defects in MVTec layout, and its ``manifest.json``.

    Defects are pasted on one in five training images (at most ``count``) and on the good test images, in turn. The other
    training images become training images of the new data set. Every defect has its own random stream: the choice of
    categories changes no image.

    Args:
        root: data set in MVTec layout.
        out: folder to write to.
        categories: names of the categories; default: all.
        protocol: one of :data:`PROTOCOLS`.
        count: number of defective images in each category (paper: 54).
        size: height and width of the images.
        seed: seed of everything drawn at random.
        lenders: categories whose ground truths give the shapes and whose images give foreign texture; default: all. Without
            a ground truth, shapes are irregular blobs.
        progress: function that receives category, number done and total.

    Returns:
        The path of the manifest.

    Raises:
        ImageError: ``root`` is no such data set, or an image can't be used.
        RunError: ``out`` holds another data set.
        OptionError: the protocol is unknown, ``count`` is less than 1, or ``seed`` is negative.
    """
    if protocol not in PROTOCOLS:
        raise OptionError(f"protocol '{protocol}' is unknown; there are {', '.join(PROTOCOLS)}")
    if count < 1 or seed < 0:
        raise OptionError(f"count {count} and seed {seed}: give at least one image, and a seed of at least 0")
    root, out = Path(root), Path(out)
    lending = open_categories(root, names=lenders, testing=False)
    targets = open_categories(root, names=categories, testing=False)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "protocol": protocol,
        "count": count,
        "size": list(size),
        "seed": seed,
        "lenders": [category.name for category in lending],
        "categories": {},
    }
    draft = _write_draft(out, manifest, [category.name for category in targets])
    files: set[Path] = set()
    for category in targets:
        sources, train = _sources(category, lending, size, count, seed)
        folder = out / category.name
        for k, path in enumerate(train):
            write_png(folder / "train" / "good" / f"{k:03}.png", np.rint(sources.image(path) * 255).astype(np.uint8))
        images = []
        for k in range(count):
            progress(category.name, k, count)
            rng = np.random.default_rng([seed, *(zlib.crc32(text.encode()) for text in (protocol, category.name)), k])
            base = sources.bases[k % len(sources.bases)]
            kind, example, origins = PROTOCOLS[protocol](rng, sources, base, k)
            pixels = np.rint(example.image * 255).astype(np.uint8)
            name = f"{kind}/{k:03}"
            write_png(folder / "test" / f"{name}.png", pixels)
            write_png(folder / "ground_truth" / f"{name}_mask.png", example.mask)
            files |= {base, *origins}
            images.append(
                {
                    "name": name,
                    "base": base.relative_to(root).as_posix(),
                    "from": [path.relative_to(root).as_posix() for path in origins],
                    "area": float(example.mask.mean()),
                    "sha256": digest(pixels, example.mask),
                }
            )
        progress(category.name, count, count)
        manifest["categories"][category.name] = {
            "object": sources.is_object,
            "train": [path.relative_to(root).as_posix() for path in train],
            "images": images,
        }
        files |= set(train)
    manifest["sources"] = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)
    }
    path = out / "manifest.json"
    write_atomically(path, json.dumps(manifest, indent=1).encode())
    draft.unlink()
    return path


def _write_draft(out: Path, manifest: dict[str, Any], categories: list[str]) -> Path:
    """Writes the options of the data set to a file that lies in ``out`` until the data set is complete.

    Raises:
        RunError: ``out`` holds another data set, or images without a manifest.
    """
    draft = out / "manifest.partial"
    options = {key: value for key, value in manifest.items() if key not in ("version", "categories")}
    manifests = [read_manifest(file) for file in (out / "manifest.json", draft) if file.exists()]
    foreign = next((name for name in categories if (out / name).exists()), None) if not manifests else None
    if foreign or any(any(other.get(key) != value for key, value in options.items()) for other in manifests):
        raise RunError(f"{out / (foreign or '')}: holds other images; choose another folder to write to")
    write_atomically(draft, json.dumps(options).encode())
    return draft


def rebuild_dataset(manifest: str | Path, root: str | Path, out: str | Path, *, progress: Progress = silent) -> Path:
    """Makes a data set again from its manifest and equal source files, and checks that every pixel is equal.

    Args:
        manifest: path of the manifest.
        root: data set in MVTec layout that the manifest was made from.
        out: folder to write to.
        progress: function that receives category, number done and total.

    Returns:
        The path of the new manifest.

    Raises:
        ImageError: the file is no manifest, a source is missing or differs, or an image came out differently.
        RunError: ``out`` holds another data set.
    """
    root, expected = Path(root), read_manifest(manifest)
    if not _is_complete(expected):
        raise ImageError(f"{manifest}: damaged or altered since it was written")
    for name, checksum in expected["sources"].items():
        if not (root / name).is_file():
            raise ImageError(f"{root / name}: missing; {manifest} was made from it")
        if file_sha256(root / name) != checksum:
            raise ImageError(f"{root / name}: not the file {manifest} was made from (its checksum differs)")
    path = make_dataset(
        root,
        out,
        categories=list(expected["categories"]),
        protocol=expected["protocol"],
        count=expected["count"],
        size=(expected["size"][0], expected["size"][1]),
        seed=expected["seed"],
        lenders=expected["lenders"],
        progress=progress,
    )
    actual = read_manifest(path)
    for name, category in expected["categories"].items():
        for before, after in zip(category["images"], actual["categories"][name]["images"], strict=True):
            if before != after:
                raise ImageError(
                    f"{name}/{before['name']}: came out differently; either files were added to {root}, or version "
                    f"{expected['version']}, which wrote the manifest, differs from this one"
                )
    return path


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Returns the content of a manifest.

    Raises:
        ImageError: the file is missing or no manifest.
    """
    try:
        content = json.loads(regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ImageError(f"{path}: no manifest of a data set ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ImageError(f"{path}: no manifest of a data set in the format of this version")
    return content


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Returns whether a manifest has everything from which a data set is rebuilt, in the form that it was written in."""
    kinds = {"protocol": str, "count": int, "size": list, "seed": int, "lenders": list, "categories": dict, "sources": dict}
    if not all(isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        return False
    if len(manifest["size"]) != 2 or not all(type(side) is int and 0 < side <= 2**14 for side in manifest["size"]):
        return False
    try:
        names = [[image["name"] for image in category["images"]] for category in manifest["categories"].values()]
    except (TypeError, LookupError):
        return False
    texts = [*manifest["lenders"], *manifest["sources"].values(), *(name for of_one in names for name in of_one)]
    return all(isinstance(text, str) for text in texts) and all(len(of_one) == manifest["count"] for of_one in names)


def digest(image: UInt8[np.ndarray, "h w 3"], mask: Mask) -> str:
    """Returns the SHA-256 of the pixels of an image and its mask, independent of the file format."""
    return hashlib.sha256(image.tobytes() + np.packbits(mask).tobytes()).hexdigest()


def _sources(
    category: Category, lending: list[Category], size: tuple[int, int], count: int, seed: int
) -> tuple[Sources, list[Path]]:
    """Returns the sources of a category's defects, and the images left for training.

    Raises:
        ImageError: there are too few training images, or one can't be used.
    """
    order = np.random.default_rng([seed, zlib.crc32(category.name.encode())]).permutation(len(category.train))
    num_held_out = min(count, max(len(category.train) // 5, 1))
    if num_held_out >= len(category.train):
        raise ImageError(f"{category.train[0].parent}: one image is too few; some must be held out to paste on")
    train = [category.train[i] for i in sorted(order[num_held_out:])]
    good = [sample.path for sample in category.test if sample.mask is None]
    bases = [category.train[i] for i in order[:num_held_out]] + good
    foreign = [path for other in lending if other.name != category.name for path in other.train]
    shapes = [path for other in lending for path in other.masks]
    white = check_images(category.train, strict=True)[2]

    def image(path: Path) -> Image:
        """Loads an image. Pillow resizes in integers: every processor gives equal pixels (bilinear, antialiased)."""
        small = PIL.Image.fromarray(read_image(path, white=white)).resize((size[1], size[0]), PIL.Image.Resampling.BILINEAR)
        return np.asarray(small, np.float32) / 255

    is_object = shows_objects(image(path) for path in train[:8])
    return Sources(category.name, image, bases, train, foreign, shapes, is_object), train
