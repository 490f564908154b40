"""How long a run will take, from a short measurement on this machine's device."""

import time
from collections.abc import Callable

import torch

from pipeline.config import NEAREST
from pipeline.network import PRECISIONS, choose_device
from pipeline.plan import Plan

EFFICIENCY = 0.8
"""Of a full-size step, relative to a bare convolution of its widest level; see tests/benchmarks/notes."""

SMALL = 10**11
"""FLOP of a tile step below which the network itself is measured, with random weights."""

MEASURE_S = 0.5

PIXELS_S = 0.09e-6
"""CPU seconds of a target pixel and band outside the network: blending, colour, compression, twice written; see
tests/benchmarks/notes."""

PATCH_SIDE = 256
"""Pixels, of the features on which the speed of the autoencoder is measured."""


def measure_seconds(plan: Plan) -> float:
    """Expected seconds of a whole run with one worker on this machine, the network as far as it goes measured.

    Takes a few seconds itself. A guess: within a factor of two for most.
    """
    pixels = plan.target.height * plan.target.width * plan.target.count * PIXELS_S
    if plan.architecture.name == NEAREST:
        return pixels
    in_tiles = plan.tile_steps * plan.flops.tile_step
    return pixels + in_tiles / measure_flops(plan) + (plan.total_flops - in_tiles) / measure_patch_flops(plan)


def measure_flops(plan: Plan) -> float:
    """FLOP per second of the plan's tile steps on its device, about."""
    config, (device, dtype) = plan.architecture, _device(plan)
    if plan.flops.tile_step >= SMALL:
        return EFFICIENCY * _convolution(config.unet.width, config.tile, device, dtype)
    from stablesr.loading import random_model

    network = random_model(config, device=device, dtype=dtype)
    if device.type == "cpu":
        network.pack()
    x = torch.randn(plan.config.sampling.batch, plan.latent_channels, config.tile, config.tile, device=device)
    with torch.inference_mode():
        shifts, prompt = network.embed_time(500), network.prepare_prompt(network.null_context)
        return plan.flops.tile_step * len(x) / _seconds(lambda: network.predict(x, x, shifts, prompt), device)


def measure_patch_flops(plan: Plan) -> float:
    """FLOP per second of the autoencoder, which is convolutions, most of them on larger sides than the UNet's."""
    return EFFICIENCY * _convolution(plan.architecture.autoencoder.width, PATCH_SIDE, *_device(plan))


def _device(plan: Plan) -> tuple[torch.device, torch.dtype]:
    device = torch.device(choose_device(plan.config.model.device))
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, PRECISIONS.get(plan.config.model.precision, default)


def _convolution(width: int, side: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a bare 3 x 3 convolution."""
    conv = torch.nn.Conv2d(width, width, 3, padding=1, device=device, dtype=dtype)
    conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stubs lack it
    y = torch.randn(1, width, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return 2 * 9 * width * width * side**2 / _seconds(lambda: conv(y), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The best of some runs, after one to warm up."""
    best, until = float("inf"), time.perf_counter() + MEASURE_S
    work()
    while time.perf_counter() < until or best == float("inf"):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
