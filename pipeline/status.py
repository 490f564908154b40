"""How far a run is, read from its folder alone: from any machine, while it works or after.

What is done, the markers say; how fast, by whom and until when, the driver's progress.json.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pipeline.errors import UserError
from pipeline.plan import Plan, read_plan
from pipeline.raster.header import Frozen
from pipeline.rates import duration, progress_line
from pipeline.stages import decode, export
from pipeline.stages.sample import SLOTS
from pipeline.store import RunStore
from pipeline.telemetry import NAME, Snapshot, read_snapshot

SILENT_S = 30.0
"""A driver writes every two seconds; one that has not for so long is dead, cut off, or hangs."""

LOOK_EVERY_S = 2.0

State = Literal["running", "silent", "stopped", "failed", "finished"]


class StageStatus(Frozen):
    """How far a stage is."""

    stage: str
    done: int
    total: int
    """Units: blocks; of sampling diffusion steps of a layer; of export tiles of the file."""


class Status(Frozen):
    """How far a run is."""

    folder: str
    source: str
    output: str
    stages: tuple[StageStatus, ...]
    seconds_since_progress: float | None
    """Since the last unit was finished; None if none was."""
    state: State | None = None
    """Of the driver; "silent" if it should be running but gives no sign of life. None if none has written anything."""
    silent_seconds: float | None = None
    """Since the driver wrote."""
    driver: Snapshot | None = None
    """What it wrote: rates, workers, losses, starts, warnings."""

    @property
    def stage(self) -> str:
        """The first that is not complete."""
        return next((stage.stage for stage in self.stages if stage.done < stage.total), "finished")

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen any more unless somebody starts the run again."""
        return self.state in ("stopped", "failed", "finished") or (self.stage == "finished" and self.state != "running")

    def as_finished(self) -> "Status":
        """With nothing left to do."""
        stages = tuple(stage.model_copy(update={"done": stage.total}) for stage in self.stages)
        return self.model_copy(update={"stages": stages, "state": "finished"})

    def report(self) -> list[tuple[str, str]]:
        """In rows of a label and a text."""
        rows = [("run", self.folder), ("source", self.source), ("output", self.output), ("stage", self.stage)]
        rows += [(stage.stage, f"{stage.done:,} of {stage.total:,}") for stage in self.stages if stage.total]
        if self.seconds_since_progress is not None:
            rows.append(("last progress", f"{self.seconds_since_progress:,.0f} s ago"))
        if self.driver is not None:
            rows += self._of_driver(self.driver)
        return rows

    def _of_driver(self, driver: Snapshot) -> Iterator[tuple[str, str]]:
        figures, where = driver.figures, f"process {driver.pid} on {driver.host}"
        match self.state:
            case "running":
                yield "driver", f"running, {where}"
                yield from _pace(driver)
            case "silent":
                yield "driver", f"no sign of life for {duration(self.silent_seconds or 0.0)}; it was {where}"
            case "failed":
                yield "driver", f"failed: {driver.why}"
            case _:
                yield "driver", f"{self.state}"
        if lost := figures.get("workers_lost_total"):
            yield "workers lost", f"{lost}"
        if (starts := figures.get("starts_total", 1)) > 1:
            yield "restarts", f"{starts - 1}"
        for warning in driver.warnings:
            ago = duration(max((driver.written_at - warning.at).total_seconds() + (self.silent_seconds or 0.0), 0.0))
            yield "warning", f"{ago} ago: {next(iter(warning.message.splitlines()), '')}"


def _pace(driver: Snapshot) -> Iterator[tuple[str, str]]:
    """What is going on, how fast, and who does it."""
    now, figures = driver.stages.get(driver.stage or "", {}), driver.figures
    if driver.stage is not None and now:
        done, total = int(now.get("stage_done_units", 0)), int(now.get("stage_total_units", 0))
        rate, left = now.get("stage_units_per_second"), now.get("stage_left_seconds")
        yield "at work on", progress_line(driver.stage, done, total, rate or None, left)
    if driver.stage == "sample" and "diffusion_step" in figures:
        took = f", the last took {duration(figures['step_seconds'])}" if "step_seconds" in figures else ""
        yield "step", f"{figures['diffusion_step']} of {figures.get('diffusion_steps', '?')}{took}"
    crew = Counter((worker.device, worker.node) for worker in driver.workers)
    listed = (f"{n} with {device} on {node}" for (device, node), n in crew.items())
    yield "workers", ", ".join(listed) or "none yet"


