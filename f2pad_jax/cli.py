"""The command ``f2pad``: demo, fit, tune, import, refine, make-dataset, evaluate, bench, weights."""

import argparse
import collections
import contextlib
import inspect
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import f2pad_jax
from f2pad_jax.checkpoints import cache_folder
from f2pad_jax.detectors import DETECTORS
from f2pad_jax.errors import CheckpointError, F2padError, ImageError, OptionError
from f2pad_jax.inpaint import INPAINTERS

EVERY = 10.0
"""Least seconds between two lines of progress where there is no terminal for a bar."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (0, or 2 after an error told in one line)."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except F2padError as error:
        print(f"f2pad: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"f2pad: error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("f2pad: interrupted", file=sys.stderr)
        return 130
    return 0


def at_least(least: int) -> Callable[[str], int]:
    """What makes a whole number of an argument, and refuses one below ``least``."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return value

    number.__name__ = "whole number"  # as argparse says of what is none
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="f2pad", description="Pixel-accurate anomaly segmentation (F2PAD in JAX).")
    parser.add_argument("--version", action="version", version=f"f2pad-jax {f2pad_jax.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="fit and refine on three real textures, and compare with the coarse masks")
    demo.add_argument(
        "--out", type=Path, default=Path("f2pad-demo"), help="folder for gallery.png and summary.json (%(default)s)"
    )
    demo.add_argument("--seed", type=at_least(0), default=0, help="of crops, defects and coreset (%(default)s)")
    demo.set_defaults(run=_demo)

    for name, told in (
        ("fit", "fit a detector on a folder of defect-free images"),
        ("tune", "the same, and choose the method's weights for these images on synthetic defects (minutes)"),
    ):
        fit = commands.add_parser(name, help=told)
        fit.add_argument("normal", type=Path, metavar="NORMAL_DIR", help="folder of defect-free images")
        fit.add_argument("--out", type=Path, required=True, metavar="MODEL", help="model file to write")
        fit.add_argument("--method", choices=list(DETECTORS), default="patchcore", help="detector (%(default)s)")
        fit.add_argument("--size", type=at_least(1), default=224, help="side images are resized to, pixels (%(default)s)")
        fit.add_argument("--seed", type=at_least(0), default=0, help="of everything drawn at random (%(default)s)")
        fit.add_argument("--backbone", default="efficientnet-lite0", help="network to take features from (%(default)s)")
        fit.add_argument(
            "--layers",
            nargs="+",
            metavar="LAYER",
            help="its layers, shallow to deep (default: as the method takes them)",
        )
        fit.add_argument("--weights", type=Path, metavar="FILE", help="its weight file (default: the one installed)")
        fit.add_argument(
            "--option",
            nargs="+",
            action="extend",
            default=[],
            metavar="NAME=VALUE",
            help="the method's own settings, such as rank=10 (padim), max_bank=10000 (patchcore), meta_epochs=10 (cflow)",
        )
        if name == "fit":
            fit.add_argument("--tune", action="store_true", help="as 'f2pad tune' does")
        fit.set_defaults(run=_fit, **({"tune": True} if name == "tune" else {}))

    bring = commands.add_parser("import", help="bring a detector trained with anomalib 2.x, calibrated on good images")
    bring.add_argument("checkpoint", type=Path, metavar="CKPT", help="the .ckpt file anomalib's engine saved")
    bring.add_argument("normal", type=Path, metavar="NORMAL_DIR", help="folder of defect-free images, best not trained on")
    bring.add_argument("--out", type=Path, required=True, metavar="MODEL", help="model file to write")
    bring.add_argument(
        "--size", type=at_least(1), nargs=2, metavar=("H", "W"), help="size of images (default: as the file says)"
    )
    bring.add_argument("--seed", type=at_least(0), default=0, help="of everything drawn at random (%(default)s)")
    bring.set_defaults(run=_import)

    refine = commands.add_parser("refine", help="segment the anomalies of images, to the pixel")
    refine.add_argument("model", type=Path, metavar="MODEL", help="model file written by 'f2pad fit' or 'f2pad import'")
    refine.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE_OR_DIR",
        help="images, or folders or buckets (s3://bucket/folder) searched for images",
    )
    refine.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for masks and pictures")
    refine.add_argument("--weights", type=Path, metavar="FILE", help="the model's weight file (default: the one installed)")
    refine.add_argument(
        "--inpaint",
        choices=sorted(INPAINTERS),
        help="first guess of the normal image (default: mae where its weights are installed, else exemplar)",
    )
    refine.add_argument(
        "--lanes",
        type=int,
        help="parts of images solved side by side (default: 1 on a CPU, elsewhere as many as the device has memory for)",
    )
    refine.add_argument(
        "--ray",
        type=int,
        metavar="WORKERS",
        help="refine in this many processes, of this machine or of the Ray cluster that RAY_ADDRESS names",
    )
    refine.add_argument(
        "--history", action="store_true", help="also how the solver got there: curves, animation, table (twice the time)"
    )
    refine.set_defaults(run=_refine)

    dataset = commands.add_parser("make-dataset", help="paste synthetic defects on normal images, in MVTec layout")
    dataset.add_argument("root", type=Path, metavar="ROOT", help="data set in MVTec layout")
    dataset.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    dataset.add_argument("--categories", nargs="+", metavar="NAME", help="(default: all)")
    dataset.add_argument(
        "--protocol", default="cut-paste", help="cut-paste, the paper's flat colours, or hard (%(default)s)"
    )
    dataset.add_argument("--count", type=at_least(1), default=54, help="defective images of each category (%(default)s)")
    dataset.add_argument("--size", type=at_least(1), default=224, help="side of the images, pixels (%(default)s)")
    dataset.add_argument("--seed", type=at_least(0), default=0, help="of everything drawn at random (%(default)s)")
    dataset.add_argument("--manifest", type=Path, metavar="FILE", help="make the data set of this manifest again instead")
    dataset.set_defaults(run=_make_dataset)

    evaluate = commands.add_parser(
        "evaluate", help="the paper's tables on a data set in MVTec layout; a run that was stopped goes on"
    )
    evaluate.add_argument(
        "root", type=Path, metavar="ROOT", help="data set in MVTec layout, or 'textures': the demo's photographs"
    )
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for tables, pictures and all else")
    evaluate.add_argument("--categories", nargs="+", metavar="NAME", help="(default: all)")
    evaluate.add_argument("--methods", nargs="+", choices=list(DETECTORS), default=["patchcore"], help="(patchcore)")
    evaluate.add_argument(
        "--protocol", nargs="+", default=["cut-paste"], help="cut-paste, hard, real, or several (cut-paste)"
    )
    evaluate.add_argument("--setting", nargs="+", default=["normal"], help="normal, few-shot (16 images), or both (normal)")
    evaluate.add_argument("--ablations", nargs="+", default=[], metavar="NAME", help="what to leave out, one at a time")
    evaluate.add_argument("--backbone", default="efficientnet-lite0", help="network to take features from (%(default)s)")
    evaluate.add_argument("--weights", type=Path, metavar="FILE", help="its weight file (default: the one installed)")
    evaluate.add_argument(
        "--images",
        type=at_least(1),
        help="defective images of each category, and good ones at most (default: 54 and all; all real ones)",
    )
    evaluate.add_argument("--size", type=at_least(1), default=224, help="side images are resized to, pixels (%(default)s)")
    evaluate.add_argument("--seed", type=at_least(0), default=0, help="of everything drawn at random (%(default)s)")
    evaluate.add_argument("--tune", action="store_true", help="tune every detector, as 'f2pad fit --tune' does")
    evaluate.add_argument(
        "--curves",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of N images of each case, draw the objective in the report (0)",
    )
    evaluate.set_defaults(run=_evaluate)

    bench = commands.add_parser("bench", help="images a second on this machine, and where the time goes (some minutes)")
    bench.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("textures"),
        metavar="FOLDER",
        help="category in MVTec layout; its real defects are refined (default: the demo's brick)",
    )
    bench.add_argument("--methods", nargs="+", choices=list(DETECTORS), default=["patchcore"], help="(patchcore)")
    bench.add_argument("--backbone", default="efficientnet-lite0", help="network to take features from (%(default)s)")
    bench.add_argument("--layers", nargs="+", metavar="LAYER", help="its layers (default: as the method takes them)")
    bench.add_argument("--weights", type=Path, metavar="FILE", help="its weight file (default: the one installed)")
    bench.add_argument("--batches", nargs="+", type=int, default=[1, 4], metavar="N", help="numbers of images (1 4)")
    bench.add_argument("--lanes", type=int, help="solved side by side (default: as 'f2pad refine')")
    bench.add_argument("--parts", nargs="+", metavar="PART", help="images peaks network step stages precision (all)")
    bench.set_defaults(run=_bench)

    weights = commands.add_parser("weights", help="list, fetch, convert and verify the networks' weights")
    actions = weights.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser(
        "list", help="every network, where its weights come from and whether they are installed"
    ).set_defaults(run=_weights_list)
    fetch = actions.add_parser("fetch", help="download weights, check and convert them")
    fetch.add_argument("names", nargs="+", metavar="NAME", help="network, such as resnet18")
    fetch.set_defaults(run=_weights_fetch)
    convert = actions.add_parser("convert", help="convert a weight file brought by hand")
    convert.add_argument("file", type=Path, metavar="FILE", help=".pth, .bin or .safetensors")
    convert.add_argument("--as", dest="name", required=True, metavar="NAME", help="the network whose weights they are")
    convert.set_defaults(run=_weights_convert)
    verify = actions.add_parser("verify", help="check installed weights against their checksums")
    verify.add_argument("names", nargs="*", metavar="NAME", help="networks (default: all that are installed)")
    verify.set_defaults(run=_weights_verify)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from f2pad_jax.demo import run_demo

    _folder(arguments.out)
    _use_compilation_cache()
    print(_COMPILING)
    with _progress() as progress:
        summary = run_demo(arguments.out, seed=arguments.seed, progress=progress)
    print(_demo_table(summary))
    print(
        f"compiling took {summary['compile_seconds']:.0f} s; {arguments.out / 'gallery.png'} shows the masks, "
        f"{arguments.out / 'summary.json'} holds the figures"
    )


