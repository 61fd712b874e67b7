"""Traces on disk: what goes in comes out, a kill costs one record, and nothing damaged is believed."""

from __future__ import annotations

import struct
import tempfile
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow import trace
from expertflow.trace import FILE_NAME, Trace, TracedSequence, TraceMeta, TraceWriter, read_trace

META = TraceMeta("0123456789abcdef", "tiny", (8, 8, 6), 1, 2, 100, "alpaca", {"temperature": 1.0})


def random_sequence(
    meta: TraceMeta, seed: int, *, source: int = 5, target: int = 7, prompt: int = 0, run: int = 0,
    weights: bool = True,
) -> TracedSequence:  # fmt: skip
    rng = np.random.default_rng(seed)
    experts = np.array(meta.experts_per_layer)
    streams: list[Any] = []
    for tokens, limits in ((source, experts[: meta.source_layers]), (target, experts[meta.source_layers :])):
        shape = (tokens, len(limits), meta.top_k)
        streams.append(rng.integers(0, meta.vocab_size, tokens, dtype=np.int32))
        streams.append(rng.integers(0, limits[None, :, None] + 1, shape).astype(meta.route_dtype))
        streams.append(rng.random(shape, dtype=np.float32) * 2.5 if weights else None)
    split = "test" if prompt % 3 == 2 else "train"
    return TracedSequence(prompt, run, split, f"tâche {prompt % 2}", *streams, target // 2)


def same(a: TracedSequence, b: TracedSequence) -> bool:
    """Equal, weights to the half step that 8 bits leave."""
    if (a.prompt, a.run, a.split, a.task, a.num_prefill) != (b.prompt, b.run, b.split, b.task, b.num_prefill):
        return False
    for name in ("source_ids_S", "source_routes_SLK", "target_ids_T", "target_routes_TLK"):
        x, y = getattr(a, name), getattr(b, name)
        if x.dtype != y.dtype or not np.array_equal(x, y):
            return False
    for name in ("source_weights_SLK", "target_weights_TLK"):
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None):
            return False
        if x is not None:
            half_step = x.max(initial=0) / 255 / 2 * 1.001
            if y.dtype != np.float32 or not np.allclose(x, y, rtol=0, atol=half_step):
                return False
    return True


def write(folder: Path, sequences: list[TracedSequence], meta: TraceMeta = META) -> Path:
    with TraceWriter(folder, meta) as writer:
        for sequence in sequences:
            writer.append(sequence)
    return folder / FILE_NAME


def three(folder: Path) -> tuple[list[TracedSequence], Path, list[int]]:
    """Three records, their file, and where each begins (and the last ends)."""
    sequences = [random_sequence(META, seed, prompt=seed) for seed in range(3)]
    bounds = []
    with TraceWriter(folder, META) as writer:
        for sequence in sequences:
            bounds.append((folder / FILE_NAME).stat().st_size)
            writer.append(sequence)
    path = folder / FILE_NAME
    return sequences, path, [*bounds, path.stat().st_size]


@settings(max_examples=40, deadline=None)
@given(
    experts=st.lists(st.sampled_from([1, 8, 255, 256, 1000]), min_size=1, max_size=4),
    source_layers=st.integers(0, 4),
    top_k=st.integers(1, 4),
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4),
    weights=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_is_written_is_read(
    experts: list[int],
    source_layers: int,
    top_k: int,
    lengths: list[tuple[int, int]],
    weights: bool,
    seed: int,
) -> None:
    meta = replace(
        META, experts_per_layer=tuple(experts), source_layers=min(source_layers, len(experts)), top_k=top_k
    )
    written = [
        random_sequence(meta, seed + n, source=source, target=target, prompt=n, run=n % 3, weights=weights)
        for n, (source, target) in enumerate(lengths)
    ]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), written, meta)
        trace = read_trace(folder)
    assert trace.meta == meta
    assert len(trace) == len(written)
    assert all(same(a, b) for a, b in zip(written, trace, strict=True))


