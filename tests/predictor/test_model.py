from __future__ import annotations

import pytest
import torch

from expertflow.predictor.layers import DistanceBias, distance_buckets
from expertflow.predictor.model import (
    HORIZONS,
    PredictedModel,
    RoutingPathPredictor,
    prompts_of,
)
from expertflow.predictor.protocol import PathContext, PathPredictor, SourcePredictor
from expertflow.predictor.sizes import PredictorSizes, sizes_of
from tests.predictor.traced import FINGERPRINT

KINDS = [("causal", 0), ("paper", 0), ("causal", 2), ("paper", 2)]
PAPER_BYTES = 7.21e6


def model_of(experts: tuple[int, ...] = (8, 8, 8), source_layers: int = 0, vocab: int = 40) -> PredictedModel:
    return PredictedModel(FINGERPRINT, "made up", experts, source_layers, 2, vocab)


def predictor_of(arch: str, source_layers: int, **sizes: object) -> RoutingPathPredictor:
    """Small, and with every bias and table away from zero, so that each can make a difference."""
    torch.manual_seed(3)
    sizes = {"hidden": 16, "feed_forward": 32, "window": 8, **sizes}
    predictor = RoutingPathPredictor(sizes_of(arch, **sizes), model_of(source_layers=source_layers)).eval()
    for module in predictor.modules():
        if isinstance(module, DistanceBias):
            torch.nn.init.normal_(module.table.weight)
    for table in predictor.tables():
        torch.nn.init.normal_(table.weight)
    return predictor


def context_of(source_layers: int, num_new: int, num_tokens: int = 21) -> PathContext:
    """Three rows of 21, 15 and 12 real target tokens, prompts of 9, 5 and 4."""
    draw = torch.Generator().manual_seed(1)
    real_B = torch.tensor([num_tokens, num_tokens - 6, num_tokens - 9])
    mask_BT = torch.arange(num_tokens) >= num_tokens - real_B[:, None]
    source_mask_BS = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    return PathContext(
        target_BT=torch.randint(0, 40, (3, num_tokens), generator=draw),
        target_mask_BT=mask_BT,
        num_new=num_new,
        source_BS=torch.randint(0, 40, (3, 7), generator=draw) if source_layers else None,
        source_mask_BS=source_mask_BS if source_layers else None,
        num_prefill_B=torch.tensor([9, 5, 4]),
    )


@pytest.mark.parametrize(("arch", "source_layers"), KINDS)
def test_shapes_and_protocols(arch, source_layers):
    predictor = predictor_of(arch, source_layers)
    context = context_of(source_layers, num_new=5)
    assert isinstance(predictor, PathPredictor)
    assert predictor.predict(context).shape == (3, 5, 3 - source_layers, 8)
    if source_layers:
        assert isinstance(predictor, SourcePredictor)
        assert predictor.predict_source(context).shape == (3, 7, 2, 8)


@pytest.mark.parametrize(("arch", "source_layers"), KINDS)
def test_a_later_token_changes_no_earlier_prediction(arch, source_layers):
    predictor, context = predictor_of(arch, source_layers), context_of(source_layers, num_new=21)
    before = predictor.predict(context)
    changed_BT = context.target_BT.clone()
    changed_BT[:, 15] = (changed_BT[:, 15] + 1) % 40
    after = predictor.predict(PathContext(**{**vars(context), "target_BT": changed_BT}))
    earlier = context.target_mask_BT & (torch.arange(21) < 15)
    assert torch.equal(before[earlier], after[earlier])
    # And it does change the prediction at its own place and later ones, up to the window.
    assert (before[:, 15:19] - after[:, 15:19]).abs().amax((0, 2, 3)).min() > 1e-4


@pytest.mark.parametrize(("arch", "source_layers"), KINDS)
@pytest.mark.parametrize("pieces", [[1] * 21, [9] + [1] * 12, [20, 1], [4, 3, 14]])
def test_incremental_equals_full(arch, source_layers, pieces):
    """The window (8) is shorter than the text and than some pieces: the ring wraps in the middle of a piece."""
    predictor, context = predictor_of(arch, source_layers), context_of(source_layers, num_new=21)
    full = predictor.predict(context)
    known, known_mask = context.source_BS, context.source_mask_BS
    if known is None:
        known, known_mask = prompts_of(context.target_BT, context.target_mask_BT, context.num_prefill_B)
    state = predictor.start(known, known_mask)
    begin, found = 0, []
    for piece in pieces:
        at = slice(begin, begin + piece)
        p, _ = predictor.advance(state, context.target_BT[:, at], context.target_mask_BT[:, at])
        found.append(p)
        begin += piece
    mask = context.target_mask_BT
    torch.testing.assert_close(torch.cat(found, 1)[mask], full[mask], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("arch", "source_layers"), KINDS)
