"""The ablation: combinations that mean something, each part alone, and words that follow from the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.paper import ablation, results, sensitivity, when
from benchmarks.paper.ablation import BLOCKING, GROUPED, JOINT, READY, TURNS, Cell, cells, earned, ladder, run
from benchmarks.paper.gains import AXES, BOUND, OURS, RECORDED, Axis, rule_sentences, sentences
from benchmarks.paper.item import Row, Settings
from benchmarks.paper.part_predictors import AHEAD, BOTH, NONE, ORACLE, TABLE, groups
from benchmarks.paper.synthetic import Knobs, as_trace, draw
from benchmarks.paper.units import unit_workload
from expertflow.sim.hardware import Costs
from expertflow.sim.workload import Foretold, decoded, foretell
from expertflow.trace import TraceWriter
from tests.predictor.synthetic import meta, sequences

COST = Costs(expert_s=1.0, dense_s=0.5, chunk_s=1.5, chunks=1)
PREDICTORS = (NONE, TABLE, ORACLE, AHEAD, BOTH)


def told(prediction: str = "oracle") -> Foretold:
    trace = as_trace(draw(Knobs(), 8, 2, layers=3, sequences=32, tokens=8), 8)
    return foretell(trace.meta, trace.sequences, prediction)


def test_no_combination_comes_twice_and_none_groups_by_nothing() -> None:
    found = list(cells(PREDICTORS))
    assert len(found) == len(set(found))
    assert not [cell for cell in found if cell.way == GROUPED and cell.predictor in (NONE, AHEAD, ORACLE)]
    for order in (READY, BLOCKING):
        for predictor in PREDICTORS:
            assert Cell(predictor, "plec", TURNS, order) in found
    assert Cell(BOTH, "plec", JOINT, READY) in found


def test_every_way_decodes_the_same_tokens() -> None:
    """Otherwise a step of one could not be set beside a step of the other."""
    foretold = told("online")
    rows = {way: unit_workload(foretold, 8, ablation._WAYS[way], 4).rows for way in ablation._WAYS}
    assert len(set(rows.values())) == 1


def test_waiting_for_all_experts_takes_longer_and_moves_as_much() -> None:
    workload = unit_workload(told(), 8, "split", 4)
    ready, waits = (run(Cell(NONE, "lru", TURNS, order), workload, COST, 100) for order in (READY, BLOCKING))
    assert waits["stall_seconds"] > ready["stall_seconds"]
    assert waits["bytes_per_step"] == ready["bytes_per_step"]
    assert ready["step_seconds"] == pytest.approx(ready["stall_seconds"] + ready["arithmetic_seconds"])


def test_look_ahead_reaches_the_clock() -> None:
    """Said of rows, it is the union over the batch that a pass is refined with; of the first layer nothing."""
    base = told("online")
    sure = [torch.full((8, 3, 8), 0.5) for _ in base.sequences]
    workload = unit_workload(replace(base, ahead_TLE=sure), 2, "split", 1)
    ahead_L = workload.passes[0].ahead_L
    assert ahead_L[0] is None
    assert ahead_L[1] == pytest.approx([0.75] * 8)
    assert unit_workload(base, 2, "split", 1).passes[0].ahead_L == ()


def test_groups_pad_sequences_in_the_order_they_have() -> None:
    """Predictions made group by group must land at their own sequence."""
    base = foretell(meta(), sequences(70), "online")
    rows = [row for group in groups(base) for row in decoded(group, group.routes_BTLK)]
    for sequence, routes_TLK in zip(base.sequences, rows, strict=True):
        assert routes_TLK.tolist() == sequence.target_routes_TLK[sequence.num_prefill :].tolist()


def _row(cell: Cell, seconds: float) -> Row:
    return {
        **cell._asdict(), "step_seconds": seconds, "stall_seconds": seconds - 1, "arithmetic_seconds": 1.0,
        "bytes_per_step": round(seconds * 1e6), "hit_ratio": 0.5,
    }  # fmt: skip


def test_the_ladder_takes_the_best_predictor_there_is_and_says_what_parts_earn() -> None:
    rows = [
        _row(Cell(NONE, "lru", TURNS, BLOCKING), 4.0),
        _row(Cell(TABLE, "plec", GROUPED, READY), 2.0),
        _row(Cell(TABLE, "plec", TURNS, READY), 2.5),
        _row(Cell(TABLE, "plec", GROUPED, BLOCKING), 3.0),
    ]
    assert [(title, row["step_seconds"]) for title, row in ladder(rows)] == [
        ("Cache-MoE: LRU, waits for all", 4.0),
        ("+ the online table", 2.5),
        ("+ TS", 2.0),
    ]
    said = list(earned(rows))
    assert said[1].startswith("the token scheduler: +500.0 ms of stall and +0 MB per step without it")
    assert said[1].endswith("a step takes 1.25 times as long")


LINK = Axis("link", "The link", "GB/s", (1, 64))


def _gain(value: float, system: str, gain: float, ratio: float) -> Row:
    return {
        "axis": "link",
        "value": value,
        "source": RECORDED,
        "system": system,
        "gain": gain,
        "ratio": ratio,
    }


def test_sentences_say_where_it_does_not_help() -> None:
    rows = [
        _gain(1, OURS, 0.97, 9), _gain(1, BOUND, 1.3, 9), _gain(64, OURS, 1.4, 0.7), _gain(64, BOUND, 1.5, 0.7),
    ]  # fmt: skip
    text = " ".join(sentences(rows, LINK))
    assert "worth most at 64 GB/s (1.40 times as fast as LRU) and least at 1 (0.97)." in text
    assert "A tenth faster or more: at 64." in text
    assert "Slower than LRU: at 1 (0.97)." in text
    rule = " ".join(rule_sentences(rows))
    assert (
        "most where loads take 0.5 to 1 times as long as arithmetic: there a step is typically 1.40" in rule
    )
    assert "At more than 4 times it is hardly worth anything (0.97); the rest of 1.30 takes knowing" in rule


def test_no_sentence_promises_what_nobody_reaches() -> None:
    rows = [
        _gain(1, OURS, 1.2, 2), _gain(1, BOUND, 1.5, 2), _gain(64, OURS, 1.0, 0.1), _gain(64, BOUND, 1.01, 0.1),
    ]  # fmt: skip
    assert "where knowing all that comes would give no more than 1.01" in " ".join(sentences(rows, LINK))
    assert "nobody gains much" in " ".join(rule_sentences(rows))


def test_a_killed_run_goes_on_and_the_page_is_made_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "traces" / sensitivity.RECORDING / sensitivity.TASK
    with TraceWriter(folder, meta()) as writer:
        for sequence in sequences(36):
            writer.append(sequence)
    settings = Settings(out=tmp_path / "out", quick=True, traces=tmp_path / "traces")
    axes = {"link": LINK, "predictor": replace(AXES["predictor"], values=(0.0, 0.5))}
    for module in (sensitivity, when):
        monkeypatch.setattr(module, "AXES", axes)
    honest, ran = sensitivity.compared, []

    def killed_at_the_third(*args: object) -> list[Row]:
        ran.append(args)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return honest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(sensitivity, "compared", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        results.run(sensitivity.ITEM, settings, print)
    result = results.run(sensitivity.ITEM, settings, print)
    assert len(ran) == 5  # two kept, the third again, the fourth
    assert result.complete
    when.write(result, tmp_path / "when.md")
    text = (tmp_path / "when.md").read_text()
    assert "## The link" in text
    assert "--quick" in text
    for name in axes:
        assert (tmp_path / "figures" / "when" / f"when-{name}.png").stat().st_size > 1000
    worse = [row for row in result.rows if row["axis"] == "predictor" and row["system"] == OURS]
    assert [row["recall"] for row in worse] == [1.0, pytest.approx(0.5, abs=0.1)]
