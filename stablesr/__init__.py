"""StableSR, latent diffusion super-resolution (Wang et al., IJCV 2024): tensors in, tensors out, one device."""

from stablesr.config import PRESETS, StableSRConfig
from stablesr.errors import CheckpointError, DownloadError, StableSRError
from stablesr.loading import UntrainedWeights, load
from stablesr.model import StableSR

__all__ = [
    "PRESETS",
    "CheckpointError",
    "DownloadError",
    "StableSR",
    "StableSRConfig",
    "StableSRError",
    "UntrainedWeights",
    "load",
]
