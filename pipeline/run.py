"""The stages in order: what is asked of the workers, and when it counts as done."""

import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import Damaged, GigasrError, RunMismatch, Stopped, WorkFailed
from pipeline.events import (
    Committed,
    Listener,
    Notice,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    UnitsDone,
)
from pipeline.grid import Index, Share, resident_shares, streamed_shares
from pipeline.network import is_untrained
from pipeline.plan import Plan, make_plan, read_plan
from pipeline.raster.radiometry import fixed_stretch, percentile_stretch
from pipeline.raster.validate import validate
from pipeline.signals import NEVER, Stopping
from pipeline.stages import decode, encode, export, ingest, overviews, sample
from pipeline.status import newest_slot, stage_counts
from pipeline.store import RunStore, unit_name
from pipeline.workers import LocalWorkers, Workers
from stablesr.box import Box

QUESTIONS_AHEAD = 2
"""Of independent work, what a worker is asked at a time, so that it never waits for the driver."""

POLL_S = 0.5
"""How often a waiting driver looks whether it should stop."""

LONGEST_COMMIT_INTERVAL_S = 600.0
"""However much a commit writes, no more work than this is lost with a machine."""

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
            listener(RunStarted(str(config.folder), config.source, config.output, resumed))
            if is_untrained(config.model.weights):
                listener(Notice(UNTRAINED.format(config.model.weights), warning=True))
            workers = _make_workers(plan, config.folder, stopping)
            try:
                stopping.install()  # Ray has put its own handlers in their place
                _Driver(plan, store, workers, listener, stopping).run()
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
    workers: Workers
    listener: Listener
    stopping: Stopping

    def run(self) -> None:
        """All stages; from the first one again where stored data turn out damaged: what is sound is not repeated."""
        repairs: Counter[tuple[str, Index]] = Counter()
        while True:
            try:
                self._stages()
                return
            except Damaged as damage:
                repairs[damage.array, damage.index] += 1
                if repairs[damage.array, damage.index] > REPAIRS:
                    raise
                self.listener(Notice(f"{damage}: it is computed again", warning=True))
                forget(self.store, damage.array, damage.index)

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
        self.listener(StageStarted(stage, total, done))
        self._stop_if_asked()
        work()
        self._gather([self.workers.ask(worker, "rest") for worker in range(len(self.workers))])
        self.listener(StageFinished(stage, time.monotonic() - started))

    def _stop_if_asked(self) -> None:
        if self.stopping():
            raise Stopped("stopped; what is finished is kept\nhint: run the same command again to go on")

    # Waiting

    def _gather(self, handles: Sequence[Any], halting: bool = False) -> list[Any]:
        """What became of some questions, in their order.

        Args:
            halting: whether to give up on diffusion steps when asked to stop; the answers come either way.
        """
        pending = dict(enumerate(handles))
        answers: dict[int, Any] = {}
        halted = False
        while pending:
            if halting and not halted and self.stopping():
                self.workers.halt()
                halted = True
            keys = [*pending]
            for i in self.workers.wait([*pending.values()], POLL_S):
                answers[keys[i]] = self.workers.get(pending.pop(keys[i]))
        return [answers[i] for i in range(len(handles))]

    def _fan_out(self, stage: str, questions: Iterable[tuple[Callable[[int], Any], int]]) -> None:
        """Ask questions in order, of whichever worker has the least to do, a few at a time.

        Args:
            questions: what asks a worker, given its number, and the units of the stage that this finishes.
        """
        pending: list[tuple[Any, int, int]] = []  # handle, worker, units
        questions = iter(questions)
        exhausted = False
        try:
            while True:
                self._stop_if_asked()
                while not exhausted and len(pending) < QUESTIONS_AHEAD * len(self.workers):
                    load = Counter(worker for _, worker, _ in pending)
                    worker = min(range(len(self.workers)), key=lambda w: load[w])
                    question = next(questions, None)
                    if question is None:
                        exhausted = True
                    else:
                        ask, units = question
                        pending.append((ask(worker), worker, units))
                if not pending:
                    return
                for i in reversed(self.workers.wait([handle for handle, _, _ in pending], POLL_S)):
                    handle, _, units = pending.pop(i)
                    self.workers.get(handle)
                    self.listener(UnitsDone(stage, units))
        except Damaged:
            for handle, _, _ in pending:  # what is under way must be over before anything is computed again
                with suppress(GigasrError):
                    self._gather([handle])
            raise

    # Ingest

    def _ingest(self) -> None:
        done = self.store.finished("ingest")
        todo = [index for index in self.plan.canvas.source_blocks if index not in done]
        self._fan_out("ingest", ((self._question("ingest_block", index), 1) for index in todo))

    def _question(self, method: str, *args: Any) -> Callable[[int], Any]:
        return lambda worker: self.workers.ask(worker, method, *args)

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
            "encode", todo, encode.patches_of, encode.blocks_of, each, ("encode_patch", layer), ("encode_block", layer)
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
            stage, todo, decode.patches_of, decode.blocks_of, each, ("decode_patch", layer, slot), (method, layer)
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
        """Compute blocks from overlapping patches. A patch is computed once and kept until its last block has it,
        unless memory runs out: then the oldest is dropped, and computed again when it is needed."""
        waiting = set(todo)
        kept: dict[Box, Any] = {}
        most = max(self.plan.patch_bytes // patch_bytes, 1)

        def ask(worker: int, index: Index) -> Any:
            patches = patches_of(self.plan, index)
            others = [patch for patch in kept if patch not in patches]
            for patch in others[: max(len(others) + len(patches) - most, 0)]:
                del kept[patch]
            for patch in patches:
                if patch not in kept:
                    kept[patch] = self.workers.ask(worker, *patch_question, patch)
            handle = self.workers.ask(worker, *block_question, index, *(kept[patch] for patch in patches))
            waiting.discard(index)
            for patch in patches:
                if not any(other in waiting for other in blocks_of(self.plan, patch)):
                    del kept[patch]
            return handle

        def question(index: Index) -> Callable[[int], Any]:
            return lambda worker: ask(worker, index)

        self._fan_out(stage, ((question(index), 1) for index in todo))

    # Sampling

    def _sample(self, layer: int) -> None:
        rectangles, resident = self.plan.rectangles(len(self.workers))
        slot, step = newest_slot(self.store, layer)
        if step == self.plan.steps:
            return
        if resident:
            self._sample_resident(layer, rectangles, step, slot)
        else:
            while step < self.plan.steps:
                slot = self._stream_step(layer, rectangles, step, slot)
                step += 1

    def _sample_resident(self, layer: int, rectangles: Sequence[Box], step: int, slot: str | None) -> None:
        """Steps in the workers' memory, committed now and then."""
        self.store.unmark(f"stream/{layer}")  # where a step was half streamed, commits are written now
        shares = resident_shares(self.plan.canvas, rectangles)
        workers = range(len(shares))
        self._gather([self.workers.ask(w, "load", layer, shares[w], step, slot) for w in workers])
        committed, committed_at, started_at, first = step, time.monotonic(), time.monotonic(), step
        while step < self.plan.steps:
            borders = []
            if len(shares) > 1:
                reaches = [[None if v == w else shares[v].region for v in workers] for w in workers]
                borders = [self.workers.ask(w, "border", reaches[w]) for w in workers]
            reached = self._gather([self.workers.ask(w, "advance", w, *borders) for w in workers], halting=True)
            advanced, step = min(reached) > step, min(reached)
            per_step = (time.monotonic() - started_at) / max(step - first, 1)
            due = time.monotonic() - committed_at >= self._commit_interval_s(per_step)
            stopping = self.stopping()
            if step > committed and (due or stopping or step == self.plan.steps):
                slot = self._commit(layer, shares, slot, step)
                committed, committed_at = step, time.monotonic()
            if advanced:
                self.listener(UnitsDone("sample", len(self.plan.canvas.blocks)))
            if stopping and step < self.plan.steps:
                self._stop_if_asked()
        self._gather([self.workers.ask(w, "unload") for w in workers])

    def _commit_interval_s(self, step_s: float) -> float:
        """As often as asked for, but if what the commits write would take the run beyond twice the size of its output,
        less often; yet never more than ten minutes apart."""
        wanted = self.plan.config.run.commit_seconds
        if wanted == 0:
            return 0.0
        spread = step_s * self.plan.steps / self.plan.n_affordable_commits
        return max(wanted, min(spread, LONGEST_COMMIT_INTERVAL_S))

    def _commit(self, layer: int, shares: Sequence[Share], slot: str | None, step: int) -> str:
        started = time.monotonic()
        slot = sample.other_slot(slot)
        self.store.unmark(f"sample/{layer}/{slot}")
        written = self._gather([self.workers.ask(w, "commit", slot, step) for w in range(len(shares))])
        self._seal(layer, slot, step, written, started)
        return slot

    def _stream_step(self, layer: int, rectangles: Sequence[Box], step: int, slot: str | None) -> str:
        """One step of all shares, one after another, from one slot to the other."""
        started, next_slot = time.monotonic(), sample.other_slot(slot)
        self.store.unmark(f"sample/{layer}/{next_slot}")
        folder = f"stream/{layer}/{step + 1}"
        shares = {f"{folder}/{r.top}-{r.left}-{r.bottom}-{r.right}": share for r, share in
                  zip(rectangles, streamed_shares(self.plan.canvas, rectangles), strict=True)}  # fmt: skip

        def questions() -> Iterator[tuple[Callable[[int], Any], int]]:
            for unit, share in shares.items():
                if self.store.marker(unit) is None:
                    question = self._question("stream", unit, layer, share, step, slot, next_slot)
                    yield question, len(share.own)

        self._fan_out("sample", questions())
        self._stop_if_asked()  # a share may have been given up
        self._seal(layer, next_slot, step + 1, [self.store.marker(unit) or {} for unit in shares], started)
        self.store.unmark(folder)
        return next_slot

    def _seal(self, layer: int, slot: str, step: int, written: Sequence[dict[str, int]], started: float) -> None:
        checksums = {block: value for share in written for block, value in share.items()}
        self.store.mark(f"sample/{layer}/{slot}", {"step": step, "checksums": checksums})
        self.listener(Committed(step, self.plan.steps, time.monotonic() - started))

    # Overviews and export

    def _overviews(self) -> None:
        for level in range(1, self.plan.n_levels):
            done = self.store.finished(f"overviews/{level}")
            todo = [index for index in overviews.level_blocks(self.plan, level) if index not in done]
            self._fan_out("overviews", ((self._question("overview_block", level, index), 1) for index in todo))

    def _export(self) -> None:
        export.export(self.plan, self.store, lambda n: self.listener(UnitsDone("export", n)), self.stopping)


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
