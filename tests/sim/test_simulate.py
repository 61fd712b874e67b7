"""`expertflow simulate`, from a recording to the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from expertflow.cli import app
from expertflow.predictor.pass_forecast import PassForecast
from expertflow.sim.compare import KNOWN, Conditions, compare
from expertflow.sim.hardware import MODELS, PROFILES, costs, hardware
from expertflow.sim.recordings import foretell_all, size_of
from expertflow.sim.report import tables
from expertflow.sim.workload import Step, _in_turn, foretell, make_workload
from expertflow.trace import read_trace

CHAT = Path(__file__).parents[2] / "zoo" / "traces" / "tiny-moe" / "chat"
SWITCH = Path(__file__).parents[2] / "zoo" / "traces" / "switch-32" / "chat"


@pytest.fixture(scope="module")
def chat():
    return read_trace(CHAT, weights=False)


@pytest.fixture(scope="module")
def rows(chat):
    foretold = foretell_all(chat, CHAT, "test", ["online", "noise"], warm=16)
    size, _ = size_of(chat.meta, None, None)
    conditions = Conditions(
        policies=tuple(KNOWN),
        cache_sizes=(8.0,),
        batches=(2,),
        machines=(PROFILES["a40"],),
        expert_bytes=size.expert_bytes,
        dense_bytes=0,
        ratios=(1.0,),
        max_steps=60,
    )
    return compare(foretold, conditions)


def of(rows, policy: str, predictor: str) -> dict:
    (row,) = [row for row in rows if (row["policy"], row["predictor"]) == (policy, predictor)]
    return row


def test_steps_are_those_of_the_recording(chat):
    """Batch 1: the experts of every step are the routes of one token, in order; none is lost or invented."""
    test = chat.split("test").sequences[:12]
    workload = make_workload(foretell(chat.meta, test), batch=1)
    ours = sorted(str(step.experts_L) for step in workload.passes)
    theirs = sorted(
        str([sorted(set(layer.tolist())) for layer in routes_LK])
        for sequence in test
        for routes_LK in sequence.target_routes_TLK[sequence.num_prefill :]
    )
    assert ours == theirs
    assert workload.rows == len(ours)


def test_a_batch_needs_what_any_of_its_rows_needs(chat):
    test = chat.split("test").sequences[:2]
    workload = make_workload(foretell(chat.meta, test), batch=2)
    first = [sequence.target_routes_TLK[sequence.num_prefill] for sequence in test]
    expected = [sorted({*a.tolist(), *b.tolist()}) for a, b in zip(*first, strict=True)]
    assert workload.passes[0].experts_L == expected


@pytest.mark.parametrize("lengths", [(3, 3), (2, 4), (4, 2), (1, 1), (1, 3)])
def test_batches_in_turn_foresee_the_other_alone(lengths):
    """Against the definition: a next pass is known where it is another batch's, and nobody's token is used early."""
    one, other = (
        [Step([(n, t)], t == length - 1) for t in range(length)] for n, length in enumerate(lengths)
    )
    turns = _in_turn(one, other)
    assert sorted(step.rows[0] for step in turns) == sorted(step.rows[0] for step in [*one, *other])
    for number in (0, 1):
        assert [t for ((n, t),) in (step.rows for step in turns) if n == number] == list(
            range(lengths[number])
        )
    batches = [step.rows[0][0] for step in turns]
    assert batches[: 2 * min(lengths)] == [0, 1] * min(lengths)
    for step, batch, following in zip(turns, batches, [*batches[1:], None], strict=True):
        assert step.next_is_known == (following is not None and following != batch)
        assert step.last == (following is None)


def test_a_pass_that_is_foreseen_saves_loads(chat):
    """Two batches that take turns, told right: with the next pass known fewer experts are loaded."""
    test = chat.split("test").sequences[:40]
    foretold = {"oracle": foretell(chat.meta, test, "oracle")}
    conditions = Conditions(
        ("plec",), (16,), (4,), (hardware("a40"),), 10_000_000, 0, ratios=(4.0,), max_steps=80, in_turn=True
    )
    known = of(compare(foretold | {"same": foretold["oracle"]}, conditions), "plec", "same")
    assert known["in_turn"]
    apart = compare(foretold | {"same": foretold["oracle"]}, replace(conditions, in_turn=False))
    assert known["bytes_per_step"] < 0.95 * of(apart, "plec", "same")["bytes_per_step"]
    (table,) = list(tables([known], "routes"))
    assert "two batches of 4 in turn, 16 experts per layer" in str(table.title)
    with pytest.raises(ValueError, match=r"batch=30 in turn: give 1 to 20, half the number"):
        compare(foretold, replace(conditions, batches=(30,)))


def test_an_encoder_decoder_decodes_in_its_decoder():
    switch = read_trace(SWITCH, weights=False)
    workload = make_workload(foretell(switch.meta, switch.split("test").sequences[:3]), batch=1, max_steps=5)
    assert workload.shape.num_layers == 6
    assert all(len(experts) == 1 for step in workload.passes for experts in step.experts_L)


def test_predictions_are_causal(chat):
    """What is said of a step does not change when later routes do."""
    test = list(chat.split("test").sequences[:4])
    shortest = min(len(s.target_ids_T) - s.num_prefill for s in test)
    workload = make_workload(foretell(chat.meta, test, "online"), batch=4)
    for sequence in test:
        sequence.target_routes_TLK[sequence.num_prefill + shortest - 1 :] = 0
    try:
        changed = make_workload(foretell(chat.meta, test, "online"), batch=4)
    finally:
        chat_again = read_trace(CHAT, weights=False).split("test").sequences
        for sequence, good in zip(test, chat_again, strict=False):
            sequence.target_routes_TLK[:] = good.target_routes_TLK
    said = [step.forecast for step in workload.passes[:shortest]]
    assert said == [step.forecast for step in changed.passes[:shortest]]
    assert workload.passes[shortest].forecast != changed.passes[shortest].forecast


def test_bounds_hold_and_stand_beside(rows):
    assert {"lru", "belady", "belady-prefetch"} <= {row["policy"] for row in rows}
    fewest = of(rows, "belady", "-")["bytes_per_step"]
    for row in rows:
        if row["policy"] != "se-moe-ring":
            assert row["bytes_per_step"] >= fewest, row
        assert row["step_seconds"] == pytest.approx(row["arithmetic_seconds"] + row["stall_seconds"])
        assert row["link_busy"] <= 1
    oracle, online = of(rows, "plec", "oracle"), of(rows, "plec", "online")
    assert oracle["step_seconds"] < online["step_seconds"] < of(rows, "lru", "-")["step_seconds"]
    assert of(rows, "lru", "-")["transfer_to_compute"] == pytest.approx(1, rel=0.02)
    assert of(rows, "se-moe-ring", "-")["slots"] == 64


def test_noise_costs_little(rows):
    assert of(rows, "plec", "noise")["time_to_lru"] <= 1.05


def test_the_forecast_learns_to_ignore_a_predictor_that_talks_nonsense():
    torch.manual_seed(0)
    often_LE = torch.tensor([[0.9, 0.9, 0.05, 0.05]]).repeat(2, 4)
    forecast = PassForecast(2, 16, 4, has_prediction=True, has_head=True)
    for _ in range(150):
        p_LE, later_LE = forecast.forecast(torch.rand(2, 16))
        forecast.observe(torch.rand(2, 16) < often_LE)
    assert (p_LE - often_LE).abs().mean() < 0.1
    assert later_LE is not None
    assert later_LE[often_LE > 0.5].max() < later_LE[often_LE < 0.5].min()


def test_the_forecast_believes_a_predictor_that_is_right():
    torch.manual_seed(0)
    forecast = PassForecast(2, 16, 4, has_prediction=True, has_head=False)
    for _ in range(60):
        used_LE = torch.rand(2, 16) < 0.3
        p_LE, _ = forecast.forecast(torch.where(used_LE, 0.6, 0.1))
        forecast.observe(used_LE)
    assert p_LE[used_LE].min() > 0.85
    assert p_LE[~used_LE].max() < 0.1


def test_costs_of_a_profile_by_hand():
    cost = costs(PROFILES["a40"], 25_000_000, 0)
    assert cost.load_s == pytest.approx(1e-3)  # 25 MB at 25 GB/s
    assert cost.chunks == 6  # of 4 MiB at most
    assert cost.expert_s == pytest.approx(1e-4 + 25e6 / 696e9)
    assert MODELS["mixtral-8x7b"].expert_bytes == 3 * 4096 * 14336 * 2


def test_a_measured_machine_comes_from_json(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"link_bytes_per_s": 1e9, "memory_bytes_per_s": 1e10, "call_seconds": 1e-3}))
    assert hardware(str(path)).name == "mine"
    path.write_text('{"link_bytes_per_s": -1, "memory_bytes_per_s": 1e10, "call_seconds": 1e-3}')
    with pytest.raises(ValueError, match=r"link_bytes_per_s=-1 must be a number above 0"):
        hardware(str(path))
    path.write_text('{"speed": 3}')
    with pytest.raises(ValueError, match="is no hardware profile"):
        hardware(str(path))


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # where somebody says how wide a pipe is, it is that wide
    out = tmp_path / "found.json"
    done = invoke(
        str(CHAT), "--batch", "4", "--steps", "12", "--warm", "0", "--cache-size", "4,8", "--json", str(out)
    )
    assert done.exit_code == 0, done.output
    assert "no published model has this shape" in " ".join(done.stdout.split())
    assert "belady-prefetch" in done.stdout
    assert "…" not in done.stdout, "into a pipe a table is as wide as it needs to be"
    found = json.loads(out.read_text())
    assert {row["cache_size"] for row in found["rows"]} == {4, 8}
    assert {row["policy"] for row in found["rows"]} >= {"lru", "lfu", "plec", "belady"}


def test_where_results_go_and_sizes_are_checked_before_anything_is_simulated(tmp_path, monkeypatch):
    monkeypatch.setattr("expertflow.sim.recordings.foretell_all", lambda *_: pytest.fail("it was simulated"))
    for arguments, message in (
        (("--json", str(tmp_path / "no" / "x.json")), "does not exist, so x.json cannot be written"),
        (("--expert-bytes", "6"), "--expert-bytes='6' has no unit"),
    ):
        done = invoke(str(CHAT), *arguments)
        assert done.exit_code == 2
        assert message in " ".join(done.output.split())


def test_a_trace_stands_for_the_published_model_of_its_shape():
    done = invoke(str(SWITCH), "--batch", "1", "--steps", "3", "--warm", "0", "--policy", "lru")
    assert "stand for switch-base-32" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "lifo"], "unknown policy 'lifo'; known: lru, lfu, plec"),
        (["--hardware", "abacus"], "unknown hardware 'abacus'; known: a40, rtx4090, h100, or a JSON file"),
        (
            ["--predictor", "tarot"],
            "unknown predictor 'tarot'; known: none, online, oracle, noise, or a folder",
        ),
        (["--model-size", "gpt"], "unknown model size 'gpt'; known: switch-base-32"),
        (["--model-size", "mixtral-8x7b"], "has 8 experts, top-2, and tiny-moe has 32, top-4"),
        (["--cache-size", "0.2"], "0.2 of 6 layers is 1 slots; at least 2 are needed"),
        (["--cache-size", "many"], "--cache-size 'many' is no list of numbers; write --cache-size 1,4,16"),
        (["--batch", "0"], "--batch 0: give numbers above 0"),
        (["--batch", "100000"], "batch=100000: give 1 to"),
        (["--split", "dev"], "split='dev' is none of train, test"),
    ],
)
def test_what_is_wrong_is_named_with_its_limit(arguments, message):
    done = invoke(str(CHAT), "--warm", "0", "--steps", "2", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
