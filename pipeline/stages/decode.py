"""Latents -> stored target: patches through the decoder, blended, with the source's colours, in its units."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.grid import Index
from pipeline.plan import Plan
from pipeline.raster.radiometry import to_samples
from pipeline.stages.context import Context, Enlarged, as_tensor, grown
from pipeline.store import CHUNK, RunStore
from stablesr.aggregation import Prediction, blend
from stablesr.box import Box
from stablesr.color import WAVELET_REACH, ChannelStatistics, adain_correction, wavelet_correction

STATISTICS = "statistics"
"""The stage that AdaIN needs before decoding: sums over what the decoder makes, block by block."""

FEW_ROWS = 64
"""That go through what looks at each pixel by itself, so that they stay in a processor's cache."""


def create_arrays(plan: Plan, store: RunStore) -> None:
    """Arrays that this stage writes."""
    for layer, bands in enumerate(plan.layers):
        store.create(f"output/{layer}", "pixels", len(bands), plan.canvas.output_blocks, plan.header.dtype)


def patches_of(plan: Plan, index: Index) -> list[Box]:
    """The patches that a block of the output is blended from, in latents."""
    canvas = plan.canvas
    region = _with_reach(plan, canvas.output_blocks.box(index))
    return [_unscaled(patch, canvas.factor) for patch in canvas.patches.scaled(canvas.factor).touching(region)]


def blocks_of(plan: Plan, patch: Box) -> Iterator[Index]:
    """The blocks of the output that are blended from a patch."""
    blocks, pixels = plan.canvas.output_blocks, patch.scaled(plan.canvas.factor)
    for index in blocks.touching(grown(pixels, WAVELET_REACH)):
        if pixels.overlap(_with_reach(plan, blocks.box(index))):
            yield index


def patch_bytes(plan: Plan) -> int:
    """Of what becomes of a patch, in the layer with the most bands."""
    patches = plan.canvas.patches.scaled(plan.canvas.factor)
    return 4 * len(plan.layers[0]) * patches.tile_height * patches.tile_width


def decode_patch(context: Context, layer: int, slot: str, patch: Box) -> NDArray[np.float32]:
    """(bands, 8 h, 8 w) of what the decoder makes of a patch; the enlarged source where nothing counts."""
    pixels, n_bands = patch.scaled(context.canvas.factor), len(context.plan.layers[layer])
    image = context.picture(layer, pixels)
    if context.is_empty(layer, pixels):
        return image[:n_bands].cpu().numpy()
    latent = torch.from_numpy(context.committed(layer, slot, context.plan.steps).read(patch))
    with context.patch_in_memory():
        decoded = context.network.decode(latent[None], image[None], context.plan.config.sampling.cfw)
    return _bands(decoded[0].float(), n_bands).cpu().numpy()


def decode_block(context: Context, layer: int, index: Index, *decoded: NDArray[np.float32]) -> dict[str, Any]:
    """Blend the patches of a block, in the order of `patches_of`, correct the colours and store the samples."""
    plan = context.plan
    blocks, name = context.canvas.output_blocks, f"output/{layer}"
    box, bands = blocks.box(index), plan.layers[layer]
    block = _Block(context, layer, index, decoded)
    samples = np.empty((len(bands), box.height, box.width), dtype=plan.header.dtype)
    for strip in strips(box):
        _decode_strip(block, strip, samples[(slice(None), *strip.within(box))])
    return {"checksums": {name: context.store.write(name, blocks, index, samples)}}


def strips(box: Box, height: int = CHUNK) -> list[Box]:
    """A block in rows of chunks: memory and the caches of a processor like them better than the whole."""
    tops = range(box.top, box.bottom, height)
    return [Box(top, box.left, min(top + height, box.bottom), box.right) for top in tops]


def _decode_strip(block: "_Block", strip: Box, samples: NDArray[Any]) -> None:
    context, layer = block.context, block.layer
    plan, bands = context.plan, context.plan.layers[layer]
    valid = context.valid(layer, strip)
    if valid is not None and not valid.any():
        samples[...] = to_samples(torch.zeros(samples.shape), plan.header, valid)
        return
    color = plan.config.sampling.color
    region = _with_reach(plan, strip) if color == "wavelet" else strip
    content, (style, excess) = block.blended(region), block.enlarged(region)
    if color == "adain":
        content = adain_correction(content[None], *_layer_statistics(context, layer))[0]
    inner = (slice(None), *strip.within(region))
    if color == "wavelet":
        content = wavelet_correction(content, style)[inner]
    if excess is not None:  # only now: what both have in common needs no correction, and may be huge
        content = content.add_(excess[inner])
    stretch = context.stretch.of(bands)
    for few in strips(strip, FEW_ROWS):
        here = (slice(None), *few.within(strip))
        samples[here] = to_samples(
            stretch.undo(content[here]).cpu(), plan.header, None if valid is None else valid[here]
        )


