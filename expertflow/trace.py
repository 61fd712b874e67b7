"""Traces on disk: which experts the routers of a model chose for every token of many sequences.

One folder holds one file that only grows: magic, version, the meta data as JSON, then a record for each
sequence. Integers are little-endian:

    header   8s magic | u32 version | u32 bytes of JSON | u32 CRC32 of it | JSON
    record   u32 bytes of payload | u32 CRC32 of it | u32 CRC32 of these eight bytes | payload (zlib)

The third number tells a damaged length, behind which everything would be lost, from a record that a kill
cut short. A routed expert takes one byte before compression where E < 256, its weight (optional) another.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

FILE_NAME = "routes.trace"
VERSION = 1
SPLITS = ("train", "test")
_MAGIC = b"EFTRACE\n"
_HEADER = struct.Struct("<8sIII")
_FRAME = struct.Struct("<III")
_MOST_RECORD_BYTES = 1 << 30  # unfolded: a file from elsewhere may promise more than there is memory
_PAYLOAD = struct.Struct("<QIIIIBBH")  # prompt, run, prefill, S, T, split, has weights, bytes of task
# A killed process loses nothing (each record is handed to the kernel); a power cut loses this much.
_SECONDS_BETWEEN_SYNCS = 5.0


@dataclass(frozen=True)
class TraceMeta:
    """What was traced, and how. Two recordings may share a file only when these agree."""

    fingerprint: str  # of the model, 16 hex digits (models/fingerprint.py)
    model: str  # a name for people
    experts_per_layer: tuple[int, ...]  # all L MoE layers, the encoder's first
    source_layers: int  # how many of them are the encoder's; 0 for decoder-only models
    top_k: int
    vocab_size: int
    dataset: str
    settings: dict[str, Any] = field(default_factory=dict)  # of sampling; JSON values

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts_per_layer", tuple(self.experts_per_layer))
        layers = self.experts_per_layer
        for names, kind in (("fingerprint model dataset", str), ("source_layers top_k vocab_size", int)):
            for name in names.split():
                if type(value := getattr(self, name)) is not kind:
                    raise TypeError(f"{name}={value!r} must be {kind.__name__}")
        if any(type(experts) is not int for experts in layers):
            raise TypeError(f"experts_per_layer={layers} must be whole numbers")
        if not layers or min(layers) < 1 or max(layers) > 65534 or self.top_k < 1 or self.vocab_size < 1:
            raise ValueError(
                f"experts_per_layer={layers}, top_k={self.top_k}, vocab_size={self.vocab_size}: a trace "
                f"needs at least one layer of 1 to 65534 experts, and a top_k and vocabulary of at least 1"
            )
        if not 0 <= self.source_layers <= len(layers):
            raise ValueError(
                f"source_layers={self.source_layers} must lie between 0 and {len(layers)} layers"
            )

    @property
    def target_layers(self) -> int:
        return len(self.experts_per_layer) - self.source_layers

    @property
    def route_dtype(self) -> np.dtype[Any]:
        """Of expert ids; E itself must fit, since it means "nowhere"."""
        return np.dtype("u1" if max(self.experts_per_layer) < 256 else "<u2")


@dataclass(frozen=True, eq=False)
class TracedSequence:
    """One sequence: `source` is what an encoder read, `target` what the decoder stack read, in order.

    S is 0 for decoder-only models, whose target is the prompt and the output tokens that were run; with an
    encoder the target is the start token and the output tokens that were run. (The last sampled token never
    is.) A route equal to the layer's number of experts means "nowhere": dropped over capacity.
    """

    prompt: int  # its number in the data set
    run: int  # which of the sampled answers to that prompt
    split: str  # "train" | "test", the same for all runs of a prompt
    task: str
    source_ids_S: np.ndarray  # int32
    source_routes_SLK: np.ndarray  # uint8 or uint16; L is meta.source_layers
    source_weights_SLK: np.ndarray | None  # float32; kept to 8 bits, relative to the largest of the sequence
    target_ids_T: np.ndarray
    target_routes_TLK: np.ndarray
    target_weights_TLK: np.ndarray | None
    num_prefill: int  # target tokens that were known before the first decode step


@dataclass(frozen=True)
class Trace:
    """A recording in memory."""

    meta: TraceMeta
    sequences: tuple[TracedSequence, ...]

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[TracedSequence]:
        return iter(self.sequences)

    def __getitem__(self, index: int) -> TracedSequence:
        return self.sequences[index]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(sorted({sequence.task for sequence in self.sequences}))

    def split(self, name: str) -> Trace:
        """The sequences of one split. Raises ValueError when there are none."""
        if name not in SPLITS:
            raise ValueError(f"split={name!r} is none of {', '.join(SPLITS)}")
        found = tuple(sequence for sequence in self.sequences if sequence.split == name)
        if not found:
            raise ValueError(
                f"none of the {len(self)} traced sequences is of the split {name!r}; record more prompts, or "
                f'give them a "split" in the data set file'
            )
        return replace(self, sequences=found)

    def task(self, *names: str) -> Trace:
        """The sequences of these tasks. Raises ValueError for a task that was not recorded."""
        for name in names:
            if name not in self.tasks:
                raise ValueError(f"no traced sequence is of the task {name!r}; there are {self.tasks}")
        return replace(self, sequences=tuple(s for s in self.sequences if s.task in names))


def read_trace(folder: str | Path, weights: bool = True) -> Trace:
    """Read and check a whole recording.

    weights=False leaves the weights out, four fifths of the memory. Warns when the last record was cut short,
    and leaves it out. Raises ValueError naming the file and the record for anything else that is wrong.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} has no recording ({FILE_NAME} is missing); record one with `expertflow trace MODEL "
            f"--dataset ... -o {folder}`"
        )
    with path.open("rb") as file:
        meta = _read_header(file, path)
        read: dict[tuple[int, int], TracedSequence] = {}
        for number, raw, _ in _records(file, path):
            where = _where(path, number)
            sequence = _decode(meta, raw, where, weights)
            if (sequence.prompt, sequence.run) in read:
                raise _damaged(where, f"run {sequence.run} of prompt {sequence.prompt} is there already")
            read[sequence.prompt, sequence.run] = sequence
        return Trace(meta, tuple(read.values()))


