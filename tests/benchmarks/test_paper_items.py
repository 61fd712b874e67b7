"""The paper's items themselves, on recordings cut to a few sequences."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.paper import __main__ as program
from benchmarks.paper import (
    fig6,
    fig8,
    fig10,
    measured,
    on_clock,
    recordings,
    results,
    serving,
    table1,
    table2,
)
from benchmarks.paper.item import Result, Settings
from benchmarks.paper.published import MODELS, count, model_bytes, on_meta, published
from benchmarks.paper.simulated import CACHE_MOE, CACHE_MOE_BOTH, GROUPED, JOINT, SYSTEMS, Grid, systems_for
from benchmarks.paper.units import unit_workload
from expertflow.cache.policies import SIMULATED
from expertflow.core import ExpertId, MoEShape
from expertflow.trace import TraceWriter, read_trace
from tests.families import write_checkpoint

COMMITTED = Path(__file__).parents[2] / "zoo" / "traces"
KEPT = 30  # sequences: ten prompts


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    """Quick, with a few sequences of the committed recordings of Switch-32."""
    folder = tmp_path_factory.mktemp("paper")
    trace = read_trace(COMMITTED / "switch-32" / "translation", weights=False)
    with TraceWriter(folder / "traces" / "switch-32" / "translation", trace.meta) as writer:
        for sequence in (*trace.split("test").sequences[:6], *trace.split("train").sequences[: KEPT - 6]):
            writer.append(sequence)
    told = folder / "traces" / "switch-32" / "translation" / recordings.DRAFT
    with TraceWriter(told, trace.meta) as writer:  # a draft that is right
        for sequence in (*trace.split("test").sequences[:6], *trace.split("train").sequences[: KEPT - 6]):
            writer.append(sequence)
    return Settings(out=folder / "out", quick=True, traces=folder / "traces")


@pytest.fixture(scope="module")
def foretold(settings):
    return recordings.told(settings, "switch-32", "translation", print)["ours"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_parameters_are_those_that_transformers_counts(model):
    """Ours walks modules and ties; transformers' own num_parameters and the parameters' names say the same."""
    built = on_meta(model.config())
    ours = count(built)
    assert ours.total == built.num_parameters()
    named = {id(p): p.numel() for name, p in built.named_parameters() if ".experts." in name}
    assert ours.routed == sum(named.values())
    assert (ours.layers, ours.experts, ours.top_k) == (
        model.in_paper.layers,
        model.in_paper.experts,
        model.in_paper.top_k,
    )
    assert ours.total / 1e9 == pytest.approx(model.in_paper.total, abs=0.03)
    assert ours.activated / 1e9 == pytest.approx(model.in_paper.activated, abs=0.035)


def test_table_1_says_where_the_paper_differs(tmp_path):
    """Qwen1.5's share of experts, which no count of the configuration gives."""
    found = results.run(table1.ITEM, Settings(out=tmp_path), print)
    notes = table1.ITEM.section(found).notes
    assert "Qwen1.5: the experts' share in per cent: 87.02 by the configuration, 88.95 in the paper." in notes
    assert not any("Mixtral" in note for note in notes)


def test_memory_is_the_sum_of_what_is_held(tmp_path):
    found = results.run(fig8.ITEM, Settings(out=tmp_path), print)
    for row in found.rows:
        if "budget" in row:
            assert row["bytes"] <= row["budget"]
        else:
            assert row["bytes"] == sum(row[key] for key in ("dense", "slots", "kv", "scratch"))
    needs = model_bytes("Qwen1.5")
    parameters = count(on_meta(published("Qwen1.5").config()))
    assert needs.dense_bytes == pytest.approx(2 * (parameters.total - parameters.routed), rel=1e-3)
    assert needs.slot_bytes == 3 * 2048 * 1408 * 2
    assert {target.name.split(",")[0] for target in fig8.ITEM.section(found).targets} == set(fig8.IN_PAPER)


