"""The key table against what the released checkpoints are known to hold, and against itself, in both directions."""

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stablesr.checkpoint import model_shapes, to_released, translate
from stablesr.conditioning import SPADE
from stablesr.config import PRESETS, StableSRConfig
from stablesr.keys import Rule, cfw_rules, is_dispensable, stablesr_rules
from stablesr.loading import random_model
from stablesr.model import StableSR
from stablesr.text import TextTower
from tests.parity import WHOLE_SET, checkpoint_shapes

FULL = PRESETS["sd21-512"]
TINY = PRESETS["tiny"]

TABLES = {"stablesr": stablesr_rules, "cfw": cfw_rules}
"""Of both released checkpoints."""


# Against the released checkpoints


@pytest.mark.parametrize("checkpoint", TABLES)
@pytest.mark.parametrize("preset", ["sd21-512", "sd21-768v", "turbo"])
def test_every_released_key_is_in_the_table_or_known_to_be_dispensable(checkpoint: str, preset: str) -> None:
    path = WHOLE_SET / f"manifest_{checkpoint}.json"
    if not path.is_file():
        pytest.skip(f"needs the list of released keys, {path.name}; GIGASR_PARITY can say where it is")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    released = {key: tuple(shape) for key, (shape, _) in manifest["keys"].items()}
    config = PRESETS[preset]
    ours = checkpoint_shapes(config)[checkpoint]  # the unused end of the text tower included
    assert ours == {key: shape for key, shape in released.items() if key not in manifest.get("schedule_buffers", [])}
    used = {theirs for rule in TABLES[checkpoint](config) for theirs in rule.theirs}
    dispensable = {key for key in released if is_dispensable(key, config)}
    assert released.keys() == used | dispensable
    assert not used & dispensable
    extra = [*manifest.get("optional_extra_keys", []), *manifest.get("loss_keys", [])]
    assert [key for key in extra if not is_dispensable(key, config)] == []


def test_a_key_nobody_knows_is_not_dispensable() -> None:
    assert not is_dispensable("model.diffusion_model.input_blocks.0.0.weight", FULL)
    assert not is_dispensable("cond_stage_model.model.transformer.resblocks.22.ln_1.weight", FULL)
    assert is_dispensable("cond_stage_model.model.transformer.resblocks.23.ln_1.weight", FULL)
    assert not is_dispensable("surprise", FULL)


# Against the published sizes


@pytest.fixture(scope="module")
def full_model() -> StableSR:
    with torch.device("meta"):
        return StableSR(FULL).eval().requires_grad_(False)


def n_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_the_networks_have_the_published_numbers_of_parameters(full_model: StableSR) -> None:
    assert n_parameters(full_model.unet) == 918_930_884
    assert n_parameters(*(module for module in full_model.unet.modules() if isinstance(module, SPADE))) == 53_020_160
    assert n_parameters(full_model.time_encoder) == 52_494_080
    assert n_parameters(full_model.autoencoder) == 83_653_863
    assert n_parameters(full_model.autoencoder.encoder) == 34_163_592
    assert n_parameters(full_model.autoencoder.decoder) == 49_490_179
    assert n_parameters(full_model.cfw.fusions) == 44_393_728
    assert n_parameters(full_model.cfw) == 128_047_591


def test_the_released_text_tower_has_the_published_number_of_parameters() -> None:
    shapes = checkpoint_shapes(FULL)["stablesr"]
    text = {key: math.prod(shape) for key, shape in shapes.items() if key.startswith("cond_stage_model.")}
    assert sum(text.values()) == 354_032_641  # the unused last block, projection and temperature included
    with torch.device("meta"):
        used = n_parameters(TextTower(FULL.text))
    assert used == sum(n for key, n in text.items() if not is_dispensable(key, FULL))