class TraceWriter:
    """Appends sequences to the recording in `folder`, which is made when it is not there.

    Opening one again cuts a record that a kill left unfinished; meta must equal what the file says. Each
    append is all or nothing, also when it is interrupted.
    """

    def __init__(self, folder: str | Path, meta: TraceMeta):
        self.meta = meta
        self.path = Path(folder) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            _create(self.path, meta)
        self._file = self.path.open("r+b", buffering=0)
        try:
            self._lock()
            self._done, self._end = self._check()
            if self._end < self.path.stat().st_size:
                self._file.truncate(self._end)
            self._file.seek(self._end)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def done(self) -> set[tuple[int, int]]:
        """(prompt, run) of every sequence on disk."""
        return set(self._done)

    def append(self, sequence: TracedSequence) -> None:
        """Raises ValueError for a sequence that does not fit the meta data or is there already."""
        key = (sequence.prompt, sequence.run)
        if key in self._done:
            raise ValueError(f"{self.path} already has prompt {key[0]}, run {key[1]}; skip what done() names")
        payload = zlib.compress(_encode(self.meta, sequence), 6)
        frame = struct.pack("<II", len(payload), zlib.crc32(payload))
        rest = memoryview(frame + struct.pack("<I", zlib.crc32(frame)) + payload)
        size = len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:  # disk full, Ctrl-C: a half-written record must not stand before the next one
            self._file.truncate(self._end)
            self._file.seek(self._end)
            raise
        self._end += size
        self._done.add(key)
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Idempotent."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{self.path} is being written by another recording; wait for it, or give another folder"
            ) from None

    def _check(self) -> tuple[set[tuple[int, int]], int]:
        """The sequences that are there, and where the last whole record ends."""
        with self.path.open("rb") as file:
            found = _read_header(file, self.path)
            for entry in fields(TraceMeta):
                old, new = getattr(found, entry.name), getattr(self.meta, entry.name)
                if old != new:
                    raise ValueError(
                        f"{self.path} was recorded with {entry.name}={old!r}, not {new!r}; continue with the "
                        f"same model and settings, or give another folder"
                    )
            done, end = set(), file.tell()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # we are about to mend it
                for number, raw, record_end in _records(file, self.path):
                    if len(raw) < _PAYLOAD.size:
                        raise _damaged(_where(self.path, number), f"only {len(raw)} bytes long")
                    done.add(_PAYLOAD.unpack_from(raw)[:2])
                    end = record_end
        return done, end


