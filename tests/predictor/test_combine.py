"""The combination: sane at once, soon calibrated, and never much worse than its best part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from expertflow.predictor import combine, replay
from expertflow.predictor.baselines import multi_hot
from expertflow.predictor.combine import Combination, Mixture, untrained
from expertflow.predictor.lots import Lots
from expertflow.predictor.metrics import guesses_at_equal_budget
from expertflow.predictor.online_table import OnlineTokenTable
from expertflow.predictor.protocol import LayerPredictor, OnlinePredictor, PathContext, PathPredictor
from tests.predictor import synthetic
from tests.predictor.synthetic import EXPERTS, LAYERS, TOP_K

ONE = torch.zeros(64, dtype=torch.int64)


def stream(steps: int, seed: int = 0, sharpness: float = 3.0):
    """Truth drawn from honest logits; yields (logits, truth), [64, 2, 16] each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        logits = torch.randn(64, 2, 16, generator=generator) * sharpness - 2
        yield logits, torch.rand(logits.shape, generator=generator) < torch.sigmoid(logits)


def loss(p: Tensor, truth: Tensor) -> float:
    return F.binary_cross_entropy(p.clamp(1e-3, 1 - 1e-3), truth.float()).item()


def everywhere(sources: int) -> Tensor:
    return torch.ones(sources, 2, dtype=torch.bool)


def test_the_start_is_the_mean_of_the_logits():
    p = torch.tensor([[[[0.9, 0.2]], [[0.5, 0.4]]]])
    mixed = Mixture(torch.ones(2, 1, dtype=torch.bool)).mix(p, ONE[:1])
    expected = torch.sigmoid(torch.logit(p).mean(1))
    torch.testing.assert_close(mixed, expected)


def test_an_absent_source_has_no_part():
    present = torch.tensor([[True, True], [False, True]])
    p = torch.rand(5, 2, 2, 4) * 0.9 + 0.05
    mixture = Mixture(present)
    torch.testing.assert_close(mixture.mix(p, ONE[:5])[:, 0], p[:, 0, 0])
    for _ in range(20):
        mixture.learn(p, torch.rand(5, 2, 4) < 0.3, ONE[:5])
    assert torch.isfinite(mixture.weight_LCM).all()
    other = p.clone()
    other[:, 1, 0] = 0.123
    torch.testing.assert_close(mixture.mix(p, ONE[:5])[:, 0], mixture.mix(other, ONE[:5])[:, 0])


def test_it_learns_to_trust_the_better_and_to_correct_the_boastful():
    """One source is right but ten times too sure of itself in logits, one is noise."""
    mixture = Mixture(everywhere(2))
    noise = torch.Generator().manual_seed(5)
    for logits, truth in stream(60):
        said = torch.stack([torch.sigmoid(logits * 2.5), torch.rand(logits.shape, generator=noise)], dim=1)
        mixture.learn(said, truth, ONE)
    mixed, boast, honest = [], [], []
    for logits, truth in stream(10, seed=9):
        said = torch.stack([torch.sigmoid(logits * 2.5), torch.rand(logits.shape, generator=noise)], dim=1)
        mixed.append(loss(mixture.mix(said, ONE), truth))
        boast.append(loss(said[:, 0], truth))
        honest.append(loss(torch.sigmoid(logits), truth))
    assert sum(mixed) < sum(boast) * 0.9
    assert sum(mixed) < sum(honest) * 1.05
    assert mixture.weight_LCM[0, 0, 0] > 5 * mixture.weight_LCM[0, 0, 1].abs()


def test_online_newton_reaches_what_logistic_regression_finds():
    mixture = Mixture(everywhere(2))
    xs, truths = [], []
    for (one, truth), (other, _) in zip(stream(80), stream(80, seed=4), strict=True):
        said = torch.sigmoid(torch.stack([one + other, one - other], dim=1) / 2)
        mixture.learn(said, truth, ONE)
        xs.append(mixture.logits(said)[:, :, 0])
        truths.append(truth[:, 0])
    x, truth = torch.cat(xs), torch.cat(truths).float()
    weight = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(torch.einsum("m,nme->ne", weight, x), truth)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(mixture.weight_LCM[0, 0], weight.detach(), atol=0.08, rtol=0.08)


