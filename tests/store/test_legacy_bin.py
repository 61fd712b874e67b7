"""Legacy .bin files: what is indexed in place, and what is refused instead of unpickled."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import read_span

from expertflow.store.checkpoint import open_checkpoint

HINT = r"save_pretrained\(folder\)"


def rewrite_zip(
    path: Path, compression: int = zipfile.ZIP_STORED, without: str = "?", **replace: bytes
) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist() if not name.endswith(without)}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, replace.get(name.rsplit("/", 1)[-1].replace(".", "_"), content))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def test_tied_tensors_and_row_slices_share_a_storage(path):
    table = torch.randn(6, 4)
    torch.save({"embed": table, "head": table, "rows": table[2:5]}, path)
    spans = open_checkpoint(path.parent).spans
    assert spans["embed"].offset == spans["head"].offset
    assert spans["rows"].offset == spans["embed"].offset + 2 * 4 * 4
    assert torch.equal(read_span(spans["rows"]), table[2:5])


def test_ordered_dicts_parameters_and_non_tensors_are_ordinary(path):
    weight = torch.nn.Parameter(torch.randn(3))
    torch.save(collections.OrderedDict(weight=weight, version=1), path)
    spans = open_checkpoint(path.parent).spans
    assert list(spans) == ["weight"]
    assert torch.equal(read_span(spans["weight"]), weight.detach())


def test_zip_rewritten_by_another_tool(path):
    """Python's zipfile pads nothing, so tensors lie at any byte.

    torch, seeing a format version, takes the offsets its own writer would have produced: the span of the
    second tensor once pointed into the neighbour's header, and nothing failed.
    """
    weights = {str(i): torch.randn(5) for i in range(5)}
    torch.save(weights, path)
    rewrite_zip(path)
    with pytest.raises(
        ValueError, match=rf"keeps tensor '1' elsewhere than torch\.save does; refused: .*{HINT}"
    ):
        open_checkpoint(path.parent)
    rewrite_zip(
        path, without="/.format_version"
    )  # as files from before torch 2.7 are: found by their records
    spans = open_checkpoint(path.parent).spans
    assert any(span.offset % 4 for span in spans.values())
    for key, weight in weights.items():
        assert torch.equal(read_span(spans[key]), weight)


def test_columns_are_refused(path):
    torch.save({"a": torch.randn(4, 6).t()}, path)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin stores tensor 'a' otherwise.*{HINT}"):
        open_checkpoint(path.parent)


def test_sparse_tensors_are_refused(path):
    torch.save({"a": torch.eye(4).to_sparse()}, path)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin .*refused: .*{HINT}"):
        open_checkpoint(path.parent)


def test_archives_from_before_zip_are_refused(path):
    torch.save({"a": torch.randn(4)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=rf"is not a zip archive.*refused.*{HINT}"):
        open_checkpoint(path.parent)


class Touch:
    """A pickle that would create a file if anything executed it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_that_would_run_code_are_refused_and_not_run(path, tmp_path):
    torch.save({"a": torch.randn(4), "b": Touch(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=rf"weights-only unpickler.*refused: .*{HINT}"):
        open_checkpoint(path.parent)
    assert not (tmp_path / "ran").exists()


def test_truncated_archive(path):
    torch.save({"a": torch.randn(4000)}, path)
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: .*truncated.*download it again"):
        open_checkpoint(path.parent)


def test_compressed_archive(path):
    torch.save({"a": torch.zeros(4000)}, path)
    rewrite_zip(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=rf"compresses .*, which cannot be read in place; refused: .*{HINT}"):
        open_checkpoint(path.parent)


def test_big_endian_archive(path):
    torch.save({"a": torch.zeros(4)}, path)
    rewrite_zip(path, byteorder=b"big")
    with pytest.raises(ValueError, match="big-endian"):
        open_checkpoint(path.parent)


def test_tensor_larger_than_its_record(path):
    """A pickle that claims more than was stored would otherwise show the neighbour's bytes as weights."""
    torch.save({"a": torch.zeros(1000), "b": torch.ones(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data/0"))
        records = {n: archive.read(n) for n in archive.namelist()}
    records[name] = records[name][:400]
    with zipfile.ZipFile(path, "w") as archive:
        for n, content in records.items():
            archive.writestr(n, content)
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin.*tensor 'a' needs bytes 0 to 4000 of a record of 400"
    ):
        open_checkpoint(path.parent)


@pytest.mark.parametrize("content", [[torch.zeros(3)], {}, {"model": {"a": torch.zeros(3)}}])
def test_anything_but_a_flat_state_dict(path, content):
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin holds .*{HINT}"):
        open_checkpoint(path.parent)


def test_plain_pickle(path):
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="is not a zip archive"):
        open_checkpoint(path.parent)


def test_index_that_is_too_large(path, monkeypatch):
    monkeypatch.setattr("expertflow.store.legacy_bin.MAX_HEADER_BYTES", 10)
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"has an index of .* bytes, limit 10"):
        open_checkpoint(path.parent)
