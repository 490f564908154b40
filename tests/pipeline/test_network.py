"""The network that repeats pixels, and which network a run is given."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import NEAREST, Model, Sampling
from pipeline.errors import ConfigError
from pipeline.network import (
    Nearest,
    architecture,
    choose_device,
    guidance_scale,
    is_untrained,
    open_network,
    prepare_prompt,
    weights_fingerprint,
)
from stablesr import PRESETS, StableSR
from stablesr.box import Box
from stablesr.checkpoint import CONFIG_KEY, LazyTensor, write_model_file
from stablesr.samplers import ddpm_steps, take_step
from stablesr.schedule import add_noise
from tests.pipeline.conftest import MICRO
from tests.strategies import seeded, seeds

# Repeating pixels


def test_enlarging_repeats() -> None:
    image = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert Nearest(2).enlarge(image, 2).tolist() == [
        [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0], [3.0, 3.0, 4.0, 4.0]]
    ]
    assert torch.equal(Nearest(1).enlarge(image, 1), image)


@pytest.mark.parametrize(
    ("scale", "channels"),
    [(1, 192), (2, 48), (3, 192), (4, 12), (5, 192), (6, 48), (7, 192), (8, 3)],
)
def test_a_latent_has_a_value_for_every_piece_of_a_source_pixel_in_it(scale: int, channels: int) -> None:
    network = Nearest(scale)
    assert network.config.unet.latent_channels == network.config.autoencoder.latent_channels == channels
    image = network.enlarge(seeded(1, 3, 16, 24), scale)[..., : 16 // 8 * 8, : 24 // 8 * 8]
    assert network.encode(image).mean.shape == (1, channels, image.shape[-2] // 8, image.shape[-1] // 8)


@given(st.integers(1, 8), st.integers(0, 7), st.integers(0, 7), seeds)
def test_what_is_encoded_is_decoded_wherever_the_patch_begins(scale: int, row: int, column: int, seed: int) -> None:
    network = Nearest(scale)
    whole = network.enlarge(seeded(1, 3, 88, 80, seed=seed), scale)
    patch = whole[..., 8 * row : 8 * row + 32, 8 * column : 8 * column + 24]
    latent = network.encode(patch).mean * network.config.diffusion.latent_scale
    decoded = network.decode(latent, patch, 0.5)
    torch.testing.assert_close(decoded, patch, rtol=0, atol=1e-6)


@given(st.integers(1, 6), seeds)
def test_any_number_of_steps_leads_back_to_the_latents(n_steps: int, seed: int) -> None:
    network = Nearest(4)
    frame = Box(0, 0, 8, 8)
    latent, start = seeded(12, 8, 8, seed=seed), seeded(12, 8, 8, seed=seed + 1)
    x = add_noise(latent, start, float(network.schedule.alpha_bar[-1]))
    for step in ddpm_steps(network.schedule.respaced(n_steps)):
        time = network.embed_time(step.timestep)
        (prediction,) = network.predict_tiles([frame], frame, x, latent, time, None, batch=1)
        fresh = seeded(12, 8, 8, seed=step.timestep) if step.sigma else torch.zeros_like(x)
        x = take_step(x, prediction.values, fresh, step, network.config.diffusion.parameterization)
    torch.testing.assert_close(x, latent, rtol=0, atol=1e-5)


# Which network


def test_sizes_are_known_without_loading(micro: str) -> None:
    assert architecture("sd21-512", 4) is PRESETS["sd21-512"]
    assert architecture(NEAREST, 4).name == NEAREST
    assert architecture(NEAREST, 4).unet.latent_channels == 12
    assert architecture(micro, 4) == MICRO


def test_a_model_file_is_known_by_what_is_in_it(micro: str, tmp_path: Path) -> None:
    assert weights_fingerprint(micro) == hashlib.sha256(Path(micro).read_bytes()).hexdigest()
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(micro).read_bytes())
    assert weights_fingerprint(str(copy)) == weights_fingerprint(micro)
    assert weights_fingerprint(NEAREST) == NEAREST
    assert len({weights_fingerprint(name) for name in PRESETS}) >= 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(None, "neither a file nor one of the presets sd21-512, .*nearest", id="nothing"),
        pytest.param(b"", "cannot be used", id="empty"),
        pytest.param(
            b"not safetensors at all, but some text that is longer than a header", "cannot be used", id="text"
        ),
    ],
)
def test_weights_that_cannot_be_used(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        architecture(str(path), 4)
    with pytest.raises(ConfigError, match="neither a file"):
        architecture(str(tmp_path), 4)


def test_weights_of_the_wrong_size_are_refused_before_anything_starts(tmp_path: Path, micro: str) -> None:
    path = tmp_path / "wrong.safetensors"
    tensors = {"unet.conv_in.weight": LazyTensor((3, 3), lambda: torch.zeros(3, 3))}
    write_model_file(path, tensors, {CONFIG_KEY: MICRO.to_json()}, torch.float32)
    with pytest.raises(ConfigError, match=f"weights {path} cannot be used"):
        architecture(str(path), 4)


def test_a_network_is_opened_on_its_device_without_a_word(micro: str, recwarn: pytest.WarningsRecorder) -> None:
    assert isinstance(open_network(Model(weights=NEAREST, device="cpu"), 4), Nearest)
    network = open_network(Model(weights=micro, device="cpu"), 4)
    assert isinstance(network, StableSR)
    assert network.dtype == torch.float32
    half = open_network(Model(weights=micro, device="cpu", precision="bfloat16"), 4)
    assert isinstance(half, StableSR)
    assert half.dtype == torch.bfloat16
    assert not recwarn.list


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="no GPU here\nhint: --device cpu"):
        choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
    assert choose_device("cuda:1") == "cuda:1"
    assert choose_device("cpu") == "cpu"


def test_untrained_weights_are_known_as_such() -> None:
    assert not is_untrained(NEAREST)
    assert not is_untrained("sd21-512")
    assert is_untrained("tiny") == weights_fingerprint("tiny").endswith("untrained")


# Words


@pytest.mark.parametrize(
    ("sampling", "scale"),
    [
        pytest.param({}, 1.0, id="none"),
        pytest.param({"negative_prompt": "blur"}, 7.0, id="a-negative-prompt-turns-it-on"),
        pytest.param({"negative_prompt": "blur", "guidance": 3.0}, 3.0, id="given"),
    ],
)
def test_guidance(sampling: dict[str, Any], scale: float) -> None:
    assert guidance_scale(Sampling(**sampling)) == scale


def test_prompts_are_embedded_once_for_the_run(micro: str) -> None:
    network = open_network(Model(weights=micro, device="cpu"), 4)
    assert prepare_prompt(Nearest(4), Sampling(prompt="a town")) is None
    assert prepare_prompt(network, Sampling()).guidance is None
    guided = prepare_prompt(network, Sampling(prompt="a town", negative_prompt="blur"))
    assert guided.guidance == 7.0
    keys, _ = guided.keys_values[0][0]
    assert len(keys) == 2  # the negative one first
    plain, _ = prepare_prompt(network, Sampling(prompt="a town")).keys_values[0][0]
    np.testing.assert_allclose(keys[1:], plain, rtol=0, atol=1e-5)
