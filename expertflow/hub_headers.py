"""Headers of a model on the Hugging Face hub, by range requests: what it is made of, before any download.

One call of the hub's API lists the files, their sizes and the commit; then come config.json, the index,
and of each safetensors file 8 bytes and its header, of each .bin its zip directory and pickled index. No byte
of a tensor is asked for, and a server that
would send whole files is hung up on. The spans are those that open_checkpoint would find after a download.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from expertflow.store.bin_image import write_bin_image
from expertflow.store.checkpoint import Checkpoint, FileIdentity, TensorSpan
from expertflow.store.legacy_bin import read_bin_index
from expertflow.store.safetensors_header import (
    MAX_HEADER_BYTES,
    damaged,
    load_json,
    parse_safetensors_header,
    safetensors_header_bytes,
)

try:
    import httpx2 as http_client  # huggingface_hub 1.20 and newer
except ImportError:
    import httpx as http_client  # type: ignore[no-redef]

# Two round trips per shard; DeepSeek-V3 has 163 shards.
_PARALLEL_REQUESTS = 8
_CONFIG_LIMIT_BYTES = 16 << 20
_WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks


@dataclass(frozen=True)
class HubModel:
    """A model of the hub, as far as its headers tell. The paths in `checkpoint` are names, not files."""

    repo: str
    commit: str
    config: Mapping[str, Any]
    checkpoint: Checkpoint = field(repr=False)
    fetched_bytes: int  # bodies of all answers, the file list excepted


def cached_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of an earlier download, or None; it may lack shards. Asks nobody."""
    with _clear_errors(repo, revision):
        found = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def fetch_hub_model(
    repo: str, revision: str | None = None, *, endpoint: str | None = None, token: str | bool | None = None
) -> HubModel:
    """Read the headers of `repo` ("owner/name") at a revision (branch, tag or commit; None: main).

    ConnectionError when the hub cannot be reached or is switched off, FileNotFoundError when the model,
    the revision or its config.json does not exist, ValueError for gated models, weights in other formats
    and damaged headers.
    """
    with _clear_errors(repo, revision):
        api = HfApi(endpoint=endpoint, token=token)
        info = api.model_info(repo, revision=revision, files_metadata=True)
        commit = info.sha or revision or "main"
        sizes = {entry.rfilename: entry.size for entry in info.siblings or []}
        remote = _RemoteFolder(repo, commit, sizes, endpoint, token)
        if "config.json" not in sizes:
            raise FileNotFoundError(
                f"{repo} at {commit} has no config.json, so it is no transformers checkpoint; "
                f"give the repository of the original safetensors weights"
            )
        config = load_json(
            remote.read_whole("config.json", _CONFIG_LIMIT_BYTES), remote.path("config.json"), "it"
        )
        if not isinstance(config, dict):
            raise damaged(remote.path("config.json"), "is not a JSON object")
        checkpoint = remote.index()
    return HubModel(repo, commit, config, checkpoint, remote.fetched_bytes)