def _demo_table(summary: dict) -> str:
    lines = [
        f"{'category':10}  {'backbone IoU/DICE':>17}  {'refined IoU/DICE':>16}  {'steps':>5}  {'s/image':>7}",
    ]
    mean = {**summary, "steps": sum(c["steps"] for c in summary["categories"].values()) / len(summary["categories"])}
    for name, c in [*summary["categories"].items(), ("mean", mean)]:
        lines.append(
            f"{name:10}  {c['before']['iou']:9.3f} / {c['before']['dice']:.3f}"
            f"  {c['after']['iou']:8.3f} / {c['after']['dice']:.3f}"
            f"  {c['steps']:5.0f}  {c['seconds_per_image']:7.1f}"
        )
    return "\n".join(lines)


def _fit(arguments: argparse.Namespace) -> None:
    from f2pad_jax.backbones import find_network, load_backbone
    from f2pad_jax.data.images import read_image
    from f2pad_jax.evaluation.tune import trials_table
    from f2pad_jax.models import save_detector

    paths = _normal_images(arguments)
    method = DETECTORS[arguments.method]
    options = _options(method, arguments.option)
    if "resume" in inspect.signature(method.fit).parameters:  # long work, which can be taken up where it was stopped
        options["resume"] = arguments.out.with_name(arguments.out.name + ".partial")
    layers = tuple(arguments.layers or method.default_layers(find_network(arguments.backbone), len(paths)))
    backbone = load_backbone(arguments.backbone, layers=layers, weights=arguments.weights)
    trials = [] if arguments.tune else None
    with _progress() as progress:
        detector = f2pad_jax.fit(
            method,
            (read_image(path) for path in paths),
            backbone,
            size=(arguments.size, arguments.size),
            tuning=trials,
            seed=arguments.seed,
            progress=progress,
            **options,
        )
    save_detector(arguments.out, detector)
    if trials:
        print(trials_table(trials))
    print(f"{arguments.out}: {type(detector).__name__}, {_summary(detector, len(paths))}")


