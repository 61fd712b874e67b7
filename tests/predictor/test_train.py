from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from expertflow.predictor import dataset
from expertflow.predictor import train as training
from expertflow.predictor.dataset import collate, group, read_paths
from expertflow.predictor.model import PredictedModel, RoutingPathPredictor
from expertflow.predictor.prior import start_from_counts
from expertflow.predictor.sizes import TrainSettings, sizes_of
from expertflow.predictor.storage import DESCRIPTION, WEIGHTS, load_predictor, read_description
from expertflow.predictor.train import (
    CHECKPOINT,
    forget_unseen,
    hits_at_equal_budget,
    schedule,
    train,
    train_predictor,
)
from expertflow.trace import TracedSequence, TraceWriter
from tests.predictor.traced import FINGERPRINT, meta_of, write

SMALL = {"hidden": 16, "feed_forward": 32, "layers": 1, "encoder_layers": 1, "heads": 2}
QUICK = {"minutes": 0, "epochs": 6, "batch_tokens": 256, "threads": 1, "patience": 100}


def silent(*_: object) -> None:
    pass


def small_predictor(paths, arch: str = "causal") -> RoutingPathPredictor:
    torch.manual_seed(0)
    return RoutingPathPredictor(sizes_of(arch, **SMALL), PredictedModel.of(paths.meta))


@pytest.mark.parametrize(
    ("arch", "source_layers"), [("causal", 0), ("paper", 0), ("causal", 1), ("paper", 1)]
)
def test_learns_a_rule(tmp_path, arch, source_layers):
    """Experts follow from the token, in the encoder's layers too. Chance is 0.25."""
    folder = write(tmp_path / "trace", meta_of((8, 8), source_layers, vocab_size=16), prompts=40)
    settings = TrainSettings(**{**QUICK, "epochs": 30, "learning_rate": 0.01, "unknown_share": 0.0})
    metrics = train_predictor([folder], tmp_path / "out", {"arch": arch, **SMALL}, settings, say=silent)
    assert metrics["recall"] == 1.0
    predictor = load_predictor(tmp_path / "out", FINGERPRINT)
    paths = read_paths([folder], None, 0.05, 0)
    assert training.evaluate(predictor, paths, 256)[0] == 1.0


def test_next_use_is_learnt(tmp_path):
    """Token t + 1 is followed by t + 2: what comes in the next passes follows from the newest token."""
    meta = meta_of((12,), top_k=1, vocab_size=12)
    with TraceWriter(tmp_path / "trace", meta) as writer:
        for prompt in range(30):
            ids = ((np.arange(40) + prompt) % 12).astype(np.int32)
            nothing = np.zeros((0, 0, 1), np.uint8)
            routes = ids.astype(np.uint8).reshape(-1, 1, 1)
            empty = np.zeros(0, np.int32)
            writer.append(
                TracedSequence(prompt, 0, "train", "count", empty, nothing, None, ids, routes, None, 2)
            )
    settings = TrainSettings(**{**QUICK, "epochs": 30, "batch_tokens": 128, "learning_rate": 0.01})
    train_predictor([tmp_path / "trace"], tmp_path / "out", SMALL, settings, say=silent)
    predictor = load_predictor(tmp_path / "out")
    state = predictor.start()
    _, states_BND = predictor.advance(state, torch.tensor([[3, 4, 5]]))
    passes_E = predictor.next_use(states_BND[:, -1])[0]
    order = [(6 + n) % 12 for n in range(12)]  # expert 6 is next, 5 was just used
    assert passes_E[order[0]] < 1.5
    for sooner, later in ((0, 1), (1, 3), (3, 7), (7, 11)):
        assert passes_E[order[sooner]] + 0.3 < passes_E[order[later]]


@pytest.mark.parametrize("source_layers", [0, 1])
def test_training_starts_from_the_counts(tmp_path, source_layers):
    """A rule by token is known before the first step, in layers of different width; one unseen token is not."""
    folder = write(tmp_path / "trace", meta_of((8, 5), source_layers, vocab_size=16), prompts=40)
    paths = read_paths([folder], None, 0.1, 0)
    predictor = small_predictor(paths)
    assert training.evaluate(predictor, paths, 256)[0] < 0.6
    start_from_counts(predictor, paths)
    assert training.evaluate(predictor, paths, 256)[0] == 1.0
    table = predictor.target_heads.token_table.weight
    assert table[:16].abs().sum(1).min() > 0
    assert not table[16].any()  # the row of tokens never seen


