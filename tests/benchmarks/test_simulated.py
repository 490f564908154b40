"""A thousand workers and a terapixel, simulated under the real driver: how it scales, and what breaks first.

In the ordinary run there are a few workers and a small raster: the simulation is held against workers in this process.
For figures:

    pytest tests/benchmarks/test_simulated.py -s --full-size

prints, for 1 to 1,000 workers and a target of 10^6 x 10^6 pixels, how long each stage takes and how busy the driver is;
and how long the driver takes for the markers of as many blocks, on disk. It takes about five minutes.
"""

import contextlib
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Stopped
from pipeline.events import Committed, Event, StepTaken, UnitsDone, WorkerLeft
from pipeline.grid import Loads, Share, neighbours
from pipeline.plan import Plan, make_plan
from pipeline.rounds import LONGEST_COMMIT_INTERVAL_S, Rounds
from pipeline.run import _Driver
from pipeline.signals import NEVER
from pipeline.stages import encode, ingest
from pipeline.status import newest_slot, stage_counts
from pipeline.store import RunStore, _sealed
from pipeline.supervisor import Supervisor
from pipeline.workers import LocalWorkers
from stablesr import PRESETS
from tests.benchmarks.simulated import Costs, SimulatedStore, SimulatedWorkers
from tests.benchmarks.sleepy import SleepyNetwork, encoded, sleepy_plan
from tests.pipeline.rasters import pattern, rehearsal, write_raster


class Events(list[Event]):
    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def steps(self) -> list[StepTaken]:
        return [event for event in self if isinstance(event, StepTaken)]


def no_time() -> float:
    return 0.0


def simulated_sampling(plan: Plan, speeds: list[float], **options: Any) -> tuple[SimulatedWorkers, Events]:
    """All steps, by workers that take 45 ms for a tile; the driver takes no time but for what it asks."""
    store, events = SimulatedStore(plan), Events()
    workers = SimulatedWorkers(plan, store, speeds, Costs(), **{"thread_time": no_time, **options})
    Rounds(plan, store, Supervisor(plan, store, workers, events, NEVER, workers.clock), 0).run()
    assert newest_slot(store, 0)[1] == plan.steps
    return workers, events


# The same as real workers