def test_a_third_of_the_prompts_is_held_out_and_none_is_in_both(settings):
    read = recordings.recording(settings, "switch-32", "translation")
    train, test = {s.prompt for s in read.train}, {s.prompt for s in read.test}
    assert not train & test
    assert len(test) == round((len(train) + len(test)) / 3)
    assert len(read.train) + len(read.test) == KEPT
    already = {s.prompt for s in read_trace(settings.traces / "switch-32" / "translation").split("test")}
    assert already <= test


def test_a_recording_that_is_not_there_names_those_that_are(settings):
    with pytest.raises(
        ValueError, match=r"switch-64/translation has no recording; there is switch-32/translation"
    ):
        recordings.recording(settings, "switch-64", "translation")
    nowhere = replace(settings, traces=settings.out / "nowhere")
    with pytest.raises(ValueError, match=r"there is none at all\. Record one with `expertflow trace"):
        recordings.recording(nowhere, "switch-32", "translation")


def test_a_predictor_that_was_promised_and_is_not_there(settings, tmp_path):
    given = replace(settings, predictors=tmp_path)
    with pytest.raises(
        ValueError, match="has no switch-32-translation; train it with `expertflow train-predictor"
    ):
        recordings.trained(given, "switch-32", "translation", print)


@pytest.mark.parametrize("way", ["alone", "split", "grouped", "known", "joint"])
def test_every_way_decodes_the_same_tokens(foretold, way):
    """Each token's experts are in exactly one pass: by layers, uses of one-row batches add up to all rows'."""
    workload = unit_workload(foretold, 2, way, most_steps=5)
    alone = unit_workload(foretold, 2, "alone", most_steps=5)
    assert workload.rows == alone.rows
    lengths = sorted((len(s.target_ids_T) - s.num_prefill for s in foretold.sequences), reverse=True)
    assert workload.rows == sum(min(5, length) for length in lengths[: len(lengths) // 4 * 4])  # whole units
    once = unit_workload(foretold, 1, "alone", most_steps=5)
    assert set(_uses(workload)) == set(_uses(once)) == set(_uses(alone))
    assert sum(len(step.experts_L[0]) for step in workload.passes) <= workload.rows
    if way == "joint":
        assert len(workload.passes) < len(alone.passes)


def _uses(workload) -> list[tuple[int, int]]:
    return [
        (layer, e) for step in workload.passes for layer, chosen in enumerate(step.experts_L) for e in chosen
    ]


def test_grouping_by_true_paths_activates_fewest_and_joint_fewer_still(foretold):
    def activated(way) -> int:
        return len(_uses(unit_workload(foretold, 4, way, most_steps=8)))

    assert activated("joint") < activated("known") < activated("split")


@pytest.mark.parametrize("way", ["alone", "split", "grouped", "known", "joint"])
def test_the_next_pass_is_expected_only_where_its_tokens_are_there(foretold, way):
    """They are where two batches take turns; a new grouping waits for the tokens of both."""
    said = (
        replace(foretold, prediction="oracle", p_TLE=None, absent_TCLE=None) if way != "grouped" else foretold
    )
    passes = unit_workload(said, 2, way, most_steps=5, most_sequences=4).passes
    told = [step.next_LE is not None for step in passes]
    if way in ("alone", "joint"):
        assert not any(told)
        return
    assert sum(told) == (len(passes) - 1 if way == "split" else len(passes) // 2)
    for now, after in pairwise(passes):
        if now.next_LE is not None and way != "grouped":
            assert [[e for e, p in enumerate(p_E) if p] for p_E in now.next_LE] == after.experts_L


def test_grouping_needs_predictions(settings):
    said = recordings.told(settings, "switch-32", "translation", print)["oracle"]
    with pytest.raises(ValueError, match="'oracle' predicts no paths to group by"):
        unit_workload(said, 2, "grouped")


def test_fig_6_has_every_rival_and_its_bounds(settings):
    model = published("Switch-32")
    rows = fig6.simulate(settings, model, "translation", 4, print)
    assert {row["system"] for row in rows} == {system.name for system in SYSTEMS}
    assert {row["cache_size"] for row in rows} == {4, 16}
    grid = Grid(rows)
    condition = ("Switch-32", 4, 16)
    assert len({row["tokens"] for row in rows}) == 1, "systems decode different tokens"
    assert grid.faster(condition, "belady-prefetch, TS", GROUPED) >= 1
    assert grid.faster(condition, JOINT, CACHE_MOE) > 1
    best = grid.best("Switch-32", JOINT, CACHE_MOE)
    assert best[0] == max(grid.faster(c, JOINT, CACHE_MOE) for c in grid.by)
    assert grid.faster(condition, "nobody", CACHE_MOE) is None


def test_the_paper_has_se_moe_for_switch_alone():
    assert {s.name for s in SYSTEMS} - {s.name for s in systems_for(published("Mixtral-8"))} == {
        "SE-MoE",
        "Pregated-MoE",
    }


def test_fig_10_from_recording_to_page_and_figures(settings, monkeypatch):
    """The whole way of one item: run, kept, drawn as PNG and SVG, on the page with its targets."""
    monkeypatch.setattr(program, "ITEMS", (fig10.ITEM,))
    monkeypatch.setattr(fig10, "BATCHES", (2, 4))
    monkeypatch.setattr(fig10, "IN_PAPER", {(16, 4): (76.61, 91.90)})
    assert program.run_all([fig10.ITEM], settings) == []
    found = results.load(settings.results / "fig10-simulated.json")
    by = {(r["batch"], r["cache_size"], r["ratio"], r["policy"]): r["hit_ratio"] for r in found.rows}
    assert len(by) == 2 * len(fig10.CACHE_SIZES) * len(fig10.RATIOS) * len(fig10.SHOWN)
    for batch, size, ratio, _ in by:
        assert by[batch, size, ratio, "belady"] >= by[batch, size, ratio, "lru"]
        assert by[batch, 16, ratio, "lru"] >= by[batch, 8, ratio, "lru"]
        if ratio == 0.25:  # the link has time for what is named
            assert by[batch, size, ratio, fig10.DRAFTED] > by[batch, size, ratio, "plec"]
        assert by[batch, size, ratio, "lru"] == by[batch, size, None, "lru"], "hits of LRU depend on no clock"
    for row in found.rows:
        if row["policy"] == "lru" and row["ratio"] is not None:
            assert row["transfer_to_compute"] == pytest.approx(row["ratio"], rel=0.02)
    program.write_page([fig10.ITEM], settings, settings.out / "page" / "results.md")
    text = (settings.out / "page" / "results.md").read_text()
    assert "best hit ratio, A40" in text
    assert "best hit ratio, A40, draft" in text
    assert (settings.out / "page" / "figures" / "paper" / "fig10-simulated.png").stat().st_size > 5000
    drawn = settings.results / "figures" / "fig10-simulated.svg"
    before = drawn.read_bytes()
    program.draw(fig10.ITEM, found, settings)
    assert drawn.read_bytes() == before, "the same figure has other bytes"


def test_table_2_counts_what_grouping_saves(settings):
    rows = table2._simulate(settings, published("Switch-32"), 4, print)
    activated = {row["way"]: row["activated"] for row in rows}
    assert activated["true paths"] <= activated["without TS"]
    assert len({row["tokens"] for row in rows}) == 1
    targets = list(table2._targets({(r["model"], r["batch"], r["cache_size"], r["way"]): r for r in rows}))
    assert [target.asked for target in targets] == [16.19, pytest.approx(100 * (881.91 / 854.19 - 1))]
    assert targets[0].got == targets[1].got
    others = [row | {"model": "Switch-64"} for row in rows]  # which gain more
    for row in others:
        row["tokens_per_s"] *= 2 if row["way"] == "with TS" else 1
    both = {(r["model"], r["batch"], r["cache_size"], r["way"]): r for r in rows + others}
    best, first, second = table2._targets(both)
    assert best.got == second.got > first.got
    assert best.at.startswith("Switch-64, ")
    assert table2.ITEM.conditions(replace(settings, quick=False))["batches"] == [8, 16, 32, 64]


def test_what_is_hidden_is_what_ran_beside_another_unit():
    stats = {
        "hidden_predict_seconds": 2.0,
        "hidden_group_seconds": 1.0,
        "predict_seconds": 1.0,
        "group_seconds": 0.0,
    }
    assert serving.hidden_share(stats) == 0.75
    assert serving.hidden_share(dict.fromkeys(stats, 0.0)) is None


def test_disturbed_runs_are_called_so():
    still = {"stolen": 0.0, "others": 0.0, "disturbed": False}
    busy = {"stolen": 0.2, "others": 0.5, "disturbed": True}
    assert measured.quiet([still, still]).startswith("No run was disturbed")
    assert measured.quiet([still, busy]).startswith("**1 of 2 runs were disturbed**")
    assert "at worst 70%" in measured.quiet([still, busy])


class _SlowRing:
    """Whom SE-MoE's ring evicts and fetches, by looking at everybody."""

    def __init__(self, shape: MoEShape):
        self.shape, self.layer, self.residents = shape, shape.num_layers - 1, []

    def ahead(self, expert: ExpertId) -> int:
        return (expert.layer - self.layer - 1) % self.shape.num_layers

    def victim(self, offered: set[ExpertId]) -> ExpertId | None:
        return max((e for e in self.residents if e in offered), key=self.ahead, default=None)

    def prefetch(self) -> ExpertId | None:
        others = [
            ExpertId(layer, e) for layer, n in enumerate(self.shape.experts_per_layer) for e in range(n)
        ]
        missing = [e for e in others if e not in self.residents and self.ahead(e) < self.shape.num_layers - 1]
        return min(missing, key=lambda e: (self.ahead(e), e.expert), default=None)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans()), max_size=40))
