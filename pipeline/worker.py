"""One worker: what is asked of it, and what it tells of itself; a process with one device and one copy of the network.

All work comes in through `do`, one thing after another. From other threads, beside it, come `pulse`, `hold`, `release`.
"""

import ctypes
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.grid import Index, Share
from pipeline.plan import Plan
from pipeline.raster.source import Source, open_source
from pipeline.stages import decode, encode, ingest, overviews
from pipeline.stages.context import Context
from pipeline.stages.sample import Sampler, Travelling
from pipeline.store import RunStore, unit_name
from stablesr.box import Box

HOLD_TIMEOUT_S = 60.0
"""A driver that has asked for a halt and says no more is dead."""


TIMES_LONGER = 20.0
"""Than ever before, and a worker is taken to hang."""

TIMES_LONGER_AT_FIRST = 10.0
"""Than `run.hang_seconds`, where nothing is known: GPUs compile and tune what they do for the first time."""


def deadline_s(hang_seconds: float, longest_s: float | None) -> float:
    """How long a worker may get nowhere.

    Args:
        hang_seconds: what is always allowed.
        longest_s: the longest that it took so far to get on with what it is doing; None if it is the first time.
    """
    if longest_s is None:
        return TIMES_LONGER_AT_FIRST * hang_seconds
    return max(hang_seconds, TIMES_LONGER * longest_s)


@dataclass(frozen=True)
class Pulse:
    """What a worker is doing, told by another of its threads."""

    doing: str | None
    """The method; None if it has nothing to do."""
    still_s: float
    """Since it last got on: began, or finished a tile."""
    longest_s: float | None
    """Of such times with this method so far; None if there was none."""
    step: int
    """Diffusion steps done."""


class Advanced(NamedTuple):
    """What a worker tells of a diffusion step."""

    step: int
    """Diffusion steps done: no more than before if the step was given up."""
    tiles: int
    """That it predicted."""
    predicting_s: float
    """Spent on that, without waiting for others."""
    sent_bytes: int
    """Of predictions, to the neighbours."""


class Brake:
    """What another thread tells a worker that takes diffusion steps: wait, go on, go no further than to a step."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting = False
        self._goal: int | None = None

    def hold(self) -> None:
        with self._changed:
            self._waiting = True

    def release(self, goal: int | None = None) -> None:
        with self._changed:
            self._waiting, self._goal = False, goal
            self._changed.notify_all()

    def beyond(self, step: int) -> bool:
        """Whether another step, after so many, would go too far; waits while that is being found out."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, HOLD_TIMEOUT_S)
            return self._goal is not None and step >= self._goal


class Worker:
    """One process with one device and one copy of the network."""

    def __init__(self, plan: Plan, folder: Path, stopping: Callable[[], bool] = lambda: False) -> None:
        """
        Args:
            stopping: asked between tiles: whether to give up the diffusion step.
        """
        self.context = Context(plan, RunStore(folder))
        self._stopping = stopping
        self._source: Source | None = None
        self._sampler: Sampler | None = None
        self._failure: Exception | None = None
        """What was raised in the step that is being taken."""
        self._told = Advanced(-1, 0, 0.0, 0)
        """Of the step that is being taken, so far; `step` is the steps before it."""
        self._brake = Brake()
        self._doing: str | None = None
        self._since = time.monotonic()
        self._longest: dict[str, float] = {}

    def do(self, method: str, *args: Any) -> Any:
        """What all work comes in through."""
        self._doing, self._since = method, time.monotonic()
        try:
            return getattr(self, method)(*args)
        finally:
            self._got_on()
            self._doing = None

    def do_only(self, method: str, *args: Any) -> Any:
        """The one thing of which an answer consists."""
        (only,) = self.do(method, *args)
        return only

    def _got_on(self) -> None:
        now, doing = time.monotonic(), self._doing
        if doing is not None:
            self._longest[doing] = max(self._longest.get(doing, 0.0), now - self._since)
        self._since = now

    def ready(self) -> tuple[str, str]:
        """Load the network; its device, and the name of the machine."""
        return str(self.context.network.device), platform.node()

    def written(self) -> int:
        """Bytes written to the store."""
        return self.context.store.written

    # From other threads

    def pulse(self) -> Pulse:
        doing, sampler = self._doing, self._sampler
        still, longest = time.monotonic() - self._since, self._longest.get(doing or "")
        return Pulse(doing, still if doing else 0.0, longest, sampler.step if sampler else 0)

    def hold(self) -> int:
        """Finish the diffusion step that is being taken, begin no other, and wait for `release`; the steps done."""
        self._brake.hold()
        return self.pulse().step

    def release(self, goal: int) -> None:
        """Go on to a step, and no further; a step beyond it that is being taken is given up."""
        self._brake.release(goal)

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
        self._brake.release()
        self._sampler = self._failure = None  # the memory of the one before is needed
        self._told = Advanced(-1, 0, 0.0, 0)
        self._sampler = Sampler(self.context, layer, share, step, slot)

    def border(self, step: int, reaches: Sequence[Box]) -> Sequence[list[Travelling] | None]:
        """Predict the tiles that the neighbours need.

        Args:
            step: the steps done before this one.

        Returns:
            What goes to each neighbour; None if the step is not to be taken.
        """
        with self._taking(step) as sampler:
            if sampler is not None:
                bundles = sampler.border(reaches)
                n_bytes = sum(travelling.values.nbytes for bundle in bundles for travelling in bundle)
                self._told = self._told._replace(sent_bytes=n_bytes)
                return bundles
        return [None] * len(reaches)

    def interior(self, step: int) -> None:
        """Predict the other tiles, while those of the border travel."""
        with self._taking(step) as sampler:
            if sampler is not None and not sampler.interior(lambda: self._gives_up(step)):
                sampler.give_up()

    def advance(self, step: int, *received: Sequence[Travelling] | None) -> Advanced:
        """Take the step, with what the neighbours' `border` gave.

        Raises:
            Exception: what `border` or `interior` raised.
        """
        if self._failure is not None:
            raise self._failure
        sampler = self._sampler
        assert sampler is not None
        bundles = [bundle for bundle in received if bundle is not None]
        if len(bundles) < len(received) or self._brake.beyond(step):
            sampler.give_up()
        if sampler.step == step and sampler.is_prepared:
            sampler.advance([travelling for bundle in bundles for travelling in bundle])
        return self._told._replace(step=sampler.step)

    @contextmanager
    def _taking(self, step: int) -> Iterator[Sampler | None]:
        """A part of a step: the sampler, unless the step is not to be taken. What is raised is kept for the end of the
        step: there it reaches the driver from the worker that it is about."""
        sampler = self._sampler
        assert sampler is not None
        if self._failure is not None or sampler.step != step or self._gives_up(step):
            yield None
            return
        if self._told.step != step:
            self._told = Advanced(step, 0, 0.0, 0)
        started = time.monotonic()
        try:
            yield sampler
        except Exception as error:
            self._failure = error
        tiles, seconds = self._told.tiles + sampler.n_predicted, self._told.predicting_s + time.monotonic() - started
        self._told = self._told._replace(tiles=tiles, predicting_s=seconds)

    def _gives_up(self, step: int) -> bool:
        self._got_on()
        return self._stopping() or self._brake.beyond(step)

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
        if self._sampler.interior(lambda: self._gives_up(step)):
            self._sampler.advance()
            self._mark(unit, self._sampler.commit(next_slot, step + 1))
        self.unload()
