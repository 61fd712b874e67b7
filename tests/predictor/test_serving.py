"""Asked before anybody knows which rows run together, predictors say what they say when the pass begins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expertflow.predictor.model import PredictedModel, RoutingPathPredictor
from expertflow.predictor.protocol import PathContext
from expertflow.predictor.serving import ServingPredictor
from expertflow.predictor.sizes import PredictorSizes

LAYERS, EXPERTS, TOP_K, VOCAB = 3, 8, 2, 40
PASSES = 12


def new_predictor(kind: str) -> ServingPredictor:
    torch.manual_seed(0)
    trained = None
    if kind == "trained":
        model = PredictedModel({}, "tiny", (EXPERTS,) * LAYERS, 0, TOP_K, VOCAB)
        sizes = PredictorSizes(arch="causal", hidden=8, feed_forward=16, heads=2, next_use=True)
        trained = RoutingPathPredictor(sizes, model).compact().eval()
    return ServingPredictor(LAYERS, EXPERTS, TOP_K, trained)


def context_of(ids_BT: Tensor, routes_BTLK: Tensor, step: int) -> PathContext:
    """The pass over position `step`, all before it known."""
    routes_BTLK = routes_BTLK[:, : step + 1].clone()
    routes_BTLK[:, step] = -1
    return PathContext(
        target_BT=ids_BT[:, : step + 1],
        target_mask_BT=torch.ones(len(ids_BT), step + 1, dtype=torch.bool),
        num_new=1,
        routes_BTLK=routes_BTLK,
    )


@pytest.mark.parametrize("kind", ["online", "trained"])
def test_what_was_foreseen_is_what_would_be_said(kind: str) -> None:
    """Four rows that change places before each pass, through twelve passes with learning in between.

    Two lanes of two rows are asked ahead, from the state that each lane keeps; the reference asks the rows of the
    pass as they are.
    """
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, VOCAB, (4, PASSES + 1), generator=draw)
    scores = torch.rand(4, PASSES + 1, LAYERS, EXPERTS, generator=draw)
    routes_BTLK = scores.topk(TOP_K, dim=-1).indices
    asked, ahead = new_predictor(kind), new_predictor(kind)
    said = []
    before_B = torch.arange(4)
    for step in range(1, PASSES):
        order_B = torch.randperm(4, generator=draw)
        context = context_of(ids_BT[order_B], routes_BTLK[order_B], step)
        origin_B = None if step == 1 else torch.argsort(before_B)[order_B]
        before_B = order_B
        expected = asked.begin(context, origin_B)
        found = []
        for lane in range(2):
            rows = slice(2 * lane, 2 * lane + 2)
            of_lane = context_of(ids_BT[rows], routes_BTLK[rows], step)
            found.append(ahead.foresee(of_lane, None if step == 1 else torch.arange(2), lane))
        first, second = found
        assert first is not None
        assert second is not None
        together = first._replace(
            said=type(first.said)(*(torch.cat(pair) for pair in zip(first.said, second.said, strict=True))),
            absent_NCLE=None
            if first.absent_NCLE is None or second.absent_NCLE is None
            else torch.cat([first.absent_NCLE, second.absent_NCLE]),
        )
        got = ahead.begin(context, origin_B, together.select(order_B))
        assert expected is not None
        assert got is not None
        torch.testing.assert_close(got.p_LE, expected.p_LE)
        torch.testing.assert_close(got.later_LE, expected.later_LE)
        said.append(got.p_LE)
        true_BSLK = routes_BTLK[order_B][:, step : step + 1]
        asked.end(context, true_BSLK)
        ahead.end(context, true_BSLK)
    assert not torch.equal(said[0], said[-1]), "nothing was learnt: the test sees nothing"


def test_a_pass_that_was_foreseen_leaves_no_state_behind_that_missed_it() -> None:
    """The state of passes asked when they begin once went on as if it had seen the pass between."""
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, VOCAB, (2, PASSES + 1), generator=draw)
    routes_BTLK = torch.rand(2, PASSES + 1, LAYERS, EXPERTS, generator=draw).topk(TOP_K, dim=-1).indices
    asked, mixed = new_predictor("trained"), new_predictor("trained")
    for step in range(1, PASSES):
        context = context_of(ids_BT, routes_BTLK, step)
        origin_B = None if step == 1 else torch.arange(2)
        foreseen = mixed.foresee(context, None, "lane") if step % 2 else None
        expected, got = asked.begin(context, origin_B), mixed.begin(context, origin_B, foreseen)
        assert expected is not None
        assert got is not None
        torch.testing.assert_close(got.p_LE, expected.p_LE)
        for one in (asked, mixed):
            one.end(context, routes_BTLK[:, step : step + 1])


@pytest.mark.parametrize("kind", ["online", "trained"])
def test_learning_later_is_learning_the_same(kind: str) -> None:
    """What one pass leaves to be learnt is done after the next has begun to be asked at its layers."""
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, VOCAB, (2, PASSES + 1), generator=draw)
    routes_BTLK = torch.rand(2, PASSES + 1, LAYERS, EXPERTS, generator=draw).topk(TOP_K, dim=-1).indices
    now, later = new_predictor(kind), new_predictor(kind)
    jobs: list[Callable[[], None]] = []
    for step in range(1, PASSES):
        context = context_of(ids_BT, routes_BTLK, step)
        origin_B = None if step == 1 else torch.arange(2)
        foreseen = later.foresee(context, origin_B, "lane")
        expected, got = now.begin(context, origin_B), later.begin(context, origin_B, foreseen)
        assert expected is not None
        assert got is not None
        torch.testing.assert_close(got.p_LE, expected.p_LE)
        now.end(context, routes_BTLK[:, step : step + 1])
        later.end(context, routes_BTLK[:, step : step + 1], jobs.append)
        assert len(jobs) == 1
        # The next pass may have begun: what it was told must not be mixed up with what is learnt.
        later.combination.adopt(later.combination.consult(context))
        jobs.pop()()
    assert torch.equal(now.combination.before.weight_LCM, later.combination.before.weight_LCM)
