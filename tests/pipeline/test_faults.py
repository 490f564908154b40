"""Workers that die, blocks that fail, disks that refuse: the same bits, and nothing finished is done twice."""

import errno
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import supervisor as supervisor_module
from pipeline.config import Config
from pipeline.errors import BlockFailed, StoreFailed, WorkFailed
from pipeline.events import Committed, Event, Notice, StepTaken, UnitsDone, WorkerJoined
from pipeline.network import Nearest
from pipeline.plan import make_plan, read_plan
from pipeline.run import run
from pipeline.store import RunStore
from pipeline.supervisor import RETRIES
from pipeline.worker import Worker
from pipeline.workers import LocalWorkers
from tests.pipeline.faults import Asked, Fate, FaultyWorkers, losses, set_fate
from tests.pipeline.rasters import Death, Listening, pattern, read_raster, rehearsal, write_raster

Fated = Callable[..., list[FaultyWorkers]]

OPTIONS: dict[str, Any] = {
    "bands": (1,),
    "grid": {"block": 32},
    "sampling": {"steps": 4, "patch": 32, "overlap": 48, "seed": 11, "color": "none"},
    "run": {"commit_seconds": 0, "patience_seconds": 5.0},
}
"""A canvas of 75 x 88 latents: 2 x 3 tiles, 3 x 3 blocks."""

RESIDENT_AND_STREAMED = pytest.mark.parametrize(
    "memory", [pytest.param(4.0, id="resident"), pytest.param(5e-4, id="streamed")]
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = pattern(1, 150, 176, "uint16").clip(1)
    values[:, 20:70, 90:] = 0
    return write_raster(tmp_path_factory.mktemp("source") / "source.tif", values, nodata=0)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run(rehearsal(source, tmp_path_factory.mktemp("undisturbed") / "target.tif", **OPTIONS)).read_bytes()


@pytest.fixture
def config(source: Path, tmp_path: Path) -> Config:
    return rehearsal(source, tmp_path / "target.tif", **OPTIONS)


@pytest.fixture
def fated(monkeypatch: pytest.MonkeyPatch) -> Fated:
    """Has runs use workers with a fate; gives the list that they will be in."""

    def start(fate: Fate, n: int = 2, kind: type[FaultyWorkers] = FaultyWorkers) -> list[FaultyWorkers]:
        return set_fate(monkeypatch, fate, n, kind)

    return start


def with_run(config: Config, **options: Any) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update=options)})


