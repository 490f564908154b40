"""How near the networks come to what the device can do.

In the ordinary run everything is small: the test shows that the measurement works. For figures:

    pytest tests/benchmarks -s --full-size

prints, for the preset `tiny` and for the full-size network with random weights, in every precision that the device has:
time per tile-step (UNet and time-aware encoder), per encoding and CFW decoding of 512 x 512 pixels, floating-point
operations per second, the peak of plain matrix products and of a typical convolution in the same precision in the same
run, the ratios to them, and how much faster a tile-step is than the same networks run the plain way. Only the ratios
mean anything: machines are shared.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stablesr.config import PRESETS, StableSRConfig
from stablesr.loading import random_model
from stablesr.model import StableSR

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def flops(config: StableSRConfig, batch: int, side: int) -> dict[str, int]:
    """Floating-point operations of each part, two for each multiply-add; counted without computing anything.

    (Computing on a CPU, PyTorch's counter would not see its fused attention.)
    """
    with torch.device("meta"):
        model = StableSR(config)
    work = {}
    for part, call in measured_calls(model, batch, side).items():
        with FlopCounterMode(display=False) as counter:
            call()
        work[part] = counter.get_total_flops()
    return work


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


def measured_calls(model: StableSR, batch: int, side: int) -> dict[str, Callable[[], object]]:
    """The parts that a run is made of; `side` is that of the autoencoder's patch in pixels."""
    config, device = model.config, model.device
    x, latent = torch.randn(2, batch, config.unet.latent_channels, config.tile, config.tile, device=device)
    prompt, shifts = model.prepare_prompt(model.null_context), model.embed_time(torch.full((1,), 500, device=device))
    image = torch.rand(1, 3, side, side, device=device) * 2 - 1
    patch = torch.randn(1, 4, side // model.latent_factor, side // model.latent_factor, device=device)
    encoded = model.cfw.encode_features(image.to(model.dtype, memory_format=torch.channels_last))

    def cfw_decode() -> Tensor:
        return model.cfw.decode_wrapped(
            patch.to(model.dtype, memory_format=torch.channels_last), encoded.features, weight=0.5
        )

    return {
        "tile-step": lambda: model.predict(x, latent, shifts, prompt),
        "encode": lambda: model.encode(image),
        "CFW decode": cfw_decode,
    }


def plain_tile_step(model: StableSR, batch: int) -> Callable[[], object]:
    """The same tile-step the plain way: planar memory, softmax attention in full, nothing prepared in advance."""
    model = copy.deepcopy(model)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    shape = batch, model.config.unet.latent_channels, model.config.tile, model.config.tile
    x, latent = torch.randn(2, *shape, device=DEVICE).to(model.dtype)

    def step() -> Tensor:
        t = torch.full((batch,), 500, device=DEVICE)
        unet, encoder = model.unet, model.time_encoder
        with sdpa_kernel(SDPBackend.MATH):
            conditions = encoder(latent, encoder.embed_time(t))
            return unet(x, unet.embed_time(t), conditions, unet.embed_prompt(model.null_context))

    return step


def report(
    config: StableSRConfig, dtype: torch.dtype, *, batch: int = 1, repeats: int = 3, side: int = 512, matrix: int = 2048
) -> dict[str, float]:
    """Measure one preset in one precision; print a line a part; return the shares of the matrix product's speed."""
    model = random_model(config, device=DEVICE, dtype=dtype)
    peak, conv = matmul_peak(dtype, matrix), convolution_peak(dtype)
    name = f"{config.name} {str(dtype).removeprefix('torch.')} on {DEVICE.type}, batch {batch}"
    print(f"\n{name}: matmul {peak / 1e9:.0f} GFLOP/s, convolution {conv / 1e9:.0f} GFLOP/s")
    shares, work = {}, flops(config, batch, side)
    with torch.inference_mode():
        plain = best_seconds(plain_tile_step(model, batch), repeats)
        if DEVICE.type == "cpu":
            model.pack()
        for part, call in measured_calls(model, batch, side).items():
            seconds = best_seconds(call, repeats)
            shares[part] = work[part] / seconds / peak
            print(
                f"  {part:15s} {seconds / batch * 1e3:9.1f} ms a tile or patch  {work[part] / 1e9:8.1f} GFLOP"
                f"  {work[part] / seconds / 1e9:7.0f} GFLOP/s  {shares[part]:.2f} of matmul,"
                f" {work[part] / seconds / conv:.2f} of convolution"
                + (f"; {plain / seconds:.2f} times as fast as the plain way" if part == "tile-step" else "")
            )
    if DEVICE.type == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the device")
    return shares


def distance_from_fp32(config: StableSRConfig, dtype: torch.dtype) -> float:
    """Root mean square of the difference of two predictions, in units of that of the fp32 prediction."""
    x, latent = torch.randn(2, 1, config.unet.latent_channels, config.tile, config.tile, device=DEVICE)
    predictions = []
    for precision in (torch.float32, dtype):
        model = random_model(config, device=DEVICE, dtype=precision)
        with torch.inference_mode():
            time, prompt = model.embed_time(500), model.prepare_prompt(model.null_context)
            predictions.append(model.predict(x, latent, time, prompt))
    exact, rounded = predictions
    return float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def test_measures_every_part_of_a_small_network() -> None:
    config = replace(PRESETS["tiny"], tile=16)
    shares = report(config, torch.float32, repeats=1, side=64, matrix=256)
    assert shares.keys() == {"tile-step", "encode", "CFW decode"}
    assert all(share > 0 for share in shares.values())


def test_bf16_stays_near_fp32() -> None:
    assert 0 < distance_from_fp32(replace(PRESETS["tiny"], tile=16), torch.bfloat16) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", ["tiny", "sd21-512"])
def test_full_size(preset: str, dtype: torch.dtype, full_size: bool) -> None:
    if not full_size:
        pytest.skip("figures are taken with --full-size")
    for batch in (1, 8, 16) if DEVICE.type == "cuda" else (1,):
        assert report(PRESETS[preset], dtype, batch=batch)
    if dtype != torch.float32:
        print(f"  prediction's distance from fp32: {distance_from_fp32(PRESETS[preset], dtype):.2%} (RMS)")