def test_padding_changes_nothing(arch, source_layers):
    predictor, context = predictor_of(arch, source_layers), context_of(source_layers, num_new=1)
    batch = predictor.predict(context)
    for row, num_real in enumerate(context.target_mask_BT.sum(1).tolist()):
        real = slice(21 - num_real, 21)
        cut = None if context.source_BS is None else int(context.source_mask_BS[row].sum())
        alone = PathContext(
            target_BT=context.target_BT[row : row + 1, real],
            source_BS=None if cut is None else context.source_BS[row : row + 1, :cut],
            num_prefill_B=context.num_prefill_B[row : row + 1],
        )
        torch.testing.assert_close(predictor.predict(alone)[0], batch[row], atol=2e-6, rtol=1e-5)


def test_a_state_follows_its_rows():
    predictor, context = predictor_of("paper", 2), context_of(2, num_new=21)
    state = predictor.start(context.source_BS, context.source_mask_BS)
    predictor.advance(state, context.target_BT[:, :20], context.target_mask_BT[:, :20])
    rows = torch.tensor([2, 0, 2])
    chosen = state.select(rows)
    expected, _ = predictor.advance(state, context.target_BT[:, 20:])
    found, _ = predictor.advance(chosen, context.target_BT[rows, 20:])
    torch.testing.assert_close(found, expected[rows], atol=2e-6, rtol=1e-5)


def test_tokens_beyond_the_window_are_forgotten():
    predictor, context = predictor_of("causal", 0, layers=1), context_of(0, num_new=1)
    before = predictor.predict(context)
    for column, matters in ((12, False), (13, True)):  # the window of 8 ends at column 20
        changed_BT = context.target_BT.clone()
        changed_BT[:, column] = (changed_BT[:, column] + 1) % 40
        after = predictor.predict(PathContext(**{**vars(context), "target_BT": changed_BT}))
        assert torch.equal(before, after) != matters


def test_paper_must_know_where_the_prompt_ends():
    context = PathContext(target_BT=torch.zeros(1, 4, dtype=torch.long), num_new=4)
    with pytest.raises(ValueError, match="num_prefill_B"):
        predictor_of("paper", 0).predict(context)
    with pytest.raises(ValueError, match="give it the source"):
        predictor_of("paper", 2).start()


def test_buckets_are_those_of_t5():
    """Values of transformers' T5Attention._relative_position_bucket (relative = key - query)."""
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 300)
    for both in (True, False):
        expected = T5Attention._relative_position_bucket(-distance, bidirectional=both)
        assert torch.equal(distance_buckets(distance, both), expected)


def test_narrow_layers_predict_no_expert_they_lack():
    predictor = RoutingPathPredictor(sizes_of(hidden=16), model_of((8, 4)))
    p = predictor.eval().predict(PathContext(target_BT=torch.zeros(1, 1, dtype=torch.long)))
    assert p[0, 0, 1, 4:].max() < 1e-9 < p[0, 0, 1, :4].min()


def test_bytes_of_the_paper_and_of_a_large_vocabulary():
    switch = PredictedModel(FINGERPRINT, "switch-128", (128,) * 12, 6, 1, 32_128)
    assert RoutingPathPredictor(sizes_of("paper"), switch).num_bytes() < PAPER_BYTES  # float32 throughout
    large = PredictedModel(FINGERPRINT, "large", (128,) * 32, 0, 8, 152_064)
    predictor = RoutingPathPredictor(sizes_of("causal"), large).compact()
    assert predictor.num_bytes() < 64e6
    assert predictor.embedding.weight.dtype == torch.bfloat16


def test_expected_passes_fall_with_the_probability_of_an_early_use():
    predictor = predictor_of("causal", 0)
    head = predictor.next_use_head
    with torch.no_grad():
        head.weight.zero_()
        bias = head.bias.view(len(HORIZONS), 3, 8)
        bias.fill_(-20)
        bias[:, 0, 1] = 20  # surely in the next pass
        bias[3:, 0, 2] = 20  # surely within 8, surely not within 4
    passes_LE = predictor.next_use(torch.zeros(2, 16))
    assert passes_LE[0, 1] == pytest.approx(1, abs=0.01)
    assert passes_LE[0, 2] == pytest.approx(8, abs=0.01)
    assert passes_LE[1, 0] == pytest.approx(32, abs=0.01)
    with pytest.raises(ValueError, match="--next-use"):
        predictor_of("paper", 0).next_use(torch.zeros(2, 16))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": 30}, "multiple of heads"),
        ({"layers": 0}, "layers=0"),
        ({"token_rank": -1}, "token_rank=-1"),
        ({"arch": "lstm"}, "lstm"),
    ],
)
def test_wrong_sizes(wrong, message):
    with pytest.raises(ValueError, match=message):
        PredictorSizes(**wrong)
