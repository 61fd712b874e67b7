"""The evaluation against slow loops, its errors, and what it draws."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from expertflow.predictor import evaluate as ev
from expertflow.predictor import metrics, ranking, replay, report
from expertflow.predictor.baselines import multi_hot
from expertflow.predictor.evaluate import Conditions, Rows, evaluate, judge
from tests.predictor import synthetic
from tests.predictor.synthetic import EXPERTS, LAYERS

SMALL = Conditions(batches=(1, 4, 8))


class Knows:
    """A PathPredictor told the future by its tokens: what it says at a token is the truth there."""

    def __init__(self, sequences, sharpness=1.0):
        self.path = {s.target_ids_T.tobytes(): s.target_routes_TLK for s in sequences}
        self.sharpness = sharpness

    def predict(self, context):
        p_BSLE = torch.zeros(*context.new_BS.shape, LAYERS, EXPERTS)
        for row in range(len(p_BSLE)):
            mask_T = context.target_mask_BT[row]
            ids = context.target_BT[row][mask_T].numpy().astype(np.int32)
            known = next(r for key, r in self.path.items() if key.startswith(ids.tobytes()))
            routes = torch.from_numpy(known[: len(ids)].astype(np.int64))
            said = torch.zeros(len(mask_T), LAYERS, EXPERTS)
            said[mask_T] = multi_hot(routes, EXPERTS).float() * self.sharpness
            p_BSLE[row] = said[len(mask_T) - context.num_new :]
        return p_BSLE


@pytest.fixture(scope="module")
def recorded():
    return synthetic.sequences(30) + synthetic.sequences(12, seed=5, task="math")


@pytest.fixture(scope="module")
def found(recorded):
    predictors = {"mine": Knows(recorded, 0.9)}
    return evaluate(synthetic.meta(), recorded, predictors, fitted_on=["chat"], conditions=SMALL)


def row_of(found, predictor, task="chat", phase="decode"):
    rows = [
        r for r in found["results"] if (r["predictor"], r["task"], r["phase"]) == (predictor, task, phase)
    ]
    assert len(rows) == 1
    return rows[0]


def test_all_baselines_are_beside_it_always(found):
    for task in ("chat", "math"):
        names = [r["predictor"] for r in found["results"] if r["task"] == task and r["phase"] == "decode"]
        assert names == [
            "oracle", "TLP", "SLP", "popularity", "token table", "online table", "mine", "mine + online table",
        ]  # fmt: skip
    assert row_of(found, "mine")["in_domain"]
    assert not row_of(found, "mine", "math")["in_domain"]
    json.dumps(found, allow_nan=False)


def test_the_oracle_is_the_bound(found):
    for task in ("chat", "math"):
        oracle = row_of(found, "oracle", task)
        assert oracle["recall_equal_budget"] == 1.0
        assert oracle["batches"]
        for batch in oracle["batches"].values():
            assert batch["experts_wasted"] == batch["experts_missed"] == 0


class KnowsWhen(Knows):
    """Also knows when an expert will be used again."""

    def next_use_path(self, context):
        (ids,) = context.target_BT.numpy().astype(np.int32)
        truth_TLE = multi_hot(torch.from_numpy(self.path[ids.tobytes()].astype(np.int64)), EXPERTS)
        return ranking.next_use(truth_TLE).clamp(max=1e6)[None]


def test_next_uses_are_ranked_beside_recency_and_frequency():
    sequences = synthetic.sequences(30)
    long = [
        s for s in sequences if len(s.target_ids_T) - s.num_prefill >= ev.RANKED_LENGTH and s.split == "test"
    ]
    predictors = {"when": KnowsWhen(sequences), "not asked": Knows(sequences)}
    found = evaluate(synthetic.meta(), sequences, predictors, fitted_on=["chat"], conditions=SMALL)
    (row,) = found["next_use"]
    assert row["sequences"] == len(long) > 0
    accuracy = row["pairwise_accuracy"]
    assert set(accuracy) == {"when", "when + use", "use, learnt", "recency", "frequency"}
    assert accuracy["when"] == pytest.approx(1.0)
    assert accuracy["when + use"] > accuracy["use, learnt"], "the mixture was not told what the head expects"
    assert 0.3 < accuracy["recency"] < 0.9
    assert report.next_use_table(found).row_count == 1


def test_who_knows_is_perfect_and_the_others_are_not(found):
    """Also a test of every shift between padded groups and what a predictor is shown."""
    mine = row_of(found, "mine")
    assert mine["recall_equal_budget"] == 1.0
    for batch in mine["batches"].values():
        assert batch["accuracy"] == batch["precision"] == batch["recall_equal_budget"] == 1.0
        assert batch["experts_wasted"] == batch["experts_missed"] == 0
    assert row_of(found, "mine", phase="prefill")["recall_equal_budget"] == 1.0
    recall = {
        name: row_of(found, name)["recall_equal_budget"]
        for name in ("TLP", "SLP", "popularity", "token table")
    }
    assert recall["token table"] > max(recall["TLP"], recall["SLP"], recall["popularity"]) + 0.1
    assert recall["token table"] < 0.9


def test_tokens_are_counted_once(found, recorded):
    held_out = [s for s in recorded if s.split == "test" and s.task == "chat"]
    decode = sum(len(s.target_ids_T) - s.num_prefill for s in held_out)
    assert row_of(found, "mine")["tokens"] == decode == row_of(found, "TLP")["tokens"]
    assert row_of(found, "mine", phase="prefill")["tokens"] == sum(s.num_prefill for s in held_out)
    assert row_of(found, "mine")["batches"]["1"]["batches"] == decode


def test_slp_says_nothing_of_the_first_layer_and_tlp_nothing_in_prefill(found):
    assert row_of(found, "SLP")["layers"] == [1, 2]
    assert row_of(found, "TLP", phase="prefill")["layers"] == []


def test_tlp_by_hand(found, recorded):
    hits = total = 0
    for s in (s for s in recorded if s.split == "test" and s.task == "chat"):
        for t in range(s.num_prefill, len(s.target_ids_T)):
            for now, before in zip(s.target_routes_TLK[t], s.target_routes_TLK[t - 1], strict=True):
                hits += len(set(now.tolist()) & set(before.tolist()))
                total += len(now)
    assert row_of(found, "TLP")["recall_equal_budget"] == pytest.approx(hits / total)


def test_batches_are_different_sequences_at_one_step():
    step_N = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2])
    assert ev._batches(step_N, 2).tolist() == [[0, 1], [3, 4], [5, 6]]
    assert ev._batches(step_N, 4).tolist() == [[3, 4, 5, 6]]
    assert ev._batches(step_N, 1).flatten().tolist() == list(range(9))
    assert ev._batches(step_N, 8).tolist() == []


def test_a_batch_is_judged_by_the_papers_formula():
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(24, LAYERS, EXPERTS, generator=generator).half()
    truth = torch.rand(24, LAYERS, EXPERTS, generator=generator) < 0.25
    rows = Rows(p, truth, torch.arange(24) // 4)
    got = judge(rows, Conditions(batches=(4,)))
    threshold = got["threshold"]
    expected = [
        metrics.batch_accuracy(
            truth[first : first + 4].any(0), (p[first : first + 4].float() > threshold).any(0)
        )
        for first in range(0, 24, 4)
    ]
    # Every layer is active in every batch here, so the order of the means does not matter.
    assert got["batches"]["4"]["accuracy"] == pytest.approx(sum(expected) / len(expected))
    single = metrics.guesses_at(p.float(), truth, threshold)
    assert single.recall == pytest.approx(single.precision, abs=0.02)


def test_the_seed_decides_the_batches(recorded):
    both = [
        evaluate(synthetic.meta(), recorded, {}, ["chat"], ["chat"], conditions=replace(SMALL, seed=seed))[
            "results"
        ]
        for seed in (0, 0, 1)
    ]
    assert both[0] == both[1]
    assert both[0] != both[2]


def test_more_tokens_served_before_help_the_online_table(recorded):
    recall = [
        row_of(
            evaluate(
                synthetic.meta(), recorded, {}, ["chat"], ["chat"], Conditions(batches=(1,), warm_tokens=warm)
            ),
            "online table",
        )["recall_equal_budget"]
        for warm in (0, 10_000)
    ]
    assert recall[1] > recall[0] + 0.02


def test_max_tokens_bounds_the_work(recorded):
    some = evaluate(
        synthetic.meta(), recorded, {}, ["chat"], ["chat"], Conditions(batches=(1,), max_tokens=40)
    )
    assert row_of(some, "TLP")["tokens"] < 60


def test_an_encoder_is_a_side_of_its_own():
    recorded = synthetic.sequences(12, source_layers=2)
    found = evaluate(synthetic.meta(source_layers=2), recorded, {}, ["chat"], conditions=SMALL)
    assert {(r["side"], r["phase"]) for r in found["results"]} == {
        ("decoder", "decode"),
        ("decoder", "prefill"),
        ("encoder", "prefill"),
    }
    table = next(r for r in found["results"] if r["side"] == "encoder" and r["predictor"] == "token table")
    assert table["layers"] == [0, 1]
    assert table["tokens"] == sum(len(s.source_ids_S) for s in recorded if s.split == "test")
    assert table["recall_equal_budget"] > 0.5


def test_look_ahead_brings_the_untrained_default(recorded):
    """The stand-in knows the truth past the first layer."""

    def hidden(group: replay.Group):
        truth = multi_hot(group.routes_BTLK, EXPERTS).float() * 0.8 + 0.1
        truth[:, :, 0] = float("nan")
        return {"look-ahead": truth}

    found = evaluate(
        synthetic.meta(), recorded, {"mine": Knows(recorded, 0.5)}, ["chat"], ["chat"], SMALL, hidden
    )
    names = {r["predictor"] for r in found["results"]}
    assert {"look-ahead", "untrained default", "mine + online table + look-ahead"} <= names
    assert row_of(found, "look-ahead")["layers"] == [1, 2]
    default = row_of(found, "untrained default")
    assert default["layers"] == [0, 1, 2]
    assert min(default["recall_equal_budget_by_layer"][1:]) > 0.99
    assert default["recall_equal_budget_by_layer"][0] < 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fitted_on": ["poems"]}, "poems"),
        ({"tasks": ["poems"]}, "no held-out sequence is of the task 'poems'"),
    ],
)
def test_unknown_tasks_are_refused(recorded, change, message):
    given = {"fitted_on": ["chat"]} | change
    with pytest.raises(ValueError, match=message):
        evaluate(synthetic.meta(), recorded, {}, **given)


def test_an_empty_split_is_refused(recorded):
    train = [s for s in recorded if s.split == "train"]
    with pytest.raises(ValueError, match="'test' is empty: record more prompts"):
        evaluate(synthetic.meta(), train, {}, ["chat"])
    test = [s for s in recorded if s.split == "test"]
    with pytest.raises(ValueError, match=r"nothing to count; there it has \[\]"):
        evaluate(synthetic.meta(), test, {}, ["chat"])


def test_conditions_are_checked():
    with pytest.raises(ValueError, match="between 1 and 64"):
        Conditions(batches=(1, 128))
    with pytest.raises(ValueError, match="max_tokens=0"):
        Conditions(max_tokens=0)


def test_a_table_shows_the_largest_batch_where_the_usual_one_was_not_measured(found):
    usual = [column.header for column in next(report.tables(found)).columns]
    fewer = copy.deepcopy(found)
    for row in fewer["results"]:
        row.get("batches", {}).pop("8", None)
    table = next(report.tables(fewer))
    sizes = {int(size) for row in fewer["results"] for size in row.get("batches", {})}
    assert (usual[2], table.columns[2].header) == ("batch 8", f"batch {max(sizes)}")
    assert "-" not in list(table.columns[2].cells)[:1]


def test_tables_and_figures(found, tmp_path):
    pytest.importorskip("matplotlib")
    titles = [table.title for table in report.tables(found)]
    assert any("math (cross-domain), decode" in title for title in titles)
    for size, unit, factor in ((None, "experts", 1), (2_000_000, "MB", 2)):
        table = next(report.tables(found, size))
        assert table.title.endswith(f"in {unit}")
        wasted = row_of(found, "TLP")["batches"]["8"]["experts_wasted"]
        assert list(table.columns[0].cells)[:2] == ["oracle", "TLP"]
        assert list(table.columns[5].cells)[1] == f"{wasted * factor:.1f}"
    files = {file.name for file in report.save_figures(found, tmp_path)}
    assert {
        "accuracy-decoder-decode.png",
        "accuracy-decoder-decode.svg",
        "curves-decoder-decode.png",
    } <= files
    assert all((tmp_path / file).stat().st_size > 1000 for file in files)
