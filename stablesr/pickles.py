"""Weight files, read without running what is in them and without holding more than is used.

A `.ckpt` is a zip of one pickle, which names the tensors, and one uncompressed member per storage:

    archive/data.pkl     {"state_dict": {"unet.w": rebuild(storage "0", offset, size, stride), ...}, ...}
    archive/data/0       the bytes of storage "0", little endian
    archive/byteorder    "little"                                (newer files only)

A pickle is a program, and whoever wrote the file wrote the program. Three walls stand around it:

1. `_scan` admits only the opcodes `torch.save` emits, and bounds what they can allocate.
2. `_Unpickler.find_class` looks names up in `GLOBALS` and nowhere else; behind every name stands an inert class of
   this file. No module is imported, no foreign function called, no object of torch or numpy is made, so none of their
   `__setstate__` can be reached either.
3. Tensors are made after the pickle has ended, from offsets and strides that were checked against the file.

Storages are memory-mapped copy-on-write: a tensor costs no memory before it is read, and writing to one never
reaches the file. The file must not be truncated while its tensors are in use.
"""

import io
import math
import mmap
import pickle
import pickletools
import reprlib
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from stablesr.errors import CheckpointError

MOST_PICKLE_BYTES = 8 * 2**20
"""Largest `data.pkl` read. It holds names and shapes only: the 6.5 GB of stablesr_000117.ckpt need less than 1 MB."""

MOST_TUPLE_NODES = 10_000
"""Largest tuple, counted as a tree. Tuples that share parts (`t = (t, t)`, n times) take 2**n steps to hash."""

MOST_ELEMENTS = 2**34
"""Largest tensor: an expanded view (stride 0) of four bytes could otherwise claim any size."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU, with the dtype, shape and strides they were saved with.

    Reads `.safetensors`, and the zip files of `torch.save` under any other suffix (`.ckpt`, `.pth`, `.pt`). Of these,
    the entry `state_dict` if there is one, else the top-level mapping itself; optimizer states, callbacks, epochs are
    ignored, but must be harmless too. Tensors of one storage still share it. Shapes are whatever the file says:
    comparing them with the model is the caller's business. The bytes of the weights are not checksummed here.

    Raises CheckpointError if the file cannot be read, is truncated or malformed, names anything outside `GLOBALS`,
    or holds no mapping of names to tensors. Nothing in the file is ever executed.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not head.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path}: {_what_it_is(head)}")
    archive = _Archive(path)
    return archive.tensors(_load(archive, path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except Exception as error:  # SafetensorError, but also MemoryError and TypeError for lying headers
        hint = "the file is damaged or still downloading; fetch it again"
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})\nhint: {hint}") from error


def _what_it_is(head: bytes) -> str:
    """What a file that is not a zip is instead, and how to get one that can be read."""
    resave = "hint: on a machine that trusts the file, load it with torch and save it with safetensors"
    if not head:
        return "the file is empty\nhint: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights\nhint: run `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not weights\nhint: the download needs another URL, or a login"
    if head[257:262] == b"ustar":
        return f"this is a tar archive (torch before 0.1.10), not a zip\n{resave}"
    if head[:1] == b"\x80":
        return f"this is a plain pickle (torch before 1.6), not a zip; nothing was executed\n{resave}"
    if head[8:9] == b"{":
        return "this looks like safetensors\nhint: name it *.safetensors"
    return f"this is no zip file, so no checkpoint of torch.save\n{resave}"


# ---- what stands behind the names of a pickle ------------------------------------------------------------------------


class _Refusal(Exception):
    """The pickle asks for something no weight file needs. Becomes a CheckpointError with the path."""


class _Closed:
    """Takes no state, as class or as instance: what BUILD would otherwise write into `__dict__`."""

    __slots__ = ()

    @staticmethod
    def __setstate__(*state: Any) -> None:
        raise _Refusal("changes the state of a tensor, storage or function")


class _StorageType(_Closed):
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage(_Closed):
    """`numel` elements of `dtype` from byte `start` of the file."""

    __slots__ = ("dtype", "numel", "start")

    def __init__(self, start: int, numel: int, dtype: torch.dtype) -> None:
        self.start, self.numel, self.dtype = start, numel, dtype


class _View(_Closed):
    """A tensor to be; offset and strides count elements, and stay within the storage."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class _Function(_Closed):
    """One of the three functions below, which believe nothing they are told."""

    __slots__ = ("body",)

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body

    def __call__(self, *args: Any) -> Any:
        return self.body(*args)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *hooks_and_metadata: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise _Refusal("builds a tensor from something that is no storage")
    if not (type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= 64):
        raise _Refusal("builds a tensor whose size and stride are not two tuples of one length")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise _Refusal("builds a tensor whose offset, size and stride are not all counts of 0 or more")
    span = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset + span > storage.numel or math.prod(size) > MOST_ELEMENTS:
        where = f"offset {offset}, size {size}, stride {stride} in a storage of {storage.numel} elements"
        raise _Refusal(f"builds a tensor out of bounds: {where}")
    return _View(storage, offset, size, stride)


