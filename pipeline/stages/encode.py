"""Stored source -> low-resolution latents: patches through the encoder, blended into blocks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.grid import Index
from pipeline.plan import Plan
from pipeline.stages.context import Context, as_tensor
from pipeline.store import RunStore
from stablesr.aggregation import Prediction, blend
from stablesr.autoencoder import Posterior
from stablesr.box import Box
from stablesr.noise import POSTERIOR, noise

TILES = "tiles"
"""In a block's marker, where there are holes: how many of the tiles at home in it have something to see."""


def create_arrays(plan: Plan, store: RunStore) -> None:
    """Arrays that this stage writes."""
    for layer in range(len(plan.layers)):
        store.create(f"lr_latents/{layer}", "latents", plan.latent_channels, plan.canvas.blocks, "float32")


def patches_of(plan: Plan, index: Index) -> list[Box]:
    """The patches that a block is blended from, in latents."""
    return plan.canvas.patches.touching(plan.canvas.blocks.box(index))


def patch_bytes(plan: Plan) -> int:
    """Of what becomes of a patch."""
    patches, sampled = plan.canvas.patches, plan.config.sampling.posterior == "sample"
    return 4 * plan.latent_channels * (1 + sampled) * patches.tile_height * patches.tile_width


def blocks_of(plan: Plan, patch: Box) -> Iterator[Index]:
    """The blocks that are blended from a patch."""
    return plan.canvas.blocks.touching(patch)


def encode_patch(context: Context, layer: int, patch: Box) -> NDArray[np.float32]:
    """(4, h, w) unscaled latents of a patch; with their log variance, (8, h, w), if the posterior is sampled.

    Where nothing counts nothing is encoded, and the latents are 0.
    """
    channels = context.plan.latent_channels
    sampled = context.plan.config.sampling.posterior == "sample"
    pixels = patch.scaled(context.canvas.factor)
    if context.is_empty(layer, pixels):
        return np.zeros((channels * (1 + sampled), patch.height, patch.width), dtype=np.float32)
    with context.patch_in_memory():
        posterior = context.network.encode(context.picture(layer, pixels)[None])
    return (torch.cat([*posterior], dim=1) if sampled else posterior.mean)[0].float().cpu().numpy()


def encode_block(context: Context, layer: int, index: Index, *encoded: NDArray[np.float32]) -> dict[str, Any]:
    """Blend the patches of a block, in the order of `patches_of`, and store its scaled latents."""
    plan, blocks = context.plan, context.canvas.blocks
    box = blocks.box(index)
    patches = patches_of(plan, index)
    predictions = [Prediction(p, p, as_tensor(v)) for p, v in zip(patches, encoded, strict=True)]
    moments = blend(context.canvas.patches, box, predictions)
    latent = moments[: plan.latent_channels]
    if plan.config.sampling.posterior == "sample":
        fresh = noise(plan.config.sampling.seed, layer, POSTERIOR, box, plan.latent_channels)
        latent = Posterior(latent, moments[plan.latent_channels :]).sample(fresh)
    name = f"lr_latents/{layer}"
    scaled = context.network.config.diffusion.latent_scale * latent
    payload: dict[str, Any] = {"checksums": {name: context.store.write(name, blocks, index, scaled.numpy())}}
    if plan.header.validity != "all":
        payload[TILES] = sum(not context.is_empty(layer, tile.scaled(context.canvas.factor))
                             for tile in context.canvas.at_home(index))  # fmt: skip
    return payload
