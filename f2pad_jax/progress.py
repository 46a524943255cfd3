"""Progress of long work."""

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""Function of (stage, done, total). Text after a comma in the stage, such as a loss, may change between calls."""


def silent(stage: str, done: int, total: int) -> None:
    """Ignores a progress report."""
