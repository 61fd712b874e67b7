"""Admission: which waiting sequences join those that decode already, so that they share experts.

Who sits together does so for many steps, so what counts is not the path of one token but how often a sequence needs
each expert: its profile. Arrival order is left only where a profile says so, and nobody is overtaken without end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Admitted(NamedTuple):
    """rows: of those that waited, in the order they were chosen. overtaken: of the others, in their order, by how many
    that arrived later each has been overtaken so far."""

    rows: list[int]
    overtaken: list[int]


def admit(
    waiting_NLE: Tensor, sitting_MLE: Tensor, count: int, overtaken: Sequence[int], patience: int
) -> Admitted:
    """Choose `count` of those that wait to join those that sit, one after the other.

    waiting_NLE, sitting_MLE: profiles, float in [0, 1]: the share of a sequence's steps that need an expert; in order
    of arrival. The next is whoever adds the fewest activated experts in a step, compared with what it would add to as
    many drawn at random: so a sequence that uses what everybody uses is not taken before those that fit better. Ties
    go to arrival order.
    overtaken: of each that waits, by how many that arrived later already. Whoever has been overtaken by `patience` of
    them is overtaken by no other. Deterministic. Raises ValueError for profiles of other shapes, or a patience below 0.
    """
    num_waiting = len(waiting_NLE)
    if waiting_NLE.dim() != 3 or waiting_NLE.shape[1:] != sitting_MLE.shape[1:]:
        raise ValueError(
            f"profiles of shapes {tuple(waiting_NLE.shape)} and {tuple(sitting_MLE.shape)}: give rows x layers x "
            f"experts of one model"
        )
    if patience < 0:
        raise ValueError(f"patience={patience}: give 0 (arrival order) or more")
    assert len(overtaken) == num_waiting, "a sequence without a count, or a count without a sequence"
    waiting_NF, sitting_MF = waiting_NLE.flatten(1).float(), sitting_MLE.flatten(1).float()
    absent_F = (1 - sitting_MF).prod(0)  # the probability that nobody who sits needs the expert
    usual_F = 1 - torch.cat([waiting_NF, sitting_MF]).mean(0)
    num_sitting = len(sitting_MF)
    left, counts = list(range(num_waiting)), list(overtaken)
    rows: list[int] = []
    for _ in range(min(count, num_waiting)):
        end = next((at for at, row in enumerate(left) if counts[row] >= patience), len(left) - 1)
        extra_F = absent_F - usual_F ** (num_sitting + len(rows))
        at = int((waiting_NF[left[: end + 1]] @ extra_F).argmin())
        row = left.pop(at)
        for earlier in left[:at]:
            counts[earlier] += 1
        absent_F = absent_F * (1 - waiting_NF[row])
        rows.append(row)
    return Admitted(rows, [counts[row] for row in left])
