"""Everything that generates text in transformers does so on our models, with the same tokens."""

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    TextIteratorStreamer,
    pipeline,
)

from expertflow.config import Settings
from expertflow.models.attach import ExpertFlowConfig
from expertflow.models.continuous import pages_for
from tests.families import FAMILIES, PAD, VOCAB_SIZE, write_checkpoint

SMALL = {"cache_size": 1.5, "context": 64, "batch": 4}


def load(name: str, folder: Any, **settings: Any) -> PreTrainedModel:
    config = ExpertFlowConfig(**{**SMALL, **settings})
    return FAMILIES[name].auto_class.from_pretrained(folder, quantization_config=config)


def prompts(sequences: int = 2, tokens: int = 17, padding: int = 5) -> dict[str, Tensor]:
    """Random tokens; the first sequence is left-padded."""
    ids = torch.randint(4, VOCAB_SIZE, (sequences, tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe", "switch"])
def pair(request, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Our model beside transformers' own, on one checkpoint."""
    name = request.param
    folder = write_checkpoint(name, tmp_path_factory.mktemp(name))
    ours = load(name, folder)
    theirs = FAMILIES[name].auto_class.from_pretrained(folder)
    yield SimpleNamespace(name=name, folder=folder, ours=ours, theirs=theirs)
    ours.expertflow.close()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Iterator[SimpleNamespace]:
    folder = write_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))
    ours = load("mixtral", folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    yield SimpleNamespace(
        folder=folder, ours=ours, theirs=theirs, tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    ours.expertflow.close()


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampled", "beams", "several_samples"],
)
def test_generate_gives_the_tokens_of_transformers(pair, how):
    texts = []
    for model in (pair.ours, pair.theirs):
        torch.manual_seed(11)
        texts.append(model.generate(**prompts(), **how, max_new_tokens=10))
    assert torch.equal(*texts)
    assert texts[0].shape[0] == 2 * how.get("num_return_sequences", 1)


def test_a_seed_decides_the_sample(mixtral):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(mixtral.ours.generate(**prompts(), do_sample=True, max_new_tokens=10))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_pipeline_and_streaming(mixtral):
    written = []
    for model in (mixtral.ours, mixtral.theirs):
        write = pipeline("text-generation", model=model, tokenizer=mixtral.tokenizer)
        written.append(
            write(["The quick", "Once upon a time"], max_new_tokens=8, do_sample=False, batch_size=2)
        )
    assert written[0] == written[1]

    streamer = TextIteratorStreamer(mixtral.tokenizer, skip_prompt=True)
    batch = mixtral.tokenizer("The quick", return_tensors="pt", return_token_type_ids=False)
    whole = mixtral.ours.generate(**batch, max_new_tokens=8, do_sample=False, streamer=streamer)
    assert "".join(streamer) == mixtral.tokenizer.decode(whole[0, batch["input_ids"].shape[1] :])


def test_continuous_batching_gives_the_greedy_tokens(mixtral):
    requests = [[5, 6, 7, 8, 9], [10, 11, 12], [20] * 9]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=PAD)
    answers = mixtral.ours.generate_batch(requests, config, warmup=False)
    assert len(answers) == len(requests)
    by_prompt = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()}
    for request in requests:
        alone = mixtral.theirs.generate(torch.tensor([request]), max_new_tokens=6, do_sample=False)
        assert by_prompt[tuple(request)] == alone[0, len(request) :].tolist()


def test_continuous_batching_stays_inside_the_kv_budget(mixtral):
    """Left alone, transformers takes nine tenths of the free memory."""
    config = GenerationConfig(max_new_tokens=2, eos_token_id=1, pad_token_id=PAD)
    manager = mixtral.ours.init_continuous_batching(config)
    pages = manager.continuous_batching_config
    assert (pages.page_size, pages.num_blocks) == (4, 62), "4 x 64 tokens less two spare pages"
    assert pages.max_batch_tokens == mixtral.ours.expertflow.settings.prefill_chunk
    cache = manager._create_batch_processor().cache
    held = cache.cache_tensor.numel() * cache.cache_tensor.element_size()
    assert held <= mixtral.ours.expertflow.plan.kv_bytes
    assert held > 0.8 * mixtral.ours.expertflow.plan.kv_bytes