def test_the_ring_finds_whom_looking_at_everybody_finds(steps):
    """Residents are kept by layer since SE-MoE took most of the simulator's time; whoever goes is the same."""
    shape = MoEShape((4, 4, 4))
    ring, slow = SIMULATED["se-moe"](shape, 6), _SlowRing(shape)
    for layer, number, opens in steps:
        expert = ExpertId(layer, number)
        if opens:
            ring.layer_opened(layer, [])
            slow.layer = layer
        elif expert in slow.residents:
            ring.evicted(expert)
            slow.residents.remove(expert)
        else:
            ring.loaded(expert)
            slow.residents.append(expert)
        offered = set(slow.residents[::2])
        assert ring.choose_victim(offered, expert) == slow.victim(offered)
        assert ring.next_prefetch(slow.residents) == slow.prefetch()


def test_costs_are_of_the_published_sizes():
    """What the simulator moves for an expert is what the configuration says an expert has, float32 for Switch."""
    from expertflow.sim.hardware import model_size

    for model in MODELS:
        built = on_meta(model.config())
        itemsize = 4 if model.recording.startswith("switch") else 2
        assert math.isclose(model_size(model.size).expert_bytes, count(built).expert * itemsize)


def test_fig_4_draws_the_last_steps_of_both_pipelines(tmp_path, monkeypatch):
    """Eight steps of a clock of our own: six are drawn, and the table has the busy seconds of all."""

    def serve(settings, small, *, timeline, units, **given):
        for step in range(8):
            timeline.add("compute", f"unit {step % units}", 10.0 + step, 10.9 + step)
            timeline.add("predict", "online", 10.2 + step, 10.4 + step, hidden=units > 1)
        stats = dict.fromkeys(("hidden_group_seconds", "group_seconds", "predict_seconds"), 0.0)
        stats |= {"hidden_predict_seconds": 1.6, "scheduling_share": 0.1}
        return {
            "units": units,
            "tokens_per_s": 1.0,
            "engine": stats,
            "stolen": 0.0,
            "others": 0.0,
            "disturbed": False,
        }

    monkeypatch.setattr(serving.measured, "serve", serve)
    settings = Settings(out=tmp_path, quick=True)
    found = results.run(serving.FIG4, settings, print)
    assert [row["pipeline"] for row in found.rows] == ["sequential", "dual-batch"]
    computed = [span for span in found.rows[0]["spans"] if span[0] == "compute"]
    assert [span[2] for span in computed] == pytest.approx([0, 1, 2, 3, 4, 5])
    (table,) = serving.FIG4.section(found).tables
    assert table.rows[1][1] == "1.60"
    assert table.rows[1][6] == "100%"
    assert [path.suffix for path in program.draw(serving.FIG4, found, settings)] == [".png", ".svg"]


