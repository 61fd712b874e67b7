"""`expertflow check` says "passed" of what is right, and does not say it of what is broken."""

import io
import json

import pytest
import torch
from rich.console import Console

from expertflow import budget, check
from expertflow.cache.expert_cache import ExpertCache
from expertflow.check import HINTS, check_model, run_check
from expertflow.config import Settings
from expertflow.models import experts
from tests.families import FAMILIES, write_checkpoint

QUICK = {"prompts": ["The quick brown fox", "0123456789 9876543210"], "max_new_tokens": 3}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return write_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("name", ["qwen2_moe", "switch"])
def test_whole_model(name, tmp_path):
    folder = write_checkpoint(name, tmp_path)
    report = check_model(folder, Settings(cache_size=1.5), **QUICK)
    assert report.passed, report.lines()
    assert report.mode == "whole"
    assert report.num_slots < report.num_experts
    assert [run.name for run in report.ours] == [
        *(f"predictor that returns {kind}" for kind in HINTS),
        f"{report.num_slots // 2 if report.num_slots >= 4 else 4} slots instead of {report.num_slots}",
        "all experts resident",
    ]
    assert all(run.bit_identical and run.largest == 0 for run in report.ours)
    assert report.transformers is not None
    assert report.transformers.equal_tokens == report.transformers.tokens == 6
    assert 0 <= report.transformers.largest <= report.tolerance * report.magnitude
    assert report.lines()[-1].startswith(
        "passed: bit-identical to ours with all experts resident; max |Δlogit|"
    )


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_a_checkpoint_in_half_precision_is_compared_in_float32_when_asked(layer_by_layer, tmp_path):
    folder = write_checkpoint("mixtral", tmp_path, dtype=torch.bfloat16)
    report = check_model(
        folder, Settings(cache_size=2), dtype="float32", layer_by_layer=layer_by_layer, **QUICK
    )
    assert report.passed, report.lines()
    assert report.dtype == "float32"
    assert report.tokens_must_agree
    if layer_by_layer:
        assert max(layer.largest / layer.magnitude for layer in report.layers) < 1e-6
    else:
        assert report.transformers.equal_tokens == report.transformers.tokens
        assert report.transformers.largest < 1e-5 * report.magnitude


def test_whether_the_model_fits_is_asked_of_the_dtype_it_gets(tmp_path, monkeypatch):
    """Room for the weights in bfloat16, but not in float32."""
    folder = write_checkpoint("mixtral", tmp_path, dtype=torch.bfloat16)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    monkeypatch.setattr(budget, "free_bytes", lambda: budget_held + int(1.5 * stored))
    budget_held = 2**30
    monkeypatch.setattr(budget, "process_bytes", lambda: budget_held)
    assert check_model(folder, Settings(cache_size=2), **QUICK).mode == "whole"
    assert check_model(folder, Settings(cache_size=2), dtype="float32", **QUICK).mode == "layer by layer"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe", "switch", "deepseek_v3_mtp"])
def test_layer_by_layer(name, dtype, tmp_path):
    """The reference reads each kind of file and packing by transformers' own loader."""
    folder = write_checkpoint(name, tmp_path, dtype=dtype, shards=2)
    report = check_model(folder, Settings(cache_size=2), layer_by_layer=True, **QUICK)
    assert report.passed, report.lines()
    assert report.transformers is None
    assert len(report.layers) == FAMILIES[name].moe_layers
    assert all(layer.magnitude > 0 and layer.reference_bytes > 0 for layer in report.layers)
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert f"each of {len(report.layers)} MoE layers agrees" in report.verdict()


def test_a_model_that_does_not_fit_is_checked_layer_by_layer(mixtral, monkeypatch):
    """The weights are 330 kB here; what is free is a little less, or far too little."""
    nbytes = (mixtral / "model.safetensors").stat().st_size
    monkeypatch.setattr(budget, "free_bytes", lambda: budget.process_bytes() + nbytes - 1)
    monkeypatch.setattr(budget, "process_bytes", lambda: 10**9)
    report = check_model(mixtral, Settings(cache_size=2), **QUICK)
    assert report.mode == "layer by layer"
    assert report.passed
    monkeypatch.setattr(budget, "free_bytes", lambda: budget.process_bytes() + 1000)
    with pytest.raises(
        ValueError, match=r"one MoE layer takes 288 KiB, and .* are free; close other programs"
    ):
        check_model(mixtral, Settings(), **QUICK)


