"""What a worker has at hand in every stage, and the pictures it makes of the stored source."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import WorkFailed
from pipeline.grid import Blocks, Canvas, Index, reflected
from pipeline.network import ENLARGE_REACH, Network, open_network, prepare_prompt
from pipeline.plan import Plan
from pipeline.raster.radiometry import Stretch
from pipeline.store import CHUNK, Committed, RunStore
from stablesr.box import Box
from stablesr.color import ChannelStatistics
from stablesr.samplers import Step, ddim_steps, ddpm_steps

CHANNELS = 3
"""Of the picture that a network sees; a layer with fewer bands repeats its last one."""

CHUNKS_HELD = 16
"""Of the stored source: those under a block and around it."""


class Samples(NamedTuple):
    """The stored source under a part of the canvas, and what its enlargement depends on around it."""

    layer: int
    window: Box
    """In source pixels."""
    values: NDArray[Any]
    """(bands of the layer, h, w)."""


class Enlarged(NamedTuple):
    """A part of the canvas as the enlarged source shows it, (bands, H, W) each, float32 on the network's device."""

    base: Tensor
    """Within [-1, 1]."""
    excess: Tensor | None
    """What left the stretch, in the same units; None if nothing did."""


@dataclass
class Context:
    """A worker's plan, store and network; the network is loaded when it is first needed."""

    plan: Plan
    store: RunStore
    layer_statistics: dict[int, tuple[ChannelStatistics, ChannelStatistics]] = field(default_factory=dict)
    """Of the decoded layer and the enlarged source, where AdaIN has asked for them."""
    batch: int = 0
    """Tiles that go through the network at once; fewer than asked for, once memory has run out."""
    _committed: tuple[tuple[int, str, int], Committed] | None = None
    _held: dict[tuple[int, Index], NDArray[Any]] = field(default_factory=dict)
    """Chunks of the stored source, the one that was asked for last at the end."""

    def __post_init__(self) -> None:
        self.batch = self.batch or self.plan.config.sampling.batch

    @cached_property
    def canvas(self) -> Canvas:
        return self.plan.canvas

    @cached_property
    def network(self) -> Network:
        return open_network(self.plan.config.model, self.plan.config.scale)

    @cached_property
    def prompt(self) -> Any:
        return prepare_prompt(self.network, self.plan.config.sampling)

    @cached_property
    def steps(self) -> list[Step]:
        sampling = self.plan.config.sampling
        visited = self.network.schedule.respaced(self.plan.steps)
        return [*(ddpm_steps(visited) if sampling.sampler == "ddpm" else ddim_steps(visited, sampling.eta))]

    @cached_property
    def stretch(self) -> Stretch:
        payload = self.store.marker("stretch")
        assert payload is not None  # the driver fixes it before it asks for anything that needs it
        return Stretch.model_validate(payload)

    def committed(self, layer: int, slot: str, step: int) -> Committed:
        """x_t as it was committed, each block held against its checksum."""
        key = layer, slot, step
        if self._committed is None or self._committed[0] != key:
            marker = self.store.marker(f"sample/{layer}/{slot}")
            if marker is None or marker["step"] != step:
                raise WorkFailed(f"step {step} of layer {layer} is not in slot {slot} of {self.store.folder} any more")
            stored = Committed(self.store, f"latents/{layer}/{slot}", self.canvas.blocks, marker["checksums"])
            self._committed = key, stored
        return self._committed[1]

    def halve_batch(self, error: torch.OutOfMemoryError) -> None:
        """Memory has run out with so many tiles at once.

        Raises:
            WorkFailed: if there was only one.
        """
        if self.batch == 1:
            raise WorkFailed(
                f"{self.network.device} has too little memory for one tile of {self.canvas.tile} x {self.canvas.tile} "
                f"latents: {error}\nhint: --precision bfloat16 takes half of float32; end what else uses the device"
            ) from error
        self.batch //= 2
        torch.cuda.empty_cache()

    @contextmanager
    def patch_in_memory(self) -> Iterator[None]:
        """A patch goes through the network alone: there is no smaller batch to try.

        Raises:
            WorkFailed: if memory runs out.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            side = self.canvas.patches.tile_height
            raise WorkFailed(
                f"{self.network.device} has too little memory for a patch of {side} x {side} latents: {error}\n"
                f"hint: --patch {max(side // 2, 8)} takes a quarter; it makes another run, though, from its beginning"
            ) from error

    def samples(self, layer: int, pixels: Box) -> Samples:
        """What lies under a part of the canvas."""
        window = grown(self.canvas.behind(pixels), ENLARGE_REACH).overlap(self.canvas.source)
        assert window is not None
        values = np.empty((len(self.plan.layers[layer]), window.height, window.width), self.plan.header.dtype)
        chunks = Blocks(self.canvas.source_height, self.canvas.source_width, CHUNK)
        for index in chunks.touching(window):
            chunk, held = chunks.box(index), self._chunk(layer, chunks, index)
            part = chunk.overlap(window)
            assert part is not None
            values[(slice(None), *part.within(window))] = held[(slice(None), *part.within(chunk))]
        return Samples(layer, window, values)

    def _chunk(self, layer: int, chunks: Blocks, index: Index) -> NDArray[Any]:
        """A part of the stored source, kept for a while: patches overlap, and ask for it again."""
        held = self._held.pop((layer, index), None)
        if held is None:
            held = self.store.read(f"source/{layer}", chunks.box(index))
        self._held[layer, index] = held  # the last to be forgotten
        if len(self._held) > CHUNKS_HELD:
            del self._held[next(iter(self._held))]
        return held

    def enlarged(self, samples: Samples, pixels: Box) -> Enlarged:
        """A part of the canvas that samples were taken from, bit for bit the crop of the whole."""
        seen, window = self._seen(samples, pixels)
        within = seen.clamp(-1.0, 1.0)
        excess = seen - within
        base = self._enlarge(within, window, pixels).clamp_(-1.0, 1.0)
        return Enlarged(base, self._enlarge(excess, window, pixels) if excess.any() else None)

    def picture(self, layer: int, pixels: Box) -> Tensor:
        """What the network sees of a part of the canvas, (3, H, W), within [-1, 1]."""
        seen, window = self._seen(self.samples(layer, pixels), pixels)
        seen = torch.cat([seen, *[seen[-1:]] * (CHANNELS - len(seen))])
        return self._enlarge(seen.clamp(-1.0, 1.0), window, pixels).clamp_(-1.0, 1.0)

    def _seen(self, samples: Samples, pixels: Box) -> tuple[Tensor, Box]:
        """The source under a part of the canvas, [-1, 1] being the stretch; and where it lies."""
        window = grown(self.canvas.behind(pixels), ENLARGE_REACH).overlap(samples.window)
        assert window is not None
        values = _computable(samples.values[(slice(None), *window.within(samples.window))])
        stretch = self.stretch.of(self.plan.layers[samples.layer])
        return stretch.apply(torch.from_numpy(values).to(self.network.device)), window

    def _enlarge(self, image: Tensor, window: Box, pixels: Box) -> Tensor:
        return self._at(self.network.enlarge(image, self.plan.config.scale), window, pixels)

    def valid(self, layer: int, pixels: Box) -> Tensor | None:
        """Which pixels of a part of the canvas count, (bands or 1, H, W), on the CPU; None if all do."""
        mask = self._mask(layer, behind := self.canvas.behind(pixels))
        if mask is None:
            return None
        scale = self.plan.config.scale
        enlarged = mask.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
        return self._at(enlarged, behind, pixels)

    def is_empty(self, layer: int, pixels: Box) -> bool:
        """Whether no pixel of a part of the canvas counts."""
        mask = self._mask(layer, self.canvas.behind(pixels))
        return mask is not None and not mask.any()

    def _mask(self, layer: int, window: Box) -> Tensor | None:
        validity = self.plan.header.validity
        if validity == "all":
            return None
        stored = self.store.read("mask", window)
        if validity == "nodata":
            stored = stored[list(self.plan.layers[layer])]
        return torch.from_numpy(np.not_equal(stored, 0))

    def _at(self, enlarged: Tensor, window: Box, pixels: Box) -> Tensor:
        """What of an enlarged window of the source lies at a part of the canvas; reflected beyond the target."""
        target, scale = self.canvas.target, self.plan.config.scale
        if (inside := pixels.overlap(target)) == pixels:
            return enlarged[(slice(None), *inside.within(window.scaled(scale)))]
        rows = torch.tensor(reflected(pixels.top, pixels.bottom, target.height)) - scale * window.top
        columns = torch.tensor(reflected(pixels.left, pixels.right, target.width)) - scale * window.left
        device = enlarged.device
        return enlarged.index_select(-2, rows.to(device)).index_select(-1, columns.to(device))


def as_tensor(values: NDArray[Any]) -> Tensor:
    """An array as a tensor; copied if it came from another process, for then it can only be read."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def grown(box: Box, margin: int) -> Box:
    """A box and what lies up to `margin` around it."""
    return Box(box.top - margin, box.left - margin, box.bottom + margin, box.right + margin)


def _computable(samples: NDArray[Any]) -> NDArray[Any]:
    """PyTorch computes little in uint16."""
    return samples.astype(np.int32) if samples.dtype == np.uint16 else samples