@pytest.fixture
def on_clock_runs(settings, monkeypatch):
    """Rows of all systems of Fig. 6 on the clock, without a model. Steps take 500 ms; two batches that meet, 800."""
    cases = []

    class Done:
        layers, expert_bytes = 6, 100

        def measures(self):
            return {"step_seconds": 0.5, **QUIET}

    def run(folder, case, steps, part):
        cases.append(case)
        return Done()

    def run_joint(folder, case, steps, part):
        cases.append(case)
        return {"step_seconds": 0.8, **QUIET}

    monkeypatch.setattr(measured, "run", run)
    monkeypatch.setattr(measured, "run_joint", run_joint)
    monkeypatch.setattr(measured, "least_loads", lambda run, slots: {48: 6.0, 96: 1.0}[slots])
    monkeypatch.setattr(measured, "choose_link", lambda *_: (1000, 0.5))
    small = measured.Small("switch-32", Path("nowhere"), "chat", 32)
    return measured.decode(settings, small, 4, [8, 16], on_clock.SYSTEMS, print), cases


QUIET = {"stolen": 0.0, "others": 0.0, "disturbed": False}


def test_who_has_one_pool_gets_no_slots_of_layers_that_rest(on_clock_runs):
    """Half of the layers are an encoder's: eight for each of the others are four for each of all."""
    _, cases = on_clock_runs
    assert [
        (case.policy, case.batch, case.batches, case.cache_size, case.bytes_per_s) for case in cases[:7]
    ] == [
        ("lru", 8, 1, 32, None),
        ("cache-moe", 4, 2, 8.0, 1000),
        ("pregated-moe", 4, 2, 8.0, 1000),
        ("lru", 4, 2, 8.0, 1000),
        ("plec", 4, 2, 4.0, 1000),
        ("plec", 4, 2, 4.0, 1000),
        ("cache-moe", 8, 1, 8.0, 1000),
    ]
    assert [case.cache_size for case in cases[7:]] == [16.0, 16.0, 16.0, 8.0, 8.0, 16.0]


