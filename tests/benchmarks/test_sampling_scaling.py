"""How sampling scales with the number of workers: real ones on Ray, which sleep in place of a GPU.

In the ordinary run there are one and two, a tile takes 2 ms, and no time is asserted. For figures:

    pytest tests/benchmarks/test_sampling_scaling.py -s --full-size

prints, for 1 to 16 workers of 3 x 3 blocks each and 45 ms a tile, how much of the time of a step the workers spend in
the network, where the rest goes, what the driver takes, and what is sent; and what the simulation predicts
(`simulated`). It takes about ten minutes.
"""

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.events import Event, StepTaken
from pipeline.grid import Share
from pipeline.plan import Plan
from pipeline.rounds import Rounds
from pipeline.signals import NEVER
from pipeline.status import newest_slot
from pipeline.supervisor import Supervisor
from pipeline.workers import Workers
from tests.benchmarks.simulated import Costs, SimulatedStore, SimulatedWorkers
from tests.benchmarks.sleepy import (
    QuickWorker,
    SleepyWorker,
    StepTimes,
    border_bytes,
    encoded,
    sent_bytes,
    sleepy_plan,
)

ray = pytest.importorskip("ray")

STEPS = 4
"""The first is a warm-up, and the driver has nothing left to ask in the last."""

CORES = 16
"""That Ray believes in."""


@pytest.fixture
def ray_of_many() -> Iterator[None]:
    """Of this test's own."""
    ray.init(address="local", num_cpus=CORES, object_store_memory=2**28, include_dashboard=False, log_to_driver=False,
             logging_level="warning")  # fmt: skip
    yield
    ray.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves pipes open
        gc.collect()


@dataclass
class Sampled:
    """What one run of sampling gave."""

    shares: list[Share]
    steps: list[StepTaken]
    told_at: list[tuple[float, float, float]]
    """When a step was told of; CPU seconds until then, of the driver, and of the other processes of Ray."""
    of_workers: list[list[StepTimes]]
    latents: Any


def sampled(plan: Plan, kind: type[SleepyWorker]) -> Sampled:
    """All steps, on as many workers as the plan allows."""
    from pipeline.ray_workers import RayWorkers

    store, steps, told_at = encoded(plan), [], []
    servers = [p for p in psutil.Process().children(recursive=True) if p.name() in ("raylet", "gcs_server")]

    def listen(event: Event) -> None:
        if isinstance(event, StepTaken):
            steps.append(event)
            told_at.append((time.monotonic(), time.process_time(), sum(sum(p.cpu_times()[:2]) for p in servers)))

    workers = RayWorkers(plan, plan.config.folder, kind)
    try:
        supervisor = Supervisor(plan, store, workers, listen, NEVER)
        crew = workers.live()
        assert len(crew) == plan.config.run.max_workers
        rounds = Rounds(plan, store, supervisor, 0)
        rounds.run()
        of_workers = supervisor.gather([workers.ask(worker, "step_times") for worker in crew])
    finally:
        workers.close()
    slot, step = newest_slot(store, 0)
    assert step == plan.steps
    latents = store.read(f"latents/0/{slot}", plan.canvas.latents)
    boxes, _ = plan.rectangles([1.0] * len(crew), rounds._loads)
    return Sampled([Share(plan.canvas, box) for box in boxes], steps, told_at, of_workers, latents)


def test_one_and_two_workers_make_the_same_latents_and_send_what_the_formula_says(
    ray_of_many: None, tmp_path: Path
) -> None:
    plans = [sleepy_plan(tmp_path / str(n), 2, 4, block=64, tile=32, steps=3, max_workers=n) for n in (1, 2)]
    alone, together = (sampled(plan, QuickWorker) for plan in plans)
    np.testing.assert_array_equal(together.latents, alone.latents)
    assert np.isfinite(alone.latents).all()
    n_tiles = len(plans[0].canvas.tiles)
    assert [step.tiles for step in alone.steps + together.steps] == [n_tiles] * 6
    assert [step.sent_bytes for step in alone.steps] == [0] * 3
    assert [step.sent_bytes for step in together.steps] == [sent_bytes(together.shares)] * 3
    assert sent_bytes(together.shares) == border_bytes(border=128, lines=1, crossings=0, tile=32)
    assert all(len(steps) == 3 for steps in alone.of_workers + together.of_workers)


SIDE = 3
"""Blocks of a worker, along a side."""

ARRANGED = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4)}
"""Rows and columns of shares, by number of workers."""


@dataclass
class Figures:
    """Of a step, but for the first; seconds."""

    n: int
    n_tiles: int
    busiest: int
    """Tiles of the worker that has most."""
    step_s: float
    in_network_s: float
    """Of a worker, on average."""
    predicting_s: float
    """For each tile: the network, and cutting out, blending and stepping on the processor meanwhile."""
    waited_s: float
    finishing_s: float
    computing_s: float
    """CPU, of a worker."""
    driver: float
    """CPU seconds of the driver for each second."""
    servers: float
    """The same of Ray's own processes."""
    sent: int

    @property
    def efficiency(self) -> float:
        return self.in_network_s / self.step_s

    @property
    def evenness(self) -> float:
        """What the efficiency would be if nothing took time but tiles."""
        return self.n_tiles / self.n / self.busiest


