"""Checkpoint: where every tensor's bytes lie in the untouched files of a model folder.

Chooses files and joins their indexes; tensor data is never read, nothing is written. What a single
file's index looks like is the business of safetensors_header.py and legacy_bin.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from expertflow.store.legacy_bin import read_bin_index
from expertflow.store.safetensors_header import (
    MAX_HEADER_BYTES,
    TensorSpan,
    damaged,
    load_json,
    parse_safetensors_header,
    read_safetensors_header,
    safetensors_header_bytes,
)

__all__ = [
    "Checkpoint",
    "FileIdentity",
    "TensorSpan",
    "changed_error",
    "open_checkpoint",
    "parse_safetensors_header",
    "safetensors_header_bytes",
]


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What must stay the same for spans to stay true."""

    nbytes: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    spans: Mapping[str, TensorSpan]
    files: tuple[Path, ...]
    format: str  # "safetensors" or "bin"
    identities: Mapping[Path, FileIdentity] = field(repr=False)

    def verify_unchanged(self) -> None:
        """ValueError naming the first file that was replaced, edited or removed since it was opened."""
        for path in self.files:
            try:
                now = FileIdentity.of(path.stat())
            except FileNotFoundError:
                raise changed_error(path, self.identities[path], None) from None
            if now != self.identities[path]:
                raise changed_error(path, self.identities[path], now)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of file names, sizes and tensor positions. Says nothing about the data."""
        sizes = [(path.name, self.identities[path].nbytes) for path in self.files]
        tensors = [
            (key, span.path.name, span.offset, str(span.dtype), span.shape)
            for key, span in sorted(self.spans.items())
        ]
        return hashlib.sha256(json.dumps([sizes, tensors]).encode()).hexdigest()[:16]


def changed_error(path: Path, before: FileIdentity, now: FileIdentity | None) -> ValueError:
    if now is None:
        what = "is gone"
    elif now.nbytes != before.nbytes:
        what = f"had {before.nbytes} bytes and now has {now.nbytes}"
    else:
        what = f"was written or replaced (modified at {before.mtime_ns} ns, now {now.mtime_ns} ns)"
    return ValueError(
        f"{path} changed while it was open: it {what}; "
        "leave a model folder alone while it is in use, then open it again"
    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Index a model folder as transformers would choose its files. Reads headers only.

    ValueError or FileNotFoundError for anything missing, damaged or refused, with the remedy.
    """
    folder = Path(folder)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{folder} is a file; give the folder that holds the checkpoint")
        raise FileNotFoundError(f"{folder} does not exist; give a folder that holds a checkpoint")
    if (folder / "model.safetensors").exists():
        return _open_files(folder, [folder / "model.safetensors"], {}, "safetensors")
    if (folder / "model.safetensors.index.json").exists():
        return _open_sharded(folder, folder / "model.safetensors.index.json", "safetensors")
    if (folder / "pytorch_model.bin").exists():
        return _open_files(folder, [folder / "pytorch_model.bin"], {}, "bin")
    if (folder / "pytorch_model.bin.index.json").exists():
        return _open_sharded(folder, folder / "pytorch_model.bin.index.json", "bin")
    raise _no_weights_error(folder)


def _no_weights_error(folder: Path) -> Exception:
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if name.endswith((".safetensors", ".bin")) and "-of-" in name:
            index = f"{name.split('-', 1)[0]}{Path(name).suffix}.index.json"
            return FileNotFoundError(f"{folder} holds the shard {name} but not {index}; download that too")
    if any(name.endswith(".gguf") for name in names):
        return ValueError(
            f"{folder} holds only GGUF weights, which are not supported; "
            "give the original safetensors checkpoint the GGUF file was made from"
        )
    return FileNotFoundError(
        f"{folder} holds no weights: none of model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin, pytorch_model.bin.index.json; download the weights into it"
    )


def _open_sharded(folder: Path, index: Path, format: str) -> Checkpoint:
    weight_map = _read_index(index)
    paths = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(paths)} shards, of which {len(missing)} are missing in {folder}, "
            f"first {missing[0]}; download the missing shards"
        )
    return _open_files(folder, paths, weight_map, format, index)


def _read_index(index: Path) -> dict[str, str]:
    """The weight map of an index file: tensor key -> shard name, names checked to stay in the folder."""
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise damaged(index, f"has {index.stat().st_size} bytes, limit {MAX_HEADER_BYTES}")
    content = load_json(index.read_bytes(), index, "the index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, "has no weight_map of tensor names to shard names")
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise damaged(index, f"the shard of {key!r} is {name!r}, not a name")
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or Path(name).is_absolute():
            raise ValueError(
                f"{index}: the shard of {key!r} is {name!r}, which leaves the folder; refused, "
                "get the checkpoint from a source you trust"
            )
    return weight_map


def _open_files(
    folder: Path, paths: Iterable[Path], weight_map: Mapping[str, str], format: str, index: Path | None = None
) -> Checkpoint:
    spans: dict[str, TensorSpan] = {}
    identities: dict[Path, FileIdentity] = {}
    for path in paths:
        if not stat.S_ISREG(path.stat().st_mode):
            raise damaged(path, "is not a regular file")
        identities[path] = FileIdentity.of(path.stat())
        found = read_safetensors_header(path) if format == "safetensors" else read_bin_index(path)
        for key, span in found.items():
            if key in spans:
                raise ValueError(
                    f"{path} holds the tensor {key!r} that {spans[key].path} holds as well; "
                    "remove the shards that do not belong, or download the checkpoint again"
                )
            spans[key] = span
    for key, name in weight_map.items():
        if key not in spans or spans[key].path.name != name:
            raise ValueError(
                f"{index} says that {key!r} is in {folder / name}, but it is not; "
                "the index and the shards are of different downloads: download the checkpoint again"
            )
    checkpoint = Checkpoint(folder, spans, tuple(identities), format, identities)
    checkpoint.verify_unchanged()  # a download may still be writing into the folder
    return checkpoint
