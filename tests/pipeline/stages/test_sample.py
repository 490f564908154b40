"""Diffusion steps on shares of a canvas: the same latents however it is shared out; and steps are taken whole."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.grid import Loads, Share, neighbours, share_out
from pipeline.network import Nearest
from pipeline.plan import make_plan
from pipeline.raster.source import open_source
from pipeline.stages import encode, ingest, sample
from pipeline.stages.context import Context
from pipeline.stages.sample import Sampler, other_slot
from pipeline.store import RunStore
from stablesr.aggregation import in_batches
from stablesr.box import Box
from stablesr.noise import START, noise
from stablesr.schedule import add_noise, prediction_of
from tests.pipeline.rasters import pattern, rehearsal, write_raster
from tests.strategies import seeded

CANVAS = Box(0, 0, 75, 100)
"""2 x 4 tiles of 64 latents, 3 x 4 blocks of 32."""

OPTIONS: dict[str, Any] = {"grid": {"block": 32}, "sampling": {"steps": 3, "overlap": 48, "seed": 5}}


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Nearest:
    """Whose prediction for a latent depends on the whole tile around it, and on every step before."""

    def predict_tiles(network: Nearest, tiles: Any, frame: Any, x: Any, latent: Any, time: Any, *_: Any) -> Any:
        def predict(x: Tensor, latent: Tensor) -> Tensor:
            dreamt = latent + 0.3 * (9 * x).sin() + x.mean(dim=(1, 2, 3), keepdim=True)
            return prediction_of(x, dreamt, time, network.config.diffusion.parameterization)

        return in_batches(predict, tiles, frame, (x, latent), 1)

    monkeypatch.setattr(Nearest, "predict_tiles", predict_tiles)
    return Nearest(4)


@pytest.fixture
def context(network: Nearest, tmp_path: Path) -> Context:
    """A worker at the beginning of sampling."""
    config = rehearsal(
        write_raster(tmp_path / "source.tif", pattern(1, 150, 200, "uint8")), tmp_path / "target.tif", **OPTIONS
    )
    plan, store = make_plan(config), RunStore(config.folder)
    assert plan.canvas.latents == CANVAS
    assert (len(plan.canvas.tiles), len(plan.canvas.blocks)) == (8, 12)
    for stage in (encode, sample):
        stage.create_arrays(plan, store)
    latent = seeded(12, CANVAS.height, CANVAS.width).numpy()
    for index in plan.canvas.blocks:
        here = (slice(None), *plan.canvas.blocks.box(index).within(CANVAS))
        store.write("lr_latents/0", plan.canvas.blocks, index, np.ascontiguousarray(latent[here]))
    return Context(plan, store)


def shares_of(context: Context, n: int) -> list[Share]:
    blocks = context.canvas.blocks
    return [Share(context.canvas, box) for box in share_out(Loads.even(blocks.rows, blocks.columns), [1.0] * n)]


def stored(context: Context, slot: str) -> NDArray[Any]:
    return context.store.read(f"latents/0/{slot}", CANVAS)


def sampled_resident(context: Context, n: int, steps: int = 3, first: int = 0, slot: str | None = None) -> str:
    """Some steps of n samplers that exchange their borders, and a commit; the slot."""
    shares = shares_of(context, n)
    near = neighbours(shares)
    samplers = [Sampler(context, 0, share, first, slot) for share in shares]
    for _ in range(first, steps):
        borders = [sampler.border([shares[k].region for k in near[me]]) for me, sampler in enumerate(samplers)]
        for me, sampler in enumerate(samplers):
            assert sampler.interior()
            sampler.advance([travelling for k in near[me] for travelling in borders[k][near[k].index(me)]])
    written: dict[str, int] = {}
    for sampler in samplers:
        written |= sampler.commit(other_slot(slot), steps)
    assert sorted(written) == sorted(f"{row}-{column}" for row, column in context.canvas.blocks)
    context.store.mark(f"sample/0/{other_slot(slot)}", {"step": steps, "checksums": written})
    return other_slot(slot)


def take_step(sampler: Sampler, stopping: Callable[[], bool] = lambda: False) -> bool:
    """Of somebody who has no neighbours."""
    if prepared := sampler.interior(stopping):
        sampler.advance()
    else:
        sampler.give_up()
    return prepared


# Shares leave no trace


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_any_number_of_workers_gives_the_same_latents_to_the_bit(context: Context, n: int) -> None:
    alone = stored(context, sampled_resident(context, 1))
    assert np.isfinite(alone).all()
    np.testing.assert_array_equal(stored(context, sampled_resident(context, n, slot=None)), alone)


@pytest.mark.parametrize("n", [1, 4])
def test_shares_that_are_streamed_give_the_same_latents_to_the_bit(context: Context, n: int) -> None:
    alone = stored(context, sampled_resident(context, 1))
    blocks, slot = context.canvas.blocks, None
    for step in range(3):
        written: dict[str, int] = {}
        for box in share_out(Loads.even(blocks.rows, blocks.columns), [1.0] * n):
            sampler = Sampler(context, 0, Share(context.canvas, box, streamed=True), step, slot)
            assert take_step(sampler)
            written |= sampler.commit(other_slot(slot), step + 1)
        slot = other_slot(slot)
        context.store.mark(f"sample/0/{slot}", {"step": step + 1, "checksums": written})
    np.testing.assert_array_equal(stored(context, str(slot)), alone)


def test_going_on_from_a_commit_gives_the_same_latents_to_the_bit(context: Context) -> None:
    alone = stored(context, sampled_resident(context, 1))
    slot = sampled_resident(context, 2, steps=1)
    slot = sampled_resident(context, 3, steps=3, first=1, slot=slot)
    np.testing.assert_array_equal(stored(context, slot), alone)


def test_the_start_is_that_of_the_whole_canvas(context: Context) -> None:
    latent = torch.from_numpy(context.store.read("lr_latents/0", CANVAS))
    fresh = noise(5, 0, START, CANVAS, 12)
    whole = add_noise(latent, fresh, float(context.network.schedule.alpha_bar[-1]))
    for share in shares_of(context, 4):
        here = (slice(None), *share.frame.within(CANVAS))
        assert torch.equal(Sampler(context, 0, share, 0, None).x, whole[here])


# What travels


def test_a_worker_is_handed_just_what_touches_its_region(context: Context) -> None:
    shares = shares_of(context, 2)
    left, right = (Sampler(context, 0, share, 0, None) for share in shares)
    (handed,) = left.border([shares[1].region])
    assert [t.tile for t in handed] == [tile for tile in shares[0].tiles if tile.overlap(shares[1].region)]
    for tile, part, values in handed:
        assert part == tile.overlap(shares[1].region)
        assert values.shape == (12, part.height, part.width)
        assert values.flags.c_contiguous  # it travels by itself, not as a view of a whole tile
    assert [t.tile for t in right.border([shares[0].region])[0]]


# A step is taken whole or not at all


def after(n: int) -> Callable[[], bool]:
    """Asks to stop when it has been asked so often."""
    answers: Iterator[bool] = iter([False] * n)
    return lambda: next(answers, True)


@pytest.mark.parametrize("n_tiles", [0, 1, 5, 7])
def test_a_step_that_is_given_up_has_changed_nothing(context: Context, n_tiles: int) -> None:
    (share,) = shares_of(context, 1)
    undisturbed = Sampler(context, 0, share, 0, None)
    sampler = Sampler(context, 0, share, 0, None)
    take_step(undisturbed)
    take_step(sampler)
    before = sampler.x.clone()
    assert not take_step(sampler, after(n_tiles))
    assert sampler.step == 1
    assert torch.equal(sampler.x, before)
    assert take_step(sampler, after(10))
    take_step(undisturbed)
    assert torch.equal(sampler.x, undisturbed.x)


def test_the_step_before_can_be_committed_where_a_neighbour_gave_up(context: Context) -> None:
    """All workers commit the same step: that of the one that is furthest behind."""
    (share,) = shares_of(context, 1)
    sampler = Sampler(context, 0, share, 0, None)
    take_step(sampler)
    first = sampler.x.clone()
    take_step(sampler)
    sampler.commit("a", 1)
    np.testing.assert_array_equal(stored(context, "a"), first.numpy())
    sampler.commit("b", 2)
    np.testing.assert_array_equal(stored(context, "b"), sampler.x.numpy())
    with pytest.raises(AssertionError):
        sampler.commit("a", 0)


def test_slots_take_turns() -> None:
    assert [other_slot(slot) for slot in (None, "a", "b")] == ["a", "b", "a"]


# Nothing to see


def test_tiles_without_a_pixel_that_counts_are_not_predicted(
    network: Nearest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = pattern(1, 150, 200, "uint8").clip(1)
    values[:, :, 60:] = 0
    config = rehearsal(write_raster(tmp_path / "source.tif", values, nodata=0), tmp_path / "target.tif", **OPTIONS)
    plan, store = make_plan(config), RunStore(config.folder)
    for stage in (ingest, encode, sample):
        stage.create_arrays(plan, store)
    with open_source(config.source) as source:
        for index in plan.canvas.source_blocks:
            ingest.ingest_block(plan, store, source, index)
    for index in plan.canvas.blocks:
        box = plan.canvas.blocks.box(index)
        store.write("lr_latents/0", plan.canvas.blocks, index, np.zeros((12, box.height, box.width), "float32"))
    context = Context(plan, store)
    asked: list[Box] = []
    predict_tiles = Nearest.predict_tiles

    def noted(network: Nearest, tiles: Any, *args: Any) -> Any:
        asked.extend(tiles)
        return predict_tiles(network, tiles, *args)

    monkeypatch.setattr(Nearest, "predict_tiles", noted)
    (share,) = shares_of(context, 1)
    take_step(Sampler(context, 0, share, 0, None))
    # what counts ends at column 60 of the source, within latent 29; tiles begin at 0, 16, 32 and 36
    assert {tile.left for tile in asked} == {0, 16}
    assert len(asked) == 4
