"""Cases recorded from the reference implementation: where they lie, the weights they were made with, how to compare.

A folder of cases holds `tiny_config.json` (sizes of small networks and the salt of their weights), `index.json` and
arrays; tests/golden/README.md says where they come from.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stablesr.checkpoint import model_shapes
from stablesr.config import StableSRConfig
from stablesr.keys import Rule, cfw_rules, stablesr_rules
from tests.parity_adapter import config_of

GOLDEN = Path(__file__).parent / "golden"
"""The selection of cases that belongs to the project."""

WHOLE_SET = Path(os.environ.get("GIGASR_PARITY", Path(__file__).parents[2] / "shared" / "parity"))
"""The larger set that it was taken from, which need not be there."""

Shapes = dict[str, tuple[int, ...]]
Array = NDArray[Any]


# Released keys and shapes, by our own key table


def released_shapes(config: StableSRConfig, rules: Sequence[Rule]) -> Shapes:
    """What one of the two released checkpoints must hold, as the key table says it."""
    ours = model_shapes(config)
    return {
        theirs: tuple(part.shape)
        for rule in rules
        for theirs, part in zip(rule.theirs, rule.to_theirs(torch.empty(ours[rule.ours], device="meta")), strict=True)
    }


def unused_text_shapes(config: StableSRConfig, used: Shapes) -> Shapes:
    """What a StableSR checkpoint holds of the text tower beyond what is used: its end, after the last block but one."""
    text, width = "cond_stage_model.model", config.text.width
    first, last = (f"{text}.transformer.resblocks.{i}." for i in (0, config.text.layers - 1))
    block = {key.replace(first, last): shape for key, shape in used.items() if key.startswith(first)}
    return block | {f"{text}.text_projection": (width, width), f"{text}.logit_scale": ()}


def checkpoint_shapes(config: StableSRConfig) -> dict[str, Shapes]:
    """Both released checkpoints, schedules and training losses left out."""
    used = released_shapes(config, stablesr_rules(config))
    unused = unused_text_shapes(config, used)
    return {"stablesr": used | unused, "cfw": released_shapes(config, cfw_rules(config))}


# Weights that anybody can make again


def recipe_weights(tiny: dict[str, Any]) -> dict[str, dict[str, Array]]:
    """The weights of the recordings, of both checkpoints, by their released keys."""
    tables = checkpoint_shapes(config_of(tiny))
    weights = {}
    for name, shapes in tables.items():
        salt = f"{tiny['weights_salt']}/{name}"
        weights[name] = {key: recipe_weight(salt, key, shape) for key, shape in shapes.items()}
    return weights


def recipe_weight(salt: str, key: str, shape: tuple[int, ...]) -> Array:
    """One tensor, float32: uniform numbers from a generator keyed by its name, about as large as trained ones."""
    keyed = int.from_bytes(hashlib.sha256(f"{salt}/{key}".encode()).digest()[:16], "little")
    bits = np.atleast_1d(np.random.Philox(key=keyed).random_raw(math.prod(shape)))
    z = ((2.0 * ((bits >> np.uint64(11)) * 2.0**-53) - 1.0) * math.sqrt(3.0)).reshape(shape)  # mean 0, variance 1
    if not shape:
        z = 1.0 + 0.1 * z
    elif key.endswith(("token_embedding.weight", "positional_embedding")):
        z = 0.5 * z
    elif len(shape) > 1:
        z = z / math.sqrt(math.prod(shape[1:]))
    elif key.endswith("weight"):  # the gain of a norm
        z = 1.0 + 0.1 * z
    else:
        z = 0.05 * z
    return np.asarray(z, dtype=np.float32)


def weights_digest(weights: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode() + weights[key].astype("<f4").tobytes())
    return digest.hexdigest()


# Cases


@dataclass(frozen=True, eq=False)
class Case:
    """One recorded call: what went in, and what came out."""

    folder: Path
    entry: dict[str, Any]
    """Of index.json."""

    @property
    def inputs(self) -> dict[str, Array]:
        return {name: self._array(key) for name, key in self.entry["inputs"].items()}

    @property
    def outputs(self) -> dict[str, Array]:
        return {name: self._array(output["key"]) for name, output in self.entry["outputs"].items()}

    def _array(self, key: str) -> Array:
        with np.load(self.folder / self.entry["file"]) as arrays:
            return arrays[key]

    def deviations(self, answer: Mapping[str, Array]) -> dict[str, str]:
        """What is wrong with an answer, by output; nothing, when it is right."""
        wrong = {name: self._deviation(name, answer.get(name), recorded) for name, recorded in self.outputs.items()}
        return {name: complaint for name, complaint in wrong.items() if complaint}

    def _deviation(self, name: str, answer: Array | None, recorded: Array) -> str | None:
        limits = self.entry["outputs"][name]
        if answer is None or answer.shape != recorded.shape:
            return f"shape {None if answer is None else answer.shape} instead of {recorded.shape}"
        difference = np.abs(answer.astype(np.float64) - recorded.astype(np.float64))
        largest, share = difference.max(initial=0.0), float((difference > 0).mean()) if difference.size else 0.0
        if not largest <= limits["atol"]:  # also when it is NaN
            return f"off by {largest:.3g}, more than {limits['atol']:.3g}"
        if share > limits.get("max_mismatch_fraction", 1.0):
            return f"differs in {share:.3g} of the samples, more than {limits['max_mismatch_fraction']:.3g}"
        return None


@cache
def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "tiny_config.json").read_text(encoding="utf-8"))
    return config


def read_cases(folder: Path) -> Iterator[tuple[str, Case]]:
    for entry in json.loads((folder / "index.json").read_text(encoding="utf-8"))["cases"]:
        yield entry["id"], Case(folder, entry)
