"""Every error that a user of the pipeline can meet.

    GigasrError
    ├── UserError            the request cannot be met as it stands; exit code 2
    │   ├── ConfigError      an option is unknown, out of range, or contradicts another
    │   ├── SourceError      the source is missing, broken, or not a raster that we take
    │   ├── OutputError      the output exists, or cannot be written
    │   ├── WontFit          disk or memory would not do
    │   └── RunMismatch      the run folder belongs to another source, configuration or model
    ├── WorkFailed           something went wrong in the middle; the run can go on later; exit code 1
    │   ├── Damaged          stored data are not what was written; they are computed again
    │   ├── StoreFailed      the disk refuses; it is tried again for a while
    │   ├── BlockFailed      a block's computation raised something; it is tried again, a few times
    │   └── WorkerLost       a worker died, hangs, or its machine is gone; others take over
    └── Stopped              a signal asked for it; everything finished is kept; exit code 75

Each says what, where and what to do. Hints stand on a line of their own.
"""

from typing import Any


class GigasrError(Exception):
    """The root: `except GigasrError` catches all of them."""

    exit_code = 1


class UserError(GigasrError):
    """The request cannot be met as it stands; nothing was started, nothing is left behind."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """An option is unknown, out of its range, or contradicts another."""


class SourceError(UserError):
    """The source is missing, broken, or not a raster that can be upscaled."""


class OutputError(UserError):
    """The output exists already, or cannot be written."""


class WontFit(UserError):
    """Disk or memory would not do."""


class RunMismatch(UserError):
    """The run folder belongs to another source, configuration or model."""


class WorkFailed(GigasrError):
    """Something went wrong in the middle. What was finished is kept; the same command goes on."""


class Damaged(WorkFailed):
    """Stored data are missing or are not what was written.

    Raised by the store; a run answers by computing the unit again.
    """

    def __init__(self, message: str, array: str, index: tuple[int, int]) -> None:
        super().__init__(message)
        self.array = array
        """The array's path in the store."""
        self.index = index
        """Of the damaged block in the array's block grid: (row, column)."""

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions travel between processes; the default forgets arguments
        return type(self), (self.args[0], self.array, self.index)


class StoreFailed(WorkFailed):
    """The operating system refuses to read or write the store. A run tries again for a while."""


class BlockFailed(WorkFailed):
    """The computation of a block raised what nobody expected. A run tries again, a few times, with another worker."""

    def __init__(self, message: str, stage: str, index: tuple[int, int]) -> None:
        super().__init__(message)
        self.stage, self.index = stage, index

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.stage, self.index)


class WorkerLost(WorkFailed):
    """A worker died, or was given up as hanging, or what it had computed is gone with its machine."""

    def __init__(self, message: str, worker: int | None = None) -> None:
        super().__init__(message)
        self.worker = worker
        """Its number; None if something was lost, but nobody knows by whom."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.worker)


class Stopped(GigasrError):
    """A signal asked the run to stop. What was finished is kept; the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
