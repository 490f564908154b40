"""One upscaling in a process of its own, measured; prints what it took as one line of JSON.

    python -m tests.benchmarks.measured_run '{"source": "in.tif", "output": "out.btf", "run": {"workers": "local"}}'

CPU seconds are user and system time of all threads, exclusive of what is measured within; nothing else runs in the
process. What is measured are whole calls on blocks, patches and strips: the clock is read some dozens of times for each
megapixel.
"""

import functools
import json
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import network
from pipeline import store as store_module
from pipeline.config import make_config
from pipeline.events import Event, StageFinished, StageStarted
from pipeline.network import Nearest
from pipeline.raster.radiometry import Stretch
from pipeline.run import run
from pipeline.stages import decode
from pipeline.stages.context import Context
from pipeline.store import RunStore
from stablesr import StableSRConfig
from stablesr.autoencoder import Posterior
from stablesr.config import UNetConfig

LATENTS = 4
"""Channels of the stand-in's latents, as of StableSR's; those of the network that repeats pixels are more."""

TEXTURE = 0.01
"""Standard deviation of the detail that the stand-in's decoder adds, of [-1, 1]: repeated pixels alone would compress
too well, and too fast."""

PARTS: dict[str, list[tuple[Any, str]]] = {
    "decoder": [(decode, "decode_patch")],
    "enlarging the source": [(Context, "enlarged")],
    "blending": [(decode._Block, "blended")],
    "colour": [(decode, "wavelet_correction")],
    "radiometry": [(decode, "to_samples"), (Stretch, "undo")],
    "writing the store": [(RunStore, "write")],
    "reading the store": [(RunStore, "read")],
}
"""What is timed within a stage."""


class Clock:
    """CPU seconds by stage and part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = ["before"]
        self._at = time.process_time()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self._enter(event.stage)
        elif isinstance(event, StageFinished):
            self._leave()

    def timed(self, owner: Any, name: str, part: str) -> None:
        """Count the time of a function, under the stage that calls it."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            stage = self._open[-1].partition("/")[0]
            self._enter(f"{stage}/{part}")
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        setattr(owner, name, wrapper)

    def _enter(self, what: str) -> None:
        self._lap()
        self._open.append(what)

    def _leave(self) -> None:
        self._lap()
        self._open.pop()

    def _lap(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._at
        self._at = now


def stand_in() -> None:
    """In place of the network that repeats pixels, one that is as trivial, but whose latents take as many bytes as
    those of StableSR, and whose pictures have detail, as a real one's have, on which overlaps do not agree."""
    detail = torch.from_numpy(np.random.default_rng(0).normal(0.0, TEXTURE, (3, 1536, 1536)).astype(np.float32))
    plain = network._nearest_config

    def config(scale: int) -> StableSRConfig:
        config = plain(scale)
        autoencoder = replace(config.autoencoder, latent_channels=LATENTS)
        return replace(config, unet=UNetConfig(latent_channels=LATENTS), autoencoder=autoencoder)

    def encode(self: Nearest, image: Tensor) -> Posterior:
        means = F.avg_pool2d(image, self.config.autoencoder.factor)
        latent = torch.cat([means, means.mean(dim=1, keepdim=True)], dim=1)
        return Posterior(latent, torch.full_like(latent, -30.0))

    def decode(self: Nearest, latent: Tensor, image: Tensor, cfw: float) -> Tensor:
        start = int(latent[0, 0, 0, 0].abs() * 1e6) % 512
        return image.add_(detail[:, start : start + image.shape[-2], : image.shape[-1]])

    network._nearest_config = config
    Nearest.encode, Nearest.decode = encode, decode  # type: ignore[method-assign]


def count_bytes(counts: dict[str, int]) -> None:
    """Of the store: blocks and markers. Of the file its size at the end is known."""
    write, mark = RunStore.write, store_module.write_atomically

    def counted_write(self: RunStore, *args: Any) -> int:
        before = self.written
        checksum = write(self, *args)
        counts["store"] += self.written - before
        return checksum

    def counted_mark(path: Path, text: str) -> None:
        mark(path, text)
        counts["markers"] += len(text)

    RunStore.write = counted_write  # type: ignore[method-assign]
    store_module.write_atomically = counted_mark


def status(name: str) -> int:
    """Of this process, in bytes. (What getrusage calls the peak also knows the process that we were forked from.)"""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def written_to_disk() -> int:
    """What the system counts: bytes of pages that were made dirty."""
    with open("/proc/self/io", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("write_bytes"))


def measure(options: dict[str, Any], *, standing_in: bool) -> dict[str, Any]:
    clock, counts, peaks = Clock(), {"store": 0, "markers": 0}, {}
    count_bytes(counts)
    for part, functions in PARTS.items():
        for owner, name in functions:
            clock.timed(owner, name, part)
    if standing_in:
        stand_in()

    def listen(event: Event) -> None:
        clock(event)
        if isinstance(event, StageFinished):
            peaks[event.stage] = status("VmHWM"), status("VmRSS")

    started = time.monotonic()
    output = run(make_config(**options), listen)
    return {
        "cpu": dict(clock.seconds),
        "written": {**counts, "file": output.stat().st_size},
        "written_to_disk": written_to_disk(),
        "peak": status("VmHWM"),
        "peak_after": peaks,
        "wall": time.monotonic() - started,
    }


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps(measure(request, standing_in=request.pop("stand_in", False))))
