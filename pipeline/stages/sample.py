"""Low-resolution latents -> latents: diffusion steps on a worker's share of the canvas.

A share stays in memory from step to step (`load`; for each step `border`, `interior` and `advance`; now and then
`commit`), or is loaded, advanced by one step and stored again. Either way each latent is the same sum of the same
predictions, in tile order, and moves with the noise of its place: the shares leave no trace in the picture.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import GigasrError
from pipeline.grid import Share, around
from pipeline.plan import Plan
from pipeline.stages.context import Context, as_tensor
from pipeline.store import RunStore
from stablesr.aggregation import Prediction, blend
from stablesr.box import Box
from stablesr.noise import NOISE_CELL, START, noise
from stablesr.samplers import take_step
from stablesr.schedule import add_noise, prediction_of

SLOTS = ("a", "b")
"""Two places for x_t, used in turn: a crash while one is written never touches the other."""


def other_slot(slot: str | None) -> str:
    """Where x_t goes next."""
    a, b = SLOTS
    return b if slot == a else a


class Travelling(NamedTuple):
    """A part of a tile's prediction on its way to another worker."""

    tile: Box
    part: Box
    values: NDArray[np.float32]


def create_arrays(plan: Plan, store: RunStore) -> None:
    """Arrays that this stage writes."""
    for layer in range(len(plan.layers)):
        for slot in SLOTS:
            name = f"latents/{layer}/{slot}"
            store.create(name, "latents", plan.latent_channels, plan.canvas.blocks, "float32")