def test_kinds_have_weights_of_their_own():
    """Source 0 knows kind 0, source 1 knows kind 1."""
    mixture = Mixture(everywhere(2), num_kinds=2)
    kind = torch.arange(64) % 2
    for (logits, truth), (lie, _) in zip(stream(40), stream(40, seed=7), strict=True):
        right, wrong = torch.sigmoid(logits), torch.sigmoid(lie)
        own = (kind == 0)[:, None, None]
        said = torch.stack([torch.where(own, right, wrong), torch.where(own, wrong, right)], dim=1)
        mixture.learn(said, truth, kind)
    first, second = mixture.weight_LCM[0, 0, :2], mixture.weight_LCM[0, 1, :2]
    assert first[0] > 0.7 > 0.3 > first[1].abs()
    assert second[1] > 0.7 > 0.3 > second[0].abs()


@pytest.mark.parametrize("bad", ["always", "never", "opposite", "half"])
def test_a_worthless_part_costs_little(bad):
    """From the very first steps on: the start is a plain mean, and the judge lets the better part speak."""
    mixture = Mixture(everywhere(2))
    total = alone = 0.0
    for step, (logits, truth) in enumerate(stream(60)):
        good = torch.sigmoid(logits)
        worthless = {
            "always": torch.ones_like(good),
            "never": torch.zeros_like(good),
            "opposite": 1 - good,
            "half": torch.full_like(good, 0.5),
        }[bad]
        said = torch.stack([good, worthless], dim=1)
        if step:
            total += loss(mixture.mix(said, ONE), truth)
            alone += loss(good, truth)
        mixture.learn(said, truth, ONE)
    assert total < 1.1 * alone


def test_the_better_part_speaks_while_the_mixture_is_worse():
    """Weights turned to nonsense by hand: without the judge the mixture would say the opposite."""
    mixture = Mixture(everywhere(2))
    stream_ = list(stream(3))
    said = [torch.stack([torch.sigmoid(x), torch.full_like(x, 0.5)], dim=1) for x, _ in stream_]
    mixture.weight_LCM[..., 0] = -3.0
    mixture._curvature_LCMM *= 1e9  # too sure of it to learn
    mixture.learn(said[0], stream_[0][1], ONE)
    assert mixture.speaker_L().tolist() == [1, 1]
    torch.testing.assert_close(mixture.mix(said[1], ONE), said[1][:, 0])


class Fixed:
    """A PathPredictor that always says the same."""

    def __init__(self, p_LE: Tensor):
        self.p_LE = p_LE

    def predict(self, context: PathContext) -> Tensor:
        return self.p_LE.expand(len(context.target_BT), context.num_new, *self.p_LE.shape)


class Ahead:
    """Knows the truth of the next layer."""

    def __init__(self) -> None:
        self.truth_NLE = torch.zeros(0)

    def observe(self, layer: int, hidden_BD: Tensor | None, routes_BK: Tensor | None) -> Tensor | None:
        if layer + 1 >= LAYERS:
            return None
        return self.truth_NLE[:, layer + 1].float()


def test_a_combination_is_all_three_kinds_of_predictor():
    one = untrained(LAYERS, EXPERTS, TOP_K, Ahead(), 1 << 16)
    assert isinstance(one, PathPredictor)
    assert isinstance(one, OnlinePredictor)
    assert isinstance(one, LayerPredictor)
    with pytest.raises(ValueError, match="source"):
        Combination([], LAYERS, EXPERTS)


