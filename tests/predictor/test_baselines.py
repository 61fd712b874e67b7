"""Every baseline says what its definition says, and nothing that it could not know."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.predictor import replay
from expertflow.predictor.baselines import SLP, TLP, Oracle, Popularity, TokenTable, multi_hot, used_by_any
from expertflow.predictor.layer_baselines import GateLookAhead, PreGate, Sharpness, inclusion_probability
from expertflow.predictor.online_table import AGEING, PRIOR, OnlineTokenTable, RouteMemory
from expertflow.predictor.protocol import (
    UNKNOWN,
    LayerPredictor,
    OnlinePredictor,
    PathContext,
    PathPredictor,
)
from tests.predictor import synthetic
from tests.predictor.synthetic import EXPERTS, LAYERS, TOP_K, VOCAB


@pytest.fixture
def group() -> replay.Group:
    return replay.pad(synthetic.sequences(6))


def fitted_table() -> TokenTable:
    return TokenTable.fit(replay.streams(synthetic.sequences(), False), EXPERTS, VOCAB)


def path_predictors() -> dict[str, PathPredictor]:
    return {
        "TLP": TLP(EXPERTS),
        "popularity": Popularity.fit(replay.streams(synthetic.sequences(), False), EXPERTS),
        "token table": fitted_table(),
        "online table": OnlineTokenTable(LAYERS, EXPERTS, TOP_K, 1 << 16),
    }


@pytest.mark.parametrize("name", path_predictors())
def test_one_call_says_what_a_call_per_step_says(name, group):
    """Causality: were a later token or route looked at, the two would differ."""
    predictor = path_predictors()[name]
    assert isinstance(predictor, PathPredictor)
    at_once = replay.all_at_once(predictor, group)
    for t in range(group.prefill, group.length):
        p_B1LE = predictor.predict(group.context(t + 1, 1))
        alive_B = group.mask_BT[:, t]
        if name == "online table":
            continue  # it also reads the routes up to the step; tested below
        torch.testing.assert_close(p_B1LE[alive_B, 0], at_once[alive_B, t])
    assert at_once.shape == (*group.ids_BT.shape, LAYERS, EXPERTS)
    assert at_once.min() >= 0
    assert at_once.max() <= 1


@pytest.mark.parametrize("name", path_predictors())
def test_the_future_changes_nothing(name, group):
    predictor = path_predictors()[name]
    t = group.prefill + 2
    context = group.context(t + 1, 1)
    routes = context.routes_BTLK.clone()
    routes[:, t] = UNKNOWN
    changed = PathContext(
        target_BT=context.target_BT, target_mask_BT=context.target_mask_BT, routes_BTLK=routes
    )
    torch.testing.assert_close(predictor.predict(context), predictor.predict(changed))


def test_tlp_repeats_the_step_before(group):
    p_BSLE = TLP(EXPERTS).predict(group.context(group.prefill + 1, 1))
    expected = multi_hot(group.routes_BTLK[:, group.prefill - 1], EXPERTS).float()
    assert torch.equal(p_BSLE[:, 0], expected)
    with pytest.raises(ValueError, match="routes_BTLK"):
        TLP(EXPERTS).predict(PathContext(target_BT=group.ids_BT))


def test_slp_repeats_the_layer_before():
    routes_BK = torch.tensor([[1, 3], [EXPERTS, 2]])
    p_BE = SLP(EXPERTS).observe(0, None, routes_BK)
    assert isinstance(SLP(EXPERTS), LayerPredictor)
    assert p_BE.nonzero().tolist() == [[0, 1], [0, 3], [1, 2]]
    assert SLP(EXPERTS).observe(0, None, None) is None


def test_tables_count():
    streams = list(replay.streams(synthetic.sequences(), False))
    used, tokens = Counter(), Counter()
    for ids_T, routes_TLK in streams:
        for token, routes_LK in zip(ids_T.tolist(), routes_TLK.tolist(), strict=True):
            tokens[token] += 1
            used.update((token, layer, e) for layer, routes_K in enumerate(routes_LK) for e in routes_K)
    p_LE = Popularity.fit(streams, EXPERTS).p_LE
    table = TokenTable.fit(streams, EXPERTS, VOCAB + 5)
    for token, layer, e in ((0, 0, 0), (1, 2, 5), (3, 1, 7)):
        everywhere = sum(used[t, layer, e] for t in tokens) / sum(tokens.values())
        assert p_LE[layer, e] == pytest.approx(everywhere)
        expected = (used[token, layer, e] + everywhere) / (tokens[token] + 1)
        said = table.predict(PathContext(target_BT=torch.tensor([[token]])))[0, 0, layer, e]
        assert said == pytest.approx(expected)
    unseen = table.predict(PathContext(target_BT=torch.tensor([[VOCAB + 2]])))[0, 0]
    torch.testing.assert_close(unseen, p_LE)
    with pytest.raises(ValueError, match="training split"):
        Popularity.fit([], EXPERTS)


def test_the_oracle_must_be_told(group):
    oracle = Oracle(EXPERTS)
    context = group.context(group.prefill + 1, 1)
    with pytest.raises(ValueError, match="reveal"):
        oracle.predict(context)
    oracle.reveal(group.routes_BTLK[:, group.prefill :][:, :1])
    truth = multi_hot(group.routes_BTLK[:, group.prefill][:, None], EXPERTS)
    assert torch.equal(oracle.predict(context) > 0.5, truth)


# ---- the online table


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=40), st.data())
def test_a_memory_is_the_last_routes_of_the_last_keys(accesses, data):
    """Against lists in a dictionary, whatever is learnt in one go."""
    ring, capacity = 3, 4
    memory = RouteMemory(capacity, ring, 1, 1, EXPERTS)
    kept: dict[int, list[int]] = {}
    left = list(accesses)
    while left:
        size = data.draw(st.integers(1, len(left)))
        now, left = left[:size], left[size:]
        keys, routes = [k for k, _ in now], torch.tensor([[[r]] for _, r in now])
        memory.learn(keys, routes)
        for key, route in now:
            history = kept.pop(key, [])
            if not history and len(kept) == capacity:
                kept.pop(next(iter(kept)))
            kept[key] = [*history, route][-ring:]
    where, count, weight = memory.counts(range(6))
    assert where.tolist() == sorted(kept)
    for row, key in enumerate(where.tolist()):
        expected = torch.zeros(EXPERTS)
        for age, route in enumerate(reversed(kept[key])):
            expected[route] += AGEING**age
        torch.testing.assert_close(count[row, 0], expected)
        assert weight[row] == pytest.approx(sum(AGEING**age for age in range(len(kept[key]))))


def test_the_online_table_prefers_the_longest_context():
    """Token 5 took another route after token 1 than after token 2."""
    table = OnlineTokenTable(1, EXPERTS, 1, 1 << 16)
    assert isinstance(table, OnlinePredictor)
    for before, expert in ((1, 3), (2, 6)):
        context = PathContext(target_BT=torch.tensor([[9, before, 5]]))
        table.observe_pass(context, torch.tensor([[[[expert]]]]))
    for before, expert in ((1, 3), (2, 6)):
        p, support = table.predict_with_support(PathContext(target_BT=torch.tensor([[9, before, 5]])))
        assert p[0, 0, 0].argmax() == expert
        assert support.item() == 3
        _, support = table.predict_with_support(PathContext(target_BT=torch.tensor([[8, before, 5]])))
        assert support.item() == 2
    p, support = table.predict_with_support(PathContext(target_BT=torch.tensor([[9, 4, 5]])))
    assert support.item() == 1
    popularity = table.popularity_LE
    weight = 1 + AGEING
    seen = torch.zeros(EXPERTS).index_add_(0, torch.tensor([3, 6]), torch.tensor([AGEING, 1.0]))
    torch.testing.assert_close(p[0, 0], (seen + PRIOR * popularity) / (weight + PRIOR))


def test_the_online_table_skips_padding():
    table = OnlineTokenTable(1, EXPERTS, 1, 1 << 16)
    context = PathContext(
        target_BT=torch.tensor([[7, 5]]), target_mask_BT=torch.tensor([[False, True]]), num_new=2
    )
    before = table.popularity_LE.clone()
    table.observe_pass(context, torch.tensor([[[[UNKNOWN]], [[2]]]]))
    _, support = table.predict_with_support(PathContext(target_BT=torch.tensor([[7, 5]]), num_new=2))
    assert support.tolist() == [[0, 1]], "a pair with padding is not a pair of tokens"
    assert table.popularity_LE[0, 2] > before[0, 2]


def test_the_online_table_stays_within_its_bytes():
    table = OnlineTokenTable(LAYERS, EXPERTS, TOP_K, 30_000)
    assert table.nbytes <= 30_000
    ids = torch.randint(0, 10_000, (1, 3000), generator=torch.Generator().manual_seed(0))
    routes = torch.randint(0, EXPERTS, (1, 3000, LAYERS, TOP_K))
    table.observe_pass(PathContext(target_BT=ids, num_new=3000), routes)
    for memory in table.memories:
        assert len(memory) == memory.capacity
        held = memory.routes_CRLK.numel() * memory.routes_CRLK.element_size()
        entry = RouteMemory.entry_bytes(memory.ring, LAYERS, TOP_K, EXPERTS)
        assert held + memory.capacity * 8 <= memory.capacity * entry
    with pytest.raises(ValueError, match=r"at least \d+"):
        OnlineTokenTable(LAYERS, EXPERTS, TOP_K, 100)


def test_the_online_table_follows_what_the_sequence_uses():
    """Token ids never seen: what the last positions used is a better guess than popularity."""
    table = OnlineTokenTable(1, EXPERTS, 1, 1 << 16)
    ids = torch.arange(20)[None]
    routes = torch.full((1, 20, 1, 1), UNKNOWN)
    routes[:, 5:19] = 4
    p = table.predict(PathContext(target_BT=ids, routes_BTLK=routes))
    assert p[0, 0, 0].argmax() == 4
    assert p[0, 0, 0, 4] > 0.5
    assert table.predict(PathContext(target_BT=ids))[0, 0, 0, 4] == pytest.approx(1 / EXPERTS)


def test_a_layer_that_sent_tokens_nowhere_is_known_to_have():
    """Its capacity was used up; such positions counted for the layers after it as if there had been none."""
    table = OnlineTokenTable(2, EXPERTS, 1, 1 << 16)
    ids = torch.arange(20)[None]
    routes = torch.full((1, 20, 2, 1), UNKNOWN)
    routes[:, 5:19, 0], routes[:, 5:19, 1] = EXPERTS, 4
    p_LE = table.predict(PathContext(target_BT=ids, routes_BTLK=routes))[0, 0]
    assert 0.5 < p_LE[1, 4] < 1
    assert p_LE[0].sum() < 0.5


def test_many_experts_fit():
    table = OnlineTokenTable(1, 300, 1, 1 << 18)
    context = PathContext(target_BT=torch.tensor([[3]]))
    table.observe_pass(context, torch.tensor([[[[299]]]]))
    assert table.predict(context)[0, 0, 0].argmax() == 299


# ---- those that read hidden states


def test_look_ahead_names_what_the_next_router_would_choose():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(EXPERTS, 16, generator=generator) for _ in range(LAYERS)]
    hidden = torch.randn(5, 16, generator=generator)
    ahead = GateLookAhead(weights, TOP_K)
    for layer in range(LAYERS - 1):
        p = ahead.observe(layer, hidden, None)
        chosen = (hidden @ weights[layer + 1].T).topk(TOP_K).indices
        assert torch.equal(multi_hot(p.topk(TOP_K).indices, EXPERTS), multi_hot(chosen, EXPERTS))
    assert ahead.observe(LAYERS - 1, hidden, None) is None
    assert ahead.observe(0, None, None) is None
    with pytest.raises(ValueError, match="16"):
        ahead.observe(0, hidden[:, :7], None)


@pytest.mark.parametrize("width", [0.01, 1.0, 30.0])
def test_look_ahead_learns_how_much_its_logits_say(width):
    """Of one expert per token among 32: what a batch of 8 uses cannot be told from blurred probabilities."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(32, 16, generator=generator) * width for _ in range(2)]
    hidden = torch.randn(640, 16, generator=generator)
    changed = hidden + 0.3 * torch.randn(640, 16, generator=generator)
    routes = [torch.zeros(640, 1, dtype=torch.int64), (changed @ weights[1].T).topk(1).indices]
    ahead = GateLookAhead(weights, 1)
    first = ahead.observe(0, hidden, routes[0])
    for start in range(0, 640, 8):
        rows = slice(start, start + 8)
        ahead.observe(0, hidden[rows], routes[0][rows])
        assert ahead.observe(1, changed[rows], routes[1][rows]) is None
    last = ahead.observe(0, hidden, routes[0])
    truth = multi_hot(routes[1], 32).float()
    entropy = torch.nn.functional.binary_cross_entropy
    assert torch.equal(first.argmax(1), last.argmax(1))
    assert entropy(last, truth) < 0.9 * entropy(first, truth)
    best = min(
        entropy(inclusion_probability(hidden @ weights[1].T * factor, 1), truth)
        for factor in torch.logspace(-4, 4, 200)
    )
    assert entropy(last, truth) < 1.05 * best


