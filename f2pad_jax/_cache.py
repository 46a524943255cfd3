"""The library's folder in the user's cache, which keeps compiled programs."""

import os
from pathlib import Path

import jax

from f2pad_jax.errors import OptionError

_PROGRAM, _TIME = "-cache", "-atime"
"""Ends of the names of both files of a program: the program, and the time of its last use."""
PROGRAMS_SIZE = 2**30
"""Size of the folder of compiled programs above which the least recently used are deleted, bytes."""
LEAST_SECONDS = 0.1
"""Compile time of the smallest programs that are kept, seconds; JAX looks at all files of the folder for each new one."""


def user_cache() -> Path:
    """Returns the library's folder in the user's cache: below ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        OptionError: there is no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "f2pad_jax"
    except RuntimeError:
        raise OptionError("this user has no home folder; set XDG_CACHE_HOME to a folder") from None


def programs_folder() -> Path:
    """Returns the folder of compiled programs."""
    return user_cache() / "programs"


def folder_size(folder: Path) -> int:
    """Returns the size of all files in a folder and its subfolders, bytes; 0 if the folder is missing."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def keep_programs() -> None:
    """Makes JAX keep the process's compiled programs in the user's cache for later processes.

    Nothing changes if JAX has a folder already (``JAX_COMPILATION_CACHE_DIR``), or if the user's cannot be written.
    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns all keeping off.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        folder = programs_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, OptionError):
        return
    if not os.access(folder, os.W_OK):
        return
    for program in folder.glob(f"*{_PROGRAM}"):  # a process was killed between both files; JAX would keep no program more
        if not Path(str(program).removesuffix(_PROGRAM) + _TIME).exists():
            program.unlink(missing_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", PROGRAMS_SIZE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
