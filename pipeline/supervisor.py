"""What a driver does about workers that are lost and blocks that fail: it has others do the work, a few times."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pipeline.errors import BlockFailed, GigasrError, Stopped, StoreFailed, WorkerLost, WorkFailed
from pipeline.events import Event, Listener, Notice, UnitsDone, WorkerLeft
from pipeline.grid import Index
from pipeline.plan import Plan
from pipeline.signals import Stopping
from pipeline.store import RunStore
from pipeline.workers import Workers

QUESTIONS_AHEAD = 2
"""Of independent work, what a worker is asked at a time, so that it never waits for the driver."""

POLL_S = 0.5
"""How often a waiting driver looks whether it should stop, and after the workers."""

RETRIES = 3
"""How often a block is tried again that ended its worker, or raised something."""

NO_WORKER_S = 600.0
"""For a worker to come where all are lost: a machine to start, a network to load."""

FIRST_PAUSE_S = 0.5
"""Before a disk that refuses is tried again; twice as long each time."""

LONGEST_PAUSE_S = 10.0


@dataclass
class Task:
    """Something to do that leaves a marker."""

    unit: str
    """Its marker."""
    stage: str
    """As in `Plan.blocks_of`."""
    index: Index
    """Of its block, or of the first of its blocks."""
    ask: Callable[[int], Any]
    """Asks a worker, given its number."""
    n_units: int = 1
    """Of the stage, that this finishes."""
    failures: int = 0


@dataclass
class _Asked:
    handle: Any
    worker: int
    task: Task
    lost_before: int
    """Workers that were lost until it was asked."""


class Supervisor:
    """Asks workers, waits for them, and notices what becomes of them."""

    def __init__(
        self,
        plan: Plan,
        store: RunStore,
        workers: Workers,
        listener: Listener,
        stopping: Stopping,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            clock: seconds from whenever; that of the workers, where they are simulated.
        """
        self.plan, self.store, self.workers, self.stopping = plan, store, workers, stopping
        self.clock = clock
        self._listener = listener
        self.n_lost = 0
        """Workers, so far."""
        self._failures: Counter[tuple[str, Index]] = Counter()
        self._refused_since: float | None = None
        self._pause = FIRST_PAUSE_S

    def tell(self, event: Event) -> None:
        self._listener(event)

    def stop_if_asked(self) -> None:
        if self.stopping():
            raise Stopped("stopped; what is finished is kept\nhint: run the same command again to go on")

    # Workers

    def watch(self) -> None:
        """Look after the workers, and tell what happened."""
        for event in self.workers.watch():
            if isinstance(event, WorkerLeft):
                self.n_lost += 1
                self.tell(Notice(f"worker {event.worker} is lost: {event.why}", warning=True))
            self.tell(event)

    def crew(self) -> list[int]:
        """The workers that can be asked; waits for one, if there is none.

        Raises:
            WorkFailed: if none comes.
        """
        begun, told = self.clock(), False
        while True:
            self.watch()
            if live := self.workers.live():
                return live
            self.stop_if_asked()
            if not told:
                self.tell(Notice("no worker is left; waiting for one", warning=True))
                told = True
            if self.clock() - begun > NO_WORKER_S:
                raise WorkFailed(
                    f"no worker came within {NO_WORKER_S:.0f} s\n"
                    "hint: `ray status` tells what the cluster lacks; the same command goes on"
                )
            time.sleep(POLL_S)

    # Waiting

    def gather(self, handles: Sequence[Any], on_stop: Callable[[], None] = lambda: None) -> list[Any]:
        """What became of some questions, in their order.

        Args:
            on_stop: called while waiting, once it is asked to stop; the answers come either way.

        Raises:
            WorkerLost: if one of them cannot be answered any more.
        """
        pending = dict(enumerate(handles))
        answers: dict[int, Any] = {}
        while pending:
            self.watch()
            if self.stopping():
                on_stop()
            keys = [*pending]
            for i in self.workers.wait([*pending.values()], POLL_S):
                answers[keys[i]] = self.workers.get(pending.pop(keys[i]))
        return [answers[i] for i in range(len(handles))]

    def fan_out(self, stage: str, tasks: Iterable[Task], forget: Callable[[Task], None] = lambda task: None) -> None:
        """Have workers do independent tasks in order, each by whichever worker has the least to do, a few at a time.

        Args:
            stage: of which finished units are told.
            forget: called before a task is asked for again: something that it needs may be lost.

        Raises:
            BlockFailed: if a task fails too often.
            GigasrError: what else a worker raised, once nothing is under way any more.
        """
        pending: list[_Asked] = []
        tasks, again = iter(tasks), deque[Task]()
        try:
            while True:
                self.stop_if_asked()
                crew = self.crew()
                for worker in self._idle(crew, pending):
                    task = again.popleft() if again else next(tasks, None)
                    if task is None:
                        break
                    try:
                        pending.append(_Asked(task.ask(worker), worker, task, self.n_lost))
                    except WorkerLost:
                        again.append(task)
                if not pending and not again:
                    return
                for i in reversed(self.workers.wait([asked.handle for asked in pending], POLL_S)):
                    asked = pending[i]
                    if self._is_done(asked, first=all(other.worker != asked.worker for other in pending[:i])):
                        self.tell(UnitsDone(stage, asked.task.n_units))
                    else:
                        forget(asked.task)
                        again.append(asked.task)
                    del pending[i]
        except Stopped:
            raise
        except GigasrError:
            for asked in pending:  # what is under way must be over before anything is computed again
                with suppress(Exception):
                    self.gather([asked.handle])
            raise

    def _idle(self, crew: Sequence[int], pending: Sequence[_Asked]) -> list[int]:
        """Workers that may be asked something, those with the least to do first, as often as they may be asked."""
        load = Counter(asked.worker for asked in pending)
        return [worker for n in range(QUESTIONS_AHEAD) for worker in crew if load[worker] <= n]

    def _is_done(self, asked: _Asked, first: bool) -> bool:
        """Whether a task is done; if not, it is to be asked for again.

        Args:
            first: whether its worker had nothing else to do before it.
        """
        task = asked.task
        try:
            self.workers.get(asked.handle)
        except WorkerLost as error:
            self.watch()
            if self.store.marker(task.unit) is not None:  # it was done, and not more
                return True
            # What merely waited for a worker that was lost, or for what it had computed, is not to blame.
            if (error.worker == asked.worker and first) or self.n_lost == asked.lost_before:
                self._count_failure(task, error)
            return False
        except Exception as error:
            if isinstance(error, GigasrError) and not isinstance(error, BlockFailed):
                raise
            if asked.worker in self.workers.live():
                self._count_failure(task, error)
                # It may have been the worker: a GPU that has failed once fails for the rest of its process.
                self.workers.discard(asked.worker, "it raised an error, and is not trusted any more")
            return False
        self.is_served()
        return True

    def _count_failure(self, task: Task, error: Exception) -> None:
        task.failures += 1
        if task.failures > RETRIES:
            self._fail(task.stage, task.index, error)
        self.tell(
            Notice(f"{self.plan.place(task.stage, task.index)} is tried again: {_first_line(error)}", warning=True)
        )

    def charge(self, stage: str, index: Index, error: Exception) -> None:
        """Count a failure of a block that is tried again.

        Raises:
            BlockFailed: if it fails too often.
        """
        self._failures[stage, index] += 1
        if self._failures[stage, index] > RETRIES:
            self._fail(stage, index, error)

    def forgive(self) -> None:
        """What has failed has got on since."""
        self._failures.clear()

    def _fail(self, stage: str, index: Index, error: Exception) -> None:
        raise BlockFailed(
            f"{self.plan.place(stage, index)} failed {RETRIES + 1} times; the last time: {_first_line(error)}\n"
            "hint: what is finished is kept; the same command tries again",
            stage,
            index,
        ) from error

    # A disk that refuses

    def be_patient(self, refusal: StoreFailed) -> None:
        """Wait a moment before a disk is tried again.

        Raises:
            StoreFailed: the refusal, if it has been refusing for too long.
        """
        now = self.clock()
        if self._refused_since is None:
            self._refused_since, self._pause = now, FIRST_PAUSE_S
        patience = self.plan.config.run.patience_seconds
        if now - self._refused_since >= patience:
            raise refusal
        pause = min(self._pause, patience - (now - self._refused_since))
        self.tell(Notice(f"{_first_line(refusal)}; trying again in {pause:.1f} s", warning=True))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        while (left := now + pause - self.clock()) > 0:
            self.stop_if_asked()
            time.sleep(min(left, POLL_S))

    def is_served(self) -> None:
        """The disk takes and gives what it should."""
        self._refused_since = None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
