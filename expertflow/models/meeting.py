"""Meetings: several forward passes side by side in one thread, which wait for each other at agreed places.

Joint execution (`run_together`) runs each pass in a greenlet. Where passes could share work they call `meet`: it holds
them until all the others have come as far, then does the work once for all that are there. No change to any model, and
no second thread: exactly one pass runs at any time. Knows nothing of experts and predictors.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

Argument = TypeVar("Argument")
Result = TypeVar("Result")

START, END = -1.0, math.inf  # places before and behind all others


@dataclass(slots=True)
class _Waiting:
    """A pass at a place, with what it wants done there."""

    place: float
    work: Callable[[list[Any]], Sequence[Any]]
    argument: Any


class _Pass(greenlet):
    """One pass under way. Its parent is whoever called run_together."""

    def __init__(self, run: Callable[[], Any]):
        super().__init__(run)
        self.gr_context = contextvars.copy_context()  # a greenlet's own would be empty
        self.grad = torch.is_grad_enabled()

    def resume(self, value: Any) -> Any:
        """Run it until it meets or ends. Gradient modes belong to the thread, and each pass has its own."""
        mine = torch.is_grad_enabled()
        torch.set_grad_enabled(self.grad)
        try:
            return self.switch(value) if self else self.switch()
        finally:
            self.grad = torch.is_grad_enabled()
            torch.set_grad_enabled(mine)


def in_meeting() -> bool:
    """Whether the pass that runs now was begun by run_together."""
    return isinstance(getcurrent(), _Pass)


def meet(place: float, work: Callable[[list[Argument]], Sequence[Result]], argument: Argument) -> Result:
    """`work` on the arguments of all passes that come to `place`, in their order; returns this pass's result.

    All passes that meet in a place bring the same kind of work; it is done once, by one of them. Outside of
    run_together, it is done for this one alone. What `work` raises ends all passes.
    """
    current = getcurrent()
    if not isinstance(current, _Pass):
        (result,) = work([argument])
        return result
    hub = current.parent
    assert hub is not None, "a pass without the one who began it"
    return hub.switch(_Waiting(place, work, argument))


def run_together(passes: Sequence[Callable[[], Result]]) -> list[Result]:
    """What each pass returns. They run in turn, and the lowest place where one waits is dealt with first.

    The first error ends them all and is raised; the others are unwound, so their `finally` blocks run.
    """
    running = [_Pass(run) for run in passes]
    results: list[Any] = [None] * len(running)
    waiting: dict[int, _Waiting] = {}
    inference = torch.is_inference_mode_enabled()
    going: dict[int, Any] = dict.fromkeys(range(len(running)))
    try:
        while going:
            for number, value in going.items():
                said = running[number].resume(value)
                if running[number].dead:
                    results[number] = said
                else:
                    assert isinstance(said, _Waiting), "a pass was left other than by meet"
                    assert torch.is_inference_mode_enabled() == inference, (
                        "inference mode is entered around passes"
                    )
                    waiting[number] = said
            going = _next_meeting(waiting)
        return results
    finally:
        # Only after an error is any of them alive. A pass that meets again while it is unwound is ended there too.
        for one in running:
            while not one.dead:
                one.throw()


def _next_meeting(waiting: dict[int, _Waiting]) -> dict[int, Any]:
    """Do the work of the lowest place; the passes that waited there, with what they get."""
    if not waiting:
        return {}
    place = min(call.place for call in waiting.values())
    there = {number: waiting[number] for number in sorted(waiting) if waiting[number].place == place}
    for number in there:
        del waiting[number]
    first, *_ = there.values()
    results = first.work([call.argument for call in there.values()])
    return dict(zip(there, results, strict=True))
