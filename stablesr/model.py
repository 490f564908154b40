"""StableSR: the networks together, from an image that fits in memory to one that is sharper."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stablesr.aggregation import Prediction, TileGrid, blend, in_batches
from stablesr.autoencoder import Autoencoder, Posterior
from stablesr.blocks import KeysValues
from stablesr.box import Box
from stablesr.cfw import CFWAutoencoder
from stablesr.color import adain_correction, channel_statistics, wavelet_correction
from stablesr.config import StableSRConfig
from stablesr.images import from_image, to_image_like
from stablesr.noise import POSTERIOR, START, noise
from stablesr.packing import can_pack, pack_convolutions, seen_shapes
from stablesr.resize import reflect_to, upscale_bicubic
from stablesr.samplers import Step, ddim_steps, ddpm_steps, guide, take_step
from stablesr.schedule import Schedule, add_noise, full_schedule
from stablesr.text import TextTower, encode_prompts
from stablesr.time_encoder import TimeEncoder
from stablesr.unet import UNet

Color = Literal["wavelet", "adain", "none"]
Sampler = Literal["ddpm", "ddim"]
Start = Literal["latent", "noise"]
PosteriorUse = Literal["mean", "sample"]

PATCH = 128
"""Side of what the autoencoder sees at once, in latents (1024 target pixels)."""

PATCH_OVERLAP = 32
"""Latents that neighbouring patches share."""

DEFAULT_GUIDANCE = 7.0
"""Scale of classifier-free guidance where a negative prompt is given without one; the published scripts' value."""


@dataclass(frozen=True)
class Prompt:
    """What a run is told in words, ready for the UNet."""

    keys_values: tuple[tuple[KeysValues, ...], ...]
    """Of one context; with guidance of two, the negative one first."""
    guidance: float | None = None
    """Scale of classifier-free guidance, or None for none."""


@dataclass(frozen=True)
class TimeShifts:
    """What one diffusion time means to every residual block of both networks, (1, C, 1, 1) each."""

    time_encoder: tuple[Tensor, ...]
    unet: tuple[Tensor, ...]