def _import(arguments: argparse.Namespace) -> None:
    from f2pad_jax.data.images import read_image
    from f2pad_jax.models import save_detector

    paths = _normal_images(arguments)
    size = tuple(arguments.size) if arguments.size else None
    with _progress() as progress:
        images = (read_image(path) for path in paths)
        detector = f2pad_jax.load_anomalib(arguments.checkpoint, images, size=size, seed=arguments.seed, progress=progress)
    save_detector(arguments.out, detector)
    print(
        f"{arguments.out}: {type(detector).__name__} of anomalib's, {_summary(detector, len(paths))}; "
        f"refine with --weights {arguments.checkpoint}"
    )


def _normal_images(arguments: argparse.Namespace) -> list[Path]:
    """The images of the folder given, once they and the file to write have been looked at."""
    from f2pad_jax.data.images import check_images, list_images

    if not arguments.normal.is_dir():
        raise ImageError(f"{arguments.normal}: no such folder")
    if arguments.out.is_dir():
        raise ImageError(f"{arguments.out}: is a folder; --out names the model file to write")
    _folder(arguments.out.parent)
    with tempfile.TemporaryFile(dir=arguments.out.parent):  # what can't be written is told before the fit, not after
        pass
    paths = [path for path, _ in list_images([arguments.normal])]
    check_images(paths)
    _use_compilation_cache()
    return paths


