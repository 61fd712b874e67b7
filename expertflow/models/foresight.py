"""What was said of sequences before their pass, kept until it begins.

Between the answer and the pass a scheduler may move sequences to other batches, some leave and others join. A pass
takes what was said of its rows, wherever they were then, if that is all of them; else the predictor is asked anew.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expertflow.models.rows import Followed
from expertflow.predictor.serving import Foreseen, PassPredictor


class Name(NamedTuple):
    """A sequence at a time: it will run its token number `position` next."""

    sequence: Hashable
    position: int


class Upcoming(NamedTuple):
    """A batch between two decode steps: its sequences, their newest tokens and what they have read."""

    names: list[Name]
    newest_B1: Tensor
    cache: Any  # transformers' KV cache
    encoder_BSD: Tensor | None = None


class Question(NamedTuple):
    """All rows of the batches of a lane, one after the other."""

    lane: Hashable
    names: list[Name]
    followed: Followed


class _Answer(NamedTuple):
    row_of: dict[Name, int]
    marks_NF: Tensor
    newest_N: Tensor
    foreseen: Foreseen


class Foresight:
    """`ask` in one thread at a time, `find` in another."""

    def __init__(self) -> None:
        self._asked: dict[
            Hashable, dict[Name, int]
        ] = {}  # rows of each lane's last question, when it was answered
        self._answers: dict[Hashable, _Answer] = {}

    def ask(self, predictor: PassPredictor, question: Question) -> Tensor | None:
        """p_NLE of the question's rows; None where the predictor says nothing."""
        lane, followed = question.lane, question.followed
        before = self._asked.pop(lane, {})
        # Only those that were asked about one token ago go on: a question may have been left out.
        origins = [before.get(Name(name.sequence, name.position - 1), -1) for name in question.names]
        origin_N = torch.tensor(origins) if min(origins) >= 0 else None
        foreseen = predictor.foresee(followed.context, origin_N, lane)
        self._asked[lane] = {name: row for row, name in enumerate(question.names)}
        if foreseen is None:
            return None
        if followed.marks_BF is not None:
            newest_N = followed.context.new_BS[:, -1]
            self._answers[lane] = _Answer(self._asked[lane], followed.marks_BF, newest_N, foreseen)
        return foreseen.p_NLE

    def of(self, names: Sequence[Name]) -> Foreseen | None:
        """What was said of those of these that somebody has asked about; None: of nobody."""
        known = [
            one.foreseen.select(torch.tensor(rows))
            for one in list(self._answers.values())
            if (rows := [one.row_of[name] for name in names if name in one.row_of])
        ]
        return Foreseen.join(known) if known else None

    def find(self, whole: Followed) -> Foreseen | None:
        """What was said of the rows of a pass that begins; None unless it is known of all of them."""
        context, marks_BF = whole.context, whole.marks_BF
        mask_BS = context.new_mask_BS
        if context.num_new != 1 or marks_BF is None or (mask_BS is not None and not bool(mask_BS.all())):
            return None
        # Of several lanes: a scheduler may have brought their rows together.
        answers = [
            one for one in list(self._answers.values()) if one.marks_NF.shape[1:] == marks_BF.shape[1:]
        ]
        if not answers:
            return None
        same_BN = (marks_BF[:, None] == torch.cat([one.marks_NF for one in answers])).all(-1)
        # The newest token is not in the cache yet.
        same_BN &= context.new_BS == torch.cat([one.newest_N for one in answers])
        if not bool(same_BN.any(1).all()):
            return None
        # Rows that are alike have read the same: what was said of one holds for the other.
        return Foreseen.join([one.foreseen for one in answers]).select(same_BN.int().argmax(1))
