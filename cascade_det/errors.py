"""The errors that a user can cause and mend. Everything else is a bug of ours."""


class CascadeDetError(Exception):
    """Base of all errors that this package raises for bad input."""


class ConfigError(CascadeDetError, ValueError):
    """A configuration key is unknown, has a wrong value, or contradicts another key."""


class DatasetError(CascadeDetError, ValueError):
    """An annotation file or an image cannot be used as it is."""


class CheckpointError(CascadeDetError, ValueError):
    """A file of weights or a checkpoint cannot be read, or does not fit the model."""


class DownloadError(CascadeDetError, OSError):
    """An address cannot be fetched, or what it serves is not what it should be."""