def test_throughput_on_the_clock_counts_the_rows_that_a_step_decodes(on_clock_runs):
    """And its bound is the link's where that takes longer than having everything in memory, which is 500 ms."""
    rows, _ = on_clock_runs
    rate = {(row["system"], row["cache_size"]): row["tokens_per_s"] for row in rows}
    assert rate[measured.ALL, 32] == rate[CACHE_MOE_BOTH, 8] == 16.0
    assert rate[CACHE_MOE, 8] == rate[on_clock.OURS, 8] == 8.0
    assert rate[on_clock.OURS_JOINT, 8] == 10.0
    assert rate[measured.BOUND, 8] == pytest.approx(8 / 0.6)
    assert rate[measured.BOUND, 16] == 16.0
    conditions = {
        "models": ["switch-32"],
        "ratio": 2,
        "predictor": "none",
        "systems": list(on_clock.SYSTEMS),
    }
    result = Result("fig6", "measured", "", conditions, {"part": {"rows": rows}})
    section = on_clock.throughput(result)
    assert [line[-4:] for line in section.tables[0].rows] == [("1.00x", "1.25x", "0.62x", "0%, 0%")] * 2
    one, joint = section.targets
    assert (one.got, joint.got) == (1.0, 1.25)
    assert one.bound == joint.bound == pytest.approx(8 / 0.6 / 8)