def _rebuild_parameter(view: Any, requires_grad: Any, hooks: Any) -> _View:
    if not isinstance(view, _View):
        raise _Refusal("builds a parameter from something that is no tensor")
    return view


def _size(size: Any = ()) -> tuple:
    if type(size) is not tuple:
        raise _Refusal("builds a torch.Size from something that is no tuple")
    return size


class _Inert:
    """Stands for an object that has nothing to do with weights: takes anything, keeps nothing, does nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> "_Inert":
        return super().__new__(cls)

    @staticmethod
    def __setstate__(*state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    @staticmethod
    def append(*item: Any) -> None: ...

    extend = append


class _Mapping(dict):
    """`OrderedDict` and `defaultdict`, without their state (`_metadata` of a state_dict)."""

    def __new__(cls, *factory: Any) -> "_Mapping":
        # Contents come by SETITEMS; a constructor that copied its argument could be called a million times on a big one
        if len(factory) > 1 or not all(any(f is safe for safe in _FACTORIES) for f in factory):
            raise _Refusal("builds a mapping with arguments")
        return super().__new__(cls)

    def __init__(self, *factory: Any) -> None:
        super().__init__()

    @staticmethod
    def __setstate__(*state: Any) -> None: ...


def _inert(name: str) -> type[_Inert]:
    return type(name, (_Inert,), {"__slots__": ()})


_BUILTINS = {name: _inert(name) for name in ("builtins.list", "builtins.dict", "builtins.int", "builtins.float")}
_FACTORIES = (None, *_BUILTINS.values())

GLOBALS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor),
    "torch._utils._rebuild_parameter": _Function(_rebuild_parameter),
    "torch.FloatStorage": _StorageType(torch.float32),
    "torch.HalfStorage": _StorageType(torch.float16),
    "torch.BFloat16Storage": _StorageType(torch.bfloat16),
    "torch.DoubleStorage": _StorageType(torch.float64),
    "torch.LongStorage": _StorageType(torch.int64),
    "torch.IntStorage": _StorageType(torch.int32),
    "torch.ShortStorage": _StorageType(torch.int16),
    "torch.CharStorage": _StorageType(torch.int8),
    "torch.ByteStorage": _StorageType(torch.uint8),
    "torch.BoolStorage": _StorageType(torch.bool),
    "torch.storage.UntypedStorage": _StorageType(torch.uint8),
    "torch.Size": _Function(_size),
    "collections.OrderedDict": _Mapping,
    "collections.defaultdict": _Mapping,
    **_BUILTINS,
    **{name: _inert(name) for name in (
        "builtins.set", "torch.device", "_codecs.encode", "numpy.dtype",
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    )},
}  # fmt: skip
"""All a weight file may name, and what it gets: never the thing itself."""


_NAMES_IN_PROTOCOL_2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "commands": "subprocess"}
"""torch.save writes protocol 2, in which some modules have the names of Python 2."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, archive: "_Archive") -> None:
        super().__init__(io.BytesIO(pickled))
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        module = _NAMES_IN_PROTOCOL_2.get(module, module)
        try:
            return GLOBALS[f"{module}.{name}"]
        except KeyError:
            also = f" (`os.{name[:100]}`)" if module in ("posix", "nt") else ""
            raise _Refusal(f"asks for `{module[:100]}.{name[:100]}`{also}, which no weight file needs") from None

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), str(), int(numel)) if numel >= 0:
                start, n_bytes = self._archive.member(f"data/{key}")
            case _:
                raise _Refusal("refers to something outside itself that is no storage")
        if n_bytes < numel * dtype.itemsize:
            raise _Refusal(f"promises {numel * dtype.itemsize} bytes in `data/{key}`, which has {n_bytes}")
        return _Storage(start, numel, dtype)


# ---- the pickle ------------------------------------------------------------------------------------------------------

_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING
    SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT
    MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ BINPERSID
