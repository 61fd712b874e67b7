"""Who may join a unit, and what regrouping leaves behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from expertflow.engine.unit import Seating, Unit, arrival_order
from expertflow.scheduler.batch_state import BatchState
from expertflow.scheduler.regroup import regroup
from tests.families import FAMILIES
from tests.scheduler import caches


def unit_of(family: str, **more: Any) -> Unit:
    fields = {**FAMILIES[family].config, **more}
    with torch.device("meta"):
        model = FAMILIES[family].auto_class.from_config(AutoConfig.for_model(**fields))
    return Unit(model, rows=3, most=5, chunk=10, pad_token=0)


def waiting(*lengths: int) -> list[Any]:
    return [SimpleNamespace(prompt_ids=[5] * length) for length in lengths]


@pytest.mark.parametrize(
    ("family", "more", "lengths", "expected"),
    [
        ("qwen2_moe", {}, [], 0),
        ("qwen2_moe", {}, [4, 9], 2),
        ("qwen2_moe", {}, [4, 9, 1, 2], 3),
        # Frequencies of the longest in the batch, padding included: only prompts of one length may begin together.
        (
            "qwen2_moe",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            [4, 4, 9, 4],
            2,
        ),
        ("nllb_moe", {}, [4, 9, 1], 3),
    ],
)
def test_how_many_may_join(family: str, more: dict[str, Any], lengths: list[int], expected: int) -> None:
    unit = unit_of(family, **more)
    assert unit.room(waiting(*lengths)) == expected
    if expected:
        unit.admit(waiting(*lengths)[:expected])
        left = 3 - expected if not unit.keep_apart else min(3 - expected, 2)
        assert unit.room(waiting(*lengths)) == min(left, len(lengths)), (
            "a batch's worth of prompts is read at once"
        )


@pytest.mark.parametrize(("family", "expected"), [("qwen2_moe", 2), ("nllb_moe", 0)])
def test_models_that_count_the_batchs_length_wait_for_an_empty_batch(family: str, expected: int) -> None:
    unit = unit_of(family)
    member = SimpleNamespace(row=None)
    unit.batches = [SimpleNamespace(members=[member] * count) for count in (2, 1)]  # type: ignore[misc]
    assert unit.room(waiting(4, 4, 4)) == expected


def test_prompts_of_as_many_chunks_are_read_together() -> None:
    unit = unit_of("qwen2_moe")
    long, short, longer = waiting(18, 4, 20)
    unit.admit([long, short, longer])
    assert [prefill.rows for prefill in unit.prefills] == [[long, longer], [short]]
    assert unit.members == [long, longer, short]


def test_arrival_order_fills_batches_and_moves_nobody() -> None:
    a, b, c, d, e = (SimpleNamespace(name=name) for name in "abcde")
    batches: Any = [[a, b], [c]]
    joining: Any = [[d], [e]]
    assert arrival_order(Seating(batches, joining, 3, 2, False)) == [[a, b, d], [c, e]]
    assert arrival_order(Seating(batches[:1], joining, 3, 2, True)) == [[a, b], [d], [e]]
    assert arrival_order(Seating([], [[d, e]], 1, 2, False)) == [[d], [e]]
    assert batches == [[a, b], [c]], "what was asked about is not changed"


def test_a_cache_does_not_exist_twice_when_a_sequence_joins() -> None:
    """The KV budget is for all sequences once. A batch that grows gets new memory, so the old one must go."""
    states = [
        BatchState(caches.filled_cache("full", 0, rows, 9), caches.mask([9] * rows, 9, left=True))
        for rows in (3, 2)
    ]
    old: Any = [state.cache.layers[0] for state in states]
    sizes = [layer.keys.numel() for layer in old]
    grown, kept = regroup(states, [[(0, 0), (0, 1), (0, 2), (1, 1)], [(1, 0)]])
    assert (old[0].keys.numel(), old[0].values.numel()) == (0, 0)
    assert old[1].keys.numel() == sizes[1], "its memory is the kept batch's"
    layers: Any = (grown.cache.layers[0], kept.cache.layers[0])
    assert [len(layer.keys) for layer in layers] == [4, 1]
