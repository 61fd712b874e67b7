"""The promise of the whole package: few slots, many slots and transformers itself say the same.

Among ourselves equality is bit for bit; against transformers' eager experts it is within the rounding of
sums in another order, with equal greedy text. Every family, as published on disk.
"""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from expertflow.core import ExpertId
from expertflow.models.attach import ExpertFlowConfig
from expertflow.models.footprint import _cache_bytes
from tests.families import FAMILIES, NUM_EXPERTS, VOCAB_SIZE, write_checkpoint

NEW_TOKENS = 12
FEW_SLOTS = {"cache_size": 1}  # fewer than one layer needs, so that layers run in waves
ALL_SLOTS = {"cache_size": NUM_EXPERTS}
# One of each kind: a tensor per expert, packed [in, out] with biases, packed [out, in], a .bin of two stacks.
KINDS = ["mixtral", "gpt_oss", "granitemoe", "switch", "deepseek_v3"]


@contextmanager
def loaded(name: str, folder: Path, dtype: Any = "auto", **settings: Any) -> Iterator[PreTrainedModel]:
    model = FAMILIES[name].auto_class.from_pretrained(
        folder, dtype=dtype, quantization_config=ExpertFlowConfig(**settings)
    )
    try:
        yield model
    finally:
        model.expertflow.close()


