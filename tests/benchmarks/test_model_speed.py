"""How near the networks come to what the device can do.

In the ordinary run everything is small: the test shows that the measurement works. For figures:

    pytest tests/benchmarks -s --full-size

prints, for the preset `tiny` and for the full-size network with random weights, in every precision that the device has:
time per tile-step (UNet and time-aware encoder), per encoding and CFW decoding of 512 x 512 pixels, floating-point
operations per second, the peak of plain matrix products and of a typical convolution in the same precision in the same
run, and the ratios to them. Only the ratios mean anything: machines are shared.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stablesr.config import PRESETS, StableSRConfig
from stablesr.loading import random_model
from stablesr.model import StableSR

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

REFERENCE_RATIO = 100 / 174
"""What the reference implementation reaches of a plain fp32 matrix product: 100 of 174 GFLOP/s, on two cores."""


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs, after one that does not count; seconds."""
    call()
    times = []
    for _ in range(repeats):
        _synchronize()
        begin = time.perf_counter()
        call()
        _synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of one call, two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matmul_peak(dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: a @ b, 5)


def convolution_peak(dtype: torch.dtype, channels: int = 320, side: int = 64) -> float:
    """FLOP/s of a 3 x 3 convolution of the UNet's first level."""
    x = torch.randn(1, channels, side, side, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1).to(DEVICE, dtype)
    conv.to(memory_format=torch.channels_last)
    return 2 * side * side * channels * channels * 9 / best_seconds(lambda: conv(x), 5)


def measured_calls(model: StableSR, batch: int) -> dict[str, Callable[[], object]]:
    config = model.config
    x, latent = torch.randn(2, batch, config.unet.latent_channels, config.tile, config.tile, device=DEVICE)
    prompt, shifts = model.prepare_prompt(model.null_context), model.embed_time(500)
    side = 512
    image = torch.rand(1, 3, side, side, device=DEVICE) * 2 - 1
    patch = torch.randn(1, 4, side // model.latent_factor, side // model.latent_factor, device=DEVICE)
    return {
        "tile-step": lambda: model.predict(x, latent, shifts, prompt),
        "encode 512": lambda: model.encode(image),
        "CFW decode 512": lambda: model.decode(patch, image, 0.5),
    }


def report(config: StableSRConfig, dtype: torch.dtype, *, batch: int = 1, repeats: int = 3, side: int = 2048) -> dict:
    """Measure one preset in one precision; print a line a part; return the ratios to the matrix product."""
    model = random_model(config, device=DEVICE, dtype=dtype)
    peak, conv = matmul_peak(dtype, side), convolution_peak(dtype)
    name = f"{config.name} {str(dtype).removeprefix('torch.')} on {DEVICE.type}, batch {batch}"
    print(f"\n{name}: matmul {peak / 1e9:.0f} GFLOP/s, convolution {conv / 1e9:.0f} GFLOP/s")
    ratios = {}
    with torch.inference_mode():
        for part, call in measured_calls(model, batch).items():
            work = flops(call)
            seconds = best_seconds(call, repeats)
            ratios[part] = work / seconds / peak
            per_tile = seconds / batch if part == "tile-step" else seconds
            print(
                f"  {part:15s} {per_tile * 1e3:9.1f} ms  {work / 1e9:8.1f} GFLOP  {work / seconds / 1e9:7.0f} GFLOP/s"
                f"  {ratios[part]:.2f} of matmul, {work / seconds / conv:.2f} of convolution,"
                f" {ratios[part] / REFERENCE_RATIO:.2f} x the reference's share"
            )
    if DEVICE.type == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the device")
    print(
        f"  peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB resident, process so far"
    )
    return ratios


def test_measures_every_part_of_a_small_network() -> None:
    config = replace(PRESETS["tiny"], tile=16)
    ratios = report(config, torch.float32, repeats=1, side=256)
    assert ratios.keys() == {"tile-step", "encode 512", "CFW decode 512"}
    assert all(ratio > 0 for ratio in ratios.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["tiny", "sd21-512"])
def test_full_size(preset: str, dtype: torch.dtype, full_size: bool) -> None:
    if not full_size:
        pytest.skip("figures are taken with --full-size")
    batches = (1, 8, 16) if DEVICE.type == "cuda" else (1,)
    for batch in batches:
        assert report(PRESETS[preset], dtype, batch=batch)