def test_a_token_costs_about_a_byte_for_each_route(tmp_path: Path) -> None:
    meta = replace(META, experts_per_layer=(60,) * 24, source_layers=0, top_k=4, vocab_size=32000)
    size = (
        write(tmp_path / "ids", [random_sequence(meta, 0, source=0, target=500, weights=False)], meta)
        .stat()
        .st_size
    )
    assert size / 500 < 24 * 4 + 4  # random routes, so compression has nothing to find but the 60 of 256
    size = write(tmp_path / "both", [random_sequence(meta, 0, source=0, target=500)], meta).stat().st_size
    assert size / 500 < 2 * 24 * 4 + 4


def test_weights_can_be_left_out_when_reading(tmp_path: Path) -> None:
    write(tmp_path, [random_sequence(META, 0)])
    (sequence,) = read_trace(tmp_path, weights=False)
    assert sequence.source_weights_SLK is None
    assert sequence.target_weights_TLK is None


def test_opening_again_appends(tmp_path: Path) -> None:
    sequences = [random_sequence(META, seed, prompt=seed, run=seed % 2) for seed in range(3)]
    write(tmp_path, sequences[:2])
    with TraceWriter(tmp_path, META) as writer:
        assert writer.done() == {(0, 0), (1, 1)}
        with pytest.raises(ValueError, match="already has prompt 1, run 1"):
            writer.append(sequences[1])
        writer.append(sequences[2])
    assert all(same(a, b) for a, b in zip(sequences, read_trace(tmp_path), strict=True))


@pytest.mark.parametrize(
    "other", [{"fingerprint": "f" * 16}, {"settings": {"temperature": 0.5}}, {"top_k": 1}]
)
def test_another_model_or_setting_gets_another_folder(tmp_path: Path, other: dict) -> None:
    write(tmp_path, [random_sequence(META, 0)])
    with pytest.raises(ValueError, match=rf"recorded with {next(iter(other))}=.*another folder"):
        TraceWriter(tmp_path, replace(META, **other))


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, META), pytest.raises(ValueError, match="being written by another recording"):
        TraceWriter(tmp_path, META)
    TraceWriter(tmp_path, META).close()


