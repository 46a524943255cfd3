"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total); what follows a comma in the stage, such as a loss, changes from call to call."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress nobody asked to be told."""
