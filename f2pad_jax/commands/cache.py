"""``f2pad cache``: the compiled programs that are kept for later runs."""

import argparse

from rich.filesize import decimal

from f2pad_jax._cache import folder_size, programs_folder


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the argument."""
    parser.add_argument("action", nargs="?", choices=["clear"], help="delete them (default: only show them)")


def run(arguments: argparse.Namespace) -> None:
    """Prints the number and the size of the programs, or deletes them."""
    folder = programs_folder()
    files = [file for file in folder.glob("*") if file.is_file()]
    count = sum(file.name.endswith("-cache") for file in files)
    print(f"{count} programs, {decimal(folder_size(folder))}, in {folder}")
    if arguments.action == "clear":
        for file in files:
            file.unlink(missing_ok=True)
        print("deleted")
