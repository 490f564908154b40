"""What a worker has at hand in every stage, and the pictures it makes of the stored source."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.grid import Canvas, reflected
from pipeline.network import ENLARGE_REACH, Network, open_network, prepare_prompt
from pipeline.plan import Plan
from pipeline.raster.radiometry import Stretch
from pipeline.store import RunStore
from stablesr.box import Box
from stablesr.color import ChannelStatistics
from stablesr.samplers import Step, ddim_steps, ddpm_steps

CHANNELS = 3
"""Of the picture that a network sees; a layer with fewer bands repeats its last one."""


class Enlarged(NamedTuple):
    """A part of the canvas as the enlarged source shows it, (3, H, W) each, float32 on the network's device."""

    base: Tensor
    """Within [-1, 1]: what the network sees."""
    excess: Tensor | None
    """What left the stretch, in the same units; None if nothing did."""


@dataclass
class Context:
    """A worker's plan, store and network; the network is loaded when it is first needed."""

    plan: Plan
    store: RunStore
    layer_statistics: dict[int, tuple[ChannelStatistics, ChannelStatistics]] = field(default_factory=dict)
    """Of the decoded layer and the enlarged source, where AdaIN has asked for them."""

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

    def enlarged(self, layer: int, pixels: Box) -> Enlarged:
        """A part of the canvas, bit for bit the crop of the whole."""
        device = self.network.device
        window = grown(self.canvas.behind(pixels), ENLARGE_REACH).overlap(self.canvas.source)
        assert window is not None
        stretch = self.stretch.of(self.plan.layers[layer])
        samples = torch.from_numpy(_computable(self.store.read(f"source/{layer}", window))).to(device)
        seen = stretch.apply(samples)
        seen = torch.cat([seen, *[seen[-1:]] * (CHANNELS - len(seen))])
        within = seen.clamp(-1.0, 1.0)
        excess = seen - within
        scale = self.plan.config.scale
        base = self._at(self.network.enlarge(within, scale).clamp(-1.0, 1.0), window, pixels)
        if not excess.any():
            return Enlarged(base, None)
        return Enlarged(base, self._at(self.network.enlarge(excess, scale), window, pixels))

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
