"""Workers: who does the work of the stages. One protocol, with the one-process reference; `ray_workers` has the other.

A driver asks a worker to do something and gets a handle at once; a handle may be an argument of the next question, so
that what is large goes from worker to worker and the driver holds no pixels.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.events import Event, WorkerJoined, WorkerLeft
from pipeline.plan import Plan
from pipeline.telemetry import Snapshot
from pipeline.worker import Worker


class Workers(Protocol):
    """Workers that answer with handles. They may come and go."""

    steps_ahead: int
    """Diffusion steps that are asked for before the first of them is over, so that no worker waits for the driver."""
    spills: bool
    """Whether handles of more than fits into memory may be kept."""

    def live(self) -> list[int]:
        """The numbers of those that can be asked, in order. No number is used twice."""

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        """Have a worker do something after what it was asked before; a handle of what comes of it."""

    def ask_for(self, n: int, worker: int, method: str, *args: Any) -> list[Any]:
        """The same, where something of `n` parts comes of it; a handle of each."""

    def wait(self, handles: Sequence[Any], timeout_s: float) -> list[int]:
        """Which of some handles are done, as soon as one is, or none after a while."""

    def get(self, handle: Any) -> Any:
        """What became of a question.

        Raises:
            WorkerLost: if nothing can become of it any more.
            Exception: what the worker raised.
        """

    def watch(self) -> list[Event]:
        """Look after the workers: who died, who hangs, who is new; to be called often. What has happened."""

    def discard(self, worker: int, why: str) -> None:
        """End a worker that cannot be trusted, unless it is gone already; another may take its place."""

    def halt(self) -> None:
        """Have all workers give up the diffusion steps that they are taking, but such that all of them have been where
        the last one stops: at the step it has done, or the one before."""

    def give_up(self) -> None:
        """Have all workers give up the diffusion steps that they are taking, wherever they are."""

    def publish(self, snapshot: Snapshot) -> None:
        """Show the figures of the run where the workers are watched; called from another thread."""

    def close(self) -> None:
        """End the workers."""


class _Answer(NamedTuple):
    value: Any = None
    error: Exception | None = None


class LocalWorkers:
    """The reference: every worker in this process, which does at once what it is asked."""

    steps_ahead = 1
    spills = False

    def __init__(self, plan: Plan, folder: Path, n: int = 1, stopping: Callable[[], bool] = lambda: False) -> None:
        self._make = lambda: Worker(plan, folder, stopping)
        self._workers: dict[int, Worker] = {}
        self._numbers = itertools.count()
        self._events: list[Event] = []
        for _ in range(n):
            self._start()

    def _start(self) -> None:
        number = next(self._numbers)
        self._workers[number] = self._make()
        self._events.append(WorkerJoined(number, *self._workers[number].ready()))

    def live(self) -> list[int]:
        return [*self._workers]

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        try:
            return _Answer(self._workers[worker].do(method, *map(self._value, args)))
        except Exception as error:
            return _Answer(error=error)

    def ask_for(self, n: int, worker: int, method: str, *args: Any) -> list[Any]:
        value, error = self.ask(worker, method, *args)
        return [_Answer(error=error)] * n if error else [_Answer(part) for part in value]

    def _value(self, argument: Any) -> Any:
        return self.get(argument) if isinstance(argument, _Answer) else argument

    def wait(self, handles: Sequence[Any], timeout_s: float) -> list[int]:
        return [*range(len(handles))]

    def get(self, handle: Any) -> Any:
        if handle.error is not None:
            raise handle.error
        return handle.value

    def watch(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def discard(self, worker: int, why: str) -> None:
        if self._workers.pop(worker, None) is None:
            return
        self._events.append(WorkerLeft(worker, why))
        self._start()

    def halt(self) -> None:
        """Nothing runs while this process can call."""

    def give_up(self) -> None:
        """Nothing runs while this process can call."""

    def publish(self, snapshot: Snapshot) -> None:
        """Nobody watches this process."""

    def close(self) -> None:
        self._workers = {}
