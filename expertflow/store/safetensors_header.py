"""Safetensors headers: bytes of a file's beginning -> the span of every tensor in it.

Pure but for one function that reads the header from disk, so headers fetched by range requests serve too.
The parser trusts nothing: any bytes give spans that lie inside the file, or a ValueError.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

# safetensors itself refuses longer headers. DeepSeek-V3 needs 0.1 MB per shard.
MAX_HEADER_BYTES = 100_000_000

LFS_POINTER = b"version https://git-lfs"

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """Where one tensor's bytes lie: row-major, contiguous, in the machine's byte order."""

    key: str
    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def damaged(where: object, what: str) -> ValueError:
    return ValueError(f"{where}: {what}; download it again")


def lfs_error(path: Path) -> ValueError:
    return ValueError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull`, or download it")


def safetensors_header_bytes(first: bytes, file_bytes: int, path: Path) -> int:
    """Length of a file's header, length prefix included, from the first 8 bytes of the file."""
    if file_bytes < 8 or len(first) < 8:
        raise damaged(path, f"{file_bytes} bytes are too few for a safetensors header of 8 or more")
    length = int.from_bytes(first[:8], "little")
    if first[:8] == LFS_POINTER[:8]:
        raise lfs_error(path)
    if length > MAX_HEADER_BYTES or 8 + length > file_bytes:
        limit = min(MAX_HEADER_BYTES, file_bytes - 8)
        raise damaged(
            path,
            f"claims a header of {length} bytes, limit {limit} (the file has {file_bytes}), "
            "so it is truncated or no safetensors file",
        )
    return 8 + length


def parse_safetensors_header(header: bytes, file_bytes: int, path: Path) -> dict[str, TensorSpan]:
    """Spans of all tensors of one file. Pure: `path` is only a name.

    header: the file's first bytes, length prefix included, at least `safetensors_header_bytes` of them.
    file_bytes: size of the whole file. ValueError for anything that safetensors would not write.
    """
    end = safetensors_header_bytes(header, file_bytes, path)
    if len(header) < end:
        raise damaged(path, f"got {len(header)} of {end} header bytes")
    content = load_json(header[8:end], path, "its header")
    if not isinstance(content, dict):
        raise damaged(path, "its header is not a JSON object")
    spans = {
        key: _span(key, entry, end, file_bytes, path)
        for key, entry in content.items()
        if key != "__metadata__"
    }
    by_offset = sorted((span for span in spans.values() if span.nbytes), key=lambda span: span.offset)
    for before, after in itertools.pairwise(by_offset):
        if after.offset < before.offset + before.nbytes:
            raise damaged(
                path,
                f"tensor {short(after.key)} starts at byte {after.offset}, inside {short(before.key)}, "
                f"which ends at {before.offset + before.nbytes}",
            )
    if (idle := file_bytes - end - sum(span.nbytes for span in by_offset)) > 0:
        raise damaged(path, f"has {idle} bytes that belong to no tensor, which safetensors never writes")
    return spans


def _span(key: str, entry: Any, data_begin: int, file_bytes: int, path: Path) -> TensorSpan:
    where = f"{path}: tensor {short(key)}"
    if not isinstance(entry, dict):
        raise damaged(where, "has no dtype, shape and data_offsets")
    name, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(name, str) or name not in SAFETENSORS_DTYPES:
        raise ValueError(
            f"{where}: dtype {short(name)} is not supported, give a checkpoint in one of "
            f"{', '.join(SAFETENSORS_DTYPES)}"
        )
    dtype = SAFETENSORS_DTYPES[name]
    if not _is_sizes(shape):
        raise damaged(where, f"shape {short(shape)} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(where, f"data_offsets {short(offsets)} are not [begin, end]")
    begin, end = offsets
    if data_begin + end > file_bytes:
        raise damaged(
            where, f"ends at byte {data_begin + end}, but the file has {file_bytes}: it is truncated"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        raise damaged(
            where,
            f"{name} {short(shape)} needs {short(nbytes)} bytes, but its data_offsets hold {end - begin}",
        )
    return TensorSpan(key, path, data_begin + begin, nbytes, dtype, tuple(shape))


def _is_sizes(values: Any) -> TypeGuard[list[int]]:
    # bool is an int to isinstance. 64 dimensions are more than torch can address, and bound the product.
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def load_json(raw: bytes, path: Path, what: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise damaged(path, f"{what} is not valid JSON ({short(str(error))})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return content


def read_safetensors_header(path: Path) -> dict[str, TensorSpan]:
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        first = file.read(8)
        header = first + file.read(safetensors_header_bytes(first, file_bytes, path) - 8)
    return parse_safetensors_header(header, file_bytes, path)