def _create(path: Path, meta: TraceMeta) -> None:
    """A file with a header. It appears whole or not at all."""
    text = json.dumps(asdict(meta), ensure_ascii=False).encode()
    if TraceMeta(**json.loads(text)) != meta:
        raise ValueError(
            f"settings={meta.settings!r} do not survive JSON; use plain numbers, texts and lists"
        )
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    with temporary.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, VERSION, len(text), zlib.crc32(text)) + text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_header(file: Any, path: Path) -> TraceMeta:
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise ValueError(f"{path} is no expertflow trace: it begins with {head[:8]!r}, not {_MAGIC!r}")
    _, version, size, crc = _HEADER.unpack(head)
    if version != VERSION:
        raise ValueError(
            f"{path} is a trace of version {version}, and this expertflow reads version {VERSION}; "
            f"use the expertflow that wrote it, or record it again"
        )
    text = file.read(size)
    if len(text) != size or zlib.crc32(text) != crc:
        raise ValueError(f"the header of {path} is damaged; restore the file, or record it again")
    try:
        return TraceMeta(**json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the header of {path} makes no sense ({error}); record it again") from None


def _records(file: Any, path: Path) -> Iterator[tuple[int, bytes, int]]:
    """(number, uncompressed payload, where it ends) of each record from here on; warns of a torn last one."""
    size, number = path.stat().st_size, 0
    while (begin := file.tell()) < size:
        where = _where(path, number)
        frame = file.read(_FRAME.size)
        torn = len(frame) < _FRAME.size
        if not torn:
            length, crc, crc_of_frame = _FRAME.unpack(frame)
            if zlib.crc32(frame[:8]) != crc_of_frame:
                # A file system that crashed may have grown the file without writing it.
                torn = not any(frame) and not any(file.read())
                if not torn:
                    raise _damaged(where, "its length fails its checksum")
            else:
                payload = file.read(length)
                whole = len(payload) == length and zlib.crc32(payload) == crc
                torn = not whole and begin + _FRAME.size + length >= size
                if not (whole or torn):
                    raise _damaged(where, "its checksum is wrong")
        if torn:
            warnings.warn(
                f"{where} was cut short, as a kill does, and is left out; running the recording again "
                f"replaces it",
                stacklevel=3,
            )
            return
        unfolding = zlib.decompressobj()
        try:
            raw = unfolding.decompress(payload, _MOST_RECORD_BYTES)
        except zlib.error as error:
            raise _damaged(where, str(error)) from None
        if not unfolding.eof:
            raise _damaged(
                where, f"it does not end within the {_MOST_RECORD_BYTES} bytes that a record may have"
            )
        yield number, raw, file.tell()
        number += 1


def _where(path: Path, number: int) -> str:
    return f"record {number} of {path}"


def _damaged(where: str, what: str) -> ValueError:
    return ValueError(f"{where} is damaged: {what}; restore the file from a copy, or record it again")


def _encode(meta: TraceMeta, sequence: TracedSequence) -> bytes:
    """Payload of one record, before compression. Raises ValueError unless it is what meta promises."""
    where = f"prompt {sequence.prompt}, run {sequence.run}"
    has_weights = sequence.target_weights_TLK is not None
    check_sequence(meta, sequence, where)
    task = sequence.task.encode()
    if not (0 <= sequence.prompt < 2**64 and 0 <= sequence.run < 2**32 and len(task) < 2**16):
        raise ValueError(
            f"{where} with a task of {len(task)} bytes does not fit a record: prompts are 0 to 2**64 - 1, runs 0 to "
            f"2**32 - 1, and a task takes at most {2**16 - 1} bytes; shorten the task"
        )
    parts = [
        _PAYLOAD.pack(
            sequence.prompt,
            sequence.run,
            sequence.num_prefill,
            len(sequence.source_ids_S),
            len(sequence.target_ids_T),
            SPLITS.index(sequence.split),
            has_weights,
            len(task),
        ),
        task,
    ]
    for ids, routes, weights in _streams(sequence):
        parts += [ids.astype("<i4").tobytes(), routes.astype(meta.route_dtype).tobytes()]
        if weights is not None:
            largest = float(weights.max(initial=0.0))
            steps = np.rint(weights * (255 / largest)) if largest > 0 else np.zeros_like(weights)
            parts += [struct.pack("<f", largest), steps.astype("u1").tobytes()]
    return b"".join(parts)


def _decode(meta: TraceMeta, raw: bytes, where: str, keep_weights: bool) -> TracedSequence:
    """The inverse of _encode, which leaves nothing unchecked."""
    if len(raw) < _PAYLOAD.size:
        raise _damaged(where, f"only {len(raw)} bytes long")
    prompt, run, num_prefill, source, target, split, has_weights, task_size = _PAYLOAD.unpack_from(raw)
    layers = (meta.source_layers, meta.target_layers)
    lengths = (source, target)
    routes_of = [tokens * n * meta.top_k for tokens, n in zip(lengths, layers, strict=True)]
    expected = _PAYLOAD.size + task_size + 4 * (source + target) + sum(routes_of) * meta.route_dtype.itemsize
    expected += (sum(routes_of) + 8) if has_weights else 0
    if len(raw) != expected or split >= len(SPLITS) or has_weights > 1:
        raise _damaged(where, f"{len(raw)} bytes where its lengths and the header say {expected}")
    begin = _PAYLOAD.size + task_size
    streams: list[Any] = []
    for tokens, num_layers, routed in zip(lengths, layers, routes_of, strict=True):
        shape = (tokens, num_layers, meta.top_k)
        ids = np.frombuffer(raw, "<i4", tokens, begin)
        begin += ids.nbytes
        routes = np.frombuffer(raw, meta.route_dtype, routed, begin).reshape(shape)
        begin += routes.nbytes
        weights = None
        if has_weights:
            (largest,) = struct.unpack_from("<f", raw, begin)
            if keep_weights:
                steps = np.frombuffer(raw, "u1", routed, begin + 4).reshape(shape)
                weights = steps.astype(np.float32) * np.float32(largest / 255)
            begin += 4 + routed
        # Copies: a view would keep the whole record alive, weights that nobody asked for too.
        streams.append((ids.astype(np.int32), routes.copy(), weights))
    task = raw[_PAYLOAD.size : _PAYLOAD.size + task_size].decode(errors="replace")
    (source_ids, source_routes, source_weights), (target_ids, target_routes, target_weights) = streams
    sequence = TracedSequence(
        prompt=prompt,
        run=run,
        split=SPLITS[split],
        task=task,
        source_ids_S=source_ids,
        source_routes_SLK=source_routes,
        source_weights_SLK=source_weights,
        target_ids_T=target_ids,
        target_routes_TLK=target_routes,
        target_weights_TLK=target_weights,
        num_prefill=num_prefill,
    )
    check_sequence(meta, sequence, where)
    return sequence


def _streams(sequence: TracedSequence) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    yield sequence.source_ids_S, sequence.source_routes_SLK, sequence.source_weights_SLK
    yield sequence.target_ids_T, sequence.target_routes_TLK, sequence.target_weights_TLK


def check_sequence(meta: TraceMeta, sequence: TracedSequence, where: str) -> None:
    """Raise ValueError unless shapes, token ids, routes and weights are what meta allows."""
    if sequence.split not in SPLITS:
        raise ValueError(f"{where}: split={sequence.split!r} is none of {', '.join(SPLITS)}")
    if not 0 <= sequence.num_prefill <= len(sequence.target_ids_T):
        raise ValueError(
            f"{where}: num_prefill={sequence.num_prefill} of {len(sequence.target_ids_T)} target tokens"
        )
    if (sequence.source_weights_SLK is None) != (sequence.target_weights_TLK is None):
        raise ValueError(f"{where} has weights for source or target only; give both, or neither")
    experts_L = np.array(meta.experts_per_layer)
    sides = (("source", experts_L[: meta.source_layers]), ("target", experts_L[meta.source_layers :]))
    for (side, experts), (ids, routes, weights) in zip(sides, _streams(sequence), strict=True):
        shape = (len(ids), len(experts), meta.top_k)
        if ids.ndim != 1 or routes.shape != shape or (weights is not None and weights.shape != shape):
            raise ValueError(f"{where}: {side} routes are {routes.shape}; {shape} is what its tokens need")
        if len(ids) and (ids.min() < 0 or ids.max() >= meta.vocab_size):
            raise ValueError(
                f"{where}: {side} token ids {ids.min()} to {ids.max()} leave the vocabulary of {meta.vocab_size}"
                f"; the trace is of another model or damaged: record it again"
            )
        if routes.size and (routes.min() < 0 or (routes > experts[None, :, None]).any()):
            token, layer, _ = np.argwhere((routes > experts[None, :, None]) | (routes < 0))[0]
            raise ValueError(
                f"{where}: {side} token {token} is routed to {routes[token, layer].tolist()} in its layer "
                f"{layer} of {experts[layer]} experts; the trace is of another model or damaged: record it again"
            )
        if weights is not None and weights.size and not (np.isfinite(weights).all() and weights.min() >= 0):
            raise ValueError(f"{where}: {side} weights are not all finite and non-negative; check the model")
