"""The figures of a run, kept by its driver for whoever looks from outside.

`FIGURES` says which there are. They go to RUN/progress.json, which `gigasr status` reads, and to `Workers.publish`,
which makes metrics of the cluster of them. Nothing depends on either: a run whose figures cannot be written goes on.
"""

import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pipeline.errors import Stopped
from pipeline.events import (
    Committed,
    Event,
    Listener,
    Notice,
    StageFinished,
    StageStarted,
    StepTaken,
    UnitsDone,
    WorkerJoined,
    WorkerLeft,
)
from pipeline.raster.header import Frozen
from pipeline.rates import Clock, Progress, StageProgress

NAME = "progress.json"

WRITE_EVERY_S = 2.0

PATIENCE_S = 10.0
"""At the end of a run, for a write that hangs."""

KEPT_WARNINGS = 5

State = Literal["running", "stopped", "failed", "finished"]
Number = int | float


@dataclass(frozen=True)
class Figure:
    """One number that tells how a run goes."""

    name: str
    """In progress.json; as a metric with `gigasr_` before it."""
    kind: Literal["gauge", "counter"]
    """A counter only grows, over all starts of the run."""
    unit: str
    description: str
    of_stage: bool = False
    """Whether each stage has its own."""


FIGURES = (
    Figure("stage_done_units", "gauge", "units", "Units of a stage that are done, those of sampling that are not yet "
           "committed included: blocks; of sampling, diffusion steps times blocks; of export, tiles of the file.",
           of_stage=True),
    Figure("stage_total_units", "gauge", "units", "Units of a stage.", of_stage=True),
    Figure("stage_units_per_second", "gauge", "units per second", "Units of a stage that are done in a second, lately.",
           of_stage=True),
    Figure("stage_left_seconds", "gauge", "seconds", "Until a stage is finished, at this rate.", of_stage=True),
    Figure("diffusion_step", "gauge", "steps", "Diffusion steps taken of the layer that is being sampled."),
    Figure("diffusion_steps", "gauge", "steps", "Diffusion steps of a layer."),
    Figure("step_seconds", "gauge", "seconds", "Duration of the last diffusion step."),
    Figure("workers", "gauge", "workers", "Workers that take part."),
    Figure("steps_taken_total", "counter", "steps", "Diffusion steps taken, those that were lost included."),
    Figure("predicted_tiles_total", "counter", "tiles", "Tiles that went through the diffusion network."),
    Figure("predicting_seconds_total", "counter", "seconds", "Spent on that, by all workers together."),
    Figure("exchanged_bytes_total", "counter", "bytes", "Predictions that went from worker to worker."),
    Figure("commits_total", "counter", "commits", "Commits of the latents."),
    Figure("commit_seconds_total", "counter", "seconds", "Spent on commits."),
    Figure("workers_lost_total", "counter", "workers", "Workers that were lost."),
    Figure("starts_total", "counter", "starts", "Starts of the run."),
)  # fmt: skip
"""All there are. What is not known yet, such as the rate of a stage that has just begun, is left out."""


class LivingWorker(Frozen):
    """A worker that takes part."""

    worker: int
    device: str
    node: str
    since: datetime


class Warned(Frozen):
    """Something that may need an answer."""

    at: datetime
    message: str


class Snapshot(Frozen, extra="ignore"):
    """A run at a moment, as its driver sees it: the content of progress.json."""

    state: State
    why: str | None = None
    """It failed."""
    written_at: datetime
    started_at: datetime
    """This start of the run."""
    host: str
    pid: int
    """Of the driver."""
    stage: str | None = None
    """That was begun last."""
    stages: dict[str, dict[str, Number]]
    """By name: the figures of each stage that this start has begun."""
    figures: dict[str, Number]
    """The others."""
    workers: tuple[LivingWorker, ...] = ()
    warnings: tuple[Warned, ...] = ()
    """The last few, of all starts."""

    def values(self, figure: Figure) -> list[tuple[str | None, Number]]:
        """What is known of a figure, with the stage it is of."""
        if figure.of_stage:
            return [(stage, known[figure.name]) for stage, known in self.stages.items() if figure.name in known]
        return [(None, self.figures[figure.name])] if figure.name in self.figures else []


def read_snapshot(folder: Path) -> Snapshot | None:
    """What the driver of a run has written last; None if there is nothing that can be read."""
    with suppress(OSError, ValueError):
        return Snapshot.model_validate_json((folder / NAME).read_bytes())
    return None


