"""Headers of hub models: against a server on the loopback that honours ranges and counts what it sends."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from expertflow.hub_headers import fetch_hub_model
from expertflow.store.checkpoint import open_checkpoint
from tests.families import write_checkpoint

REPO, COMMIT = "someone/tiny", "1234567890123456789012345678901234567890"


class TinyHub(ThreadingHTTPServer):
    """One repository, served as the hub does: a file list, and files by range. Records what it sends."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.sent: list[tuple[str, int, int]] = []  # file, begin, end
        self.refusal: dict[str, str] | None = None  # headers of a 403 for files
        self.honours_ranges = True
        self.listed: dict[str, int] = {path.name: path.stat().st_size for path in folder.iterdir()}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: TinyHub

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            return self._list()
        found = re.fullmatch(rf"/{REPO}/resolve/{COMMIT}/(.+)", self.path)
        if found is None or not (self.server.folder / found[1]).is_file():
            return self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
        if self.server.refusal is not None:
            return self._answer(403, headers=self.server.refusal)
        content = (self.server.folder / found[1]).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not self.server.honours_ranges:
            self.server.sent.append((found[1], 0, len(content)))
            return self._answer(200, content)
        begin, end = int(asked[1]), int(asked[2]) + 1
        self.server.sent.append((found[1], begin, end))
        return self._answer(
            206, content[begin:end], {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
        )

    def _list(self) -> None:
        revision = re.fullmatch(rf"/api/models/{REPO}(?:/revision/([^?]+))?(?:\?.*)?", self.path)
        if revision is None:
            return self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        if revision[1] not in (None, "main", COMMIT):
            return self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name, "size": size} for name, size in self.server.listed.items()]
        body = json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}).encode()
        return self._answer(200, body, {"Content-Type": "application/json"})


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A hub client that talks to the loopback without proxies, token, or offline switch."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty-cache"))
    close_session()
    yield
    close_session()


def serve(folder: Path) -> TinyHub:
    hub = TinyHub(folder)
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return hub


@pytest.fixture
def hub(tmp_path: Path, online: None) -> Iterator[TinyHub]:
    server = serve(write_checkpoint("qwen2_moe", tmp_path / "tiny", shards=3))
    yield server
    server.shutdown()
    server.server_close()


def test_same_spans_as_the_downloaded_folder(hub: TinyHub) -> None:
    remote = fetch_hub_model(REPO, endpoint=hub.url)
    local = open_checkpoint(hub.folder)
    assert remote.commit == COMMIT
    assert remote.config["model_type"] == "qwen2_moe"
    assert {
        key: (span.path.name, span.offset, span.nbytes, span.dtype, span.shape)
        for key, span in local.spans.items()
    } == {
        key: (span.path.name, span.offset, span.nbytes, span.dtype, span.shape)
        for key, span in remote.checkpoint.spans.items()
    }
    assert remote.checkpoint.fingerprint == local.fingerprint


def test_no_byte_of_a_tensor_is_sent(hub: TinyHub) -> None:
    remote = fetch_hub_model(REPO, endpoint=hub.url)
    first_tensor: dict[str, int] = {}
    for span in remote.checkpoint.spans.values():
        first_tensor[span.path.name] = min(span.offset, first_tensor.get(span.path.name, span.offset))
    weights = [(name, begin, end) for name, begin, end in hub.sent if name.endswith(".safetensors")]
    assert len(first_tensor) == 3
    assert {name for name, _, _ in weights} == set(first_tensor)
    for name, _, end in weights:
        assert end <= first_tensor[name], f"{name}: {end - first_tensor[name]} bytes of tensors were sent"
    assert sum(end - begin for _, begin, end in hub.sent) == remote.fetched_bytes
    others = sum(
        (hub.folder / name).stat().st_size for name in ("config.json", "model.safetensors.index.json")
    )
    assert remote.fetched_bytes == others + sum(first_tensor.values())