class Killed(Exception):
    pass


def test_epochs_may_differ_in_their_number_of_batches(tmp_path, monkeypatch):
    """Training ended in an IndexError where a later order packed into fewer batches than the first."""
    paths = read_paths([write(tmp_path / "trace", meta_of(), prompts=60)], None, 0.1, 0)
    settings = TrainSettings(**{**QUICK, "epochs": 8, "batch_tokens": 64})
    monkeypatch.setattr(dataset, "_BATCHES_PER_POOL", 2)
    orders = [group(paths.train, 64, training._mix(settings, epoch)) for epoch in range(8)]
    assert min(map(len, orders)) < len(group(paths.train, 64, 0)), "nothing is tried otherwise"
    curve = train(small_predictor(paths), paths, settings, tmp_path / "out", silent)
    assert curve[-1].step == 8 * len(group(paths.train, 64, 0))


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    """Killed between two checkpoints, so some steps are repeated; the dropped tokens must be the same ones."""
    paths = read_paths([write(tmp_path / "trace", meta_of())], None, 0.1, 0)
    settings = TrainSettings(**QUICK)
    whole = small_predictor(paths)
    curve = train(whole, paths, settings, tmp_path / "whole")

    def kill(step: int, steps: int) -> None:
        if step == steps // 2 + 2:
            raise Killed

    monkeypatch.setattr(training, "_VALIDATIONS", 4)
    with pytest.raises(Killed):
        train(small_predictor(paths), paths, settings, tmp_path / "killed", advance=kill)
    assert (tmp_path / "killed" / CHECKPOINT).exists()
    steps: list[int] = []
    resumed = small_predictor(paths)
    torch.nn.init.normal_(resumed.embedding.weight)  # all of it must come from the checkpoint
    again = train(resumed, paths, settings, tmp_path / "killed", advance=lambda step, _: steps.append(step))
    assert 0 < steps[0] < steps[-1] == curve[-1].step
    assert again[-1].recall == curve[-1].recall
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    paths = read_paths([write(tmp_path / "trace", meta_of())], None, 0.1, 0)

    def kill(step: int, steps: int) -> None:
        if step == steps // 2:
            raise Killed

    with pytest.raises(Killed):
        train(small_predictor(paths), paths, TrainSettings(**QUICK), tmp_path, advance=kill)
    with pytest.raises(ValueError, match="differs in learning_rate"):
        train(small_predictor(paths), paths, TrainSettings(**QUICK, learning_rate=0.1), tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"half")
    with pytest.raises(ValueError, match="delete it to begin anew"):
        train(small_predictor(paths), paths, TrainSettings(**QUICK), tmp_path)


def test_early_stop_keeps_the_best(tmp_path, monkeypatch):
    """Validation recall is made to peak at the third of many validations."""
    paths = read_paths([write(tmp_path / "trace", meta_of())], None, 0.1, 0)
    recalls = iter([0.1, 0.2, 0.5] + [0.3] * 50)
    weights = []

    def evaluate(predictor, *_):
        weights.append(predictor.embedding.weight.clone())
        return next(recalls), 1.0

    monkeypatch.setattr(training, "evaluate", evaluate)
    predictor = small_predictor(paths)
    curve = train(predictor, paths, TrainSettings(**{**QUICK, "patience": 4}), tmp_path)
    assert len(curve) == 7
    kept = weights[2].to(torch.bfloat16)
    assert torch.equal(predictor.embedding.weight[0], kept[0])
    assert not torch.equal(weights[-1].to(torch.bfloat16)[0], kept[0])


def test_a_time_limit_ends_training_at_rate_zero(tmp_path):
    paths = read_paths([write(tmp_path / "trace", meta_of())], None, 0.1, 0)
    settings = TrainSettings(**{**QUICK, "epochs": 100_000, "minutes": 0.01})
    curve = train(small_predictor(paths), paths, settings, tmp_path)
    assert 0.6 <= curve[-1].seconds < 20


def test_nan_loss(tmp_path):
    paths = read_paths([write(tmp_path / "trace", meta_of())], None, 0.1, 0)
    predictor = small_predictor(paths)
    torch.nn.init.constant_(predictor.target_heads.project.weight, float("nan"))
    with pytest.raises(ValueError, match=r"the loss is nan at step 0 .*lower --learning-rate"):
        train(predictor, paths, TrainSettings(**QUICK), tmp_path)