class _Block:
    """What a block of the output is made from."""

    def __init__(self, context: Context, layer: int, index: Index, decoded: tuple[NDArray[np.float32], ...]) -> None:
        self.context, self.layer = context, layer
        factor = context.canvas.factor
        self._grid = context.canvas.patches.scaled(factor)
        patches = [patch.scaled(factor) for patch in patches_of(context.plan, index)]
        self._decoded = dict(zip(patches, decoded, strict=True))
        self._samples = context.samples(layer, _with_reach(context.plan, context.canvas.output_blocks.box(index)))

    def blended(self, region: Box) -> Tensor:
        """What the decoder made of a part of it."""
        predictions = []
        for tile in self._grid.touching(region):
            part = tile.overlap(region)
            assert part is not None
            crop = as_tensor(self._decoded[tile][(slice(None), *part.within(tile))])
            predictions.append(Prediction(tile, part, crop.to(self.context.network.device)))
        return blend(self._grid, region, predictions)

    def enlarged(self, region: Box) -> Enlarged:
        """The source in its place."""
        return self.context.enlarged(self._samples, region)


def _bands(content: Tensor, n_bands: int) -> Tensor:
    """Three channels back to the bands they came from: what was repeated is averaged."""
    if n_bands == len(content):
        return content
    return torch.cat([content[: n_bands - 1], content[n_bands - 1 :].mean(dim=0, keepdim=True)])


def _with_reach(plan: Plan, pixels: Box) -> Box:
    region = grown(pixels, WAVELET_REACH).overlap(plan.canvas.target)
    assert region is not None
    return region


def _unscaled(box: Box, factor: int) -> Box:
    return Box(box.top // factor, box.left // factor, box.bottom // factor, box.right // factor)


# AdaIN needs the mean and standard deviation of a whole layer, so a layer is decoded twice.


def gather_statistics(context: Context, layer: int, index: Index, *decoded: NDArray[np.float32]) -> dict[str, Any]:
    """Sums over a block's pixels that count, of what the decoder made and of the enlarged source, by band."""
    canvas = context.canvas
    box = canvas.output_blocks.box(index)
    block = _Block(context, layer, index, decoded)
    n, sums = 0.0, np.zeros((2, 2, len(context.plan.layers[layer])))
    for strip in strips(box):
        content, style = block.blended(strip), block.enlarged(strip).base
        valid = context.valid(layer, strip)
        counts = torch.ones(strip.height, strip.width) if valid is None else valid.all(dim=0)
        counts = counts.to(content.device, torch.float64)
        n += float(counts.sum())
        for i, picture in enumerate((content, style)):
            values = picture.double() * counts
            sums[i, 0] += values.sum(dim=(1, 2)).cpu().numpy()
            sums[i, 1] += (values * picture.double()).sum(dim=(1, 2)).cpu().numpy()
    return {"n": n, "sums": sums.tolist()}


def _layer_statistics(context: Context, layer: int) -> tuple[ChannelStatistics, ChannelStatistics]:
    """Of the whole layer: what the decoder made, and the enlarged source."""
    known = context.layer_statistics
    if layer not in known:
        markers = [marker for _, marker in context.store.markers(f"{STATISTICS}/{layer}")]
        n = sum(marker["n"] for marker in markers)
        sums = np.sum([marker["sums"] for marker in markers], axis=0)
        pair = []
        for total, squares in sums:
            mean = total / max(n, 1.0)
            variance = np.maximum(squares - n * mean**2, 0.0) / max(n - 1.0, 1.0)
            column = [torch.tensor(v, dtype=torch.float32, device=context.network.device)[None, :, None, None]
                      for v in (mean, np.sqrt(variance + 1e-5))]  # fmt: skip
            pair.append(ChannelStatistics(*column))
        known[layer] = pair[0], pair[1]
    return known[layer]
