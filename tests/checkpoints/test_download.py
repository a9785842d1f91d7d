"""Names become directories: shipped, local, cached, downloaded; and what is said when they cannot."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from made_checkpoints import same_tensors
from persimmon.checkpoints import download
from persimmon.checkpoints.download import resolve
from persimmon.checkpoints.hub import load_model
from persimmon.checkpoints.releases import RELEASES, by_name, licence_of, write_card
from persimmon.errors import InputError, NotFoundError, UnavailableError
from persimmon.model import PersimmonModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# -- names ---------------------------------------------------------------------------------------------------


def test_a_directory_stays(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(directory) == directory
    monkeypatch.chdir(directory.parent)
    assert resolve("model") == Path("model")


def test_a_shipped_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(download, "_ASSETS", tmp_path)
    with pytest.raises(NotFoundError, match="'mini' is missing from this installation"):
        resolve("mini")
    (tmp_path / "mini").mkdir()
    assert resolve("mini") == tmp_path / "mini"


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "./missing", "", "../x", "-/x", "x y/z"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(NotFoundError, match="mini, mini-base, persimmon-8b-base, persimmon-8b-chat"):
        resolve(name)


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "release.tar").write_bytes(b"")
    with pytest.raises(InputError, match="persimmon import"):
        resolve("some/release.tar")


def test_releases_by_name() -> None:
    assert by_name("persimmon-8b-chat") is by_name("adept/persimmon-8b-chat") is RELEASES[1]
    assert by_name("persimmon-8b") is None


def test_licences_of_directories(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    write_card(RELEASES[0], tmp_path)
    assert licence_of(tmp_path) == "Apache-2.0"
    for text, licence in (("---\nlicense: 'mit'\n---\n", "mit"), ("license: mit\n", None), ("---\nx: y\n---", None)):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) == licence


# -- the hub client, replaced --------------------------------------------------------------------------------


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch, directory: Path) -> list[dict[str, Any]]:
    """Calls of `snapshot_download`; the cache is empty, the hub has the directory."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls: list[dict[str, Any]] = []

    def fake(repo_id: str, **settings: Any) -> str:
        calls.append({"repo_id": repo_id, **settings})
        if settings.get("local_files_only"):
            raise LocalEntryNotFoundError("not cached")
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return calls


def test_a_release_says_its_licence_before_it_is_fetched(
    snapshots: list[dict[str, Any]], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve("persimmon-8b-chat") == directory
    assert "CC-BY-NC-4.0, for non-commercial use only" in capsys.readouterr().err
    assert snapshots[-1]["repo_id"] == "adept/persimmon-8b-chat"
    lines: list[str] = []
    resolve("adept/persimmon-8b-base", notice=lines.append)
    assert lines == ["adept/persimmon-8b-base: licence Apache-2.0, free for any use"]


def test_revisions(snapshots: list[dict[str, Any]]) -> None:
    resolve("some/model@v1.0")
    assert snapshots[-1]["revision"] == "v1.0"
    resolve("some/model", revision="abc")
    assert snapshots[-1]["revision"] == "abc"
    with pytest.raises(InputError, match="two revisions"):
        resolve("some/model@v1.0", revision="abc")


def test_without_weights_none_are_asked_for(snapshots: list[dict[str, Any]]) -> None:
    resolve("some/model", weights=False)
    assert not any("safetensors" in pattern for pattern in snapshots[-1]["allow_patterns"] if "json" not in pattern)
    resolve("some/model")
    assert "model*.safetensors" in snapshots[-1]["allow_patterns"]


def test_an_incomplete_repository(snapshots: list[dict[str, Any]], directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match="some/model: the weights are not all on the hub"):
        resolve("some/model")
    assert "pytorch_model*.bin" in snapshots[-1]["allow_patterns"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("RevisionNotFoundError", NotFoundError, "no revision 'v9'"),
        ("RepositoryNotFoundError", NotFoundError, "no model 'some/model'"),
        ("GatedRepoError", UnavailableError, "HF_TOKEN"),
        ("LocalEntryNotFoundError", UnavailableError, "cannot be reached"),
        ("OfflineModeIsEnabled", UnavailableError, "cannot be reached"),
        ("HFValidationError", InputError, "not a hub id"),
        ("HfHubHTTPError", UnavailableError, "failed: boom"),
    ],
)
def test_the_clients_errors_in_our_words(
    monkeypatch: pytest.MonkeyPatch, error: str, kind: type[Exception], message: str
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    class Fake(getattr(errors, error)):  # type: ignore[misc]
        def __init__(self) -> None:
            Exception.__init__(self, "boom")

        def __str__(self) -> str:
            return "boom"

    def fail(*args: Any, local_files_only: bool = False, **settings: Any) -> str:
        raise errors.LocalEntryNotFoundError("not cached") if local_files_only else Fake()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=message):
        resolve("some/model@v9")


