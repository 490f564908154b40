"""Latents -> stored target: patches through the decoder, blended, with the source's colours, in its units."""

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


def create_arrays(plan: Plan, store: RunStore) -> None:
    """Arrays that this stage writes."""
    for layer, bands in enumerate(plan.layers):
        store.create(f"output/{layer}", "pixels", len(bands), plan.canvas.output_blocks, plan.header.dtype)


def patches_of(plan: Plan, index: Index) -> list[Box]:
    """The patches that a block of the output is blended from, in latents."""
    canvas = plan.canvas
    region = _with_reach(plan, canvas.output_blocks.box(index))
    return [_unscaled(patch, canvas.factor) for patch in canvas.patches.scaled(canvas.factor).touching(region)]


def decode_patch(context: Context, layer: int, slot: str, patch: Box) -> NDArray[np.float32]:
    """(3, 8 h, 8 w) of what the decoder makes of a patch; the enlarged source where nothing counts."""
    pixels = patch.scaled(context.canvas.factor)
    image = context.enlarged(layer, pixels).base
    if context.is_empty(layer, pixels):
        return image.cpu().numpy()
    latent = torch.from_numpy(context.store.read(f"latents/{layer}/{slot}", patch))
    decoded = context.network.decode(latent[None], image[None], context.plan.config.sampling.cfw)
    return decoded[0].float().cpu().numpy()


def decode_block(context: Context, layer: int, index: Index, *decoded: NDArray[np.float32]) -> dict[str, Any]:
    """Blend the patches of a block, in the order of `patches_of`, correct the colours and store the samples."""
    plan = context.plan
    blocks, name = context.canvas.output_blocks, f"output/{layer}"
    box, bands = blocks.box(index), plan.layers[layer]
    samples = np.empty((len(bands), box.height, box.width), dtype=plan.header.dtype)
    for strip in strips(box):
        samples[(slice(None), *strip.within(box))] = _decode_strip(context, layer, index, strip, decoded)
    return {"checksums": {name: context.store.write(name, blocks, index, samples)}}


def strips(box: Box) -> list[Box]:
    """A block in rows of chunks: the caches of a processor like them better than the whole."""
    return [Box(top, box.left, min(top + CHUNK, box.bottom), box.right) for top in range(box.top, box.bottom, CHUNK)]


def _decode_strip(
    context: Context, layer: int, index: Index, strip: Box, decoded: tuple[NDArray[np.float32], ...]
) -> NDArray[Any]:
    plan, bands = context.plan, context.plan.layers[layer]
    valid = context.valid(layer, strip)
    stretch = context.stretch.of(bands)
    if valid is not None and not valid.any():
        return to_samples(torch.zeros(len(bands), strip.height, strip.width), plan.header, valid)
    color = plan.config.sampling.color
    region = _with_reach(plan, strip) if color == "wavelet" else strip
    content, enlarged = _blended(context, layer, index, region, decoded)
    style = enlarged.base if enlarged.excess is None else enlarged.base + enlarged.excess
    if color == "adain":
        content = adain_correction(content[None], *_layer_statistics(context, layer))[0]
    if enlarged.excess is not None:
        content = content + enlarged.excess
    if color == "wavelet":
        content = wavelet_correction(content, style)[(slice(None), *strip.within(region))]
    return to_samples(stretch.undo(_bands(content, len(bands))).cpu(), plan.header, valid)


def _blended(
    context: Context, layer: int, index: Index, region: Box, decoded: tuple[NDArray[np.float32], ...]
) -> tuple[Tensor, Enlarged]:
    """What the decoder made of a part of the canvas, and the source enlarged there."""
    grid = context.canvas.patches.scaled(context.canvas.factor)
    wanted = set(grid.touching(region))
    predictions = []
    for patch, values in zip(patches_of(context.plan, index), decoded, strict=True):
        tile = patch.scaled(context.canvas.factor)
        if tile in wanted:
            part = tile.overlap(region)
            assert part is not None
            crop = as_tensor(values[(slice(None), *part.within(tile))])
            predictions.append(Prediction(tile, part, crop.to(context.network.device)))
    return blend(grid, region, predictions), context.enlarged(layer, region)


def _bands(content: Tensor, n_bands: int) -> Tensor:
    """Three channels back to the bands they came from: what was repeated is averaged."""
    return torch.cat([content[: n_bands - 1], content[n_bands - 1 :].mean(dim=0, keepdim=True)])


def _with_reach(plan: Plan, pixels: Box) -> Box:
    region = grown(pixels, WAVELET_REACH).overlap(plan.canvas.target)
    assert region is not None
    return region


def _unscaled(box: Box, factor: int) -> Box:
    return Box(box.top // factor, box.left // factor, box.bottom // factor, box.right // factor)


# AdaIN needs the mean and standard deviation of a whole layer, so a layer is decoded twice.


def gather_statistics(context: Context, layer: int, index: Index, *decoded: NDArray[np.float32]) -> dict[str, Any]:
    """Sums over a block's pixels that count, of what the decoder made and of the enlarged source, by channel."""
    canvas = context.canvas
    box = canvas.output_blocks.box(index)
    n, sums = 0.0, np.zeros((2, 2, 3))
    for strip in strips(box):
        content, enlarged = _blended(context, layer, index, strip, decoded)
        valid = context.valid(layer, strip)
        counts = torch.ones(strip.height, strip.width) if valid is None else valid.all(dim=0)
        counts = counts.to(content.device, torch.float64)
        n += float(counts.sum())
        for i, picture in enumerate((content, enlarged.base)):
            values = picture.double() * counts
            sums[i, 0] += values.sum(dim=(1, 2)).cpu().numpy()
            sums[i, 1] += (values * picture.double()).sum(dim=(1, 2)).cpu().numpy()
    return {"n": n, "sums": sums.tolist()}


def _layer_statistics(context: Context, layer: int) -> tuple[ChannelStatistics, ChannelStatistics]:
    """Of the whole layer: what the decoder made, and the enlarged source."""
    known = context.layer_statistics
    if layer not in known:
        markers = context.store.markers(f"{STATISTICS}/{layer}")
        n = sum(markers[index]["n"] for index in sorted(markers))
        sums = sum((np.array(markers[index]["sums"]) for index in sorted(markers)), np.zeros((2, 2, 3)))
        pair = []
        for total, squares in sums:
            mean = total / max(n, 1.0)
            variance = np.maximum(squares - n * mean**2, 0.0) / max(n - 1.0, 1.0)
            column = [torch.tensor(v, dtype=torch.float32, device=context.network.device)[None, :, None, None]
                      for v in (mean, np.sqrt(variance + 1e-5))]  # fmt: skip
            pair.append(ChannelStatistics(*column))
        known[layer] = pair[0], pair[1]
    return known[layer]
