"""Released checkpoints in, model files out: the same numbers, strictly, or one error and nothing left behind."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stablesr import PRESETS, CheckpointError, hub, load
from stablesr.checkpoint import convert, load_first_stage, model_shapes, open_model_file, to_released, translate
from stablesr.checkpoint.__main__ import main
from stablesr.config import StableSRConfig
from stablesr.keys import cfw_rules, is_dispensable, stablesr_rules
from stablesr.loading import random_model
from stablesr.model import StableSR
from stablesr.pickles import read_state_dict

TINY = PRESETS["tiny"]


def released_states(model: StableSR) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What would have been released, had this model been trained by the reference: both files' state dicts."""
    assert model.fetch_text_tower is not None
    text = {f"text.{key}": value for key, value in model.fetch_text_tower().state_dict().items()}
    ours = model.state_dict() | text
    stablesr = to_released(ours, stablesr_rules(model.config))
    unused = f"cond_stage_model.model.transformer.resblocks.{model.config.text.layers - 1}.ln_1.weight"
    extras = {"betas": torch.zeros(1000), "cond_stage_model.model.logit_scale": torch.ones(()), unused: torch.ones(32)}
    return stablesr | extras, to_released(ours, cfw_rules(model.config)) | {"loss.logvar": torch.zeros(())}


@pytest.fixture(scope="module")
def model() -> StableSR:
    return random_model(TINY, seed=5)


@pytest.fixture(scope="module")
def released(model: StableSR, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("released")
    for name, state in zip(("stablesr.ckpt", "cfw.ckpt"), released_states(model), strict=True):
        torch.save({"epoch": 117, "state_dict": state, "optimizer_states": [{"state": {}}]}, folder / name)
    return folder / "stablesr.ckpt", folder / "cfw.ckpt"


def test_a_model_survives_release_and_conversion(model: StableSR, released: tuple[Path, Path], tmp_path: Path) -> None:
    path = convert(*released, tmp_path / "model.safetensors", TINY, torch.float32)
    loaded = load(path, device="cpu")
    assert loaded.config == TINY
    wanted, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_prompts_work_after_loading_although_the_tower_stays_on_disk(
    model: StableSR, released: tuple[Path, Path], tmp_path: Path
) -> None:
    loaded = load(convert(*released, tmp_path / "model.safetensors", TINY, torch.float32), device="cpu")
    assert not any(key.startswith("text.") for key in loaded.state_dict())
    assert torch.equal(loaded.embed_text("a harbour from above"), model.embed_text("a harbour from above"))
    assert torch.equal(loaded.embed_text(""), loaded.null_context)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_rounds_to_the_precision_asked_for(
    model: StableSR, released: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    path = convert(*released, tmp_path / "model.safetensors", TINY, dtype)
    with open_model_file(path) as (_, tensors):
        stored = tensors["unet.conv_in.weight"].make()
    assert stored.dtype == dtype
    assert torch.equal(stored, model.unet.conv_in.weight.to(dtype))
    assert path.stat().st_size < 20e6, "the embedded preset must stay under 20 MB"


def _without(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.pop(key)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(
            _without("model.diffusion_model.out.2.bias"),
            ["1 missing", "model.diffusion_model.out.2.bias"],
            id="missing",
        ),
        pytest.param(lambda s: s.update({"control.zero": torch.ones(1)}), ["1 extra", "control.zero"], id="extra"),
        pytest.param(
            lambda s: s.update({"model.diffusion_model.out.2.bias": torch.ones(8)}),
            ["1 misshapen", "out.2.bias [8] instead of [4]"],
            id="misshapen",
        ),
        pytest.param(
            lambda s: (s.pop("structcond_stage_model.fea_tran.0.in_layers.0.bias"), s.update({"x": torch.ones(1)})),
            ["1 missing", "1 extra"],
            id="all-in-one-error",
        ),
    ],
)
def test_another_architecture_is_one_error_and_leaves_nothing(
    model: StableSR,
    released: tuple[Path, Path],
    tmp_path: Path,
    spoil: Callable[[dict[str, Tensor]], object],
    words: list[str],
) -> None:
    state, _ = released_states(model)
    spoil(state)
    folder = tmp_path / "out"
    folder.mkdir()
    torch.save({"state_dict": state}, tmp_path / "spoilt.ckpt")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "spoilt.ckpt", released[1], folder / "model.safetensors", TINY, torch.float32)
    assert all(word in str(caught.value) for word in [*words, "spoilt.ckpt", "hint:"])
    assert os.listdir(folder) == []


