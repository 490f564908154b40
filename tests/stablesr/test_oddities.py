"""Where StableSR's published scripts are odd, and what we do instead: one test for each decision in ARCHITECTURE.md.

The recordings in tests/golden show what the scripts do; tests/parity_adapter.py replays it.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stablesr.aggregation import TileGrid, gaussian_window
from stablesr.box import Box
from stablesr.checkpoint import model_shapes, to_released, translate
from stablesr.conditioning import SPADE
from stablesr.config import PRESETS
from stablesr.errors import CheckpointError
from stablesr.images import to_image_like
from stablesr.keys import cfw_rules, is_dispensable
from stablesr.loading import random_model
from stablesr.model import StableSR
from stablesr.noise import noise
from stablesr.resize import reflect_to
from stablesr.samplers import ddim_steps, ddpm_steps, take_step
from tests.strategies import seeded

CONFIG = replace(PRESETS["tiny"], tile=16)
"""Tiles of 128 target pixels."""


@pytest.fixture(scope="module")
def model() -> StableSR:
    return random_model(CONFIG)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pick(model: StableSR, monkeypatch: pytest.MonkeyPatch, image: np.ndarray, **options: Any) -> tuple[Tensor, Tensor]:
    """Start and low-resolution latent that `upscale` hands to its sampler."""
    seen: list[tuple[Tensor, Tensor]] = []

    def sample(x: Tensor, latent: Tensor, *_: Any) -> Tensor:
        seen.append((x, latent))
        return x

    with monkeypatch.context() as patch:
        patch.setattr(model, "sample", sample)
        model.upscale(image, **options)
    return seen[0]


def test_oddity_01_the_window_is_centred_in_x_and_half_a_cell_low_in_y_as_published() -> None:
    window = gaussian_window(4, 4)
    across, down = window[2], window[:, 2]
    assert torch.equal(across, across.flip(0))
    assert down.argmax() == 2
    assert down[1] == down[3] > down[0]


def test_oddity_02_conditions_belong_to_levels_not_to_widths(model: StableSR) -> None:
    # one latent wide: every level has the same width, by which the reference would look the conditions up
    column = model.time_encoder(seeded(1, 4, 20, 1), model.embed_time(500).time_encoder)
    assert [tuple(condition.shape[-2:]) for condition in column] == [(20, 1), (10, 1), (5, 1), (3, 1)]
    prompt = model.prepare_prompt(model.null_context)
    for sides in ((16, 8), (8, 24)):
        x = seeded(1, 4, *sides)
        assert model.predict(x, x, model.embed_time(500), prompt).shape == (1, 4, *sides)


def test_oddity_03_a_canvas_smaller_than_a_tile_is_filled_by_reflection(
    model: StableSR, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reflect_to(torch.tensor([[0, 1, 2]]), 1, 7).tolist() == [[0, 1, 2, 1, 0, 1, 2]]
    with pytest.raises(ValueError, match="pad the canvas to a tile"):
        TileGrid.square(15, 16, tile=16, overlap=8)
    image = picture(12, 10)
    assert pick(model, monkeypatch, image, scale=1)[0].shape == (4, 16, 16)
    assert model.upscale(image, scale=1, steps=1).shape == (12, 10, 3)


@pytest.mark.parametrize(("height", "width", "scale"), [(49, 49, 1), (49, 49, 3), (51, 37, 2)])
def test_oddity_04_no_size_is_lost_to_float_truncation(model: StableSR, height: int, width: int, scale: int) -> None:
    assert model.upscale(picture(height, width), scale, steps=1).shape == (scale * height, scale * width, 3)


def test_oddity_05_an_aligned_side_gains_nothing_when_the_other_is_filled(
    model: StableSR, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, latent = pick(model, monkeypatch, picture(160, 130), scale=1)
    assert start.shape == latent.shape == (4, 20, 17)  # 160 pixels are 20 latents, 130 are 16.25


@pytest.mark.parametrize(("height", "width"), [(14, 12), (24, 20), (1, 1)])
def test_oddity_06_a_small_image_comes_back_without_what_was_filled_in(
    model: StableSR, height: int, width: int
) -> None:
    assert model.upscale(picture(height, width), 4, steps=1).shape == (4 * height, 4 * width, 3)


def test_oddity_07_one_side_may_be_as_long_as_it_likes_and_the_other_short(model: StableSR) -> None:
    assert model.upscale(picture(5, 300), 1, steps=1).shape == (5, 300, 3)
    assert model.upscale(picture(300, 5), 1, steps=1).shape == (300, 5, 3)


def test_oddity_08_every_tile_of_a_batch_gets_its_own_answer(model: StableSR) -> None:
    x, latent = seeded(3, 4, 16, 16, seed=1), seeded(3, 4, 16, 16, seed=2)
    time, prompt = model.embed_time(700), model.prepare_prompt(model.null_context)
    together = model.predict(x, latent, time, prompt)
    apart = torch.cat([model.predict(x[i : i + 1], latent[i : i + 1], time, prompt) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)  # another batch may take other kernels
    assert (together[0] - together[1]).abs().max() > 0.1


def test_oddity_09_no_two_places_share_their_noise_and_no_global_state_enters(model: StableSR) -> None:
    here, there = noise(0, 0, 999, Box(0, 0, 8, 8)), noise(0, 0, 999, Box(64, 0, 72, 8))
    assert not (here == there).any()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = model.upscale(picture(8, 8), 1, steps=1, posterior="sample")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    np.testing.assert_array_equal(model.upscale(picture(8, 8), 1, steps=1, posterior="sample"), first)


def test_oddity_10_integers_are_rounded_not_truncated() -> None:
    halfway = torch.full((3, 1, 1), 2 * 127.6 / 255 - 1)
    assert to_image_like(halfway, picture(1, 1)).tolist() == [[[128, 128, 128]]]


def test_oddity_11_the_posterior_s_mean_is_used_and_a_sample_of_it_on_request(
    model: StableSR, monkeypatch: pytest.MonkeyPatch
) -> None:
    def latent(**options: Any) -> Tensor:
        return pick(model, monkeypatch, picture(9, 7), **options)[1]

    assert torch.equal(latent(seed=0), latent(seed=1))
    sampled = latent(seed=0, posterior="sample")
    assert torch.equal(sampled, latent(seed=0, posterior="sample"))
    assert not torch.equal(sampled, latent(seed=1, posterior="sample"))
    assert not torch.equal(sampled, latent(seed=0))


def test_oddity_12_ddim_tells_the_networks_the_times_it_computes_with_and_ends_at_a_clean_image(
    model: StableSR,
) -> None:
    steps = ddim_steps(model.schedule.respaced(10))
    assert [step.alpha_bar for step in steps] == [model.schedule.alpha_bar[step.timestep] for step in steps]
    assert (steps[0].timestep, steps[-1].timestep) == (999, 0)
    assert steps[-1].alpha_bar_prev == 1.0


def test_oddity_13_one_step_works_and_starts_from_the_noisiest_time(model: StableSR) -> None:
    (step,) = ddpm_steps(model.schedule.respaced(1))
    assert (step.timestep, step.coef_x0, step.coef_x, step.sigma) == (999, 1.0, 0.0, 0.0)
    assert model.upscale(picture(8, 8), 1, steps=1).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("sampler", "drawn"),
    [
        pytest.param("ddpm", [999, 500], id="not-in-the-last-step"),
        pytest.param("ddim", [], id="never-without-eta"),
    ],
)
def test_oddity_14_a_step_that_adds_no_noise_draws_none(model: StableSR, sampler: str, drawn: list[int]) -> None:
    visited = model.schedule.respaced(3)
    steps = ddpm_steps(visited) if sampler == "ddpm" else ddim_steps(visited)
    x, asked = seeded(4, 16, 16), []

    def noise_at(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros_like(x)

    grid = TileGrid.square(16, 16, tile=16, overlap=8)
    model.sample(x, x, grid, steps, model.prepare_prompt(model.null_context), noise_at)
    assert asked == drawn


def test_oddity_15_an_image_of_one_tile_is_a_canvas_of_one_tile(model: StableSR) -> None:
    steps, grid = ddpm_steps(model.schedule.respaced(2)), TileGrid.square(16, 16, tile=16, overlap=8)
    start, latent, prompt = seeded(4, 16, 16), seeded(4, 16, 16, seed=1), model.prepare_prompt(model.null_context)

    def noise_at(step: int) -> Tensor:
        return noise(0, 0, step, grid.canvas)

    whole = start
    for step in steps:
        prediction = model.predict(whole[None], latent[None], model.embed_time(step.timestep), prompt)[0]
        whole = take_step(whole, prediction, noise_at(step.timestep), step, CONFIG.diffusion.parameterization)
    canvas = model.sample(start, latent, grid, steps, prompt, noise_at)
    torch.testing.assert_close(canvas, whole, rtol=0, atol=1e-5)  # w * p / w may round


def test_oddity_16_every_missing_extra_and_misshapen_key_is_named_at_once(model: StableSR) -> None:
    rules, wanted = cfw_rules(CONFIG), model_shapes(CONFIG)
    released = to_released(model.state_dict(), rules)
    released["surprise"] = released.pop("quant_conv.weight")
    released["decoder.conv_in.bias"] = torch.zeros(7)
    released["loss.discriminator.main.0.weight"] = torch.zeros(1)  # known and not needed
    with pytest.raises(CheckpointError) as caught:
        translate(released, rules, wanted, lambda key: is_dispensable(key, CONFIG), "some.ckpt")
    text = str(caught.value)
    assert text.startswith("some.ckpt: ")
    assert "1 missing: quant_conv.weight\n" in text
    assert "1 extra: surprise\n" in text
    channels = CONFIG.autoencoder.widths[-1]
    assert f"1 misshapen: decoder.conv_in.bias [7] instead of [{channels}]\n" in text
    assert "loss." not in text


def test_oddity_17_the_norm_called_parameter_free_has_gain_and_bias() -> None:
    spade = SPADE(64, condition_channels=4, hidden_channels=8)
    h, condition = seeded(1, 64, 3, 3), torch.zeros(1, 4, 3, 3)
    plain = spade(h, condition)
    with torch.no_grad():
        spade.norm.weight.mul_(2.0)
        spade.norm.bias.add_(1.0)
    assert (spade(h, condition) - plain).abs().max() > 0.5


def test_oddity_18_the_precision_is_that_of_the_weights_and_no_autocast_changes_it(model: StableSR) -> None:
    x = seeded(1, 4, 16, 16)
    prompt = model.prepare_prompt(model.null_context)
    assert model.dtype == torch.float32
    assert prompt.keys_values[0][0][0].dtype == torch.float32
    assert model.predict(x, x, model.embed_time(0), prompt).dtype == torch.float32
