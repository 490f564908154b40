"""Workers: who does the work of the stages. One protocol, with the one-process reference; `ray_workers` has the other.

A driver asks a worker to do something and gets a handle at once; a handle may be an argument of the next question, so
that what is large goes from worker to worker and the driver holds no pixels.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from pipeline.grid import Index, Share
from pipeline.plan import Plan
from pipeline.raster.source import Source, open_source
from pipeline.stages import decode, encode, ingest, overviews
from pipeline.stages.context import Context
from pipeline.stages.sample import Sampler, Travelling
from pipeline.store import RunStore, unit_name
from stablesr.box import Box


class Worker:
    """One process with one device and one copy of the network."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.context = Context(plan, RunStore(folder))
        self._source: Source | None = None
        self._sampler: Sampler | None = None
        self._halted = False
        self.stopping: Callable[[], bool] = lambda: self._halted
        """Asked between tiles: whether to give up the step."""

    def ready(self) -> str:
        """Load the network; its device."""
        return str(self.context.network.device)

    def halt(self) -> None:
        """Give up the step that is being taken; comes in from another thread."""
        self._halted = True

    def written(self) -> int:
        """Bytes written to the store."""
        return self.context.store.written

    # Blocks and patches. What makes a block marks it as done, after its data.

    def ingest_block(self, index: Index) -> None:
        plan, store = self.context.plan, self.context.store
        if self._source is None:
            self._source = open_source(plan.config.source, plan.config.bands)
        self._mark(unit_name("ingest", index), ingest.ingest_block(plan, store, self._source, index))

    def rest(self) -> None:
        """A stage is over: give back what the next does not need."""
        if self._source is not None:
            self._source.close()
        self._source = None
        with suppress(OSError, AttributeError):  # glibc's; freed memory is the system's only when the top of it is free
            ctypes.CDLL(None).malloc_trim(0)

    def encode_patch(self, layer: int, patch: Box) -> Any:
        return encode.encode_patch(self.context, layer, patch)

    def encode_block(self, layer: int, index: Index, *encoded: Any) -> None:
        self._mark(unit_name(f"encode/{layer}", index), encode.encode_block(self.context, layer, index, *encoded))

    def decode_patch(self, layer: int, slot: str, patch: Box) -> Any:
        return decode.decode_patch(self.context, layer, slot, patch)

    def gather_statistics(self, layer: int, index: Index, *decoded: Any) -> None:
        gathered = decode.gather_statistics(self.context, layer, index, *decoded)
        self._mark(unit_name(f"{decode.STATISTICS}/{layer}", index), gathered)

    def decode_block(self, layer: int, index: Index, *decoded: Any) -> None:
        self._mark(unit_name(f"decode/{layer}", index), decode.decode_block(self.context, layer, index, *decoded))

    def overview_block(self, level: int, index: Index) -> None:
        plan, store = self.context.plan, self.context.store
        self._mark(unit_name(f"overviews/{level}", index), overviews.overview_block(plan, store, level, index))

    def _mark(self, unit: str, payload: dict[str, Any]) -> None:
        self.context.store.mark(unit, payload)

    # Sampling: a share that stays, and shares that are streamed

    def load(self, layer: int, share: Share, step: int, slot: str | None) -> None:
        self._halted = False
        self._sampler = Sampler(self.context, layer, share, step, slot)

    def border(self, reaches: Sequence[Box | None]) -> list[list[Travelling]]:
        assert self._sampler is not None
        return self._sampler.border(reaches)

    def advance(self, me: int, *borders: list[list[Travelling]]) -> int:
        """Take one step.

        Args:
            me: which of the reaches that the others were given is ours.
            borders: what the other workers' `border` gave.

        Returns:
            Diffusion steps done: no more than before if the step was given up.
        """
        assert self._sampler is not None
        self._sampler.advance([travelling for border in borders for travelling in border[me]], self.stopping)
        return self._sampler.step

    def commit(self, slot: str, step: int) -> dict[str, int]:
        assert self._sampler is not None
        return self._sampler.commit(slot, step)

    def unload(self) -> None:
        """Free the share's memory."""
        self._sampler = None

    def stream(self, unit: str, layer: int, share: Share, step: int, slot: str | None, next_slot: str) -> None:
        """Load a share, take one step, write it back and mark that; no mark if the step was given up."""
        self.load(layer, share, step, slot)
        assert self._sampler is not None
        if self._sampler.advance((), self.stopping):
            self._mark(unit, self._sampler.commit(next_slot, step + 1))
        self.unload()


class Workers(Protocol):
    """Workers that answer with handles."""

    def __len__(self) -> int: ...

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        """Have a worker do something after what it was asked before; a handle of what comes of it."""

    def wait(self, handles: Sequence[Any], timeout_s: float) -> list[int]:
        """Which of some handles are done, as soon as one is, or none after a while."""

    def get(self, handle: Any) -> Any:
        """What became of a question.

        Raises:
            Exception: what the worker raised.
        """

    def halt(self) -> None:
        """Have all workers give up the steps that they are taking."""

    def close(self) -> None:
        """End the workers."""


class LocalWorkers:
    """The reference: every worker in this process; a handle is the value itself."""

    def __init__(self, plan: Plan, folder: Path, n: int = 1, stopping: Callable[[], bool] = lambda: False) -> None:
        self._workers = [Worker(plan, folder) for _ in range(n)]
        for worker in self._workers:
            worker.stopping = stopping

    def __len__(self) -> int:
        return len(self._workers)

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        return getattr(self._workers[worker], method)(*args)

    def wait(self, handles: Sequence[Any], timeout_s: float) -> list[int]:
        return [*range(len(handles))]

    def get(self, handle: Any) -> Any:
        return handle

    def halt(self) -> None:
        """Nothing runs while this process can call."""

    def close(self) -> None:
        self._workers = []
