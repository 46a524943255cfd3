"""``f2pad make-dataset``: synthetic defects on real normal images, in MVTec layout, with a manifest that rebuilds them.

Two protocols. ``cut-paste`` is the paper's (Section IV-A, Eq. 16): flat colours far from the pixels they cover, in shapes
of ground truths, and for the capsule also parts from its other end. ``hard`` is what colour alone can't cut out: foreign
texture, misplaced parts, faint tints, scratches of two or three pixels, all with soft edges.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import scipy.ndimage
from jaxtyping import Bool, Float, UInt8

import f2pad_jax
from f2pad_jax.checkpoints import write_atomically
from f2pad_jax.data.cutpaste import Defective, blended, irregular_shape, paste_flat
from f2pad_jax.data.images import read_image, write_png
from f2pad_jax.data.mvtec import Category, open_categories, read_mask
from f2pad_jax.errors import ImageError, OptionError
from f2pad_jax.progress import Progress, silent
from f2pad_jax.units import STD

Image = Float[np.ndarray, "h w 3"]
Mask = Bool[np.ndarray, "h w"]

AREA = (0.002, 0.13)
"""Share of the image a defect covers; 0.13 is the paper's largest."""
FORMAT = "f2pad-dataset-2"
TRIES = 200
"""Draws before a defect that doesn't fit is an error."""


class Sources(NamedTuple):
    """What one category's defects are made of; images are loaded when they are needed, by paths or other keys."""

    category: str
    image: Callable[[Any], Image]
    """Loads an image at the data set's size, in 0..1."""
    bases: Sequence[Any]
    """Normal images held out of training, to paste on."""
    normal: Sequence[Any]
    """Normal images of the category to cut parts from."""
    foreign: Sequence[Any]
    """Normal images of the other categories."""
    shapes: list[Path]
    """Ground truths; where there are none, shapes are irregular blobs."""
    is_object: bool = False


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
    """Write a data set of synthetic defects and ``manifest.json``; returns the manifest's path.

    One in five of a category's training images, at most ``count``, and its good test images are pasted on, in turn; the
    other training images are the new ones. Every image has a random stream of its own, so that fewer categories
    change none.

    Args:
        root: a data set in MVTec layout.
        out: folder to write to.
        categories: names of folders; default: all.
        protocol: one of :data:`PROTOCOLS`.
        count: defective images of each category (paper: 54).
        size: height and width of the images.
        seed: of everything drawn at random.
        lenders: categories whose ground truths lend their shapes (without any, shapes are irregular blobs) and whose
            images their texture; default: all there are.
        progress: told how far it is.

    Raises:
        ImageError: ``root`` is no such data set, an image can't be read, or ``out`` holds another data set.
        OptionError: the protocol is unknown, or ``count`` is less than 1.
    """
    if protocol not in PROTOCOLS:
        raise OptionError(f"protocol '{protocol}' is unknown; there are {', '.join(PROTOCOLS)}")
    if count < 1 or seed < 0:
        raise OptionError(f"count {count} and seed {seed}: at least one image, and no negative seed")
    root, out = Path(root), Path(out)
    found = open_categories(root, lenders, testing=False)
    chosen = open_categories(root, categories, testing=False)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": f2pad_jax.__version__,
        "protocol": protocol,
        "count": count,
        "size": list(size),
        "seed": seed,
        "lenders": [category.name for category in found],
        "categories": {},
    }
    draft = _begun(out, manifest, [category.name for category in chosen])
    used: set[Path] = set()
    for category in chosen:
        sources, train = _sources(category, found, size, count, seed)
        folder = out / category.name
        for k, path in enumerate(train):
            write_png(folder / "train" / "good" / f"{k:03}.png", np.rint(sources.image(path) * 255).astype(np.uint8))
        images = []
        for k in range(count):
            progress(category.name, k, count)
            rng = np.random.default_rng([seed, *(zlib.crc32(text.encode()) for text in (protocol, category.name)), k])
            base = sources.bases[k % len(sources.bases)]
            kind, made, origins = PROTOCOLS[protocol](rng, sources, base, k)
            pixels = np.rint(made.image * 255).astype(np.uint8)
            name = f"{kind}/{k:03}"
            write_png(folder / "test" / f"{name}.png", pixels)
            write_png(folder / "ground_truth" / f"{name}_mask.png", made.mask)
            used |= {base, *origins}
            images.append(
                {
                    "name": name,
                    "base": base.relative_to(root).as_posix(),
                    "from": [path.relative_to(root).as_posix() for path in origins],
                    "area": float(made.mask.mean()),
                    "sha256": digest(pixels, made.mask),
                }
            )
        progress(category.name, count, count)
        manifest["categories"][category.name] = {
            "object": sources.is_object,
            "train": [path.relative_to(root).as_posix() for path in train],
            "images": images,
        }
        used |= set(train)
    manifest["sources"] = {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(used)}
    path = out / "manifest.json"
    write_atomically(path, json.dumps(manifest, indent=1).encode())
    draft.unlink()
    return path


