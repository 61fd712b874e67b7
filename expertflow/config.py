"""Settings: one dataclass, from which the keyword arguments and the command line flags are made.

A value and its help text appear here once. Every setting has an effect somewhere and a test that sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its command line help; the unit is named in the help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """How a model is held in memory. Immutable; wrong values raise ValueError with the remedy."""

    memory: str | int | None = setting(
        None, "memory for everything (weights, experts, KV cache, scratch), e.g. 6GiB; default: what is free"
    )
    cache_size: float | None = setting(
        None, "experts kept per MoE layer on average (the paper's CS), instead of --memory"
    )
    context: int = setting(2048, "tokens per sequence (prompt and answer) that the KV cache may hold")
    batch: int = setting(1, "sequences that run through the model together")
    sequences: int | None = setting(
        None, "sequences at once that the KV cache may hold, in units of two batches; default: one batch"
    )
    prefill_chunk: int = setting(512, "tokens of a prompt that run at once; fewer need less scratch memory")
    policy: str | None = setting(
        None,
        "which expert to evict: lru or lfu (within each layer's share of the slots), plec; docs/cache.md; "
        "default: lru, and plec with a predictor",
    )
    predictor: str = setting(
        "none",
        "who foretells which experts are needed, to prefetch them: none, online (learns while it serves), "
        "draft (that, and each step run once before without its experts), or a folder of train-predictor; same output",
    )
    store: str = setting(
        "disk", "where the other experts are: disk (read in place) or ram (all copied there)"
    )
    link: str | int | None = setting(
        None,
        "read experts no faster than this, e.g. 2GB/s: to see how the model would run over such a link, a slower disk "
        "or bus; with --store ram nothing else is in the way; default: as fast as they come",
    )
    device: str = setting(
        "auto",
        "where it computes, and whose memory --memory is: cpu, or a torch device such as cuda:0, which has not been "
        "tried on hardware yet; auto: what device_map names, else cpu",
    )
    host_memory: str | int | None = setting(
        None, "pinned RAM for experts between an accelerator and the disk, e.g. 16GiB; default: none"
    )
    direct_io: bool | None = setting(
        None, "bypass the page cache when reading experts; default: yes where the file system can"
    )
    overlap: bool = setting(
        True, "compute ready experts while others are read (off: the slow, obvious version)"
    )

    look_ahead: bool = setting(
        False, "prefetch what the next layer's router would choose now: more bytes, fewer stalls; same output"
    )

    def __post_init__(self) -> None:
        if self.memory is not None and self.cache_size is not None:
            raise ValueError(
                f"memory={self.memory!r} and cache_size={self.cache_size!r} both set the number of slots; "
                f"give one of them"
            )
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.host_memory is not None:
            parse_bytes(self.host_memory, "host_memory")
            if self.store == "ram":
                raise ValueError(
                    f"host_memory={self.host_memory!r} holds some experts in RAM and store='ram' all of them; give "
                    f"one of them"
                )
        object.__setattr__(self, "device", str(self.device))
        if self.cache_size is not None and not _is_above_zero(self.cache_size):
            raise ValueError(
                f"cache_size={self.cache_size!r} must be a finite number above 0 experts per layer"
            )
        for name, allowed in (
            ("direct_io", (True, False, None)),
            ("overlap", (True, False)),
            ("look_ahead", (True, False)),
        ):
            if not any(getattr(self, name) is value for value in allowed):
                # "false" would count as true.
                raise ValueError(f"{name}={getattr(self, name)!r} must be {' or '.join(map(str, allowed))}")
        for name in ("context", "batch", "prefill_chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        held = self.held
        if isinstance(held, bool) or not isinstance(held, int) or held < self.batch:
            raise ValueError(
                f"sequences={held!r} must be a whole number of at least batch={self.batch}: what runs together must be "
                f"held"
            )
        if self.store not in ("disk", "ram"):
            raise ValueError(f"store={self.store!r} is unknown; use 'disk' or 'ram'")
        if self.link is not None:
            parse_bandwidth(self.link)
        object.__setattr__(self, "predictor", str(self.predictor))
        if self.policy is None:
            object.__setattr__(self, "policy", "lru" if self.predictor == "none" else "plec")

    @property
    def held(self) -> int:
        """`sequences`, or one batch of them."""
        return self.batch if self.sequences is None else self.sequences

    @property
    def unit(self) -> int:
        """Sequences of a unit: two batches, or what is held if that is less."""
        return min(self.held, 2 * self.batch)

    def on_cpu(self, command: str) -> Settings:
        """The same on the CPU, for a command that knows no other device; ValueError when another was asked for."""
        if self.device not in ("auto", "cpu") or self.host_memory is not None:
            asked = f"host_memory={self.host_memory!r}" if self.host_memory else f"device={self.device!r}"
            raise ValueError(f"{asked}: `expertflow {command}` is about the CPU so far; leave it out")
        return replace(self, device="cpu")

    @classmethod
    def names(cls) -> list[str]:
        return [entry.name for entry in fields(cls)]


@dataclass(frozen=True)
class TraceSettings(Settings):
    """Settings, with more sequences at once: nobody waits for the first token of a recording."""

    batch: int = setting(8, "sequences that run at once")


@dataclass(frozen=True)
class BatchSettings(Settings):
    """Settings, with many sequences at once: what counts is tokens per second of all."""

    batch: int = setting(8, "sequences that run through the model together")
    sequences: int | None = setting(
        None, "sequences at once that the KV cache may hold, in units of two batches; default: one unit"
    )

    def __post_init__(self) -> None:
        if self.sequences is None and isinstance(self.batch, int):
            object.__setattr__(self, "sequences", 2 * self.batch)
        super().__post_init__()


@dataclass(frozen=True)
class Tracing:
    """What `expertflow trace` records. Immutable; wrong values raise ValueError with the limit."""

    prompts: int = setting(10_000, "prompts to take from the beginning of the data set")
    runs: int = setting(3, "sampled answers to each prompt")
    max_tokens: int = setting(64, "end an answer after this many tokens")
    temperature: float = setting(1.0, "randomness of the answers; 0 is greedy, and then one run is enough")
    seed: int = setting(0, "of the answers: the same seed gives the same recording")
    teacher_forced: bool = setting(
        False, "run the data set's own response in one pass instead of sampling answers: fast, one run"
    )

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("runs", 1), ("max_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r} must be finite and not below 0 (greedy)")
        if self.temperature == 0 and self.runs > 1 and not self.teacher_forced:
            raise ValueError(f"runs={self.runs} at temperature=0 would be alike; give runs=1 (--runs 1)")


_UNITS = {
    "b": 1,
    **{prefix + "b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{prefix + "ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


def parse_bytes(size: str | int, name: str = "memory") -> int:
    """Bytes in "6GiB" (2**30), "6GB" (10**9), "512 MiB", or an int of bytes.

    A bare number in text is refused: "6" could be anything. name: what the size is of, for errors.
    """
    return _parse(name, size, "'6GiB'", "'6GiB' or '6GB'", "bytes")


def parse_bandwidth(rate: str | int) -> int:
    """Bytes per second in "25GB/s", "900 MiB/s", or an int of bytes per second. Bits are refused."""
    given: str | int = rate
    if isinstance(rate, str):
        size, slash, per = rate.strip().rpartition("/")
        if not slash or per.strip() != "s":
            raise ValueError(f"link={rate!r} is not per second; write for example '2GB/s'")
        given = size.strip()
        if given.endswith("b") or given.lower().endswith("bit"):
            raise ValueError(
                f"link={rate!r} is in bits or bytes? Divide bits by 8, and write bytes with a capital B: '2GB/s'"
            )
    return _parse("link", given, "'2GB/s'", "'2GB/s' or '900MiB/s'", "bytes per second", said=rate)


def _parse(
    name: str, size: str | int, example: str, examples: str, what: str, said: str | int | None = None
) -> int:
    """A number of bytes with a unit. said: the value as the user gave it, for messages."""
    said = size if said is None else said
    if isinstance(size, bool) or not isinstance(size, (str, int)):
        raise ValueError(f"{name}={said!r} is neither text such as {example} nor a whole number of {what}")
    number: float
    if isinstance(size, int):
        number, unit = size, "b"
    else:
        text = size.strip()
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
        unit = text[len(digits) :].strip().lower()
        try:
            number = float(digits)
        except ValueError:
            raise ValueError(f"{name}={said!r} is not a size; write for example {examples}") from None
        if not number > 0:
            raise ValueError(f"{name}={said!r} must be above zero; write for example {example}")
        if not unit:
            raise ValueError(f"{name}={said!r} has no unit; {_with_unit(name, text)}")
        if unit not in _UNITS:
            raise ValueError(
                f"{name}={said!r}: unknown unit {unit!r}; use B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
            )
    if not 0 < number * _UNITS[unit] < float("inf"):
        raise ValueError(f"{name}={said!r} must be above zero and finite; write for example {example}")
    nbytes = int(number * _UNITS[unit])
    if not nbytes:
        raise ValueError(f"{name}={said!r} is less than a byte; write for example {example}")
    return nbytes


def _is_above_zero(value: object) -> bool:
    """A finite number above zero."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _with_unit(name: str, number: str) -> str:
    if name == "link":
        return f"write '{number}GB/s' if you mean gigabytes per second"
    return f"write '{number}GiB' if you mean gibibytes"


def format_bandwidth(bytes_per_second: float) -> str:
    """ "2 GB/s", "812 MB/s": three significant digits, decimal units, as links are sold."""
    magnitude, unit = bytes_per_second, "B/s"
    for larger in ("kB/s", "MB/s", "GB/s", "TB/s"):
        if magnitude < 1000:
            break
        magnitude, unit = magnitude / 1000, larger
    return f"{magnitude:.3g} {unit}"


def format_bytes(nbytes: float) -> str:
    """ "6.12 GiB", "512 MiB", "17 B": three significant digits, binary units."""
    magnitude, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(magnitude) < 1000:
            break
        magnitude, unit = magnitude / 1024, larger
    return f"{magnitude:.0f} {unit}" if unit == "B" else f"{magnitude:.3g} {unit}"
