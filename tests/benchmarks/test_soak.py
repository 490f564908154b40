"""Many rounds of sampling on several machines, while workers, machines and the driver are killed at random."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from pipeline.run import run
from tests.pipeline.rasters import pattern, rehearsal, write_raster
from tests.ray.conftest import Machines

KINDS = {"worker killed": 6, "worker stopped": 2, "machine lost": 1, "driver killed": 2, "driver asked to stop": 1}
"""What happens, and how often compared to the rest. A worker that is stopped (SIGSTOP) hangs."""


class Soak:
    """A run that is started again until it is finished."""

    def __init__(self, folder: Path, machines: Machines, side: int, rounds: int, pause_s: tuple[float, float]) -> None:
        self.machines, self.pause_s, self.chance = machines, pause_s, Random(rounds)
        self.source = write_raster(folder / "source.tif", pattern(1, side, side, "uint16"))
        self.target, self.log = folder / "target.tif", folder / "log.jsonl"
        self.options: dict[str, Any] = {
            "grid": {"block": 32}, "sampling": {"steps": rounds, "patch": 64, "seed": 1, "color": "none"},
        }  # fmt: skip
        self.inflicted: Counter[str] = Counter()
        self.starts = 0

    def undisturbed(self, target: Path) -> bytes:
        return run(rehearsal(self.source, target, **self.options)).read_bytes()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        words = {"--address": self.machines.address, "--memory": "0.5", "--commit-seconds": "0", "--block": "32",
                 "--weights": "nearest", "--device": "cpu", "--patch": "64", "--seed": "1", "--color": "none",
                 "--steps": self.options["sampling"]["steps"], "--hang-seconds": "4", "--log": "json"}  # fmt: skip
        options = [str(word) for option in words.items() for word in option]
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline", "upscale", str(self.source), str(self.target), *options],
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def suffer(self, most: int | None = None) -> None:
        """Go on to the end, something happening again and again, `most` times."""
        driver = self._start()
        try:
            while True:
                if (ended := self._wait(driver, self.chance.uniform(*self.pause_s))) == 0:
                    return
                if ended is not None:
                    assert ended in (75, -signal.SIGKILL), self.log.read_text()[-2000:]
                    driver = self._start()
                elif most is None or self.inflicted.total() < most:
                    self._inflict(driver)
        finally:
            driver.kill()
            driver.wait()

    @staticmethod
    def _wait(driver: subprocess.Popen[bytes], seconds: float) -> int | None:
        try:
            return driver.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def _inflict(self, driver: subprocess.Popen[bytes]) -> None:
        kind = self.chance.choices([*KINDS], [*KINDS.values()])[0]
        workers = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Worker")]
        if kind.startswith("worker"):
            if not workers:
                return
            self.chance.choice(workers).send_signal(signal.SIGKILL if kind == "worker killed" else signal.SIGSTOP)
        elif kind == "machine lost":
            self.machines.lose_one()
            self.machines.complete(3)
        else:
            driver.send_signal(signal.SIGKILL if kind == "driver killed" else signal.SIGTERM)
        self.inflicted[kind] += 1

    def events(self) -> list[dict[str, Any]]:
        """What all starts of the driver told."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def test_a_run_on_which_everything_falls(tmp_path: Path, full_size: bool, request: pytest.FixtureRequest) -> None:
    side, rounds = (1024, 200) if full_size else (192, 12)
    machines = Machines(3 if full_size else 2)
    request.addfinalizer(machines.close)
    soak = Soak(tmp_path, machines, side, rounds, (1.0, 9.0) if full_size else (3.0, 4.0))
    started = time.monotonic()
    expected = soak.undisturbed(tmp_path / "undisturbed.tif")
    alone_s, started = time.monotonic() - started, time.monotonic()
    soak.suffer(None if full_size else 1)
    seconds = time.monotonic() - started
    assert soak.target.read_bytes() == expected
    events = soak.events()
    committed = [event["step"] for event in events if event["event"] == "Committed"]
    assert committed == sorted(set(committed))  # no step that was committed was taken again
    untold = {*range(1, rounds + 1)} - {*committed}
    assert len(untold) <= soak.inflicted["driver killed"]  # which may die between the commit and telling of it
    lost = sum(event["event"] == "WorkerLeft" for event in events)
    in_vain = -sum(min(event["n"], 0) for event in events if event["event"] == "UnitsDone")
    print(
        f"\n{rounds} rounds, {seconds:.0f} s ({alone_s:.0f} s in one process, undisturbed), {soak.starts} starts\n"
        f"  {', '.join(f'{n} x {kind}' for kind, n in soak.inflicted.most_common())}\n"
        f"  workers lost while a driver looked: {lost}; block steps taken in vain: {in_vain}\n"
        f"  the same {len(expected):,} bytes"
    )
