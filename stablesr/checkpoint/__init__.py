r"""Released checkpoints to ours, and back: strict, lazy, and written so that no half file is ever found.

    python -m stablesr.checkpoint pull sd21-512
    python -m stablesr.checkpoint convert stablesr_000117.ckpt vqgan_cfw_00011.ckpt \\
        --preset sd21-512 --dtype bf16 --output sd21-512.safetensors

A model file is safetensors: every tensor under its name in `StableSR`, the text tower under `text.`, and the
architecture as JSON in the header. The released weights are under the S-Lab License 1.0: non-commercial use only.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stablesr.autoencoder import Autoencoder
from stablesr.config import StableSRConfig
from stablesr.errors import CheckpointError
from stablesr.keys import Rule, cfw_rules, first_stage_rules, is_dispensable, stablesr_rules
from stablesr.model import StableSR
from stablesr.pickles import read_state_dict
from stablesr.text import TextTower, encode_prompts

CONFIG_KEY = "stablesr.config"
LICENCE_KEY = "stablesr.licence"
TEXT_PREFIX = "text."

_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_LISTED = 8
"""How many keys of one kind an error names before it only counts."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is needed, and known by its shape before."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def translate(
    state: Mapping[str, Tensor],
    rules: Sequence[Rule],
    wanted: Mapping[str, tuple[int, ...]],
    dispensable: Callable[[str], bool],
    where: str | Path,
) -> dict[str, LazyTensor]:
    """Released tensors by our names.

    Args:
        state: of one released checkpoint.
        rules: the key table of that kind of checkpoint.
        wanted: shapes of our tensors by our names; those of the table are looked up.
        dispensable: tells extra keys that are known and not needed from those that mean a wrong file.
        where: what to call the checkpoint in an error.

    Raises:
        CheckpointError: one, that lists every missing, extra and misshapen key.
    """
    expected = {}
    for rule in rules:
        parts = rule.to_theirs(torch.empty(wanted[rule.ours], device="meta"))
        expected.update({theirs: tuple(part.shape) for theirs, part in zip(rule.theirs, parts, strict=True)})
    found = {key: tuple(tensor.shape) for key, tensor in state.items() if key in expected or not dispensable(key)}
    require_same_keys(expected, found, where)

    def lazy(rule: Rule) -> LazyTensor:
        return LazyTensor(wanted[rule.ours], lambda: rule.to_ours([state[theirs] for theirs in rule.theirs]))

    return {rule.ours: lazy(rule) for rule in rules}


