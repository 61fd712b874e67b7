"""Legacy `.bin` files: the zip archives torch.save writes, indexed in place.

Tensor data is not read and nothing arbitrary is unpickled.
Notable: torch.load under FakeTensorMode reads the archive's pickled index with the weights-only
unpickler and leaves each storage's file offset behind instead of its data.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from expertflow.store.safetensors_header import (
    LFS_POINTER,
    MAX_HEADER_BYTES,
    TensorSpan,
    damaged,
    lfs_error,
    short,
)

_CONVERT = (
    "on a machine where you trust the file, load it with transformers and write safetensors with "
    "model.save_pretrained(folder), then give that folder"
)


def read_bin_index(path: Path, image: Path | None = None) -> dict[str, TensorSpan]:
    """Spans of all tensors of one file; tied tensors share theirs. ValueError for what cannot be read.

    image: what to read in place of `path`, whose name stays in spans and errors (bin_image.py).
    """
    record_bytes = _zip_records(path, image or path)
    state_dict = _load_without_data(path, image or path)
    if not isinstance(state_dict, Mapping):
        raise _refused(path, f"holds a {type(state_dict).__name__}, not a dictionary of tensors")
    spans = {
        str(key): _storage_span(str(key), tensor, record_bytes, path)
        for key, tensor in state_dict.items()
        if isinstance(tensor, torch.Tensor)
    }
    if not spans:
        raise _refused(path, "holds no tensors at its top level")
    return spans


def _refused(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}; refused: {_CONVERT}")


def _load_without_data(path: Path, image: Path) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import, only .bin needs it

    try:
        with FakeTensorMode():
            return torch.load(image, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # whatever a damaged or hostile pickle provokes inside torch
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise _refused(
            path,
            "needs more than torch's weights-only unpickler, which could run code, or is damaged "
            f"({type(error).__name__}: {short(first_line)})",
        ) from error


def _zip_records(path: Path, image: Path) -> dict[int, int]:
    """File offset of each record's bytes -> its size. ValueError unless all are stored as they are."""
    with image.open("rb") as file:
        first = file.read(len(LFS_POINTER))
        if first == LFS_POINTER:
            raise lfs_error(path)
        if first[:4] != b"PK\x03\x04":
            raise _refused(path, "is not a zip archive (written before torch 1.6?)")
        try:
            with zipfile.ZipFile(file) as archive:
                return _stored_records(archive, file, path)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, UnicodeDecodeError) as error:
            raise damaged(path, f"is a truncated or damaged zip archive ({error})") from error


def _stored_records(archive: zipfile.ZipFile, file: BinaryIO, path: Path) -> dict[int, int]:
    record_bytes: dict[int, int] = {}
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED:
            raise _refused(path, f"compresses {record.filename}, which cannot be read in place")
        if record.filename.endswith("/data.pkl") and record.file_size > MAX_HEADER_BYTES:
            raise _refused(path, f"has an index of {record.file_size} bytes, limit {MAX_HEADER_BYTES}")
        # Before torch sees the file: swapping the bytes of a storage without data crashes the interpreter (2.13).
        if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
            raise _refused(path, "was written on a big-endian machine")
        # The local header repeats name and extra field, and torch pads the latter to align the data.
        file.seek(record.header_offset)
        local = file.read(30)
        if len(local) < 30:
            raise damaged(path, f"{record.filename} lies outside the file")
        name_bytes = int.from_bytes(local[26:28], "little")
        extra_bytes = int.from_bytes(local[28:30], "little")
        record_bytes[record.header_offset + 30 + name_bytes + extra_bytes] = record.file_size
    return record_bytes


def _storage_span(key: str, tensor: torch.Tensor, record_bytes: Mapping[int, int], path: Path) -> TensorSpan:
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.is_contiguous():
        raise _refused(path, f"stores tensor {short(key)} otherwise than row by row")
    nbytes = tensor.numel() * tensor.dtype.itemsize
    if nbytes == 0:
        return TensorSpan(key, path, 0, 0, tensor.dtype, tuple(tensor.shape))
    storage_offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    begin = int(tensor.storage_offset()) * tensor.dtype.itemsize
    # From format version 1 on torch computes the offset from how its own writer pads. A file that another
    # tool rewrote disproves that, and without this check other bytes would pass for weights.
    if not isinstance(storage_offset, int) or storage_offset not in record_bytes:
        raise _refused(path, f"keeps tensor {short(key)} elsewhere than torch.save does")
    available = record_bytes[storage_offset]
    if begin + nbytes > available:
        raise damaged(
            path, f"tensor {short(key)} needs bytes {begin} to {begin + nbytes} of a record of {available}"
        )
    return TensorSpan(key, path, storage_offset + begin, nbytes, tensor.dtype, tuple(tensor.shape))
