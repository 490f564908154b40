"""The pictures that a worker makes of the stored source: of any part what the whole would show there."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pipeline.network import ENLARGE_REACH, Nearest
from pipeline.plan import make_plan
from pipeline.raster.radiometry import Stretch
from pipeline.stages import ingest
from pipeline.stages.context import CHANNELS, Context, as_tensor
from pipeline.store import RunStore
from pipeline.worker import Worker
from stablesr.box import Box
from stablesr.resize import BICUBIC_REACH, reflect_to, upscale_bicubic
from tests.pipeline.rasters import pattern, rehearsal, repeated, write_raster
from tests.strategies import boxes, seeds

STRETCH = (2000.0, 6000.0)
"""Of samples between 200 and 9000: much is left outside."""

NETWORKS: dict[str, Any] = {
    "bicubic": lambda scale: SimpleNamespace(enlarge=upscale_bicubic, device=torch.device("cpu")),
    "nearest": Nearest,
}


@contextmanager
def ingested(
    values: NDArray[Any], scale: int = 4, network: str = "bicubic", block: int = 8, **profile: Any
) -> Iterator[Context]:
    """A worker's context after a raster is ingested, in blocks of 64 x 64 source pixels."""
    with tempfile.TemporaryDirectory() as name:
        source = write_raster(Path(name) / "source.tif", values, **profile)
        config = rehearsal(
            source, Path(name) / "target.tif", scale=scale, grid={"block": block}, radiometry={"stretch": STRETCH}
        )
        plan, store = make_plan(config), RunStore(config.folder)
        ingest.create_arrays(plan, store)
        worker = Worker(plan, config.folder)
        for index in plan.canvas.source_blocks:
            worker.ingest_block(index)
        n_bands = len(plan.header.bands)
        store.mark("stretch", Stretch(low=(STRETCH[0],) * n_bands, high=(STRETCH[1],) * n_bands).model_dump())
        worker.context.network = NETWORKS[network](scale)
        yield worker.context


def canvas_of(context: Context, bands: Tensor) -> Tensor:
    """Filled up to the canvas, as `StableSR.upscale` does."""
    pixels = context.canvas.pixels
    return reflect_to(bands, pixels.height, pixels.width)


def test_the_margin_is_enough_for_every_network() -> None:
    assert ENLARGE_REACH >= BICUBIC_REACH


@settings(max_examples=25)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    scale=st.integers(1, 8),
    network=st.sampled_from(["bicubic", "nearest"]),
    seed=seeds,
    data=st.data(),
)
def test_any_part_of_the_canvas_is_bit_for_bit_the_crop_of_the_whole(
    height: int, width: int, scale: int, network: str, seed: int, data: st.DataObject
) -> None:
    """As StableSR makes it in memory: stretched, enlarged, clamped, reflected; and what left the stretch beside it."""
    values = pattern(2, height, width, "uint16", seed)
    with ingested(values, scale, network) as context:
        seen = context.stretch.apply(torch.from_numpy(values.astype(np.int32)))
        within = seen.clamp(-1.0, 1.0)
        enlarge = context.network.enlarge
        base = canvas_of(context, enlarge(within, scale).clamp(-1.0, 1.0))
        excess = canvas_of(context, enlarge(seen - within, scale))
        for _ in range(3):
            pixels = data.draw(boxes(context.canvas.pixels))
            crop = (slice(None), *pixels.within(context.canvas.pixels))
            around = data.draw(boxes_around(pixels, context.canvas.pixels))
            found = context.enlarged(context.samples(0, around), pixels)
            assert torch.equal(found.base, base[crop])
            if found.excess is None:
                assert not excess[crop].any()
            else:
                assert torch.equal(found.excess, excess[crop])
            picture = context.picture(0, pixels)
            assert torch.equal(picture, torch.cat([base, base[-1:]])[crop])
            assert picture.shape[0] == CHANNELS


@st.composite
def boxes_around(draw: st.DrawFn, inner: Box, frame: Box) -> Box:
    """Any box of a frame that holds another."""
    return Box(
        draw(st.integers(frame.top, inner.top)),
        draw(st.integers(frame.left, inner.left)),
        draw(st.integers(inner.bottom, frame.bottom)),
        draw(st.integers(inner.right, frame.right)),
    )


@settings(max_examples=15)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    scale=st.integers(1, 8),
    per_band=st.booleans(),
    seed=seeds,
    data=st.data(),
)
def test_of_any_part_it_is_known_which_pixels_count(
    height: int, width: int, scale: int, per_band: bool, seed: int, data: st.DataObject
) -> None:
    values = pattern(2, height, width, "uint16", seed)
    valid = np.random.default_rng(seed).random((2 if per_band else 1, height, width)) < data.draw(
        st.sampled_from([0.0, 0.02, 0.9, 1.0])
    )
    values = np.where(np.broadcast_to(valid, values.shape), values, 0).astype("uint16")
    with ingested(values, scale, nodata=0) as context:
        expected = canvas_of(context, torch.from_numpy(repeated(values != 0, scale)))
        for _ in range(3):
            pixels = data.draw(boxes(context.canvas.pixels))
            crop = (slice(None), *pixels.within(context.canvas.pixels))
            found = context.valid(0, pixels)
            assert found is not None
            assert torch.equal(found.expand(2, -1, -1), expected[crop])
            assert context.is_empty(0, pixels) == (not expected[crop].any())


def test_a_raster_without_holes_has_no_mask() -> None:
    with ingested(pattern(2, 20, 20, "uint16")) as context:
        assert context.valid(0, Box(0, 0, 9, 9)) is None
        assert not context.is_empty(0, Box(0, 0, 9, 9))


def test_a_layer_asks_for_the_masks_of_its_own_bands() -> None:
    values = pattern(5, 20, 20, "uint16")
    values[4, :10] = 0  # of the second layer
    with ingested(values, nodata=0) as context:
        assert context.plan.layers == ((0, 1, 2), (3, 4))
        first, second = (context.valid(layer, Box(0, 0, 80, 80)) for layer in (0, 1))
        assert first is not None
        assert first.shape == (3, 80, 80)
        assert first.all()
        assert second is not None
        assert second[0].all()
        assert not second[1, :40].any()
        assert second[1, 40:].all()


@pytest.mark.parametrize(
    ("n_bands", "shown"),
    [
        pytest.param(1, [0, 0, 0], id="one-band-is-repeated"),
        pytest.param(2, [0, 1, 1], id="the-last-of-two-is-repeated"),
        pytest.param(3, [0, 1, 2], id="three-as-they-are"),
    ],
)
def test_the_network_sees_three_bands(n_bands: int, shown: list[int]) -> None:
    with ingested(pattern(n_bands, 20, 20, "uint16"), scale=1, network="nearest") as context:
        pixels = Box(0, 0, 20, 20)
        base = context.enlarged(context.samples(0, pixels), pixels).base
        assert len(base) == n_bands
        assert torch.equal(context.picture(0, pixels), base[shown])


def test_what_came_from_another_process_is_copied() -> None:
    array = np.zeros(3, "float32")
    as_tensor(array)[0] = 1.0
    assert array[0] == 1.0
    array.flags.writeable = False
    as_tensor(array)[0] = 2.0
    assert array[0] == 1.0
