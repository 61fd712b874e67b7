"""What was said of rows before their pass is found again, whoever they run with by then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expertflow.models.foresight import Foresight, Name, Question
from expertflow.models.rows import Followed
from expertflow.predictor.combine import Opinions
from expertflow.predictor.protocol import PathContext
from expertflow.predictor.serving import Foreseen


class SaysItsTokens:
    """p of every expert is a hundredth of the row's newest token."""

    def foresee(self, context: PathContext, origin_B: Tensor | None, lane: Any) -> Foreseen:
        p_NLE = (context.new_BS / 100).reshape(-1, 1, 1).expand(-1, 2, 3)
        return Foreseen(Opinions(p_NLE[:, None], torch.zeros(len(p_NLE), dtype=torch.int64), p_NLE))


def rows(*tokens: int) -> Followed:
    """Each row is marked by its token."""
    ids_B1 = torch.tensor(tokens)[:, None]
    return Followed(PathContext(target_BT=ids_B1), None, ids_B1.float())


def asked() -> Foresight:
    foresight = Foresight()
    for lane, tokens in enumerate([(1, 2, 3), (4, 5)]):
        names = [Name(token, 0) for token in tokens]
        foresight.ask(SaysItsTokens(), Question(lane, names, rows(*tokens)))  # type: ignore[arg-type]
    return foresight


def test_rows_of_several_lanes_are_found_together() -> None:
    found = asked().find(rows(5, 2, 4, 1))
    assert found is not None
    assert found.p_NLE[:, 0, 0].tolist() == torch.tensor([0.05, 0.02, 0.04, 0.01]).tolist()


def test_what_was_said_is_found_by_names_as_far_as_anything_was() -> None:
    foresight = asked()
    found = foresight.of([Name(2, 0), Name(7, 0), Name(5, 0), Name(3, 1)])
    assert found is not None
    assert found.p_NLE[:, 0, 0].tolist() == torch.tensor([0.02, 0.05]).tolist()
    assert foresight.of([Name(7, 0), Name(3, 1)]) is None
    assert foresight.of([]) is None


def test_nothing_is_found_unless_it_is_known_of_all_rows() -> None:
    assert asked().find(rows(1, 6)) is None
    assert Foresight().find(rows(1)) is None
