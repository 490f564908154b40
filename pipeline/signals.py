"""Stopping when asked: SIGINT and SIGTERM as a flag that a run looks at between its steps."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

SIGNALS = (signal.SIGINT, signal.SIGTERM)

TOGETHER_S = 0.5
"""Signals as close as this are one: launchers send SIGTERM behind SIGINT, or forward what the terminal sent already."""

STOPPING = "stopping after the current step; again to stop at once"

_SHOW_CURSOR = b"\x1b[?25h"
"""A live display hides it, and a process that ends at once does not clean up."""


class Stopping(Protocol):
    """Whether somebody asked the run to stop."""

    def __call__(self) -> bool: ...

    def install(self) -> None:
        """Take the signals, again: `ray.init` replaces the handlers that it finds."""


class _Never:
    def __call__(self) -> bool:
        return False

    def install(self) -> None:
        pass


NEVER: Stopping = _Never()
"""For runs that nothing stops but an exception."""


@contextmanager
def catching_signals(tell: Callable[[str], None]) -> Iterator[Stopping]:
    """Within, the first signal only sets a flag, and the second ends the process at once.

    Enter it from the main thread. `tell` gets what the user should know at the first signal, from a thread of its own:
    a handler may interrupt anything, so it must neither write to a buffered stream nor take a lock.
    """
    reader, writer = os.pipe()
    handler = _Handler(writer)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    teller = threading.Thread(target=_tell_when_asked, args=(reader, tell), name="signals", daemon=True)
    handler.install()
    teller.start()
    try:
        yield handler
    finally:
        for number, previous in before.items():
            signal.signal(number, previous or signal.SIG_DFL)  # None: a handler that was not Python's
        os.close(writer)
        teller.join()
        os.close(reader)


class _Handler:
    def __init__(self, writer: int) -> None:
        self._writer = writer
        self._asked_at: float | None = None

    def __call__(self) -> bool:
        return self._asked_at is not None

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> Any:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            os.write(self._writer, b"!")
        elif time.monotonic() - self._asked_at > TOGETHER_S:
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), _SHOW_CURSOR)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _tell_when_asked(reader: int, tell: Callable[[str], None]) -> None:
    if os.read(reader, 1):  # nothing comes when the writing end was closed
        tell(STOPPING)
