"""The predictors in the repository foresee about what docs/predictors.md says."""

from __future__ import annotations

from pathlib import Path

import torch

from expertflow.core import routes_to_mask
from expertflow.engine.source import read_config
from expertflow.predictor import replay
from expertflow.predictor.storage import load_predictor
from expertflow.predictor.train import hits_at_equal_budget
from expertflow.trace import read_trace

ROOT = Path(__file__).parents[2]


def test_the_shipped_predictor_foresees_held_out_answers():
    trace = read_trace(ROOT / "zoo/traces/tiny-moe/chat", weights=False)
    predictor = load_predictor(ROOT / "zoo/predictors/tiny-moe", trace.meta.fingerprint)
    assert predictor.model.vocab_size == read_config(ROOT / "models/tiny-moe")["vocab_size"]
    found = needed = 0
    for sequence in [s for s in trace if s.split == "test"][:30]:
        ids_1T = torch.from_numpy(sequence.target_ids_T).long()[None]
        mask_TLE = routes_to_mask(torch.from_numpy(sequence.target_routes_TLK).long(), 32)
        with torch.inference_mode():
            logits_TLE = predictor(ids_1T, torch.ones_like(ids_1T, dtype=torch.bool)).target_BTLE[0]
        answer = slice(sequence.num_prefill, None)
        hits, active = hits_at_equal_budget(logits_TLE[answer], mask_TLE[answer])
        found, needed = found + hits, needed + active
    assert needed > 15_000
    assert 0.88 < found / needed < 0.92


def test_the_shipped_predictor_of_switch_32_foresees_held_out_answers():
    trace = read_trace(ROOT / "zoo/traces/switch-32/chat", weights=False)
    predictor = load_predictor(ROOT / "zoo/predictors/switch-32-chat", trace.meta.fingerprint)
    assert predictor.next_use_head is not None
    group = replay.pad(trace.split("test").sequences[:60])
    named_BTL = replay.all_at_once(predictor, group).argmax(-1)
    answers_BT = group.mask_BT.clone()
    answers_BT[:, : group.prefill] = False
    right = (named_BTL == group.routes_BTLK[..., 0])[answers_BT].float().mean()
    assert int(answers_BT.sum()) > 900
    assert 0.70 < float(right) < 0.77
