"""open_checkpoint: round trips against the libraries that write the files, and every refusal."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from checkpoints import entry, expert_tensors, header_of, read_span, write_index, write_sharded
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from expertflow.store.checkpoint import open_checkpoint, parse_safetensors_header, safetensors_header_bytes
from expertflow.store.safetensors_header import SAFETENSORS_DTYPES

WRITABLE = [dtype for name, dtype in SAFETENSORS_DTYPES.items() if name != "F8_E8M0"]


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    draw = random.Random(seed)
    found = {}
    for i in range(draw.randint(1, 12)):
        shape = [draw.randint(0, 9) for _ in range(draw.randint(0, 3))]
        raw = torch.randint(0, 256, (*shape, 8), dtype=torch.uint8)
        dtype = draw.choice(WRITABLE)
        source = raw % 2 if dtype == torch.bool else raw
        found[f"layers.{i}"] = source[..., : dtype.itemsize].contiguous().view(dtype).view(shape)
    return found


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return a.reshape(-1).view(torch.uint8).tolist() == b.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_spans_are_where_the_library_wrote_the_tensors(tmp_path, seed, num_shards, suffix):
    shards = [
        {f"{i}.{key}": value for key, value in random_tensors(100 * i + seed).items()}
        for i in range(num_shards)
    ]
    if num_shards > 1:
        write_sharded(tmp_path, shards, suffix)
    elif suffix == "bin":
        torch.save(shards[0], tmp_path / "pytorch_model.bin")
    else:
        save_file(shards[0], tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    written = {key: value for shard in shards for key, value in shard.items()}
    assert checkpoint.format == suffix
    assert checkpoint.spans.keys() == written.keys()
    assert len(checkpoint.files) == num_shards
    for key, value in written.items():
        assert same_bytes(read_span(checkpoint.spans[key]), value), key


def test_safetensors_wins_over_bin(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path).spans) == ["a"]


def test_opening_reads_no_tensor_data(tmp_path):
    """A sparse terabyte opens at once: only headers are read."""
    header = header_of({"a": entry("U8", [1 << 40], 0, 1 << 40)})
    path = tmp_path / "model.safetensors"
    path.write_bytes(header)
    os.truncate(path, len(header) + (1 << 40))
    assert open_checkpoint(tmp_path).spans["a"].nbytes == 1 << 40


def test_fingerprint_follows_positions_not_data(tmp_path):
    def fingerprint(name: str, tensors: dict[str, torch.Tensor]) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return open_checkpoint(tmp_path / name).fingerprint

    base = fingerprint("base", {"a": torch.zeros(3), "b": torch.ones(4)})
    assert base == fingerprint("other_data", {"a": torch.ones(3), "b": torch.ones(4)})
    assert base != fingerprint("other_key", {"a": torch.zeros(3), "c": torch.ones(4)})
    assert base != fingerprint("other_shape", {"a": torch.zeros(4), "b": torch.ones(3)})
    assert base != fingerprint("other_dtype", {"a": torch.zeros(3), "b": torch.ones(4, dtype=torch.int32)})


# --- folders ----------------------------------------------------------------------------------------


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_file_instead_of_folder(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is a file; give the folder"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no weights.*download"):
        open_checkpoint(tmp_path)


def test_gguf_folder(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"GGUF.*not supported; give the original safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_without_their_index(tmp_path, suffix):
    write_sharded(tmp_path, [{"a": torch.zeros(3)}, {"b": torch.zeros(3)}], suffix)
    (index,) = tmp_path.glob("*.index.json")
    index.unlink()
    with pytest.raises(FileNotFoundError, match=f"but not {index.name}; download"):
        open_checkpoint(tmp_path)


def test_missing_shard(tmp_path):
    write_sharded(tmp_path, [{"a": torch.zeros(3)}, {"b": torch.zeros(3)}])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 are missing.*model-00002-of-00002.safetensors; download"):
        open_checkpoint(tmp_path)


def test_index_naming_an_absent_tensor(tmp_path):
    weight_map = write_sharded(tmp_path, [{"a": torch.zeros(3)}, {"b": torch.zeros(3)}])
    write_index(tmp_path / "model.safetensors.index.json", weight_map | {"c": weight_map["a"]})
    with pytest.raises(ValueError, match=r"'c' is in .*model-00001-of-00002\.safetensors, but it is not"):
        open_checkpoint(tmp_path)


def test_index_naming_the_wrong_shard(tmp_path):
    weight_map = write_sharded(tmp_path, [{"a": torch.zeros(3)}, {"b": torch.zeros(3), "c": torch.zeros(3)}])
    write_index(tmp_path / "model.safetensors.index.json", weight_map | {"b": weight_map["a"]})
    with pytest.raises(ValueError, match=r"'b' is in .*00001-of-00002\.safetensors, but it is not"):
        open_checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    write_sharded(tmp_path, [{"a": torch.zeros(3)}, {"a": torch.zeros(3), "b": torch.zeros(3)}])
    write_index(
        tmp_path / "model.safetensors.index.json",
        {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    )
    with pytest.raises(ValueError, match=r"00002.* holds the tensor 'a' that .*00001.* holds as well"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["../up.safetensors", "/etc/passwd", "sub/dir.safetensors", "..", "", "a\\b", "a\0b"]
)
def test_shard_name_that_leaves_the_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(3)}, tmp_path / "up.safetensors")
    write_index(folder / "model.safetensors.index.json", {"a": name})
    with pytest.raises(ValueError, match="leaves the folder; refused"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 3}}', b"\xff"]
)
def test_damaged_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json: .*; download it again"):
        open_checkpoint(tmp_path)


def test_weights_that_are_a_folder(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors: is not a regular file"):
        open_checkpoint(tmp_path)


def test_git_lfs_pointers(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer.*git lfs pull"):
            open_checkpoint(tmp_path)
        (tmp_path / name).unlink()


# --- changes ----------------------------------------------------------------------------------------


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """Same size, same times, another inode."""
    before = path.stat()
    copy = path.with_suffix(".new")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.rename(path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("change", [rewritten, replaced, truncated, Path.unlink])
def test_changed_file_is_noticed(tmp_path, change):
    write_sharded(tmp_path, [{"a": torch.zeros(3)}, {"b": torch.zeros(3)}])
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.verify_unchanged()
    change(checkpoint.files[1])
    with pytest.raises(ValueError, match=r"model-00002.* changed while it was open.*open it again"):
        checkpoint.verify_unchanged()


# --- headers ----------------------------------------------------------------------------------------

PATH = Path("model.safetensors")
FOUR = entry("F32", [2, 2], 0, 16)


def parse(content: object, data_bytes: int = 64):
    header = header_of(content)
    return parse_safetensors_header(header, len(header) + data_bytes, PATH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": entry("F32", [2, 2], 0, 15)}, "needs 16 bytes, but its data_offsets hold 15"),
        ({"a": entry("BF16", [2, 2], 0, 16)}, "needs 8 bytes, but its data_offsets hold 16"),
        ({"a": entry("F32", [2, -2], 0, 16)}, "is not a list of sizes"),
        ({"a": entry("F32", [2, True], 0, 8)}, "is not a list of sizes"),
        ({"a": entry("F32", [1] * 65, 0, 4)}, "is not a list of sizes"),
        ({"a": FOUR | {"shape": "2,2"}}, "is not a list of sizes"),
        ({"a": entry("F32", [2, 2], 16, 0)}, "not .begin, end."),
        ({"a": entry("F32", [2, 2], -16, 0)}, "not .begin, end."),
        ({"a": FOUR | {"data_offsets": [0, 16, 32]}}, "not .begin, end."),
        ({"a": FOUR | {"data_offsets": [0, 16.0]}}, "not .begin, end."),
        (
            {"a": entry("F99", [2, 2], 0, 16)},
            "dtype 'F99' is not supported, give a checkpoint in one of BOOL",
        ),
        ({"a": FOUR | {"dtype": None}}, "dtype None is not supported"),
        ({"a": FOUR, "b": entry("F32", [2, 2], 12, 28)}, "tensor 'b' starts at byte .*, inside 'a'"),
        ({"a": entry("F32", [20], 0, 80)}, "it is truncated; download it again"),
        ({"a": entry("F32", [3], 0, 12)}, r"\d+ bytes that belong to no tensor"),
        (
            {"a": entry("F32", [3], 0, 12), "b": entry("F32", [3], 16, 28)},
            r"\d+ bytes that belong to no tensor",
        ),
        ({"a": 3}, "has no dtype, shape and data_offsets"),
        ([], "is not a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": %s}' % (b"9" * 5000), "not valid JSON"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
    ],
)
def test_damaged_header(content, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse(content)
    assert str(raised.value).startswith("model.safetensors: ")


def test_empty_tensors_overlap_nobody():
    empty = entry("F32", [0, 2], 8, 8)
    assert parse({"a": FOUR, "b": empty}, data_bytes=16)["b"].nbytes == 0


def test_truncated_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'a'.*truncated; download it again"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [200, 100_000_001, 2**63, 2**64 - 1])
def test_header_longer_than_the_file(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(ValueError, match=rf"header of {length} bytes, limit 100 "):
        open_checkpoint(tmp_path)


def test_absurd_header_in_a_large_file():
    with pytest.raises(ValueError, match="header of 100000001 bytes, limit 100000000"):
        safetensors_header_bytes((100_000_001).to_bytes(8, "little"), 1 << 40, PATH)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_file_too_short_for_a_header(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="too few"):
        open_checkpoint(tmp_path)


def test_header_from_a_range_request():
    header = header_of({"a": FOUR})
    assert safetensors_header_bytes(header[:8], len(header) + 16, PATH) == len(header)
    spans = parse_safetensors_header(header + b"the first data bytes", len(header) + 16, PATH)
    assert spans["a"].offset == len(header)
    with pytest.raises(ValueError, match="header bytes; download it again"):
        parse_safetensors_header(header[:-1], len(header) + 16, PATH)


def assert_clean(header: bytes, file_bytes: int) -> None:
    try:
        spans = parse_safetensors_header(header, file_bytes, PATH)
    except ValueError as error:
        message = str(error)
        assert "model.safetensors" in message
        assert len(message) < 1000
        return
    for span in spans.values():
        assert 0 <= span.offset <= span.offset + span.nbytes <= file_bytes


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(deadline=None)
def test_any_bytes_give_spans_or_a_value_error(content, file_bytes):
    assert_clean(content, file_bytes)
    assert_clean(header_of(content), file_bytes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
SIZES = st.lists(st.integers(-2, 40) | st.integers(), max_size=4)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*SAFETENSORS_DTYPES, "F4", ""]) | JSON,
        "shape": SIZES | JSON,
        "data_offsets": SIZES | JSON,
    }
)


@given(st.dictionaries(st.text(max_size=8), ENTRY | JSON, max_size=4), st.integers(0, 2000))
@settings(deadline=None)
def test_any_json_gives_spans_or_a_value_error(content, data_bytes):
    header = header_of(json.dumps(content).encode())
    assert_clean(header, len(header) + data_bytes)


@given(st.data())
@settings(deadline=None)
def test_any_flipped_byte_gives_spans_or_a_value_error(data):
    header = bytearray(
        header_of({"a": FOUR, "b": entry("BF16", [3, 8], 16, 64), "__metadata__": {"format": "pt"}})
    )
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    assert_clean(bytes(header), len(header) + 64)


def test_packed_rows_are_expert_slices(tmp_path):
    stacked = torch.randn(5, 3, 4)
    save_file({"gate_up": stacked, **expert_tensors(1)}, tmp_path / "model.safetensors")
    span = open_checkpoint(tmp_path).spans["gate_up"]
    row = span.nbytes // 5
    raw = span.path.read_bytes()[span.offset + 2 * row : span.offset + 3 * row]
    assert raw == stacked[2].contiguous().view(torch.uint8).numpy().tobytes()
