"""How fast this machine computes just now.

A virtual machine's processor can take half as long again for the same work without any of it being counted as stolen
(a neighbour on the same core's other thread, a lower clock). What is predicted from one run and measured in another
then differs by what the machine did, and the share that was stolen does not tell. So between the steps of a run a
few steps of another model instance are timed, the same each time: its pace, in seconds. Costs are per pace.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from expertflow.engine.llm import LLM
from expertflow.kv_name import KV_CACHE, kv_cache_of
from expertflow.sim.hardware import Costs

GAUGED_STEPS = 4
BLOCK = 8  # steps of a run between two looks at the pace


class Gauge:
    """A model with experts in RAM and no link, whose steps from the same text are timed again and again."""

    def __init__(self, folder: Path, batch: int, cache_size: float, context: int):
        self.llm = LLM(folder, store="ram", cache_size=cache_size, batch=batch, context=context)
        self._past: Any = None
        self._next_BT: Tensor | None = None

    @torch.no_grad()
    def read(self, ids_BT: Tensor) -> None:
        """The text: all but its last GAUGED_STEPS tokens are read now, those whenever the pace is asked for."""
        model: Any = self.llm.model
        self._past = kv_cache_of(model(ids_BT[:, :-GAUGED_STEPS], use_cache=True))
        self._next_BT = ids_BT[:, -GAUGED_STEPS:]
        for _ in range(2):  # from the second time on the same experts are there when it begins
            self.seconds()

    @torch.no_grad()
    def seconds(self) -> float:
        """Of GAUGED_STEPS decode steps. Raises RuntimeError before there is a text."""
        if self._next_BT is None:
            raise RuntimeError("a gauge wants a text; call read() first")
        past = copy.deepcopy(self._past)
        model: Any = self.llm.model
        began = time.perf_counter()
        for id_B in self._next_BT.T:
            model(id_B[:, None], use_cache=True, **{KV_CACHE: past})
        return time.perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.llm.close()


def at_pace(costs: Costs, pace: float) -> Costs:
    """Costs that are per pace, at that pace. A throttled link keeps to the clock, so its time stays."""
    return replace(
        costs,
        expert_s=costs.expert_s * pace,
        dense_s=costs.dense_s * pace,
        pass_s=costs.pass_s * pace,
        ahead_s=costs.ahead_s * pace,
        miss_s=costs.miss_s * pace,
        call_s=costs.call_s * pace,
        wake_s=costs.wake_s * pace,
    )
