"""Read everything that a run has finished again, and compare it with its checksums."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import Damaged, RunMismatch, UserError
from pipeline.events import Listener, Notice, StageFinished, StageStarted, UnitsDone
from pipeline.grid import Blocks, Index
from pipeline.plan import Plan, read_plan
from pipeline.run import forget
from pipeline.stages.sample import SLOTS, other_slot
from pipeline.status import newest_slot
from pipeline.store import RunStore, unit_name

VERIFY = "verify"
"""The stage that listeners are told of."""


def verify_run(folder: Path, listener: Listener = lambda event: None) -> list[str]:
    """Check a run's store.

    What is damaged is taken back, so that the run computes it again; unless the run is at work at this moment: then
    nothing is touched.

    Returns:
        What is damaged, in words, one line for each block; empty if all is well.

    Raises:
        UserError: if it is not the folder of a run.
    """
    plan = read_plan(folder)
    if plan is None:
        raise UserError(f"{folder} is not the folder of a run: it has no plan.json")
    store = RunStore(folder)
    damaged: list[Damaged] = []
    listener(StageStarted(VERIFY, sum(1 for _ in _written(plan, store)), 0))
    for block in _written(plan, store):
        try:
            store.check(block.array, block.blocks, block.index, block.checksum)
        except Damaged as found:
            if store.marker(block.unit) == block.marker:  # else the run has taken it back meanwhile
                damaged.append(found)
                listener(Notice(str(found), warning=True))
        listener(UnitsDone(VERIFY, 1))
    listener(StageFinished(VERIFY, 0.0))
    with suppress(RunMismatch), store.locked():
        for damage in damaged:
            forget(store, damage.array, damage.index)
    return [str(damage) for damage in damaged]


@dataclass(frozen=True)
class _Written:
    """A block that a marker says is finished."""

    unit: str
    marker: dict[str, Any]
    array: str
    blocks: Blocks
    index: Index
    checksum: int


def _written(plan: Plan, store: RunStore) -> Iterator[_Written]:
    """Every array's finished blocks; in memory are those of one unit."""
    canvas, layers = plan.canvas, range(len(plan.layers))
    stages = [("ingest", canvas.source_blocks)]
    stages += [(f"encode/{layer}", canvas.blocks) for layer in layers]
    stages += [(f"decode/{layer}", canvas.output_blocks) for layer in layers]
    stages += [(f"overviews/{level}", plan.level_blocks(level)) for level in range(1, plan.n_levels)]
    for stage, blocks in stages:
        for index, marker in store.markers(stage):
            for array, checksum in marker["checksums"].items():
                yield _Written(unit_name(stage, index), marker, array, blocks, index, checksum)
    for layer in layers:
        for slot in SLOTS:
            unit = f"sample/{layer}/{slot}"
            committed = store.marker(unit) or {"checksums": {}}
            yield from _latents(unit, committed, f"latents/{layer}/{slot}", canvas.blocks, committed["checksums"])
        newest, step = newest_slot(store, layer)  # a step that is streamed is finished share by share
        folder = store.folder / "done" / "stream" / str(layer) / str(step + 1)
        for share in sorted(path.stem for path in folder.glob("*.json")):
            unit = f"stream/{layer}/{step + 1}/{share}"
            checksums = store.marker(unit) or {}
            yield from _latents(unit, checksums, f"latents/{layer}/{other_slot(newest)}", canvas.blocks, checksums)


def _latents(
    unit: str, marker: dict[str, Any], array: str, blocks: Blocks, checksums: dict[str, int]
) -> Iterator[_Written]:
    for block, checksum in sorted(checksums.items()):
        row, column = block.split("-")
        yield _Written(unit, marker, array, blocks, (int(row), int(column)), checksum)
