"""What a network costs: counted on shapes alone, without weights and without a GPU."""

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import NEAREST
from pipeline.raster.header import Frozen
from stablesr.config import StableSRConfig
from stablesr.model import StableSR


class Flops(Frozen):
    """Floating-point operations (a multiplication and an addition are two) and sizes of one network."""

    parameters: int
    """Without the text tower."""
    tile_step: int
    """UNet and time-aware encoder, one tile, one step, one prompt."""
    encode_patch: int
    decode_patch: int
    activations: int
    """Elements that the busiest of the networks holds at once, about."""


@cache
def count_flops(config: StableSRConfig, patch_height: int, patch_width: int) -> Flops:
    """Count them.

    Args:
        patch_height: of what the autoencoder sees at once, in latents.
        patch_width: likewise.
    """
    if config.name == NEAREST:
        return Flops(parameters=0, tile_step=0, encode_patch=0, decode_patch=0, activations=0)
    with torch.device("meta"):
        model = StableSR(config).eval()
        tile = torch.empty(1, config.unet.latent_channels, config.tile, config.tile)
        latent = torch.empty(1, config.unet.latent_channels, patch_height, patch_width)
        image = torch.empty(1, 3, *(config.autoencoder.factor * side for side in latent.shape[-2:]))
        prompt, time = model.prepare_prompt(model.null_context), model.embed_time(torch.zeros(1))
        counts = []
        with torch.inference_mode():
            for network in (
                lambda: model.predict(tile, tile, time, prompt),
                lambda: model.encode(image),
                lambda: model.decode(latent, image, 0.5),
            ):
                with FlopCounterMode(display=False) as counter:
                    network()
                counts.append(counter.get_total_flops())
    # The decoder at full resolution is the busiest: a few copies of its widest level there, and those that it fuses.
    activations = 6 * config.autoencoder.widths[0] * image.shape[-1] * image.shape[-2]
    return Flops(
        parameters=sum(p.numel() for p in model.parameters()),
        tile_step=counts[0],
        encode_patch=counts[1],
        decode_patch=counts[2],
        activations=activations,
    )
