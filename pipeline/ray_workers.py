"""Workers as Ray actors: the only file of the pipeline that knows Ray."""

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if "ray" not in sys.modules:  # Ray reads it on import
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # what Ray does anyway; being told, it does so without a warning

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from pipeline.errors import GigasrError, WorkFailed
from pipeline.plan import GIB, Plan
from pipeline.workers import Worker

START_TIMEOUT_S = 600.0
"""For all workers to load their network, a download of weights not included."""

OBJECT_STORE_SHARE = 1.0
"""Of `run.memory`, for the object store of a cluster that this process starts: twice what patches may take."""


class RayWorkers:
    """One actor for each GPU of the cluster, or one on the CPU; a handle is an ObjectRef.

    Ray is started in this process where no cluster is named, and ended with it.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        # One failure would otherwise be printed once for everything that waited for it.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        self._started = not ray.is_initialized()
        address = plan.config.run.address
        if self._started:
            _start(address, plan)
        try:
            on_gpu = plan.config.model.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
            n = int(ray.cluster_resources()["GPU"]) if on_gpu else 1
            # A worker on the CPU gets all cores of its machine: Ray sets the threads of PyTorch by this number.
            cores = 1 if on_gpu else max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
            remote: Any = ray.remote(  # type: ignore[call-overload]  # Ray's stubs lack concurrency_groups
                num_cpus=cores,
                num_gpus=1 if on_gpu else 0,
                max_restarts=0,
                max_task_retries=0,
                concurrency_groups={"control": 1},
            )
            actor: Any = remote(Worker)
            self._actors = [actor.remote(plan, folder.absolute()) for _ in range(n)]
            ready = [worker.ready.remote() for worker in self._actors]
            self.devices: list[str] = self._all(ready, START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._actors)

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        return getattr(self._actors[worker], method).remote(*args)

    def wait(self, handles: Sequence[Any], timeout_s: float) -> list[int]:
        ray.wait([*handles], num_returns=1, timeout=timeout_s, fetch_local=False)
        done, _ = ray.wait([*handles], num_returns=len(handles), timeout=0, fetch_local=False)
        return [i for i, handle in enumerate(handles) if handle in done]

    def get(self, handle: Any) -> Any:
        try:
            return ray.get(handle)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            if isinstance(cause, RayActorError):
                raise _died(cause) from None
            raise cause from (None if isinstance(cause, GigasrError) else error)
        except RayActorError as error:
            raise _died(error) from None

    def halt(self) -> None:
        for actor in self._actors:
            actor.halt.options(concurrency_group="control").remote()

    def close(self) -> None:
        for actor in getattr(self, "_actors", []):
            with contextlib.suppress(Exception):  # it may be dead already, and Ray with it
                ray.kill(actor)
        self._actors = []
        if self._started:
            ray.shutdown()

    def _all(self, handles: Sequence[Any], timeout_s: float) -> list[Any]:
        done, late = ray.wait([*handles], num_returns=len(handles), timeout=timeout_s)
        if late:
            raise WorkFailed(
                f"{len(late)} of {len(handles)} workers were not ready after {timeout_s:.0f} s\n"
                "hint: `ray status` tells what the cluster lacks"
            )
        try:
            return [self.get(handle) for handle in done]
        except GetTimeoutError as error:
            raise WorkFailed(f"a worker did not answer: {error}") from None


def _died(error: RayActorError) -> WorkFailed:
    first = str(error).strip().splitlines()[0]
    return WorkFailed(f"a worker died: {first}\nhint: run the same command again; what is finished is kept")


def _start(address: str | None, plan: Plan) -> None:
    if address is not None:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        return
    memory = int(plan.config.run.memory * GIB * OBJECT_STORE_SHARE)
    ray.init(
        address="local",  # never a cluster that happens to run here
        include_dashboard=False,
        object_store_memory=max(memory, 2**27),
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
