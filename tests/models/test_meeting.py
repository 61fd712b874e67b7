"""Passes that run side by side: they wait for each other, share work, and end together when one fails."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
import torch

from expertflow.models.experts import Attachment, run_experts
from expertflow.models.meeting import in_meeting, meet, run_together
from tests.models.test_experts import ScalingExperts, brute_force, multiply


def added(arguments: list[int]) -> list[int]:
    """Work that shows who was there: everybody gets the sum."""
    return [sum(arguments)] * len(arguments)


def test_a_pass_alone_does_its_work_itself() -> None:
    assert meet(0, added, 5) == 5
    assert run_together([lambda: meet(0, added, 5)]) == [5]
    assert run_together([]) == []


def test_passes_wait_for_each_other_at_the_lowest_place_first() -> None:
    """As an encoder's pass beside decoders': those start at a higher place and must wait for it to come there."""
    log: list[tuple[float, list[int]]] = []

    def noting(place: float) -> Any:
        return lambda arguments: log.append((place, arguments)) or added(arguments)

    def run(number: int, places: list[float]) -> list[int]:
        return [meet(place, noting(place), number) for place in places]

    found = run_together(
        [lambda: run(1, [2, 3]), lambda: run(10, [0, 1, 2, 3]), lambda: run(100, [2]), lambda: run(1000, [])]
    )
    assert log == [(0, [10]), (1, [10]), (2, [1, 10, 100]), (3, [1, 10])]
    assert found == [[111, 11], [10, 10, 111, 11], [111], []]


@pytest.mark.parametrize("who", ["a pass", "the work"])
def test_an_error_ends_all_passes_and_unwinds_them(who: str) -> None:
    """A greenlet left behind would keep its KV cache, and its hooks would believe that a pass is under way."""
    ended: list[int] = []

    def fail(arguments: list[int]) -> list[int]:
        raise OSError("the disk is gone")

    def run(number: int) -> int:
        try:
            meet(0, added, number)
            if who == "a pass" and number == 1:
                fail([])
            return meet(1, fail if who == "the work" else added, number)
        finally:
            ended.append(number)

    with pytest.raises(OSError, match="the disk is gone") as caught:
        run_together([lambda: run(0), lambda: run(1), lambda: run(2)])
    assert sorted(ended) == [0, 1, 2]
    assert any(entry.name == "fail" for entry in caught.traceback), "the cause is in the traceback"
    assert not in_meeting()


def test_ctrl_c_unwinds_them_too() -> None:
    ended: list[int] = []

    def run(number: int) -> None:
        try:
            meet(0, added, number)
            if number == 0:
                raise KeyboardInterrupt
            meet(1, added, number)
        finally:
            ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        run_together([lambda: run(0), lambda: run(1)])
    assert ended == [0, 1]


def test_a_pass_that_meets_while_it_is_unwound_is_ended_there() -> None:
    ended: list[str] = []

    def stubborn() -> None:
        try:
            meet(0, added, 1)
            meet(5, added, 1)
        finally:
            try:
                meet(6, added, 1)
            finally:
                ended.append("stubborn")

    def failing() -> None:
        meet(0, added, 1)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run_together([stubborn, failing])
    assert ended == ["stubborn"]


def test_each_pass_has_its_own_gradient_mode() -> None:
    """torch keeps it per thread: what one pass sets before it waits would hold for the next one."""
    seen: dict[str, list[bool]] = {"with": [], "without": []}

    def run(name: str) -> None:
        with torch.set_grad_enabled(name == "with"):
            for place in range(2):
                meet(place, added, 0)
                seen[name].append(torch.is_grad_enabled())

    with torch.no_grad():
        run_together([lambda: run("with"), lambda: run("without")])
        assert not torch.is_grad_enabled()
    assert seen == {"with": [True, True], "without": [False, False]}
    assert torch.is_grad_enabled()


def test_inference_mode_around_passes_holds_inside() -> None:
    def run() -> bool:
        meet(0, added, 0)
        return torch.is_inference_mode_enabled()

    with torch.inference_mode():
        assert run_together([run, run]) == [True, True]
    assert run_together([run, run]) == [False, False]


def test_context_variables_are_those_of_the_caller() -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")
    name.set("caller")

    def run(own: str) -> tuple[str, str]:
        before = name.get()
        name.set(own)
        meet(0, added, 0)
        return before, name.get()

    assert run_together([lambda: run("a"), lambda: run("b")]) == [("caller", "a"), ("caller", "b")]
    assert name.get() == "caller"


def test_another_thread_is_not_in_the_meeting() -> None:
    there: list[bool] = []

    def run() -> None:
        other = threading.Thread(target=lambda: there.append(in_meeting()))
        other.start()
        other.join()
        there.append(in_meeting())

    run_together([run])
    assert there == [False, True]


class CountingExperts(ScalingExperts):
    def __init__(self) -> None:
        self.opened: list[tuple[int, list[int]]] = []

    def open_layer(self, layer: int, experts: Any, meanwhile: Any = None) -> Any:
        self.opened.append((layer, sorted(experts)))
        return super().open_layer(layer, experts, meanwhile)


def test_experts_are_opened_once_for_all_passes() -> None:
    """Batches of different shapes, one of a single token and one of none; each gets its own rows back."""
    generator = torch.Generator().manual_seed(0)
    cache = CountingExperts()
    attachments = [Attachment(cache, layer, 7) for layer in range(2)]  # type: ignore[arg-type]
    calls = []
    for tokens in (1, 5, 0, 3):
        hidden = torch.randn(tokens, 6, generator=generator)
        index = torch.rand(tokens, 7, generator=generator).topk(2).indices
        calls.append((hidden, index, torch.rand(tokens, 2, generator=generator)))

    def run(hidden: Any, index: Any, weight: Any) -> list[Any]:
        return [run_experts(attachment, hidden, index, weight, multiply) for attachment in attachments]

    found = run_together([lambda call=call: run(*call) for call in calls])  # type: ignore[misc]
    used = sorted({int(expert) for _, index, _ in calls for expert in index.flatten()})
    assert cache.opened == [(0, used), (1, used)]
    for (hidden, index, weight), outs in zip(calls, found, strict=True):
        for out in outs:
            torch.testing.assert_close(out, brute_force(hidden, index, weight, 7))
