"""What was said of rows before their pass is found again, whoever they run with by then."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from expertflow.core import MoEShape
from expertflow.models.foresight import Foresight, Name, Question
from expertflow.models.predicting import Predicting
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


@pytest.mark.parametrize("usable", [True, False])
def test_a_cache_that_is_closed_meanwhile_need_not_know_what_comes_next(usable: bool) -> None:
    """The thread that runs the passes is told of it; the one that looks ahead has nothing to add."""

    def expect_next(p_LE: list[list[float]]) -> None:
        raise RuntimeError("the expert cache is closed")

    cache: Any = SimpleNamespace(
        shape=MoEShape((3, 3)),
        expect_next=expect_next,
        usable=usable,
        timeline=None,
        begin_pass=lambda said: None,
    )
    predicting = Predicting(cache, "fake", lambda top_k: None)  # type: ignore[arg-type, return-value]
    predicting._foresight = asked()
    predicting._predictor = SimpleNamespace(soon=lambda foreseen: foreseen.p_NLE[0])  # type: ignore[assignment]
    predicting.then([[Name(2, 0)]])
    predicting._begun = 0
    with nullcontext() if not usable else pytest.raises(RuntimeError, match="is closed"):
        predicting._tell_of_next(hidden=True)
    assert predicting.stats.failed is None


def test_what_was_said_of_another_newest_token_is_not_found() -> None:
    """The row is recognised by what the cache holds, in which the newest token is not yet."""
    context = PathContext(target_BT=torch.tensor([[9]]))
    assert asked().find(Followed(context, None, torch.tensor([[2.0]]))) is None


def test_of_padding_and_of_prompts_nothing_is_found() -> None:
    ids_BT, marks_BF = torch.tensor([[1, 2], [4, 5]]), torch.tensor([[2.0], [5.0]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    foresight = asked()
    assert foresight.find(Followed(PathContext(target_BT=ids_BT, num_new=1), None, marks_BF)) is not None
    assert foresight.find(Followed(PathContext(target_BT=ids_BT, num_new=2), None, marks_BF)) is None
    assert (
        foresight.find(Followed(PathContext(target_BT=ids_BT, target_mask_BT=mask_BT), None, marks_BF))
        is None
    )


def test_rows_go_on_from_where_they_were_one_token_ago() -> None:
    """Else their predictor begins anew."""
    origins = []

    class Listens(SaysItsTokens):
        def foresee(self, context: PathContext, origin_B: Tensor | None, lane: Any) -> Foreseen:
            origins.append(None if origin_B is None else origin_B.tolist())
            return super().foresee(context, origin_B, lane)

    foresight = Foresight()
    for lane, *names in (
        ("one", ("a", 4), ("b", 7)),
        ("one", ("b", 8), ("a", 5)),
        ("two", ("a", 6), ("b", 9)),
        ("one", ("a", 6), ("b", 10)),
        ("one", ("a", 7)),
    ):
        question = Question(lane, [Name(*name) for name in names], rows(*range(len(names))))
        foresight.ask(Listens(), question)  # type: ignore[arg-type]
    assert origins == [None, [1, 0], None, None, [0]]