@pytest.mark.parametrize("layer_by_layer", [False, True], ids=["whole", "layer_by_layer"])
def test_a_wrong_product_is_found(mixtral, monkeypatch, layer_by_layer):
    """Same bits among ourselves, and still not the model: only transformers can tell."""
    right = experts.Products.multiply
    monkeypatch.setattr(experts.Products, "multiply", lambda *args: right(*args) * 1.01)
    report = check_model(mixtral, Settings(cache_size=2), layer_by_layer=layer_by_layer, **QUICK)
    assert report.ours_identical
    assert not report.agrees_with_transformers
    assert not report.passed
    assert report.lines()[-1].startswith("FAILED: the output is not that of transformers")


def test_not_a_number_is_found(mixtral, monkeypatch):
    right = experts.Products.multiply
    monkeypatch.setattr(experts.Products, "multiply", lambda *args: right(*args) * float("nan"))
    for layer_by_layer in (False, True):
        report = check_model(mixtral, Settings(cache_size=2), layer_by_layer=layer_by_layer, **QUICK)
        assert not report.agrees_with_transformers


def test_a_cache_that_shows_is_found(mixtral, monkeypatch):
    """Off by one millionth per slot: far inside every tolerance, and yet not the same bits."""
    right = experts.run_experts
    monkeypatch.setattr(
        experts,
        "run_experts",
        lambda attachment, *args: right(attachment, *args) * (1 + 1e-6 * attachment.cache.num_slots),
    )
    report = check_model(mixtral, Settings(cache_size=2), **QUICK)
    assert not report.ours_identical
    assert [run.bit_identical for run in report.ours] == [True, True, True, False, False]
    assert report.ours[-1].where.startswith("prompt ")
    assert report.lines()[-1].startswith("FAILED: the cache changes the output")


def test_a_stale_prefetch_is_found(mixtral, monkeypatch):
    """A hint that changes an output bit, as a slot overwritten in use would."""
    hinted = []
    prefetch, right = ExpertCache.prefetch, experts.Products.multiply
    monkeypatch.setattr(
        ExpertCache, "prefetch", lambda self, wanted: (hinted.append(len(wanted)), prefetch(self, wanted))
    )
    monkeypatch.setattr(
        experts.Products,
        "multiply",
        lambda *args: right(*args) * (1.01 if hinted and hinted[-1] == 16 else 1),
    )
    report = check_model(mixtral, Settings(cache_size=2), **QUICK)
    assert set(hinted) >= {0, 16}
    assert len(set(hinted)) > 3, "noise is of many lengths"
    assert "predictor that returns everything" in [run.name for run in report.ours if not run.bit_identical]
    assert report.ours[0].bit_identical


def test_the_command_prints_and_returns_its_status(mixtral, monkeypatch):
    text, machine = io.StringIO(), io.StringIO()
    assert run_check(str(mixtral), Settings(), console=Console(file=text, width=200), **QUICK) == 0
    assert "4 of 16 experts in memory" in text.getvalue(), "a quarter, when no size is given"
    assert "passed: " in text.getvalue()
    right = experts.Products.multiply
    monkeypatch.setattr(experts.Products, "multiply", lambda *args: right(*args) * 2)
    assert run_check(str(mixtral), Settings(), as_json=True, console=Console(file=machine), **QUICK) == 1
    report = json.loads(machine.getvalue())
    assert report["passed"] is False
    assert {run["name"] for run in report["ours"]} >= {"all experts resident"}


def test_a_checkpoint_without_tokenizer_gets_random_tokens(tmp_path):
    folder = write_checkpoint("mixtral", tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    seeds = [check._token_ids(folder, None, seed) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(seeds[0], seeds[1], strict=True))
    assert not torch.equal(seeds[0][0], seeds[2][0])
    assert check_model(folder, Settings(cache_size=2), max_new_tokens=2).passed
    with pytest.raises(ValueError, match="prompts need a tokenizer"):
        check_model(folder, Settings(cache_size=2), prompts=["hello"])


def test_what_cannot_be_checked_is_refused(mixtral, tmp_path):
    with pytest.raises(ValueError, match="5 tokens and 32 new ones exceed context=36; raise --context"):
        check_model(mixtral, Settings(cache_size=2, context=36), prompts=["hello"])
    with pytest.raises(ValueError, match="no prompts to check with"):
        check_model(mixtral, Settings(cache_size=2), prompts=[])
    with pytest.raises(ValueError, match="has no tokens"):
        check_model(mixtral, Settings(cache_size=2), prompts=["x", ""])
    with pytest.raises(FileNotFoundError):
        check_model(tmp_path / "nowhere", Settings())