def test_unseen_tokens_share_a_row(tmp_path):
    paths = read_paths([write(tmp_path / "trace", meta_of(), prompts=2)], None, 0.5, 0)
    predictor = small_predictor(paths)
    seen = set(collate(paths.train, paths.meta).target_BT.flatten().tolist())
    never = next(token for token in range(40) if token not in seen)
    before = predictor.embedding.weight.clone()
    forget_unseen(predictor, paths)
    assert torch.equal(predictor.embedding.weight[never], before[-1])
    token = int(paths.train[0].target_ids_T[0])
    assert torch.equal(predictor.embedding.weight[token], before[token])


def test_hits_at_equal_budget_by_hand():
    score = torch.tensor([[[0.9, 0.8, 0.1], [0.1, 0.2, 0.3]], [[0.5, 0.4, 0.3], [0.1, 0.2, 0.3]]])
    needed = torch.tensor([[[1, 0, 1], [0, 0, 1]], [[0, 0, 0], [1, 0, 0]]]).bool()
    # Token 0: {0, 1} for {0, 2} and {2} for {2}; token 1: nothing for nothing, {2} for {0}.
    assert hits_at_equal_budget(score, needed) == (2, 4)


def test_schedule():
    assert 0 < schedule(0, 0.1) < 0.2
    assert schedule(0.1, 0.1) == pytest.approx(1)
    assert schedule(0.55, 0.1) == pytest.approx(0.5)
    assert schedule(1, 0.1) == pytest.approx(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "trace", meta_of(), prompts=10)
    train_predictor(
        [folder / "trace"], folder / "out", SMALL, TrainSettings(**{**QUICK, "epochs": 1}), say=silent
    )
    return folder


def copy_of(trained, tmp_path):
    for name in (WEIGHTS, DESCRIPTION):
        (tmp_path / name).write_bytes((trained / "out" / name).read_bytes())
    return tmp_path


def test_what_is_on_disk(trained):
    description = read_description(trained / "out")
    assert description["model"]["fingerprint"] == FINGERPRINT
    assert description["sizes"]["arch"] == "causal"
    assert description["training"]["seed"] == 0
    assert description["bytes"] == load_predictor(trained / "out").num_bytes()
    assert 0 < description["metrics"]["recall"] <= 1
    assert description["metrics"]["curve"][-1]["recall"] <= description["metrics"]["recall"]
    assert not (trained / "out" / CHECKPOINT).exists()
    assert not list((trained / "out").glob("*.new"))
    weights, said = (trained / "out" / WEIGHTS).stat(), (trained / "out" / DESCRIPTION).stat()
    assert weights.st_mode == said.st_mode, "others may read one and not the other"


def test_a_finished_predictor_is_not_overwritten(trained):
    with pytest.raises(ValueError, match="already has a trained predictor"):
        train_predictor([trained / "trace"], trained / "out", SMALL, TrainSettings(**QUICK), say=silent)


def test_storage_errors(trained, tmp_path):
    folder = copy_of(trained, tmp_path)
    with pytest.raises(ValueError, match=rf"predicts synthetic \(fingerprint {FINGERPRINT}\)"):
        load_predictor(folder, "f" * 16)
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_predictor(folder)
    (folder / WEIGHTS).write_bytes(weights.replace(FINGERPRINT.encode(), b"f" * 16))
    with pytest.raises(ValueError, match="halves of two predictors"):
        load_predictor(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_predictor(folder)
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / WEIGHTS).write_bytes(weights)
    for change, message in (
        ({"version": 99}, "version 99"),
        ({"sizes": {**description["sizes"], "hidden": 32}}, "does not fit"),
        ({"sizes": {**description["sizes"], "colour": 1}}, "damaged"),
    ):
        (folder / DESCRIPTION).write_text(json.dumps({**description, **change}))
        with pytest.raises(ValueError, match=message):
            load_predictor(folder)
    (folder / DESCRIPTION).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_predictor(folder)
    (folder / DESCRIPTION).unlink()
    with pytest.raises(ValueError, match="expertflow train-predictor"):
        load_predictor(folder)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"minutes": -1}, "minutes=-1"),
        ({"unknown_share": 1.5}, "unknown_share=1.5"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**wrong)