def test_a_torn_last_record_is_cut_at_every_byte(tmp_path: Path) -> None:
    """A kill may end the file anywhere. The reader warns and keeps the rest; the writer repairs."""
    sequences, path, bounds = three(tmp_path)
    whole = path.read_bytes()
    for end in range(bounds[2] + 1, bounds[3]):
        path.write_bytes(whole[:end])
        with pytest.warns(UserWarning, match=r"record 2 of .* was cut short"):
            assert len(read_trace(tmp_path)) == 2
    with TraceWriter(tmp_path, META) as writer:
        assert writer.done() == {(0, 0), (1, 0)}
        writer.append(sequences[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_trace(tmp_path)) == 3
    assert path.read_bytes() == whole


def test_zeros_after_a_power_cut_are_cut_too(tmp_path: Path) -> None:
    _, path, bounds = three(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(4096))
    with pytest.warns(UserWarning, match="record 3 of"):
        assert len(read_trace(tmp_path)) == 3
    TraceWriter(tmp_path, META).close()
    assert path.stat().st_size == bounds[3]


def test_zeros_before_something_are_damage(tmp_path: Path) -> None:
    """What comes after them may be records: the writer must not cut it off."""
    _, path, _ = three(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(64) + b"more")
    with pytest.raises(ValueError, match="its length fails its checksum"):
        read_trace(tmp_path)
    with pytest.raises(ValueError, match="its length fails its checksum"):
        TraceWriter(tmp_path, META)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Before the last record: an error, and the writer never cuts. In the last one: at most that one is lost."""
    _, path, bounds = three(tmp_path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        if at < bounds[2] + 12:
            with pytest.raises(ValueError, match=FILE_NAME):
                read_trace(tmp_path)
            with pytest.raises(ValueError, match=FILE_NAME):
                TraceWriter(tmp_path, META)
            assert path.stat().st_size == len(whole)
        else:
            with pytest.warns(UserWarning, match="record 2 of"):
                assert len(read_trace(tmp_path)) == 2


def test_an_interrupted_append_leaves_no_half_record(tmp_path: Path) -> None:
    """Ctrl-C between two pieces of a record, and then the run goes on: the next record must follow a whole one."""
    before, first, second = (random_sequence(META, prompt, prompt=prompt) for prompt in range(3))
    writer = TraceWriter(tmp_path, META)
    writer.append(before)

    class Interrupted:
        def __init__(self, file: Any):
            self.file = file
            self.writes = 0

        def write(self, piece: memoryview) -> int:
            self.writes += 1
            if self.writes == 2:
                raise KeyboardInterrupt
            return self.file.write(piece[:10])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    file, writer._file = writer._file, Interrupted(writer._file)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        writer.append(first)
    writer._file = file
    writer.append(second)
    with pytest.raises(ValueError, match="already has prompt 2"):
        writer.append(second)
    writer.close()
    assert all(same(a, b) for a, b in zip((before, second), read_trace(tmp_path), strict=True))


@pytest.mark.parametrize("change", [{"task": "x" * 2**16}, {"run": 2**32}, {"prompt": -1}, {"prompt": 2**64}])
def test_what_no_record_can_hold_is_refused(tmp_path: Path, change: dict) -> None:
    """A task comes from the user's data set; struct once refused it in its own words, after hours of recording."""
    with TraceWriter(tmp_path, META) as writer:
        with pytest.raises(ValueError, match=r"does not fit a record: .* at most 65535 bytes"):
            writer.append(replace(random_sequence(META, 1), **change))
        writer.append(random_sequence(META, 1))
    assert len(read_trace(tmp_path)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_routes_TLK": np.full((7, 2, 2), 7, np.uint8)}, "target token 0 is routed to .*6 experts"),
        ({"target_ids_T": np.full(7, 100, np.int32)}, "vocabulary of 100"),
        ({"target_ids_T": np.full(6, 1, np.int32)}, r"\(6, 2, 2\) is what its tokens need"),
        ({"source_weights_SLK": None}, "weights for source or target only"),
        ({"num_prefill": 8}, "num_prefill=8 of 7"),
        ({"split": "dev"}, "split='dev'"),
        ({"target_ids_T": np.full(7, -1, np.int32)}, "vocabulary of 100"),
        ({"num_prefill": -1}, "num_prefill=-1 of 7"),
        ({"target_weights_TLK": np.full((7, 2, 2), np.nan, np.float32)}, "finite"),
        ({"target_weights_TLK": np.full((7, 2, 2), -1, np.float32)}, "non-negative"),
    ],
)
def test_a_sequence_that_does_not_fit_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    wrong = replace(random_sequence(META, 0), **change)
    with TraceWriter(tmp_path, META) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(wrong)
        writer.append(random_sequence(META, 0))
    assert len(read_trace(tmp_path)) == 1


def forge(path: Path, payload: bytes) -> None:
    """Append a record whose checksums are right, whatever is in it."""
    packed = zlib.compress(payload)
    frame = struct.pack("<II", len(packed), zlib.crc32(packed))
    with path.open("ab") as file:
        file.write(frame + struct.pack("<I", zlib.crc32(frame)) + packed)


def test_right_checksums_do_not_excuse_wrong_contents(tmp_path: Path) -> None:
    _, path, bounds = three(tmp_path)
    whole = path.read_bytes()
    raw = bytearray(zlib.decompress(whole[bounds[0] + 12 : bounds[1]]))
    forge(path, bytes(raw[:-1]))
    with pytest.raises(ValueError, match=r"record 3 of .*bytes where its lengths"):
        read_trace(tmp_path)
    path.write_bytes(whole)
    forge(path, b"short")
    for open_it in (read_trace, lambda folder: TraceWriter(folder, META)):
        with pytest.raises(ValueError, match=r"record 3 of .*only 5 bytes"):
            open_it(tmp_path)
    path.write_bytes(whole)
    begin = 28 + len("tâche 0".encode()) + 5 * 4  # the first source route, behind the lengths and the ids
    raw[begin] = 9
    forge(path, bytes(raw))
    with pytest.raises(ValueError, match=r"record 3 of .*source token 0 is routed to \[9.*8 experts"):
        read_trace(tmp_path)


def test_the_same_run_of_a_prompt_twice_is_damage(tmp_path: Path) -> None:
    _, path, bounds = three(tmp_path)
    forge(path, zlib.decompress(path.read_bytes()[bounds[0] + 12 : bounds[1]]))
    with pytest.raises(ValueError, match=r"record 3 of .* run \d of prompt 0 is there already"):
        read_trace(tmp_path)


