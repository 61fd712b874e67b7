"""Layout: how one expert's tensors lie in one slot, and the typed views of it.

Decides only: no file is opened and no thread started here, so planning and tests use it as it is.
Notable: a raw placement keeps each tensor's position within a 4 KiB page of its file. Slots start on
page boundaries, so a tensor's alignment depends on the checkpoint alone, never on the slot or store:
kernels that treat unaligned heads apart then return the same bits wherever an expert happens to lie.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from expertflow.early_memory import EARLY

_HUGE_PAGE = 2 << 20
PAGE = 4096  # what O_DIRECT wants of offsets, lengths and addresses on common file systems


@dataclass(frozen=True, slots=True)
class Part:
    """One contiguous byte range of one file: (part of) one tensor of one expert."""

    role: str  # target parameter, e.g. "gate_up_proj", "down_proj_bias"
    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    index: int = 0  # order among the parts of a role, which are stacked along dim 0 (gate 0, up 1)


@dataclass(frozen=True, slots=True)
class Run:
    """One read. Offsets and sizes are page multiples, so it may reach past the end of the file."""

    path: Path
    file_offset: int
    nbytes: int
    slot_offset: int
    exact_begin: int  # file offsets of the first byte needed and of the one after the last
    exact_end: int


@dataclass(frozen=True, slots=True)
class View:
    """How to see a tensor in a slot."""

    slot_offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything of one expert lies in a slot of at least `nbytes` bytes."""

    nbytes: int
    runs: tuple[Run, ...]
    views: Mapping[str, tuple[View, ...]]  # role -> views in index order

    @property
    def aligned(self) -> bool:
        """Every view starts at a multiple of its item size. Otherwise only `copy_parts` can read it."""
        return all(
            view.slot_offset % view.dtype.itemsize == 0 for views in self.views.values() for view in views
        )


def page_floor(offset: int) -> int:
    return offset // PAGE * PAGE


