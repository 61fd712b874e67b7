"""Hidden states are what the routers read, and `eval-predictor` measures with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from expertflow import LLM, cli
from expertflow.config import Tracing
from expertflow.engine.datasets import Example
from expertflow.engine.hidden_states import hidden_states, routers
from expertflow.engine.tracing import record_trace
from expertflow.predictor.storage import load_predictor, read_description
from expertflow.trace import TraceWriter, read_trace
from tests.families import write_checkpoint

EXAMPLES = [
    Example(f"Question number {n}", "So be it", "test" if n % 2 else "train", "chat") for n in range(6)
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint and a trace of it."""
    return record("qwen2_moe", tmp_path_factory.mktemp("hidden"))


@pytest.fixture(scope="module")
def recorded_switch(tmp_path_factory) -> tuple[Path, Path]:
    return record("switch_safetensors", tmp_path_factory.mktemp("hidden"))


def record(family: str, root: Path) -> tuple[Path, Path]:
    folder = write_checkpoint(family, root / "model")
    with LLM(folder, cache_size=3, batch=2) as llm:
        record_trace(llm, EXAMPLES, root / "trace", Tracing(runs=1, max_tokens=6), "few")
    return folder, root / "trace"


def run(*arguments: object, command: str = "eval-predictor"):
    return CliRunner().invoke(cli.app, [command, *map(str, arguments)])


@pytest.mark.parametrize("kind", ["recorded", "recorded_switch"])
def test_the_router_of_the_same_layer_chooses_what_was_recorded(kind, request):
    """Of the decoder's layers, where there is an encoder."""
    folder, trace_folder = request.getfixturevalue(kind)
    trace = read_trace(trace_folder)
    with LLM(folder, cache_size=3) as llm:
        with hidden_states(llm) as read:
            for sequence in list(trace)[:2]:
                hidden_TLD = read(sequence.target_ids_T.tolist(), sequence.source_ids_S.tolist())
                assert hidden_TLD.shape[1] == trace.meta.target_layers == len(routers(llm))
                for layer, (weight, bias) in enumerate(routers(llm)):
                    logits = torch.nn.functional.linear(hidden_TLD[:, layer].float(), weight, bias)
                    chosen = logits.topk(trace.meta.top_k).indices.sort(-1).values.numpy()
                    written = np.sort(sequence.target_routes_TLK[:, layer], -1)
                    kept = (written < trace.meta.experts_per_layer[-1]).all(-1)  # not dropped over capacity
                    # float16 keeps the order of all but near ties.
                    assert (chosen == written)[kept].all(-1).mean() > 0.9
        names = [module for module in llm.model.modules() if module._forward_pre_hooks]
        before = len(names)
        with hidden_states(llm):
            pass
        assert len([m for m in llm.model.modules() if m._forward_pre_hooks]) == before, (
            "hooks were left behind"
        )


@pytest.mark.parametrize("kind", ["recorded", "recorded_switch"])
def test_the_command_with_and_without_the_model(kind, request, tmp_path):
    folder, trace_folder = request.getfixturevalue(kind)
    without = run("--traces", trace_folder, "--batch", "1,2")
    assert without.exit_code == 0, without.output
    assert "look-ahead" not in without.stdout
    result = run(
        "--traces",
        trace_folder,
        "--batch",
        "1,2",
        "--model",
        folder,
        "--gate-tokens",
        20,
        "-o",
        tmp_path / "out",
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    names = {row["predictor"] for row in found["results"]}
    assert names >= {"TLP", "online table", "look-ahead", "pre-gate", "untrained default"}


def test_a_predictor_leans_on_the_models_embedding(recorded, tmp_path):
    folder, trace_folder = recorded
    small = ("--hidden", 16, "--feed-forward", 16, "--token-rank", 4, "--epochs", 1)
    rows = {}
    for name, flags in (("with", ("--model", folder)), ("without", ())):
        result = run(trace_folder, *flags, *small, "-o", tmp_path / name, command="train-predictor")
        assert result.exit_code == 0, result.output
        table = load_predictor(tmp_path / name).embedding.weight
        seen = set(np.concatenate([s.target_ids_T for s in read_trace(trace_folder) if s.split == "train"]))
        unseen = [token for token in range(len(table) - 1) if token not in seen]
        rows[name] = len(table[unseen].float().unique(dim=0)), len(unseen)
        assert read_description(tmp_path / name)["training"]["model's embedding"] == (name == "with")
    assert rows["without"][0] == 1, "all that is never seen is one"
    assert rows["with"][0] == rows["with"][1] > 1


def test_another_models_traces_are_refused(recorded, tmp_path):
    folder, trace_folder = recorded
    trace = read_trace(trace_folder)
    with TraceWriter(tmp_path / "other", replace(trace.meta, fingerprint="f" * 16)) as writer:
        for sequence in trace:
            writer.append(sequence)
    result = run("--traces", tmp_path / "other", "--model", folder)
    assert result.exit_code == 2
    assert "give the model that was traced" in result.output
    result = run(tmp_path / "other", "--model", folder, "-o", tmp_path / "out", command="train-predictor")
    assert result.exit_code == 2
    assert "give the model that was traced" in result.output
    result = run("--traces", trace_folder, "--traces", tmp_path / "other")
    assert result.exit_code == 2
    assert "one model at a time" in result.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch", "one"), "--batch 1,8,64"),
        (("--batch", "0"), "between 1 and 64"),
        (("--task", "poems"), "poems"),
        (("--expert-bytes", "many"), "many"),
    ],
)
def test_wrong_flags_are_explained(recorded, flags, message):
    result = run("--traces", recorded[1], *flags)
    assert result.exit_code == 2
    assert message in result.output
