"""Frozen sizes of every part of StableSR, and the presets that are made of them.

The defaults are the published sizes: Stable Diffusion 2.1's networks with the modules that StableSR adds to them.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_type_hints

Parameterization = Literal["eps", "v"]


@dataclass(frozen=True)
class UNetConfig:
    """Stable Diffusion's denoiser with a SPADE layer in every residual block."""

    latent_channels: int = 4
    width: int = 320
    """Channels of the first level; a multiple of 32 and, to keep the time embedding alive in the norms, above 32."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each level in units of `width`; a level halves the sides of the one before."""
    blocks_per_level: int = 2
    """Residual blocks of a level on the way down; there is one more on the way up."""
    attention_factors: tuple[int, ...] = (1, 2, 4)
    """Downsampling factors whose levels have transformers; the middle always has one."""
    transformer_depth: int = 1
    head_channels: int = 64
    context_channels: int = 1024
    """Width of the text embedding."""
    condition_channels: int = 256
    """Width of the conditions that the time-aware encoder makes."""
    spade_channels: int = 128
    """Hidden channels of a SPADE layer."""

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * m for m in self.multipliers)


@dataclass(frozen=True)
class TimeEncoderConfig:
    """The time-aware encoder: half a UNet over the low-resolution latent."""

    latent_channels: int = 4
    width: int = 256
    multipliers: tuple[int, ...] = (1, 1, 2, 2)
    blocks_per_level: int = 2
    attention_factors: tuple[int, ...] = (1, 2, 4)
    heads: int = 4
    condition_channels: int = 256

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * m for m in self.multipliers)


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL autoencoder: 8 pixels a side become one latent, in the published sizes."""

    image_channels: int = 3
    latent_channels: int = 4
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * m for m in self.multipliers)

    @property
    def factor(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class CFWConfig:
    """Controllable feature wrapping: which decoder levels are fused with encoder features, and how."""

    levels: tuple[int, ...] = (1, 2)
    """Autoencoder levels (0 is full resolution) whose encoder features the decoder receives."""
    dense_blocks: int = 2
    growth: int = 32
    """Channels that each convolution of a dense block adds."""


@dataclass(frozen=True)
class TextConfig:
    """OpenCLIP's text tower; `layers` counts the last block too, although its output is never used."""

    width: int = 1024
    heads: int = 16
    layers: int = 24
    context_length: int = 77
    vocabulary: int = 49408


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and what the network predicts."""

    parameterization: Parameterization = "eps"
    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    latent_scale: float = 0.18215
    """Factor that gives the latents about unit variance."""


@dataclass(frozen=True)
class StableSRConfig:
    """Everything that fixes the networks' shapes, and how they are best run."""

    name: str = "sd21-512"
    unet: UNetConfig = field(default_factory=UNetConfig)
    time_encoder: TimeEncoderConfig = field(default_factory=TimeEncoderConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    cfw: CFWConfig = field(default_factory=CFWConfig)
    text: TextConfig = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    tile: int = 64
    """Side of what the network sees, in latents."""
    steps: int = 200
    """Diffusion steps of an image unless the caller asks for another number."""

    def __post_init__(self) -> None:
        unet, encoder = self.unet, self.time_encoder
        if len(unet.multipliers) != len(encoder.multipliers):
            raise ValueError(
                f"the UNet has {len(unet.multipliers)} levels and the time-aware encoder {len(encoder.multipliers)}; "
                "every level of the UNet needs a condition of its size"
            )
        if unet.condition_channels != encoder.condition_channels:
            raise ValueError(
                f"unet.condition_channels={unet.condition_channels} must equal "
                f"time_encoder.condition_channels={encoder.condition_channels}"
            )
        if unet.context_channels != self.text.width:
            raise ValueError(f"unet.context_channels={unet.context_channels} must equal text.width={self.text.width}")
        if self.tile < 1 or self.tile % self.tile_multiple:
            raise ValueError(f"tile={self.tile} must be a positive multiple of {self.tile_multiple} latents")

    @property
    def tile_multiple(self) -> int:
        """Sides of a tile must be multiples of this, so that the UNet's halvings come out even (latents)."""
        return int(2 ** (len(self.unet.multipliers) - 1))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "StableSRConfig":
        """Read what `to_json` wrote.

        Raises:
            ValueError: if it is not JSON, or a field is missing, unknown or of the wrong type.
        """
        config = _from_plain(cls, json.loads(text), where="config")
        assert isinstance(config, cls)
        return config


def _from_plain(cls: type, plain: Any, where: str) -> Any:
    if not isinstance(plain, dict):
        raise ValueError(f"{where} must be a mapping, not {type(plain).__name__}")
    hints = get_type_hints(cls)
    wanted = {f.name for f in fields(cls)}
    if wanted != plain.keys():
        missing, unknown = sorted(wanted - plain.keys()), sorted(plain.keys() - wanted)
        raise ValueError(f"{where} lacks {missing} and has unknown {unknown}")
    values = {}
    for key, value in plain.items():
        kind = hints[key]
        if hasattr(kind, "__dataclass_fields__"):
            values[key] = _from_plain(kind, value, f"{where}.{key}")
        elif isinstance(value, list):
            values[key] = tuple(value)
        else:
            values[key] = value
    return cls(**values)


_SD21 = StableSRConfig()

PRESETS: dict[str, StableSRConfig] = {
    config.name: config
    for config in (
        _SD21,
        replace(_SD21, name="sd21-768v", tile=96, diffusion=DiffusionConfig(parameterization="v")),
        replace(_SD21, name="turbo", steps=4),
        StableSRConfig(
            name="tiny",
            unet=UNetConfig(
                width=64,
                multipliers=(1, 1, 1, 1),
                blocks_per_level=1,
                attention_factors=(4,),
                head_channels=32,
                context_channels=32,
                condition_channels=64,
                spade_channels=32,
            ),
            time_encoder=TimeEncoderConfig(
                width=64, multipliers=(1, 1, 1, 1), blocks_per_level=1, attention_factors=(), condition_channels=64
            ),
            autoencoder=AutoencoderConfig(width=32, multipliers=(1, 2, 2, 2), blocks_per_level=1),
            cfw=CFWConfig(dense_blocks=1, growth=16),
            text=TextConfig(width=32, heads=2, layers=3),
            diffusion=DiffusionConfig(parameterization="v"),
            steps=8,
        ),
    )
}
"""The architectures with a name. `tiny` runs everything, everywhere, in seconds."""