class _RemoteFolder:
    """The files of one commit, read by range. Counts the bytes of all bodies."""

    def __init__(
        self,
        repo: str,
        commit: str,
        sizes: Mapping[str, int | None],
        endpoint: str | None,
        token: str | bool | None,
    ):
        self.folder = Path(repo)
        self.fetched_bytes = 0
        self._commit = commit
        self._sizes = sizes
        self._endpoint = endpoint
        self._headers = build_hf_headers(token=token)
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        return self.folder / name

    def index(self) -> Checkpoint:
        """Spans of all tensors, from the files that transformers would choose."""
        weight_map: dict[str, str] = {}
        for whole in _WHOLE_FILES:
            if whole in self._sizes:
                names = [whole]
                break
            if f"{whole}.index.json" in self._sizes:
                weight_map = self._weight_map(f"{whole}.index.json")
                names = sorted(set(weight_map.values()))
                break
        else:
            raise self._no_weights_error()
        missing = [name for name in names if name not in self._sizes]
        if missing:
            raise FileNotFoundError(
                f"{self.folder}: the index names {len(names)} shards, of which {len(missing)} are not in the "
                f"repository, first {missing[0]}; choose another revision"
            )
        if whole == "model.safetensors":
            with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
                headers = list(pool.map(self._spans_of, names))
        else:
            headers = list(map(self._bin_spans_of, names))
        spans: dict[str, TensorSpan] = {}
        for found in headers:
            for key, span in found.items():
                if key in spans:
                    raise damaged(span.path, f"holds the tensor {key!r} that {spans[key].path} holds as well")
                spans[key] = span
        for key, name in weight_map.items():
            if key not in spans or spans[key].path.name != name:
                raise damaged(self.folder, f"the index says that {key!r} is in {name}, but it is not")
        files = tuple(self.path(name) for name in names)
        identities = {self.path(name): FileIdentity(self._size(name), 0, 0, 0) for name in names}
        return Checkpoint(self.folder, spans, files, whole.rpartition(".")[2], identities)

    def read_whole(self, name: str, limit: int) -> bytes:
        """A small file that holds no weights."""
        if self._size(name) > limit:
            raise damaged(self.path(name), f"has {self._size(name)} bytes, limit {limit}")
        return self._read_range(name, 0, self._size(name))

    def _spans_of(self, name: str) -> dict[str, TensorSpan]:
        path, file_bytes = self.path(name), self._size(name)
        first = self._read_range(name, 0, min(8, file_bytes))
        end = safetensors_header_bytes(first, file_bytes, path)
        return parse_safetensors_header(first + self._read_range(name, 8, end), file_bytes, path)

    def _bin_spans_of(self, name: str) -> dict[str, TensorSpan]:
        path, file_bytes = self.path(name), self._size(name)
        with tempfile.TemporaryDirectory(prefix="expertflow-") as temporary:
            image = Path(temporary) / "image"
            write_bin_image(image, partial(self._read_range, name), file_bytes, path)
            return read_bin_index(path, image)

    def _weight_map(self, name: str) -> dict[str, str]:
        content = load_json(self.read_whole(name, MAX_HEADER_BYTES), self.path(name), "the index")
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise damaged(self.path(name), "has no weight_map of tensor names to shard names")
        for key, shard in weight_map.items():
            if not isinstance(shard, str) or not shard or Path(shard).name != shard or "\\" in shard:
                raise ValueError(
                    f"{self.path(name)}: the shard of {key!r} is {shard!r}, which leaves the folder; "
                    f"refused, get the checkpoint from a source you trust"
                )
        return weight_map

    def _size(self, name: str) -> int:
        size = self._sizes[name]
        if size is None:
            raise ValueError(f"{self.path(name)}: the hub does not say how large it is; download the model")
        return size

    def _read_range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes begin to end (exclusive). A server that ignores the range is refused before its body."""
        if begin >= end:
            return b""
        url = hf_hub_url(self.folder.as_posix(), name, revision=self._commit, endpoint=self._endpoint)
        headers = {**self._headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
            if answer.status_code >= 400:
                answer.read()
                hf_raise_for_status(answer)
            whole = begin == 0 and end == self._size(name)
            if answer.status_code != 206 and not (whole and answer.status_code == 200):
                raise ConnectionError(
                    f"{url} answers {answer.status_code} to a request for bytes {begin} to {end}: the server "
                    f"or a proxy cannot send parts of files; download the model, then plan its folder"
                )
            body = b""
            for piece in answer.iter_bytes():
                body += piece
                if len(body) > end - begin:
                    break
        with self._lock:
            self.fetched_bytes += len(body)
        if len(body) != end - begin:
            raise ConnectionError(
                f"{url} sent {len(body)} bytes for {end - begin} from {begin} on; try again"
            )
        return body

    def _no_weights_error(self) -> Exception:
        repo, names = self.folder.as_posix(), sorted(self._sizes)
        if any(name.endswith(".gguf") for name in names):
            return ValueError(
                f"{repo} holds GGUF weights, which are not supported; "
                f"give the repository of the original safetensors checkpoint"
            )
        return FileNotFoundError(
            f"{repo} holds no weights: neither {' nor '.join(_WHOLE_FILES)}, whole or with an index"
        )


@contextmanager
def _clear_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the hub client's errors into ours: value, reason, remedy."""
    at = f"{repo} at {revision}" if revision else repo
    folder = "give the folder of a downloaded model"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is neither a folder nor the id of a hub model ({error})") from None
    except OfflineModeIsEnabled:
        raise ConnectionError(
            f"{at} is not in the local cache and HF_HUB_OFFLINE is set; unset it, or {folder}"
        ) from None
    except GatedRepoError:
        raise ValueError(
            f"{at} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then `hf auth login` or set "
            f"HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(
            f"{repo} has no revision {revision!r}; look at its branches and tags"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{repo} is neither a folder nor a model on the hub that you can see; check the spelling, or "
            f"`hf auth login` if it is private"
        ) from None
    except (HfHubHTTPError, http_client.RequestError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConnectionError(
            f"cannot ask the hub for {at} ({reason}); try again online, or {folder}"
        ) from None
