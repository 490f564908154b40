"""Packed convolutions compute what the plain ones do."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from stablesr.config import PRESETS
from stablesr.loading import random_model
from stablesr.packing import PackedConv2d, can_pack, pack_convolutions, seen_shapes

pytestmark = pytest.mark.skipif(not can_pack(), reason="this PyTorch has no oneDNN operators to pack for")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sides", [(8, 8), (5, 64)], ids=["small", "odd"])
def test_packed_equals_plain(stride: int, sides: tuple[int, int]) -> None:
    conv = nn.Conv2d(32, 48, 3, stride=stride, padding=1).requires_grad_(False)
    x = torch.randn(2, 32, *sides).to(memory_format=torch.channels_last)
    torch.testing.assert_close(PackedConv2d(conv)(x), conv(x), atol=1e-5, rtol=0)


def test_the_layout_does_not_depend_on_what_was_computed_before() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    shape = torch.Size([1, 32, 16, 16])
    fresh, used = PackedConv2d(conv, shape), PackedConv2d(conv, shape)
    for sides in ((64, 64), (3, 200)):
        used(torch.randn(4, 32, *sides))
    x = torch.randn(shape)
    assert torch.equal(fresh(x), used(x))


def test_a_packed_model_predicts_the_same_and_keeps_its_weights() -> None:
    model = random_model(replace(PRESETS["tiny"], tile=16))
    plain = copy.deepcopy(model.state_dict())
    x, latent = torch.randn(2, 2, 4, 16, 16)
    time, prompt = model.embed_time(400), model.prepare_prompt(model.null_context)
    before = model.predict(x, latent, time, prompt)
    model.pack()
    assert not any(isinstance(module, nn.Conv2d) for module in model.modules())
    torch.testing.assert_close(model.predict(x, latent, time, prompt), before, atol=2e-5, rtol=0)
    packed = model.state_dict()
    assert packed.keys() == plain.keys()
    assert [key for key in plain if not torch.equal(packed[key], plain[key])] == []


def test_shapes_are_those_of_the_convolutions_that_ran() -> None:
    module = nn.Sequential(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, stride=2)), nn.Conv2d(4, 4, 3))
    with seen_shapes(module) as shapes:
        module[0](torch.zeros(2, 4, 9, 7))
    assert shapes == {"0.0": (2, 4, 9, 7), "0.1": (2, 8, 9, 7)}
    module(torch.zeros(1, 4, 20, 20))
    assert shapes["0.0"] == (2, 4, 9, 7), "nothing is recorded after the context"


def test_every_convolution_of_a_model_is_laid_out_for_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, torch.Size] = {}
    monkeypatch.setattr("stablesr.model.pack_convolutions", lambda model, shapes: given.update(shapes))
    model = random_model(replace(PRESETS["tiny"], tile=16))
    model.pack()
    convs = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    # the first stage's decoder and the CFW encoder's end serve nobody here
    spare = ("autoencoder.decoder.", "autoencoder.post_quant")
    assert {name for name in convs - given.keys() if not name.startswith(spare)} == set()
    assert given["unet.conv_in"] == (1, 4, 16, 16)


def test_packing_reaches_convolutions_at_any_depth() -> None:
    module = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)), nn.ModuleList([nn.Conv2d(4, 4, 3)]))
    pack_convolutions(module, {})
    assert sum(isinstance(child, PackedConv2d) for child in module.modules()) == 2
