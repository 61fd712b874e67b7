"""Placements: what views see is what the file holds, and where it lies depends on the file alone."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow import early_memory
from expertflow.early_memory import EARLY
from expertflow.store.layout import (
    PAGE,
    Part,
    Placement,
    View,
    aligned_buffer,
    copy_parts,
    page_aligned,
    place_packed,
    place_raw,
    tensors,
)

A, B = Path("a.safetensors"), Path("b.safetensors")


def file_bytes(path: Path, begin: int, end: int) -> torch.Tensor:
    """Made-up contents in which neighbouring places and different files differ."""
    place = torch.arange(begin, end)
    return ((place * 37 + place // 251 * 11 + (101 if path == B else 0)) % 256).to(torch.uint8)


def fill(placement: Placement, buffer: torch.Tensor) -> torch.Tensor:
    """The slow, obvious reader of runs."""
    for run in placement.runs:
        whole = file_bytes(run.path, run.file_offset, run.file_offset + run.nbytes)
        buffer[run.slot_offset : run.slot_offset + run.nbytes] = whole
    return buffer


def expected(part: Part) -> torch.Tensor:
    return file_bytes(part.path, part.offset, part.offset + part.nbytes)


def in_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def rows(role: str, offset: int, count: int, width: int = 8, index: int = 0, path: Path = A) -> Part:
    return Part(role, path, offset, count * width * 2, torch.bfloat16, (count, width), index)


@st.composite
def experts(draw, aligned: bool = True) -> list[Part]:
    parts = []
    for role in ("gate_up_proj", "down_proj", "bias"):
        dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]))
        width = draw(st.integers(1, 40))
        for index in range(draw(st.integers(1, 3))):
            step = dtype.itemsize if aligned else 1
            offset = draw(st.integers(0, 40_000)) * step
            if index and draw(st.booleans()):  # right behind its predecessor, so that some fuse
                offset = parts[-1].offset + parts[-1].nbytes
            count = draw(st.integers(0, 100))
            shape = (count, width)
            nbytes = count * width * dtype.itemsize
            parts.append(Part(role, draw(st.sampled_from([A, B])), offset, nbytes, dtype, shape, index))
    return draw(st.permutations(parts))


@given(experts())
@settings(deadline=None)
def test_raw_views_see_exactly_the_parts(parts):
    placement = place_raw(parts)
    views = tensors(fill(placement, aligned_buffer(placement.nbytes + PAGE)), placement)
    for role in {part.role for part in parts}:
        of_role = sorted((part for part in parts if part.role == role), key=lambda part: part.index)
        wanted = torch.cat([expected(part) for part in of_role])
        assert torch.equal(torch.cat([in_bytes(view) for view in views[role]]), wanted)
        assert sum(len(view) for view in views[role]) == sum(part.shape[0] for part in of_role)


@given(experts(aligned=False))
@settings(deadline=None)
def test_raw_runs_are_pages_apart_and_cover_the_parts(parts):
    placement = place_raw(parts)
    end_in_slot = 0
    end_in_file: dict[Path, int] = {}
    for run in placement.runs:
        assert run.file_offset % PAGE == run.nbytes % PAGE == run.slot_offset % PAGE == 0
        assert run.slot_offset == end_in_slot, "runs overlap or leave a hole in the slot"
        assert run.file_offset > end_in_file.get(run.path, -1), "runs share pages, so one would do"
        assert run.file_offset <= run.exact_begin < run.exact_end <= run.file_offset + run.nbytes
        assert run.exact_begin - run.file_offset < PAGE
        assert run.file_offset + run.nbytes - run.exact_end < PAGE
        end_in_slot += run.nbytes
        end_in_file[run.path] = run.file_offset + run.nbytes
    assert placement.nbytes == end_in_slot
    for part in parts:
        inside = [
            run
            for run in placement.runs
            if run.path == part.path
            and run.exact_begin <= part.offset
            and part.offset + part.nbytes <= run.exact_end
        ]
        assert len(inside) == (1 if part.nbytes else len(inside))


@given(experts(aligned=False))
@settings(deadline=None)
def test_phase_in_the_page_is_that_of_the_file(parts):
    """Kernels may treat unaligned heads apart: the same expert must lie alike in every slot and store."""
    placement = place_raw(parts)
    for role, views in placement.views.items():
        phases = [part.offset % PAGE for part in parts if part.role == role and part.nbytes]
        for view in views:
            if view.nbytes:
                assert view.slot_offset % PAGE in phases


@given(experts(aligned=False), st.sampled_from([None, torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_packed_copies_are_the_stacked_casts(parts, dtype):
    widths = {part.role: part.shape[1] for part in parts}
    assert all(part.shape[1] == widths[part.role] for part in parts)
    raw, packed = place_raw(parts), place_packed(parts, dtype)
    target = aligned_buffer(packed.nbytes + PAGE)
    copy_parts(fill(raw, aligned_buffer(raw.nbytes + PAGE)), raw, target, packed)
    for role, (view,) in tensors(target, packed).items():
        of_role = sorted((part for part in parts if part.role == role), key=lambda part: part.index)
        stacked = torch.cat([expected(part).view(part.dtype).view(part.shape) for part in of_role])
        wanted = stacked if dtype is None or not stacked.is_floating_point() else stacked.to(dtype)
        assert view.dtype == wanted.dtype
        assert view.shape == wanted.shape
        assert torch.equal(in_bytes(view.nan_to_num(7.0)), in_bytes(wanted.nan_to_num(7.0)))


def test_packed_roles_are_aligned_and_disjoint():
    packed = place_packed([rows("a", 3, 5), rows("b", 900, 7), rows("a", 5000, 2, index=1)], torch.float32)
    assert packed.views["a"] == (View(0, torch.float32, (7, 8)),)
    assert packed.views["b"] == (View(256, torch.float32, (7, 8)),)
    assert packed.nbytes == 512
    assert not packed.runs


def test_gate_then_up_fuse_into_one_view():
    placement = place_raw([rows("gate_up_proj", 512, 10), rows("gate_up_proj", 512 + 160, 10, index=1)])
    assert placement.views["gate_up_proj"] == (View(512, torch.bfloat16, (20, 8)),)


def test_up_then_gate_do_not_fuse():
    """Fused in file order they would be multiplied as each other."""
    placement = place_raw([rows("gate_up_proj", 512 + 160, 10), rows("gate_up_proj", 512, 10, index=1)])
    assert [view.slot_offset for view in placement.views["gate_up_proj"]] == [672, 512]


@pytest.mark.parametrize(
    "second",
    [
        rows("w", 672, 10, width=4, index=1),  # other width
        Part("w", A, 672, 160, torch.float16, (10, 8), 1),  # other type
        Part("w", A, 672, 160, torch.bfloat16, (10, 8, 1), 1),  # other rank
        rows("w", 688, 10, index=1),  # a hole between them
        rows("w", 672, 10, index=1, path=B),  # another file
    ],
)
def test_unlike_neighbours_stay_two_views(second):
    assert len(place_raw([rows("w", 512, 10), second]).views["w"]) == 2


def test_neighbours_share_one_run_and_distant_parts_do_not():
    near = place_raw([rows("a", 0, 10), rows("b", PAGE, 10)])  # touching pages
    far = place_raw([rows("a", 0, 10), rows("b", 2 * PAGE, 10)])
    assert [(run.file_offset, run.nbytes) for run in near.runs] == [(0, 2 * PAGE)]
    assert [(run.file_offset, run.nbytes) for run in far.runs] == [(0, PAGE), (2 * PAGE, PAGE)]


def test_tied_parts_share_their_bytes():
    placement = place_raw([rows("a", 512, 10), rows("b", 512, 10)])
    assert placement.nbytes == PAGE
    assert placement.views["a"] == placement.views["b"]


def test_placement_does_not_depend_on_the_order_of_parts():
    parts = [rows("a", 512, 10), rows("b", 9000, 10), rows("b", 100, 10, index=1, path=B)]
    assert place_raw(parts) == place_raw(parts[::-1])


def test_misaligned_parts_have_no_typed_views():
    placement = place_raw([rows("a", 513, 10)])
    assert not placement.aligned
    with pytest.raises(AssertionError, match="misaligned"):
        tensors(aligned_buffer(placement.nbytes), placement)


@pytest.mark.parametrize(
    "second",
    [
        rows("w", 672, 10, width=4, index=1),
        Part("w", A, 672, 160, torch.float16, (10, 8), 1),
        Part("w", A, 672, 2, torch.bfloat16, (), 1),
    ],
)
def test_parts_that_do_not_stack_are_refused(second):
    with pytest.raises(ValueError, match=r"a\.safetensors: the parts of w do not stack: .*download it again"):
        place_packed([rows("w", 512, 10), second], None)


def test_scalars_are_placed():
    part = Part("scale", A, 512, 4, torch.float32, ())
    raw, packed = place_raw([part]), place_packed([part], None)
    target = aligned_buffer(packed.nbytes)
    copy_parts(fill(raw, aligned_buffer(raw.nbytes)), raw, target, packed)
    assert torch.equal(in_bytes(tensors(target, packed)["scale"][0]), expected(part))


def test_views_are_not_copies():
    placement = place_raw([rows("a", 512, 10)])
    buffer = aligned_buffer(placement.nbytes)
    buffer.fill_(0)
    assert not tensors(buffer, placement)["a"][0].any()
    buffer.fill_(1)
    assert tensors(buffer, placement)["a"][0].all()


@pytest.mark.parametrize("nbytes", [1, PAGE, 3 << 20])
def test_buffers_are_aligned_zeroed_and_private(nbytes):
    buffer = aligned_buffer(nbytes)
    assert buffer.data_ptr() % mmap.PAGESIZE == 0
    assert buffer.shape == (nbytes,)
    assert not buffer.any()
    assert buffer.fill_(7).sum() == 7 * nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_copies_begin_on_pages_and_share_an_allocation(dtype: torch.dtype) -> None:
    long = torch.arange(70_000).view(700, 100).to(dtype)
    originals = [long, torch.tensor(3).to(dtype), long.t(), torch.empty(0, 7, dtype=dtype), long[::2, 1:5]]

    copies = page_aligned(originals)

    assert [copy.untyped_storage().data_ptr() for copy in copies] == [copies[0].data_ptr()] * len(copies)
    for copy, original in zip(copies, originals, strict=True):
        assert torch.equal(copy, original)
        assert copy.dtype == dtype
        assert copy.shape == original.shape
        assert copy.is_contiguous()
        assert copy.data_ptr() % mmap.PAGESIZE == 0
    copies[1].zero_()
    assert originals[1] == torch.tensor(3).to(dtype)
    assert torch.equal(copies[0], long)


def test_nothing_to_copy() -> None:
    assert page_aligned([]) == []
    (copy,) = page_aligned([torch.empty(0, 3)])
    assert copy.shape == (0, 3)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nothing is had early on a single core")
def test_copies_lie_in_memory_that_was_had_early() -> None:
    nbytes = 3 * early_memory.SMALLEST_BYTES
    EARLY.begin(nbytes)
    assert EARLY.thread is not None
    EARLY.thread.join(60)
    held = EARLY.held_bytes()
    tensors = [torch.full((nbytes // 3,), 7, dtype=torch.uint8), torch.arange(1000)]

    copies = page_aligned(tensors)

    assert held == nbytes
    assert EARLY.held_bytes() == 0
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    assert copies[0].untyped_storage().nbytes() == nbytes
