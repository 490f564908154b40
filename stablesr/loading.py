"""From a name or a file to a model: `load`, and `random_model` for tests and benchmarks."""

import warnings
from importlib import resources
from pathlib import Path

import torch

from stablesr import hub
from stablesr.checkpoint import build_text_tower, convert, fill, open_model_file
from stablesr.config import PRESETS, StableSRConfig
from stablesr.model import StableSR
from stablesr.text import TextTower, encode_prompts


class UntrainedWeights(UserWarning):
    """The weights are random numbers: pictures show what the machinery does, not what the method can."""


def load(
    name_or_path: str | Path = "tiny",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    compiled: bool = False,
) -> StableSR:
    """A StableSR with weights.

    Args:
        name_or_path: a preset (`tiny`, `sd21-512`, `sd21-768v`, `turbo`), or a model file made by
            `python -m stablesr.checkpoint convert`. `tiny` comes with the package; for the others the released files
            are downloaded and converted once, under the S-Lab License 1.0 (non-commercial).
        device: where the networks live; None for a GPU if there is one, else the CPU.
        dtype: what the networks compute in; None for bfloat16 on a GPU, float32 elsewhere.
        compiled: whether UNet and time-aware encoder are compiled: slow in the first picture, faster after it.

    Raises:
        ValueError: if there is no such preset or file.
        CheckpointError: if the file is broken or of another architecture.
        DownloadError: if released files cannot be had.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if str(name_or_path) == "tiny":
        model = _load_embedded(PRESETS["tiny"], device, dtype)
    elif str(name_or_path) in PRESETS:
        model = _load_file(_converted(PRESETS[str(name_or_path)], dtype), device, dtype)
    elif Path(name_or_path).is_file():
        model = _load_file(Path(name_or_path), device, dtype)
    else:
        raise ValueError(f"{str(name_or_path)!r} is neither a file nor one of the presets {', '.join(PRESETS)}")
    if compiled:
        model.compile_networks()
    elif device.type == "cpu":
        model.pack()
    return model


def _load_embedded(config: StableSRConfig, device: torch.device, dtype: torch.dtype) -> StableSR:
    embedded = resources.files("stablesr") / "data" / f"{config.name}.safetensors"
    if embedded.is_file():
        with resources.as_file(embedded) as path:
            return _load_file(path, device, dtype)
    warnings.warn(
        f"the preset {config.name!r} is not trained yet: its weights are random numbers, its pictures a test of the "
        "machinery",
        UntrainedWeights,
        stacklevel=3,
    )
    return random_model(config, device=device, dtype=dtype)


def _load_file(path: Path, device: torch.device, dtype: torch.dtype) -> StableSR:
    with open_model_file(path) as (config, tensors):
        with torch.device("meta"):
            model = StableSR(config)
        fill(model, tensors, device, dtype)

    def fetch_text_tower() -> TextTower:
        with open_model_file(path) as (config, tensors):
            return build_text_tower(config, tensors)

    model.fetch_text_tower = fetch_text_tower
    return model.eval().requires_grad_(False)


def _converted(config: StableSRConfig, dtype: torch.dtype) -> Path:
    """The model file of a released preset, made of the released files where it is not there yet."""
    path = hub.cache_folder() / f"{config.name}-{str(dtype).removeprefix('torch.')}.safetensors"
    if not path.is_file():
        stablesr, cfw = hub.pull(config.name)
        convert(stablesr, cfw, path, config, dtype)
    return path


def random_model(
    config: StableSRConfig, *, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> StableSR:
    """A StableSR with random weights, the same for the same seed; with a text tower as random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StableSR(config)
        tower = TextTower(config.text).eval().requires_grad_(False)
    model.null_context.copy_(encode_prompts(tower, [""]))
    model.fetch_text_tower = lambda: tower
    model.to(device, dtype)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stubs lack it
    return model.eval().requires_grad_(False)