def figures(run: Sampled, tile_s: float) -> Figures:
    n, steps, workers = len(run.shares), run.steps[1:], [steps[1:] for steps in run.of_workers]
    tiles = [share.n_tiles for share in run.shares]
    told = [(end - start) for start, end in zip(run.told_at[0], run.told_at[-2], strict=True)]
    assert {step.sent_bytes for step in steps} == {sent_bytes(run.shares)}
    return Figures(
        n=n,
        n_tiles=sum(tiles),
        busiest=max(tiles),
        step_s=mean(step.seconds for step in steps),
        in_network_s=tile_s * sum(tiles) / n,
        predicting_s=mean(step.predicting_s for step in steps) / sum(tiles),
        waited_s=mean(step.waited for worker in workers for step in worker),
        finishing_s=mean(step.finishing for worker in workers for step in worker),
        computing_s=mean(step.computing for worker in workers for step in worker),
        driver=told[1] / told[0],
        servers=told[2] / told[0],
        sent=steps[0].sent_bytes,
    )


def predicted(plan: Plan, n: int, tile_s: float, finishing_s: float) -> float:
    """Seconds of a step, as the simulation has it."""
    steps: list[StepTaken] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepTaken):
            steps.append(event)

    store = SimulatedStore(plan)
    workers = SimulatedWorkers(plan, store, [1.0] * n, Costs(tile=tile_s, finishing=finishing_s))
    Rounds(plan, store, Supervisor(plan, store, workers, listen, NEVER, workers.clock), 0).run()
    return mean(step.seconds for step in steps[1:])


def test_full_size(ray_of_many: None, tmp_path: Path, full_size: bool) -> None:
    if not full_size:
        pytest.skip("figures are taken with --full-size")
    print(f"\n{SleepyWorker.tile_s * 1e3:.0f} ms a tile; {SIDE} x {SIDE} blocks for each worker")
    alone = None
    for n, (rows, columns) in ARRANGED.items():
        plan = sleepy_plan(tmp_path / str(n), SIDE * rows, SIDE * columns, steps=STEPS, max_workers=n)
        found = figures(sampled(plan, SleepyWorker), SleepyWorker.tile_s)
        alone = alone or found
        side, inner = SIDE * plan.canvas.block, (rows - 1, columns - 1)
        borders = side * (inner[0] * columns + inner[1] * rows)
        assert found.sent == border_bytes(borders, sum(inner), inner[0] * inner[1])
        step_s = predicted(plan, n, alone.predicting_s, alone.finishing_s)
        print(
            f"{n:3d} workers: {found.n_tiles} tiles, step {found.step_s:.3f} s (simulated {step_s:.3f}), efficiency"
            f" {found.efficiency:.3f} (evenness alone {found.evenness:.3f}); tiles a second and worker, of those of one"
            f" {found.efficiency / alone.efficiency:.3f}; a tile {found.predicting_s * 1e3:.2f} ms; CPU of a worker"
            f" {found.computing_s:.2f} s; waited for neighbours {found.waited_s * 1e3:.0f} ms, finishing"
            f" {found.finishing_s * 1e3:.0f} ms; driver {found.driver:.4f}, Ray {found.servers:.4f} of a core; sent"
            f" {found.sent / 2**20:.2f} MiB; {os.getloadavg()[0]:.1f} processes want a core",
            flush=True,
        )


def took(what: str, n: int, work: Callable[[], Any]) -> Any:
    """Print what each of `n` things took."""
    clocks = time.thread_time, time.process_time, time.monotonic
    starts = [clock() for clock in clocks]
    result = work()
    times = [(clock() - start) / n * 1e6 for clock, start in zip(clocks, starts, strict=True)]
    print("{}: {:.1f} us of the thread, {:.1f} of the process; {:.1f} passed".format(what, *times))
    return result


def test_what_asking_costs(ray_of_many: None, tmp_path: Path, full_size: bool) -> None:
    """CPU time of the driver, of the thread that asks and of all threads of its process; see `simulated.Asking`."""
    if not full_size:
        pytest.skip("figures are taken with --full-size")
    from pipeline.ray_workers import RayWorkers

    plan = sleepy_plan(tmp_path, 2, 2, block=64, tile=32, steps=1, max_workers=8)
    workers = RayWorkers(plan, plan.config.folder, QuickWorker)
    try:
        crew = workers.live()
        for _ in range(2):
            print()
            ask_and_look(workers, crew)
        for _ in range(5):
            time.sleep(1.1)
            took("a pulse", len(crew), workers.watch)
    finally:
        workers.close()


def ask_and_look(workers: Workers, crew: list[int], each: int = 250) -> None:
    n = each * len(crew)

    def ask(method: str, *args: Any) -> list[Any]:
        return [workers.ask(worker, method, *args) for _ in range(each) for worker in crew]

    def await_all(handles: list[Any]) -> None:
        for handle in handles:
            workers.wait([handle], 60.0)

    handles = took("a call", n, lambda: ask("written"))
    await_all(handles)
    took("an answer", n, lambda: [workers.get(handle) for handle in handles])
    await_all(took("a call with 25 handles", n, lambda: ask("ignore", *handles[:25])))
    parts = took("a call of 9 parts", n, lambda: [workers.ask_for(9, crew[0], "parts", 9) for _ in range(n)])
    await_all([part for group in parts for part in group])
    busy = ask("nap", 0.02)
    took(f"a look at one of {n} handles", 20 * n, lambda: [workers.wait(busy, 0.0) for _ in range(20)])
    await_all(busy)
