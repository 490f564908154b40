"""`StableSR.upscale`: what goes in and what comes out, what each argument does, and that fast paths change nothing."""

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stablesr.aggregation import TileGrid
from stablesr.config import PRESETS, AutoencoderConfig, CFWConfig, StableSRConfig
from stablesr.loading import UntrainedWeights, load, random_model
from stablesr.model import Prompt, StableSR
from stablesr.samplers import ddpm_steps
from tests.strategies import seeded

CONFIG = replace(PRESETS["tiny"], tile=16)
"""Tiles of 128 target pixels."""


@pytest.fixture(scope="module")
def model() -> StableSR:
    return random_model(CONFIG)


IMAGE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def upscale(model: StableSR, image: Any = IMAGE, scale: int = 2, **options: Any) -> Any:
    return model.upscale(image, scale, **{"steps": 2} | options)


# What goes in and what comes out

KINDS = [
    pytest.param(IMAGE, (24, 20, 3), id="numpy-uint8"),
    pytest.param(IMAGE.astype(np.uint16) * 257, (24, 20, 3), id="numpy-uint16"),
    pytest.param(IMAGE.astype(np.float32) / 255, (24, 20, 3), id="numpy-float32"),
    pytest.param(IMAGE[..., 0], (24, 20), id="numpy-gray"),
    pytest.param(IMAGE[::-1, ::-1].transpose(0, 1, 2), (24, 20, 3), id="numpy-view"),
    pytest.param(torch.from_numpy(IMAGE).permute(2, 0, 1), (3, 24, 20), id="torch-uint8"),
    pytest.param(torch.from_numpy(IMAGE).permute(2, 0, 1).to(torch.uint16), (3, 24, 20), id="torch-uint16"),
    pytest.param(torch.from_numpy(IMAGE).permute(2, 0, 1) / 255, (3, 24, 20), id="torch-float32"),
    pytest.param(torch.from_numpy(IMAGE[..., 0]), (24, 20), id="torch-gray"),
]


@pytest.mark.parametrize(("image", "shape"), KINDS)
def test_the_same_kind_of_array_comes_out(model: StableSR, image: Any, shape: tuple[int, ...]) -> None:
    before = image.copy() if isinstance(image, np.ndarray) else image.clone()
    sharp = upscale(model, image, steps=1)
    assert type(sharp) is type(image)
    assert sharp.dtype == image.dtype
    assert tuple(sharp.shape) == shape
    assert (image == before).all()


def test_numpy_and_torch_give_the_same_picture(model: StableSR) -> None:
    sharp = upscale(model, torch.from_numpy(IMAGE).permute(2, 0, 1))
    np.testing.assert_array_equal(sharp.permute(1, 2, 0).numpy(), upscale(model))


def test_the_same_image_in_another_depth_gives_the_same_picture(model: StableSR) -> None:
    deep = upscale(model, IMAGE.astype(np.uint16) * 257)
    np.testing.assert_allclose(deep / 257, upscale(model), atol=0.51)


@pytest.mark.parametrize("scale", [1, 3])
def test_the_colours_are_those_of_the_image(model: StableSR, scale: int) -> None:
    flat = np.full((12, 10, 3), [200, 120, 40], dtype=np.uint8)
    sharp = upscale(model, flat, scale)
    assert sharp.shape == (12 * scale, 10 * scale, 3)
    np.testing.assert_allclose(sharp.mean(axis=(0, 1)), [200, 120, 40], atol=6)


# The same arguments give the same bits


def test_the_same_arguments_give_the_same_bits(model: StableSR) -> None:
    np.testing.assert_array_equal(upscale(model, seed=3), upscale(model, seed=3))


def test_a_model_made_anew_gives_the_same_bits(model: StableSR) -> None:
    np.testing.assert_array_equal(upscale(random_model(CONFIG)), upscale(model))


WIDE = np.random.default_rng(1).random((16, 30, 3), dtype=np.float32)
"""At scale 8, 16 x 30 latents: three tiles."""

ROUNDING = 5e-5
"""Of a picture in [0, 1], where another batch takes other kernels: deviations of 1.1e-5 were seen on a CPU."""


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_tiles_by_threes_are_tiles_one_by_one(model: StableSR, sampler: str) -> None:
    one, three = (upscale(model, WIDE, 8, batch=batch, sampler=sampler) for batch in (1, 3))
    np.testing.assert_allclose(one, three, rtol=0, atol=ROUNDING)


def test_an_odd_last_batch_is_filled_up_and_the_copies_are_dropped(model: StableSR) -> None:
    one, two = (upscale(model, WIDE, 8, batch=batch) for batch in (1, 2))
    np.testing.assert_allclose(one, two, rtol=0, atol=ROUNDING)


def test_keys_and_values_computed_once_are_those_computed_each_time(model: StableSR) -> None:
    context = seeded(1, 77, CONFIG.text.width)
    once = model.prepare_prompt(context)
    steps, grid, start = ddpm_steps(model.schedule.respaced(2)), TileGrid.square(16, 16, 16, 8), seeded(4, 16, 16)
    at_once = model.sample(start, start, grid, steps, once, lambda step: start)
    x = start
    for step in steps:
        x = model.sample(x, start, grid, [step], model.prepare_prompt(context), lambda step: start)
    assert torch.equal(at_once, x)


