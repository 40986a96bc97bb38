"""Errors that a user can cause and fix. Any other exception is a bug."""


class CascadeDetError(Exception):
    """Base of all errors that this package raises for bad input."""


class ConfigError(CascadeDetError, ValueError):
    """A configuration key is unknown, has a wrong value, or contradicts another key."""


class DatasetError(CascadeDetError, ValueError):
    """An annotation file or an image cannot be used as it is."""


class CheckpointError(CascadeDetError, ValueError):
    """A file of weights or a checkpoint cannot be read, or does not fit the model."""


class DownloadError(CascadeDetError, OSError):
    """An address cannot be fetched, or serves another file than expected."""
