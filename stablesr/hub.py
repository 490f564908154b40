"""Where released weights live: download, cache, checksum.

The weights of StableSR are under the S-Lab License 1.0: non-commercial use only. `LICENCE_NOTICE` says so; it is logged
to the logger "stablesr" at INFO before anything is fetched.

Of a file `w.ckpt` the cache may hold

    w.ckpt                 complete, and of the checksum it must have
    w.ckpt.sha256          that checksum, as `sha256sum --check` reads it: of the table, or pinned on first use
    w.ckpt.partial         what came so far; locked while somebody works on it (POSIX), kept to resume after a failure
    w.ckpt.partial.origin  which version of the remote file that is part of

so a file under its own name is never partial. Standard library only; proxies are taken from the environment.
"""

import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from stablesr.errors import DownloadError

try:
    import fcntl
except ImportError:  # Windows: works, but two processes must not download the same file at once
    fcntl = None  # type: ignore[assignment]

LICENCE_NOTICE = (
    "The weights of StableSR are under the S-Lab License 1.0: non-commercial use only. "
    "By downloading them you accept it: https://huggingface.co/Iceclear/StableSR"
)

Progress = Callable[[int, int | None], None]
"""Called with the bytes there so far (those of earlier runs included) and the bytes of the whole file, if known."""


@dataclass(frozen=True)
class Released:
    """One published file."""

    filename: str
    url: str
    sha256: str | None
    """Hex digest; None pins the file to what it is when first downloaded."""
    size: int | None
    """Bytes."""
    licence: str = "S-Lab License 1.0 (non-commercial)"


def _stablesr(filename: str, size: int, sha256: str) -> Released:
    return Released(filename, f"https://huggingface.co/Iceclear/StableSR/resolve/main/{filename}", sha256, size)


# Digests and sizes are those of the Git LFS pointers in commits 2f02eff, 3d279fd and 2b66732 of that repository.
_SD21_512 = _stablesr(
    "stablesr_000117.ckpt", 6481647231, "b8862bf3fd11c5b8fe82fb8a4618a1c74a29e0301a190bd6c2e84d68986ef9cb"
)
_SD21_768V = _stablesr(
    "stablesr_768v_000139.ckpt", 6481647231, "d5f83b544035b4bf24ab1d7aa86e0f83328e9ce121efb2c850f833178be3d10b"
)
_TURBO = _stablesr(
    "stablesr_turbo.ckpt", 6481632291, "3615aa00dcab2868042dcd1bba4979edbb6051e6e49c147cda6a2d550fb62c58"
)
_CFW = _stablesr("vqgan_cfw_00011.ckpt", 959719471, "5b20ed9a80e9bdbf9e76ff1642a6a5428ca3427b08b779248a88bfbba2e74e8e")

RELEASED: dict[str, tuple[Released, ...]] = {
    "sd21-512": (_SD21_512, _CFW),
    "sd21-768v": (_SD21_768V, _CFW),
    "turbo": (_TURBO, _CFW),
}
"""Preset name -> its files: the diffusion model, then the decoder."""

BACKOFF_S = 1.0
"""Pause after the first failed attempt; doubles with each that follows, up to 32 times this."""

_CHUNK = 2**20
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})

_log = logging.getLogger("stablesr")