# What each argument does


def differs(a: Any, b: Any) -> bool:
    return bool((np.asarray(a) != np.asarray(b)).any())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"seed": 1}, id="seed"),
        pytest.param({"seed": 2**64 - 1}, id="largest-seed"),
        pytest.param({"steps": 1}, id="steps"),
        pytest.param({"prompt": "a roof"}, id="prompt"),
        pytest.param({"negative_prompt": "blurry"}, id="negative-prompt"),
        pytest.param({"color": "adain"}, id="adain"),
        pytest.param({"color": "none"}, id="no-colour-correction"),
        pytest.param({"cfw": 0.0}, id="cfw-0"),
        pytest.param({"cfw": 1.0}, id="cfw-1"),
        pytest.param({"sampler": "ddim"}, id="ddim"),
        pytest.param({"start": "noise"}, id="start-from-noise"),
        pytest.param({"posterior": "sample"}, id="sampled-posterior"),
    ],
)
def test_an_argument_changes_the_picture(model: StableSR, options: dict[str, Any]) -> None:
    image = IMAGE / 255
    sharp = upscale(model, image, **options)
    assert sharp.shape == (24, 20, 3)
    assert np.isfinite(sharp).all()
    assert differs(sharp, upscale(model, image))


def test_eta_makes_ddim_random(model: StableSR) -> None:
    plain, random = (upscale(model, IMAGE / 255, sampler="ddim", eta=eta) for eta in (0.0, 1.0))
    assert differs(plain, random)


def test_a_guidance_of_one_is_none(model: StableSR) -> None:
    np.testing.assert_array_equal(upscale(model, negative_prompt="blurry", guidance=1.0), upscale(model))
    image = IMAGE / 255
    assert differs(
        upscale(model, image, negative_prompt="blurry", guidance=2.0),
        upscale(model, image, negative_prompt="blurry"),
    )


def test_guidance_alone_changes_nothing(model: StableSR) -> None:
    np.testing.assert_array_equal(upscale(model, guidance=5.0), upscale(model))


def test_the_empty_prompt_needs_no_text_tower_and_others_do() -> None:
    model = random_model(CONFIG)
    model.fetch_text_tower = None
    assert upscale(model, steps=1).shape == (24, 20, 3)
    with pytest.raises(ValueError, match="prompt='a roof' needs a text tower"):
        upscale(model, prompt="a roof")
    with pytest.raises(ValueError, match="prompt='blurry' needs a text tower"):
        upscale(model, negative_prompt="blurry")


def test_a_guided_prediction_goes_from_the_negative_prompt_past_the_other(model: StableSR) -> None:
    x, latent, time = seeded(2, 4, 16, 16), seeded(2, 4, 16, 16, seed=1), model.embed_time(600)
    positive, negative = (seeded(1, 77, CONFIG.text.width, seed=seed) for seed in (2, 3))

    def predict(prompt: Prompt) -> Tensor:
        return model.predict(x, latent, time, prompt)

    p, n = predict(model.prepare_prompt(positive)), predict(model.prepare_prompt(negative))
    guided = predict(model.prepare_prompt(positive, negative, 3.0))
    torch.testing.assert_close(guided, n + 3.0 * (p - n), rtol=0, atol=1e-4)


def test_without_wrapping_the_cfw_decoder_is_a_plain_decoder(model: StableSR) -> None:
    latent, image = seeded(1, 4, 4, 6), seeded(1, 3, 32, 48, seed=1)
    plain = model.cfw.decode(latent / CONFIG.diffusion.latent_scale)
    torch.testing.assert_close(model.decode(latent, image, cfw=0.0), plain, rtol=0, atol=1e-5)
    assert (model.decode(latent, image, cfw=0.5) - plain).abs().max() > 1e-3


def test_small_patches_see_the_picture_of_one_large_patch_but_for_their_edges(model: StableSR) -> None:
    # the autoencoder's norms and its attention see a whole patch, so the pictures differ; the colours agree
    whole, patched = (upscale(model, WIDE, 8, steps=1, patch=patch) for patch in (128, 12))
    assert whole.shape == patched.shape == (128, 240, 3)
    np.testing.assert_allclose(whole.mean(axis=(0, 1)), patched.mean(axis=(0, 1)), atol=0.02)


