"""Workers as Ray actors: with `ray_metrics`, all that the pipeline knows of Ray."""

import contextlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "ray" not in sys.modules:  # Ray reads it on import
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # what Ray does anyway; being told, it does so without a warning

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from pipeline.errors import GigasrError, WorkerLost, WorkFailed
from pipeline.events import Event, WorkerJoined, WorkerLeft
from pipeline.plan import GIB, Plan
from pipeline.ray_metrics import RayMetrics
from pipeline.telemetry import Snapshot
from pipeline.worker import Pulse, Worker, deadline_s

START_TIMEOUT_S = 600.0
"""For the first worker to load its network, a download of weights not included."""

GRACE_S = 30.0
"""Once the first is ready, for the others that there is room for: a run that starts alone is shared out again soon."""

WATCH_S = 1.0
"""How often workers are looked after, and the cluster is asked for room for more."""

PULSES_PER_S = 100
"""That are felt of all workers together: of many, each less often."""

START_FAILURES = 5
"""Workers that die before they are ready, one after another: then there is something wrong with all of them."""

CONTROL_TIMEOUT_S = 10.0
"""For an answer from a thread that has nothing else to do."""

GET_TIMEOUT_S = 60.0
"""For an answer that is there to arrive; they are small."""

OBJECT_STORE_SHARE = 1.0
"""Of `run.memory`, for the object store of a cluster that this process starts: twice what patches may take."""


@dataclass
class _Member:
    actor: Any
    ready: Any
    """The handle of its first answer; None once it takes part."""
    pulse: Any = None
    """The handle of its pulse, while that is awaited."""
    asked: float = float("-inf")
    """When that was asked for last."""


