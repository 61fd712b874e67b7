"""Replayed routes: the experts asked for are exactly those recorded, in the order in which they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rivals
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.replayed_decode import decode
from benchmarks.route_replay import Call, RouteReplay, calls, experts_modules, first_layers
from benchmarks.shapes import DeepseekShape, QwenShape, Shape, SwitchShape
from expertflow.models.attach import ExpertFlowConfig
from expertflow.models.capture import capture_routes
from expertflow.trace import Trace
from tests.predictor.synthetic import EXPERTS, LAYERS, TOP_K, VOCAB, meta, sequences

SMALL: dict[str, Any] = {"hidden": 32, "heads": 4, "experts": EXPERTS, "vocabulary": VOCAB}
SHAPES: dict[str, Shape] = {
    "qwen": QwenShape(layers=LAYERS, top_k=TOP_K, expert_inner=24, shared_inner=40, **SMALL),
    "deepseek": DeepseekShape(layers=LAYERS + 1, top_k=TOP_K, expert_inner=24, dense_inner=40, **SMALL),
    "switch": SwitchShape(layers=2 * LAYERS, inner=24, head=8, **SMALL),
}


def recording(name: str) -> Trace:
    if name != "switch":
        return Trace(meta(), tuple(sequences(6)))
    found = [
        replace(
            s,
            source_routes_SLK=s.source_routes_SLK[:, :, :1],
            target_routes_TLK=s.target_routes_TLK[:, :, :1],
        )
        for s in sequences(6, source_layers=LAYERS)
    ]
    found[0].target_routes_TLK[3, 1] = EXPERTS  # over capacity: this token has no expert in layer 1
    return Trace(replace(meta(source_layers=LAYERS), top_k=1), tuple(found))


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Trace]:
    return write_checkpoint(tmp_path / request.param, SHAPES[request.param]), recording(request.param)


def first_calls(trace: Trace, batch: int, count: int = 6) -> list[Call]:
    return [call for call, _ in zip(calls(trace, batch), range(count), strict=False)]


def ours(folder: Path, **settings: Any) -> Any:
    return rivals.auto_class(folder).from_pretrained(folder, quantization_config=ExpertFlowConfig(**settings))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_is_asked_for_the_recorded_experts(case: tuple[Path, Trace], batch: int) -> None:
    folder, trace = case
    model = ours(folder, cache_size=2, batch=batch, context=64)
    with capture_routes(model) as capture, RouteReplay(model).replaying() as replay:
        for call in first_calls(trace, batch):
            replay.run(call)
            asked_L = [routes for routed in capture.take() for routes in routed.routes_L]
            assert len(asked_L) == len(call.routes_L) > 0
            for asked_TK, recorded_TK in zip(asked_L, call.routes_L, strict=True):
                assert torch.equal(asked_TK, recorded_TK)


def test_transformers_and_ours_replay_the_same(case: tuple[Path, Trace]) -> None:
    """The rivals' work is ours: with the same routes the logits agree; with the routers' own they would not."""
    folder, trace = case
    native = rivals.auto_class(folder).from_pretrained(folder)
    cached = ours(folder, cache_size=2, batch=2, context=64)
    with RouteReplay(native).replaying() as theirs, RouteReplay(cached).replaying() as replay:
        logits = [
            (theirs.run(call)[:, -1].float(), replay.run(call)[:, -1].float())
            for call in first_calls(trace, 2)
        ]
    for expected_BV, got_BV in logits:
        assert torch.allclose(expected_BV, got_BV, atol=2e-2 * expected_BV.abs().max().item())
    assert not torch.equal(_own_choice(native, first_calls(trace, 2)[0]), logits[0][0]), (
        "nothing was replayed"
    )


@torch.no_grad()
def _own_choice(model: Any, call: Call) -> torch.Tensor:
    if not model.config.is_encoder_decoder:
        return model(input_ids=call.ids_BT).logits[:, -1].float()
    encoded = model.get_encoder()(input_ids=call.source_BS)
    return model(encoder_outputs=encoded, decoder_input_ids=call.ids_BT).logits[:, -1].float()


def test_calls_hold_what_the_recording_holds() -> None:
    trace = recording("qwen")
    found = list(calls(trace, 1))
    longest = max(trace, key=lambda s: len(s.target_ids_T) - s.num_prefill)
    steps = len(longest.target_ids_T) - longest.num_prefill
    assert found[0].begins_text
    assert not any(call.begins_text for call in found[1 : steps + 1])
    assert found[0].ids_BT.tolist() == [longest.target_ids_T[: longest.num_prefill].tolist()]
    for step, call in enumerate(found[1 : steps + 1], longest.num_prefill):
        assert call.ids_BT.tolist() == [[longest.target_ids_T[step]]]
        assert [r.tolist() for r in call.routes_L] == [[r.tolist()] for r in longest.target_routes_TLK[step]]


def test_rows_of_a_batch_are_their_own_sequences() -> None:
    """A call's routes are [B * T, K], row by row: row b's are sequence b's, at the same step for all."""
    trace = recording("qwen")
    prompt, step = first_calls(trace, 3, 2)
    assert prompt.ids_BT.shape[0] == step.ids_BT.shape[0] == 3
    for row in range(3):
        begins = prompt.ids_BT[row].tolist()
        (sequence,) = [
            s
            for s in trace
            if s.target_ids_T[s.num_prefill - len(begins) : s.num_prefill].tolist() == begins
            and s.target_ids_T[s.num_prefill] == step.ids_BT[row, 0]
        ]
        for layer in range(LAYERS):
            assert (
                step.routes_L[layer][row].tolist()
                == sequence.target_routes_TLK[sequence.num_prefill, layer].tolist()
            )


def test_a_batch_larger_than_the_recording_is_refused() -> None:
    with pytest.raises(ValueError, match="batch=7: give 1 to 6"):
        next(calls(recording("qwen"), 7))


def test_fewer_layers_take_the_first_of_each_stack() -> None:
    trace = recording("switch")
    cut = first_layers(trace, 1, 2)
    assert cut.meta.source_layers == 1
    assert len(cut.meta.experts_per_layer) == 3
    assert (cut[1].source_routes_SLK == trace[1].source_routes_SLK[:, :1]).all()
    assert (cut[1].target_routes_TLK == trace[1].target_routes_TLK[:, :2]).all()
    with pytest.raises(ValueError, match=r"0 \+ 4 MoE layers .* give fewer --layers"):
        first_layers(recording("qwen"), 0, 4)


def test_decoding_counts_the_steps_after_the_warm_up(tmp_path: Path) -> None:
    """Prompts and warm-up have loaded experts too; with room for all of them nothing that counts is read."""
    folder = write_checkpoint(tmp_path / "qwen", SHAPES["qwen"])
    trace = recording("qwen")
    everything = decode(ours(folder, cache_size=EXPERTS, context=64), trace, 1, tokens=30)
    assert len(everything["step_s_all"]) == 30
    assert everything["experts_per_step"] == LAYERS * TOP_K
    few = decode(ours(folder, cache_size=1, context=64), trace, 1, tokens=30)
    assert everything["bytes_per_step"] < few["bytes_per_step"] / 5
    assert everything["hit_ratio"] > 0.9 > few["hit_ratio"]


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no module named 'experts'"):
        experts_modules(torch.nn.Linear(2, 2))