def test_a_patch_as_large_as_the_canvas_is_the_whole(model: StableSR) -> None:
    np.testing.assert_array_equal(upscale(model, patch=16), upscale(model, patch=128))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_progress_counts_the_steps(model: StableSR, sampler: str) -> None:
    seen: list[tuple[int, int]] = []
    upscale(model, steps=3, sampler=sampler, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_preset_says_how_many_steps(model: StableSR) -> None:
    seen: list[int] = []
    upscale(model, steps=None, progress=lambda done, total: seen.append(total))
    assert seen == [CONFIG.steps] * CONFIG.steps


def test_no_gradient_is_left_behind(model: StableSR) -> None:
    sharp = upscale(model, torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True))
    assert not sharp.requires_grad


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"scale": 0}, "scale=0 must be an integer from 1 to 8", id="scale-0"),
        pytest.param({"scale": 9}, "scale=9 must be an integer from 1 to 8", id="scale-9"),
        pytest.param({"scale": 2.0}, "scale=2.0 must be an integer", id="scale-float"),
        pytest.param({"scale": True}, "scale=True must be an integer", id="scale-bool"),
        pytest.param({"steps": 0}, "steps=0 must be within 1 and 1000", id="steps-0"),
        pytest.param({"steps": 1001}, "steps=1001 must be within 1 and 1000", id="steps-1001"),
        pytest.param({"seed": -1}, "seed=-1 must be within 0", id="seed-negative"),
        pytest.param({"seed": 2**64}, "must be within 0", id="seed-too-large"),
        pytest.param({"cfw": -0.1}, "cfw=-0.1 must be within 0 and 1", id="cfw-below"),
        pytest.param({"cfw": 1.1}, "cfw=1.1 must be within 0 and 1", id="cfw-above"),
        pytest.param({"cfw": float("nan")}, "cfw=nan must be within 0 and 1", id="cfw-nan"),
        pytest.param({"eta": 2.0}, "eta=2.0 must be within 0 and 1", id="eta"),
        pytest.param({"batch": 0}, "batch=0 must be at least 1", id="batch"),
        pytest.param({"patch": 0}, "patch=0 must be at least 1", id="patch"),
        pytest.param({"overlap": -1}, "overlap=-1 must be within 0 and 15", id="overlap-negative"),
        pytest.param({"overlap": 16}, "overlap=16 must be within 0 and 15", id="overlap-of-a-tile"),
        pytest.param({"guidance": float("inf")}, "guidance=inf must be finite", id="guidance"),
        pytest.param({"color": "sepia"}, "color='sepia' must be one of wavelet, adain, none", id="color"),
        pytest.param({"sampler": "euler"}, "sampler='euler' must be one of ddpm, ddim", id="sampler"),
        pytest.param({"start": "image"}, "start='image' must be one of latent, noise", id="start"),
        pytest.param({"posterior": "mode"}, "posterior='mode' must be one of mean, sample", id="posterior"),
        pytest.param({"image": np.zeros((4, 4, 4), np.uint8)}, r"shape \(4, 4, 4\) is not supported", id="four-bands"),
        pytest.param({"image": np.zeros((0, 4, 3), np.uint8)}, r"not empty", id="empty"),
        pytest.param({"image": torch.zeros(1, 3, 4, 4)}, "is not supported", id="batch-of-images"),
        pytest.param({"image": np.zeros((4, 4, 3), np.int16)}, "an image of int16 is not supported", id="int16"),
        pytest.param({"image": np.full((4, 4), 1.5)}, "values from 1.5 to 1.5", id="beyond-1"),
        pytest.param({"image": np.full((4, 4), np.nan)}, r"within \[0, 1\]", id="nan"),
        pytest.param({"image": [[0.5]]}, "must be a NumPy array or a torch tensor, not list", id="list"),
    ],
)
def test_what_makes_no_sense_is_refused(model: StableSR, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        upscale(model, **options)


# Compiled networks

VERY_SMALL = StableSRConfig(
    name="very-small",
    unet=replace(CONFIG.unet, multipliers=(1,), blocks_per_level=1, attention_factors=()),
    time_encoder=replace(CONFIG.time_encoder, multipliers=(1,), blocks_per_level=1, attention_factors=()),
    autoencoder=AutoencoderConfig(width=32, multipliers=(1,), blocks_per_level=1),
    cfw=CFWConfig(levels=(0,), dense_blocks=1, growth=8),
    text=CONFIG.text,
    diffusion=CONFIG.diffusion,
    tile=8,
)
"""One level, so that it is compiled in half a minute; transformer, attention and SPADE are in its middle."""


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own, when it loads its compiler
def test_compiled_networks_predict_what_the_plain_ones_do() -> None:
    model = random_model(VERY_SMALL)
    x, latent, prompt = seeded(2, 4, 8, 8), seeded(2, 4, 8, 8, seed=1), model.prepare_prompt(model.null_context)
    with torch.inference_mode():
        time = model.embed_time(500)
        plain = model.predict(x, latent, time, prompt)
        model.compile_networks()
        compiled = model.predict(x, latent, time, prompt)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-4)


# Loading, as far as it concerns the user of a model


def test_tiny_warns_that_it_is_not_trained_and_computes_in_float32_on_a_cpu() -> None:
    with pytest.warns(UntrainedWeights, match="'tiny' is not trained yet"):
        model = load("tiny", device="cpu")
    assert (model.dtype, model.device.type, model.config) == (torch.float32, "cpu", PRESETS["tiny"])
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_name_that_is_neither_preset_nor_file_is_refused() -> None:
    with pytest.raises(ValueError, match="'huge' is neither a file nor one of the presets sd21-512"):
        load("huge")
