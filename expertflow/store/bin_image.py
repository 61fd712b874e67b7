"""An image of a `.bin` file that is elsewhere: everything but the tensors, at the places where it really is.

torch.load and our own checks want a file to seek in. The image is one, as large as the original but sparse:
the zip's directory and its small records are fetched, the data of tensors is a hole. legacy_bin.py then indexes
the image as it would the file. Notable: a tensor's local header, which says where its data begins, is not fetched
(Switch has thousands) but derived from the directory, and checked against torch's alignment.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from expertflow.store.safetensors_header import LFS_POINTER, MAX_HEADER_BYTES, damaged

ReadRange = Callable[[int, int], bytes]  # bytes begin to end, exclusive

_LOCAL_HEADER_BYTES = 30
_DESCRIPTOR_BYTES = (16, 24)  # the longer one in files beyond 4 GiB
_ALIGNMENT = 64


def write_bin_image(image: Path, read_range: ReadRange, file_bytes: int, path: Path) -> None:
    """Write the image of a file of `file_bytes`; `path` names it in errors, which are ValueErrors.

    What is no zip archive, or a damaged one, becomes an image that legacy_bin.py refuses as it would the file.
    """
    with image.open("wb") as file:
        file.truncate(file_bytes)
        first = read_range(0, min(len(LFS_POINTER), file_bytes))
        file.write(first)
        if first[:4] != b"PK\x03\x04":
            return
        directory = _Fetched(file, read_range, file_bytes, path)
        try:
            with zipfile.ZipFile(directory) as archive:
                records = sorted(archive.infolist(), key=lambda record: record.header_offset)
                ends = [*(record.header_offset for record in records[1:]), archive.start_dir]
        except (zipfile.BadZipFile, NotImplementedError, EOFError, UnicodeDecodeError) as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None  # zipfile takes a lost connection for a damaged file
            return
        for record, end in zip(records, ends, strict=True):
            begin = record.header_offset
            if Path(record.filename).parent.name == "data":
                file.seek(begin)
                file.write(_local_header(record, end, path))
            else:
                directory.fetch(begin, end)


def _local_header(record: zipfile.ZipInfo, end: int, path: Path) -> bytes:
    """Of a tensor's record that ends, its data descriptor included, where the next one begins."""
    name_bytes = len(record.orig_filename.encode())
    least = record.header_offset + _LOCAL_HEADER_BYTES + name_bytes
    for descriptor_bytes in _DESCRIPTOR_BYTES:
        data = end - descriptor_bytes - record.file_size
        if data >= least and data % _ALIGNMENT == 0:
            lengths = name_bytes.to_bytes(2, "little") + (data - least).to_bytes(2, "little")
            return b"PK\x03\x04".ljust(_LOCAL_HEADER_BYTES - len(lengths), b"\0") + lengths
    raise ValueError(
        f"{path} was not written by torch.save, or rewritten, so where {record.filename} begins is only known with "
        f"the whole file; download the model, then plan its folder"
    )


class _Fetched(io.RawIOBase):
    """The original, to be read from: fetches exactly what is read, and writes it into the image."""

    def __init__(self, file: BinaryIO, read_range: ReadRange, file_bytes: int, path: Path):
        self._file, self._read_range, self._file_bytes, self._path = file, read_range, file_bytes, path
        self._position = 0

    def fetch(self, begin: int, end: int) -> bytes:
        if not 0 <= end - begin <= MAX_HEADER_BYTES:
            raise damaged(self._path, f"has an index of {end - begin} bytes, limit {MAX_HEADER_BYTES}")
        content = self._read_range(begin, end)
        self._file.seek(begin)
        self._file.write(content)
        return content

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file_bytes}[whence]
        if start + offset < 0:
            raise OSError("before the beginning")  # as a file has it; zipfile expects it of short ones
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._file_bytes if size < 0 else min(self._position + size, self._file_bytes)
        content = self.fetch(self._position, max(self._position, end))
        self._position += len(content)
        return content
