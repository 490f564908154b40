"""SIGKILL of a worker, a machine, the driver, in every stage: the same bytes, and nothing finished is done again."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import ray

from pipeline import run as run_module
from pipeline.config import Config
from pipeline.events import Event, StepTaken, UnitsDone, WorkerJoined, WorkerLeft
from pipeline.ray_workers import RayWorkers
from pipeline.run import run
from pipeline.worker import Worker
from tests.pipeline.rasters import Listening, pattern, rehearsal, write_raster
from tests.ray.conftest import Machines

MOMENTS = {
    "ingest": "ingest_block",
    "encode": "encode_block",
    "sample": "interior",
    "commit": "commit",
    "decode": "decode_block",
    "export": "export",
}
"""What workers are asked for in each; the file is written by the driver."""

OPTIONS: dict[str, Any] = {
    "scale": 4,
    "grid": {"block": 16},
    "sampling": {"steps": 5, "patch": 32, "overlap": 40, "seed": 3},
}
"""4 blocks of the source, 7 x 8 blocks of the canvas, 3 x 4 tiles."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raster(tmp_path_factory.mktemp("source") / "source.tif", pattern(1, 200, 250, "uint16"))


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run(rehearsal(source, tmp_path_factory.mktemp("undisturbed") / "target.tif", **OPTIONS)).read_bytes()


def on_ray(source: Path, target: Path, options: dict[str, Any] = OPTIONS) -> Config:
    in_run = {"workers": "ray", "memory": 0.25, "commit_seconds": 0, "keep": True}
    return rehearsal(source, target, **options, run=in_run)


def finished(folder: Path) -> dict[str, int]:
    """Of the blocks that are done: when they were."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in (folder / "done").rglob("*-*.json")}


# A machine that joins


class Waiting(Worker):
    """Takes three steps, and the next one when there is a file that says so."""

    def interior(self, step: int) -> None:
        until = time.monotonic() + 90
        while step == 3 and not (self.context.store.folder / "go-on").exists() and time.monotonic() < until:
            time.sleep(0.05)
        super().interior(step)


def test_a_machine_that_joins_is_used_from_the_next_round(
    machines: Machines, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster of which one machine comes only when sampling has begun."""
    long = {**OPTIONS, "sampling": {**OPTIONS["sampling"], "steps": 8}}
    expected = run(rehearsal(source, tmp_path / "undisturbed.tif", **long)).read_bytes()
    monkeypatch.setattr(run_module, "_make_workers", lambda plan, folder, stopping: RayWorkers(plan, folder, Waiting))
    ray.init(address=machines.address, log_to_driver=False, logging_level="WARNING")
    try:
        began, config = threading.Event(), on_ray(source, tmp_path / "target.tif", long)

        class Watching(Listening):
            def __call__(self, event: Event) -> None:
                super().__call__(event)
                if isinstance(event, StepTaken):
                    began.set()
                if isinstance(event, WorkerJoined) and began.is_set():
                    (config.folder / "go-on").touch()

        listening = Watching()
        running = threading.Thread(target=run, args=(config, listening))
        running.start()
        assert began.wait(60)
        machines.complete()  # on the main thread only
        running.join(120)
        assert not running.is_alive()
    finally:
        ray.shutdown()
    sent = [event.sent_bytes for event in listening.events if isinstance(event, StepTaken)]
    assert [n > 0 for n in sent] == [False] * 4 + [True] * 4
    assert sum(isinstance(event, WorkerJoined) for event in listening.events) == 2
    assert Path(config.output).read_bytes() == expected


# What is killed