def test_a_model_that_was_not_recorded_is_predicted_by_the_online_table(settings, tmp_path):
    """`make zoo` gives other bits on another processor; a predictor of the recorded model would be refused by it."""
    folder = write_checkpoint("switch_safetensors", tmp_path / "switch-32")
    said = []
    whole = replace(settings, quick=False)
    found = measured.predictor(whole, measured.Small("switch-32", folder, "translation", 8), said.append)
    assert found == recordings.UNTRAINED
    assert said == [f"switch-32: recorded of another training than {folder}, so the online table predicts"]
    rows = [{"model": "switch-32", "predictor": found}, {"model": "tiny-moe", "predictor": "trained"}]
    result = Result("fig6", "measured", "", {"quick": False}, {"part": {"rows": rows}})
    assert measured.untrained(result)[0].startswith("switch-32: with the online table")
    assert measured.untrained(replace(result, conditions={"quick": True})) == []


def test_a_model_that_was_recorded_is_predicted_by_the_trained_one(settings, monkeypatch):
    trained = []
    monkeypatch.setattr(recordings, "trained", lambda _, *what: trained.append(what[:2]))
    whole = replace(settings, quick=False, traces=COMMITTED)
    found = measured.predictor(whole, measured.models(settings)[0], print)
    assert Path(found).name == "tiny-moe-chat"
    assert trained == [("tiny-moe", "chat")]


def test_the_scheduler_on_the_clock_is_judged_by_model(settings, monkeypatch):
    """Switch is measured where it was trained, over a link of its own; the embedded model over what it always had."""
    there = [measured.Small(name, Path(name), "chat", 32) for name in ("qwen1.5-moe", "switch-32")]
    tiny = measured.models(settings)[0]
    monkeypatch.setattr(measured, "models", lambda settings: [tiny, *there])
    monkeypatch.setattr(measured, "choose_link", lambda *_: (5_000_000, 0.5))

    def serve(settings, small, *, batch, units, link, predictor, schedule, execution, tokens, tries=False):
        engine = {"regroupings": 3, "late": 0, "scheduler": "off: not worth it" if tries else ""}
        faster = next(rates) if small.name == "tiny-moe" else 1.5 if schedule == "auto" else 1.0
        row = {
            "model": small.name,
            "batch": batch,
            "link": link,
            "tokens_per_s": faster,
            "loads_per_token": 1.0,
        }
        return row | {"engine": engine, "stolen": 0.0, "others": 0.0, "disturbed": False}

    monkeypatch.setattr(measured, "serve", serve)
    rates = iter([1.0, 3.0, 2.0, 1.0, 3.0, 3.0, 2.0, 1.0])  # of the embedded model: ways in turn, twice
    monkeypatch.setattr(serving, "_rounds", lambda settings: 2)
    found = results.run(serving.TABLE2, settings, print)
    assert [(row["model"], row["link"]) for row in found.rows[::8]] == [
        ("tiny-moe", "20MB/s"),
        ("switch-32", "5 MB/s"),
    ]
    section = serving.TABLE2.section(found)
    assert [(target.name, target.got) for target in section.targets] == [
        ("tiny-moe, gain of TS on the clock", pytest.approx(100.0)),  # 1 s + 1/3 s and 2/3 s
        ("switch-32, gain of TS on the clock", pytest.approx(50.0)),
    ]
    assert len(section.tables[0].rows) == 8
    assert "Found out by switch-32, round 2: off: not worth it." in section.notes