class RayWorkers:
    """One actor for each GPU of the cluster, or one for each machine; a handle is an ObjectRef.

    Ray is started in this process where no cluster is named, and ended with it. Actors that die or hang are replaced
    where there is room; nothing is retried by Ray itself, for a new actor does not have what the old one had.
    """

    steps_ahead = 3
    spills = True

    def __init__(self, plan: Plan, folder: Path, kind: type[Worker] = Worker) -> None:
        # One failure would otherwise be printed once for everything that waited for it.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        self._plan, self._folder, self._kind = plan, folder.absolute(), kind
        self._started = not ray.is_initialized()
        self._numbers = itertools.count()
        self._members: dict[int, _Member] = {}
        self._events: list[Event] = []
        self._failed_starts = 0
        self._metrics: RayMetrics | None = None
        self._watched = float("-inf")
        try:
            if self._started:
                _start(plan, self._folder)
            self._await_first()
        except BaseException:
            self.close()
            raise

    def _await_first(self) -> None:
        begun, first = time.monotonic(), None
        while True:
            self._watched = float("-inf")
            self._events = self.watch()  # with those before
            now, ready = time.monotonic(), len(self.live())
            if ready and first is None:
                first = now
            if ready and (ready >= self._room()[0] or now - (first or now) > GRACE_S):
                return
            if not ready and now - begun > START_TIMEOUT_S:
                raise WorkFailed(
                    f"no worker was ready after {START_TIMEOUT_S:.0f} s\n"
                    "hint: `ray status` tells what the cluster lacks"
                )
            starting = [member.ready for member in self._members.values() if member.ready is not None]
            if starting:
                ray.wait(starting, num_returns=1, timeout=WATCH_S, fetch_local=False)
            else:
                time.sleep(WATCH_S)

    # Asking

    def live(self) -> list[int]:
        return [number for number, member in self._members.items() if member.ready is None]

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        return self._actor(worker).do.options(name=method).remote(method, *args)

    def ask_for(self, n: int, worker: int, method: str, *args: Any) -> list[Any]:
        if n == 1:
            return [self._actor(worker).do_only.options(name=method).remote(method, *args)]
        handles: list[Any] = self._actor(worker).do.options(name=method, num_returns=n).remote(method, *args)
        return handles

    def _actor(self, worker: int) -> Any:
        if worker not in self._members:
            raise WorkerLost(f"worker {worker} is gone", worker)
        return self._members[worker].actor

    def wait(self, handles: Sequence[Any], timeout_s: float) -> list[int]:
        ray.wait([*handles], num_returns=1, timeout=timeout_s, fetch_local=False)
        done, _ = ray.wait([*handles], num_returns=len(handles), timeout=0, fetch_local=False)
        finished = {*done}
        return [i for i, handle in enumerate(handles) if handle in finished]

    def get(self, handle: Any) -> Any:
        try:
            return ray.get(handle, timeout=GET_TIMEOUT_S)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, RayActorError):
                number = self._number_of(cause.actor_id)
                why = str(cause).strip().splitlines()[0]
                if number is not None:
                    self.discard(number, why)
                raise WorkerLost(f"a worker died: {why}", number) from None
            if isinstance(cause, ObjectLostError | WorkerCrashedError | GetTimeoutError) or cause is None:
                raise WorkerLost(f"what a worker had computed is lost: {error}".splitlines()[0]) from None
            if isinstance(cause, Exception):
                raise cause from (None if isinstance(cause, GigasrError) else error)
            raise

    def _number_of(self, actor_id: str | None) -> int | None:
        return next((n for n, member in self._members.items() if member.actor._actor_id.hex() == actor_id), None)

    # Looking after them

    def watch(self) -> list[Event]:
        now = time.monotonic()
        if now - self._watched >= WATCH_S:
            self._watched = now
            for number in [number for number, member in self._members.items() if member.ready is not None]:
                self._welcome(number)
            self._feel_pulses(now)
            self._hire()
        events, self._events = self._events, []
        return events

    def _room(self) -> tuple[int, int, bool]:
        """How many workers there could be, the CPU cores of each, and whether they have a GPU each.

        Without a GPU a worker gets all cores of its machine, the smallest of the cluster; Ray sets the threads of
        PyTorch by this number.
        """
        nodes, config = [node["Resources"] for node in ray.nodes() if node["Alive"]], self._plan.config
        if not nodes and self._started and config.run.address is None:
            raise WorkFailed("Ray has died on this machine\nhint: the same command starts it again, and goes on")
        on_gpu = config.model.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes)
        machines = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        cores = 1 if on_gpu else config.run.cores or min(machines, default=1)
        room = sum(int(node.get("GPU", 0)) if on_gpu else int(node.get("CPU", 0)) // cores for node in nodes)
        limit = config.run.max_workers
        if limit is not None and config.run.address is not None:
            return limit, cores, on_gpu  # what waits for room is what makes a cluster grow
        return room if limit is None else min(room, limit), cores, on_gpu

    def _hire(self) -> None:
        """Start workers where there is room."""
        room, cores, on_gpu = self._room()
        for _ in range(room - len(self._members)):
            remote: Any = ray.remote(  # type: ignore[call-overload]  # Ray's stubs lack concurrency_groups
                num_cpus=cores,
                num_gpus=1 if on_gpu else 0,
                max_restarts=0,
                max_task_retries=0,
                concurrency_groups={"control": 2},
            )
            actor = remote(self._kind).remote(self._plan, self._folder)
            self._members[next(self._numbers)] = _Member(actor, actor.do.options(name="ready").remote("ready"))

    def _welcome(self, number: int) -> None:
        """Let a worker take part if it is ready."""
        member = self._members[number]
        if not _is_there(member.ready):
            return
        try:
            device, node = self.get(member.ready)
        except WorkerLost as error:
            self._members.pop(number, None)
            self._failed_starts += 1
            if self._failed_starts >= START_FAILURES:
                raise WorkFailed(
                    f"{START_FAILURES} workers died one after another while they loaded the network; the last: {error}"
                    "\nhint: the logs of Ray say more; is there memory for all workers of a machine?"
                ) from None
            return
        self._failed_starts, member.ready = 0, None
        self._events.append(WorkerJoined(number, device, node))

    def _feel_pulses(self, now: float) -> None:
        """Ask workers what they are doing, and whether that has been so for too long."""
        live = {number: member for number, member in self._members.items() if member.ready is None}
        awaited = [member.pulse for member in live.values() if member.pulse is not None]
        there = {*ray.wait(awaited, num_returns=len(awaited), timeout=0, fetch_local=False)[0]} if awaited else set()
        hang_seconds = self._plan.config.run.hang_seconds
        for number, member in live.items():
            if member.pulse in there:
                handle, member.pulse = member.pulse, None
                with contextlib.suppress(WorkerLost):  # and it has been discarded
                    pulse: Pulse = self.get(handle)
                    if pulse.doing is not None and pulse.still_s > deadline_s(hang_seconds, pulse.longest_s):
                        self.discard(number, f"{pulse.doing} has got nowhere for {pulse.still_s:.0f} s")
            elif member.pulse is None and now - member.asked >= len(live) / PULSES_PER_S:
                member.pulse, member.asked = self._control(member, "pulse"), now
            elif member.pulse is not None and now - member.asked > hang_seconds:
                self.discard(number, f"it has not answered for {now - member.asked:.0f} s")

    def discard(self, worker: int, why: str) -> None:
        member = self._members.pop(worker, None)
        if member is None:
            return
        with contextlib.suppress(Exception):  # it may be dead already, and Ray with it
            ray.kill(member.actor, no_restart=True)
        if member.ready is None:
            self._events.append(WorkerLeft(worker, why))

    def halt(self) -> None:
        steps = self._tell_all("hold")
        if steps:
            self._tell_all("release", max(steps))

    def give_up(self) -> None:
        self._tell_all("release", 0)

    def _tell_all(self, method: str, *args: Any) -> list[Any]:
        """What all workers answer that do."""
        asked = [self._control(self._members[number], method, *args) for number in self.live()]
        if not asked:
            return []
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=CONTROL_TIMEOUT_S, fetch_local=False)
        answers = []
        for handle in done:
            with contextlib.suppress(WorkerLost):
                answers.append(self.get(handle))
        return answers

    def _control(self, member: _Member, method: str, *args: Any) -> Any:
        return getattr(member.actor, method).options(concurrency_group="control").remote(*args)

    def publish(self, snapshot: Snapshot) -> None:
        if self._metrics is None:
            self._metrics = RayMetrics(str(self._folder))
        self._metrics.publish(snapshot)

    def close(self) -> None:
        for member in self._members.values():
            with contextlib.suppress(Exception):
                ray.kill(member.actor, no_restart=True)
        self._members = {}
        if self._started:
            ray.shutdown()


def _is_there(handle: Any) -> bool:
    return bool(ray.wait([handle], timeout=0, fetch_local=False)[0])


def _start(plan: Plan, folder: Path) -> None:
    address = plan.config.run.address
    if address is not None:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        return
    memory = int(plan.config.run.memory * GIB * OBJECT_STORE_SHARE)
    ray.init(
        address="local",  # never a cluster that happens to run here
        include_dashboard=False,
        object_store_memory=max(memory, 2**27),
        object_spilling_directory=str(folder / "spill"),
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
