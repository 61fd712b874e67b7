"""Rows by token that lean on the model's embedding while they are trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertflow.predictor.dataset import read_paths
from expertflow.predictor.model import PredictedModel, RoutingPathPredictor
from expertflow.predictor.prior import start_from_counts
from expertflow.predictor.sizes import TrainSettings, sizes_of
from expertflow.predictor.storage import load_predictor
from expertflow.predictor.tables import Table, anchor_of
from expertflow.predictor.train import train, train_predictor
from expertflow.trace import TracedSequence, TraceWriter
from tests.predictor.traced import meta_of, write

SMALL = {"hidden": 16, "feed_forward": 32, "layers": 1, "heads": 2}
VOCAB, EXPERTS = 64, 8


def anchored_table() -> Table:
    generator = torch.Generator().manual_seed(0)
    table = Table(VOCAB, 5)
    table.anchor(anchor_of(torch.randn(VOCAB, 12, generator=generator), VOCAB), 0.5)
    torch.nn.init.normal_(table.weight, generator=generator)
    return table


def test_a_folded_table_says_the_same():
    table = anchored_table()
    ids = torch.arange(VOCAB + 1)
    before = table(ids)
    table.fold()
    assert table.project is None
    assert torch.allclose(table(ids), before, atol=1e-6)
    assert torch.allclose(table.weight, before, atol=1e-6)


@pytest.mark.parametrize("anchored", [False, True])
def test_a_hidden_token_has_the_last_row_and_what_the_embedding_says(anchored):
    table = anchored_table() if anchored else Table(VOCAB, 5)
    ids = torch.tensor([0, 7, VOCAB - 1])
    expected = table.weight[-1].expand(3, 5)
    if table.project is not None:
        expected = expected + table.project(table._anchor_VD[ids].float())
    assert torch.allclose(table(table.hide(ids)), expected)
    assert not torch.allclose(table(ids), expected)


def test_explaining_rows_moves_what_can_be_said_and_keeps_the_sums():
    table = anchored_table()
    truth = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    seen = torch.arange(0, VOCAB, 2)
    with torch.no_grad():
        table.project.weight.zero_()
        table.weight.zero_()
        table.weight[seen] = table._anchor_VD[seen].float() @ truth
    before = table(seen).clone()
    table.explain(seen, torch.ones(len(seen)))
    assert torch.allclose(table(seen), before, atol=1e-5)
    assert table.weight[seen].norm() < 0.1 * before.norm()
    unseen = seen + 1
    error = table(unseen) - table._anchor_VD[unseen].float() @ truth
    assert error.norm() < 0.1 * before.norm()


def test_embeddings_may_be_padded_or_short():
    embedding = torch.randn(VOCAB, 12)
    assert torch.equal(
        anchor_of(torch.cat([embedding, torch.full((8, 12), 1e4)]), VOCAB), anchor_of(embedding, VOCAB)
    )
    short = anchor_of(embedding[:50], VOCAB)
    assert not short[50:].any()
    assert short[:50].float().std() == pytest.approx(1, abs=0.05)


@pytest.fixture
def by_embedding(tmp_path):
    """A trace whose experts follow from directions of the embedding; half of the tokens only in the test split."""
    rng = np.random.default_rng(0)
    embedding = torch.from_numpy(rng.standard_normal((VOCAB, 12))).float()
    expert_V = (embedding @ torch.from_numpy(rng.standard_normal((12, EXPERTS))).float()).argmax(1).numpy()
    meta = meta_of((EXPERTS,), top_k=1, vocab_size=VOCAB)
    nothing = np.zeros((0, 0, 1), np.uint8)
    with TraceWriter(tmp_path / "trace", meta) as writer:
        for prompt in range(200):
            held_out = prompt >= 180
            ids = rng.integers(VOCAB // 2, VOCAB, 24) if held_out else rng.integers(0, VOCAB // 2, 24)
            routes = expert_V[ids].astype(np.uint8).reshape(-1, 1, 1)
            split = "test" if held_out else "train"
            empty = np.zeros(0, np.int32)
            writer.append(
                TracedSequence(
                    prompt, 0, split, "t", empty, nothing, None, ids.astype(np.int32), routes, None, 2
                )
            )
    return tmp_path / "trace", embedding, expert_V


@pytest.mark.parametrize("arch", ["causal", "paper"])
def test_tokens_never_seen_are_known_by_their_embedding(by_embedding, tmp_path, arch):
    folder, embedding, expert_V = by_embedding
    recall = {}
    for name, given in (("anchored", embedding), ("numbers", None)):
        settings = TrainSettings(minutes=0, epochs=12, batch_tokens=256, threads=1, unknown_share=0.1)
        train_predictor(
            [folder], tmp_path / name, {**SMALL, "arch": arch}, settings, say=print, embedding_VD=given
        )
        predictor = load_predictor(tmp_path / name)
        unseen = torch.arange(VOCAB // 2, VOCAB)[:, None]
        known = unseen if arch == "paper" else None
        state = predictor.start(
            known, torch.ones(len(unseen), 1 if known is not None else 0, dtype=torch.bool)
        )
        p_BNLE, _ = predictor.advance(state, unseen)
        recall[name] = (p_BNLE[:, 0, 0].argmax(1).numpy() == expert_V[VOCAB // 2 :]).mean()
    assert recall["numbers"] < 0.2, "chance is 0.125"
    assert recall["anchored"] > 0.45


def test_a_resumed_run_leans_on_the_embedding_again(tmp_path):
    paths = read_paths([write(tmp_path / "trace", meta_of(vocab_size=VOCAB))], None, 0.1, 0)
    settings = TrainSettings(minutes=0, epochs=4, batch_tokens=256, threads=1)

    def new() -> RoutingPathPredictor:
        torch.manual_seed(0)
        predictor = RoutingPathPredictor(sizes_of(**SMALL), PredictedModel.of(paths.meta))
        predictor.anchor(torch.randn(VOCAB, 12, generator=torch.Generator().manual_seed(1)))
        start_from_counts(predictor, paths)
        return predictor

    class Killed(Exception):
        pass

    def kill(step: int, steps: int) -> None:
        if step == steps // 2:
            raise Killed

    whole, resumed = new(), new()
    train(whole, paths, settings, tmp_path / "whole")
    with pytest.raises(Killed):
        train(new(), paths, settings, tmp_path / "killed", advance=kill)
    train(resumed, paths, settings, tmp_path / "killed")
    assert torch.equal(whole.embedding.weight, resumed.embedding.weight)
    settings_again = TrainSettings(minutes=0, epochs=4, batch_tokens=256, threads=1)
    bare = RoutingPathPredictor(sizes_of(**SMALL), PredictedModel.of(paths.meta))
    with pytest.raises(ValueError, match="differs in model's embedding"):
        train(bare, paths, settings_again, tmp_path / "killed")