def test_it_serves_whole_passes_and_learns_to_look_ahead():
    """Layers past the first are known exactly by a part; after some steps the combination knows them too."""
    group = replay.pad(synthetic.sequences(20, longest=60))
    ahead = Ahead()
    one = untrained(LAYERS, EXPERTS, TOP_K, ahead, 1 << 16)
    hits = budget = torch.zeros(LAYERS, dtype=torch.float64)
    for t in range(group.prefill, group.length):
        alive = int(group.mask_BT[:, t].sum())
        rows = slice(0, alive)
        context = group.context(t + 1, 1, rows)
        truth = multi_hot(group.routes_BTLK[rows, t], EXPERTS)
        ahead.truth_NLE = truth
        p_NLE = one.predict(context)[:, 0].clone()
        for layer in range(LAYERS):
            p_NE = one.observe(layer, None, None)
            assert (p_NE is None) == (layer == LAYERS - 1)
            if p_NE is not None:
                p_NLE[:, layer + 1] = p_NE
        one.observe_pass(context, group.routes_BTLK[rows, t : t + 1])
        if t > group.prefill + 20:
            got = guesses_at_equal_budget(p_NLE, truth)
            hits, budget = hits + got.hits_L, budget + got.active_L
    recall_L = hits / budget
    assert (recall_L[1:] > 0.98).all()
    assert recall_L[0] < 0.95, "nobody told it the first layer"


def test_rows_must_be_those_that_were_predicted():
    ahead = Ahead()
    one = untrained(LAYERS, EXPERTS, TOP_K, ahead, 1 << 16)
    assert one.observe(0, None, None) is None, "nothing was predicted yet"
    one.predict(PathContext(target_BT=torch.zeros(3, 4, dtype=torch.int64)))
    ahead.truth_NLE = torch.zeros(5, LAYERS, EXPERTS)
    with pytest.raises(ValueError, match="5 rows at layer 0, but 3 positions"):
        one.observe(0, None, None)


def test_padding_is_neither_learnt_nor_asked_for():
    p_LE = torch.full((LAYERS, EXPERTS), TOP_K / EXPERTS)
    one = Combination([Fixed(p_LE), OnlineTokenTable(LAYERS, EXPERTS, TOP_K, 1 << 16)], LAYERS, EXPERTS)
    context = PathContext(
        target_BT=torch.tensor([[0, 5, 6], [7, 8, 9]]),
        target_mask_BT=torch.tensor([[False, True, True], [True, True, True]]),
        num_new=3,
    )
    routes = torch.full((2, 3, LAYERS, TOP_K), -1)
    routes[context.target_mask_BT] = 1
    assert one.predict(context).shape == (2, 3, LAYERS, EXPERTS)
    assert len(one._p_NMLE) == 5
    one.observe_pass(context, routes)
    assert len(one.sources[1].memories[0]) == 5


def test_with_the_table_it_beats_each_part_on_a_text_like_stream():
    """A part that often knows the second expert, noise included, and the online table."""
    held_out = [s for s in synthetic.sequences(90, longest=60) if s.split == "test"]
    group = replay.pad(held_out)
    truth = multi_hot(group.routes_BTLK, EXPERTS)
    generator = torch.Generator().manual_seed(0)
    p_BTLE = torch.full(truth.shape, 0.12)
    p_BTLE.scatter_(3, group.routes_BTLK[..., 1:].long().clamp(min=0), 0.9)
    p_BTLE = torch.where(torch.rand(truth.shape[:3], generator=generator)[..., None] < 0.8, p_BTLE, 0.25)
    part = replay.Said(p_BTLE)
    together = replay.stepped(
        Combination([part, OnlineTokenTable(LAYERS, EXPERTS, TOP_K, 1 << 18)], LAYERS, EXPERTS),
        group,
        EXPERTS,
        [part],
    )
    table = replay.stepped(OnlineTokenTable(LAYERS, EXPERTS, TOP_K, 1 << 18), group, EXPERTS)
    late = group.mask_BT.clone()
    late[:, : group.prefill + 10] = False
    recall = [guesses_at_equal_budget(p[late].float(), truth[late]).recall for p in (together, p_BTLE, table)]
    assert recall[0] > max(recall[1:]) + 0.01


def test_more_rows_than_the_limit_are_thinned_out(monkeypatch):
    said, truth = torch.rand(200, 2, 2, 4), torch.rand(200, 2, 4) < 0.3
    whole, thinned = Mixture(everywhere(2)), Mixture(everywhere(2))
    kinds = torch.zeros(200, dtype=torch.int64)
    monkeypatch.setattr(combine, "MAX_ROWS", 10)
    thinned.learn(said, truth, kinds)
    picked = torch.linspace(0, 199, 10).long()
    whole.learn(said[picked], truth[picked], kinds[picked])
    torch.testing.assert_close(thinned.weight_LCM, whole.weight_LCM)