def _begun(out: Path, manifest: dict[str, Any], categories: list[str]) -> Path:
    """Make sure that ``out`` holds no other data set; returns a file that says until the end which one is being made."""
    draft = out / "manifest.partial"
    wanted = {key: value for key, value in manifest.items() if key not in ("version", "categories")}
    there = [read_manifest(file) for file in (out / "manifest.json", draft) if file.exists()]
    other = next((name for name in categories if (out / name).exists()), None) if not there else None
    if other or any(any(one.get(key) != value for key, value in wanted.items()) for one in there):
        raise ImageError(f"{out / (other or '')}: holds other images; choose another folder to write to")
    write_atomically(draft, json.dumps(wanted).encode())
    return draft


def rebuild_dataset(manifest: str | Path, root: str | Path, out: str | Path, *, progress: Progress = silent) -> Path:
    """Make the data set of a manifest again from the same files, and check that every pixel is the same.

    Raises:
        ImageError: the manifest is none, a source is missing or another file, or an image came out differently.
    """
    root, expected = Path(root), read_manifest(manifest)
    for name, checksum in expected["sources"].items():
        if not (root / name).is_file():
            raise ImageError(f"{root / name}: missing; {manifest} was made from it")
        if hashlib.sha256((root / name).read_bytes()).hexdigest() != checksum:
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
    made = read_manifest(path)
    for name, category in expected["categories"].items():
        for one, other in zip(category["images"], made["categories"][name]["images"], strict=True):
            if one != other:
                version = expected["version"]
                raise ImageError(f"{name}/{one['name']}: came out differently; were files added, or is it of {version}?")
    return path