def gigaflops(compute: Callable[[], Any]) -> float:
    """Of convolutions, products and attention, 2 per multiply-add."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops() / 1e9


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def test_the_flop_counter_counts_two_for_a_multiply_add() -> None:
    assert gigaflops(lambda: on_meta(1000, 1000) @ on_meta(1000, 1000)) == 2.0


@pytest.mark.parametrize(("side", "unet_cost", "encoder_cost"), [(64, 875.9, 89.4), (96, 2310.2, 304.7)])
def test_a_network_evaluation_costs_what_is_published(
    full_model: StableSR, side: int, unet_cost: float, encoder_cost: float
) -> None:
    unet, encoder, x, t = full_model.unet, full_model.time_encoder, on_meta(1, 4, side, side), on_meta(1)
    conditions = [on_meta(1, 256, side // f, side // f) for f in (1, 2, 4, 8)]
    prompt = unet.embed_prompt(on_meta(1, 77, 1024))
    assert gigaflops(lambda: unet(x, unet.embed_time(t), conditions, prompt)) == pytest.approx(unet_cost, rel=0.01)
    assert gigaflops(lambda: encoder(x, encoder.embed_time(t))) == pytest.approx(encoder_cost, rel=0.01)


def test_a_pass_through_the_autoencoder_costs_what_is_published(full_model: StableSR) -> None:
    image, latent, cfw = on_meta(1, 3, 512, 512), on_meta(1, 4, 64, 64), full_model.cfw
    features = cfw.encode_features(image).features
    assert gigaflops(lambda: full_model.autoencoder.encode(image)) == pytest.approx(1116.7, rel=0.01)
    assert gigaflops(lambda: full_model.autoencoder.decode(latent)) == pytest.approx(2514.5, rel=0.01)
    assert gigaflops(lambda: cfw.encode_features(image)) == pytest.approx(1116.7, rel=0.01)
    assert gigaflops(lambda: cfw.decode_wrapped(latent, features, 0.5)) == pytest.approx(4999.8, rel=0.01)


# Against itself


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_tensor_is_claimed_once_on_either_side(config: StableSRConfig) -> None:
    rules = {name: table(config) for name, table in TABLES.items()}
    theirs = Counter((name, key) for name, table in rules.items() for rule in table for key in rule.theirs)
    ours = Counter(rule.ours for table in rules.values() for rule in table)
    assert [key for key, times in theirs.items() if times > 1] == []
    assert [key for key, times in ours.items() if times > 1] == []
    assert ours.keys() | {"null_context"} == model_shapes(config).keys()  # that one is computed


@pytest.mark.parametrize("checkpoint", TABLES)
def test_tensors_survive_the_way_to_released_keys_and_back(checkpoint: str) -> None:
    model = random_model(TINY)
    assert model.fetch_text_tower is not None
    tower = model.fetch_text_tower().state_dict()
    state = model.state_dict() | {f"text.{key}": value for key, value in tower.items()}
    rules = TABLES[checkpoint](TINY)
    released = to_released(state, rules)
    shapes = checkpoint_shapes(TINY)[checkpoint]
    assert {key: tuple(value.shape) for key, value in released.items()} == {
        key: shape for key, shape in shapes.items() if not is_dispensable(key, TINY)
    }
    wanted = model_shapes(TINY)
    back = translate(released, rules, wanted, lambda key: False, "there and back")
    assert back.keys() == {rule.ours for rule in rules}
    for key, lazy in back.items():
        tensor = lazy.make()
        assert tuple(tensor.shape) == lazy.shape == wanted[key]
        assert torch.equal(tensor, state[key]), key


RULES = [
    pytest.param(Rule("a", ("b",)), [[1.0, 2.0]], [1.0, 2.0], id="as-it-is"),
    pytest.param(Rule("a", ("q", "k", "v")), [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [1, 2, 3, 4, 5, 6], id="stacked"),
    # two heads of one channel: q k v of the first, then of the second; ours: both q, both k, both v
    pytest.param(Rule("a", ("b",), heads=2), [[1, 2, 3, 10, 20, 30]], [1, 10, 2, 20, 3, 30], id="rows-by-head"),
    # two heads of two channels
    pytest.param(
        Rule("a", ("b",), heads=2),
        [[1, 1.5, 2, 2.5, 3, 3.5, 10, 10.5, 20, 20.5, 30, 30.5]],
        [1, 1.5, 10, 10.5, 2, 2.5, 20, 20.5, 3, 3.5, 30, 30.5],
        id="rows-by-head-with-channels",
    ),
    pytest.param(Rule("a", ("b",), trailing=1), [[[[1.0], [2.0]]]], [[1.0, 2.0]], id="convolution-over-a-sequence"),
    pytest.param(Rule("a", ("b",), trailing=2), [[[[[1.0]], [[2.0]]]]], [[1.0, 2.0]], id="1x1-convolution"),
]


@pytest.mark.parametrize(("rule", "theirs", "ours"), RULES)
def test_a_rule_goes_both_ways(rule: Rule, theirs: list[Any], ours: list[Any]) -> None:
    released, expected = [torch.tensor(values) for values in theirs], torch.tensor(ours, dtype=torch.float32)
    assert torch.equal(rule.to_ours(released).float(), expected)
    back = rule.to_theirs(rule.to_ours(released))
    assert len(back) == len(released)
    assert all(torch.equal(a, b) for a, b in zip(back, released, strict=True))