"""
"""What `torch.save` writes with pickle protocols 2 to 5. Not here: EXT (bypasses find_class), INST, OBJ, DUP, text."""


def _load(archive: "_Archive", path: Path) -> Any:
    try:
        start, n_bytes = archive.member("data.pkl")
        if n_bytes > MOST_PICKLE_BYTES:
            raise _Refusal(f"has {n_bytes} bytes, more than {MOST_PICKLE_BYTES}: no list of names and shapes")
        pickled = archive.bytes[start : start + n_bytes]
        _scan(pickled)
        return _Unpickler(pickled, archive).load()
    except _Refusal as refusal:
        hint = "do not load this file elsewhere unless you trust its author; weights are best kept as safetensors"
        raise CheckpointError(f"{path}: its pickle {refusal}; nothing was executed\nhint: {hint}") from refusal
    except CheckpointError:
        raise
    except Exception as error:  # a malformed pickle can raise nearly anything: KeyError, struct.error, MemoryError ...
        hint = "the file is damaged; fetch it again"
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: malformed pickle ({reason}); nothing was executed\nhint: {hint}") from error


def _scan(pickled: bytes) -> None:
    """Refuse opcodes no checkpoint has, and bombs: memo slots far apart, tuples that unfold exponentially.

    Follows the pickle with one number per stack item: how many nodes it has as a tree. Lists and dicts that grow
    after they were memoized count too little, which does no harm: they cannot be hashed.
    """
    allowed = frozenset(_OPCODES.split())
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    arg: Any
    for n_ops, (opcode, arg, _) in enumerate(pickletools.genops(pickled)):
        name = opcode.name
        if name not in allowed:
            raise _Refusal(f"uses opcode {name}, which torch.save never writes")
        if name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            if arg > n_ops:
                raise _Refusal(f"puts operation {n_ops} into memo slot {arg}, to claim memory for all before it")
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        else:
            before = opcode.stack_before
            n_plain = before.index(pickletools.markobject) if pickletools.markobject in before else len(before)
            first = (marks.pop() if n_plain < len(before) else len(stack)) - n_plain
            if first < 0 or (marks and first < marks[-1]):
                raise _Refusal("takes more from its stack than is there")
            nodes = 1 + sum(stack[first:])
            del stack[first:]
            if name.startswith(("TUPLE", "FROZENSET")) and nodes > MOST_TUPLE_NODES:
                raise _Refusal(f"nests a tuple of more than {MOST_TUPLE_NODES} parts")
            stack += [nodes] * len(opcode.stack_after)


# ---- the zip ---------------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    start: int
    """Byte of the file at which the contents begin."""
    n_bytes: int


class _Archive:
    """The zip of `torch.save`, memory-mapped. Members are found by their name below the top folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be mapped into memory: {error.strerror or error}") from error
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except Exception as error:  # BadZipFile, and for odd directories also struct.error, NotImplementedError ...
            hint = "the file is truncated or damaged; fetch it again"
            raise CheckpointError(f"{path}: incomplete zip file ({error})\nhint: {hint}") from error
        self._members = {info.filename: info for info in members}
        roots = [name.removesuffix("data.pkl") for name in self._members if name.endswith("/data.pkl")]
        if len(roots) != 1 or len(self._members) != len(members):
            raise CheckpointError(
                f"{path}: a zip, but not of torch.save: it must hold one */data.pkl and no name twice"
            )
        self._root = roots[0]
        if f"{self._root}byteorder" in self._members:
            start, n_bytes = self.member("byteorder")
            order = self.bytes[start : start + min(n_bytes, 16)].decode("ascii", "replace")
            if order != sys.byteorder:
                hint = "load and save it again on a machine like this one"
                raise CheckpointError(f"{path}: byte order {order!r}, this machine is {sys.byteorder}\nhint: {hint}")

    def member(self, name: str) -> _Member:
        """Where the contents of a member lie. Raises CheckpointError unless they are plain bytes inside the file."""
        info = self._members.get(self._root + name)
        if info is None:
            raise CheckpointError(f"{self.path}: has no member `{name}`\nhint: the file is damaged; fetch it again")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            hint = "torch.save stores members as they are; repack with `zip -0`"
            raise CheckpointError(f"{self.path}: member `{name}` is compressed or encrypted\nhint: {hint}")
        header = self.bytes[info.header_offset : info.header_offset + 30] if info.header_offset >= 0 else b""
        if len(header) == 30 and header.startswith(b"PK\x03\x04"):
            start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))  # after its name and extras
            if start + info.file_size <= len(self.bytes):
                return _Member(start, info.file_size)
        raise CheckpointError(f"{self.path}: member `{name}` is not where the zip says\nhint: fetch the file again")

    def tensors(self, root: Any) -> dict[str, Tensor]:
        """The tensors among what was unpickled."""
        nested = root.get("state_dict") if isinstance(root, dict) else None
        views = nested if isinstance(nested, dict) else root
        if not isinstance(views, dict) or not views:
            what = type(views).__name__.strip("_")
            raise CheckpointError(f"{self.path}: holds no state_dict but {what if views else 'an empty mapping'}\n"
                                  "hint: save `model.state_dict()`")  # fmt: skip
        for name, view in views.items():
            if not (isinstance(name, str) and isinstance(view, _View)):
                raise CheckpointError(
                    f"{self.path}: {'state_dict' if views is nested else 'top-level'} entry {reprlib.repr(name)} is "
                    f"{type(view).__name__.strip('_')}, not a tensor under a name\n"
                    "hint: a checkpoint is {name: tensor}, or has that under the key 'state_dict'"
                )
        return {name: self._tensor(view) for name, view in views.items()}

    def _tensor(self, view: _View) -> Tensor:
        storage = view.storage
        if storage.numel == 0:
            flat = torch.empty(0, dtype=storage.dtype)
        elif storage.start % storage.dtype.itemsize == 0:
            flat = torch.frombuffer(self.bytes, dtype=storage.dtype, count=storage.numel, offset=storage.start)
        else:  # torch.save aligns to 64 bytes, other zip writers do not; kernels may rely on alignment
            n_bytes = storage.numel * storage.dtype.itemsize
            flat = torch.frombuffer(self.bytes, dtype=torch.uint8, count=n_bytes, offset=storage.start).clone()
            flat = flat.view(storage.dtype)
        return flat.as_strided(view.size, view.stride, view.offset)
