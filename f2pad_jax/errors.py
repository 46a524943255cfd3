"""Every error a caller can cause, one line each: what happened, to what, and what to do."""


class F2padError(Exception):
    """Base of all errors raised on purpose; the command prints its text and exits with 2."""


class CheckpointError(F2padError):
    """A weight file is missing, damaged, hostile, or not what it was taken for."""


class DepthError(CheckpointError):
    """A weight file ends before a layer that was asked for."""


class ImageError(F2padError):
    """An image or a folder of images can't be used."""


class OptionError(F2padError):
    """A setting of a method can't be used."""


class ModelError(F2padError):
    """A saved detector can't be used."""