class StableSR(nn.Module):
    """Time-aware encoder, UNet, autoencoder and CFW decoder. The text tower is fetched when a prompt needs it.

    Latents here are scaled (about unit variance) and float32; the networks compute in the precision of their weights.
    """

    def __init__(self, config: StableSRConfig) -> None:
        """Build with random weights; see `load` for others."""
        super().__init__()
        self.config = config
        self.schedule: Schedule = full_schedule(config.diffusion)
        self.unet = UNet(config.unet)
        self.time_encoder = TimeEncoder(config.time_encoder)
        self.autoencoder = Autoencoder(config.autoencoder)
        self.cfw = CFWAutoencoder(config.autoencoder, config.cfw)
        self.null_context: Tensor
        self.register_buffer("null_context", torch.zeros(1, config.text.context_length, config.text.width))
        self.fetch_text_tower: Callable[[], TextTower] | None = None
        """Where prompts other than the empty one are embedded; used for the moment, not kept."""

    @property
    def device(self) -> torch.device:
        return self.null_context.device

    @property
    def dtype(self) -> torch.dtype:
        return self.null_context.dtype

    @property
    def latent_factor(self) -> int:
        """Pixels a side of one latent; 8 in every published model."""
        return self.config.autoencoder.factor

    def pack(self) -> None:
        """Lay out the weights of all convolutions for inference on a CPU, where this PyTorch can; for good.

        The layout is that for one tile, and for a patch of the autoencoder as large as a tile.
        """
        if not can_pack():
            return
        with torch.device("meta"), seen_shapes(twin := StableSR(self.config)) as shapes:
            x = torch.empty(1, self.config.unet.latent_channels, self.config.tile, self.config.tile)
            image = torch.empty(1, 3, *(self.latent_factor * side for side in x.shape[-2:]))
            twin.predict(x, x, twin.embed_time(torch.zeros(1)), twin.prepare_prompt(twin.null_context))
            twin.encode(image)
            twin.cfw.encode_features(image)
            twin.decode(x, image, cfw=1.0)
        pack_convolutions(self, shapes)

    def compile_networks(self) -> None:
        """Compile UNet and time-aware encoder, not packed, for the shapes of their first calls, which are slow."""
        self.unet.compile(dynamic=False)
        self.time_encoder.compile(dynamic=False)

    # Words

    def embed_text(self, prompt: str) -> Tensor:
        """(1, 77, W): the context of a prompt. The empty prompt's is stored with the weights.

        Raises:
            ValueError: if the prompt is not empty and the weights have no text tower.
        """
        if prompt == "":
            return self.null_context
        if self.fetch_text_tower is None:
            raise ValueError(f"prompt={prompt!r} needs a text tower, and these weights came without one")
        tower = self.fetch_text_tower()
        return encode_prompts(tower, [prompt]).to(self.device, self.dtype)

    def prepare_prompt(self, context: Tensor, negative: Tensor | None = None, guidance: float = 1.0) -> Prompt:
        """Compute once what a run needs of its contexts, (1, words, W) each.

        Guidance is off without a negative context or at a scale of exactly 1.
        """
        if negative is None or guidance == 1.0:
            return Prompt(self.unet.embed_prompt(context.to(self.device, self.dtype)))
        both = torch.cat([negative, context]).to(self.device, self.dtype)
        return Prompt(self.unet.embed_prompt(both), guidance)

    # One network evaluation

    def embed_time(self, timestep: int | Tensor) -> TimeShifts:
        """What the networks need of a diffusion time, 0 to 999; once per step. A tensor (B,) holds one per sample."""
        t = torch.as_tensor(timestep, device=self.device).reshape(-1)
        return TimeShifts(self.time_encoder.embed_time(t), self.unet.embed_time(t))

    def predict(self, x: Tensor, latent: Tensor, time: TimeShifts, prompt: Prompt) -> Tensor:
        """What the network makes of a batch of tiles: noise (eps) or velocity (v).

        Args:
            x: x_t, (B, 4, H, W).
            latent: of the low-resolution image at the same places, the same shape.
            time: from `embed_time`, of batch 1 or B.
            prompt: from `prepare_prompt`.

        Returns:
            (B, 4, H, W), float32; guided if the prompt is.
        """
        layout = torch.channels_last
        conditions = self.time_encoder(latent.to(self.dtype, memory_format=layout), time.time_encoder)
        x = x.to(self.dtype, memory_format=layout)
        if prompt.guidance is None:
            return self.unet(x, time.unet, conditions, prompt.keys_values).float()
        keys_values = tuple(
            tuple((k.repeat_interleave(len(x), 0), v.repeat_interleave(len(x), 0)) for k, v in blocks)
            for blocks in prompt.keys_values
        )
        shifts = tuple(shift if len(shift) == 1 else shift.repeat(2, 1, 1, 1) for shift in time.unet)
        negative, positive = self.unet(x.repeat(2, 1, 1, 1), shifts, conditions, keys_values).float().chunk(2)
        return guide(negative, positive, prompt.guidance)

    def predict_tiles(
        self,
        tiles: Sequence[Box],
        frame: Box,
        x: Tensor,
        latent: Tensor,
        time: TimeShifts,
        prompt: Prompt,
        batch: int,
    ) -> Iterator[Prediction]:
        """`predict` for tiles of a canvas, of which `x` and `latent`, (4, H, W) each, hold the box `frame`."""

        def predict(x: Tensor, latent: Tensor) -> Tensor:
            return self.predict(x, latent, time, prompt)

        return in_batches(predict, tiles, frame, (x, latent), batch)

    # Pixels and latents of a canvas

    def enlarge(self, image: Tensor, scale: int) -> Tensor:
        """The low-resolution image (..., H, W) at the target's size, as the networks want to see it; not clamped."""
        return upscale_bicubic(image, scale)

    def encode(self, image: Tensor) -> Posterior:
        """One patch (B, 3, H, W) in [-1, 1] to its posterior, unscaled and float32."""
        posterior = self.autoencoder.encode(image.to(self.device, self.dtype, memory_format=torch.channels_last))
        return Posterior(posterior.mean.float(), posterior.logvar.float())

    def decode(self, latent: Tensor, image: Tensor, cfw: float) -> Tensor:
        """One patch of scaled latents (B, 4, h, w) to pixels (B, 3, 8 h, 8 w), float32, not clamped.

        Args:
            image: the enlarged low-resolution image at the same place, (B, 3, 8 h, 8 w) in [-1, 1].
            cfw: weight of its features in the decoder, 0 to 1.
        """
        layout = torch.channels_last
        unscaled = (latent.to(self.device) / self.config.diffusion.latent_scale).to(self.dtype, memory_format=layout)
        if cfw == 0:
            return self.cfw.decode(unscaled).float()
        features = self.cfw.features(image.to(self.device, self.dtype, memory_format=layout))
        return self.cfw.decode_wrapped(unscaled, features, cfw).float()

    def encode_canvas(self, image: Tensor, patch: int = PATCH) -> Posterior:
        """A whole canvas (3, 8 H, 8 W) in [-1, 1], patch by patch, to the posterior (4, H, W) of its latents."""
        factor = self.latent_factor
        grid = patch_grid(image.shape[-2] // factor, image.shape[-1] // factor, patch)
        frame = grid.canvas.scaled(factor)
        predictions = []
        for box in grid:
            posterior = self.encode(image[(slice(None), *box.scaled(factor).within(frame))][None])
            predictions.append(Prediction(box, box, torch.cat([*posterior], dim=1)[0]))
        mean, logvar = blend(grid, grid.canvas, predictions).chunk(2)
        return Posterior(mean, logvar)

    def decode_canvas(self, latent: Tensor, image: Tensor, cfw: float, patch: int = PATCH) -> Tensor:
        """A whole canvas of scaled latents (4, H, W), patch by patch, to pixels (3, 8 H, 8 W); see `decode`."""
        factor = self.latent_factor
        grid = patch_grid(latent.shape[-2], latent.shape[-1], patch)
        frame = grid.canvas.scaled(factor)
        predictions = []
        for box in grid:
            pixels = box.scaled(factor)
            here = image[(slice(None), *pixels.within(frame))]
            decoded = self.decode(latent[(slice(None), *box.within(grid.canvas))][None], here[None], cfw)
            predictions.append(Prediction(pixels, pixels, decoded[0]))
        return blend(grid.scaled(factor), frame, predictions)

    # Images

    @torch.inference_mode()
    def upscale(
        self,
        image: NDArray[np.generic] | Tensor,
        scale: int = 4,
        *,
        steps: int | None = None,
        seed: int = 0,
        prompt: str = "",
        negative_prompt: str | None = None,
        guidance: float | None = None,
        color: Color = "wavelet",
        cfw: float = 0.5,
        sampler: Sampler = "ddpm",
        eta: float = 0.0,
        start: Start = "latent",
        posterior: PosteriorUse = "mean",
        overlap: int | None = None,
        batch: int = 1,
        patch: int = PATCH,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.generic] | Tensor:
        """Make an image `scale` times larger, with detail to match. The same arguments give the same image.

        Args:
            image: a NumPy array (H, W, 3) or (H, W), or a tensor (3, H, W) or (H, W); uint8 or uint16 of full range,
                or floating point within [0, 1].
            scale: integer, 1 to 8.
            steps: diffusion steps, 1 to 1000; None for the preset's number.
            seed: 0 to 2^64 - 1.
            prompt: what the picture shows, if words help.
            negative_prompt: what it should not look like; turns guidance on.
            guidance: scale of classifier-free guidance; 1 is none.
            color: how colours are brought back to those of the image.
            cfw: how much the decoder sees of the image: 0 for most detail, 1 for most fidelity.
            sampler: "ddpm" (ancestral, as published) or "ddim".
            eta: of DDIM: 0 is deterministic, 1 as random as DDPM.
            start: from the noised low-resolution latent, as published, or from pure noise.
            posterior: whether the low-resolution latent is the posterior's mean or a sample of it. (The reference
                samples; the mean is the same whatever the seed, and no noise enters the picture twice.)
            overlap: latents that neighbouring tiles share; None for half a tile.
            batch: tiles that go through the network at once.
            patch: side of what the autoencoder sees at once, in latents; lower it when memory runs out.
            progress: called with the steps done and the steps in all.

        Returns:
            The same kind of array, (scale * H, scale * W), with the same dtype and channels; integers are rounded.

        Raises:
            ValueError: if an argument is out of its range, or the image of a shape or dtype not listed, or has values
                that are not finite or lie outside [0, 1].
        """
        steps = self.config.steps if steps is None else steps
        overlap = self.config.tile // 2 if overlap is None else overlap
        guidance = DEFAULT_GUIDANCE if guidance is None and negative_prompt is not None else guidance
        _check_options(scale, cfw, eta, batch, patch, guidance, color=color, sampler=sampler, start=start,
                       posterior=posterior)  # fmt: skip
        if not 0 <= overlap < self.config.tile:
            raise ValueError(f"overlap={overlap} must be within 0 and {self.config.tile - 1} latents")
        visited = self.schedule.respaced(steps)
        schedule = ddpm_steps(visited) if sampler == "ddpm" else ddim_steps(visited, eta)
        source = from_image(image, self.device)  # (3, H, W) in [-1, 1]
        height, width = source.shape[-2] * scale, source.shape[-1] * scale

        canvas_height, canvas_width = (max(-(-n // self.latent_factor), self.config.tile) for n in (height, width))
        enlarged = self.enlarge(source, scale).clamp(-1.0, 1.0)
        enlarged = reflect_to(enlarged, canvas_height * self.latent_factor, canvas_width * self.latent_factor)
        grid = TileGrid.square(canvas_height, canvas_width, self.config.tile, overlap)

        def noise_at(step: int) -> Tensor:
            return noise(seed, 0, step, grid.canvas, self.config.unet.latent_channels).to(self.device)

        encoded = self.encode_canvas(enlarged, patch)
        unscaled = encoded.sample(noise_at(POSTERIOR)) if posterior == "sample" else encoded.mean
        latent = self.config.diffusion.latent_scale * unscaled
        negative = None if negative_prompt is None else self.embed_text(negative_prompt)
        words = self.prepare_prompt(self.embed_text(prompt), negative, 1.0 if guidance is None else guidance)

        first = noise_at(START)
        x = first if start == "noise" else add_noise(latent, first, float(self.schedule.alpha_bar[-1]))
        x = self.sample(x, latent, grid, schedule, words, noise_at, batch, progress)

        target = (slice(None), slice(height), slice(width))
        pixels, enlarged = self.decode_canvas(x, enlarged, cfw, patch)[target], enlarged[target]
        if image.ndim == 2:  # the three channels were one band
            pixels, enlarged = pixels.mean(dim=0, keepdim=True), enlarged[:1]
        if color == "wavelet":
            pixels = wavelet_correction(pixels, enlarged)
        elif color == "adain":
            content, style = pixels[None], enlarged[None]
            pixels = adain_correction(content, channel_statistics(content), channel_statistics(style))[0]
        return to_image_like(pixels, image)

    def sample(
        self,
        x: Tensor,
        latent: Tensor,
        grid: TileGrid,
        steps: Sequence[Step],
        prompt: Prompt,
        noise_at: Callable[[int], Tensor],
        batch: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Aggregation sampling of a whole canvas (StableSR, section 3.3, algorithm 1).

        Args:
            x: the start, (4, H, W) float32, H and W those of the grid.
            latent: of the low-resolution image, the same shape.
            steps: from `ddpm_steps` or `ddim_steps`.
            noise_at: the canvas-wide noise of a diffusion time, (4, H, W).

        Returns:
            The clean latents, (4, H, W).
        """
        parameterization = self.config.diffusion.parameterization
        for done, step in enumerate(steps, start=1):
            time = self.embed_time(step.timestep)
            tiles = self.predict_tiles([*grid], grid.canvas, x, latent, time, prompt, batch)
            prediction = blend(grid, grid.canvas, [*tiles])
            fresh = noise_at(step.timestep) if step.sigma else torch.zeros_like(x)
            x = take_step(x, prediction, fresh, step, parameterization)
            if progress is not None:
                progress(done, len(steps))
        return x


def patch_grid(height: int, width: int, patch: int = PATCH) -> TileGrid:
    """The autoencoder's patches of a canvas of `height` x `width` latents."""
    return TileGrid.fitted(height, width, patch, min(PATCH_OVERLAP, patch // 2))


def _check_options(
    scale: int, cfw: float, eta: float, batch: int, patch: int, guidance: float | None, **choices: str
) -> None:
    if type(scale) is not int or not 1 <= scale <= 8:
        raise ValueError(f"scale={scale!r} must be an integer from 1 to 8")
    for name, value in (("cfw", cfw), ("eta", eta)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}={value} must be within 0 and 1")
    for name, count in (("batch", batch), ("patch", patch)):
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    if guidance is not None and not np.isfinite(guidance):
        raise ValueError(f"guidance={guidance} must be finite")
    kinds = {"color": Color, "sampler": Sampler, "start": Start, "posterior": PosteriorUse}
    for name, choice in choices.items():
        if choice not in get_args(kinds[name]):
            raise ValueError(f"{name}={choice!r} must be one of {', '.join(get_args(kinds[name]))}")
