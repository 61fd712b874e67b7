"""Drafts: a step run before without its experts. It says what the routers will choose, and leaves nothing behind."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from expertflow import LLM, SamplingParams
from expertflow.engine.engine import Engine
from expertflow.kv_name import KV_CACHE, kv_cache_of
from expertflow.models.draft import Draft
from expertflow.models.running_pass import Call
from tests.families import FAMILIES, write_checkpoint
from tests.models.test_predicting import answers, load

# Grouped, sliding-window, latent and cross attention; one expert per token, and shared experts beside the routed.
DRAFTED = ("mixtral", "gpt_oss", "deepseek_v2", "deepseek_moe", "phimoe", "switch_safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen2_moe", tmp_path_factory.mktemp("draft") / "qwen2_moe")


@pytest.mark.parametrize("name", [name for name in DRAFTED if name in FAMILIES])
def test_no_bit_changes_whatever_the_attention(name: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(name, tmp_path / name)
    tokens, logits = answers(load(checkpoint, name), name)
    model = load(checkpoint, name, predictor="draft")
    for _ in range(2):
        for each, expected in zip(answers(model, name), (tokens, logits), strict=True):
            assert torch.equal(each, expected)
    stats = model.expertflow.predicting.stats
    assert stats.failed is stats.draft_failed is None
    assert stats.draft_seconds > 0, "no draft was made, so nothing was shown"


def drafting(folder: Path) -> tuple[Any, Draft, Call, Any]:
    """A model, its draft, a call for the next token of two sequences, and their KV cache."""
    model = load(folder, "qwen2_moe", predictor="draft")
    ids = torch.tensor([[40, 41, 42], [50, 51, 52]])
    with torch.no_grad():
        cache = kv_cache_of(model(input_ids=ids, use_cache=True))
    newest = torch.tensor([[43], [53]])
    draft = model.expertflow.predicting.draft
    return model, draft, Call((), {"input_ids": newest, KV_CACHE: cache, "use_cache": True}), cache


def test_it_says_what_routers_choose_before_any_expert_has_spoken(folder: Path) -> None:
    """The first MoE layer's input has no expert in it: its draft is the truth. Probabilities add up to top-k."""
    model, draft, call, _ = drafting(folder)
    p_N1LE = draft.p_N1LE([call], inference=False)
    assert p_N1LE is not None
    routes: list[torch.Tensor] = []
    model.expertflow.predicting.routed = lambda layer, index_TK: routes.append(index_TK.clone())
    with torch.no_grad():
        model(**call.kwargs)
    top_k = routes[0].shape[1]
    layers, experts = len(routes), model.expertflow.cache.shape.experts_per_layer[0]
    assert p_N1LE.shape == (2, 1, layers, experts)
    assert torch.equal(p_N1LE[:, 0, 0].topk(top_k).indices.sort().values, routes[0].sort().values)
    torch.testing.assert_close(p_N1LE.sum(-1), torch.full((2, 1, layers), float(top_k)))


def test_each_layer_is_told_as_its_router_speaks(folder: Path) -> None:
    """Of two calls that run together the second adds its rows to those of the first."""
    _, draft, call, _ = drafting(folder)
    told: list[tuple[int, torch.Tensor]] = []
    p_N1LE = draft.p_N1LE([call, call], False, lambda layer, p_E: told.append((layer, p_E)))
    assert p_N1LE is not None
    layers = p_N1LE.shape[2]
    assert [layer for layer, _ in told] == [*range(layers)] * 2
    assert torch.equal(p_N1LE[:2], p_N1LE[2:])
    for (layer, p_E), rows in zip(told, [2] * layers + [4] * layers, strict=True):
        torch.testing.assert_close(p_E, 1 - (1 - p_N1LE[:rows, 0, layer]).prod(0))


def test_experts_are_fetched_while_a_draft_runs(folder: Path) -> None:
    model, draft, _, _ = drafting(folder)
    cache, fetched = model.expertflow.cache, []
    draft_of = draft.p_N1LE

    def watched(*args: Any) -> Any:
        before = cache.stats.prefetches
        found = draft_of(*args)
        fetched.append(cache.stats.prefetches - before)
        return found

    draft.p_N1LE = watched  # type: ignore[method-assign]
    answers(model, "qwen2_moe")
    assert sum(fetched) > 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_kv_cache_is_put_back(folder: Path, fails: bool) -> None:
    """To the very tensors; after an error in the middle of the stack as well."""
    model, draft, call, cache = drafting(folder)
    before = [(layer.keys, layer.values) for layer in cache.layers]
    if fails:
        last = model.model.layers[-1].mlp
        last.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draft.p_N1LE([call], inference=False)
    else:
        draft.p_N1LE([call], inference=False)
    assert not draft.running
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert layer.keys is keys
        assert layer.values is values
    assert cache.get_seq_length() == 3