def _options(method: type, pairs: Sequence[str]) -> dict:
    """Settings of a method from NAME=VALUE pairs."""
    shared = ("images", "backbone", "seed", "progress", "resume")
    known = {name: p.default for name, p in inspect.signature(method.fit).parameters.items() if name not in shared}
    options = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in known:
            raise OptionError(f"{method.__name__} has no option '{name}'; it has {', '.join(known)}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        whole = not isinstance(known[name], float)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise OptionError(f"option {name}: '{text}' is no number of at least 0")
        if whole and (value < 1 or value != int(value)):
            raise OptionError(f"option {name}: '{text}' is no whole number of at least 1")
        options[name] = int(value) if whole else float(value)
    return options


def _summary(detector, num_images: int) -> str:
    calibration = detector.calibrated
    return (
        f"{num_images} normal images, {detector.backbone.name} {' '.join(detector.backbone.layers)}; "
        f"{calibration.prior.num_components} pixel components, threshold {float(calibration.threshold):.2f}"
    )


def _refine(arguments: argparse.Namespace) -> None:
    from f2pad_jax.cluster import ray_workers
    from f2pad_jax.data.images import check_images, is_address, list_images
    from f2pad_jax.files import refine_files, worker
    from f2pad_jax.history import figures
    from f2pad_jax.inpaint import in_full
    from f2pad_jax.models import load_detector

    if arguments.ray is not None:  # the accelerators are the workers'; here the model is only looked at
        import jax

        jax.config.update("jax_platforms", "cpu")
    if arguments.history:
        figures()  # told before the first image, not after
    inpaint = in_full(arguments.inpaint)
    detector = load_detector(arguments.model, weights=arguments.weights)
    found = list_images(arguments.images)
    stems = _stems([relative for _, relative in found])
    check_images(path for path, _ in found if not is_address(path))  # those in a bucket take long to come
    _folder(arguments.out)
    _use_compilation_cache()
    print(_COMPILING)
    options = {"inpaint": inpaint, "lanes": arguments.lanes, "history": arguments.history}
    if arguments.ray is None:
        work = worker(detector, arguments.out, **options)
    else:
        work = ray_workers(arguments.model, arguments.weights, arguments.out, num_workers=arguments.ray, options=options)
    recipe = {"inpaint": inpaint, "history": arguments.history}
    tasks = [(path, stem) for (path, _), stem in zip(found, stems, strict=True)]
    with _progress() as progress:
        results = refine_files(arguments.model, tasks, arguments.out, work, recipe, progress)
    records, count, seconds = results["images"], results["refined_now"], results["seconds"]
    anomalous = sum(record["anomalous_pixels"] > 0 for record in records)
    before = f" ({len(records) - count} of them before)" if count < len(records) else ""
    print(
        f"{len(records)} images{before} in {seconds:.0f} s: {anomalous} with an anomaly, "
        f"{len(records) - anomalous} good; masks and results.json are in {arguments.out}"
    )


def _make_dataset(arguments: argparse.Namespace) -> None:
    from f2pad_jax.data.dataset import make_dataset, read_manifest, rebuild_dataset

    _folder(arguments.out)
    with _progress() as progress:
        if arguments.manifest:
            path = rebuild_dataset(arguments.manifest, arguments.root, arguments.out, progress=progress)
        else:
            path = make_dataset(
                arguments.root,
                arguments.out,
                categories=arguments.categories,
                protocol=arguments.protocol,
                count=arguments.count,
                size=(arguments.size, arguments.size),
                seed=arguments.seed,
                progress=progress,
            )
    manifest = read_manifest(path)
    print(f"{path}: {manifest['count']} defective images of each of {', '.join(manifest['categories'])}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from f2pad_jax.evaluation.evaluate import evaluate
    from f2pad_jax.evaluation.report import write_report
    from f2pad_jax.evaluation.tables import write_tables

    _folder(arguments.out)
    _use_compilation_cache()
    with _progress() as progress:
        records = evaluate(
            arguments.root,
            arguments.out,
            categories=arguments.categories,
            methods=arguments.methods,
            backbone=arguments.backbone,
            weights=arguments.weights,
            protocols=arguments.protocol,
            settings=arguments.setting,
            ablations=arguments.ablations,
            images=arguments.images,
            tune=arguments.tune,
            curves=arguments.curves,
            size=(arguments.size, arguments.size),
            seed=arguments.seed,
            progress=progress,
        )
    tables = write_tables(arguments.out, records)[0]
    print(tables.read_text())
    report = write_report(arguments.out)
    print(f"{report} shows every image; tables.md, timing.md, results.json, results.csv and pictures/ lie beside it")


def _bench(arguments: argparse.Namespace) -> None:
    from f2pad_jax.evaluation.bench import PARTS, bench

    _use_compilation_cache()
    with _progress() as progress:
        bench(
            arguments.folder,
            methods=arguments.methods,
            backbone=arguments.backbone,
            layers=arguments.layers,
            weights=arguments.weights,
            batches=arguments.batches,
            lanes=arguments.lanes,
            parts=arguments.parts or PARTS,
            progress=progress,
            say=lambda line: print(line, flush=True),
        )


def _weights_list(arguments: argparse.Namespace) -> None:
    from f2pad_jax.fetch import list_weights

    found = list(list_weights())
    for weights in found:
        size = f"{weights.path.stat().st_size / 1e6:.0f} MB" if weights.path else "-"
        print(f"{weights.name:18}  {size:>9}  {weights.source}  ({weights.licence})")
    print(f"{sum(weights.path is not None for weights in found)} of {len(found)} installed in {cache_folder()}")


def _weights_fetch(arguments: argparse.Namespace) -> None:
    from f2pad_jax.fetch import fetch

    for name in arguments.names:
        with _progress(sizes=True) as progress:
            path = fetch(name, progress)
        print(f"{path}: {_holds(name)}")


def _weights_convert(arguments: argparse.Namespace) -> None:
    from f2pad_jax.fetch import convert_weights

    path = convert_weights(arguments.file, arguments.name)
    print(f"{path}: {_holds(arguments.name)}")


def _weights_verify(arguments: argparse.Namespace) -> None:
    from f2pad_jax.fetch import list_weights

    names = arguments.names or [weights.name for weights in list_weights() if weights.path]
    if not names:
        print(f"no weights are installed in {cache_folder()}")
    failures = []
    for name in names:
        try:
            print(f"{name}: {_holds(name)}, as converted")
        except CheckpointError as error:
            failures.append(error)
            print(f"{name}: {error}")
    if failures:
        raise CheckpointError(f"{len(failures)} of {len(names)} failed")


def _holds(name: str) -> str:
    from f2pad_jax.fetch import verify

    return verify(name)


_COMPILING = (
    "the first image of each window size waits for its program to compile (up to half a minute; kept for later runs)"
)


def _stems(paths: list[Path]) -> list[str]:
    """A name without suffix for each file, with it where two would be the same."""
    stems = [path.with_suffix("").as_posix() for path in paths]
    count = collections.Counter(stems)
    names = [
        stem if count[stem] == 1 else path.as_posix().replace(".", "_") for stem, path in zip(stems, paths, strict=True)
    ]
    twice, most = collections.Counter(names).most_common(1)[0]
    if most > 1:
        raise ImageError(f"two of the images would both be written as '{twice}'; refine their folders one at a time")
    return names


def _folder(path: Path) -> None:
    """Make sure ``path`` is a folder, before hours of work find out that it can't be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ImageError(f"{path}: not a folder, and --out is to write to one") from None


def _use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache, so that the second run starts at once."""
    import os

    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # JAX's own setting
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "f2pad_jax" / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))


@contextlib.contextmanager
def _progress(*, sizes: bool = False) -> Iterator:
    """A progress bar on standard error, of counts or of sizes in bytes; yields a function of (stage, done, total).

    In a file or a pipe, a line at most every :data:`EVERY` seconds.
    """
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def say(stage: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY:
                last = time.monotonic()
                count = f"{decimal(done)} of {decimal(total)}" if sizes else f"{done}/{total}"
                print(f"{time.strftime('%H:%M:%S')} {stage} {count}", file=sys.stderr, flush=True)

        yield say
        return

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<22}"),
        BarColumn(),
        *((DownloadColumn(), TransferSpeedColumn()) if sizes else (MofNCompleteColumn(),)),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict = {}

        def report(stage: str, done: int, total: int) -> None:
            name = stage.split(",")[0]
            if name not in tasks:
                tasks[name] = bars.add_task(stage, total=total)
            bars.update(tasks[name], completed=done, total=total, description=stage)

        yield report


if __name__ == "__main__":
    sys.exit(main())