def read_manifest(path: str | Path) -> dict[str, Any]:
    """What a manifest says.

    Raises:
        ImageError: the file is missing or no manifest.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: no manifest of a data set ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ImageError(f"{path}: no manifest of a data set this version wrote")
    return content


def digest(image: UInt8[np.ndarray, "h w 3"], mask: Mask) -> str:
    """SHA-256 of the pixels of an image and its mask, whatever file they are in."""
    return hashlib.sha256(image.tobytes() + np.packbits(mask).tobytes()).hexdigest()


def _sources(
    category: Category, found: list[Category], size: tuple[int, int], count: int, seed: int
) -> tuple[Sources, list[Path]]:
    """What to make a category's defects of, and the images left for training."""
    order = np.random.default_rng([seed, zlib.crc32(category.name.encode())]).permutation(len(category.train))
    held_out = min(count, max(len(category.train) // 5, 1))
    if held_out >= len(category.train):
        raise ImageError(f"{category.train[0].parent}: one image is too few; some must be held out to paste on")
    train = [category.train[i] for i in sorted(order[held_out:])]
    good = [sample.path for sample in category.test if sample.mask is None]
    bases = [category.train[i] for i in order[:held_out]] + good
    foreign = [path for other in found if other.name != category.name for path in other.train]
    shapes = [path for other in found for path in other.masks]

    def image(path: Path) -> Image:
        """Bilinear and antialiased by Pillow, whose integer arithmetic is the same on every processor."""
        small = PIL.Image.fromarray(read_image(path)).resize((size[1], size[0]), PIL.Image.Resampling.BILINEAR)
        return np.asarray(small, np.float32) / 255

    is_object = shows_objects(image(path) for path in train[:8])
    return Sources(category.name, image, bases, train, foreign, shapes, is_object), train


def shows_objects(images: Iterable[Image]) -> bool:
    """Whether most of the images show an object on a plain background."""
    votes = [foreground(image) is not None for image in images]
    return sum(votes) > len(votes) / 2


def foreground(image: Image) -> Mask | None:
    """The object on a plain background, or None: the image is all texture.

    The frame of an image of an object is of one colour, from which much of the inside is far.
    """
    smooth = scipy.ndimage.gaussian_filter(image, (1, 1, 0))
    frame = np.ones(image.shape[:2], bool)
    width = max(2, min(frame.shape) // 25)
    frame[width:-width, width:-width] = False
    distance = np.linalg.norm(smooth - np.median(smooth[frame], axis=0), axis=-1)
    outside, inside = (max(float(np.percentile(distance[part], 90)), 1e-3) for part in (frame, ~frame))
    if inside < 3 * outside:
        return None
    labels = np.empty(frame.shape, np.int32)
    scipy.ndimage.label(distance > np.sqrt(outside * inside), output=labels)
    largest = 1 + np.argmax(np.bincount(labels.ravel())[1:])
    solid = scipy.ndimage.binary_fill_holes(labels == largest)
    return np.asarray(scipy.ndimage.binary_erosion(solid, border_value=1), bool)  # without the blur's halo


def _where(rng: np.random.Generator, sources: Sources, base: Image) -> tuple[Mask, Path | None]:
    """A ground truth's shape, resized to a random share of the image, at a random place, on the object if there is one."""
    h, w = base.shape[:2]
    on = foreground(base) if sources.is_object else None
    on = np.ones((h, w), bool) if on is None else on
    for _ in range(TRIES):
        path = sources.shapes[rng.integers(len(sources.shapes))] if sources.shapes else None
        shape = irregular_shape(rng, (h, w)) if path is None else read_mask(path)
        target = rng.uniform(*AREA) * h * w
        if not shape.any():
            continue
        rows, columns = (np.flatnonzero(shape.any(axis=axis)) for axis in (1, 0))
        shape = shape[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        shape = scipy.ndimage.zoom(np.pad(shape, 1).astype(np.float32), np.sqrt(target / shape.sum()), order=1) > 0.5
        if shape.shape[0] > h or shape.shape[1] > w:
            continue
        top, left = (rng.integers(0, room, endpoint=True) for room in (h - shape.shape[0], w - shape.shape[1]))
        mask = np.zeros((h, w), bool)
        mask[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
        if np.sum(mask & on) >= 0.9 * np.sum(mask) and AREA[0] <= np.mean(mask & on) <= AREA[1]:
            return mask & on, path
    raise ImageError(f"{sources.category}: no ground truth's shape fits on the object in {TRIES} tries")


Made = tuple[str, Defective, list]
"""Kind of defect, image and mask, and what they come from besides the base."""


def cut_paste(rng: np.random.Generator, sources: Sources, base: Any, k: int) -> Made:
    """The paper's protocol, Eq. (16).

    Every second of the capsule's defects is structural (footnote 1): a part from the left (right) of another normal image,
    on the right (left).
    """
    image = sources.image(base)
    mask, shape = _where(rng, sources, image)
    origins = [shape] if shape else []
    if sources.category == "capsule" and k % 2:
        other = sources.normal[int(rng.integers(len(sources.normal)))]
        swapped = np.roll(sources.image(other), image.shape[1] // 2, axis=1)
        return "misplaced", Defective(np.where(mask[..., None], swapped, image), mask), [*origins, other]
    return "colour", paste_flat(rng, image, mask), origins


def hard(rng: np.random.Generator, sources: Sources, base: Any, k: int) -> Made:
    """Foreign texture, a misplaced part, a faint tint and a scratch in turn, with soft edges; a texture has no parts."""
    image = sources.image(base)
    kinds = ["texture"] * bool(sources.foreign) + ["part"] * sources.is_object + ["tint", "scratch"]
    kind = kinds[k % len(kinds)]
    for _ in range(TRIES):
        if kind == "scratch":
            mask, origins = scratch(rng, foreground(image) if sources.is_object else None, image.shape[:2]), []
        else:
            mask, shape = _where(rng, sources, image)
            origins = [shape] if shape else []
        if kind in ("texture", "part"):
            files = sources.foreign if kind == "texture" else sources.normal
            other = files[int(rng.integers(len(files)))]
            source = np.rot90(sources.image(other), int(rng.integers(4)))[:: rng.choice([-1, 1])]
            if source.shape != image.shape:
                continue
            shift, on = rng.integers(image.shape[:2]), foreground(source)
            if on is not None and np.mean(np.roll(on, shift, axis=(0, 1))[mask]) < 0.8:
                continue  # the plain background is a flat colour
            changed, origins = np.roll(source, shift, axis=(0, 1)), [*origins, other]
        else:
            direction = rng.standard_normal(3)
            length = rng.uniform(0.35, 0.8) if kind == "tint" else rng.uniform(0.7, 1.6)
            changed = image + (length * direction / np.linalg.norm(direction) * STD).astype(np.float32)
        made = blended(image, changed, mask, rng.uniform(0.4, 0.6) if kind == "scratch" else rng.uniform(0.5, 1.5))
        # what can't be seen, or is out of range, is no defect
        difference = np.linalg.norm((np.rint(made.image * 255) / 255 - image) / STD, axis=-1)
        if made.mask.any() and np.mean(difference[made.mask] > 0.2) > 0.8:
            return kind, made, origins
    raise ImageError(f"{base}: no {kind} that can be seen in {TRIES} tries")


def scratch(rng: np.random.Generator, on: Mask | None, size: tuple[int, int]) -> Mask:
    """A bent line, two or three pixels wide, a twentieth to a third of the image long, on the object if there is one."""
    h, w = size
    on = np.ones(size, bool) if on is None else on
    starts = np.argwhere(scipy.ndimage.binary_erosion(on, iterations=min(size) // 20))
    starts = starts if len(starts) else np.argwhere(on)
    place, angle = starts[rng.integers(len(starts))].astype(float), rng.uniform(0, 2 * np.pi)
    bend, width = rng.normal(0, 0.03), rng.integers(2, 3, endpoint=True)
    mask = np.zeros(size, bool)
    for _ in range(int(rng.uniform(0.05, 0.33) * min(size))):
        y, x = np.floor(place).astype(int)
        if not (0 <= y <= h - width and 0 <= x <= w - width):
            break
        mask[y : y + width, x : x + width] = True
        angle += bend + rng.normal(0, 0.05)
        place = place + np.array([np.sin(angle), np.cos(angle)])
    return mask & on


PROTOCOLS: dict[str, Callable[[np.random.Generator, Sources, Any, int], Made]] = {"cut-paste": cut_paste, "hard": hard}
