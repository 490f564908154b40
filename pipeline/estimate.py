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

PIXELS_S = 0.15e-6
"""CPU seconds of a target pixel and band outside the network: blending, colour, compression, twice written; see
tests/benchmarks/notes."""


def measure_seconds(plan: Plan) -> float:
    """Expected seconds of a whole run with one worker on this machine, the network as far as it goes measured.

    Takes a few seconds itself. A guess: within a factor of two for most.
    """
    pixels = plan.target.height * plan.target.width * plan.target.count * PIXELS_S
    if plan.architecture.name == NEAREST:
        return pixels
    return pixels + plan.total_flops / measure_flops(plan)


def measure_flops(plan: Plan) -> float:
    """FLOP per second of the plan's network on its device, about."""
    model, config = plan.config.model, plan.architecture
    device = torch.device(choose_device(model.device))
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = PRECISIONS.get(model.precision, default)
    with torch.inference_mode():
        if plan.flops.tile_step < SMALL:
            from stablesr.loading import random_model

            network = random_model(config, device=device, dtype=dtype)
            if device.type == "cpu":
                network.pack()
            x = torch.randn(plan.config.sampling.batch, plan.latent_channels, config.tile, config.tile, device=device)
            shifts, prompt = network.embed_time(500), network.prepare_prompt(network.null_context)
            seconds = _seconds(lambda: network.predict(x, x, shifts, prompt), device)
            return plan.flops.tile_step * len(x) / seconds
        width = config.unet.width
        conv = torch.nn.Conv2d(width, width, 3, padding=1, device=device, dtype=dtype)
        conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stubs lack it
        y = torch.randn(1, width, config.tile, config.tile, device=device, dtype=dtype)
        y = y.to(memory_format=torch.channels_last)
        seconds = _seconds(lambda: conv(y), device)
        return EFFICIENCY * 2 * 9 * width * width * config.tile**2 / seconds


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
