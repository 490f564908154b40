"""How far a run is, read from its folder alone: from any machine, while it works or after."""

import time
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError
from pipeline.plan import Plan, read_plan
from pipeline.raster.header import Frozen
from pipeline.stages import decode, export
from pipeline.stages.sample import SLOTS
from pipeline.store import RunStore


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

    @property
    def stage(self) -> str:
        """The first that is not complete."""
        return next((stage.stage for stage in self.stages if stage.done < stage.total), "finished")

    def report(self) -> list[tuple[str, str]]:
        """In rows of a label and a text."""
        rows = [("run", self.folder), ("source", self.source), ("output", self.output), ("stage", self.stage)]
        rows += [(stage.stage, f"{stage.done:,} of {stage.total:,}") for stage in self.stages if stage.total]
        if self.seconds_since_progress is not None:
            rows.append(("last progress", f"{self.seconds_since_progress:,.0f} s ago"))
        return rows


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
    return Status(
        folder=str(folder),
        source=plan.config.source,
        output=plan.config.output,
        stages=stages,
        seconds_since_progress=max(time.time() - max(times), 0.0) if times else None,
    )


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
