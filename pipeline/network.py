"""The networks that a run can use: StableSR, and one that only repeats pixels.

A stage knows the protocol and not what is behind it.
"""

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import NEAREST, Model, Sampling
from pipeline.errors import ConfigError
from stablesr import PRESETS, CheckpointError, StableSRConfig, UntrainedWeights, hub, load
from stablesr.aggregation import Prediction, in_batches
from stablesr.autoencoder import Posterior
from stablesr.box import Box
from stablesr.checkpoint import open_model_file
from stablesr.config import AutoencoderConfig, DiffusionConfig, UNetConfig
from stablesr.model import DEFAULT_GUIDANCE, StableSR
from stablesr.schedule import Schedule, full_schedule, prediction_of


class Network(Protocol):
    """What the stages ask of a network; shapes and ranges as in `StableSR`'s methods of the same names."""

    config: StableSRConfig
    schedule: Schedule

    @property
    def device(self) -> torch.device: ...

    def enlarge(self, image: Tensor, scale: int) -> Tensor: ...

    def encode(self, image: Tensor) -> Posterior: ...

    def embed_time(self, timestep: int) -> Any: ...

    def predict_tiles(
        self, tiles: Sequence[Box], frame: Box, x: Tensor, latent: Tensor, time: Any, prompt: Any, batch: int
    ) -> Iterator[Prediction]: ...

    def decode(self, latent: Tensor, image: Tensor, cfw: float) -> Tensor: ...


ENLARGE_REACH = 2
"""Source pixels around a window that its enlargement may depend on, for any network."""


class Nearest:
    """A network that knows nothing: every pixel of the target is the source pixel under it.

    It goes through all the motions of StableSR (latents, noise, steps, blending) at no cost in arithmetic, so that
    disks, memory and clusters can be rehearsed; and since its result is known, everything around it can be tested.
    A latent holds one value for each source pixel, or part of one, that lies in its 8 x 8 pixels.
    """

    def __init__(self, scale: int, device: str | torch.device = "cpu") -> None:
        self.config = _nearest_config(scale)
        self.schedule = full_schedule(self.config.diffusion)
        self.device = torch.device(device)
        self._cell = math.gcd(scale, self.config.autoencoder.factor)
        """Target pixels a side that are certainly equal: they lie in one source pixel, wherever it begins."""

    def enlarge(self, image: Tensor, scale: int) -> Tensor:
        *planes, height, width = image.shape
        cells = image[..., :, None, :, None].expand(*planes, height, scale, width, scale)
        return cells.reshape(*planes, height * scale, width * scale).contiguous()  # of one pixel it would be a view

    def encode(self, image: Tensor) -> Posterior:
        image = image.to(self.device)[..., :: self._cell, :: self._cell]
        mean = F.pixel_unshuffle(image, self.config.autoencoder.factor // self._cell)
        return Posterior(mean, torch.full_like(mean, -30.0))

    def embed_time(self, timestep: int) -> float:
        """alpha-bar at that time."""
        return float(self.schedule.alpha_bar[timestep])

    def predict_tiles(
        self, tiles: Sequence[Box], frame: Box, x: Tensor, latent: Tensor, time: Any, prompt: Any, batch: int
    ) -> Iterator[Prediction]:
        def predict(x: Tensor, latent: Tensor) -> Tensor:
            return prediction_of(x, latent, time, self.config.diffusion.parameterization)

        return in_batches(predict, tiles, frame, (x, latent), batch)

    def decode(self, latent: Tensor, image: Tensor, cfw: float) -> Tensor:
        unscaled = latent.to(self.device) / self.config.diffusion.latent_scale
        pixels = F.pixel_shuffle(unscaled, self.config.autoencoder.factor // self._cell)
        return self.enlarge(pixels, self._cell)


def _nearest_config(scale: int) -> StableSRConfig:
    """Shapes of the latents; the sizes of the networks mean nothing."""
    channels = 3 * (AutoencoderConfig().factor // math.gcd(scale, AutoencoderConfig().factor)) ** 2
    return replace(
        PRESETS["tiny"],
        name=NEAREST,
        unet=UNetConfig(latent_channels=channels),
        time_encoder=StableSRConfig().time_encoder,
        autoencoder=replace(AutoencoderConfig(), latent_channels=channels),
        text=StableSRConfig().text,
        diffusion=DiffusionConfig(parameterization="v"),
        steps=4,
    )


def architecture(weights: str, scale: int) -> StableSRConfig:
    """The sizes of a network, without loading it.

    Raises:
        ConfigError: if there is no such preset or file, or the file is not a complete model.
    """
    if weights == NEAREST:
        return _nearest_config(scale)
    if weights in PRESETS:
        return PRESETS[weights]
    if not Path(weights).is_file():
        raise ConfigError(
            f"the weights {weights!r} are neither a file nor one of the presets {', '.join([*PRESETS, NEAREST])}"
        )
    try:
        with open_model_file(weights) as (config, _):
            return config
    except (CheckpointError, OSError) as error:
        raise ConfigError(f"the weights {weights} cannot be used: {error}") from None


def weights_fingerprint(weights: str) -> str:
    """What identifies weights: a SHA-256 of the file, the pinned ones of released files, or a name for random ones."""
    if weights == NEAREST:
        return NEAREST
    if weights in PRESETS:
        embedded = resources.files("stablesr") / "data" / f"{weights}.safetensors"
        if embedded.is_file():
            with resources.as_file(embedded) as path:
                return _sha256(path)
        released = hub.RELEASED.get(weights, ())
        return "+".join(file.sha256 or file.filename for file in released) or f"{weights}, untrained"
    return _sha256(Path(weights))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_untrained(weights: str) -> bool:
    """Whether a preset's weights are random numbers."""
    return weights in PRESETS and weights_fingerprint(weights).endswith("untrained")


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> str:
    """ "auto" to a GPU, if there is one.

    Raises:
        ConfigError: if there is no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}: PyTorch sees no GPU here\nhint: --device cpu")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r}: {str(error).splitlines()[0]}") from None
    return device


def open_network(model: Model, scale: int) -> Network:
    """Load a network onto its device."""
    device = choose_device(model.device)
    if model.weights == NEAREST:
        return Nearest(scale, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWeights)  # the run says so itself, once
        return load(model.weights, device, PRECISIONS.get(model.precision), compiled=model.compiled)


def prepare_prompt(network: Network, sampling: Sampling) -> Any:
    """What the network is told in words, computed once."""
    if not isinstance(network, StableSR):
        return None
    negative = None if sampling.negative_prompt is None else network.embed_text(sampling.negative_prompt)
    return network.prepare_prompt(network.embed_text(sampling.prompt), negative, guidance_scale(sampling))


def guidance_scale(sampling: Sampling) -> float:
    """Of classifier-free guidance; 1 is none."""
    if sampling.guidance is not None:
        return sampling.guidance
    return 1.0 if sampling.negative_prompt is None else DEFAULT_GUIDANCE