class Marked:
    """How often each block was marked as done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: Counter[str] = Counter()
        mark = Worker._mark

        def counted(worker: Worker, unit: str, payload: dict[str, Any]) -> None:
            mark(worker, unit, payload)
            self.blocks[unit] += 1

        monkeypatch.setattr(Worker, "_mark", counted)


def n_asked(config: Config, fated: Fated, n: int) -> int:
    """Questions of an undisturbed run."""
    made = fated(lambda asked: None, n)
    run(config)
    return made[0].n_asked


# Lost workers


@RESIDENT_AND_STREAMED
@pytest.mark.parametrize("how", ["before", "after", "node"])
def test_a_worker_that_dies_at_any_question_leaves_no_trace(
    config: Config,
    undisturbed: bytes,
    fated: Fated,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    memory: float,
) -> None:
    config = with_run(config, memory=memory)
    count = n_asked(config, fated, 2)
    Path(config.output).unlink()
    chance = random.Random(f"{how} {memory}")
    for at in sorted({0, count - 1, *chance.sample(range(count), 5)}):
        marked, listening = Marked(monkeypatch), Listening()
        fated(lambda asked, at=at: how if asked.n == at else None)
        assert run(config, listening).read_bytes() == undisturbed
        Path(config.output).unlink()
        assert losses(listening.events) == 1
        assert set(marked.blocks.values()) == {1}, f"died at question {at}"


def test_many_workers_that_die_all_the_time_come_to_the_end(
    config: Config,
    undisturbed: bytes,
    fated: Fated,
) -> None:
    chance = random.Random(5)
    fated(lambda asked: chance.choice(["before", "after", "node"]) if chance.random() < 0.04 else None, 5)
    listening = Listening()
    assert run(config, listening).read_bytes() == undisturbed
    assert losses(listening.events) >= 5


def test_steps_that_were_lost_are_told_of(
    config: Config,
    fated: Fated,
) -> None:
    """Progress goes back, and forth again."""
    seen: list[str] = []

    def fate(asked: Asked) -> str | None:
        seen.append(asked.method)
        return "before" if seen.count("advance") == 6 and asked.method == "advance" else None

    fated(fate)
    listening = Listening()
    run(with_run(config, commit_seconds=1000), listening)
    done = [event.n for event in listening.events if isinstance(event, UnitsDone) and event.stage == "sample"]
    assert done[:3] == [9, 9, -18]  # two steps of 9 blocks, of which none was committed
    assert sum(done) == 4 * 9
    (warning,) = [e.message for e in listening.events if isinstance(e, Notice) and "sampling goes on" in e.message]
    assert warning == "sampling goes on from step 0 of 4; 2 more are taken again: a worker died"


def test_after_a_loss_commits_are_made_soon_and_then_less_and_less_often(
    source: Path,
    tmp_path: Path,
    fated: Fated,
) -> None:
    seen: list[str] = []

    def fate(asked: Asked) -> str | None:
        seen.append(asked.method)
        return "before" if seen.count("load") == 2 and asked.method == "load" else None

    fated(fate)
    options = {**OPTIONS, "sampling": {**OPTIONS["sampling"], "steps": 16}}
    listening = Listening()
    run(rehearsal(source, tmp_path / "target.tif", **{**options, "run": {"commit_seconds": 1000}}), listening)
    committed = [event.step for event in listening.events if isinstance(event, Committed)]
    assert committed == [1, 3, 7, 15, 16]


@pytest.mark.parametrize("method", ["ingest_block", "encode_block", "decode_block", "overview_block"])
def test_a_block_that_ends_its_worker_every_time_ends_the_run_with_its_name(
    config: Config,
    fated: Fated,
    undisturbed: bytes,
    method: str,
) -> None:
    stage = {"ingest_block": "ingest", "overview_block": "overviews/1"}.get(
        method, method.removesuffix("_block") + "/0"
    )

    def fate(asked: Asked) -> str | None:
        return "before" if asked.method == method and (asked.args[0] == 0 or stage in ("ingest", "overviews/1")) and (
            (0, 0) in asked.args[:2]
        ) else None  # fmt: skip

    fated(fate)
    listening = Listening()
    with pytest.raises(
        BlockFailed, match=rf"block \(0, 0\) of {stage} \(window of the .*rows 0 to .*; seed 11\)"
    ) as caught:
        run(config, listening)
    assert (caught.value.stage, caught.value.index) == (stage, (0, 0))
    assert "failed 4 times; the last time: a worker died\nhint" in str(caught.value)
    assert losses(listening.events) == RETRIES + 1
    fated(lambda asked: None)
    assert run(config).read_bytes() == undisturbed


def test_a_share_that_ends_its_worker_every_time_ends_the_run_with_its_name(
    config: Config,
    fated: Fated,
) -> None:
    def fate(asked: Asked) -> str | None:
        return "before" if asked.method == "interior" and asked.args[0] == 2 and asked.n % 2 else None

    fated(fate)
    with pytest.raises(
        BlockFailed, match=r"of sample/0 \(window of the target: rows \d+ to .*; seed 11\) failed 4 times"
    ):
        run(config)


# What nobody expected


@RESIDENT_AND_STREAMED
def test_an_unexpected_error_is_tried_again_with_another_worker(
    config: Config,
    undisturbed: bytes,
    fated: Fated,
    monkeypatch: pytest.MonkeyPatch,
    memory: float,
) -> None:
    """Once in the autoencoder and once in the UNet."""
    raised = []

    def failing_once(name: str) -> None:
        method = getattr(Nearest, name)

        def fails(network: Nearest, *args: Any) -> Any:
            if name not in raised:
                raised.append(name)
                raise RuntimeError("an illegal memory access was encountered")
            return method(network, *args)

        monkeypatch.setattr(Nearest, name, fails)

    for name in ("encode", "predict_tiles", "decode"):
        failing_once(name)
    fated(lambda asked: None)
    listening = Listening()
    assert run(with_run(config, memory=memory), listening).read_bytes() == undisturbed
    assert len(raised) == 3
    assert 3 <= losses(listening.events) <= 5  # a patch that fails, fails for the blocks of both workers
    told = [event.message for event in listening.events if isinstance(event, Notice) and event.warning]
    assert 3 <= sum("illegal memory access" in message for message in told) <= 5


@RESIDENT_AND_STREAMED
def test_an_error_that_comes_every_time_names_the_block_its_window_and_the_seed(
    config: Config, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, memory: float
) -> None:
    config = with_run(config, memory=memory)
    predict_tiles = Nearest.predict_tiles

    def fails(network: Nearest, tiles: Any, *args: Any) -> Any:
        for prediction in predict_tiles(network, tiles, *args):
            if prediction.tile.left == 16:
                raise RuntimeError("no")
            yield prediction

    with monkeypatch.context() as patch:
        patch.setattr(Nearest, "predict_tiles", fails)
        with pytest.raises(
            BlockFailed, match=r"block \(\d, \d\) of sample/0 \(window of the target: rows .*seed 11\)"
        ) as caught:
            run(config)
    assert "failed 4 times; the last time: " in str(caught.value)
    assert "RuntimeError: no" in str(caught.value)
    assert run(config).read_bytes() == undisturbed


# Memory of a GPU


@RESIDENT_AND_STREAMED
def test_where_memory_runs_out_batches_are_halved_and_stay_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: bytes, memory: float
) -> None:
    predict_tiles, batches = Nearest.predict_tiles, []

    def too_large(network: Nearest, tiles: Any, *args: Any) -> Any:
        batches.append(args[-1])
        if args[-1] > 2:
            yield from predict_tiles(network, tiles[:2], *args)  # and then the third is too much
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from predict_tiles(network, tiles, *args)

    monkeypatch.setattr(Nearest, "predict_tiles", too_large)
    options = {**OPTIONS, "sampling": {**OPTIONS["sampling"], "batch": 8}}
    options["run"] = {**OPTIONS["run"], "memory": memory}
    target = run(rehearsal(source, tmp_path / "target.tif", **options))
    assert batches[:3] == [8, 4, 2]
    assert set(batches[3:]) == {2}
    (tmp_path / "undisturbed.tif").write_bytes(undisturbed)  # whose provenance says another batch
    np.testing.assert_array_equal(read_raster(target), read_raster(tmp_path / "undisturbed.tif"))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("predict_tiles", r"cpu has too little memory for one tile of 64 x 64 latents[\s\S]*--precision bfloat16"),
        ("encode", r"cpu has too little memory for a patch of 32 x 32 latents[\s\S]*--patch 16"),
        ("decode", r"cpu has too little memory for a patch of 32 x 32 latents[\s\S]*--patch 16"),
    ],
)
def test_where_nothing_can_be_halved_the_error_says_what_to_lower(
    config: Config, monkeypatch: pytest.MonkeyPatch, method: str, words: str
) -> None:
    def too_large(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Nearest, method, too_large)
    with pytest.raises(WorkFailed, match=words):
        run(config)


# A disk that refuses for a while


class Refusing:
    """The disk takes nothing for a number of writes, once it has taken so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, n: int) -> None:
        self.n_writes, self.refused = 0, 0
        replace, os_replace = Path.replace, os.replace

        def refuses() -> bool:
            self.n_writes += 1
            if after < self.n_writes <= after + n:
                self.refused += 1
                return True
            return False

        def of_zarr(path: Path, target: Any) -> Any:
            if refuses():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return replace(path, target)

        def of_markers(a: Any, b: Any) -> None:
            if str(b).endswith(".json") and "done" in str(b) and refuses():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            os_replace(a, b)

        monkeypatch.setattr(Path, "replace", of_zarr)
        monkeypatch.setattr(os, "replace", of_markers)


