"""Workers that are lost on a schedule, in one process: failure as an input."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline import run as run_module
from pipeline.errors import WorkerLost
from pipeline.events import Event, WorkerLeft
from pipeline.plan import Plan
from pipeline.workers import LocalWorkers, _Answer


class Asked(NamedTuple):
    """A question, before it is answered."""

    n: int
    """How many were asked before, of any worker."""
    worker: int
    method: str
    args: tuple[Any, ...]


Fate = Callable[[Asked], str | None]
"""What becomes of the worker that is asked: "before" it dies before it does anything, "after" when all is done but the
answer, "node" as before, and all that it has ever answered is lost with it; None if nothing does."""


class _Handle(NamedTuple):
    worker: int
    answer: _Answer


class FaultyWorkers(LocalWorkers):
    """Local workers with a fate. They have numbers that are never used again, like those on Ray."""

    def __init__(self, plan: Plan, folder: Path, n: int, stopping: Callable[[], bool], fate: Fate) -> None:
        super().__init__(plan, folder, n, stopping)
        self._fate, self.n_asked = fate, 0
        self._lost_nodes: set[int] = set()

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        return _Handle(worker, self._answered(worker, method, *args))

    def ask_for(self, n: int, worker: int, method: str, *args: Any) -> list[Any]:
        value, error = self._answered(worker, method, *args)
        return [_Handle(worker, _Answer(None if error else value[part], error)) for part in range(n)]

    def _answered(self, worker: int, method: str, *args: Any) -> _Answer:
        if worker not in self.live():
            raise WorkerLost(f"worker {worker} is gone", worker)
        fate = self._fate(Asked(self.n_asked, worker, method, args))
        self.n_asked += 1
        if fate in (None, "after"):
            try:
                args = tuple(self.get(arg) if isinstance(arg, _Handle) else arg for arg in args)
            except Exception as error:  # of what was asked before; that worker is to blame, not this one
                return _Answer(error=error)
            answer: _Answer = super().ask(worker, method, *args)
        if fate is None:
            return answer
        if fate == "node":
            self._lost_nodes.add(worker)
        self.discard(worker, f"it was killed while it did {method}")
        return _Answer(error=WorkerLost("a worker died", worker))

    def get(self, handle: Any) -> Any:
        worker, answer = handle
        if worker in self._lost_nodes:
            raise WorkerLost("what a worker had computed is lost")
        return super().get(answer)


def set_fate(
    monkeypatch: pytest.MonkeyPatch, fate: Fate, n: int = 2, kind: type[FaultyWorkers] = FaultyWorkers
) -> list[FaultyWorkers]:
    """Have runs use workers with a fate; the list that they will be in."""
    made: list[FaultyWorkers] = []

    def make(plan: Plan, folder: Path, stopping: Callable[[], bool]) -> FaultyWorkers:
        made.append(kind(plan, folder, n, stopping, fate))
        return made[-1]

    monkeypatch.setattr(run_module, "_make_workers", make)
    return made


def losses(events: Sequence[Event]) -> int:
    """Workers that were lost in a run."""
    return sum(isinstance(event, WorkerLeft) for event in events)
