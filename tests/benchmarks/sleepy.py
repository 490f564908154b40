"""A run whose workers sleep in place of a GPU: sampling at its real pace, on any number of workers, on few cores."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.grid import Share, neighbours
from pipeline.network import Nearest
from pipeline.plan import Plan, make_plan
from pipeline.stages import encode, sample
from pipeline.stages.sample import Travelling
from pipeline.store import RunStore
from pipeline.worker import Advanced, Worker
from stablesr.aggregation import Prediction, in_batches
from stablesr.box import Box
from stablesr.config import UNetConfig
from stablesr.schedule import prediction_of
from tests.pipeline.rasters import pattern, rehearsal, write_raster

CHANNELS = 4
"""Of the latents, as of StableSR's."""

SCALE = 4


class SleepyNetwork(Nearest):
    """StableSR's latents and tiles; a prediction takes as long as on a GPU, and depends on the whole tile.

    What the processor does between two tiles hides behind the network, as on a GPU, which is handed its work ahead;
    but not what it does between two questions.
    """

    def __init__(self, tile_s: float) -> None:
        super().__init__(SCALE)
        self.config = with_latents(self.config)
        self._tile_s = tile_s
        self._until = 0.0

    def is_asked(self) -> None:
        """There is no tile before the next."""
        self._until = time.monotonic()

    def predict_tiles(
        self, tiles: Sequence[Box], frame: Box, x: Tensor, latent: Tensor, time_: Any, prompt: Any, batch: int
    ) -> Iterator[Prediction]:
        def predict(x: Tensor, latent: Tensor) -> Tensor:
            self._until = max(self._until, time.monotonic() - self._tile_s) + self._tile_s * len(x)
            time.sleep(max(self._until - time.monotonic(), 0.0))
            dreamt = latent + 0.3 * x.mean(dim=(1, 2, 3), keepdim=True)
            return prediction_of(x, dreamt, time_, self.config.diffusion.parameterization)

        return in_batches(predict, tiles, frame, (x, latent), batch)


def with_latents(config: Any) -> Any:
    """The sizes of a network, but for the channels of its latents."""
    autoencoder = replace(config.autoencoder, latent_channels=CHANNELS)
    return replace(config, unet=UNetConfig(latent_channels=CHANNELS), autoencoder=autoencoder)


@dataclass(frozen=True)
class StepTimes:
    """What a worker saw of a diffusion step, in seconds."""

    waited: float
    """From the end of its own tiles to the arrival of the neighbours'."""
    finishing: float
    """Blending what they touch, and the step."""
    computing: float
    """Of a processor, from the step's first tile to its end; asleep it takes none."""


class SleepyWorker(Worker):
    """Sleeps as long as a tile of full size takes on a GPU, one TFLOP on some 20 TFLOP/s."""

    tile_s = 0.045

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        torch.set_num_threads(1)
        self._network = self.context.network = SleepyNetwork(self.tile_s)
        self._steps: list[StepTimes] = []
        self._idle_since = self._computed = 0.0

    def border(self, step: int, reaches: Sequence[Box]) -> Sequence[list[Travelling] | None]:
        self._computed = time.process_time()
        self._network.is_asked()
        return super().border(step, reaches)

    def interior(self, step: int) -> None:
        self._network.is_asked()
        super().interior(step)
        self._idle_since = time.monotonic()

    def advance(self, step: int, *received: Sequence[Travelling] | None) -> Advanced:
        began = time.monotonic()
        told = super().advance(step, *received)
        now, computing = time.monotonic(), time.process_time() - self._computed
        self._steps.append(StepTimes(began - self._idle_since, now - began, computing))
        self._computed = time.process_time()
        return told

    def step_times(self) -> list[StepTimes]:
        """Of all steps so far."""
        return self._steps

    def ignore(self, *args: Any) -> None:
        """Be given something."""

    def parts(self, n: int) -> list[None]:
        """Give so many."""
        return [None] * n

    def nap(self, seconds: float) -> None:
        """Be busy for a while."""
        time.sleep(seconds)