class Killer(Listening):
    """Kills, once, some time after workers were asked for something for the nth time."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, stage: str, seed: str, kill: Callable[[Random], None]):
        super().__init__()
        self._moment, self._chance, self._kill = MOMENTS[stage], Random(seed), kill
        self._n, self._seen, self._folder = self._chance.randint(2, 4), 0, folder
        self.done_before: dict[str, int] = {}
        """Blocks, when it killed."""
        self.has_killed = threading.Event()
        ask = RayWorkers.ask

        def noticed(workers: RayWorkers, worker: int, method: str, *args: Any) -> Any:
            self._notice(method)
            return ask(workers, worker, method, *args)

        patch.setattr(RayWorkers, "ask", noticed)

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, UnitsDone):
            self._notice(event.stage)

    def _notice(self, what: str) -> None:
        self._seen += what == self._moment
        if what == self._moment and self._seen == self._n:
            threading.Timer(self._chance.uniform(0.0, 0.05), self._strike).start()

    def _strike(self) -> None:
        self.done_before = finished(self._folder)
        self._kill(self._chance)
        self.has_killed.set()

    @property
    def n_lost(self) -> int:
        return sum(isinstance(event, WorkerLeft) for event in self.events)


def kill_a_worker(chance: Random) -> None:
    workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Worker")]
    chance.choice(sorted(workers, key=lambda process: process.pid)).kill()


@pytest.mark.parametrize("stage", MOMENTS)
def test_a_worker_is_killed(
    connected: Machines, source: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    config = on_ray(source, tmp_path / "target.tif")
    killer = Killer(monkeypatch, config.folder, stage, f"worker {stage}", kill_a_worker)
    assert run(config, killer).read_bytes() == undisturbed
    assert killer.has_killed.wait(5)
    now = finished(config.folder)
    assert {name: now.get(name) for name in killer.done_before} == killer.done_before
    assert killer.n_lost <= 1
    assert killer.n_lost == 1 or stage == "export"  # which may be over before anybody misses a worker


@pytest.mark.parametrize("stage", MOMENTS)
def test_a_machine_is_lost(
    connected: Machines, source: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """And with it the worker, and what it has computed and nobody has fetched; another comes later."""
    config = on_ray(source, tmp_path / "target.tif")
    lost = threading.Event()
    killer = Killer(monkeypatch, config.folder, stage, f"machine {stage}", lambda chance: lost.set())
    result: list[Path] = []
    running = threading.Thread(target=lambda: result.append(run(config, killer)))
    running.start()
    try:  # machines come and go on the main thread only
        assert lost.wait(60)
        connected.lose_one()
        connected.complete()
    finally:
        running.join(90)
    assert not running.is_alive()
    assert result and result[0].read_bytes() == undisturbed
    now = finished(config.folder)
    assert {name: now.get(name) for name in killer.done_before} == killer.done_before
    assert killer.n_lost <= 1


def command(source: Path, target: Path, address: str, *before: str) -> list[str]:
    words = {"--workers": "ray", "--address": address, "--memory": "0.25", "--commit-seconds": "0",
             "--weights": "nearest", "--device": "cpu", "--block": "16", "--steps": "5", "--patch": "32",
             "--tile-overlap": "40", "--seed": "3", "--log": "plain"}  # fmt: skip
    options = [word for option in words.items() for word in option]
    return [sys.executable, "-m", *before, "upscale", str(source), str(target), *options, "--keep-run"]


def test_the_driver_is_killed_in_every_stage(
    machines: Machines, source: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    """The same run again and again; the machines stay."""
    machines.complete()
    target = tmp_path / "target.tif"
    folder, chance = tmp_path / "target.tif.run", Random("driver")
    before: dict[str, int] = {}
    for moment in MOMENTS.values():
        n, delay = str(chance.randint(1, 3)), f"{chance.uniform(0.0, 0.02):.3f}"
        doomed = subprocess.run(
            command(source, target, machines.address, "tests.ray.doomed", moment, n, delay),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert doomed.returncode == -signal.SIGKILL, doomed.stderr
        now = finished(folder)
        assert {name: now.get(name) for name in before} == before
        before = now
    ended = subprocess.run(
        command(source, target, machines.address, "pipeline"), capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert target.read_bytes() == undisturbed
    now = finished(folder)
    assert {name: now.get(name) for name in before} == before
