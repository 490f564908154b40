"""Runs with workers on Ray, as a user starts them; and real kills in the middle."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import SourceError
from pipeline.run import run
from tests.pipeline.rasters import Listening, StopWhen, pattern, read_raster, rehearsal, repeated, write_raster

ray = pytest.importorskip("ray")

SCALE = 8
OPTIONS = {"--weights": "nearest", "--scale": str(SCALE), "--block": "16", "--steps": "6", "--commit-seconds": "0",
           "--memory": "0.5", "--device": "cpu", "--log": "json"}  # fmt: skip


def options(**more: Any) -> dict[str, Any]:
    return {"scale": SCALE, "grid": {"block": 16}, "sampling": {"steps": 6}, **more}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_raster(tmp_path / "source.tif", pattern(2, 90, 120, "uint16"))


@pytest.fixture(autouse=True)
def no_ray_is_left() -> Iterator[None]:
    yield
    assert not ray.is_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves pipes open; not to be blamed on a later test
        gc.collect()


def in_ray(source: Path, target: Path, **more: Any) -> Any:
    return rehearsal(source, target, **options(run={"workers": "ray", "memory": 0.5, "commit_seconds": 0}, **more))


def test_a_run_on_ray_gives_the_file_of_a_run_in_this_process(source: Path, tmp_path: Path) -> None:
    alone = run(rehearsal(source, tmp_path / "alone.tif", **options()))
    listening = Listening()
    on_ray = run(in_ray(source, tmp_path / "ray.tif"), listening)
    assert on_ray.read_bytes() == alone.read_bytes()
    assert not (tmp_path / "ray.tif.run").exists()


def test_stopping_on_ray_commits_and_the_run_goes_on_in_this_process(source: Path, tmp_path: Path) -> None:
    from pipeline.errors import Stopped

    listening = Listening(stop_after=100)
    with pytest.raises(Stopped, match="same command"):
        run(in_ray(source, tmp_path / "target.tif"), listening, StopWhen(listening))
    run(rehearsal(source, tmp_path / "target.tif", **options()))
    np.testing.assert_array_equal(read_raster(tmp_path / "target.tif"), repeated(read_raster(source), SCALE))


def test_an_error_of_a_worker_arrives_as_it_is(source: Path, tmp_path: Path) -> None:
    config = in_ray(source, tmp_path / "target.tif")

    def listener(event: Any) -> None:
        if type(event).__name__ == "RunStarted":
            source.unlink()  # after the plan was made, before a worker opens it

    with pytest.raises(SourceError, match="source.tif"):
        run(config, listener)


def start(source: Path, target: Path, workers: str) -> subprocess.Popen[bytes]:
    words = [word for option in {**OPTIONS, "--workers": workers}.items() for word in option]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "upscale", str(source), str(target), *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_units(folder: Path, n: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many markers are there, or the process has ended."""
    while process.poll() is None and sum(1 for _ in (folder / "done").rglob("*.json")) < n:
        time.sleep(0.01)


def markers(folder: Path) -> dict[str, int]:
    """Of the blocks that are finished: when."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in (folder / "done").rglob("*-*.json")}


@pytest.mark.parametrize("workers", ["local", "ray"])
def test_a_driver_that_is_killed_again_and_again_loses_nothing(source: Path, tmp_path: Path, workers: str) -> None:
    target = tmp_path / "target.tif"
    folder = tmp_path / "target.tif.run"
    expected = run(rehearsal(source, tmp_path / "undisturbed.tif", **options()))
    chance = random.Random(workers)
    done: dict[str, int] = {}
    for _ in range(6 if workers == "local" else 3):
        process = start(source, target, workers)
        wait_for_units(folder, len(done) + chance.randint(4, 14), process)
        time.sleep(chance.uniform(0.0, 0.05))
        assert process.poll() is None, "the run was over before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if workers == "ray":
            end_group(process.pid)  # it leads a session of its own
        now = markers(folder)
        assert {name: now.get(name) for name in done} == done  # nothing finished was done again
        done = now
    process = start(source, target, workers)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert target.read_bytes() == expected.read_bytes()
    assert not folder.exists()


def end_group(group: int) -> None:
    """What a killed driver leaves of its own Ray: it would end by itself, but not at once."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.mark.parametrize("workers", ["local", "ray"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_command_with_75_and_the_same_command_goes_on(
    source: Path, tmp_path: Path, workers: str, name: str
) -> None:
    target = tmp_path / "target.tif"
    process = start(source, target, workers)
    wait_for_units(tmp_path / "target.tif.run", 40, process)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors.decode()
    assert "same command" in errors.decode()
    assert "Traceback" not in errors.decode()
    assert not target.exists()
    run(rehearsal(source, target, **options()))
    np.testing.assert_array_equal(read_raster(target), repeated(read_raster(source), SCALE))
