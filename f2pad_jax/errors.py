"""Errors that a caller can cause; each message is one line: the event, the file or image, the remedy."""

__all__ = ["CheckpointError", "DepthError", "F2padError", "ImageError", "ModelError", "OptionError", "RunError"]


def one_line(error: object) -> str:
    """Returns a message with escapes in place of line ends and other characters that a console does not show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))


class F2padError(Exception):
    """Base of all errors raised on purpose; the command prints its text and exits with 2."""


class CheckpointError(F2padError):
    """A weight file that is missing, damaged, hostile, or another network's."""


class DepthError(CheckpointError):
    """A weight file that ends before a layer that was asked for."""


class ImageError(F2padError):
    """An image or a folder of images that can't be used."""


class ModelError(F2padError):
    """A saved detector that can't be used."""


class OptionError(F2padError):
    """An option or setting that can't be used."""


class RunError(F2padError):
    """An output folder that holds another run or another data set."""
