"""Every error of `stablesr` that is not a mistake in the caller's arguments.

    StableSRError
    ├── CheckpointError    a weight file is not what it should be     (also a ValueError)
    └── DownloadError      weights could not be fetched or verified   (also an OSError)

Each says what, where and what to do.
"""


class StableSRError(Exception):
    """The root: `except StableSRError` catches all of them."""


class CheckpointError(StableSRError, ValueError):
    """A weight file is damaged, unsafe, or holds something other than the weights asked for."""


class DownloadError(StableSRError, OSError):
    """Weights could not be fetched, stored, or did not have the checksum they must have."""
