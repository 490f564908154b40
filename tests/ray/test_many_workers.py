"""However many workers there are on Ray, and whatever befalls them: the bytes of one worker in this process."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline import run as run_module
from pipeline.config import Config
from pipeline.errors import Stopped
from pipeline.events import Committed, Event, Notice, StageStarted, StepTaken, UnitsDone, WorkerJoined, WorkerLeft
from pipeline.plan import Plan, make_plan
from pipeline.ray_workers import RayWorkers
from pipeline.run import run
from pipeline.worker import Worker
from tests.pipeline.rasters import Listening, StopWhen, pattern, rehearsal, write_raster

ray = pytest.importorskip("ray")

OPTIONS: dict[str, Any] = {
    "grid": {"block": 16},
    "sampling": {"steps": 5, "patch": 32, "overlap": 40, "seed": 3},
    "run": {"commit_seconds": 0, "keep": True},
}
"""7 x 8 blocks of the canvas, 3 x 4 tiles."""

TINY: dict[str, Any] = {
    "model": {"weights": "tiny", "device": "cpu"},
    "grid": {"block": 32},
    "sampling": {"steps": 2, "patch": 64, "batch": 2, "seed": 3},
    "run": {"commit_seconds": 0, "keep": True},
}
"""2 x 4 blocks, 3 tiles in batches of two."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raster(tmp_path_factory.mktemp("source") / "source.tif", pattern(1, 200, 250, "uint16"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raster(tmp_path_factory.mktemp("source") / "small.tif", pattern(3, 64, 200, "uint8"))


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return finished(rehearsal(source, tmp_path_factory.mktemp("undisturbed") / "target.tif", **OPTIONS))


@pytest.fixture(scope="module")
def undisturbed_tiny(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return finished(rehearsal(small, tmp_path_factory.mktemp("tiny") / "target.tif", **TINY))


def finished(config: Config, listener: Any = lambda event: None) -> Config:
    run(config, listener)
    return config


@pytest.fixture(scope="module")
def four_cores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As Ray sees it; where it puts what does not fit into its object store of 128 MiB."""
    spill = tmp_path_factory.mktemp("spill")
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=2**27, log_to_driver=False,
             object_spilling_directory=str(spill))  # fmt: skip
    yield spill
    ray.shutdown()


def on_ray(source: Path, target: Path, options: dict[str, Any], **more: Any) -> Config:
    in_run = {**options["run"], "workers": "ray", "memory": 0.25, "cores": 1, **more}
    return rehearsal(source, target, **{**options, "run": in_run})


def stored(config: Config, arrays: Sequence[str]) -> dict[str, bytes]:
    """The blocks of arrays, as they lie on disk."""
    root = config.folder / "data.zarr"
    files = (path for array in arrays for path in (root / array).rglob("c/**/*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def assert_the_same(config: Config, other: Config) -> None:
    """Latents of all steps that were committed last, pixels, and the file."""
    for array in ("lr_latents", "latents", "output"):
        ours, theirs = stored(config, [array]), stored(other, [array])
        assert ours
        assert ours == theirs
    assert Path(config.output).read_bytes() == Path(other.output).read_bytes()


def joined(events: Sequence[Event]) -> int:
    return sum(isinstance(event, WorkerJoined) for event in events)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_so_many_workers_give_the_bytes_of_one_in_this_process(
    four_cores: Path, source: Path, undisturbed: Config, tmp_path: Path, n: int
) -> None:
    listening = Listening()
    config = finished(on_ray(source, tmp_path / "target.tif", OPTIONS, max_workers=n), listening)
    assert joined(listening.events) == n
    assert_the_same(config, undisturbed)
    taken = [event for event in listening.events if isinstance(event, StepTaken)]
    assert [step.tiles for step in taken] == [12] * 5  # each tile once a step, whoever has it
    assert all((step.sent_bytes > 0) == (n > 1) for step in taken)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_so_many_workers_with_a_real_network_give_the_bytes_of_one_in_this_process(
    four_cores: Path, small: Path, undisturbed_tiny: Config, tmp_path: Path, n: int
) -> None:
    listening = Listening()
    config = finished(on_ray(small, tmp_path / "target.tif", TINY, max_workers=n), listening)
    assert joined(listening.events) == n
    assert_the_same(config, undisturbed_tiny)


def test_patches_that_do_not_fit_into_the_object_store_are_spilled_and_none_is_made_twice(
    four_cores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patches of 12.6 MB in a store of 128 MB, and a row of them is kept."""
    wide = write_raster(tmp_path / "wide.tif", pattern(3, 640, 2560, "uint8"))
    options = {"grid": {"block": 64}, "sampling": {"steps": 1, "color": "none"}, "run": {"commit_seconds": 0}}
    expected = run(rehearsal(wide, tmp_path / "undisturbed.tif", **options)).read_bytes()
    asked: list[Any] = []
    ask = RayWorkers.ask

    def counted(workers: RayWorkers, worker: int, method: str, *args: Any) -> Any:
        if method.endswith("_patch"):
            asked.append((method, *args))
        return ask(workers, worker, method, *args)

    monkeypatch.setattr(RayWorkers, "ask", counted)
    spilled: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, UnitsDone) and event.stage == "decode":
            spilled.append(sum(path.stat().st_size for path in four_cores.rglob("*") if path.is_file()))

    config = on_ray(wide, tmp_path / "target.tif", options, max_workers=2, memory=4.0)
    n_patches = len(make_plan(config).canvas.patches)
    assert run(config, look).read_bytes() == expected
    assert len(asked) == len(set(asked)) == 2 * n_patches  # encoded and decoded
    assert max(spilled) > 12_000_000


