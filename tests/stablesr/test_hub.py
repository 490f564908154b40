"""Downloads against a server of our own that drops, lies and changes its mind."""

import errno
import hashlib
import http.server
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stablesr import hub
from stablesr.errors import DownloadError, StableSRError
from stablesr.hub import Released, download, pull, verify

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
OTHER = WEIGHTS[::-1]
SHA = hashlib.sha256(WEIGHTS).hexdigest()
UNSAID = -1


class Server(http.server.ThreadingHTTPServer):
    """One file under any path. The attributes are what a test turns."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = WEIGHTS
        self.etag: str | None = '"v1"'
        self.ranges = True
        self.drops: list[int] = []  # how many bytes the next responses send before they hang up
        self.statuses: list[int] = []  # what the next requests are answered with instead
        self.declared: int | None = None  # Content-Length, if not the truth
        self.content_range: str | None = None  # likewise
        self.location: str | None = None
        self.before_body = lambda: None
        self.requests: list[dict[str, str]] = []
        self.sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/w.ckpt"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers))
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        if server.location:
            self.send_response(302)
            self.send_header("Location", server.location)
            return self.end_headers()
        start, same = 0, self.headers.get("If-Range") in (None, server.etag)
        if server.ranges and same and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.body) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.body)}")
            return self.end_headers()
        body = server.body[start:]
        self.send_response(206 if start else 200)
        if start:
            truth = f"bytes {start}-{len(server.body) - 1}/{len(server.body)}"
            self.send_header("Content-Range", server.content_range or truth)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.declared != UNSAID:
            self.send_header("Content-Length", str(len(body) if server.declared is None else server.declared))
        self.end_headers()
        server.before_body()
        body = body[: server.drops.pop(0)] if server.drops else body
        self.wfile.write(body)
        server.sent += len(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hub, "BACKOFF_S", 0.001)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "w.ckpt"


def names(destination: Path) -> list[str]:
    return sorted(path.name for path in destination.parent.iterdir())


COMPLETE = ["w.ckpt", "w.ckpt.sha256"]
RESUMABLE = ["w.ckpt.partial", "w.ckpt.partial.origin"]


# ---- what goes well --------------------------------------------------------------------------------------------------


def test_a_download_is_whole_pinned_and_reports_its_progress(server: Server, destination: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    assert download(server.url, destination, progress=lambda done, total: seen.append((done, total))) == destination
    assert destination.read_bytes() == WEIGHTS
    assert (destination.parent / "w.ckpt.sha256").read_text() == f"{SHA}  w.ckpt\n"
    assert names(destination) == COMPLETE
    assert seen[0] == (0, len(WEIGHTS))
    assert seen[-1] == (len(WEIGHTS), len(WEIGHTS))
    assert seen == sorted(seen)


def test_what_is_there_is_not_fetched_again(server: Server, destination: Path) -> None:
    download(server.url, destination, sha256=SHA)
    download(server.url, destination, sha256=SHA.upper())
    assert len(server.requests) == 1


def test_a_file_url_is_copied(tmp_path: Path, destination: Path) -> None:
    (tmp_path / "mirror.ckpt").write_bytes(WEIGHTS)
    download((tmp_path / "mirror.ckpt").as_uri(), destination, sha256=SHA, size=len(WEIGHTS))
    assert destination.read_bytes() == WEIGHTS
    with pytest.raises(DownloadError, match=r"absent\.ckpt"):
        download((tmp_path / "absent.ckpt").as_uri(), tmp_path / "x.ckpt")


def test_two_downloads_at_once_fetch_one_file(server: Server, destination: Path) -> None:
    server.before_body = lambda: time.sleep(0.3)  # long enough for the others to arrive
    failures: list[BaseException] = []

    def fetch() -> None:
        try:
            download(server.url, destination, sha256=SHA)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert destination.read_bytes() == WEIGHTS
    assert server.sent == len(WEIGHTS)
    assert names(destination) == COMPLETE


# ---- connections that break ------------------------------------------------------------------------------------------


def test_two_dropped_connections_are_resumed_where_they_broke(server: Server, destination: Path) -> None:
    server.drops = [400_000, 300_000]
    seen: list[int] = []
    download(server.url, destination, sha256=SHA, progress=lambda done, total: seen.append(done))
    assert destination.read_bytes() == WEIGHTS
    assert [request.get("Range") for request in server.requests] == [None, "bytes=400000-", "bytes=700000-"]
    assert [request.get("If-Range") for request in server.requests] == [None, '"v1"', '"v1"']
    assert server.sent == len(WEIGHTS)
    assert seen == sorted(seen)
    assert names(destination) == COMPLETE


def test_what_came_is_kept_for_the_next_run(server: Server, destination: Path) -> None:
    server.drops = [400_000]
    with pytest.raises(DownloadError, match="closed after 400000 of 1048576 bytes") as caught:
        download(server.url, destination, attempts=1)
    assert "hint: the 400000 bytes that came are kept" in str(caught.value)
    assert names(destination) == RESUMABLE
    download(server.url, destination, sha256=SHA)
    assert server.requests[1]["Range"] == "bytes=400000-"
    assert server.sent == len(WEIGHTS)
    assert names(destination) == COMPLETE


def test_attempts_that_get_further_do_not_count(server: Server, destination: Path) -> None:
    server.drops = [100_000] * 6
    download(server.url, destination, sha256=SHA, attempts=2)
    assert len(server.requests) == 7


def test_attempts_that_get_no_further_do(server: Server, destination: Path) -> None:
    server.drops = [100_000] + [0] * 9
    with pytest.raises(DownloadError, match="no further in 3 attempts"):
        download(server.url, destination, attempts=3)
    assert len(server.requests) == 3  # the first of them got somewhere, so it is the first of three


def test_a_server_without_ranges_starts_again(server: Server, destination: Path) -> None:
    server.ranges, server.drops = False, [400_000]
    download(server.url, destination, sha256=SHA)
    assert destination.read_bytes() == WEIGHTS
    assert server.requests[1]["Range"] == "bytes=400000-"
    assert server.sent == 400_000 + len(WEIGHTS)


def test_without_ranges_drops_cannot_go_on_for_ever(server: Server, destination: Path) -> None:
    server.ranges, server.drops = False, [400_000] * 99
    with pytest.raises(DownloadError, match="no further in 4 attempts"):
        download(server.url, destination, attempts=4)
    assert len(server.requests) == 4


def test_a_remote_file_that_changed_is_fetched_from_its_start(server: Server, destination: Path) -> None:
    server.drops = [400_000]
    with pytest.raises(DownloadError):
        download(server.url, destination, attempts=1)
    server.body, server.etag = OTHER, '"v2"'
    download(server.url, destination)
    assert destination.read_bytes() == OTHER


def test_without_etags_another_length_starts_again(server: Server, destination: Path) -> None:
    server.etag, server.drops = None, [400_000]
    with pytest.raises(DownloadError):
        download(server.url, destination, attempts=1)
    server.body = OTHER + b"more"
    download(server.url, destination)
    assert destination.read_bytes() == OTHER + b"more"
    assert "If-Range" not in server.requests[1]


def test_a_weak_etag_is_no_promise(server: Server, destination: Path) -> None:
    server.etag, server.drops = 'W/"v1"', [400_000]
    download(server.url, destination, sha256=SHA)
    assert "If-Range" not in server.requests[1]


def test_another_range_than_asked_for_is_not_appended(server: Server, destination: Path) -> None:
    server.drops, server.content_range = [400_000], "bytes 399999-1048575/1048576"
    download(server.url, destination, sha256=SHA)
    assert "Range" not in server.requests[2]
    assert destination.read_bytes() == WEIGHTS


def test_a_run_killed_after_the_last_byte_needs_the_checksum_only(server: Server, destination: Path) -> None:
    server.drops = [400_000]
    with pytest.raises(DownloadError):
        download(server.url, destination, attempts=1)
    with open(destination.parent / "w.ckpt.partial", "ab") as partial:
        partial.write(WEIGHTS[400_000:])
    server.sent = 0
    download(server.url, destination, sha256=SHA)
    assert (server.sent, names(destination)) == (0, COMPLETE)


def test_a_partial_file_longer_than_the_remote_one_is_dropped(server: Server, destination: Path) -> None:
    server.drops = [400_000]
    with pytest.raises(DownloadError):
        download(server.url, destination, attempts=1)
    server.body = WEIGHTS[:1000]
    download(server.url, destination)
    assert destination.read_bytes() == WEIGHTS[:1000]


def test_a_partial_file_of_unknown_origin_is_not_resumed(server: Server, destination: Path) -> None:
    destination.parent.mkdir()
    (destination.parent / "w.ckpt.partial").write_bytes(b"somebody else's")
    download(server.url, destination, sha256=SHA)
    assert destination.read_bytes() == WEIGHTS


def test_a_silent_server_is_given_up(server: Server, destination: Path) -> None:
    enough = threading.Event()
    server.before_body = lambda: enough.wait(5) and None
    with pytest.raises(DownloadError, match="timed out"):
        download(server.url, destination, attempts=2, timeout_s=0.1)
    enough.set()
    assert len(server.requests) == 2


def test_nobody_there(server: Server, destination: Path) -> None:
    with pytest.raises(DownloadError, match="no connection"):
        download("http://127.0.0.1:9/w.ckpt", destination, attempts=2)
    assert names(destination) == []


# ---- what is wrong for good ------------------------------------------------------------------------------------------


def test_a_wrong_checksum_leaves_nothing(server: Server, destination: Path) -> None:
    server.body = OTHER
    with pytest.raises(DownloadError, match=f"SHA-256 is .*, must be {SHA}"):
        download(server.url, destination, sha256=SHA)
    assert names(destination) == []
    assert len(server.requests) == 1


def test_too_short_a_body_is_not_taken_for_the_file(server: Server, destination: Path) -> None:
    server.ranges, server.body, server.declared = False, WEIGHTS[:500], 1000
    with pytest.raises(DownloadError, match="closed after 500 of 1000 bytes"):
        download(server.url, destination, attempts=2)
    assert names(destination) == RESUMABLE


def test_another_size_than_published_is_refused_before_it_is_fetched(server: Server, destination: Path) -> None:
    with pytest.raises(DownloadError, match=r"has 1048576 bytes, must have 1000") as caught:
        download(server.url, destination, size=1000)
    assert "hint:" in str(caught.value)
    assert names(destination) == []


def test_a_server_that_does_not_say_how_much_it_sends(server: Server, destination: Path) -> None:
    server.declared = UNSAID
    with pytest.raises(DownloadError, match="sends more than the 1000 bytes"):
        download(server.url, destination, size=1000)
    assert names(destination) == []
    download(server.url, destination, sha256=SHA)
    assert destination.read_bytes() == WEIGHTS


@pytest.mark.parametrize(("status", "hint"), [(404, "check the URL"), (401, "login"), (403, "login"), (410, "mirror")])
def test_a_refusal_is_one_clear_error_at_once(server: Server, destination: Path, status: int, hint: str) -> None:
    server.statuses = [status] * 5
    with pytest.raises(DownloadError, match=f"answers {status}") as caught:
        download(server.url, destination)
    assert server.url in str(caught.value)
    assert hint in str(caught.value)
    assert len(server.requests) == 1
    assert names(destination) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, destination: Path, status: int) -> None:
    server.statuses = [status, status]
    download(server.url, destination, sha256=SHA)
    assert len(server.requests) == 3


def test_pauses_double(server: Server, destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(hub, "BACKOFF_S", 1.0)
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    server.statuses = [503] * 4
    download(server.url, destination)
    assert pauses == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/w", "data:,w", "/etc/passwd", "", "javascript:0"])
def test_other_schemes_are_refused(destination: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="is not http, https or file"):
        download(url, destination)


@pytest.mark.parametrize(
    ("location", "said"), [("file:///etc/hostname", "answers 302"), ("ftp://127.0.0.1/w", "less safe")]
)
def test_redirects_stay_on_the_web(server: Server, destination: Path, location: str, said: str) -> None:
    server.location = location
    with pytest.raises(DownloadError, match=said):
        download(server.url, destination)
    assert names(destination) == []


# ---- the disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_before_anything_is_fetched(
    server: Server, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DownloadError, match="only 1000 bytes are free; 1048576 bytes are needed") as caught:
        download(server.url, destination)
    assert str(destination) in str(caught.value)
    assert names(destination) == []


def test_a_disk_that_fills_up_meanwhile_keeps_what_fits(
    server: Server, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = os.write, 0

    def write_to_a_small_disk(fd: int, chunk: bytes) -> int:
        nonlocal written
        if written + len(chunk) > 500_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += len(chunk)
        return write(fd, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(hub.os, "write", write_to_a_small_disk)
        patch.setattr(hub, "_CHUNK", 100_000)
        with pytest.raises(DownloadError, match=r"No space left on device; \d+ bytes are needed") as caught:
            download(server.url, destination)
    assert "w.ckpt.partial" in str(caught.value)
    assert names(destination) == RESUMABLE
    assert len(server.requests) == 1
    download(server.url, destination, sha256=SHA)
    assert destination.read_bytes() == WEIGHTS
    assert server.requests[1]["Range"] == f"bytes={written}-"


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="1048576 bytes are needed") as caught:
        download(server.url, tmp_path / "file" / "w.ckpt", size=len(WEIGHTS))
    assert str(tmp_path / "file") in str(caught.value)
    assert server.requests == []


def test_a_folder_that_cannot_be_written(server: Server, destination: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int, mode: int) -> int:  # by hand: root, whom containers run as, may write anywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(hub.os, "open", refuse)
    with pytest.raises(DownloadError, match=r"w\.ckpt\.partial: cannot be written: Permission denied; 7 bytes"):
        download(server.url, destination, size=7)
    assert server.requests == []


# ---- checksums and presets -------------------------------------------------------------------------------------------


def tamper(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[1000] ^= 1
    path.write_bytes(contents)


def test_a_pinned_file_that_was_tampered_with_is_found_out(server: Server, destination: Path) -> None:
    download(server.url, destination)
    assert verify(destination) == (destination,)
    tamper(destination)
    with pytest.raises(DownloadError, match=f"must be {SHA}"):
        verify(destination)
    with pytest.raises(DownloadError, match=f"must be {SHA}"):
        download(server.url, destination)
    assert destination.exists()  # it is the user's to delete
    assert len(server.requests) == 1


def test_the_pin_outlives_the_file(server: Server, destination: Path) -> None:
    download(server.url, destination)
    destination.unlink()
    server.body, server.etag = OTHER, '"v2"'
    with pytest.raises(DownloadError, match=r"w\.ckpt\.sha256 outdated"):
        download(server.url, destination)
    assert names(destination) == ["w.ckpt.sha256"]
    download(server.url, destination, sha256=hashlib.sha256(OTHER).hexdigest())
    assert verify(destination) == (destination,)


def test_a_damaged_pin_is_no_pin(server: Server, destination: Path) -> None:
    download(server.url, destination)
    (destination.parent / "w.ckpt.sha256").write_text("")
    with pytest.raises(DownloadError, match="no SHA-256 in it"):
        download(server.url, destination)


def test_verify_needs_a_file_and_a_checksum(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no such file"):
        verify(tmp_path / "w.ckpt")
    (tmp_path / "w.ckpt").write_bytes(WEIGHTS)
    with pytest.raises(DownloadError, match="no checksum"):
        verify(tmp_path / "w.ckpt")
    with pytest.raises(DownloadError, match="no such file"):
        verify("turbo", cache=tmp_path)


def test_pull_fetches_the_files_of_a_preset_from_a_mirror(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = (
        Released("a.ckpt", "http://nowhere.invalid/a.ckpt", SHA, len(WEIGHTS)),
        Released("b.ckpt", "http://nowhere.invalid/b.ckpt", None, None),
    )
    monkeypatch.setitem(hub.RELEASED, "mine", files)
    caplog.set_level(logging.INFO, logger="stablesr")
    base_url = server.url.rpartition("/")[0]
    paths = pull("mine", cache=tmp_path, base_url=base_url)
    assert paths == (tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert [path.read_bytes() for path in paths] == [WEIGHTS, WEIGHTS]
    assert caplog.messages.count(hub.LICENCE_NOTICE) == 1
    assert verify("mine", cache=tmp_path) == paths
    assert pull("mine", cache=tmp_path) == paths
    assert len(server.requests) == 2
    assert caplog.messages.count(hub.LICENCE_NOTICE) == 1  # nothing was fetched, so nothing to say
    for path in paths:
        tamper(path)
        with pytest.raises(DownloadError, match=path.name):
            verify("mine", cache=tmp_path)
        with pytest.raises(DownloadError, match=path.name):
            pull("mine", cache=tmp_path)
        tamper(path)  # back again


def test_pull_takes_other_checksums(server: Server, tmp_path: Path) -> None:
    names = ("stablesr_turbo.ckpt", "vqgan_cfw_00011.ckpt")
    base_url = server.url.rpartition("/")[0] + "/"
    pull("turbo", cache=tmp_path, base_url=base_url, sha256=dict.fromkeys(names, SHA))
    assert (tmp_path / "stablesr_turbo.ckpt").read_bytes() == WEIGHTS
    with pytest.raises(ValueError, match=r"w\.ckpt"):
        pull("turbo", cache=tmp_path, sha256={"w.ckpt": SHA})
    with pytest.raises(ValueError, match="sd21-512, sd21-768v, turbo"):
        pull("sd15", cache=tmp_path)


def test_a_mirror_must_have_the_published_files(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="must have 6481632291"):
        pull("turbo", cache=tmp_path, base_url=server.url.rpartition("/")[0])
    assert list(tmp_path.iterdir()) == []


def test_the_table_of_released_files() -> None:
    assert {preset: [file.filename for file in files] for preset, files in hub.RELEASED.items()} == {
        "sd21-512": ["stablesr_000117.ckpt", "vqgan_cfw_00011.ckpt"],
        "sd21-768v": ["stablesr_768v_000139.ckpt", "vqgan_cfw_00011.ckpt"],
        "turbo": ["stablesr_turbo.ckpt", "vqgan_cfw_00011.ckpt"],
    }
    for file in {file for files in hub.RELEASED.values() for file in files}:
        assert file.url == f"https://huggingface.co/Iceclear/StableSR/resolve/main/{file.filename}"
        assert len(bytes.fromhex(file.sha256 or "")) == 32
        assert "S-Lab License 1.0" in file.licence
    assert "S-Lab License 1.0" in hub.LICENCE_NOTICE
    assert "non-commercial" in hub.LICENCE_NOTICE


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({"GIGASR_HOME": "/g", "XDG_CACHE_HOME": "/x"}, "/g", id="gigasr-home"),
        pytest.param({"XDG_CACHE_HOME": "/x"}, "/x/gigasr", id="xdg"),
        pytest.param({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/gigasr", id="xdg-must-be-absolute"),
        pytest.param({"GIGASR_HOME": ""}, "/home/me/.cache/gigasr", id="neither"),
    ],
)
def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str) -> None:
    for name in ("GIGASR_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hub.cache_folder() == Path(expected)


def test_download_errors_are_os_errors_of_this_package() -> None:
    assert issubclass(DownloadError, OSError)
    assert issubclass(DownloadError, StableSRError)