def test_a_record_unfolds_to_so_many_bytes_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a file of a megabyte could ask for a gigabyte."""
    sequences, path, bounds = three(tmp_path)
    forge(path, bytes(1 << 20))
    most = 1 << 16
    monkeypatch.setattr(trace, "_MOST_RECORD_BYTES", most)
    with pytest.raises(ValueError, match=f"record 3 of .* does not end within the {most} bytes"):
        read_trace(tmp_path)
    path.write_bytes(path.read_bytes()[: bounds[-1]])
    assert len(read_trace(tmp_path)) == len(sequences)


@pytest.mark.parametrize("change", ["split", "weights", "longer"])
def test_fields_that_no_record_has_are_damage(tmp_path: Path, change: str) -> None:
    _, path, bounds = three(tmp_path)
    raw = bytearray(zlib.decompress(path.read_bytes()[bounds[0] + 12 : bounds[1]]))
    if change == "longer":
        raw += b"\0"
    else:
        raw[24 if change == "split" else 25] = 2
    forge(path, bytes(raw))
    with pytest.raises(ValueError, match=r"record 3 of .*bytes where its lengths"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    "text", [b"null", b'{"top_k": 2}', b'{"experts_per_layer": 8}', b"{", b"[" * 99_999, b"\xff"]
)
def test_a_header_that_is_whole_and_makes_no_sense(tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path, [])
    head = path.read_bytes()[:12]
    path.write_bytes(head + struct.pack("<II", len(text), zlib.crc32(text)) + text)
    with pytest.raises(ValueError, match="makes no sense"):
        read_trace(tmp_path)


def test_other_files_and_versions_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, [])
    whole = path.read_bytes()
    path.write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(ValueError, match=r"routes\.trace is no expertflow trace"):
        read_trace(tmp_path)
    path.write_bytes(whole[:8] + struct.pack("<I", 2) + whole[12:])
    with pytest.raises(ValueError, match="version 2, and this expertflow reads version 1"):
        read_trace(tmp_path)
    with pytest.raises(ValueError, match="has no recording"):
        read_trace(tmp_path / "nowhere")


def test_splits_and_tasks(tmp_path: Path) -> None:
    write(tmp_path, [random_sequence(META, n, prompt=n) for n in range(6)])
    trace = read_trace(tmp_path)
    assert [s.prompt for s in trace.split("test")] == [2, 5]
    assert [s.prompt for s in trace.split("train")] == [0, 1, 3, 4]
    assert trace.tasks == ("tâche 0", "tâche 1")
    assert [s.prompt for s in trace.split("test").task("tâche 0")] == [2]
    with pytest.raises(ValueError, match="no traced sequence is of the task 'chat'"):
        trace.task("chat")
    with pytest.raises(ValueError, match="split='dev' is none of train, test"):
        trace.split("dev")
    with pytest.raises(ValueError, match="none of the 2 traced sequences is of the split 'train'"):
        Trace(trace.meta, trace.split("test").sequences).split("train")


def test_meta_data_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        replace(META, experts_per_layer=())
    for wrong in (
        {"experts_per_layer": (8, 0)},
        {"experts_per_layer": (65535,)},
        {"top_k": 0},
        {"vocab_size": 0},
    ):
        with pytest.raises(ValueError, match="at least one layer"):
            replace(META, **wrong)  # type: ignore[arg-type]
    for name, value in {"experts_per_layer": (8.5,), "fingerprint": None, "top_k": True, "model": 3}.items():
        with pytest.raises(TypeError, match=f"{name}=.*must be"):
            replace(META, **{name: value})  # type: ignore[arg-type]
    for layers in (4, -1):
        with pytest.raises(ValueError, match=f"source_layers={layers}"):
            replace(META, source_layers=layers)
    with pytest.raises(ValueError, match="do not survive JSON"):
        TraceWriter(tmp_path, replace(META, settings={"top_p": (1, 2)}))


def test_a_folder_without_a_recording_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"has no recording .*expertflow trace MODEL"):
        read_trace(tmp_path / "nothing")
