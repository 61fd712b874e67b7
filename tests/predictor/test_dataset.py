from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from expertflow.predictor import dataset
from expertflow.predictor.dataset import collate, group, read_paths, trained_tokens, within_horizons
from expertflow.predictor.next_use import HORIZONS
from expertflow.trace import TraceWriter
from tests.predictor.traced import meta_of, sequence_of, write


@pytest.mark.parametrize("seed", range(5))
def test_next_use_against_brute_force(seed):
    draw = torch.Generator().manual_seed(seed)
    needed = torch.rand(3, 40, 2, 4, generator=draw) < 0.08
    mask = torch.arange(40) >= torch.tensor([0, 7, 30])[:, None]
    needed &= mask[:, :, None, None]
    used, known = within_horizons(needed, mask)
    for b, t, layer, e in np.ndindex(3, 40, 2, 4):
        later = [u for u in range(t + 1, 40) if needed[b, u, layer, e]]
        for c, horizon in enumerate(HORIZONS):
            is_used = bool(later) and later[0] - t <= horizon
            assert used[b, t, c, layer, e] == is_used
            assert known[b, t, c, layer, e] == bool(mask[b, t] and (is_used or 39 - t >= horizon))


def test_batches_hold_the_routes_and_nothing_else():
    meta, rng = meta_of((8, 5), 0), np.random.default_rng(0)
    sequences = [sequence_of(meta, n, rng, length) for n, length in enumerate((4, 9))]
    sequences[0].target_routes_TLK[1, 0] = 8  # nowhere
    sequences[0].target_routes_TLK[1, 1] = 5  # nowhere, in a narrower layer: not expert 5 of 8
    batch = collate(sequences, meta)
    assert batch.target_mask_BT.tolist() == [[False] * 5 + [True] * 4, [True] * 9]
    assert not batch.target_needed_BTLE[0, :5].any()
    assert not batch.target_needed_BTLE[0, 6].any()
    for row, sequence in enumerate(sequences):
        for t, ids in enumerate(sequence.target_ids_T):
            column = 9 - len(sequence.target_ids_T) + t
            assert batch.target_BT[row, column] == ids
            for layer, experts in enumerate(meta.experts_per_layer):
                expected = {int(e) for e in sequence.target_routes_TLK[t, layer] if e < experts}
                assert set(batch.target_needed_BTLE[row, column, layer].nonzero()[:, 0].tolist()) == expected


def test_sources_are_padded_on_the_right():
    meta, rng = meta_of((8, 8, 8), 1), np.random.default_rng(0)
    batch = collate([sequence_of(meta, n, rng, length) for n, length in enumerate((4, 10))], meta)
    assert batch.source_mask_BS.tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    assert batch.source_needed_BSLE.shape == (2, 5, 1, 8)
    assert batch.target_needed_BTLE.shape == (2, 10, 2, 8)
    assert batch.num_tokens == 7 + 14


def test_grouping_keeps_everything_within_the_limit():
    meta, rng = meta_of(), np.random.default_rng(0)
    sequences = [sequence_of(meta, n, rng, int(rng.integers(2, 60))) for n in range(300)]
    batches = group(sequences, 200, seed=1)
    assert sorted(s.prompt for b in batches for s in b) == list(range(300))
    assert all(len(b) * max(map(trained_tokens, b)) <= 200 for b in batches)
    padded = sum(len(b) * max(map(trained_tokens, b)) for b in batches)
    assert padded < 1.15 * sum(map(trained_tokens, sequences))
    assert [[s.prompt for s in b] for b in group(sequences, 200, seed=1)] == [
        [s.prompt for s in b] for b in batches
    ]
    assert [s.prompt for b in group(sequences, 200, seed=2) for s in b] != [
        s.prompt for b in batches for s in b
    ]


def test_long_texts_are_cut(monkeypatch):
    monkeypatch.setattr(dataset, "LONGEST", 6)
    meta = meta_of()
    batch = collate([sequence_of(meta, 0, np.random.default_rng(0), 20)], meta)
    assert batch.target_BT.shape == (1, 6)
    assert batch.num_prefill_B.tolist() == [6]


def test_validation_prompts_are_apart_and_the_test_split_is_not_read(tmp_path):
    meta, rng = meta_of(), np.random.default_rng(0)
    with TraceWriter(tmp_path / "a", meta) as writer:
        for prompt in range(20):
            first = sequence_of(meta, prompt, rng, 8, "test" if prompt < 5 else "train")
            for run in range(3):
                writer.append(dataclasses.replace(first, run=run))
    paths = read_paths([tmp_path / "a"], None, 0.2, seed=0)
    train, validation = {s.prompt for s in paths.train}, {s.prompt for s in paths.validation}
    assert len(validation) == 3
    assert train.isdisjoint(validation)
    assert train | validation == set(range(5, 20))
    assert len(paths.train) == 36


def test_a_prompt_recorded_twice_is_on_one_side(tmp_path):
    """Prompts were told apart by folder and number, so validation held what another recording trained on."""
    meta, rng = meta_of(), np.random.default_rng(0)
    recorded = [sequence_of(meta, prompt, rng, 8) for prompt in range(20)]
    for name, sequences in (("sampled", recorded), ("forced", recorded[::-1])):
        with TraceWriter(tmp_path / name, meta) as writer:
            for number, sequence in enumerate(sequences):
                writer.append(dataclasses.replace(sequence, prompt=number))
    paths = read_paths([tmp_path / "sampled", tmp_path / "forced"], None, 0.2, seed=0)
    train, validation = ({s.target_ids_T.tobytes() for s in side} for side in (paths.train, paths.validation))
    assert len(paths.validation) == 8
    assert train.isdisjoint(validation)


def test_traces_that_cannot_be_trained_on(tmp_path):
    with pytest.raises(ValueError, match="no trace was given"):
        read_paths([], None, 0.1, 0)
    write(tmp_path / "test", meta_of(), split="test", prompts=5)
    with pytest.raises(ValueError, match=r'0 prompts of the split "train".*Recorded tasks: chat'):
        read_paths([tmp_path / "test"], None, 0.1, 0)
    write(tmp_path / "train", meta_of(), prompts=5)
    with pytest.raises(ValueError, match="task 'math'"):
        read_paths([tmp_path / "train"], "math", 0.1, 0)
    other = dataclasses.replace(meta_of(), fingerprint="f" * 16)
    write(tmp_path / "other", other, prompts=5)
    with pytest.raises(ValueError, match="one predictor for each model"):
        read_paths([tmp_path / "train", tmp_path / "other"], None, 0.1, 0)