@pytest.mark.parametrize("speaker", [0, 2])
def test_one_layer_is_mixed_as_all_of_them_are(speaker: int) -> None:
    generator = torch.Generator().manual_seed(0)
    present_ML = torch.tensor([[True, True, True], [False, True, True]])
    mixture = Mixture(present_ML, num_kinds=4)
    mixture.weight_LCM = torch.randn(mixture.weight_LCM.shape, generator=generator)
    mixture._speaker_L = [0, 0, speaker]
    p_NMLE, kind_N = torch.rand(5, 2, 3, 7, generator=generator), torch.tensor([0, 3, 1, 1, 2])
    p_NMLE[0, :, :, 0], p_NMLE[0, :, :, 1] = 0.0, 1.0
    whole_NLE = mixture.mix(p_NMLE, kind_N)
    for layer in range(3):
        p_NME = p_NMLE[:, :, layer].numpy()
        p_NE = mixture.mix_layer(p_NME[:, :-1], p_NME[:, -1], kind_N.numpy(), layer)
        torch.testing.assert_close(torch.from_numpy(p_NE), whole_NLE[:, layer])
    for row in range(5):
        alone_1LE = mixture.mix(p_NMLE[row : row + 1], kind_N[row : row + 1])
        torch.testing.assert_close(alone_1LE, whole_NLE[row : row + 1])


def test_weights_that_ran_far_away_are_no_overflow() -> None:
    mixture = Mixture(everywhere(2))
    mixture.weight_LCM = torch.full_like(mixture.weight_LCM, -40.0)
    p_1MLE = torch.full((1, 2, 2, 3), 0.99)
    with np.errstate(all="raise"):
        assert mixture.mix(p_1MLE, ONE[:1]).max() < 1e-30
        p_ME = p_1MLE[:, :, 0].numpy()
        assert mixture.mix_layer(p_ME[:, :1], p_ME[:, 1], ONE[:1].numpy(), 0).max() < 1e-30


def test_one_row_is_mixed_with_what_was_learnt_last() -> None:
    """The mixture keeps a view of its weights, which learning replaces."""
    mixture = Mixture(everywhere(2))
    for logits, truth in stream(3):
        said = torch.stack([torch.sigmoid(logits), torch.sigmoid(-logits)], dim=1)
        alone = torch.cat([mixture.mix(said[row : row + 1], ONE[:1]) for row in range(4)])
        torch.testing.assert_close(alone, mixture.mix(said[:4], ONE[:4]))
        mixture.learn(said, truth, ONE)


def test_weights_are_learnt_from_every_lot_until_they_settle_and_then_from_one_in_a_few() -> None:
    lots: Lots[int] = Lots(lot_rows=5, settled_rows=12, every=3)
    taken = {number: lot for number in range(18) if (lot := lots.add(number, 3))}
    assert taken == {1: [0, 1], 3: [2, 3], 5: [4, 5], 11: [10, 11], 17: [16, 17]}
    lots = Lots(lot_rows=5, settled_rows=12, every=3)
    assert [lots.add(number, 6) for number in range(6)] == [[0], [1], [2], [], [], [5]]


def test_a_lot_of_passes_teaches_what_one_pass_of_as_many_rows_does() -> None:
    alone, together = (untrained(LAYERS, EXPERTS, TOP_K) for _ in range(2))
    alone._lots = Lots(lot_rows=8)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, 50, (8, 1), generator=generator)
    routes_BSLK = torch.randint(0, EXPERTS, (8, 1, LAYERS, TOP_K), generator=generator)
    for row in range(8):
        assert torch.equal(alone.before.weight_LCM, alone.before._start_LCM)
        context = PathContext(target_BT=ids_BT[row : row + 1])
        alone.adopt(alone.consult(context))
        # What the table learns meanwhile is not what is compared here.
        alone.observe_pass(context, routes_BSLK[row : row + 1])
        alone.sources = untrained(LAYERS, EXPERTS, TOP_K).sources
    context = PathContext(target_BT=ids_BT)
    together.predict(context)
    together.observe_pass(context, routes_BSLK)
    assert not torch.equal(together.before.weight_LCM, together.before._start_LCM)
    torch.testing.assert_close(alone.before.weight_LCM, together.before.weight_LCM)


