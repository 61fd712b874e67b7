"""ExpertStore: what the cache asks of a slow tier, be it disk, RAM, or RAM in front of disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from expertflow.core import ExpertId
    from expertflow.store.disk import Chunk
    from expertflow.store.layout import Part, Placement


class ExpertStore(Protocol):
    """Every expert's bytes. Every method but close may be called from any thread."""

    @property
    def experts(self) -> Mapping[ExpertId, tuple[Part, ...]]: ...

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that can hold any expert as it is read; a page multiple."""
        ...

    @property
    def io_mode(self) -> str:
        """How bytes are read, for people: "direct", "buffered (reason)", "ram", "ram (pinned)"."""
        ...

    def placement(self, expert: ExpertId) -> Placement:
        """Where reading all chunks of an expert leaves its tensors."""
        ...

    def chunks(self, expert: ExpertId) -> tuple[Chunk, ...]: ...

    def read_chunk(self, chunk: Chunk, buffer: Tensor) -> int:
        """Fill the chunk's place in buffer (a whole slot: page-aligned uint8 on the CPU).

        Returns the bytes read, fewer than the chunk's at the end of a file. OSError or ValueError when
        they cannot be had.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Loan:
    """A chunk's bytes where they lie in host memory: to be read only, and not after `close`."""

    bytes: Tensor
    close: Callable[[], None]


@runtime_checkable
class LendingStore(Protocol):
    """A store with bytes in host memory, from which a device may copy without a detour."""

    def lend_chunk(self, chunk: Chunk) -> Loan | None:
        """The bytes that read_chunk would copy, or None where they are not in memory: then read them.

        Returns at once or after reading them into memory. Raises what read_chunk raises.
        """
        ...
