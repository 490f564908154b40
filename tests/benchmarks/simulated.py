"""Workers that compute nothing, on a clock that leaps from one answer to the next: a thousand of them, in one process.

The driver above them is the real one, and its time is real: what its thread computes between two calls is added to the
clock, and so is what Ray would take for the calls (`Asking`). What the workers do takes what `Costs` says; an answer is
there once the worker has done what it was asked before, what it needs of others has arrived, and that time has passed.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import WorkerLost
from pipeline.events import Event, WorkerJoined, WorkerLeft
from pipeline.grid import Index, Share
from pipeline.plan import Plan
from pipeline.ray_workers import PULSES_PER_S, WATCH_S
from pipeline.stages import decode, encode
from pipeline.store import RunStore, _sealed, unit_name
from pipeline.worker import Advanced
from stablesr.box import Box
from tests.benchmarks.sleepy import touching


@dataclass(frozen=True)
class Costs:
    """What the workers' work takes: seconds, and bytes a second."""

    tile: float = 0.045
    finishing: float = 0.0
    """Of a step, once the neighbours' tiles are there."""
    encode_patch: float = 0.0
    decode_patch: float = 0.0
    block: Mapping[str, float] = field(default_factory=dict)
    """By method: of what is no patch, without reading and writing."""
    disk: float = 1e9
    """Of one worker."""
    disks: float = 1e10
    """Of all workers together."""
    an_object: float = 5e-3
    """Of each block that is written: to open, to sync, to close."""
    network: float = 1.25e9
    """Into one worker."""
    latency: float = 1e-3
    """From a question, or what it waits for, to the beginning of work."""


@dataclass(frozen=True)
class Asking:
    """What Ray takes of the driver's time, in seconds of a processor, as if its process had one only; measured by
    `test_what_asking_costs`, 2026-11-24."""

    call: float = 0.19e-3
    argument: float = 12e-6
    """Of a call, that is a handle."""
    part: float = 10e-6
    """Of what comes of a call, but for the first."""
    waiting: float = 1.3e-6
    """For each handle that is looked at."""
    getting: float = 13e-6
    """Of an answer."""
    pulse: float = 0.3e-3
    """Of a worker, each time that they are looked after."""


@dataclass(eq=False)
class _Handle:
    """Of something that is known to be done, at a time that may be yet to come."""

    worker: int
    method: str
    done_at: float
    value: Any = None
    n_bytes: int = 0
    error: WorkerLost | None = None
    step: int = 0
    """Diffusion steps done after the one that it is a part of."""


@dataclass
class _Member:
    number: int
    speed: float
    dies_at: float
    free: float = 0.0
    """When it has done what it was asked so far."""
    received: float = 0.0
    """When all that travels to it has arrived."""
    share: Share | None = None
    loaded: int = 0
    """Steps done of what it loaded."""
    n_border: int = 0
    sent: int = 0
    steps: list[_Handle] = field(default_factory=list)
    """Parts of diffusion steps that it was asked for since."""


LEAP = 20.0
"""Times longer than asked for, that nothing may happen: a driver that merely looks around is soon done. Its looks after
the workers are counted all the same."""

STEP = ("border", "interior", "advance")