def test_the_two_files_the_wrong_way_round_are_refused(released: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        convert(released[1], released[0], tmp_path / "model.safetensors", TINY, torch.float32)
    assert os.listdir(tmp_path) == []


class _Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def test_a_checkpoint_that_runs_code_is_refused_by_name(released: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    trace = tmp_path / "ran"
    torch.save({"state_dict": {}, "optimizer_states": [_Evil(f"touch {trace}")]}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"(posix|os|nt)\.system"):
        convert(tmp_path / "evil.ckpt", released[1], folder / "model.safetensors", TINY, torch.float32)
    assert not trace.exists() and os.listdir(folder) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_checkpoint_is_one_error_and_leaves_nothing(
    released: tuple[Path, Path], tmp_path: Path, share: float
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    whole = released[0].read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
        convert(tmp_path / "cut.ckpt", released[1], folder / "model.safetensors", TINY, torch.float32)
    assert os.listdir(folder) == []


def test_a_failing_conversion_keeps_the_old_model_file(
    released: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the old one")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        convert(*released, path, TINY, torch.float32)
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "cannot read", id="empty"),
        pytest.param(b"not at all", "cannot read", id="garbage"),
        pytest.param(b"\x02\0\0\0\0\0\0\0{}", "names no architecture", id="no-metadata"),
    ],
)
def test_what_is_no_model_file_is_one_error(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        load(path)


@pytest.mark.parametrize("name", ["sd21-513", "nowhere.safetensors"])
def test_what_is_not_there_is_one_error(name: str) -> None:
    with pytest.raises(ValueError, match="neither a file nor one of the presets"):
        load(name)


def test_a_truncated_model_file_is_one_error(released: tuple[Path, Path], tmp_path: Path) -> None:
    path = convert(*released, tmp_path / "model.safetensors", TINY, torch.bfloat16)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(path)


def test_the_first_stage_is_read_out_of_a_stable_diffusion_checkpoint(model: StableSR, tmp_path: Path) -> None:
    state, _ = released_states(model)
    diffusion = {key: value for key, value in state.items() if ".spade." not in key and "structcond" not in key}
    torch.save({"state_dict": diffusion | {"model_ema.decay": torch.ones(())}}, tmp_path / "v2-1_512.ckpt")
    autoencoder = load_first_stage(tmp_path / "v2-1_512.ckpt", TINY)
    image = torch.rand(1, 3, 16, 24)
    assert torch.equal(autoencoder.encode(image).mean, model.autoencoder.encode(image).mean)


def full_size_released(folder: Path, config: StableSRConfig) -> tuple[Path, Path]:
    """Checkpoints of every released key at full size, a few kilobytes on disk: each tensor is one number, expanded."""
    shapes = model_shapes(config)
    ours = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    paths = folder / "stablesr.ckpt", folder / "cfw.ckpt"
    for path, rules in zip(paths, (stablesr_rules(config), cfw_rules(config)), strict=True):
        state = {}
        for rule in rules:
            parts = rule.to_theirs(torch.empty(ours[rule.ours].shape, device="meta"))
            state |= {
                key: torch.full((), 0.01).expand(part.shape) for key, part in zip(rule.theirs, parts, strict=True)
            }
        torch.save({"state_dict": state}, path)
    return paths


@pytest.mark.parametrize("preset", ["sd21-512", "sd21-768v", "turbo"])
def test_full_size_checkpoints_match_the_table(preset: str, tmp_path: Path) -> None:
    config = PRESETS[preset]
    wanted, translated = model_shapes(config), {}
    for path, rules in zip(
        full_size_released(tmp_path, config), (stablesr_rules(config), cfw_rules(config)), strict=True
    ):
        state = read_state_dict(path)
        translated |= translate(state, rules, wanted, lambda key: is_dispensable(key, config), path)
    assert translated.keys() == wanted.keys() - {"null_context"}
    name = "unet.middle_block1.spade.gamma_beta.weight"
    assert translated[name].make().shape == wanted[name]


@pytest.mark.slow
def test_full_size_conversion_loading_and_inference_stay_under_their_memory(tmp_path: Path) -> None:
    """Conversion holds less than one copy of the weights (5.6 GB); loading and a picture in bf16 stay under 4 GiB."""
    stablesr, cfw = full_size_released(tmp_path, PRESETS["sd21-512"])
    output = tmp_path / "model.safetensors"
    arguments = [stablesr, cfw, "--preset", "sd21-512", "--dtype", "bf16", "--output", output]
    report = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    peak = _run(f"from stablesr.checkpoint.__main__ import main\nmain({['convert', *map(str, arguments)]})\n{report}")
    print(f"conversion: {peak:.2f} GiB resident at most")
    assert peak < 5.2
    peak = _run(
        f"import numpy as np, stablesr, torch\nmodel = stablesr.load({str(output)!r}, 'cpu', torch.bfloat16)\n"
        f"model.upscale(np.zeros((128, 128, 3), np.uint8), steps=1)\n{report}"
    )
    print(f"loading and a 512 x 512 picture: {peak:.2f} GiB resident at most")
    assert peak < 4.0


def _run(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def test_a_released_preset_is_fetched_and_converted_once(
    model: StableSR, released: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = []

    def pull(preset: str) -> tuple[Path, Path]:
        pulled.append(preset)
        return released

    monkeypatch.setenv("GIGASR_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "pull", pull)
    monkeypatch.setitem(PRESETS, "turbo", replace(TINY, name="turbo"))
    for _ in range(2):
        loaded = load("turbo", device="cpu", dtype=torch.float32)
        assert loaded.config.name == "turbo"
        assert torch.equal(loaded.unet.time_mlp[0].weight, model.unet.time_mlp[0].weight)
    assert pulled == ["turbo"]
    assert os.listdir(tmp_path) == ["turbo-float32.safetensors"]


def test_the_command_line_converts(
    released: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "sd21-512", TINY)
    path = tmp_path / "model.safetensors"
    assert main(["convert", *map(str, released), "--preset", "sd21-512", "--dtype", "bf16", "-o", str(path)]) == 0
    assert load(path, device="cpu").config == TINY


def test_the_command_line_says_what_is_wrong_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"nothing of the kind")
    arguments = ["convert", "a.ckpt", "b.ckpt", "--preset", "turbo", "-o", "model.safetensors"]
    arguments[1:3] = [str(tmp_path / name) for name in arguments[1:3]]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and "a.ckpt" in error and "Traceback" not in error


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "stablesr.checkpoint", "--help"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "S-Lab License" in done.stdout