def test_sizes_in_the_models_generation_config_count(mixtral, monkeypatch):
    given = ContinuousBatchingConfig(num_blocks=5, page_size=16)
    monkeypatch.setattr(mixtral.ours.generation_config, "continuous_batching_config", given, raising=False)
    manager = mixtral.ours.init_continuous_batching()
    assert manager.continuous_batching_config.num_blocks == 5


def test_sizes_that_are_given_are_kept_or_refused():
    settings = Settings(context=64, batch=4)
    kept = pages_for(ContinuousBatchingConfig(num_blocks=14, page_size=16, max_batch_tokens=7), settings)
    assert (kept.num_blocks, kept.page_size, kept.max_batch_tokens) == (14, 16, 7)
    assert pages_for(kept, settings) == kept, "what was found once may be given again"
    assert pages_for(ContinuousBatchingConfig(page_size=32), settings).num_blocks == 6
    assert pages_for(None, Settings(context=8192, batch=2)).page_size == 256
    with pytest.raises(
        ValueError, match=r"15 block\(s\) of 16 tokens and 2 spare ones exceed the KV budget of 4 x 64"
    ):
        pages_for(ContinuousBatchingConfig(num_blocks=15, page_size=16), settings)
    with pytest.raises(ValueError, match=r"1 block\(s\) of 512 tokens"):
        pages_for(ContinuousBatchingConfig(page_size=512), settings)
    with pytest.raises(ValueError, match=r"max_memory_percent=0\.5 counts what is free"):
        pages_for(ContinuousBatchingConfig(max_memory_percent=0.5), settings)


def test_a_model_that_nobody_holds_gives_its_memory_back_at_once(mixtral):
    """No cycle through what was hung on it: a second load would find the first one's weights still there."""
    model = load("mixtral", mixtral.folder, prefill_chunk=16)
    cache, gone = model.expertflow.cache, weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
        assert cache._closed
    finally:
        gc.enable()


# Prompts longer than prefill_chunk run in pieces.

CHUNKED = ["mixtral", "gpt_oss", "deepseek_v3", "deepseek_moe", "granitemoe"]
RECURRENT = ["jamba", "qwen3_next", "lfm2_moe"]


def longest_passes(model: PreTrainedModel) -> list[int]:
    """Tokens per sequence of each forward pass from now on."""
    tokens: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return tokens


@pytest.mark.parametrize(("name", "chunk"), [("mixtral", 1), *((name, 5) for name in CHUNKED)])
def test_a_prompt_in_chunks_gives_the_same_text(name, chunk, tmp_path):
    """Left padding and beams included; the longest pass shows that the setting was honoured."""
    write_checkpoint(name, tmp_path)
    whole, chunked = load(name, tmp_path), load(name, tmp_path, prefill_chunk=chunk)
    tokens = longest_passes(chunked)
    for how in ({}, {"num_beams": 2}):
        texts = [m.generate(**prompts(), **how, max_new_tokens=8, do_sample=False) for m in (whole, chunked)]
        assert torch.equal(*texts)
    assert max(tokens) == chunk
    whole.expertflow.close()
    chunked.expertflow.close()


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_models_read_their_prompt_whole(name, tmp_path):
    """Chunks once gave Jamba another text: transformers 5.23 starts each from an empty state.

    The memory plan then counts a whole context of activations, and an own chunk size is refused.
    """
    write_checkpoint(name, tmp_path)
    with pytest.raises(ValueError, match=r"prefill_chunk=5: \w+ has recurrent layers.*lower context=64"):
        load(name, tmp_path, prefill_chunk=5)
    model = load(name, tmp_path, context=600)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = longest_passes(model)
    long = prompts(tokens=530)
    texts = [m.generate(**long, max_new_tokens=4, do_sample=False) for m in (model, theirs)]
    assert torch.equal(*texts)
    assert max(tokens) == 530
    assert model.expertflow.settings.prefill_chunk == 600
    plan = model.expertflow.plan
    assert plan.scratch_bytes > 600 * plan.model.scratch_bytes_per_token
    model.expertflow.close()


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": False, "num_beams": 2}], ids=["greedy", "beams"]
)
def test_generate_without_a_cache(mixtral, how):
    """It once failed with "Cannot use prefill chunking without a cache", a setting that nobody had made."""
    model = load("mixtral", mixtral.folder, prefill_chunk=32)
    tokens = longest_passes(model)
    texts = [
        m.generate(**prompts(), **how, max_new_tokens=8, use_cache=False) for m in (model, mixtral.theirs)
    ]
    assert torch.equal(*texts)
    assert tokens == list(range(17, 25))
    tokens.clear()
    config = GenerationConfig(max_new_tokens=8, use_cache=False, **how)
    assert torch.equal(model.generate(**prompts(), generation_config=config), texts[1])
    assert tokens == list(range(17, 25))
    model.expertflow.close()


