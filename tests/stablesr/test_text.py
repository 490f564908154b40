"""The text tower against attention written out and against its own promises; test_parity.py has what was recorded."""

import math

import pytest
import torch

from stablesr.config import TextConfig
from stablesr.text import CausalSelfAttention, TextTower, encode_prompts
from stablesr.tokenizer import tokenize

TINY = TextConfig(width=16, heads=2, layers=3, context_length=8, vocabulary=50)


@pytest.fixture
def tower() -> TextTower:
    torch.manual_seed(0)
    return TextTower(TINY)


def test_the_context_has_one_vector_per_token(tower):
    assert tower(torch.zeros(3, 8, dtype=torch.int64)).shape == (3, 8, 16)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_token_is_seen_by_itself_and_those_after_it_only(tower, place):
    tokens = torch.arange(8)[None]
    other = tokens.clone()
    other[0, place] = 49
    changed = (tower(tokens) - tower(other)).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [n >= place for n in range(8)]


def test_the_same_token_differs_from_place_to_place(tower):
    context = tower(torch.zeros(1, 8, dtype=torch.int64))[0]
    assert torch.pdist(context).min() > 1e-4


def test_attention_is_the_formula_written_out():
    torch.manual_seed(0)
    attention = CausalSelfAttention(width=6, heads=2).double()
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias)[0].split(6, dim=-1)  # (4, 6) each
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        scores = q[:, head] @ k[:, head].T / math.sqrt(3)
        scores[torch.ones(4, 4).triu(1) == 1] = -math.inf
        heads.append(scores.softmax(-1) @ v[:, head])
    torch.testing.assert_close(attention(x)[0], attention.out(torch.cat(heads, -1)), rtol=0, atol=1e-12)


def test_the_last_of_the_released_blocks_is_left_out(tower):
    assert len(tower.blocks) == TINY.layers - 1
    names = [name for name in tower.state_dict() if not name.startswith("blocks.1")]
    assert names == [
        "positional_embedding",
        "token_embedding.weight",
        *(f"blocks.0.{layer}.{kind}" for layer in BLOCK_LAYERS for kind in ("weight", "bias")),
        "norm_out.weight",
        "norm_out.bias",
    ]


BLOCK_LAYERS = ("norm1", "attention.qkv", "attention.out", "norm2", "mlp.0", "mlp.2")


def test_the_full_size_tower_has_the_released_parameters_less_those_unused():
    with torch.device("meta"):
        tower = TextTower(TextConfig())
    last_block = 12 * 1024**2 + 13 * 1024
    projection, temperature = 1024**2, 1
    assert sum(p.numel() for p in tower.parameters()) == 354_032_641 - last_block - projection - temperature


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(TextConfig(width=10, heads=4), "text.width=10 must be a multiple of text.heads=4", id="heads"),
        pytest.param(TextConfig(width=4, heads=2, layers=1), "text.layers=1 must be at least 2", id="layers"),
    ],
)
def test_impossible_sizes_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        TextTower(config)


@pytest.mark.parametrize("shape", [(8,), (1, 7), (1, 9), (1, 1, 8)], ids=str)
def test_tokens_of_another_shape_are_refused(tower, shape):
    with pytest.raises(ValueError, match=r"tokens have shape .*, expected \(N, 8\)"):
        tower(torch.zeros(shape, dtype=torch.int64))


def test_encode_prompts_is_tokenize_then_tower_without_gradients():
    torch.manual_seed(0)
    tower = TextTower(TextConfig(width=16, heads=2, layers=2, context_length=8)).double()
    texts = ["a photo of a cat", "", "far too long a prompt for eight tokens"]
    context = encode_prompts(tower, texts)
    expected = tower(tokenize(texts, context_length=8))
    assert torch.equal(context, expected)
    assert (context.dtype, context.requires_grad, expected.requires_grad) == (torch.float64, False, True)
    with pytest.raises(ValueError, match="prompt 0 is None"):
        encode_prompts(tower, [None])