def read_status(folder: Path) -> Status:
    """Look at a run's folder.

    Raises:
        UserError: if it is not one.
    """
    plan = read_plan(folder)
    if plan is None:
        raise UserError(f"{folder} is not the folder of a run: it has no plan.json")
    store = RunStore(folder)
    stages = tuple(StageStatus(stage=stage, done=done, total=total) for stage, (done, total) in
                   stage_counts(plan, store).items())  # fmt: skip
    times = []
    for path in (folder / "done").rglob("*.json"):
        with suppress(FileNotFoundError):  # the run has taken it back meanwhile
            times.append(path.stat().st_mtime)
    driver = read_snapshot(folder)
    silent_s = None if driver is None else _silent_s(folder, driver)
    state: State | None = None if driver is None else driver.state
    if state == "running" and silent_s is not None and silent_s > SILENT_S:
        state = "silent"
    return Status(
        folder=str(folder),
        source=plan.config.source,
        output=plan.config.output,
        stages=stages,
        seconds_since_progress=max(time.time() - max(times), 0.0) if times else None,
        state=state,
        silent_seconds=silent_s,
        driver=driver,
    )


def _silent_s(folder: Path, driver: Snapshot) -> float:
    """Since the driver wrote: by its clock or the file's, whichever is kinder, for no two clocks agree."""
    times = [driver.written_at.timestamp()]
    with suppress(OSError):
        times.append((folder / NAME).stat().st_mtime)
    return max(time.time() - max(times), 0.0)


def watch_status(folder: Path, sleep: Callable[[float], None] = time.sleep) -> Iterator[Status]:
    """Look at a run's folder again and again, until the run has ended.

    Raises:
        UserError: if it is not the folder of a run.
    """
    status = read_status(folder)
    yield status
    while not status.has_ended:
        sleep(LOOK_EVERY_S)
        try:
            seen = read_status(folder)
        except FileNotFoundError:
            continue  # something was removed just then
        except UserError:
            if (folder / "plan.json").exists() or not Path(status.output).exists():
                raise
            seen = status.as_finished()
        # A run that is finished may be removing its folder: markers that are gone by now did count.
        status = seen.as_finished() if seen.state == "finished" else seen
        yield status


def stage_counts(plan: Plan, store: RunStore) -> dict[str, tuple[int, int]]:
    """Units done, and in all, of every stage."""
    canvas, layers = plan.canvas, range(len(plan.layers))
    levels = range(1, plan.n_levels)
    return {
        "ingest": (store.n_marked("ingest"), len(canvas.source_blocks)),
        "encode": (sum(store.n_marked(f"encode/{layer}") for layer in layers), len(canvas.blocks) * len(layers)),
        "sample": (sum(newest_slot(store, layer)[1] for layer in layers), plan.steps * len(layers)),
        decode.STATISTICS: (
            sum(store.n_marked(f"{decode.STATISTICS}/{layer}") for layer in layers),
            len(canvas.output_blocks) * len(layers) * (plan.config.sampling.color == "adain"),
        ),
        "decode": (sum(store.n_marked(f"decode/{layer}") for layer in layers), len(canvas.output_blocks) * len(layers)),
        "overviews": (
            sum(store.n_marked(f"overviews/{level}") for level in levels),
            sum(len(plan.level_blocks(level)) for level in levels),
        ),
        "export": (export.done(plan, store), export.total(plan, store)),
    }


def newest_slot(store: RunStore, layer: int) -> tuple[str | None, int]:
    """Where the latest x_t of a layer is, and after how many steps."""
    steps = {slot: marker["step"] for slot in SLOTS if (marker := store.marker(f"sample/{layer}/{slot}")) is not None}
    if not steps:
        return None, 0
    slot = max(steps, key=lambda name: int(steps[name]))
    return slot, int(steps[slot])
