"""Images of .bin files: indexed as the file itself would be, refused as the file itself would be, without a tensor."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expertflow.store.bin_image import _local_header, write_bin_image
from expertflow.store.legacy_bin import read_bin_index
from expertflow.store.safetensors_header import TensorSpan
from tests.store.test_legacy_bin import rewrite_zip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "pytorch_model.bin"
    table = torch.randn(60, 40)
    torch.save({"embed": table, "head": table, "rows": table[2:5], "small": torch.randn(3)}, path)
    return path


def index(path: Path, read: Callable[[int, int], bytes] | None = None) -> dict[str, TensorSpan]:
    """Through an image; the name in spans and errors is the file's."""
    content = path.read_bytes()
    image = path.with_name("image")
    write_bin_image(image, read or (lambda begin, end: content[begin:end]), len(content), path)
    return read_bin_index(path, image)


def as_before_torch_2_7(path: Path) -> None:
    """The same records by torch's own writer, without the ones that say how it pads."""
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in records.items():
        if name not in (".format_version", ".storage_alignment", "version", ".data/serialization_id"):
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()


@pytest.mark.parametrize("old", [False, True])
def test_an_image_has_the_files_index_and_no_tensor(path: Path, old: bool) -> None:
    if old:
        as_before_torch_2_7(path)
    expected, content = read_bin_index(path), path.read_bytes()
    asked: list[tuple[int, int]] = []

    def read(begin: int, end: int) -> bytes:
        asked.append((begin, end))
        return content[begin:end]

    assert index(path, read) == expected
    for span in expected.values():
        assert all(end <= span.offset or begin >= span.offset + span.nbytes for begin, end in asked)
    assert sum(end - begin for begin, end in asked) < len(content) - 60 * 40 * 4


def test_where_a_tensor_begins_is_not_guessed(path: Path) -> None:
    """Another tool's archive has neither torch's padding nor its descriptors: its tensors lie elsewhere."""
    rewrite_zip(path, without="/.format_version")
    assert read_bin_index(path)
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin was not written by torch\.save.* download the model"
    ):
        index(path)


@pytest.mark.parametrize("descriptor_bytes", [16, 24])
def test_records_before_and_beyond_4_gib(descriptor_bytes: int) -> None:
    begin = (5 << 30) + 8
    record = zipfile.ZipInfo("archive/data/7")
    record.header_offset, record.file_size = begin, 1000
    data = -(-(begin + 30 + len("archive/data/7") + 4) // 64) * 64
    header = _local_header(record, data + 1000 + descriptor_bytes, Path("x.bin"))
    assert len(header) == 30
    assert header[:4] == b"PK\x03\x04"
    name_bytes, extra_bytes = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    assert begin + 30 + name_bytes + extra_bytes == data
    with pytest.raises(ValueError, match="data/7 begins is only known with the whole file"):
        _local_header(record, data + 1000, Path("x.bin"))


def test_what_is_damaged_is_refused_like_the_file(path: Path) -> None:
    whole = path.read_bytes()
    for content, message in [
        (whole[:5000], r"pytorch_model\.bin: is a truncated or damaged zip archive"),
        (b"PK\x03\x04", r"pytorch_model\.bin: is a truncated or damaged zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"pytorch_model\.bin.*(?i:lfs)"),
        (b"\x80\x02 a pickle of old", r"pytorch_model\.bin is not a zip archive"),
        (b"", r"pytorch_model\.bin is not a zip archive"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            index(path)


def test_what_is_no_zip_archive_is_not_searched_for_one(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + bytes(9000))
    asked: list[tuple[int, int]] = []

    def read(begin: int, end: int) -> bytes:
        asked.append((begin, end))
        return path.read_bytes()[begin:end]

    with pytest.raises(ValueError, match="is not a zip archive"):
        index(path, read)
    assert len(asked) == 1


def test_an_index_without_end_is_not_fetched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertflow.store.bin_image.MAX_HEADER_BYTES", 400)
    with pytest.raises(ValueError, match=r"has an index of \d+ bytes, limit 400"):
        index(path)


def test_a_lost_connection_is_no_damaged_file(path: Path) -> None:
    """zipfile takes every OSError while it looks for the directory for "not a zip file"."""
    content = path.read_bytes()

    def read(begin: int, end: int) -> bytes:
        if begin > 0:
            raise ConnectionError("lost")
        return content[begin:end]

    with pytest.raises(ConnectionError, match="lost"):
        index(path, read)