class Slow(Worker):
    """Takes its time for a step, as a network would."""

    STEP_S = 0.25

    def interior(self, step: int) -> None:
        until = time.monotonic() + self.STEP_S
        while time.monotonic() < until and not self._gives_up(step):
            time.sleep(0.01)
        super().interior(step)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_make_workers", lambda plan, folder, stopping: RayWorkers(plan, folder, Slow))


def test_stopping_in_the_middle_of_a_round_commits_what_was_done(
    four_cores: Path, slow: None, source: Path, undisturbed: Config, tmp_path: Path
) -> None:
    """Several workers, asked for several steps ahead: they commit the last step that all have taken."""

    class Starting(Listening):
        """Asks to stop in the middle of the third step."""

        second_step = float("inf")

        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, StepTaken) and event.step == 2:
                self.second_step = time.monotonic()

    class Stopping(StopWhen):
        def __call__(self) -> bool:
            return time.monotonic() > listening.second_step + Slow.STEP_S / 2

    listening = Starting()
    config = on_ray(source, tmp_path / "target.tif", OPTIONS, max_workers=3, commit_seconds=1000)
    with pytest.raises(Stopped):
        run(config, listening, Stopping(listening))
    committed = [event.step for event in listening.events if isinstance(event, Committed)]
    assert committed
    assert 2 <= committed[-1] < 5
    again = Listening()
    finished(on_ray(source, tmp_path / "target.tif", OPTIONS, max_workers=2), again)
    (sampling,) = [e for e in again.events if isinstance(e, StageStarted) and e.stage == "sample"]
    assert sampling.done == committed[-1] * 56
    assert_the_same(config, undisturbed)


def test_a_worker_that_hangs_is_found_and_replaced(
    four_cores: Path, slow: None, source: Path, undisturbed: Config, tmp_path: Path
) -> None:
    stopped: list[psutil.Process] = []

    class Hanging(Listening):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, StepTaken) and not stopped:
                children = psutil.Process().children(recursive=True)
                stopped.append(next(p for p in children if p.name().startswith("ray::Slow")))
                stopped[0].suspend()

    listening = Hanging()
    config = on_ray(source, tmp_path / "target.tif", OPTIONS, max_workers=2, hang_seconds=2)
    finished(config, listening)
    assert_the_same(config, undisturbed)
    (left,) = [event for event in listening.events if isinstance(event, WorkerLeft)]
    assert left.why.startswith("it has not answered for ")
    assert not stopped[0].is_running() or stopped[0].status() == psutil.STATUS_ZOMBIE or ended(stopped[0])


def ended(process: psutil.Process) -> bool:
    """Within a while."""
    try:
        process.wait(20)
    except psutil.TimeoutExpired:
        return False
    return True


def test_a_disk_that_refuses_workers_for_a_while_is_waited_for(
    four_cores: Path, slow: None, source: Path, undisturbed: Config, tmp_path: Path
) -> None:
    """Their limit on the size of files is lowered, and lifted again."""
    import resource

    plain = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    limited: list[psutil.Process] = []

    class Refusing(Listening):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, UnitsDone) and event.stage == "encode" and not limited:
                limited.extend(p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Slow"))
                for process in limited:
                    process.rlimit(psutil.RLIMIT_FSIZE, (2000, plain[1]))
            if isinstance(event, Notice) and "trying again" in event.message and self.n_refused == 2:
                for process in limited:
                    process.rlimit(psutil.RLIMIT_FSIZE, plain)

        @property
        def n_refused(self) -> int:
            return sum(isinstance(e, Notice) and "trying again" in e.message for e in self.events)

    listening = Refusing()
    config = on_ray(source, tmp_path / "target.tif", OPTIONS, max_workers=2)
    finished(config, listening)
    assert len(limited) == 2
    assert listening.n_refused >= 2
    assert not [event for event in listening.events if isinstance(event, WorkerLeft)]
    assert_the_same(config, undisturbed)


def test_plans_of_workers_are_those_of_the_driver(source: Path, tmp_path: Path) -> None:
    """What travels to another process arrives as it was."""
    from ray import cloudpickle

    from pipeline.grid import Share
    from stablesr.box import Box

    plan = make_plan(rehearsal(source, tmp_path / "target.tif", **OPTIONS))
    share = Share(plan.canvas, Box(0, 0, 4, 5))
    assert share.tiles
    there: tuple[Plan, Share] = cloudpickle.loads(cloudpickle.dumps((plan, share)))
    assert there == (plan, share)
    assert len(cloudpickle.dumps(share)) < 1000