def page_ceil(offset: int) -> int:
    return -(-offset // PAGE) * PAGE


def place_raw(parts: Sequence[Part]) -> Placement:
    """As direct reads leave an expert: runs widened to pages, tensors where their file has them.

    Parts whose pages touch share one run. Parts of a role that come to lie side by side, in index
    order, fuse into one view (gate and up stored one after the other: one [2I, D] view).
    """
    runs: list[Run] = []
    slot_offset_of: dict[Part, int] = {}
    slot_end = 0
    stored = sorted((part for part in parts if part.nbytes), key=lambda part: (str(part.path), part.offset))
    for path, parts_of_file in groupby(stored, key=lambda part: part.path):
        for group in _touching(parts_of_file):
            begin = group[0].offset
            end = max(part.offset + part.nbytes for part in group)
            first_page = page_floor(begin)
            run = Run(path, first_page, page_ceil(end) - first_page, slot_end, begin, end)
            runs.append(run)
            slot_offset_of.update((part, slot_end + part.offset - first_page) for part in group)
            slot_end += run.nbytes
    views = {
        role: _fuse(View(slot_offset_of.get(part, 0), part.dtype, part.shape) for part in role_parts)
        for role, role_parts in _by_role(parts).items()
    }
    return Placement(slot_end, tuple(runs), MappingProxyType(views))


def _touching(parts: Iterable[Part]) -> list[list[Part]]:
    """Group parts, given in file order, so that the pages of neighbouring groups do not touch."""
    groups: list[list[Part]] = []
    end = -1
    for part in parts:
        if groups and page_floor(part.offset) <= page_ceil(end):
            groups[-1].append(part)
            end = max(end, part.offset + part.nbytes)
        else:
            groups.append([part])
            end = part.offset + part.nbytes
    return groups


def _by_role(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """Parts of each role in index order; roles in order of first appearance."""
    roles: dict[str, list[Part]] = {}
    for part in parts:
        roles.setdefault(part.role, []).append(part)
    for role, role_parts in roles.items():
        role_parts.sort(key=lambda part: part.index)
        assert len({part.index for part in role_parts}) == len(role_parts), f"{role}: an index occurs twice"
    return roles


def _fuse(views: Iterable[View]) -> tuple[View, ...]:
    fused: list[View] = []
    for view in views:
        last = fused[-1] if fused else None
        if (
            last is not None
            and view.shape
            and last.shape[1:] == view.shape[1:]
            and len(last.shape) == len(view.shape)
            and last.dtype == view.dtype
            and last.slot_offset + last.nbytes == view.slot_offset
        ):
            rows = last.shape[0] + view.shape[0]
            fused[-1] = View(last.slot_offset, last.dtype, (rows, *view.shape[1:]))
        else:
            fused.append(view)
    return tuple(fused)


def place_packed(parts: Sequence[Part], dtype: torch.dtype | None, align: int = 256) -> Placement:
    """One aligned view per role, its parts stacked along dim 0; for casts and accelerator slots.

    dtype: what floating-point parts become; None keeps them as stored. Integers stay as they are.
    ValueError when the parts of a role do not stack.
    """
    views: dict[str, tuple[View, ...]] = {}
    end = 0
    for role, role_parts in _by_role(parts).items():
        dtypes = {dtype if dtype and part.dtype.is_floating_point else part.dtype for part in role_parts}
        first = role_parts[0]
        tails = {part.shape[1:] for part in role_parts}
        scalars = sum(not part.shape for part in role_parts)
        if len(dtypes) > 1 or len(tails) > 1 or (scalars and len(role_parts) > 1):
            raise ValueError(
                f"{first.path}: the parts of {role} do not stack: "
                f"{', '.join(f'{part.dtype} {list(part.shape)}' for part in role_parts)}; "
                "the checkpoint is inconsistent: download it again"
            )
        rows = sum(part.shape[0] for part in role_parts) if first.shape else 0
        shape = (rows, *first.shape[1:]) if first.shape else ()
        view = View(-(-end // align) * align, dtypes.pop(), shape)
        views[role] = (view,)
        end = view.slot_offset + view.nbytes
    return Placement(-(-end // align) * align, (), MappingProxyType(views))


def tensors(buffer: Tensor, placement: Placement) -> dict[str, tuple[Tensor, ...]]:
    """Typed views of a slot, by role. No copy. buffer: uint8, 1-D, any device, at least nbytes long."""
    assert placement.aligned, "a misaligned expert has no typed views; copy it into a packed placement"
    return {role: tuple(_typed(buffer, view) for view in views) for role, views in placement.views.items()}


def _typed(buffer: Tensor, view: View) -> Tensor:
    return _bytes(buffer, view).view(view.dtype).view(view.shape)


def _bytes(buffer: Tensor, view: View) -> Tensor:
    return buffer[view.slot_offset : view.slot_offset + view.nbytes]


def copy_parts(
    raw_buffer: Tensor, raw: Placement, packed_buffer: Tensor, packed: Placement, non_blocking: bool = False
) -> None:
    """Copy an expert from its raw into its packed placement, casting and changing device as needed.

    Accepts misaligned raw placements. non_blocking: as for Tensor.copy_; then raw_buffer must stay as
    it is until the stream has passed.
    """
    assert raw.views.keys() == packed.views.keys(), f"{raw.views.keys()} is not {packed.views.keys()}"
    for role, raw_views in raw.views.items():
        (target_view,) = packed.views[role]
        target = _typed(packed_buffer, target_view)
        row = 0
        for view in raw_views:
            if view.slot_offset % view.dtype.itemsize:
                source = _bytes(raw_buffer, view).clone().view(view.dtype).view(view.shape)
            else:
                source = _typed(raw_buffer, view)
            if not view.shape:
                target.copy_(source, non_blocking=non_blocking)
                continue
            target[row : row + view.shape[0]].copy_(source, non_blocking=non_blocking)
            row += view.shape[0]


def page_aligned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of CPU tensors in one allocation, each on a page boundary. The last of them that is left holds it all.

    torch aligns to 64 bytes, so rows of a page's length straddle two: a decode step took 4 % longer (2 cores,
    torch 2.13, 2026-11). Huge pages gained nothing more.
    """
    nbytes = sum(page_ceil(tensor.nbytes) for tensor in tensors)
    if nbytes == 0:
        return [tensor.clone() for tensor in tensors]
    early = EARLY.take(nbytes)
    memory = _pages(nbytes) if early is None else torch.frombuffer(early, dtype=torch.uint8)
    copies, begin = [], 0
    for tensor in tensors:
        place = memory.narrow(0, begin, tensor.nbytes)
        copies.append(place.view(tensor.dtype).view(tensor.shape).copy_(tensor))
        begin += page_ceil(tensor.nbytes)
    return copies


def aligned_buffer(nbytes: int) -> Tensor:
    """Zeroed uint8 tensor of nbytes on a page boundary; pages cost memory only once touched.

    The memory goes back to the system with the last tensor that shares it.
    """
    return _pages(nbytes, huge=nbytes >= _HUGE_PAGE)


def _pages(nbytes: int, huge: bool = False) -> Tensor:
    assert nbytes > 0, nbytes
    # mmap's default is a shared mapping, which never gets huge pages and is counted as shmem.
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them; only speed is lost
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