def test_a_cache_that_was_empty_is_empty_again(folder: Path) -> None:
    _, draft, call, _ = drafting(folder)
    empty = DynamicCache()
    draft.p_N1LE([Call((), {**call.kwargs, KV_CACHE: empty})], inference=False)
    assert empty.layers == []


def test_a_cache_that_may_keep_more_than_its_layers_is_refused(folder: Path) -> None:
    """MiniMax's is a DynamicCache with recurrent states beside its layers; a draft would have moved them on."""

    class WithMore(DynamicCache):
        pass

    _, draft, call, _ = drafting(folder)
    with pytest.raises(ValueError, match="KV cache of type WithMore"):
        draft.p_N1LE([Call((), {**call.kwargs, KV_CACHE: WithMore()})], inference=False)


def test_a_thread_goes_without_while_another_one_drafts(folder: Path) -> None:
    """They would write into each other's notes."""
    _, draft, call, _ = drafting(folder)
    alone, found = draft.p_N1LE([call], False), []

    def draft_too(*_: Any) -> None:
        other = threading.Thread(target=lambda: found.append(draft.p_N1LE([call], False)))
        other.start()
        other.join()

    hook = draft.stack.layers[0].register_forward_pre_hook(draft_too)
    first = draft.p_N1LE([call], False)
    hook.remove()
    assert found == [None]
    assert alone is not None
    assert first is not None
    assert torch.equal(first, alone)
    assert draft.p_N1LE([call], False) is not None


def test_random_numbers_are_those_of_a_run_without(folder: Path) -> None:
    _, draft, call, _ = drafting(folder)

    def draw(*_: Any) -> None:
        torch.rand(3)

    draft.stack.layers[0].register_forward_pre_hook(draw)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    draft.p_N1LE([call], False)
    assert torch.equal(torch.rand(2), expected)


def test_without_a_cache_there_is_no_draft(folder: Path) -> None:
    _, draft, call, _ = drafting(folder)
    assert draft.p_N1LE([Call((), {**call.kwargs, KV_CACHE: None})], inference=False) is None


def test_another_thread_that_runs_the_model_is_in_no_draft(folder: Path) -> None:
    """It would get zeros for its experts."""
    _, draft, call, _ = drafting(folder)
    seen = []

    def look(*_: Any) -> None:
        other = threading.Thread(target=lambda: seen.append(draft.running))
        other.start()
        other.join()
        seen.append(draft.running)

    draft.stack.layers[0].register_forward_pre_hook(look)
    draft.p_N1LE([call], inference=False)
    assert seen == [False, True]


def test_a_cache_that_cannot_be_put_back_ends_drafts_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen3-Next's linear attention writes its state over the old one."""
    name = "qwen3_next"
    checkpoint = write_checkpoint(name, tmp_path / name)
    expected = answers(load(checkpoint, name), name)
    model = load(checkpoint, name, predictor="draft")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for each, same in zip(answers(model, name), expected, strict=True):
                assert torch.equal(each, same)
    assert len([record for record in caplog.records if "no draft is made any more" in record.message]) == 1
    predicting = model.expertflow.predicting
    predicting.reset_stats()
    assert predicting.stats.failed is None
    assert "cannot put back what it adds to a KV cache with LinearAttention" in predicting.stats.draft_failed


def test_its_second_kv_cache_is_in_the_budget(folder: Path) -> None:
    plans = {}
    for predictor in ("online", "draft"):
        with LLM(folder, cache_size=2, predictor=predictor, batch=2, context=64) as llm:
            plans[predictor] = llm.experts.plan
    assert plans["draft"].predictor_bytes - plans["online"].predictor_bytes == plans["draft"].kv_bytes > 0


@pytest.mark.parametrize("execution", ["split", "joint"])
def test_units_of_two_batches_draft_each_of_them(folder: Path, execution: str) -> None:
    prompts = [[40 + n, 41, 42 + n] for n in range(4)]
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    texts = {}
    for predictor in ("none", "draft"):
        settings: dict[str, Any] = {"cache_size": 3, "batch": 2, "sequences": 4, "context": 64}
        with LLM(folder, predictor=predictor, **settings) as llm:
            with Engine(llm, execution=execution) as engine:  # type: ignore[arg-type]
                outputs = engine.generate(prompts, params)
            texts[predictor] = [output.outputs[0].token_ids for output in outputs]
            if predictor == "draft":
                stats = llm.experts.predicting.stats
                assert stats.failed is stats.draft_failed is None
                assert stats.draft_seconds > 0
    assert texts["draft"] == texts["none"]


def test_schedule_auto_wants_somebody_who_foresees_earlier(folder: Path) -> None:
    with (
        LLM(folder, cache_size=2, predictor="draft", batch=2, sequences=8, context=64) as llm,
        pytest.raises(ValueError, match="predictor='draft' says it when a pass begins"),
    ):
        Engine(llm, schedule="auto")