def cache_folder() -> Path:
    """`$GIGASR_HOME`, else `$XDG_CACHE_HOME/gigasr`, else `~/.cache/gigasr`. Need not exist."""
    if home := os.environ.get("GIGASR_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gigasr"  # XDG: ignore relative paths


def pull(
    preset: str,
    *,
    cache: str | Path | None = None,
    sha256: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    base_url: str | None = None,
) -> tuple[Path, ...]:
    """Local paths of the files of a preset, in the order of `RELEASED`; downloads what is not there.

    Files that are there are read against their checksums, at about 1 s per GB. `cache` is a folder, `cache_folder()` by
    default; `base_url` a mirror that has the files under the same names; `sha256` gives other digests by file name, for
    a mirror with other files. Raises ValueError for names that do not exist, DownloadError as `download` does.
    """
    files = _released(preset)
    digests = dict(sha256 or {})
    if unknown := digests.keys() - {file.filename for file in files}:
        raise ValueError(f"sha256 names {sorted(unknown)}, but {preset!r} is {[file.filename for file in files]}")
    folder = Path(cache) if cache is not None else cache_folder()
    if not all((folder / file.filename).exists() for file in files):
        _log.info(LICENCE_NOTICE)
    paths = []
    for file in files:
        paths.append(
            download(
                f"{base_url.rstrip('/')}/{file.filename}" if base_url else file.url,
                folder / file.filename,
                sha256=digests.get(file.filename, file.sha256),
                size=None if file.filename in digests else file.size,
                progress=progress,
            )
        )
    return tuple(paths)


def verify(preset_or_path: str | Path, *, cache: str | Path | None = None) -> tuple[Path, ...]:
    """Read downloaded files, of a preset or one by path, against their checksums; return their paths.

    Raises DownloadError for a file that is missing, has no known checksum, or not the one it must have.
    """
    if preset_or_path in RELEASED:
        folder = Path(cache) if cache is not None else cache_folder()
        wanted = [(folder / file.filename, file.sha256) for file in _released(str(preset_or_path))]
    else:
        wanted = [(Path(preset_or_path), None)]
    for path, sha256 in wanted:
        expected = sha256 or _pinned(path)
        if not path.is_file():
            raise DownloadError(f"{path}: no such file\nhint: download it first")
        if expected is None:
            raise DownloadError(f"{path}: no checksum to compare with\nhint: write it to {_pin_path(path)}")
        _check(path, expected)
    return tuple(path for path, _ in wanted)


def download(
    url: str,
    destination: str | Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    progress: Progress | None = None,
    attempts: int = 5,
    timeout_s: float = 30.0,
) -> Path:
    """Fetch `url` (http, https or file) to `destination`, whole and checked, or not at all; return that path.

    A destination that exists is only checked. The checksum is `sha256`, else the one pinned beside the destination,
    else none, and the one found is pinned. Connections that drop are resumed where they broke, after a pause;
    `attempts` counts tries in a row that got no further. `timeout_s` limits the silence of the server. What came before
    a failure stays in `<destination>.partial`, and the next call goes on from there if the remote file is the same.

    Raises DownloadError: refused by the server, of another size or checksum (then nothing is kept), no room, no
    permission, or out of attempts.
    """
    destination = Path(destination)
    if (scheme := urlsplit(url).scheme) not in ("http", "https", "file"):
        raise DownloadError(f"cannot download {url!r}: scheme {scheme!r} is not http, https or file")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        expected = sha256.lower() if sha256 else _pinned(destination)
        if not destination.exists():
            with _Partial(destination) as partial:
                if not destination.exists():  # else another process finished it while we waited for the lock
                    _fetch(url, partial, size, progress, attempts, timeout_s)
                    found = _digest(partial.path)
                    if expected not in (None, found):
                        partial.restart()
                        hint = f"the copy was removed; is the URL right, is {_pin_path(destination).name} outdated?"
                        raise DownloadError(f"{url}: SHA-256 is {found}, must be {expected}\nhint: {hint}")
                    _pin(destination, found)  # before the file can be seen: there is no moment without
                    partial.move_to(destination)
                    return destination
        _pin(destination, _check(destination, expected))
        return destination
    except DownloadError:
        raise
    except OSError as error:
        raise _no_room(error.filename or destination, error.strerror or error, size) from error


# ---- checksums -------------------------------------------------------------------------------------------------------


def _released(preset: str) -> tuple[Released, ...]:
    if preset not in RELEASED:
        raise ValueError(f"no released weights for {preset!r}; there are {', '.join(RELEASED)}")
    return RELEASED[preset]


def _pin_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _pinned(path: Path) -> str | None:
    try:
        text = _pin_path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    if not re.match(r"[0-9a-f]{64}\b", text):  # empty after a power cut, or edited: not a reason to trust the file
        raise DownloadError(f"{_pin_path(path)}: no SHA-256 in it\nhint: delete it if you trust {path.name}")
    return text[:64]


def _pin(path: Path, digest: str) -> None:
    pin, line = _pin_path(path), f"{digest}  {path.name}\n"
    if not pin.exists() or pin.read_text(encoding="utf-8", errors="replace") != line:
        fresh = pin.with_name(f"{pin.name}.{os.getpid()}")
        fresh.write_text(line, encoding="utf-8")
        os.replace(fresh, pin)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str | None) -> str:
    found = _digest(path)
    if expected not in (None, found):
        hint = "the file was changed or damaged; delete it to fetch it again"
        raise DownloadError(f"{path}: SHA-256 is {found}, must be {expected}\nhint: {hint}")
    return found


