"""Settings: one dataclass, from which the keyword arguments and the command line flags are made.

A value and its help text appear here once. Every setting has an effect somewhere and a test that sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
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
        "who foretells which experts are needed, to prefetch them: none, online (learns while it serves), or a "
        "folder of train-predictor; same output",
    )
    store: str = setting(
        "disk", "where the other experts are: disk (read in place) or ram (all copied there)"
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
        if self.cache_size is not None and not self.cache_size > 0:
            raise ValueError(f"cache_size={self.cache_size} must be above 0 experts per layer")
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

    @classmethod
    def names(cls) -> list[str]:
        return [entry.name for entry in fields(cls)]


@dataclass(frozen=True)
class TraceSettings(Settings):
    """Settings, with more sequences at once: nobody waits for the first token of a recording."""

    batch: int = setting(8, "sequences that run at once")


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


def parse_bytes(size: str | int) -> int:
    """Bytes in "6GiB" (2**30), "6GB" (10**9), "512 MiB", or an int of bytes.

    A bare number in text is refused: "6" could be anything.
    """
    if isinstance(size, bool) or not isinstance(size, (str, int)):
        raise ValueError(f"memory={size!r} is neither text such as '6GiB' nor a whole number of bytes")
    if isinstance(size, int):
        number, unit = float(size), "b"
    else:
        text = size.strip()
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
        unit = text[len(digits) :].strip().lower()
        try:
            number = float(digits)
        except ValueError:
            raise ValueError(f"memory={size!r} is not a size; write for example '6GiB' or '6GB'") from None
        if not number > 0:
            raise ValueError(f"memory={size!r} must be above zero; write for example '6GiB'")
        if not unit:
            raise ValueError(f"memory={size!r} has no unit; write '{size}GiB' if you mean gibibytes")
        if unit not in _UNITS:
            raise ValueError(
                f"memory={size!r}: unknown unit {unit!r}; use B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
            )
    if not 0 < number < float("inf"):
        raise ValueError(f"memory={size!r} must be above zero and finite; write for example '6GiB'")
    return int(number * _UNITS[unit])


def format_bytes(nbytes: float) -> str:
    """ "6.12 GiB", "512 MiB", "17 B": three significant digits, binary units."""
    magnitude, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(magnitude) < 1000:
            break
        magnitude, unit = magnitude / 1024, larger
    return f"{magnitude:.0f} {unit}" if unit == "B" else f"{magnitude:.3g} {unit}"
