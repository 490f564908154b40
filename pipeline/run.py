"""The stages in order: what is asked of the workers, and when it counts as done."""

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import Damaged, RunMismatch, StoreFailed, WorkerLost, WorkFailed
from pipeline.events import (
    Event,
    Listener,
    Notice,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    UnitsDone,
)
from pipeline.grid import Index
from pipeline.network import is_untrained
from pipeline.plan import Plan, make_plan, read_plan
from pipeline.raster.radiometry import fixed_stretch, percentile_stretch
from pipeline.raster.validate import validate
from pipeline.rounds import Rounds
from pipeline.signals import NEVER, Stopping
from pipeline.stages import decode, encode, export, ingest, overviews, sample
from pipeline.status import newest_slot, stage_counts
from pipeline.store import RunStore, unit_name
from pipeline.supervisor import Supervisor, Task
from pipeline.telemetry import Telemetry
from pipeline.workers import LocalWorkers, Workers
from stablesr.box import Box

UNTRAINED = (
    "the weights {!r} are untrained, random numbers: the output has the right size and colours, but its detail is noise"
)

REPAIRS = 3
"""How often one block is computed again because what was stored of it is damaged; then the disk is to blame."""


def run(config: Config, listener: Listener = lambda event: None, stopping: Stopping = NEVER) -> Path:
    """Upscale a raster, or go on with it: a run that was interrupted continues where it was, with the same call.

    Args:
        listener: is told what happens.
        stopping: asked often; once true, everything finished is committed and `Stopped` is raised.

    Returns:
        The output.

    Raises:
        UserError: if the request cannot be met; then nothing is left behind.
        WorkFailed: if something breaks in the middle; the run can go on later.
        Stopped: if it was asked to.
    """
    started = time.monotonic()
    plan = make_plan(config)
    store = RunStore(config.folder)
    fresh = not config.folder.exists()
    try:
        with store.locked():
            resumed = _open(plan, store)
            with Telemetry(config.folder, plan.steps) as telemetry:
                listener = telemetry.before(listener)
                listener(RunStarted(str(config.folder), config.source, config.output, resumed))
                if is_untrained(config.model.weights):
                    listener(Notice(UNTRAINED.format(config.model.weights), warning=True))
                workers = _make_workers(plan, config.folder, stopping)
                try:
                    stopping.install()  # Ray has put its own handlers in their place
                    with telemetry.published_by(workers.publish):
                        _Driver(plan, store, Supervisor(plan, store, workers, listener, stopping)).run()
                finally:
                    workers.close()
                output = _finish(plan, store)
            if not config.run.keep:
                shutil.rmtree(config.folder, ignore_errors=True)
    except BaseException:
        if fresh and not (config.folder / "done").exists():
            shutil.rmtree(config.folder, ignore_errors=True)
        raise
    listener(RunFinished(str(output), time.monotonic() - started))
    return output


def _open(plan: Plan, store: RunStore) -> bool:
    """Make the run's folder, or recognise it; whether there is something to go on with."""
    known = read_plan(store.folder)
    if known is None:
        if any(path.name != "lock" and path.suffix != ".tmp" for path in store.folder.iterdir()):
            raise RunMismatch(
                f"{store.folder} is not the folder of a run, and not empty\nhint: --run names another folder"
            )
        store.keep_plan(plan.model_dump_json(indent=1))
    elif differences := plan.differences(known):
        raise RunMismatch(
            f"{store.folder} belongs to another run, which differs in\n"
            + "\n".join(f"  {line}" for line in differences)
            + f"\nhint: go on with the options it was started with, remove {store.folder} to start over, or name "
            "another folder with --run"
        )
    store.sweep()
    for stage in (ingest, encode, sample, decode, overviews):
        stage.create_arrays(plan, store)
    return known is not None


def _make_workers(plan: Plan, folder: Path, stopping: Callable[[], bool]) -> Workers:
    if plan.config.run.workers == "local":
        return LocalWorkers(plan, folder, stopping=stopping)
    from pipeline.ray_workers import RayWorkers  # it takes its time

    return RayWorkers(plan, folder)