def prompts(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Two sequences of 17 tokens, the first left-padded by 5 (decoder-only)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB_SIZE, (2, 17), generator=generator)
    mask = torch.ones_like(ids)
    if not FAMILIES[name].seq2seq:
        mask[0, :5] = 0
        ids[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    if model.config.is_encoder_decoder:
        inputs = inputs | {"decoder_input_ids": inputs["input_ids"][:, :9]}
    return model(**inputs).logits


def greedy(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)


def three_passes(model: PreTrainedModel, name: str) -> list[Tensor]:
    """Logits of a batch, of another batch into the warm cache, and of one token."""
    return [
        logits(model, prompts(name)),
        logits(model, prompts(name, seed=1)),
        logits(model, {"input_ids": prompts(name)["input_ids"][:, 5:6]}),
    ]


def assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    for number, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(mine, theirs), f"pass {number}: off by {(mine - theirs).abs().max()}"


def state_of_files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> SimpleNamespace:
    """A checkpoint, and what transformers makes of it with its eager experts."""
    name = request.param
    folder = write_checkpoint(name, tmp_path_factory.mktemp(name))
    eager = {} if FAMILIES[name].seq2seq else {"experts_implementation": "eager"}
    reference, info = FAMILIES[name].auto_class.from_pretrained(folder, output_loading_info=True, **eager)
    return SimpleNamespace(name=name, folder=folder, reference=reference, info=info)


def test_few_slots_change_no_bit_and_agree_with_transformers(family):
    """Also that the run is what it claims: layers in waves, the checkpoint as it was."""
    before = state_of_files(family.folder)
    with loaded(family.name, family.folder, **FEW_SLOTS) as model:
        few = three_passes(model, family.name)
        few_greedy = greedy(model, prompts(family.name))
        stats = model.expertflow.cache.stats
        assert model.expertflow.cache.num_slots == max(2, FAMILIES[family.name].moe_layers) < NUM_EXPERTS
        assert stats.misses > stats.num_slots
        assert stats.bytes_read > 0
    with loaded(family.name, family.folder, **ALL_SLOTS, store="ram") as model:
        assert_same_bits(few, three_passes(model, family.name))
        assert torch.equal(few_greedy, greedy(model, prompts(family.name)))
        assert model.expertflow.cache.stats.misses <= model.expertflow.cache.num_slots
    for mine, theirs in zip(few, three_passes(family.reference, family.name), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(few_greedy, greedy(family.reference, prompts(family.name)))
    assert state_of_files(family.folder) == before


def test_loading_reports_what_transformers_reports(family, caplog):
    """Experts left in the file on purpose once looked like unexpected keys in the load report."""
    with caplog.at_level(logging.WARNING):
        for logger in ("transformers", "expertflow"):
            logging.getLogger(logger).addHandler(caplog.handler)
        try:
            model, info = FAMILIES[family.name].auto_class.from_pretrained(
                family.folder, quantization_config=ExpertFlowConfig(**FEW_SLOTS), output_loading_info=True
            )
        finally:
            for logger in ("transformers", "expertflow"):
                logging.getLogger(logger).removeHandler(caplog.handler)
    model.expertflow.close()
    assert info == family.info
    # The multi-token prediction layer is reported by transformers as well, its experts included.
    ours = [r for r in caplog.messages if "experts" in r and "model.layers.3." not in r]
    assert not ours
    assert not any("expertflow" in r for r in caplog.messages)


def test_kv_bytes_per_token_is_what_a_cache_grows_by(family):
    with loaded(family.name, family.folder, **FEW_SLOTS) as model:
        planned = model.expertflow.plan.model.kv_bytes_per_token

    @torch.no_grad()
    def cache_bytes(tokens: int) -> int:
        ids = torch.full((1, tokens), 7)
        inputs = {"decoder_input_ids": ids} if FAMILIES[family.name].seq2seq else {"use_cache": True}
        return _cache_bytes(family.reference(input_ids=ids, **inputs).past_key_values)

    assert planned == cache_bytes(8) - cache_bytes(7)


# Variations that must not change a bit, on one family of each kind on disk.


@pytest.fixture(scope="module", params=KINDS)
def resident(request, tmp_path_factory) -> SimpleNamespace:
    """A checkpoint and its three passes with every expert in memory."""
    name = request.param
    folder = write_checkpoint(name, tmp_path_factory.mktemp(name))
    with loaded(name, folder, **ALL_SLOTS) as model:
        return SimpleNamespace(name=name, folder=folder, passes=three_passes(model, name))


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_size": 1, "overlap": False},
        {"cache_size": 1, "direct_io": False},
        {"cache_size": 1, "store": "ram"},
        {"cache_size": 2.5},
        {"cache_size": 3},
        {"memory": "64GiB"},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_no_setting_changes_a_bit(resident, settings):
    with loaded(resident.name, resident.folder, **settings) as model:
        assert_same_bits(three_passes(model, resident.name), resident.passes)
        mode = model.expertflow.cache.stats.io_mode
        if settings.get("direct_io") is False:
            assert mode == "buffered (asked for)"
        if settings.get("store") == "ram":
            assert mode.startswith("ram")


Hints = Callable[[list[ExpertId], random.Random], list[ExpertId]]
HINTS: dict[str, Hints] = {
    "noise": lambda experts, draw: draw.choices(experts, k=draw.randrange(len(experts))),
    "nothing": lambda experts, draw: [],
    "everything": lambda experts, draw: experts,
}


@pytest.mark.parametrize(
    ("kind", "overlap"),
    [*((kind, True) for kind in HINTS), ("noise", False)],
    ids=[*HINTS, "noise-without-overlap"],
)
def test_a_misprediction_changes_no_bit(resident, kind, overlap):
    """Hints are given before each MoE layer opens, when the cache is busiest."""
    draw = random.Random(0)
    with loaded(resident.name, resident.folder, cache_size=1.5, overlap=overlap) as model:
        cache = model.expertflow.cache
        experts = sorted(cache.store.experts)

        def hint(*_: Any) -> None:
            cache.prefetch(HINTS[kind](experts, draw))

        for layer in model.expertflow.moe_layers:
            model.get_submodule(layer.name).register_forward_pre_hook(hint)
        assert_same_bits(three_passes(model, resident.name), resident.passes)
        cache.wait_idle()
        assert (cache.stats.prefetches > 0) == (kind != "nothing")
        cache.table.check()


@pytest.mark.parametrize(("name", "shards"), [("mixtral", 1), *((name, 3) for name in KINDS)])
def test_bf16_checkpoints_in_one_file_or_three(name, shards, tmp_path):
    folder = write_checkpoint(name, tmp_path, dtype=torch.bfloat16, shards=shards)
    reference = FAMILIES[name].auto_class.from_pretrained(folder, dtype=torch.bfloat16)
    with loaded(name, folder, **FEW_SLOTS) as few, loaded(name, folder, **ALL_SLOTS) as every:
        assert few.dtype == torch.bfloat16
        assert few.expertflow.plan.model.staging_bytes == 0
        ours = three_passes(few, name)
        assert_same_bits(ours, three_passes(every, name))
        close_in_bf16(ours, three_passes(reference, name))


@pytest.mark.parametrize("name", KINDS)
def test_a_float32_checkpoint_is_cast_on_the_way_in(name, tmp_path):
    """Slots then hold bfloat16: half the bytes, and what the file holds stays as it is."""
    folder = write_checkpoint(name, tmp_path)
    before = state_of_files(folder)
    reference = FAMILIES[name].auto_class.from_pretrained(folder, dtype=torch.bfloat16)
    with (
        loaded(name, folder, torch.bfloat16, **FEW_SLOTS) as few,
        loaded(name, folder, torch.bfloat16, **ALL_SLOTS, store="ram") as every,
    ):
        memory = few.expertflow.cache.memory
        assert memory.packs
        assert memory.slot_bytes < memory.store.slot_bytes
        assert few.expertflow.plan.model.staging_bytes == 2 * memory.store.slot_bytes
        ours = three_passes(few, name)
        assert_same_bits(ours, three_passes(every, name))
        close_in_bf16(ours, three_passes(reference, name))
    assert state_of_files(folder) == before


def close_in_bf16(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Nine in ten logits within 2 % of the largest: a rounding that tips a router moves a few tokens more."""
    for mine, reference in zip(ours, theirs, strict=True):
        off = (mine.float() - reference.float()).abs().flatten()
        assert off.quantile(0.9) < 0.02 * reference.float().abs().max()
