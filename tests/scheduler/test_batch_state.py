"""A batch's state is checked when it is made: what cannot be moved is refused, and nothing is moved silently."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    MtpCache,
    StaticLayer,
)

from expertflow.scheduler.batch_state import (
    BatchState,
    model_kwargs_of,
    position_ids,
    positions_follow_cache,
    supports,
)
from expertflow.scheduler.regroup import bytes_moved, merge, regroup
from tests.scheduler import caches
from tests.scheduler.decoding import model_of, prefill

MASK = caches.mask([2, 5], 5, left=True)


class WithMore(DynamicLayer):
    """As DeepSeek-V4's: a layer that carries a state of its own."""


def recording() -> DynamicCache:
    cache = caches.filled_cache("sliding", 4, 2, 5)
    cache.activate_past_recording()
    return cache


def offloading() -> DynamicCache:
    cache = caches.filled_cache("full", 0, 2, 5)
    cache.offloading = True
    return cache


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        (caches.cache_of([StaticLayer(8)]), "StaticLayer"),
        (caches.cache_of([DynamicIndexedLayer()]), "DynamicIndexedLayer"),
        (caches.cache_of([DynamicLayer(), WithMore()]), "WithMore"),
        (MtpCache(), "MtpCache"),
        (recording(), "assisted decoding"),
        (offloading(), "offloaded"),
        (EncoderDecoderCache(DynamicCache(), MtpCache()), "MtpCache"),
        (
            EncoderDecoderCache(DynamicCache(), caches.cache_of([DynamicSlidingWindowLayer(3)])),
            "cross-attention",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_caches_of_unknown_kinds_are_refused(cache, reason):
    assert not supports(cache)
    with pytest.raises(ValueError, match=f"cannot change batches: .*{reason}.*keep arrival order"):
        BatchState(cache, MASK)


def test_a_cache_of_preset_size_is_refused():
    cache = StaticCache(config=model_of("grouped_query").config, max_cache_len=8)
    with pytest.raises(ValueError, match="a StaticCache, not a DynamicCache"):
        BatchState(cache, MASK)


@pytest.mark.parametrize("kind", caches.KINDS)
def test_what_can_be_moved_is_supported(kind):
    assert supports(caches.filled_cache(kind, 4, 2, 5, 3))


@pytest.mark.parametrize("kind", ["full", "sliding", "mixed"])
@pytest.mark.parametrize("columns", [3, 4, 6])
def test_a_mask_of_another_length_is_refused(kind, columns):
    """generate's mask has one column more than the cache: it covers the token about to be read."""
    with pytest.raises(ValueError, match=f"covers {columns} positions and the cache has read 5"):
        BatchState(caches.filled_cache(kind, 6, 2, 5), caches.mask([2, 3], columns, left=True))


def test_padding_on_the_wrong_side_is_refused():
    cache = caches.filled_cache("full", 0, 2, 5)
    with pytest.raises(ValueError, match="pad shorter sequences on the left"):
        BatchState(cache, caches.mask([2, 5], 5, left=False))
    cache = caches.filled_cache("encoder_decoder", 0, 2, 5, 3)
    encoder_BSD = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="pad shorter sources on the right"):
        BatchState(cache, MASK, encoder_BSD, caches.mask([1, 3], 3, left=True))
    with pytest.raises(ValueError, match="both or neither"):
        BatchState(cache, MASK, encoder_BSD)
    with pytest.raises(ValueError, match=r"encoder.* has 1 sequences, the mask 2"):
        BatchState(cache, MASK, encoder_BSD[:1], caches.mask([1, 3], 3, left=False))
    with pytest.raises(ValueError, match=r"cross.* has 3 positions where its mask asks for 4"):
        BatchState(cache, MASK, torch.randn(2, 4, 4), caches.mask([1, 3], 4, left=False))


def test_rows_in_one_memory_are_refused():
    """Written in place, such a row would change all the others."""
    cache = caches.filled_cache("encoder_decoder", 0, 2, 5, 3)
    with pytest.raises(ValueError, match="share one memory"):
        BatchState(cache, MASK, torch.randn(1, 3, 4).expand(2, 3, 4), caches.mask([1, 3], 3, left=False))


def test_what_the_next_step_is_told():
    kwargs = model_kwargs_of(BatchState(caches.filled_cache("full", 0, 2, 5), MASK))
    assert kwargs["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    assert kwargs["position_ids"].tolist() == [[2], [5]]
    source_mask_BS = caches.mask([1, 3], 3, left=False)
    cache = caches.filled_cache("encoder_decoder", 0, 2, 5, 3)
    kwargs = model_kwargs_of(BatchState(cache, MASK, torch.randn(2, 3, 4), source_mask_BS))
    assert kwargs["decoder_attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    assert kwargs["attention_mask"] is source_mask_BS
    assert "position_ids" not in kwargs


def test_models_that_see_the_length_of_their_batch_are_known():
    kinds = ("sinusoids", "relative_positions", "grouped_query", "chunks")
    models = {kind: model_of(kind) for kind in kinds}
    assert [kind for kind, model in models.items() if positions_follow_cache(model)] == ["sinusoids"]
    models["chunks"].config.attn_temperature_tuning = True  # as Llama 4 is published
    assert positions_follow_cache(models["chunks"])
    rope = models["grouped_query"].config.rope_parameters
    rope["rope_type"] = "longrope"  # as PhiMoE is published
    assert positions_follow_cache(models["grouped_query"])
    models["grouped_query"].config.rope_parameters = {"full_attention": dict(rope)}
    assert positions_follow_cache(models["grouped_query"])
    rope["rope_type"] = "yarn"
    models["grouped_query"].config.rope_parameters = rope
    assert not positions_follow_cache(models["grouped_query"])


def state_of_one_length(length: int, tokens: int) -> BatchState:
    return BatchState(
        caches.filled_cache("encoder_decoder", 0, 1, length, 3),
        caches.mask([tokens], length, left=True),
        torch.randn(1, 3, 4),
        torch.ones(1, 3, dtype=torch.long),
        lengths_must_agree=True,
    )


@pytest.mark.parametrize(("length", "tokens"), [(5, 5), (5, 4)])
def test_unequal_lengths_are_refused_where_the_model_sees_them(length, tokens):
    """NLLB's sinusoids start at the cache's length: padding would shift a shorter sequence's positions."""
    short, long = state_of_one_length(4, 4), state_of_one_length(length, tokens)
    before = short.cache.self_attention_cache.layers[0].keys.clone()
    for move in (regroup, bytes_moved):
        with pytest.raises(ValueError, match=r"4 and 5 positions .* one length, without padding"):
            move([short, long], [[(0, 0), (1, 0)]])
    with pytest.raises(ValueError, match="4 and 5 positions"):
        merge([short, long])
    assert torch.equal(short.cache.self_attention_cache.layers[0].keys, before)


def test_sequences_that_keep_to_their_own_length_may_change_places():
    short, long = state_of_one_length(4, 4), state_of_one_length(5, 5)
    swapped = regroup([short, long], [[(1, 0)], [(0, 0)]])
    assert [position_ids(state).item() for state in swapped] == [5, 4]


def test_generate_of_an_encoder_decoder_gives_masks_of_all_its_parts():
    _, state = prefill(model_of("relative_positions"), [[5, 6, 7], [8]])
    assert state.mask_BT.tolist() == [[1], [1]]
    assert state.encoder_mask_BS.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert state.encoder_BSD.shape[:2] == (2, 3)