def test_what_was_seen_is_noted_after_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixture rests in most passes, and the table must not: the next tokens may be those of this pass."""
    combination = untrained(2, 8, 2)
    combination._lots = Lots(lot_rows=1, settled_rows=0, every=3)
    learnt: list[int] = []
    monkeypatch.setattr(combination.before, "learn", lambda *args: learnt.append(number))
    (table,) = combination.sources
    for number in range(9):
        context = PathContext(target_BT=torch.tensor([[7, number]]))
        routes_BSLK = torch.full((1, 1, 2, 2), number % 8)
        combination.predict(context)
        combination.observe_pass(context, routes_BSLK)
        p_1LE = table.predict(context)[0]
        assert (p_1LE.argmax(-1) == number % 8).all()
    assert learnt == [2, 5, 8]


def pass_of(rows: int, seed: int) -> tuple[PathContext, Tensor]:
    """Tokens of as many texts, and the routes of their pass."""
    generator = torch.Generator().manual_seed(seed)
    context = PathContext(target_BT=torch.randint(0, 50, (rows, 1), generator=generator))
    return context, torch.randint(0, EXPERTS, (rows, 1, LAYERS, TOP_K), generator=generator)


def test_of_a_pass_with_padding_is_learnt_what_is_learnt_without_it() -> None:
    padded, plain = (untrained(LAYERS, EXPERTS, TOP_K) for _ in range(2))
    context, routes_BSLK = pass_of(9, seed=0)
    real_B = torch.arange(9) != 4
    routes_BSLK[4] = -1
    for one, ids_BT, mask_BT, came in (
        (padded, context.target_BT, real_B[:, None], routes_BSLK),
        (plain, context.target_BT[real_B], None, routes_BSLK[real_B]),
    ):
        context = PathContext(target_BT=ids_BT, target_mask_BT=mask_BT)
        one.predict(context)
        one.observe_pass(context, came)
    assert not torch.equal(plain.before.weight_LCM, plain.before._start_LCM)
    torch.testing.assert_close(padded.before.weight_LCM, plain.before.weight_LCM)


def test_where_look_ahead_missed_a_pass_of_the_lot_only_the_others_learn() -> None:
    ahead = Ahead()
    one = untrained(LAYERS, EXPERTS, TOP_K, ahead)
    for number in range(2):
        context, routes_BSLK = pass_of(4, seed=number)
        one.predict(context)
        if number == 0:
            ahead.truth_NLE = multi_hot(routes_BSLK[:, 0], EXPERTS)
            assert one.observe(0, None, None) is not None
        one.observe_pass(context, routes_BSLK)
    assert not torch.equal(one.before.weight_LCM, one.before._start_LCM)
    assert torch.equal(one.during.weight_LCM, one.during._start_LCM)


def test_what_was_said_is_judged_once_and_by_its_own_pass() -> None:
    """Passes that nobody asked about are learnt from as well, but by the table alone."""
    ahead = Ahead()
    one = untrained(LAYERS, EXPERTS, TOP_K, ahead)
    context, routes_BSLK = pass_of(4, seed=0)
    ahead.truth_NLE = multi_hot(routes_BSLK[:, 0], EXPERTS)
    one.predict(context)
    one.observe(0, None, None)  # and it does not come to its end
    context, routes_BSLK = pass_of(8, seed=1)
    one.predict(context)
    one.observe_pass(context, routes_BSLK)
    learnt_LCM = one.before.weight_LCM.clone()
    assert not torch.equal(learnt_LCM, one.before._start_LCM)
    assert torch.equal(one.during.weight_LCM, one.during._start_LCM)
    one.observe_pass(*pass_of(8, seed=2))
    one.predict(context)
    one.observe_pass(*pass_of(9, seed=3))
    assert torch.equal(one.before.weight_LCM, learnt_LCM)
