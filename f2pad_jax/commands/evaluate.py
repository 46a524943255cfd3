"""``f2pad evaluate``: the paper's tables on a data set in MVTec layout."""

import argparse
from pathlib import Path

from f2pad_jax.commands._console import (
    add_ignored,
    add_network,
    add_seed,
    add_size,
    at_least,
    exit_status,
    make_folder,
    only_writer,
    shown_progress,
)
from f2pad_jax.data.mvtec import HALVES
from f2pad_jax.detectors.registry import DETECTORS
from f2pad_jax.evaluation._store import unusable_images
from f2pad_jax.evaluation.cases import ABLATIONS
from f2pad_jax.evaluation.report import write_report
from f2pad_jax.evaluation.runs import evaluate
from f2pad_jax.evaluation.tables import write_tables


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "root",
        type=Path,
        metavar="ROOT",
        help="data set in MVTec layout, or 'textures' for the photographs of 'f2pad demo'",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder of the evaluation")
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="categories to evaluate on (default: all)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(DETECTORS),
        default=["patchcore"],
        help="methods of the detectors (default: patchcore)",
    )
    parser.add_argument(
        "--protocol",
        nargs="+",
        default=["cut-paste"],
        help="kinds of defects, one or more: cut-paste or hard (both synthetic), or real (default: cut-paste)",
    )
    parser.add_argument(
        "--setting",
        nargs="+",
        default=["normal"],
        help="numbers of training images, one or both: normal (all images), few-shot (16 images) (default: normal)",
    )
    parser.add_argument(
        "--ablations",
        nargs="+",
        default=[],
        metavar="NAME",
        help="variants of the method to run as well; each lacks one part, and 'paper' has the paper's settings: "
        f"{', '.join(ABLATIONS)} (default: none)",
    )
    add_network(parser)
    parser.add_argument(
        "--images",
        type=at_least(1),
        help="largest number of defective images, and of good images, in each category "
        "(default: all images of the data set, 54 synthetic defects)",
    )
    parser.add_argument(
        "--half",
        choices=HALVES,
        help="half of each test folder: 'development' to choose constants on, or 'report' for figures (default: both)",
    )
    add_size(parser)
    add_ignored(parser)
    add_seed(parser)
    parser.add_argument("--tune", action="store_true", help="also tune every detector, as 'f2pad tune' does")
    parser.add_argument(
        "--curves",
        type=at_least(0),
        default=0,
        metavar="N",
        help="number of defective images of each detector; the report draws their objective over the steps (default: 0)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the evaluation, prints the tables and writes the report; the exit status is 3 if an image can't be used."""
    make_folder(arguments.out)
    with only_writer(arguments.out), shown_progress() as progress:
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
            half=arguments.half,
            size=arguments.size,
            smallest_defect=arguments.smallest_defect,
            ignore=arguments.ignore,
            border=arguments.border,
            seed=arguments.seed,
            progress=progress,
        )
        tables = write_tables(arguments.out, records)[0]
        report = write_report(arguments.out)
    print(tables.read_text())
    print(
        f"{report} shows every image; its folder also holds tables.md, timing.md, results.json, results.csv and pictures/"
    )
    return exit_status(unusable_images(arguments.out))