def test_single_file(tmp_path: Path, online: None) -> None:
    server = serve(write_checkpoint("qwen2_moe", tmp_path / "single"))
    try:
        assert fetch_hub_model(REPO, "main", endpoint=server.url).checkpoint.files == (
            Path(REPO) / "model.safetensors",
        )
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_are_indexed_without_a_byte_of_a_tensor(tmp_path: Path, online: None, shards: int) -> None:
    server = serve(write_checkpoint("switch", tmp_path / "tiny", shards=shards))
    try:
        remote = fetch_hub_model(REPO, endpoint=server.url)
    finally:
        server.shutdown()
        server.server_close()
    local = open_checkpoint(server.folder)
    assert remote.checkpoint.format == local.format == "bin"
    assert remote.checkpoint.spans == {
        key: replace(span, path=Path(REPO) / span.path.name) for key, span in local.spans.items()
    }
    assert remote.checkpoint.fingerprint == local.fingerprint
    assert len(remote.checkpoint.files) == shards
    for span in local.spans.values():
        for name, begin, end in server.sent:
            assert name != span.path.name or end <= span.offset or begin >= span.offset + span.nbytes
    assert sum(end - begin for _, begin, end in server.sent) == remote.fetched_bytes


def test_safetensors_come_before_bin(hub: TinyHub) -> None:
    """As transformers chooses, also where the .bin is one file and safetensors are sharded."""
    hub.listed["pytorch_model.bin"] = 1000
    assert fetch_hub_model(REPO, endpoint=hub.url).checkpoint.format == "safetensors"


def test_server_without_ranges_is_hung_up_on(hub: TinyHub) -> None:
    hub.honours_ranges = False
    with pytest.raises(
        ConnectionError, match=r"answers 200 .* cannot send parts of files; download the model"
    ):
        fetch_hub_model(REPO, endpoint=hub.url)


def test_gated(hub: TinyHub) -> None:
    hub.refusal = {"X-Error-Code": "GatedRepo"}
    with pytest.raises(ValueError, match=r"someone/tiny is gated: accept its terms .* `hf auth login`"):
        fetch_hub_model(REPO, endpoint=hub.url)


def test_offline(hub: TinyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"not in the local cache and HF_HUB_OFFLINE is set; unset it"):
        fetch_hub_model(REPO, endpoint=hub.url)
    assert not hub.sent


def test_nobody_listens(hub: TinyHub) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ConnectionError, match=r"cannot ask the hub for someone/tiny .* give the folder"):
        fetch_hub_model(REPO, endpoint=hub.url)


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("someone/other", None, "neither a folder nor a model on the hub that you can see"),
        (REPO, "v9", "has no revision 'v9'"),
    ],
)
def test_absent(hub: TinyHub, repo: str, revision: str | None, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        fetch_hub_model(repo, revision, endpoint=hub.url)


def test_no_repository_name(online: None) -> None:
    with pytest.raises(ValueError, match="neither a folder nor the id of a hub model"):
        fetch_hub_model("a model of mine!")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"config.json"}, "holds no weights"),
        ({"config.json", "model-q4.gguf"}, "GGUF weights, which are not supported"),
        ({"config.json", "pytorch_model-00001-of-00003.bin"}, "holds no weights"),
        ({"model.safetensors"}, "has no config.json"),
        ({"config.json", "model.safetensors.index.json"}, "3 shards, of which 3 are not in the repository"),
    ],
)
def test_repository_without_usable_weights(hub: TinyHub, names: set[str], message: str) -> None:
    hub.listed = {name: hub.listed.get(name, 1000) for name in names}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fetch_hub_model(REPO, endpoint=hub.url)


def test_truncated_upload(hub: TinyHub) -> None:
    hub.listed["model-00002-of-00003.safetensors"] = 100
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors: claims a header of \d+ bytes"):
        fetch_hub_model(REPO, endpoint=hub.url)


@pytest.mark.parametrize("shard", ["../secret", "/etc/passwd", ""])
def test_shard_outside_the_repository(hub: TinyHub, shard: str) -> None:
    index = hub.folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = shard
    index.write_text(json.dumps(content))
    hub.listed[index.name] = index.stat().st_size
    with pytest.raises(ValueError, match="leaves the folder; refused"):
        fetch_hub_model(REPO, endpoint=hub.url)


def test_index_of_another_upload(hub: TinyHub) -> None:
    index = hub.folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["absent.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    hub.listed[index.name] = index.stat().st_size
    with pytest.raises(
        ValueError, match=r"'absent.weight' is in model-00001-of-00003.safetensors, but it is not"
    ):
        fetch_hub_model(REPO, endpoint=hub.url)