def _no_room(path: str | Path, reason: object, needed: int | None) -> DownloadError:
    need = "an unknown number of" if needed is None else str(needed)
    hint = "free space, or choose another cache with GIGASR_HOME; what came so far is kept and will be resumed"
    return DownloadError(f"{path}: cannot be written: {reason}; {need} bytes are needed\nhint: {hint}")


# ---- the partial file ------------------------------------------------------------------------------------------------


class _Partial:
    """The unfinished file, locked: the lock goes with the process, and waiting for it is waiting for the download."""

    def __init__(self, destination: Path) -> None:
        self.path = destination.with_name(destination.name + ".partial")
        self._origin_path = self.path.with_name(self.path.name + ".origin")

    def __enter__(self) -> Self:
        while True:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            if fcntl is None:
                return self
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("%s: another process is downloading it; waiting", self.path)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
                    return self
            os.close(self._fd)  # whoever had the lock has moved the file away: we hold what is no partial any more

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            if self.size == 0:
                self.path.unlink(missing_ok=True)
                self._origin_path.unlink(missing_ok=True)
            os.close(self._fd)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    @property
    def origin(self) -> dict[str, Any]:
        """`validator` and `total` of the remote file this is a part of; empty if not known."""
        try:
            origin = json.loads(self._origin_path.read_bytes())
        except (OSError, ValueError):
            return {}
        return origin if isinstance(origin, dict) else {}

    def restart(self, **origin: str | int | None) -> None:
        os.ftruncate(self._fd, 0)
        self._origin_path.write_text(json.dumps(origin))

    def append(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def move_to(self, destination: Path) -> None:
        os.fsync(self._fd)
        self._origin_path.unlink(missing_ok=True)
        if fcntl is None:  # Windows cannot move an open file; elsewhere the lock is held until it is moved
            os.close(self._fd)
            self._fd = -1
        os.replace(self.path, destination)


# ---- the network -----------------------------------------------------------------------------------------------------


class _Dropped(Exception):
    """This attempt failed, the next may not."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if (urlsplit(req.full_url).scheme, urlsplit(newurl).scheme) not in _SAFE_REDIRECTS:
            raise DownloadError(f"{req.full_url}: redirects to {newurl}, which is less safe\nhint: check the URL")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_SAFE_REDIRECTS = {("http", "http"), ("http", "https"), ("https", "https")}


def _fetch(
    url: str, partial: _Partial, size: int | None, progress: Progress | None, attempts: int, timeout_s: float
) -> None:
    """Attempt after attempt, until the partial file is complete."""
    failed, furthest = 0, partial.size
    while True:
        try:
            return _attempt(url, partial, size, progress, timeout_s)
        except _Dropped as error:
            if partial.size > furthest:
                failed, furthest = 0, partial.size
            failed += 1
            if failed >= attempts:
                kept = (
                    f"the {partial.size} bytes that came are kept; run again to resume" if partial.size else "try again"
                )
                raise DownloadError(f"{url}: {error}, and no further in {attempts} attempts\nhint: {kept}") from error
            _log.info("%s: %s; trying again", url, error)
            time.sleep(BACKOFF_S * 2 ** min(failed - 1, 5))


def _attempt(url: str, partial: _Partial, size: int | None, progress: Progress | None, timeout_s: float) -> None:
    """One request: append what comes to the partial file. Returns if that completes it."""
    response = _open(url, partial, timeout_s)
    if response is None:
        return
    with contextlib.closing(response):
        total = _place(response, partial)
        if size is not None and total not in (None, size):
            partial.restart()
            raise DownloadError(f"{url}: has {total} bytes, must have {size}\nhint: is this the right file?")
        total = size if total is None else total
        done = partial.size
        free = shutil.disk_usage(partial.path.parent).free
        if total is not None and total - done > free:
            raise _no_room(partial.path, f"only {free} bytes are free", total - done)
        while True:
            if progress is not None:
                progress(done, total)
            try:
                chunk = response.read1(_CHUNK)  # not read(): a timeout would lose what came of the chunk
            except (OSError, http.client.HTTPException) as error:
                raise _Dropped(f"connection lost after {done} bytes ({error})") from error
            if not chunk:
                break
            if total is not None and done + len(chunk) > total:
                partial.restart()
                raise DownloadError(f"{url}: sends more than the {total} bytes it must have")
            try:
                partial.append(chunk)
            except OSError as error:
                raise _no_room(partial.path, error.strerror, None if total is None else total - done) from error
            done += len(chunk)
    if total is not None and done < total:
        raise _Dropped(f"connection closed after {done} of {total} bytes")


def _open(url: str, partial: _Partial, timeout_s: float) -> Any:
    """The response to a request for what is missing; None if nothing is."""
    origin, done = partial.origin, partial.size
    headers = {"User-Agent": "gigasr", "Accept-Encoding": "identity"}
    if done and origin:
        headers["Range"] = f"bytes={done}-"
        if origin.get("validator"):
            headers["If-Range"] = str(origin["validator"])
    try:
        opener = urllib.request.build_opener(_Redirects)
        return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and "Range" in headers:
            if done == origin.get("total") and error.headers.get("Content-Range", "") == f"bytes */{done}":
                return None  # an earlier run was killed between the last byte and the checksum
            partial.restart()
            raise _Dropped("the partial file is none of this remote file") from error
        reason = f"the server answers {error.code} {error.reason}"
        if error.code in _TRY_AGAIN:
            raise _Dropped(reason) from error
        hint = "it may need a login or a mirror" if error.code in (401, 403) else "check the URL, or use a mirror"
        raise DownloadError(f"{url}: {reason}\nhint: {hint}") from error
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause: object = error.reason if isinstance(error, urllib.error.URLError) else error
        # a bad certificate is a ValueError too
        if isinstance(cause, FileNotFoundError | PermissionError | IsADirectoryError | ValueError):
            raise DownloadError(f"{url}: {cause}\nhint: check the URL") from error
        raise _Dropped(f"no connection ({cause})") from error


def _place(response: Any, partial: _Partial) -> int | None:
    """Make the partial file end where the body begins; return the bytes of the whole remote file, if told."""
    headers, status = response.headers, response.status or 200  # file: has no status
    if status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
        total = int(found[2]) if found and found[2] != "*" else partial.origin.get("total")
        if not found or int(found[1]) != partial.size or total != partial.origin.get("total"):
            partial.restart()
            raise _Dropped(f"the server sent another range than asked for ({headers.get('Content-Range')})")
        return total
    if status != 200:
        raise DownloadError(f"{response.url}: the server answers {status}, not a file\nhint: check the URL")
    length = headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    etag = headers.get("ETag", "")
    strong = etag if etag.startswith('"') else None  # a weak one (W/"...") promises no equal bytes
    partial.restart(validator=strong or headers.get("Last-Modified"), total=total)
    return total
