"""Disturbance: how much of the processors' time others had while something was measured.

A figure taken beside a neighbour's load says more of the neighbour than of the program. Linux tells who had the
processors, to a hundredth of a second; elsewhere nothing is known, and that is said.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A fiftieth stolen, or a tenth taken by other processes, moves a wall time by about as much.
MOST_STOLEN, MOST_OTHERS = 0.02, 0.10


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Shares of all processors' time, 0 to 1; None where the system does not say."""

    stolen: float | None  # a hypervisor gave it to other machines
    others: float | None  # other processes of this machine

    @property
    def known(self) -> bool:
        return self.stolen is not None and self.others is not None

    @property
    def disturbed(self) -> bool:
        return (self.stolen or 0.0) > MOST_STOLEN or (self.others or 0.0) > MOST_OTHERS

    def __str__(self) -> str:
        if self.stolen is None or self.others is None:
            return "unknown: this system does not say who had the processors"
        return f"{self.stolen:.0%} of the processors' time stolen, {self.others:.0%} taken by other processes"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "disturbed": self.disturbed}


@dataclass(frozen=True, slots=True)
class _Seconds:
    """Of all processors, since the machine began; and this process's own."""

    busy: float
    stolen: float
    total: float
    own: float


class Watch:
    """Tells what happened since it was made."""

    def __init__(self) -> None:
        self._began = _seconds()

    def so_far(self) -> Disturbance:
        return between(self._began, _seconds())


def between(before: _Seconds | None, after: _Seconds | None) -> Disturbance:
    """Shares of the time between two readings; unknown where one is missing or no time has passed."""
    if before is None or after is None or after.total <= before.total:
        return Disturbance(None, None)
    total = after.total - before.total
    others = after.busy - before.busy - (after.own - before.own)
    return Disturbance((after.stolen - before.stolen) / total, max(0.0, others) / total)


def _seconds(stat: Path = Path("/proc/stat")) -> _Seconds | None:
    try:
        ticks = [int(ticks) for ticks in stat.read_text().split(maxsplit=9)[1:9]]
        user, nice, system, idle, iowait, irq, softirq, stolen = (t / os.sysconf("SC_CLK_TCK") for t in ticks)
    except (OSError, ValueError):
        return None
    busy = user + nice + system + irq + softirq
    own = os.times()
    return _Seconds(busy, stolen, busy + idle + iowait + stolen, own.user + own.system)