def test_look_ahead_learns_of_all_layers_at_once_as_of_each_alone():
    """Layers of two widths, more of each than are learnt in one go."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(EXPERTS if n % 2 else 12, 16, generator=generator) for n in range(24)]
    hidden = torch.randn(24, 8, 16, generator=generator)
    routes = torch.rand(24, 8, EXPERTS, generator=generator).topk(TOP_K).indices
    ahead, alone = GateLookAhead(weights, TOP_K), Sharpness(TOP_K, 24)
    for layer in range(24):
        ahead.observe(layer, hidden[layer], routes[layer])
    for layer in range(1, 24):
        logit_BE = hidden[layer - 1] @ weights[layer].T
        alone.learn([layer], logit_BE[None], routes[layer][None])
    torch.testing.assert_close(ahead.sharpness._loss_LC, alone._loss_LC)
    assert ahead.sharpness._factor_L[0] is None
    assert ahead.sharpness._factor_L[1:] == pytest.approx(alone._factor_L[1:])


def test_look_ahead_learns_of_layers_that_were_said_in_every_pass_of_a_lot():
    generator = torch.Generator().manual_seed(0)
    ahead = GateLookAhead([torch.randn(EXPERTS, 16, generator=generator) for _ in range(3)], TOP_K)
    hidden = torch.randn(4, 16, generator=generator)
    routes = torch.rand(4, EXPERTS, generator=generator).topk(TOP_K).indices
    for spoken in ((0, 1), (0,)):
        for layer in range(3):
            ahead.observe(layer, hidden if layer in spoken else None, routes)
    assert (ahead.sharpness._seen_L > 0).tolist() == [False, True, False]


def test_look_ahead_forgets_a_pass_that_was_cut_short():
    generator = torch.Generator().manual_seed(0)
    ahead = GateLookAhead([torch.randn(EXPERTS, 16, generator=generator) for _ in range(3)], TOP_K)
    hidden = torch.randn(8, 16, generator=generator)
    routes = torch.rand(8, EXPERTS, generator=generator).topk(TOP_K).indices
    for layer in (0, 1):
        ahead.observe(layer, hidden, routes)
    for layer, spoken in enumerate((True, False, False)):
        ahead.observe(layer, hidden if spoken else None, routes)
    assert (ahead.sharpness._seen_L > 0).tolist() == [False, True, False], "of the last layer nobody spoke"


def test_look_ahead_adds_the_routers_bias():
    bias = torch.zeros(EXPERTS)
    bias[6] = 100.0
    ahead = GateLookAhead([torch.zeros(EXPERTS, 4)] * 2, 1, [None, bias])
    assert ahead.observe(0, torch.ones(1, 4), None).argmax() == 6


@pytest.mark.parametrize(("experts", "top_k"), [(32, 1), (128, 1), (8, 2), (8, 7), (64, 6)])
@pytest.mark.parametrize("width", [0.1, 1.0, 5.0, 40.0])
def test_probabilities_add_up_to_the_number_chosen_in_the_order_of_the_logits(experts, top_k, width):
    logits = torch.randn(200, experts, generator=torch.Generator().manual_seed(0)) * width
    p = inclusion_probability(logits, top_k)
    assert torch.allclose(p.sum(-1), torch.full((200,), float(top_k)), rtol=1e-3)
    ordered = p.gather(1, logits.argsort(-1, descending=True))
    assert (ordered.diff() <= 0).all()


@pytest.mark.parametrize(("experts", "top_k"), [(32, 1), (60, 4), (8, 7)])
@pytest.mark.parametrize("width", [0.0, 0.1, 3.0, 40.0, 1000.0])
def test_one_row_alone_gets_what_it_gets_among_others(experts, top_k, width):
    logits = torch.randn(50, experts, generator=torch.Generator().manual_seed(0)) * width
    alone = torch.cat([inclusion_probability(row[None], top_k) for row in logits])
    torch.testing.assert_close(alone, inclusion_probability(logits, top_k))


def test_what_is_no_number_stays_none_in_one_row_as_among_others():
    logits = torch.tensor([[0.0, float("nan"), 1.0, 2.0], [float("inf"), 0.0, 1.0, 2.0]])
    together = inclusion_probability(logits, 2)
    for row, p_E in zip(logits, together, strict=True):
        torch.testing.assert_close(inclusion_probability(row[None], 2)[0], p_E, equal_nan=True)


def test_a_router_that_takes_all_is_certain():
    assert torch.equal(inclusion_probability(torch.randn(2, 3), 3), torch.ones(2, 3))


def test_the_pre_gate_learns_the_next_layers_routes():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(EXPERTS, 12, generator=generator)
    hidden = torch.randn(800, LAYERS, 12, generator=generator)
    # Layer l + 1 routes by what entered layer l.
    routes = (hidden @ weight.T).topk(TOP_K).indices.roll(1, dims=1)
    torch.manual_seed(0)
    gate = PreGate(LAYERS, 12, EXPERTS)
    gate.fit(hidden[:600], routes[:600], steps=250)
    p = gate.observe(1, hidden[600:, 1], None)
    hits = multi_hot(p.topk(TOP_K).indices, EXPERTS) & multi_hot(routes[600:, 2], EXPERTS)
    assert hits.sum() / (200 * TOP_K) > 0.7, "chance is 0.25"
    assert gate.observe(LAYERS - 1, hidden[:, 2], None) is None
    with pytest.raises(ValueError, match="no hidden states"):
        gate.fit(hidden[:0], routes[:0])
    with pytest.raises(ValueError, match="not a number"):
        gate.fit(hidden * float("nan"), routes, steps=2)


def test_what_any_token_used_is_what_all_used_together() -> None:
    draw = torch.Generator().manual_seed(0)
    routes_NLK = torch.randint(-1, EXPERTS + 1, (5, LAYERS, TOP_K), generator=draw)  # UNKNOWN and nowhere too
    assert torch.equal(used_by_any(routes_NLK, EXPERTS), multi_hot(routes_NLK, EXPERTS).any(0))