@RESIDENT_AND_STREAMED
def test_a_disk_that_refuses_for_a_while_is_waited_for(
    config: Config, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, memory: float
) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE_S", 0.001)
    config = with_run(config, memory=memory)
    with monkeypatch.context() as patch:
        counting = Refusing(patch, after=10**9, n=0)
        run(config)
    Path(config.output).unlink()
    for after in random.Random(memory).sample(range(counting.n_writes), 4):
        with monkeypatch.context() as patch:
            refusing, listening = Refusing(patch, after, 3), Listening()
            assert run(config, listening).read_bytes() == undisturbed
        assert refusing.refused == 3
        told = [
            event.message for event in listening.events if isinstance(event, Notice) and "trying again" in event.message
        ]
        assert len(told) >= 1
        assert all("failed: No space left" in line or "failed: Input/output error" in line for line in told)
        Path(config.output).unlink()


def test_steps_in_memory_outlive_a_disk_that_refuses_their_commit(
    config: Config, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_PAUSE_S", 0.001)
    commit, refused = RunStore.write, []

    def refuses(store: RunStore, name: str, *args: Any) -> int:
        if name == "latents/0/a" and len(refused) < 3:
            refused.append(name)
            raise StoreFailed("writing latents failed: No space left on device\nhint: make room")
        return commit(store, name, *args)

    monkeypatch.setattr(RunStore, "write", refuses)
    listening = Listening()
    assert run(with_run(config, commit_seconds=1000), listening).read_bytes() == undisturbed
    assert len(refused) == 3
    steps = [event.step for event in listening.events if isinstance(event, StepTaken)]
    assert steps == [1, 2, 3, 4]  # none was taken again


def test_a_disk_that_refuses_for_too_long_ends_the_run_with_what_it_said(
    config: Config, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Refusing(patch, 20, 10**9)
        listening = Listening()
        with pytest.raises(StoreFailed, match=f"in {config.folder} failed: (No space left|Input/output)"):
            run(with_run(config, patience_seconds=1.2), listening)
    told = [event.message for event in listening.events if isinstance(event, Notice) and event.warning]
    assert [line.rpartition(" in ")[2] for line in told[:2]] == ["0.5 s", "0.7 s"]
    assert run(config).read_bytes() == undisturbed


# Workers that come


class Growing(FaultyWorkers):
    """Gets another worker whenever a commit was made, up to five."""

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        handle = super().ask(worker, method, *args)
        if method == "commit" and len(self.live()) < 5:
            self._start()
        return handle


def test_workers_that_join_take_part_from_the_next_round(
    config: Config,
    undisturbed: bytes,
    fated: Fated,
) -> None:
    advancing: list[tuple[int, int]] = []

    def fate(asked: Asked) -> str | None:
        if asked.method == "advance":
            advancing.append((asked.args[0], asked.worker))
        return None

    fated(fate, 1, Growing)
    listening = Listening()
    assert run(config, listening).read_bytes() == undisturbed
    crews = [{worker for step, worker in advancing if step == n} for n in range(4)]
    assert [len(crew) for crew in crews] == [1, 2, 4, 5]
    assert sum(isinstance(event, WorkerJoined) for event in listening.events) == 5


def test_a_slow_worker_gets_less_to_do(tmp_path: Path, fated: Fated, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it needs three times as long for a tile, and saving that is worth loading anew."""
    wide = write_raster(tmp_path / "wide.tif", pattern(1, 128, 516, "uint16"))
    expected = run(rehearsal(wide, tmp_path / "undisturbed.tif", **OPTIONS)).read_bytes()
    shares: list[tuple[int, int]] = []
    advance = Worker.advance

    def slow(worker: Worker, *args: Any) -> Any:
        told = advance(worker, *args)
        return told._replace(predicting_s=1000.0 * told.tiles * (3 if worker is made[0]._workers[0] else 1))

    def fate(asked: Asked) -> str | None:
        if asked.method == "load":
            shares.append((asked.worker, asked.args[1].n_tiles))
        return None

    monkeypatch.setattr(Worker, "advance", slow)
    made = fated(fate)
    assert run(rehearsal(wide, tmp_path / "target.tif", **OPTIONS)).read_bytes() == expected
    assert dict(shares[:2]) == {0: 8, 1: 6}
    assert dict(shares[2:]) == {0: 4, 1: 10}  # and not again


# Somebody who was taken for dead


def test_what_a_worker_writes_that_was_given_up_is_not_taken_for_the_commit(config: Config, undisturbed: bytes) -> None:
    """It wakes up and writes the block of another step to the slot that has been sealed meanwhile."""
    overwritten = []

    class Waking(Listening):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, Committed) and not overwritten:
                plan = read_plan(config.folder)
                assert plan is not None
                store, blocks = RunStore(config.folder), plan.canvas.blocks
                stale = store.read("lr_latents/0", blocks.box((2, 2)))
                store.write("latents/0/a", blocks, (2, 2), stale)
                overwritten.append(stale)

    with pytest.raises(Death):
        run(config, Waking(die_after=1 + 9 + 1))
    assert overwritten
    listening = Listening()
    assert run(config, listening).read_bytes() == undisturbed
    told = [event.message for event in listening.events if isinstance(event, Notice) and event.warning]
    assert told == ["block (2, 2) of latents/0/a is not what was written: it is computed again"]


def test_a_local_worker_that_is_discarded_is_replaced_under_a_new_number(config: Config, tmp_path: Path) -> None:
    workers = LocalWorkers(make_plan(config), tmp_path / "run", 2)
    assert [type(event) for event in workers.watch()] == [WorkerJoined] * 2
    workers.discard(1, "why")
    assert workers.live() == [0, 2]
    assert [(type(event).__name__, event.worker) for event in workers.watch()] == [
        ("WorkerLeft", 1),
        ("WorkerJoined", 2),
    ]