class QuickWorker(SleepyWorker):
    """For tests that only want to know what happens."""

    tile_s = 0.002


def sleepy_plan(
    folder: Path, rows: int, columns: int, *, steps: int, block: int = 256, tile: int = 64, **run: Any
) -> Plan:
    """Of a canvas of whole blocks, encoded already, whose picture is noise.

    Args:
        run: options of the section of that name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = write_raster(folder / "source.tif", pattern(3, 64, 64, "uint8"))
    options = {"workers": "ray", "cores": 1, "memory": 4.0, "commit_seconds": 1e6, **run}
    config = rehearsal(source, folder / "target.tif", scale=SCALE, grid={"block": block}, sampling={"steps": steps})
    small = make_plan(config.model_copy(update={"run": config.run.model_copy(update=options)}))
    network = replace(with_latents(small.architecture), tile=tile)
    sides = {"height": rows * block * 8 // SCALE, "width": columns * block * 8 // SCALE}
    plan = small.model_copy(update={"header": small.header.model_copy(update=sides), "network": network.to_json()})
    assert (plan.canvas.blocks.rows, plan.canvas.blocks.columns) == (rows, columns)
    return plan


def encoded(plan: Plan) -> RunStore:
    """The store of a run that is about to sample."""
    store, blocks = RunStore(plan.config.folder), plan.canvas.blocks
    for stage in (encode, sample):
        stage.create_arrays(plan, store)
    for n, index in enumerate(blocks):
        box = blocks.box(index)
        values = np.random.default_rng(n).standard_normal((CHANNELS, box.height, box.width), dtype=np.float32)
        store.write("lr_latents/0", blocks, index, values)
    return store


# What travels in a step


def touching(share: Share, reach: Box) -> tuple[list[int], list[int]]:
    """How many rows and columns of latents each row and column of a share's tiles has in common with a region."""
    tops, rows, lefts, columns = share._lattice
    height, width = share.canvas.tiles.tile_height, share.canvas.tiles.tile_width
    return (
        [max(min(tops[i] + height, reach.bottom) - max(tops[i], reach.top), 0) for i in rows],
        [max(min(lefts[i] + width, reach.right) - max(lefts[i], reach.left), 0) for i in columns],
    )


def sent_bytes(shares: Sequence[Share], channels: int = CHANNELS) -> int:
    """What all workers send each other in a step, exactly.

    Each sends each neighbour, of every tile that it predicts and that the other's region touches, what lies in that
    region: float32, without the envelopes. Tiles and regions are lattices and rectangles, so the areas are products.
    """
    return 4 * channels * sum(
        sum(rows) * sum(columns)
        for me, near in enumerate(neighbours(shares))
        for other in near
        for rows, columns in [touching(shares[me], shares[other].region)]
    )  # fmt: skip


def border_bytes(border: float, lines: int, crossings: int, tile: int = 64, channels: int = CHANNELS) -> float:
    """The same as a formula, for tiles that overlap by half and shares that are a lattice of blocks.

    Two shares side by side both need a strip half a tile wide along their border. Both send the one row of their tiles
    that covers it; each latent of the strip is covered twice by it: 2 senders x 2 tiles x tile/2 latents of C float32
    for each latent of border, `8 * tile * C` bytes, which is 2 KiB. Along the first and the last half tile of the
    canvas each is covered once only. Where four shares meet, those across send one tile each, a quarter of it:
    `4 * (tile/2)**2` latents, `4 * tile**2 * C` bytes, which is 64 KiB.

    Args:
        border: latents, of all borders between two shares together.
        lines: from one edge of the canvas to the other that these make up.
        crossings: of these.
    """
    return 8 * tile * channels * (border - lines * tile / 2) + 4 * tile**2 * channels * crossings
