"""``f2pad make-dataset``: synthetic defects on normal images."""

import argparse
from pathlib import Path

from f2pad_jax.commands._console import add_seed, at_least, make_folder, only_writer, shown_progress
from f2pad_jax.data.dataset import make_dataset, read_manifest, rebuild_dataset


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("root", type=Path, metavar="ROOT", help="data set in MVTec layout; its normal images are used")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder for the new data set")
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="categories to make (default: all)")
    parser.add_argument(
        "--protocol",
        default="cut-paste",
        help="kind of the defects: cut-paste (the paper's patches of flat colour) or hard (default: %(default)s)",
    )
    parser.add_argument(
        "--count", type=at_least(1), default=54, help="number of defective images of each category (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=at_least(1), default=224, help="side of the images, in pixels (default: %(default)s)"
    )
    add_seed(parser)
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="manifest of an earlier data set; makes this data set again from ROOT, and ignores all options but --out",
    )


def run(arguments: argparse.Namespace) -> None:
    """Makes a new data set, or rebuilds a data set from its manifest."""
    make_folder(arguments.out)
    with only_writer(arguments.out), shown_progress() as progress:
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
    print(f"{path}: {manifest['count']} defective images in each category ({', '.join(manifest['categories'])})")