class SimulatedStore(RunStore):
    """Markers in memory, arrays nowhere."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.config.folder)
        self._markers: dict[str, str] = {}

    def mark(self, unit: str, payload: Mapping[str, Any]) -> None:
        self._markers[unit] = _sealed(payload)

    def marker(self, unit: str) -> dict[str, Any] | None:
        return self._trusted(text) if (text := self._markers.get(unit)) is not None else None

    def markers(self, stage: str) -> Iterator[tuple[Index, dict[str, Any]]]:
        return iter(())

    def n_marked(self, stage: str) -> int:
        return 0

    def unmark(self, unit: str) -> None:
        for known in [known for known in self._markers if known == unit or known.startswith(f"{unit}/")]:
            del self._markers[known]

    @staticmethod
    def _trusted(text: str) -> dict[str, Any]:
        payload: dict[str, Any] = json.loads(text)["payload"]
        assert _sealed(payload) == text  # which takes its time in the real one, too
        return payload


class SimulatedWorkers:
    """As many as there are speeds."""

    def __init__(
        self,
        plan: Plan,
        store: RunStore,
        speeds: Sequence[float],
        costs: Costs,
        asking: Asking = Asking(),
        *,
        deaths: Mapping[int, float] | None = None,
        steps_ahead: int = 3,
        spills: bool = True,
        thread_time: Callable[[], float] = time.thread_time,
    ) -> None:
        """
        Args:
            speeds: relative to the costs.
            deaths: when workers end, on the clock.
            thread_time: seconds that the driver has computed; a constant makes its computing free.
        """
        self.steps_ahead, self.spills = steps_ahead, spills
        self.now = self.driver_s = 0.0
        """The time; and how much of it the driver, or Ray in its name, was busy."""
        self.asked: list[tuple[int, str]] = []
        """Workers and methods."""
        self.n_calls = 0
        self._plan, self._store, self._costs, self._asking = plan, store, costs, asking
        ends = deaths or {}
        self._members = {n: _Member(n, speed, ends.get(n, float("inf"))) for n, speed in enumerate(speeds)}
        self._events: list[Event] = [WorkerJoined(n, "simulated", "nowhere") for n in self._members]
        self._watched = 0.0
        self._thread_time = thread_time
        self._left = thread_time()

    def clock(self) -> float:
        """Seconds since the beginning."""
        return self.now + self._thread_time() - self._left

    @contextmanager
    def _called(self, seconds: float = 0.0) -> Iterator[None]:
        """The driver has computed until now, and is busy with this for a while; what is done here takes no time."""
        busy = self._thread_time() - self._left + seconds
        self.now += busy
        self.driver_s += busy
        try:
            yield
        finally:
            self._left = self._thread_time()

    # As `Workers` has it

    def live(self) -> list[int]:
        return [*self._members]

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        return self._ask(1, worker, method, args)[0]

    def ask_for(self, n: int, worker: int, method: str, *args: Any) -> list[Any]:
        return self._ask(n, worker, method, args)

    def _ask(self, n: int, worker: int, method: str, args: Sequence[Any]) -> list[_Handle]:
        handles = [arg for arg in args if isinstance(arg, _Handle)]
        with self._called(self._asking.call + self._asking.argument * len(handles) + self._asking.part * (n - 1)):
            if worker not in self._members:
                raise WorkerLost(f"worker {worker} is gone", worker)
            self.n_calls += 1
            self.asked.append((worker, method))
            member = self._members[worker]
            answers = self._answers(member, method, args, handles)
            assert len(answers) == n
            return answers

    def _answers(self, member: _Member, method: str, args: Sequence[Any], handles: Sequence[_Handle]) -> list[_Handle]:
        if lost := next((handle for handle in handles if handle.error is not None), None):
            answers = [_Handle(member.number, method, max(member.free, lost.done_at), error=lost.error)]
        else:
            start = max(member.free, self.now + self._costs.latency, self._arrived(member, handles))
            if start < member.dies_at:
                seconds, answers = getattr(self, f"_{method}")(member, *args)
                member.free = start + seconds
            else:
                answers = [_Handle(member.number, method, 0.0) for _ in range(self._n_parts(method, args))]
                member.free = start
            for answer in answers:
                answer.method, answer.done_at = method, member.free
            if member.free >= member.dies_at:
                for answer in answers:
                    answer.done_at = member.dies_at
                    answer.error = WorkerLost(f"worker {member.number} has died", member.number)
                if method == "stream":
                    self._store.unmark(args[0])
        if method in STEP:
            member.steps += answers
            for answer in answers:
                answer.step = args[0] + 1
        return answers

    def _n_parts(self, method: str, args: Sequence[Any]) -> int:
        return len(args[1]) if method == "border" else 1

    def _arrived(self, member: _Member, handles: Sequence[_Handle]) -> float:
        """When all that a question needs of others is there."""
        others = [handle for handle in handles if handle.worker != member.number]
        n_bytes = sum(handle.n_bytes for handle in others)
        if others:
            ready = max(handle.done_at for handle in others)
            member.received = max(member.received, ready) + n_bytes / self._costs.network
            return member.received + self._costs.latency
        return max((handle.done_at for handle in handles), default=0.0)

    def wait(self, handles: Sequence[Any], timeout_s: float) -> list[int]:
        with self._called(self._asking.waiting * len(handles)):
            first = min(handle.done_at for handle in handles)
            self.now = max(self.now, min(first, self.now + LEAP * timeout_s))
            return [i for i, handle in enumerate(handles) if handle.done_at <= self.now]

    def get(self, handle: Any) -> Any:
        with self._called(self._asking.getting):
            assert handle.done_at <= self.now
            if handle.error is not None:
                self._lose(handle.error.worker, "it has died")
                raise WorkerLost(str(handle.error), handle.error.worker)
            return handle.value

    def watch(self) -> list[Event]:
        with self._called():
            if looks := int((self.now - self._watched) / WATCH_S):
                self._watched = self.now
                busy = looks * self._asking.pulse * min(len(self._members), PULSES_PER_S * WATCH_S)
                self.now += busy
                self.driver_s += busy
            for member in [member for member in self._members.values() if member.dies_at <= self.now]:
                self._lose(member.number, "it has died")
            events, self._events = self._events, []
            return events

    def _lose(self, worker: int | None, why: str) -> None:
        if worker is not None and self._members.pop(worker, None) is not None:
            self._events.append(WorkerLeft(worker, why))

    def discard(self, worker: int, why: str) -> None:
        with self._called():
            self._lose(worker, why)

    def halt(self) -> None:
        with self._called(2 * self._asking.call * len(self._members)):
            self._stop_at(max((self._steps_done(member) for member in self._members.values()), default=0))

    def give_up(self) -> None:
        with self._called(self._asking.call * len(self._members)):
            self._stop_at(0)

    def publish(self, snapshot: Any) -> None:
        """Nobody looks."""

    def close(self) -> None:
        self._members = {}

    def _steps_done(self, member: _Member) -> int:
        done = [handle.value.step for handle in member.steps if handle.method == "advance" and handle.error is None
                and handle.done_at <= self.now]  # fmt: skip
        return max(done, default=member.loaded)

    def _stop_at(self, goal: int) -> None:
        """What lies beyond a step is not done; a tile that is being predicted is finished."""
        for member in self._members.values():
            reached, free = max(self._steps_done(member), goal), self.now + self._costs.tile / member.speed
            for handle in member.steps:
                if handle.done_at <= self.now or handle.error is not None:
                    continue
                if handle.step <= goal:
                    free = max(free, handle.done_at)
                    continue
                handle.done_at = min(handle.done_at, free)
                if handle.method == "advance":
                    handle.value = handle.value._replace(step=reached)
            member.free = min(member.free, free)

    # What the workers do: how long it takes, and what comes of it

    def _once(
        self, member: _Member, seconds: float, value: Any = None, n_bytes: int = 0
    ) -> tuple[float, list[_Handle]]:
        return seconds / member.speed, [_Handle(member.number, "", 0.0, value, n_bytes)]

    def _read_s(self, n_bytes: float) -> float:
        return max(n_bytes / self._costs.disk, n_bytes * len(self._members) / self._costs.disks)

    def _ready(self, member: _Member) -> Any:
        return self._once(member, 0.0, ("simulated", "nowhere"))

    _rest = _unload = _ready

    def _load(self, member: _Member, layer: int, share: Share, step: int, slot: str | None) -> Any:
        member.share, member.loaded, member.steps = share, step, []
        _, handles = self._once(member, 0.0)
        return self._read_s(self._latents(share.frame) * (1 if slot is None else 2)), handles

    def _latents(self, box: Box) -> int:
        """Bytes."""
        return 4 * self._plan.latent_channels * box.height * box.width

    def _border(self, member: _Member, step: int, reaches: Sequence[Box]) -> Any:
        assert member.share is not None
        sizes, wanted = [], None
        for reach in reaches:
            rows, columns = (np.array(lengths) for lengths in touching(member.share, reach))
            sizes.append(4 * self._plan.latent_channels * int(rows.sum() * columns.sum()))
            touched = (rows > 0)[:, None] & (columns > 0)
            wanted = touched if wanted is None else wanted | touched
        member.n_border, member.sent = 0 if wanted is None else int(wanted.sum()), sum(sizes)
        seconds, _ = self._once(member, member.n_border * self._costs.tile)
        return seconds, [_Handle(member.number, "", 0.0, None, size) for size in sizes]

    def _interior(self, member: _Member, step: int) -> Any:
        assert member.share is not None
        return self._once(member, (member.share.n_tiles - member.n_border) * self._costs.tile)

    def _advance(self, member: _Member, step: int, *received: Any) -> Any:
        assert member.share is not None
        n = member.share.n_tiles
        told = Advanced(step + 1, n, n * self._costs.tile / member.speed, member.sent)
        return self._once(member, self._costs.finishing, told)

    def _commit(self, member: _Member, slot: str, step: int) -> Any:
        assert member.share is not None
        return self._written(member.share)

    def _written(self, share: Share) -> tuple[float, list[_Handle]]:
        checksums = {f"{row}-{column}": 2**32 - 1 - column for row, column in share.own}
        seconds = self._read_s(self._latents(share.own_box)) + self._costs.an_object * len(checksums)
        return seconds, [_Handle(-1, "", 0.0, checksums)]

    def _stream(
        self, member: _Member, unit: str, layer: int, share: Share, step: int, slot: str | None, next_slot: str
    ) -> Any:
        writing_s, (written,) = self._written(share)
        reading_s = self._read_s(self._latents(share.frame) * (1 if slot is None else 2))
        self._store.mark(unit, written.value)
        seconds, handles = self._once(member, share.n_tiles * self._costs.tile)
        return reading_s + seconds + writing_s, handles

    def _encode_patch(self, member: _Member, layer: int, patch: Box) -> Any:
        return self._once(member, self._costs.encode_patch, n_bytes=encode.patch_bytes(self._plan))

    def _decode_patch(self, member: _Member, layer: int, slot: str, patch: Box) -> Any:
        return self._once(member, self._costs.decode_patch, n_bytes=decode.patch_bytes(self._plan))

    def _encode_block(self, member: _Member, layer: int, index: Index, *patches: Any) -> Any:
        return self._block(member, "encode_block", f"encode/{layer}", index)

    def _decode_block(self, member: _Member, layer: int, index: Index, *patches: Any) -> Any:
        return self._block(member, "decode_block", f"decode/{layer}", index)

    def _ingest_block(self, member: _Member, index: Index) -> Any:
        return self._block(member, "ingest_block", "ingest", index)

    def _overview_block(self, member: _Member, level: int, index: Index) -> Any:
        return self._block(member, "overview_block", f"overviews/{level}", index)

    def _block(self, member: _Member, method: str, stage: str, index: Index) -> Any:
        self._store.mark(unit_name(stage, index), {})
        return self._once(member, self._costs.block.get(method, 0.0) + self._costs.an_object)
