"""The reference's numbers: every recorded call, answered by this implementation within the recorded tolerance.

The selection in tests/golden is always run. The larger set it was taken from is run, too, where it is there: in
shared/parity beside the repository, or where the environment variable GIGASR_PARITY says.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity import GOLDEN, WHOLE_SET, Case, read_cases, read_config, recipe_weights, weights_digest
from tests.parity_adapter import Adapter

FOLDERS = [GOLDEN, *([WHOLE_SET] if (WHOLE_SET / "index.json").is_file() else [])]


def cases() -> list[Any]:
    found = [
        pytest.param(case, id=f"{'selected' if folder == GOLDEN else 'whole-set'}-{identifier}")
        for folder in FOLDERS
        for identifier, case in read_cases(folder)
    ]
    absent = pytest.mark.skip(reason="the larger set of recordings is not there; GIGASR_PARITY can say where it is")
    return found if WHOLE_SET in FOLDERS else [*found, pytest.param(None, id="whole-set", marks=absent)]


@pytest.fixture(scope="module")
def adapter_of() -> Callable[[Path], Adapter]:
    """The adapter of a folder; folders with the same networks share one."""

    @cache
    def adapter(config: str) -> Adapter:
        return Adapter(json.loads(config), recipe_weights(json.loads(config)))

    return lambda folder: adapter(json.dumps(read_config(folder), sort_keys=True))


@pytest.mark.parametrize("case", cases())
def test_the_answer_is_the_recorded_one(adapter_of: Callable[[Path], Adapter], case: Case) -> None:
    answer = adapter_of(case.folder).run(case.entry["op"], case.entry["params"], case.inputs)
    assert case.deviations(answer) == {}


@pytest.mark.parametrize("folder", FOLDERS, ids=["selected", "whole-set"][: len(FOLDERS)])
def test_our_key_table_and_the_recipe_make_the_recorded_weights(folder: Path) -> None:
    # keys, shapes and values of every tensor of both checkpoints, unused ones included
    config = read_config(folder)
    made = {name: weights_digest(weights) for name, weights in recipe_weights(config).items()}
    assert made == config["weights_digest"]


def test_the_selection_has_every_operation_of_the_adapter() -> None:
    operations = {name.removeprefix("op_") for name in dir(Adapter) if name.startswith("op_")}
    assert {case.entry["op"] for _, case in read_cases(GOLDEN)} == operations


def test_a_deviation_is_noticed() -> None:
    # what keeps the tests above from passing because nothing is compared
    case = dict(read_cases(GOLDEN))["wavelet_9x11"]
    (name, recorded), *_ = case.outputs.items()
    atol = case.entry["outputs"][name]["atol"]
    assert case.deviations({name: recorded}) == {}
    assert case.deviations({name: recorded + np.float32(3 * atol)}).keys() == {name}
    assert case.deviations({name: recorded[..., :-1]}).keys() == {name}
    assert case.deviations({name: np.full_like(recorded, np.nan)}).keys() == {name}
    assert case.deviations({}).keys() == {name}


# Other sizes of the same architectures: nothing is tied to those of the recordings


@pytest.fixture(scope="module")
def other_sizes() -> Adapter:
    config = {key: value for key, value in read_config(GOLDEN).items() if key != "weights_digest"}
    config |= {
        "weights_salt": "other sizes",
        "unet": config["unet"]
        | {
            "model_channels": 96,
            "channel_mult": [1, 2, 2, 4],
            "num_head_channels": 16,
            "num_res_blocks": 1,
            "transformer_depth": 2,
            "context_dim": 64,
        },
        "struct_encoder": config["struct_encoder"] | {"num_heads": 2},
        "autoencoder": config["autoencoder"] | {"ch": 32, "ch_mult": [1, 2, 2, 2]},
        "text": config["text"] | {"width": 64, "embed_dim": 64},
    }
    return Adapter(config, recipe_weights(config))


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BATCHES = [
    pytest.param(
        "unet_struct",
        {},
        lambda: {
            "x": drawn(2, 4, 16, 8, seed=1),
            "latent": drawn(2, 4, 16, 8, seed=2),
            "t": np.array([3, 900]),
            "context": drawn(2, 5, 64, seed=3),
        },
        {"out": (2, 4, 16, 8)},
        id="unet-struct",
    ),
    pytest.param(
        "vae_encode",
        {},
        lambda: {"image": drawn(2, 3, 32, 24).clip(-1, 1)},
        {"mean": (2, 4, 4, 3), "logvar": (2, 4, 4, 3)},
        id="vae-encode",
    ),
    pytest.param(
        "cfw_decode",
        {"w": 0.5},
        lambda: {
            "latent": drawn(2, 4, 2, 3, seed=1),
            "fea_0": drawn(2, 64, 8, 12, seed=2),
            "fea_1": drawn(2, 64, 4, 6, seed=3),
        },
        {"image": (2, 3, 16, 24)},
        id="cfw-decode",
    ),
]


@pytest.mark.parametrize(("operation", "params", "make_inputs", "shapes"), BATCHES)
def test_networks_of_other_sizes_answer_a_batch_as_one_by_one(
    other_sizes: Adapter, operation: str, params: dict[str, Any], make_inputs: Any, shapes: dict[str, tuple[int, ...]]
) -> None:
    inputs = make_inputs()
    together = other_sizes.run(operation, params, inputs)
    apart = [other_sizes.run(operation, params, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(2)]
    assert {name: value.shape for name, value in together.items()} == shapes
    for name, value in together.items():
        assert np.isfinite(value).all()
        assert not np.allclose(value[0], value[1], atol=1e-2)  # the inputs matter
        # another batch may take other kernels; equal to rounding
        np.testing.assert_allclose(value, np.concatenate([one[name] for one in apart]), rtol=0, atol=1e-4)


def test_a_canvas_of_other_sizes_is_the_same_however_its_tiles_are_batched(other_sizes: Adapter) -> None:
    params = {"parameterization": "v", "steps": 2, "tile_size": 8, "tile_overlap": 4, "scale": 3.0}
    inputs = {
        "x_T": drawn(1, 4, 8, 14, seed=1),
        "latent": drawn(1, 4, 8, 14, seed=2),
        "context": drawn(1, 77, 64, seed=3),
        "negative": drawn(1, 77, 64, seed=4),
        "noise": drawn(2, 1, 4, 8, 14, seed=5),
    }
    answers = [
        other_sizes.run("sample_canvas", params | {"tile_batch": batch}, inputs)["latent_out"] for batch in (1, 2)
    ]
    assert answers[0].shape == (1, 4, 8, 14)
    assert np.isfinite(answers[0]).all()
    np.testing.assert_allclose(answers[0], answers[1], rtol=0, atol=1e-3)


def test_a_prompt_goes_through_a_text_tower_of_other_sizes(other_sizes: Adapter) -> None:
    tokens = other_sizes.run("tokenize", {"texts": ["a cat", ""]}, {})["tokens"]
    context = other_sizes.run("text_encode", {}, {"tokens": tokens})["context"]
    assert context.shape == (2, 77, 64)
    assert torch.equal(torch.from_numpy(context[1]), other_sizes.model.null_context[0])