def test_without_a_cache_scratch_memory_is_the_limit(mixtral):
    """Every step runs the whole sequence. Refused before the first one, not at the token that is too many."""
    model = load("mixtral", mixtral.folder, prefill_chunk=16, batch=2)
    tokens = longest_passes(model)
    with pytest.raises(ValueError, match=r"2 sequence\(s\) of up to 17 tokens .* 2 x 16; .* prefill_chunk="):
        model.generate(**prompts(tokens=10), max_new_tokens=7, do_sample=False, use_cache=False)
    assert not tokens
    model.generate(**prompts(tokens=10), max_new_tokens=6, do_sample=False, use_cache=False)
    assert max(tokens) == 15
    with pytest.raises(ValueError, match="Cannot use prefill chunking without a cache"):
        model.generate(**prompts(tokens=10), max_new_tokens=6, use_cache=False, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="2 sequence"):
        model.generate(**prompts(tokens=17), max_new_tokens=1, use_cache=False)
    # With a cache it runs in pieces, and whoever insists on one piece gets it.
    model.generate(**prompts(tokens=17), max_new_tokens=1)
    assert max(tokens) == 16
    model.generate(**prompts(tokens=17), max_new_tokens=1, use_cache=False, prefill_chunk_size=None)
    assert max(tokens) == 17
    model.expertflow.close()


def test_chunks_lower_the_scratch_memory(tmp_path):
    write_checkpoint("mixtral", tmp_path)
    small, large = load("mixtral", tmp_path, prefill_chunk=8), load("mixtral", tmp_path, prefill_chunk=64)
    difference = large.expertflow.plan.scratch_bytes - small.expertflow.plan.scratch_bytes
    assert difference == 4 * (64 - 8) * small.expertflow.plan.model.scratch_bytes_per_token
    small.expertflow.close()
    large.expertflow.close()


# The KV budget.


def test_a_prompt_beyond_the_context_is_refused_before_it_runs(mixtral):
    with pytest.raises(ValueError, match=r"4 sequence\(s\) of 65 tokens exceed .* 4 x 64 tokens; .*context="):
        mixtral.ours(**prompts(sequences=4, tokens=65))
    # One long sequence may use what four short ones would.
    mixtral.ours(**prompts(sequences=1, tokens=100))
    with pytest.raises(ValueError, match="65 tokens exceed"):
        mixtral.ours.generate(**prompts(sequences=4, tokens=60), max_new_tokens=10, do_sample=False)


def test_a_decoder_prompt_counts_too(tmp_path):
    write_checkpoint("switch", tmp_path)
    model = load("switch", tmp_path, context=16, batch=1)
    ids = prompts(sequences=1, tokens=8)["input_ids"]
    with pytest.raises(ValueError, match="17 tokens exceed the KV budget of 1 x 16"):
        model.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    with pytest.raises(ValueError, match="20 tokens exceed the KV budget of 1 x 16"):
        model.generate(prompts(sequences=1, tokens=20)["input_ids"], max_new_tokens=2, do_sample=False)
    model.expertflow.close()


@pytest.mark.parametrize(("name", "grows"), [("gpt_oss", True), ("mixtral", False)])
def test_scratch_of_eager_attention_grows_with_the_context(tmp_path, name, grows):
    """It writes out a score for each earlier token; the budget counted 2048 of them however long texts may be."""
    write_checkpoint(name, tmp_path)
    plans = []
    for context in (512, 2048, 8192):
        model = load(name, tmp_path, context=context)
        plans.append(model.expertflow.plan.model.scratch_bytes_per_token)
        model.expertflow.close()
    heads = model.config.num_attention_heads
    assert plans[0] == plans[1]
    assert plans[2] - plans[1] == (3 * heads * (8192 - 2048) * 4 if grows else 0)