def to_released(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Our tensors by their released names: the key table backwards.

    Raises:
        CheckpointError: if a tensor of the table is missing.
    """
    require_same_keys({rule.ours: () for rule in rules}, dict.fromkeys(state, ()), "the model", extra_ok=True)
    return {
        theirs: part
        for rule in rules
        for theirs, part in zip(rule.theirs, rule.to_theirs(state[rule.ours]), strict=True)
    }


def require_same_keys(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str | Path,
    *,
    extra_ok: bool = False,
) -> None:
    """Raise the one CheckpointError that lists all missing, extra and misshapen keys, if there are any."""
    complaints = []
    for what, keys in (
        ("missing", [key for key in wanted if key not in found]),
        ("extra", [] if extra_ok else [key for key in found if key not in wanted]),
        (
            "misshapen",
            [
                f"{key} {list(found[key])} instead of {list(shape)}"
                for key, shape in wanted.items()
                if key in found and found[key] != shape
            ],
        ),
    ):
        if keys:
            more = f", and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
            complaints.append(f"  {len(keys)} {what}: {', '.join(keys[:_LISTED])}{more}")
    if complaints:
        raise CheckpointError(
            f"{where}: the tensors are not those of this architecture\n"
            + "\n".join(complaints)
            + "\nhint: check that the file is of the kind, and the preset the one, that it was trained as"
        )


def model_shapes(config: StableSRConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a model file, by our names."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"": StableSR(config), TEXT_PREFIX: TextTower(config.text)}
    return {
        prefix + key: tuple(tensor.shape) for prefix, part in parts.items() for key, tensor in part.state_dict().items()
    }


def convert(
    stablesr: str | Path, cfw: str | Path, output: str | Path, config: StableSRConfig, dtype: torch.dtype
) -> Path:
    """Make one model file of a released StableSR checkpoint and a released CFW checkpoint.

    The files are mapped, not read: memory holds one tensor at a time, and the text tower while it embeds the null
    prompt, whose embedding is stored so that the tower is not needed for it again.

    Args:
        stablesr, cfw: `.ckpt` files; no pickle code is executed.
        output: where to write; replaced in one step when it is complete.
        config: the architecture; the weights decide nothing.
        dtype: float32, bfloat16 or float16.

    Raises:
        CheckpointError: if a file is unsafe, broken or of another architecture; `output` is left as it was.
    """
    wanted = model_shapes(config)
    tensors: dict[str, LazyTensor] = {}
    for path, rules in ((stablesr, stablesr_rules(config)), (cfw, cfw_rules(config))):
        tensors |= translate(read_state_dict(path), rules, wanted, lambda key: is_dispensable(key, config), path)
    tower = build_text_tower(config, tensors)
    context = encode_prompts(tower, [""])
    del tower
    tensors["null_context"] = LazyTensor(tuple(context.shape), lambda: context)
    assert {key: lazy.shape for key, lazy in tensors.items()} == wanted
    metadata = {
        CONFIG_KEY: config.to_json(),
        LICENCE_KEY: "S-Lab License 1.0, non-commercial use only: converted from the weights released with StableSR",
    }
    write_model_file(output, tensors, metadata, dtype)
    return Path(output)


def build_text_tower(config: StableSRConfig, tensors: Mapping[str, LazyTensor]) -> TextTower:
    """The text tower in float32, made of the tensors under `text.`; those of mapped files stay mapped."""
    with torch.device("meta"):
        tower = TextTower(config.text)
    state = {
        key.removeprefix(TEXT_PREFIX): lazy.make().float()
        for key, lazy in tensors.items()
        if key.startswith(TEXT_PREFIX)
    }
    tower.load_state_dict(state, strict=True, assign=True)
    return tower.eval().requires_grad_(False)


def write_model_file(
    path: str | Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], dtype: torch.dtype
) -> None:
    """Write safetensors, tensor after tensor, under a temporary name that is renamed when all of it is on the disk."""
    if dtype not in _SAFETENSORS_DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(map(str, _SAFETENSORS_DTYPES))}")
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, lazy in tensors.items():
        size = torch.Size(lazy.shape).numel() * dtype.itemsize
        header[key] = {
            "dtype": _SAFETENSORS_DTYPES[dtype],
            "shape": list(lazy.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8 bytes
    path = Path(path)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for lazy in tensors.values():
                values = lazy.make().detach().to("cpu", dtype).contiguous()
                values.reshape(-1).view(torch.uint8).numpy().tofile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


@contextmanager
def open_model_file(path: str | Path) -> Iterator[tuple[StableSRConfig, dict[str, LazyTensor]]]:
    """Architecture and tensors of a model file; a tensor is read when it is made, within the context.

    Raises:
        CheckpointError: if it is no model file, broken, or does not hold what its architecture needs.
    """
    try:
        with safe_open(path, framework="pt") as checked:  # a header that lies about its data is refused here
            metadata = checked.metadata() or {}
        if CONFIG_KEY not in metadata:
            raise CheckpointError(
                f"{path} is safetensors, but no model file of ours: its header names no architecture\n"
                "hint: make one of the released checkpoints with `python -m stablesr.checkpoint convert`"
            )
        try:
            config = StableSRConfig.from_json(metadata[CONFIG_KEY])
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot read the architecture in its header: {error}") from error
        with open(path, "rb") as file:
            tensors = _tensors_of(file)
            require_same_keys(model_shapes(config), {key: lazy.shape for key, lazy in tensors.items()}, path)
            yield config, tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot read {path} as a model file: {error}\n"
            "hint: released .ckpt files are converted first, with `python -m stablesr.checkpoint convert`"
        ) from error


def _tensors_of(file: BinaryIO) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, to be read, not mapped: mapped pages would be memory beside their copies."""
    header_size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(header_size))
    dtypes = {name: dtype for dtype, name in _SAFETENSORS_DTYPES.items()}

    def lazy(dtype: torch.dtype, shape: list[int], begin: int, end: int) -> LazyTensor:
        def make() -> Tensor:
            content = bytearray(end - begin)
            file.seek(8 + header_size + begin)
            file.readinto(content)  # type: ignore[attr-defined]
            return torch.frombuffer(content, dtype=dtype).view(shape)

        return LazyTensor(tuple(shape), make)

    entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
    if foreign := {entry["dtype"] for entry in entries.values()} - dtypes.keys():
        raise CheckpointError(f"{file.name}: tensors of {sorted(foreign)}; a model file holds {sorted(dtypes)}")
    return {key: lazy(dtypes[entry["dtype"]], entry["shape"], *entry["data_offsets"]) for key, entry in entries.items()}


def load_first_stage(path: str | Path, config: StableSRConfig) -> Autoencoder:
    """The autoencoder alone, of a Stable Diffusion 2.1 or StableSR checkpoint, in float32.

    Raises:
        CheckpointError: if the file is unsafe or broken, or its first stage of another architecture.
    """
    with torch.device("meta"):
        autoencoder = Autoencoder(config.autoencoder)
    wanted = {f"autoencoder.{key}": tuple(tensor.shape) for key, tensor in autoencoder.state_dict().items()}
    state = read_state_dict(path)
    tensors = translate(
        state, first_stage_rules(config), wanted, lambda key: not key.startswith("first_stage_model."), path
    )
    ours = {key.removeprefix("autoencoder."): lazy for key, lazy in tensors.items()}
    fill(autoencoder, ours, torch.device("cpu"), torch.float32)
    return autoencoder.eval().requires_grad_(False)


def fill(module: nn.Module, tensors: Mapping[str, LazyTensor], device: torch.device, dtype: torch.dtype) -> None:
    """Give a module on `meta` its tensors, one at a time; convolutions in channels_last memory."""
    state = {}
    for key in module.state_dict():
        tensor = tensors[key].make()
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        state[key] = tensor.to(device, dtype, memory_format=layout, copy=True)
    module.load_state_dict(state, strict=True, assign=True)