class Sampler:
    """One share of one layer's canvas, and how far it has come."""

    def __init__(self, context: Context, layer: int, share: Share, step: int, slot: str | None) -> None:
        """Load a share.

        Args:
            step: diffusion steps done.
            slot: where x_t is; None at the start of a run.

        Raises:
            Damaged: if what is stored is not what was committed.
        """
        self.context, self.layer, self.share = context, layer, share
        self.step = step
        """Diffusion steps done."""
        device = context.network.device
        self._drawn: tuple[int, Box, Tensor] | None = None
        """Noise at hand: of which step and place."""
        self.latent = torch.from_numpy(context.store.read(f"lr_latents/{layer}", share.frame)).to(device)
        if slot is None:
            self.x = self._start()
        else:
            self.x = torch.from_numpy(context.committed(layer, slot, step).read(share.frame)).to(device)
        self._tiles = share.tiles
        self._after: Tensor | None = None
        """x after the step that is being taken, as far as it is known."""
        self._before: Tensor | None = None
        """x one step ago; the memory is used again for the next step."""
        self._predicted: dict[Box, Prediction] = {}
        """Our tiles' part in the step that is being taken, where it is still needed."""
        self.n_predicted = 0
        """Tiles that went through the network in the last `border` or `interior`."""
        self._empty = {tile for tile in self._tiles if context.is_empty(layer, tile.scaled(context.canvas.factor))}

    def border(self, reaches: Sequence[Box]) -> list[list[Travelling]]:
        """Predict the tiles that other workers need, before the others.

        Args:
            reaches: the regions that these workers advance.

        Returns:
            For each of them, what it needs of our tiles.
        """
        self.n_predicted = 0
        wanted = [tile for tile in self._tiles if any(tile.overlap(reach) for reach in reaches)]
        self._predicted = {prediction.tile: prediction for prediction in self._predict(wanted)}
        answers = []
        for reach in reaches:
            crops = [prediction.cropped(reach) for prediction in self._predicted.values()]
            answers.append([Travelling(c.tile, c.part, c.values.cpu().numpy()) for c in crops if c is not None])
        return answers

    def interior(self, stopping: Callable[[], bool] = lambda: False) -> bool:
        """Predict the other tiles, and move on what depends on ours alone, while the neighbours' tiles travel.

        That is done in strips, as soon as all tiles over a strip are predicted, so that only a few columns of
        predictions are held at once, and those along the border.

        Args:
            stopping: asked between tiles; once true, the step is given up, and nothing has changed.

        Returns:
            Whether all is predicted.
        """
        share, grid = self.share, self.context.canvas.tiles
        predictions, self.n_predicted = self._predicted, 0
        stream = self._predict([tile for tile in self._tiles if tile not in predictions])
        after = torch.empty_like(self.x) if self._before is None else self._before
        self._before, self._after = None, after
        if share.region != share.frame:  # what is held but not advanced
            after.fill_(float("nan"))
        edges = around(share.region, share.inner)
        for strip in _strips(share.inner, grid.lefts) if share.inner else ():
            needed = grid.touching(strip)
            for _ in [tile for tile in needed if tile not in predictions]:
                if stopping():
                    return False
                prediction = next(stream)
                predictions[prediction.tile] = prediction
            self._move(strip, [predictions[tile] for tile in needed])
            for tile in [tile for tile in predictions if tile.right <= strip.right]:
                if not any(tile.overlap(edge) for edge in edges):
                    del predictions[tile]
        for prediction in _until(stopping, stream):
            predictions[prediction.tile] = prediction
        return not stopping()

    def advance(self, received: Sequence[Travelling] = ()) -> None:
        """Take the step that `interior` has prepared.

        Args:
            received: from the other workers' `border`.
        """
        share, grid, device = self.share, self.context.canvas.tiles, self.context.network.device
        assert self._after is not None
        predictions = self._predicted
        for tile, part, values in received:
            predictions[tile] = Prediction(tile, part, as_tensor(values).to(device))
        for edge in around(share.region, share.inner):
            for strip in _strips(edge, grid.lefts):
                self._move(strip, [predictions[tile] for tile in grid.touching(strip)])
        self._before, self.x, self._after = self.x, self._after, None
        self._predicted = {}
        self.step += 1

    @property
    def is_prepared(self) -> bool:
        """Whether `interior` has done its part of a step."""
        return self._after is not None

    def give_up(self) -> None:
        """Forget the step that is being taken."""
        self._predicted, self._after = {}, None

    def commit(self, slot: str, step: int) -> dict[str, int]:
        """Write x, as it was after `step` steps (the latest, or the one before), of the blocks we own.

        Returns:
            Checksums by block, "row-column".
        """
        x = self.x if step == self.step else self._before
        assert x is not None
        assert step in (self.step, self.step - 1)
        blocks, checksums = self.context.canvas.blocks, {}
        for index in self.share.own:
            values = x[(slice(None), *blocks.box(index).within(self.share.frame))].cpu().numpy()
            name = f"latents/{self.layer}/{slot}"
            checksums[f"{index[0]}-{index[1]}"] = self.context.store.write(name, blocks, index, values)
        return checksums

    def _start(self) -> Tensor:
        """x_T: the low-resolution latents under all noise, or nothing but noise."""
        first = self._noise(START, self.share.frame)
        if self.context.plan.config.sampling.start == "noise":
            return first
        return add_noise(self.latent, first, float(self.context.network.schedule.alpha_bar[-1]))

    def _noise(self, step: int, box: Box) -> Tensor:
        """The noise of a place, drawn in whole columns of its cells: strips are narrower than that."""
        if self._drawn is None or self._drawn[0] != step or self._drawn[1].overlap(box) != box:
            plan = self.context.plan
            left, right = (NOISE_CELL * cell for cell in (box.left // NOISE_CELL, -(-box.right // NOISE_CELL)))
            columns = Box(box.top, left, box.bottom, right)
            self._drawn = (
                step,
                columns,
                noise(plan.config.sampling.seed, self.layer, step, columns, plan.latent_channels),
            )
        _, columns, fresh = self._drawn
        return fresh[(slice(None), *box.within(columns))].to(self.context.network.device)

    def _predict(self, tiles: Sequence[Box]) -> Iterator[Prediction]:
        """Tiles through the network, in the order given. Those where nothing counts are not worth it: they are given
        the prediction that leads to the low-resolution latents."""
        network, frame, step = self.context.network, self.share.frame, self.context.steps[self.step]
        sampled = self._sampled([tile for tile in tiles if tile not in self._empty])
        for tile in tiles:
            if tile not in self._empty:
                yield next(sampled)
                continue
            x, latent = (canvas[(slice(None), *tile.within(frame))] for canvas in (self.x, self.latent))
            alpha_bar, kind = step.alpha_bar, network.config.diffusion.parameterization
            yield Prediction(tile, tile, prediction_of(x, latent, alpha_bar, kind))

    def _sampled(self, tiles: Sequence[Box]) -> Iterator[Prediction]:
        """Where memory runs out, batches are halved, and stay so."""
        context, network, n = self.context, self.context.network, 0
        time = network.embed_time(context.steps[self.step].timestep)
        while n < len(tiles):
            try:
                rest = network.predict_tiles(
                    tiles[n:], self.share.frame, self.x, self.latent, time, context.prompt, context.batch
                )
                for prediction in rest:
                    n += 1
                    self.n_predicted += 1
                    yield prediction
            except torch.OutOfMemoryError as error:
                context.halve_batch(error)
            except Exception as error:
                if isinstance(error, GigasrError):
                    raise
                block = context.canvas.home(tiles[n])
                raise context.plan.block_failed(f"sample/{self.layer}", block, error) from error

    def _move(self, strip: Box, predictions: Sequence[Prediction]) -> None:
        """A part of x after the step."""
        context, step = self.context, self.context.steps[self.step]
        here = (slice(None), *strip.within(self.share.frame))
        x = self.x[here]
        prediction = blend(context.canvas.tiles, strip, predictions)
        fresh = self._noise(step.timestep, strip) if step.sigma else torch.zeros_like(x)
        assert self._after is not None
        self._after[here] = take_step(x, prediction, fresh, step, context.network.config.diffusion.parameterization)


def _until(stopping: Callable[[], bool], predictions: Iterator[Prediction]) -> Iterator[Prediction]:
    while not stopping():
        try:
            yield next(predictions)
        except StopIteration:
            return


def _strips(region: Box, lefts: Sequence[int]) -> Iterator[Box]:
    """A region cut where columns of tiles begin."""
    cuts = [region.left, *(left for left in lefts if region.left < left < region.right), region.right]
    for left, right in zip(cuts, cuts[1:], strict=False):
        yield Box(region.top, left, region.bottom, right)
