"""Weight files: what torch.save wrote comes back bit for bit; what could run does not; what is damaged says so."""

import collections
import copyreg
import io
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from stablesr import pickles
from stablesr.errors import CheckpointError, StableSRError
from stablesr.pickles import read_state_dict

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def write_zip(
    path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, method: int = 0, **more: str
) -> Path:
    """A checkpoint as torch.save lays it out, with any pickle in it."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, contents in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", contents)
        for name, text in more.items():
            archive.writestr(f"archive/{name}", text)
    return path


class Call:
    """Pickles as a call of `function(*args)`, with state if there is any."""

    def __init__(self, function: object, *args: object, state: object = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.reduced


class StoragePickler(pickle.Pickler):
    def persistent_id(self, thing: object) -> object:
        return thing.pid if isinstance(thing, Storage) else None


class Storage:
    """Pickles as a reference to member `data/<key>`."""

    def __init__(self, kind: object = torch.FloatStorage, key: object = "0", numel: object = 6) -> None:
        self.pid = ("storage", kind, key, "cpu", numel)


def dumps(thing: object) -> bytes:
    buffer = io.BytesIO()
    StoragePickler(buffer, protocol=2).dump(thing)
    return buffer.getvalue()


def tensor(offset: object = 0, size: object = (6,), stride: object = (1,), storage: object = None) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage or Storage(), offset, size, stride, False, {})


SIX = np.arange(6, dtype="<f4").tobytes()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].stride() == value.stride(), name
        assert torch.equal(found[name], value), name


# ---- what torch.save wrote -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 2], [100, 101, 127]]).to(dtype)
    torch.save({"w": values}, tmp_path / "w.ckpt")
    assert_same(read_state_dict(tmp_path / "w.ckpt"), {"w": values})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    state = {"a": torch.arange(5.0), "b": torch.nn.Parameter(torch.ones(2, 2))}
    torch.save(state, tmp_path / "w.pth", pickle_protocol=protocol)
    assert_same(read_state_dict(tmp_path / "w.pth"), {"a": torch.arange(5.0), "b": torch.ones(2, 2)})


def test_views_and_parameters_equal_torch_load(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "transposed": base.transpose(0, 2),
        "offset": base[1, 1:, ::2],
        "expanded": base[0, 0].expand(5, 4),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "empty-at-the-end": base.reshape(-1)[24:],
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    torch.save(state, tmp_path / "w.pt")
    assert_same(read_state_dict(tmp_path / "w.pt"), torch.load(tmp_path / "w.pt", weights_only=True))


def test_tensors_of_one_storage_share_it_and_writing_stays_out_of_the_file(tmp_path: Path) -> None:
    base = torch.zeros(8)
    torch.save({"whole": base, "part": base[4:]}, tmp_path / "w.ckpt")
    before = (tmp_path / "w.ckpt").read_bytes()
    state = read_state_dict(tmp_path / "w.ckpt")
    state["whole"][5] = 1
    assert state["part"].tolist() == [0, 1, 0, 0]
    assert (tmp_path / "w.ckpt").read_bytes() == before


def test_a_modules_state_dict_loses_its_metadata_only(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    torch.save(module.state_dict(), tmp_path / "w.pth")
    assert module.state_dict()._metadata  # pickled as state of the OrderedDict
    assert_same(read_state_dict(tmp_path / "w.pth"), dict(module.state_dict()))


def test_a_lightning_checkpoint_gives_its_state_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.utilities"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    fakes = {}
    for module, name, base in (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", object),
        ("pytorch_lightning.utilities.parsing", "AttributeDict", dict),
    ):
        fakes[name] = type(name, (base,), {"__module__": module})
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        setattr(sys.modules[module], name, fakes[name])
    checkpoint, hyper = fakes["ModelCheckpoint"](), fakes["AttributeDict"](lr=1e-4)
    checkpoint.monitor = "loss"
    hyper.name = "x"
    lightning = {
        "epoch": 117,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {
            fakes["ModelCheckpoint"]: {"best": np.float32(0.5), "seen": {1, 2}, "device": torch.device("cpu")}
        },
        "objects": [checkpoint, hyper, collections.defaultdict(dict, a={}), torch.Size([1, 2]), np.float64(2)],
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "state_dict": collections.OrderedDict(w=torch.arange(3.0), n=torch.tensor(5)),
    }
    torch.save(lightning, tmp_path / "last.ckpt")
    monkeypatch.undo()  # there is no Lightning where the file is read
    assert_same(read_state_dict(tmp_path / "last.ckpt"), {"w": torch.arange(3.0), "n": torch.tensor(5)})
    assert "pytorch_lightning" not in sys.modules


def test_an_unaligned_storage_is_read(tmp_path: Path) -> None:
    for padding in range(4):
        path = write_zip(tmp_path / f"{padding}.ckpt", dumps({"w": tensor()}) + b"\0" * padding, {"0": SIX})
        assert read_state_dict(path)["w"].tolist() == [0, 1, 2, 3, 4, 5]


def test_safetensors_are_read(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert_same(dict(sorted(read_state_dict(tmp_path / "w.safetensors").items())), state)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_gigabytes_open_without_memory(tmp_path: Path) -> None:
    n_bytes = 2 * 2**30
    pickled = dumps({"w": tensor(0, (2**29,), (1,), Storage(numel=2**29))})
    # aligned as torch.save aligns: 30 bytes of header and the name stand before the contents of a member
    pickled += b"\0" * (-(len(pickled) + 30 + len("archive/data.pkl") + 30 + len("archive/data/0")) % 64)
    path = write_zip(tmp_path / "big.ckpt", pickled, {"0": b""})
    _stretch_last_member(path, n_bytes)
    script = (
        "import sys, resource, torch\n"
        "from stablesr.pickles import read_state_dict\n"
        "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "before = rss()\n"
        "w = read_state_dict(sys.argv[1])['w']\n"
        "opened = rss() - before\n"
        "assert w.shape == (2**29,) and w[-1] == 0\n"
        "w[: 2**24].sum()\n"  # 64 MiB: shows that the measure sees what is touched
        "print(opened, rss() - before)\n"
    )
    found = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    opened, touched = map(int, found.stdout.split())
    assert opened < 16 * 2**20
    assert touched > 60 * 2**20
    assert path.stat().st_blocks * 512 < 2**20  # the hole is still one


def _stretch_last_member(path: Path, n_bytes: int) -> None:
    """Make the empty last member `n_bytes` of zeros, as a hole in the file."""
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    tail = bytearray(path.read_bytes()[directory:])
    entry = tail.rindex(b"PK\x01\x02")
    tail[entry + 20 : entry + 28] = n_bytes.to_bytes(4, "little") * 2  # sizes, compressed and not
    end = tail.rindex(b"PK\x05\x06")
    tail[end + 16 : end + 20] = (directory + n_bytes).to_bytes(4, "little")
    with open(path, "r+b") as file:
        file.truncate(directory)
        file.seek(directory + n_bytes)
        file.write(tail)


# ---- what could run --------------------------------------------------------------------------------------------------


def evil_calls(marker: str) -> dict[str, tuple[object, str]]:
    """Objects that would make the file `marker` if unpickled, and the name an error must give."""
    touch = f"open({marker!r}, 'w').close()"
    return {
        "os.system": (Call(os.system, f"touch {marker}"), "os.system"),
        "eval": (Call(eval, touch), "builtins.eval"),
        "exec": (Call(exec, touch), "builtins.exec"),
        "open": (Call(open, marker, "w"), "io.open"),
        "subprocess": (Call(subprocess.call, ["touch", marker]), "subprocess.call"),
        "getattr": (Call(getattr, Call(__import__, "os"), "system"), "builtins.getattr"),
        "torch.load": (Call(torch.load, marker), "torch.serialization.load"),
        "copyreg": (Call(copyreg._reconstructor, dict, object, None), "copyreg._reconstructor"),
        "torch.hub": (Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        "numpy.load": (Call(np.load, marker), "numpy.load"),
    }


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.mark.parametrize("where", ["state_dict", "optimizer_states", "key-of-a-callback", "argument-of-a-tensor"])
@pytest.mark.parametrize("name", evil_calls(""))
def test_a_call_is_refused_by_name_and_does_not_run(tmp_path: Path, marker: Path, name: str, where: str) -> None:
    evil, said = evil_calls(str(marker))[name]
    good = {"w": tensor()}
    whole = {
        "state_dict": {"state_dict": {"w": evil}},
        "optimizer_states": {"state_dict": good, "optimizer_states": [{"state": {0: {"step": [evil]}}}]},
        "key-of-a-callback": {"state_dict": good, "callbacks": {evil: 1}},
        "argument-of-a-tensor": {"w": Call(torch._utils._rebuild_tensor_v2, Storage(), 0, (6,), (1,), False, evil)},
    }[where]
    path = write_zip(tmp_path / "evil.ckpt", dumps(whole), {"0": SIX})
    with pytest.raises(CheckpointError, match="nothing was executed") as caught:
        read_state_dict(path)
    assert f"{said}`" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "hint:" in str(caught.value)
    assert not marker.exists()


def test_the_evil_of_these_tests_is_real(tmp_path: Path, marker: Path) -> None:
    evil, _ = evil_calls(str(marker))["os.system"]
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()


@pytest.mark.parametrize(
    ("evil", "reason"),
    [
        pytest.param(tensor(storage=[0] * 6), "no storage", id="storage-is-a-list"),
        pytest.param(tensor(offset=1), "out of bounds", id="one-past-the-end"),
        pytest.param(tensor(size=(2, 3), stride=(4, 1)), "out of bounds", id="row-stride-too-long"),
        pytest.param(tensor(size=(2**62, 2**62), stride=(2, 1)), "out of bounds", id="product-overflows-64-bits"),
        pytest.param(tensor(size=(2**40,), stride=(0,)), "out of bounds", id="expanded-to-4-terabytes"),
        pytest.param(tensor(offset=7, size=(0,)), "out of bounds", id="empty-view-beyond-the-storage"),
        pytest.param(tensor(offset=-1, size=(2,)), "0 or more", id="negative-offset"),
        pytest.param(tensor(offset=5, stride=(-1,)), "0 or more", id="negative-stride"),
        pytest.param(tensor(size=(-6,)), "0 or more", id="negative-size"),
        pytest.param(tensor(size=(6.0,)), "0 or more", id="size-is-a-float"),
        pytest.param(tensor(size=(2, 3)), "one length", id="stride-too-short"),
        pytest.param(tensor(size=[6]), "two tuples", id="size-is-a-list"),
        pytest.param(Call(torch._utils._rebuild_tensor_v2), "malformed", id="no-arguments"),
        pytest.param(Call(torch._utils._rebuild_parameter, "x", True, {}), "no tensor", id="parameter-of-a-string"),
        pytest.param(Call(torch.Size, 10**9), "no tuple", id="size-of-a-number"),
        pytest.param(tensor(storage=Storage(numel=7)), "promises 28 bytes .* which has 24", id="storage-too-long"),
        pytest.param(tensor(storage=Storage(numel=-1)), "no storage", id="storage-of-negative-length"),
        pytest.param(tensor(storage=Storage(key="1")), "no member `data/1`", id="storage-not-there"),
        pytest.param(tensor(storage=Storage(key=0)), "no storage", id="storage-key-is-a-number"),
        pytest.param(tensor(storage=Storage(kind=torch.Size)), "no storage", id="storage-of-no-type"),
        pytest.param(Call(collections.defaultdict, os.getcwd), r"getcwd", id="factory-that-runs"),
        pytest.param(Call(collections.OrderedDict, [("a", 1)] * 9), "mapping with arguments", id="copying-constructor"),
        pytest.param(Call(torch._utils._rebuild_tensor_v2, Storage(), 0, (6,), (1,), False, {}, state={"data": 1}),
                     "changes the state", id="state-for-a-tensor"),
    ],
)  # fmt: skip
def test_allowed_functions_believe_nothing(tmp_path: Path, evil: object, reason: str) -> None:
    path = write_zip(tmp_path / "evil.ckpt", dumps({"state_dict": {"w": evil}}), {"0": SIX})
    with pytest.raises(CheckpointError, match=reason):
        read_state_dict(path)


def test_state_cannot_be_written_into_the_table_of_names(tmp_path: Path) -> None:
    # BUILD on a global: in a plain Unpickler it would change the function for every file read after this one
    for name in sorted(pickles.GLOBALS):
        module, _, attribute = name.rpartition(".")
        before = vars(pickles.GLOBALS[name]).copy() if hasattr(pickles.GLOBALS[name], "__dict__") else None
        pickled = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"}X\x01\x00\x00\x00xK\x01sb."
        with pytest.raises(CheckpointError):
            read_state_dict(write_zip(tmp_path / "evil.ckpt", pickled))
        after = pickles.GLOBALS[name]
        assert (vars(after).copy() if hasattr(after, "__dict__") else None) == before
        assert not hasattr(after, "x")


TUPLES = b"\x80\x02)q\x00" + b"".join(
    b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
)
"""t = (t, t), sixty times: 2**60 steps to hash."""


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        pytest.param(TUPLES + b"}h\x3cK\x01s.", "nests a tuple", id="exponential-hash"),
        pytest.param(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", "no state_dict", id="deep-lists"),
        pytest.param(b"\x80\x02)" + b"\x85" * 200_000 + b".", "nests a tuple", id="deep-tuples"),
        pytest.param(b"\x80\x02]r\xff\xff\xff\x7f.", "memo slot", id="memo-of-32-gigabytes"),
        pytest.param(b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".", "malformed", id="bytes-of-an-exabyte"),
        pytest.param(b"\x80\x02\x82\x01.", "opcode EXT1", id="extension-registry"),
        pytest.param(b"\x80\x02(cos\nsystem\no.", "opcode OBJ", id="old-instance"),
        pytest.param(b"(ios\nsystem\n.", "opcode INST", id="older-instance"),
        pytest.param(b"\x80\x02a.", "malformed|more from its stack", id="empty-stack"),
        pytest.param(b"\x80\x02h\x05.", "malformed", id="empty-memo"),
        pytest.param(b"\x80\x02(K\x01", "malformed", id="no-end"),
        pytest.param(b"\x80\x63.", "malformed", id="protocol-of-the-future"),
        pytest.param(b"", "malformed", id="empty"),
        pytest.param(b"\x80\x02]Q.", "no storage", id="strange-persistent-id"),
        pytest.param(b"\x80\x02N.", "no state_dict", id="none"),
        pytest.param(b"\x80\x02}.", "no state_dict", id="empty-mapping"),
    ],
)
def test_malformed_pickles_and_bombs_are_refused(tmp_path: Path, pickled: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_state_dict(write_zip(tmp_path / "bad.ckpt", pickled))


def test_a_pickle_longer_than_any_list_of_names_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zip(tmp_path / "w.ckpt", dumps({"w": tensor()}), {"0": SIX})
    monkeypatch.setattr(pickles, "MOST_PICKLE_BYTES", 20)
    with pytest.raises(CheckpointError, match="more than 20"):
        read_state_dict(path)


# ---- what is damaged, or something else ------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(50.0), "v": torch.ones(3, 3)}, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    for n_bytes in [*range(0, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:n_bytes])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
            read_state_dict(cut)
    cut.write_bytes(whole)
    assert len(read_state_dict(cut)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.ckpt", "whole.ckpt"]


def test_flipped_bytes_raise_checkpoint_errors_or_nothing(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "w.ckpt", dumps({"w": tensor(), "v": tensor(1, (2, 2), (2, 1))}), {"0": SIX})
    whole, refused = path.read_bytes(), 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            for value in read_state_dict(path).values():
                value.clone()
        except CheckpointError:
            refused += 1
    assert refused > len(whole) / 4


@pytest.mark.parametrize("n_bytes", [0, 5, 30, 120, 199])
def test_truncated_safetensors_are_refused(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"w": torch.arange(32.0)}, path)
    whole = path.read_bytes()
    assert n_bytes < len(whole)
    path.write_bytes(whole[:n_bytes])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_state_dict(path)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "w.ckpt", dumps({"w": tensor()}), {"0": SIX}, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_state_dict(path)


def test_only_this_machines_byte_order_is_read(tmp_path: Path) -> None:
    other = {"little": "big", "big": "little"}[sys.byteorder]
    same = write_zip(tmp_path / "same.ckpt", dumps({"w": tensor()}), {"0": SIX}, byteorder=sys.byteorder)
    assert read_state_dict(same)["w"].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(CheckpointError, match=f"byte order '{other}'"):
        read_state_dict(write_zip(tmp_path / "other.ckpt", dumps({"w": tensor()}), {"0": SIX}, byteorder=other))


def test_a_member_outside_the_file_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "w.ckpt", dumps({"w": tensor(storage=Storage(numel=2**20))}), {"0": SIX})
    whole = bytearray(path.read_bytes())
    entry = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 1)  # directory entry of data/0
    whole[entry + 20 : entry + 28] = (2**22).to_bytes(4, "little") * 2
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="not where the zip says"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        pytest.param(pickle.dumps({"a": 1}, protocol=2), "plain pickle.*hint: .*safetensors", id="plain-pickle"),
        pytest.param(b"\0" * 257 + b"ustar" + b"\0" * 300, "tar archive.*hint: .*safetensors", id="tar"),
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"<!DOCTYPE html>", "web page", id="web-page"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", id="lfs-pointer"),
        pytest.param(b"\x10\0\0\0\0\0\0\0{}", "name it", id="safetensors-by-another-name"),
        pytest.param(b"GIF89a", "no zip", id="a-picture"),
    ],
)
def test_other_files_are_called_by_their_name(tmp_path: Path, contents: bytes, said: str) -> None:
    (tmp_path / "w.ckpt").write_bytes(contents)
    with pytest.raises(CheckpointError, match=f"(?s){said}"):
        read_state_dict(tmp_path / "w.ckpt")


def test_legacy_torch_files_are_called_by_their_name(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="plain pickle"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        pytest.param({"state_dict": {"w": 1}}, "state_dict entry 'w' is int", id="number"),
        pytest.param({"state_dict": {3: torch.ones(1)}}, "state_dict entry 3 is", id="key-is-no-name"),
        pytest.param({"state_dict": {}}, "empty mapping", id="empty"),
        pytest.param({"model": {"w": torch.ones(1)}}, "top-level entry 'model' is dict", id="another-key"),
        pytest.param([torch.ones(1)], "no state_dict but list", id="list"),
    ],
)
def test_what_holds_no_state_dict_is_refused(tmp_path: Path, saved: object, said: str) -> None:
    torch.save(saved, tmp_path / "w.ckpt")
    with pytest.raises(CheckpointError, match=said):
        read_state_dict(tmp_path / "w.ckpt")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_state_dict(tmp_path / "absent.ckpt")
    with pytest.raises(CheckpointError, match="directory"):
        read_state_dict(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_state_dict(tmp_path / "absent.safetensors")


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not of torch\.save"):
        read_state_dict(tmp_path / "w.ckpt")


def test_checkpoint_errors_are_value_errors_of_this_package() -> None:
    assert issubclass(CheckpointError, ValueError)
    assert issubclass(CheckpointError, StableSRError)
