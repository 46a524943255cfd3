"""``f2pad weights``: weight files of the networks."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from f2pad_jax.backbones._fetch import convert_weights, fetch, list_weights, verify
from f2pad_jax.backbones._weight_files import cache_folder
from f2pad_jax.commands._console import shown_progress
from f2pad_jax.errors import CheckpointError


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")

    action("list", "list the networks, the sources of their weights, and the installed files")
    parser = action("fetch", "download weights, check them, and convert them to the library's format")
    parser.add_argument("names", nargs="+", metavar="NAME", help="network, such as resnet18")
    parser = action("convert", "convert and install a weight file that you downloaded yourself")
    parser.add_argument("file", type=Path, metavar="FILE", help="weight file: .pth, .bin or .safetensors")
    parser.add_argument("--as", dest="name", required=True, metavar="NAME", help="network that the weights belong to")
    parser = action("verify", "check installed weights against their checksums")
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks to check (default: all that are installed)")


def run(arguments: argparse.Namespace) -> None:
    """Runs an action."""
    match arguments.action:
        case "list":
            _list()
        case "fetch":
            _fetch(arguments.names)
        case "convert":
            _convert(arguments.file, arguments.name)
        case "verify":
            _verify(arguments.names)


def _list() -> None:
    found = list(list_weights())
    for entry in found:
        size = f"{entry.path.stat().st_size / 1e6:.0f} MB" if entry.path else "-"
        print(f"{entry.name:22}  {size:>9}  {entry.source}  ({entry.licence})")
    print(f"{sum(entry.path is not None for entry in found)} of {len(found)} installed in {cache_folder()}")


def _fetch(names: Sequence[str]) -> None:
    for name in names:
        with shown_progress(sizes=True) as progress:
            path = fetch(name, progress)
        print(f"{path}: {verify(name)}")


def _convert(file: Path, name: str) -> None:
    path = convert_weights(file, name)
    print(f"{path}: {verify(name)}")


def _verify(names: Sequence[str]) -> None:
    names = names or [entry.name for entry in list_weights() if entry.path]
    if not names:
        print(f"no weights are installed in {cache_folder()}")
    num_failed = 0
    for name in names:
        try:
            print(f"{name}: {verify(name)}, as converted")
        except CheckpointError as error:
            num_failed += 1
            print(f"{name}: {error}")
    if num_failed:
        raise CheckpointError(f"{num_failed} of {len(names)} failed the check")