class Telemetry:
    """A listener that keeps the figures of a run, and within its context writes them, from a thread of its own."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        clock: Clock = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """
        Args:
            folder: of the run; what is there of earlier starts is counted on.
            steps: diffusion steps of a layer.
        """
        self._path, self._steps, self._clock, self._wall = folder / NAME, steps, clock, wall
        self._started_at = wall()
        before = read_snapshot(folder)
        known = before.figures if before else {}
        self._totals: dict[str, Number] = {
            figure.name: known.get(figure.name, 0) for figure in FIGURES if figure.kind == "counter"
        }
        self._totals["starts_total"] += 1
        self._warnings = deque(before.warnings if before else (), KEPT_WARNINGS)
        self._progress = Progress()
        self._stage: str | None = None
        self._of_sampling: dict[str, Number] = {"diffusion_steps": steps}
        self._workers: dict[int, LivingWorker] = {}
        self._state: State = "running"
        self._why: str | None = None
        self._publish: Callable[[Snapshot], None] | None = None
        self._lock = threading.Lock()
        self._due, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._write_again_and_again, name="telemetry", daemon=True)

    def before(self, listener: Listener) -> Listener:
        """Listens, and passes on."""

        def listen(event: Event) -> None:
            self(event)
            listener(event)

        return listen

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._progress.take(event, self._clock())
            match event:
                case StageStarted():
                    self._stage = event.stage
                case UnitsDone() if event.n < 0:
                    self._of_sampling.pop("diffusion_step", None)  # the next that is taken will tell
                case StepTaken():
                    self._of_sampling |= {"diffusion_step": event.step, "step_seconds": event.seconds}
                    self._add("steps_taken_total", 1)
                    self._add("predicted_tiles_total", event.tiles)
                    self._add("predicting_seconds_total", event.predicting_s)
                    self._add("exchanged_bytes_total", event.sent_bytes)
                case Committed():
                    self._of_sampling["diffusion_step"] = event.step
                    self._add("commits_total", 1)
                    self._add("commit_seconds_total", event.seconds)
                case WorkerJoined():
                    self._workers[event.worker] = LivingWorker(
                        worker=event.worker, device=event.device, node=event.node, since=self._wall()
                    )
                case WorkerLeft():
                    self._workers.pop(event.worker, None)
                    self._add("workers_lost_total", 1)
                case Notice() if event.warning:
                    self._warnings.append(Warned(at=self._wall(), message=event.message))
        if isinstance(event, StageStarted | StageFinished | WorkerJoined | WorkerLeft):
            self._due.set()

    def _add(self, name: str, n: Number) -> None:
        self._totals[name] += n

    def snapshot(self) -> Snapshot:
        with self._lock:
            now, running = self._clock(), self._state == "running"
            workers = (*self._workers.values(),) if running else ()
            return Snapshot(
                state=self._state,
                why=self._why,
                written_at=self._wall(),
                started_at=self._started_at,
                host=platform.node(),
                pid=os.getpid(),
                stage=self._stage,
                stages={name: _figures_of(stage, now, running) for name, stage in self._progress.stages.items()},
                figures={**self._of_sampling, "workers": len(workers), **self._totals},
                workers=workers,
                warnings=(*self._warnings,),
            )

    # Writing

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._due.set()
        self._thread.join(PATIENCE_S)
        with self._lock:
            if error is None:
                self._state = "finished"
            elif isinstance(error, Stopped):
                self._state = "stopped"
            else:
                self._state, self._why = "failed", next(iter(str(error).splitlines()), "") or type(error).__name__
        if not self._thread.is_alive():
            self.write()

    @contextmanager
    def published_by(self, publish: Callable[[Snapshot], None]) -> Iterator[None]:
        """Within, the figures are not only written."""
        self._publish = publish
        try:
            yield
        finally:
            self._show(self.snapshot())
            with self._lock:
                self._publish = None

    def write(self) -> None:
        """Write and publish the figures, if that is possible."""
        snapshot = self.snapshot()
        self._show(snapshot)
        temporary = self._path.with_name(f"{NAME}.{os.getpid()}.tmp")
        try:
            temporary.write_text(snapshot.model_dump_json(indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _show(self, snapshot: Snapshot) -> None:
        with self._lock, suppress(Exception):  # of a cluster that is gone
            if self._publish is not None:
                self._publish(snapshot)

    def _write_again_and_again(self) -> None:
        while True:
            self._due.clear()
            if self._over.is_set():
                return
            self.write()
            self._due.wait(WRITE_EVERY_S)


def _figures_of(stage: StageProgress, now: float, running: bool) -> dict[str, Number]:
    found: dict[str, Number] = {"stage_done_units": stage.shown, "stage_total_units": stage.total}
    rate, left = stage.rate(now), stage.seconds_left(now)
    if stage.finished is not None or not running:
        found["stage_units_per_second"] = 0.0
    elif rate is not None:
        found["stage_units_per_second"] = rate
    if stage.finished is not None:
        found["stage_left_seconds"] = 0.0
    elif left is not None and running:
        found["stage_left_seconds"] = left
    return found
