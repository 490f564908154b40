"""What is known of the presets' weights: which are here, which can be had, under which licence."""

from dataclasses import dataclass

from pipeline.network import is_untrained
from stablesr import PRESETS, hub

OUR_LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class Weights:
    """Of one preset."""

    preset: str
    state: str
    """Where they are, in words."""
    licence: str
    tile: int
    """Side of what the network sees, in target pixels."""
    steps: int
    """Diffusion steps of a picture, unless told otherwise."""


def list_weights() -> list[Weights]:
    """One for each preset."""
    return [_weights(name) for name in PRESETS]


def _weights(preset: str) -> Weights:
    config, released = PRESETS[preset], hub.RELEASED.get(preset, ())
    licence = released[0].licence if released else OUR_LICENCE
    state = _state_of_released(preset) if released else _state_of_embedded(preset)
    return Weights(preset, state, licence, config.tile * config.autoencoder.factor, config.steps)


def _state_of_embedded(preset: str) -> str:
    return "embedded, not trained yet" if is_untrained(preset) else "embedded"


def _state_of_released(preset: str) -> str:
    folder, files = hub.cache_folder(), hub.RELEASED[preset]
    if converted := sorted(path.stem.removeprefix(f"{preset}-") for path in folder.glob(f"{preset}-*.safetensors")):
        return f"ready ({', '.join(converted)})"
    missing = [file for file in files if not (folder / file.filename).is_file()]
    if not missing:
        return "downloaded; converted at first use"
    return f"not here; {sum(file.size or 0 for file in missing) / 1e9:.1f} GB to download"