class Recording(LocalWorkers):
    """Knows what was asked, like those that are simulated."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.asked: list[tuple[int, str]] = []
        super().__init__(*args, **options)

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        self.asked.append((worker, method))
        return super().ask(worker, method, *args)


@pytest.mark.parametrize("n", [1, 3])
def test_the_driver_asks_for_the_same_steps_as_of_real_workers(n: int, tmp_path: Path) -> None:
    plan = sleepy_plan(tmp_path, 2, 3, block=32, tile=16, steps=3)
    store, real_events = encoded(plan), Events()
    real = Recording(plan, plan.config.folder, n)
    for worker in real._workers.values():
        worker.context.network = SleepyNetwork(0.0)
    Rounds(plan, store, Supervisor(plan, store, real, real_events, NEVER), 0).run()
    workers, events = simulated_sampling(plan, [1.0] * n, steps_ahead=1)
    assert workers.asked == real.asked
    assert [(step.step, step.tiles, step.sent_bytes) for step in events.steps] == [
        (step.step, step.tiles, step.sent_bytes) for step in real_events.steps
    ]


@pytest.mark.parametrize("memory", [4.0, 1e-4], ids=["patches-are-kept", "patches-are-dropped"])
def test_the_driver_asks_for_the_same_patches_and_blocks_as_of_a_real_worker(memory: float, tmp_path: Path) -> None:
    source = write_raster(tmp_path / "source.tif", pattern(3, 100, 140, "uint8"))
    plan = make_plan(rehearsal(source, tmp_path / "t.tif", sampling={"patch": 16}, run={"memory": memory}))
    store, simulated_store = RunStore(plan.config.folder), SimulatedStore(plan)
    for stage in (ingest, encode):
        stage.create_arrays(plan, store)
    real = Recording(plan, plan.config.folder)
    workers = SimulatedWorkers(plan, simulated_store, [1.0], Costs(), spills=False, thread_time=no_time)
    driver = _Driver(plan, store, Supervisor(plan, store, real, Events(), NEVER))
    driver._ingest()
    driver._fix_stretch()
    real.asked.clear()
    driver._encode(0)
    _Driver(plan, simulated_store, Supervisor(plan, simulated_store, workers, Events(), NEVER, workers.clock))._encode(
        0
    )
    assert {method for _, method in real.asked} == {"encode_patch", "encode_block"}
    assert workers.asked == real.asked


# Time


def efficiency(plan: Plan, events: Events, n: int) -> float:
    """Of the steps, but for the first."""
    in_network = sum(step.predicting_s for step in events.steps[1:]) / n
    return in_network / sum(step.seconds for step in events.steps[1:])


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_most_of_the_time_is_the_networks(n: int, tmp_path: Path) -> None:
    plan = sleepy_plan(tmp_path, 8, 8, steps=4)
    _, events = simulated_sampling(plan, [1.0] * n)
    assert [step.step for step in events.steps] == [1, 2, 3, 4]
    assert {step.tiles for step in events.steps} == {len(plan.canvas.tiles)}
    assert 0.5 < efficiency(plan, events, n) <= 1.0 + 1e-9
    shares = [Share(plan.canvas, box) for box in plan.rectangles([1.0] * n)[0]]
    busiest = max(share.n_tiles for share in shares) * Costs().tile
    for step in events.steps[1:]:
        assert 0.9999 * busiest < step.seconds < 1.02 * busiest


def test_a_worker_that_is_half_as_fast_is_given_half_as_much(tmp_path: Path) -> None:
    plan = sleepy_plan(tmp_path, 6, 6, steps=12, commit_seconds=0)
    workers, events = simulated_sampling(plan, [1.0, 0.5])
    first, last = events.steps[0].seconds, events.steps[-1].seconds
    assert last == pytest.approx(first * 2 / 3, rel=0.05)
    assert workers.asked.count((0, "load")) == 2
    never, _ = simulated_sampling(sleepy_plan(tmp_path / "never", 6, 6, steps=12), [1.0, 0.5])  # nothing is committed
    assert workers.now < 0.8 * never.now


def test_half_as_much_are_half_the_blocks(tmp_path: Path) -> None:
    plan = sleepy_plan(tmp_path, 6, 6, steps=2)
    quick, slow = (box.height * box.width for box in plan.rectangles([1.0, 0.5])[0])
    assert (quick, slow) == (24, 12)


# Losses


@pytest.mark.parametrize("moment", [0.3, 10.0, 25.0, 40.0])
def test_a_worker_that_dies_in_the_middle_is_done_without(moment: float, tmp_path: Path) -> None:
    plan = sleepy_plan(tmp_path, 4, 4, steps=6, commit_seconds=0)
    whole, _ = simulated_sampling(plan, [1.0] * 4)
    workers, events = simulated_sampling(plan, [1.0] * 4, deaths={2: moment})
    assert [event.worker for event in events if isinstance(event, WorkerLeft)] == [2]
    assert workers.live() == [0, 1, 3]
    assert events.steps[-1].step == 6
    assert whole.now < workers.now < 2 * whole.now
    after = [worker for worker, method in workers.asked if method == "load"][4:]
    assert after == [0, 1, 3]


def test_a_stop_ends_where_all_have_been(tmp_path: Path) -> None:
    plan = sleepy_plan(tmp_path, 4, 4, steps=6)
    store, events = SimulatedStore(plan), Events()
    workers = SimulatedWorkers(plan, store, [1.0, 0.7, 1.0], Costs(), thread_time=no_time)

    class AfterAWhile:
        def __call__(self) -> bool:
            return workers.now > 60.0

        def install(self) -> None: ...

    with pytest.raises(Stopped):
        Rounds(plan, store, Supervisor(plan, store, workers, events, AfterAWhile(), workers.clock), 0).run()
    step = newest_slot(store, 0)[1]
    assert step == len(events.steps) > 0
    assert workers.now < 60.0 + 2 * events.steps[0].seconds


# A terapixel

SIDE = 250_000
"""Of the source, in pixels; the target has four times as many."""

STEPS = 200

GPU = Costs(
    tile=0.010,
    encode_patch=0.045,
    decode_patch=0.200,
    block={"ingest_block": 0.3, "encode_block": 0.02, "decode_block": 0.4, "overview_block": 0.1},
)
"""Stated, not measured: a GPU that does 100 TFLOP/s (a tile's step is 1 TFLOP, a patch of 1024 x 1024 pixels 4.5 to
encode and 20 to decode), processors as in 2026-11-23-pipeline.md, 1 GB/s to a disk that all share at 10 GB/s, and a
network of 10 Gbit/s."""

HALF = replace(GPU, tile=GPU.tile / 2, encode_patch=GPU.encode_patch / 2, decode_patch=GPU.decode_patch / 2)
"""A GPU twice as fast."""

EXPORT_S = (0.0025, 0.0116)
"""For a megapixel and a byte of a pixel, of the one process that writes the file: plain BigTIFF, and a COG; as in
2026-11-23-pipeline.md, where a pixel has 8 bytes."""


def terapixel(folder: Path, steps: int, **run: Any) -> Plan:
    """Three bands of bytes. Plans of so much are not made where there is no room for it."""
    source = write_raster(folder / "source.tif", pattern(3, 64, 64, "uint8"))
    options = {"workers": "ray", **run}
    config = rehearsal(source, folder / "target.tif", sampling={"steps": steps}, grid={"block": 256})
    small = make_plan(config.model_copy(update={"run": config.run.model_copy(update=options)}))
    header = small.header.model_copy(update={"height": SIDE, "width": SIDE})
    return small.model_copy(update={"header": header, "network": PRESETS["sd21-512"].to_json()})


class Passing:
    """What has been done when, and how busy the driver was; stops after some units."""

    def __init__(self, workers: SimulatedWorkers, most: int = 10**9) -> None:
        self.workers, self.most, self.n_units = workers, most, 0
        self.units: list[tuple[float, float, int]] = []
        """When each was done; seconds that the driver was busy until then, and calls."""
        self.steps: list[StepTaken] = []
        self.commits: list[Committed] = []

    def __call__(self, event: Event | None = None) -> bool:
        if isinstance(event, UnitsDone):
            self.n_units += 1
            self.units.append((self.workers.now, self.workers.driver_s, self.workers.n_calls))
        elif isinstance(event, StepTaken):
            self.steps.append(event)
        elif isinstance(event, Committed):
            self.commits.append(event)
        return self.n_units >= self.most

    def install(self) -> None: ...

    def rates(self) -> tuple[float, float, float]:
        """Units a second, the driver's busy seconds of each, and its calls for a unit, in the second half."""
        (begun, busy, calls), (ended, busy_then, calls_then) = self.units[len(self.units) // 2 - 1], self.units[-1]
        n = len(self.units) - len(self.units) // 2
        return n / (ended - begun), (busy_then - busy) / (ended - begun), (calls_then - calls) / n


def blocks_a_second(plan: Plan, stage: str, n: int, costs: Costs) -> tuple[float, float, float]:
    """Of a stage in its steady state: blocks a second; how busy the driver is; its calls for a block."""
    store = SimulatedStore(plan)
    workers = SimulatedWorkers(plan, store, [1.0] * n, costs)
    passing = Passing(workers, most=max(8 * n, 100))
    if stage == "decode":
        store.mark("sample/0/a", {"step": plan.steps, "checksums": {}})
    driver = _Driver(plan, store, Supervisor(plan, store, workers, passing, passing, workers.clock))
    with contextlib.suppress(Stopped):
        {"encode": driver._encode, "decode": driver._decode}.get(stage, lambda _: driver._ingest())(0)
    return passing.rates()


def test_terapixel(tmp_path: Path, full_size: bool) -> None:
    if not full_size:
        pytest.skip("figures are taken with --full-size")
    for costs in (GPU, HALF):
        for n in (1, 10, 100, 350, 1000):
            print(f"\n{n} workers, {costs.tile * 1e3:.0f} ms a tile", flush=True)
            print_stages(tmp_path, n, costs)


def print_stages(folder: Path, n: int, costs: Costs) -> None:
    plan = terapixel(folder, steps=4, commit_seconds=1e6)
    hours = {}
    for stage in ("ingest", "encode", "decode"):
        rate, busy, calls = blocks_a_second(plan, stage, n, costs)
        hours[stage] = len(plan.blocks_of(f"{stage}/0" if stage != "ingest" else stage)) / rate / 3600
        print(
            f"  {stage}: {rate:.1f} blocks/s, driver {busy:.2f} busy, {calls:.1f} calls a block, {hours[stage]:.2f} h"
        )
    store = SimulatedStore(plan)
    workers = SimulatedWorkers(plan, store, [1.0] * n, costs)
    passing = Passing(workers)
    Rounds(plan, store, Supervisor(plan, store, workers, passing, passing, workers.clock), 0).run()
    ideal = len(plan.canvas.tiles) * costs.tile / n
    loads = Rounds(plan, store, Supervisor(plan, store, workers, passing, passing), 0)._loads
    rectangles, resident = plan.rectangles([1.0] * n, loads)
    if resident:
        step_s, commit_s = passing.steps[-1].seconds, passing.commits[-1].seconds
        shares = [Share(plan.canvas, box) for box in rectangles]
        uneven = max(share.n_tiles for share in shares) * n / len(plan.canvas.tiles)
        every = max(LONGEST_COMMIT_INTERVAL_S, step_s)
        hours["sample"] = STEPS * step_s * (1 + commit_s / every) / 3600
        print(f"    resident, {passing.steps[-1].sent_bytes / 1e9:.1f} GB sent a step; busiest worker {uneven:.3f} of"
              f" average; a commit {commit_s:.0f} s")  # fmt: skip
    else:
        step_s = passing.commits[-1].seconds
        hours["sample"] = STEPS * step_s / 3600
        print(f"    streamed in {len(rectangles)} shares")
    print(f"  sample: a step {step_s:.1f} s, efficiency {ideal / step_s:.3f}, driver busy {workers.driver_s:.0f} of"
          f" {workers.now:.0f} s, {hours['sample']:.1f} h")  # fmt: skip
    megapixels, pixel = SIDE**2 * 16 / 1e6, len(plan.header.bands)
    plain, cog = (megapixels * each * pixel / 3600 for each in EXPORT_S)
    total = sum(hours.values())
    print(f"  together {total:.1f} h; then one process writes the file: {plain:.1f} h plain, {cog:.1f} h as COG")


def test_markers_of_a_terapixel(tmp_path: Path, full_size: bool) -> None:
    if not full_size:
        pytest.skip("figures are taken with --full-size")
    plan = terapixel(tmp_path, steps=STEPS)
    store, blocks = RunStore(tmp_path / "run"), plan.canvas.blocks

    def took(what: str, work: Callable[[], Any]) -> Any:
        started, computed = time.monotonic(), time.process_time()
        result = work()
        print(f"  {what}: {time.monotonic() - started:.2f} s, CPU {time.process_time() - computed:.2f} s", flush=True)
        return result

    def write_all(stage: str) -> None:
        folder = store.folder / "done" / stage
        folder.mkdir(parents=True)
        for row, column in blocks:
            text = _sealed({"checksums": {f"{stage}": 2**32 - 1 - column}})
            (folder / f"{row}-{column}.json").write_text(text)

    print(f"\n{len(blocks)} blocks")
    took("writing a stage's markers, not synced", lambda: write_all("encode/0"))
    assert len(took("finished", lambda: store.finished("encode/0"))) == len(blocks)
    took("counting", lambda: store.n_marked("encode/0"))
    checksums = {f"{row}-{column}": 2**32 - 1 - column for row, column in blocks}
    took("sealing a commit", lambda: store.mark("sample/0/a", {"step": 1, "checksums": checksums}))
    print(f"  its marker has {(store.folder / 'done/sample/0/a.json').stat().st_size / 2**20:.1f} MiB")
    took("reading it", lambda: newest_slot(store, 0))
    took("all units of all stages, counted", lambda: stage_counts(plan, store))
    loads = took("tiles of all blocks", lambda: Loads.of_tiles(plan.canvas))
    for n in (16, 1000):
        boxes = took(f"shares for {n} workers", lambda n=n: plan.rectangles([1.0] * n, loads)[0])
        took("who is next to whom", lambda boxes=boxes: neighbours([Share(plan.canvas, box) for box in boxes]))
    took("taking back a stage", lambda: store.unmark("encode/0"))
    print(f"  peak of memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