# -- a hub on this machine -----------------------------------------------------------------------------------


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as its client needs to download one repository."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - set by the fixture
    ranges: list[str] = []  # noqa: RUF012
    fetched: list[str] = []  # noqa: RUF012
    break_after = 0  # bytes of the weights after which the connection is lost, once

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/some/model/tree"):
            tree = [{"type": "file", "path": n, "size": len(d), "oid": _etag(d)} for n, d in self.files.items()]
            self._send(200, json.dumps(tree).encode(), body)
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in self.files]
            document = {"id": "some/model", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._send(200, json.dumps(document).encode(), body)
        elif path.startswith("/some/model/resolve/") and path.rpartition("/")[2] in self.files:
            name = path.rpartition("/")[2]
            if body:
                self.fetched.append(name)
            self._send_file(self.files[name], body)
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def _send_file(self, data: bytes, body: bool) -> None:
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, wanted = 0, self.headers.get("Range")
        if wanted and body:
            self.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], body, headers)

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and 0 < self.break_after < len(data):
            data, FakeHub.break_after = data[: self.break_after], 0
            self.close_connection = True
        if body:
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(directory: Path) -> Iterator[str]:
    FakeHub.files = {file.name: file.read_bytes() for file in directory.iterdir()}
    FakeHub.files["training.log"] = b"not wanted"
    FakeHub.ranges, FakeHub.fetched, FakeHub.break_after = [], [], 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def in_process(home: Path, *names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Resolve names in a process of their own: the hub client reads its environment when it is imported."""
    code = (
        "import sys\n"
        "from persimmon.checkpoints.download import resolve\n"
        "from persimmon.errors import PersimmonError\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        print(resolve(name))\n"
        "    except PersimmonError as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    clean |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True, env=clean, timeout=120
    )


def test_download_cache_and_offline(hub: str, model: PersimmonModel, tmp_path: Path) -> None:
    first = in_process(tmp_path / "home", "some/model", "other/model", HF_ENDPOINT=hub)
    path, missing = first.stdout.splitlines()
    assert same_tensors(load_model(path), model)
    assert not (Path(path) / "training.log").exists()
    assert missing.startswith("NotFoundError the hub has no model 'other/model'")

    again = in_process(tmp_path / "home", "some/model", "other/model", HF_HUB_OFFLINE="1")
    path_again, offline = again.stdout.splitlines()
    assert path_again == path
    assert offline.startswith("UnavailableError other/model is not in the cache, and HF_HUB_OFFLINE forbids")

    unreachable = in_process(tmp_path / "empty", "some/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert "UnavailableError some/model" in unreachable.stdout


def test_a_broken_connection_goes_on_where_it_broke(hub: str, tmp_path: Path) -> None:
    """The client keeps whole pieces of 10 MiB."""
    weights = bytes(range(256)) * 50_000
    FakeHub.files["model.safetensors"] = weights
    FakeHub.break_after = 12_000_000
    result = in_process(tmp_path / "home", "some/model", HF_ENDPOINT=hub)
    assert (Path(result.stdout.strip()) / "model.safetensors").read_bytes() == weights
    assert FakeHub.ranges == [f"bytes={10 * 2**20}-"]


def test_what_an_interrupted_run_finished_is_not_fetched_again(hub: str, model: PersimmonModel, tmp_path: Path) -> None:
    in_process(tmp_path / "home", "some/model", HF_ENDPOINT=hub)
    (snapshot,) = (tmp_path / "home" / "hub" / "models--some--model" / "snapshots").iterdir()
    (snapshot / "tokenizer.json").resolve().unlink()
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "model.safetensors").resolve().unlink()
    (snapshot / "model.safetensors").unlink()
    FakeHub.fetched.clear()
    result = in_process(tmp_path / "home", "some/model", HF_ENDPOINT=hub)
    assert same_tensors(load_model(result.stdout.strip()), model)
    assert sorted(FakeHub.fetched) == ["model.safetensors", "tokenizer.json"]