def _finish(plan: Plan, store: RunStore) -> Path:
    """Give the output its name, if it is what it should be; else it is written again the next time."""
    part, output = export.part_of(plan), Path(plan.config.output)
    try:
        validate(part, plan.target, plan.format)
    except WorkFailed:
        store.unmark(export.COMPLETE)
        raise
    if output.exists() and not plan.config.file.overwrite:
        raise WorkFailed(
            f"{output} came into being while the run was under way; the result is in {part}\n"
            "hint: move the other file away and run the same command again, or add --overwrite"
        )
    old = part.with_name(part.name + ".old")
    try:
        if output.is_dir():  # which cannot be replaced in one go
            shutil.rmtree(old, ignore_errors=True)
            os.replace(output, old)
        os.replace(part, output)
    except OSError as error:
        raise WorkFailed(
            f"{part} is complete, but cannot be renamed to {output.name}: {error.strerror or error}\n"
            "hint: take away what stands in the way, and run the same command again"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    return output


@dataclass
class _Driver:
    """Holds handles and markers, no pixels."""

    plan: Plan
    store: RunStore
    supervisor: Supervisor

    def run(self) -> None:
        """All stages; from the first one again where stored data turn out damaged, or when a disk has been refusing:
        what is sound is not repeated."""
        repairs: Counter[tuple[str, Index]] = Counter()
        while True:
            try:
                self._stages()
                return
            except Damaged as damage:
                repairs[damage.array, damage.index] += 1
                if repairs[damage.array, damage.index] > REPAIRS:
                    raise
                self._tell(Notice(f"{damage}: it is computed again", warning=True))
                forget(self.store, damage.array, damage.index)
            except StoreFailed as refusal:
                self.supervisor.be_patient(refusal)

    def _tell(self, event: Event) -> None:
        self.supervisor.tell(event)

    def _stages(self) -> None:
        self._stage("ingest", self._ingest)
        self._fix_stretch()
        self._stage("encode", self._of_each_layer(self._encode))
        self._stage("sample", self._of_each_layer(self._sample))
        self._stage(decode.STATISTICS, self._of_each_layer(self._gather_statistics))
        self._stage("decode", self._of_each_layer(self._decode))
        self._stage("overviews", self._overviews)
        self._stage("export", self._export)

    def _of_each_layer(self, work: Callable[[int], None]) -> Callable[[], None]:
        def all_layers() -> None:
            for layer in range(len(self.plan.layers)):
                work(layer)

        return all_layers

    def _stage(self, stage: str, work: Callable[[], None]) -> None:
        """Do a stage, unless the run has no such."""
        done, total = stage_counts(self.plan, self.store)[stage]
        if stage == "sample":
            done, total = (n * len(self.plan.canvas.blocks) for n in (done, total))
        if not total:
            return
        started = time.monotonic()
        self._tell(StageStarted(stage, total, done))
        self.supervisor.stop_if_asked()
        work()
        workers = self.supervisor.workers
        for handle in [workers.ask(worker, "rest") for worker in workers.live()]:
            with suppress(WorkerLost):  # it has nothing to give back, then
                self.supervisor.gather([handle])
        self._tell(StageFinished(stage, time.monotonic() - started))

    # Ingest

    def _ingest(self) -> None:
        done = self.store.finished("ingest")
        todo = (index for index in self.plan.canvas.source_blocks if index not in done)
        self.supervisor.fan_out("ingest", (self._task("ingest", index, "ingest_block", index) for index in todo))

    def _task(self, stage: str, index: Index, method: str, *args: Any) -> Task:
        return Task(unit_name(stage, index), stage, index, lambda w: self.supervisor.workers.ask(w, method, *args))

    def _fix_stretch(self) -> None:
        """Once for the run; a block that is ingested again must not move it."""
        if self.store.marker("stretch") is not None:
            return
        radiometry = self.plan.config.radiometry
        stretch = fixed_stretch(self.plan.header, radiometry.stretch)
        if stretch is None:
            histograms = (marker["histograms"] for _, marker in self.store.markers("ingest"))
            stretch = percentile_stretch(histograms, radiometry.percentiles)
        self.store.mark("stretch", stretch.model_dump())

    # Encode and decode: patches in, blocks out

    def _encode(self, layer: int) -> None:
        each = encode.patch_bytes(self.plan)
        todo = self._in_bands(self.plan.canvas.blocks, f"encode/{layer}", each)
        self._patch_map(
            f"encode/{layer}",
            todo,
            encode.patches_of,
            encode.blocks_of,
            each,
            ("encode_patch", layer),
            ("encode_block", layer),
        )

    def _decode(self, layer: int) -> None:
        self._from_latents("decode", layer, "decode_block")

    def _gather_statistics(self, layer: int) -> None:
        self._from_latents(decode.STATISTICS, layer, "gather_statistics")

    def _from_latents(self, stage: str, layer: int, method: str) -> None:
        slot, _ = newest_slot(self.store, layer)
        each = decode.patch_bytes(self.plan)
        todo = self._in_bands(self.plan.canvas.output_blocks, f"{stage}/{layer}", each)
        self._patch_map(
            f"{stage}/{layer}",
            todo,
            decode.patches_of,
            decode.blocks_of,
            each,
            ("decode_patch", layer, slot),
            (method, layer),
        )

    def _in_bands(self, blocks: Any, stage: str, patch_bytes: int) -> list[Index]:
        """The blocks that are not finished, in an order in which few patches wait for their last block.

        Row by row, in bands of columns that are so narrow that the patches between two rows fit into memory.
        """
        patches = self.plan.canvas.patches
        across = math.ceil(self.plan.canvas.block / max(patches.tile_width - patches.overlap, 1)) + 1  # of a block
        most = self.plan.patch_bytes // patch_bytes
        width = max((most - across**2) // (2 * across), 1)
        done = self.store.finished(stage)
        order = sorted(blocks, key=lambda index: (index[1] // width, index))
        return [index for index in order if index not in done]

    def _patch_map(
        self,
        stage: str,
        todo: Sequence[Index],
        patches_of: Callable[[Plan, Index], list[Box]],
        blocks_of: Callable[[Plan, Box], Iterator[Index]],
        patch_bytes: int,
        patch_question: tuple[Any, ...],
        block_question: tuple[Any, ...],
    ) -> None:
        """Compute blocks from overlapping patches. A patch is computed once and kept until its last block has it.

        Where workers cannot spill what does not fit into memory, the oldest patch is dropped then, and computed again
        when it is needed.
        """
        workers = self.supervisor.workers
        waiting = set(todo)
        kept: dict[Box, Any] = {}
        most = max(self.plan.patch_bytes // patch_bytes, 1)

        def ask(worker: int, index: Index) -> Any:
            patches = patches_of(self.plan, index)
            if not workers.spills:
                others = [patch for patch in kept if patch not in patches]
                for patch in others[: max(len(others) + len(patches) - most, 0)]:
                    del kept[patch]
            for patch in patches:
                if patch not in kept:
                    kept[patch] = workers.ask(worker, *patch_question, patch)
            handle = workers.ask(worker, *block_question, index, *(kept[patch] for patch in patches))
            waiting.discard(index)
            for patch in patches:
                if not any(other in waiting for other in blocks_of(self.plan, patch)):
                    del kept[patch]
            return handle

        def forget(task: Task) -> None:
            """Any of the patches may be what is lost, or never will be."""
            waiting.add(task.index)
            for patch in patches_of(self.plan, task.index):
                kept.pop(patch, None)

        def task(index: Index) -> Task:
            return Task(unit_name(stage, index), stage, index, lambda worker: ask(worker, index))

        self.supervisor.fan_out(stage.partition("/")[0], (task(index) for index in todo), forget)

    def _sample(self, layer: int) -> None:
        Rounds(self.plan, self.store, self.supervisor, layer).run()

    # Overviews and export

    def _overviews(self) -> None:
        for level in range(1, self.plan.n_levels):
            done = self.store.finished(f"overviews/{level}")
            todo = [index for index in self.plan.level_blocks(level) if index not in done]
            stage = f"overviews/{level}"
            tasks = (self._task(stage, index, "overview_block", level, index) for index in todo)
            self.supervisor.fan_out("overviews", tasks)

    def _export(self) -> None:
        supervisor = self.supervisor
        export.export(self.plan, self.store, lambda n: self._tell(UnitsDone("export", n)), supervisor.stopping)


def forget(store: RunStore, array: str, index: Index) -> None:
    """Take back that a block of an array is done, so that it is computed again; of latents, a whole commit."""
    kind, _, rest = array.partition("/")
    if kind in ("source", "mask"):
        store.unmark(unit_name("ingest", index))
    elif kind == "lr_latents":
        store.unmark(unit_name(f"encode/{rest}", index))
    elif kind == "latents":
        layer, _, _ = rest.partition("/")
        store.unmark(f"sample/{rest}")
        store.unmark(f"stream/{layer}")  # a step that was under way is taken again, from another start
    elif kind == "output":
        store.unmark(unit_name(f"decode/{rest}", index))
    else:
        store.unmark(unit_name(f"overviews/{rest}", index))
