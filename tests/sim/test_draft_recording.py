"""What a draft said, as a recording: made from a model, and read by the simulator in its place."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from expertflow.cache.policies import POLICIES
from expertflow.sim.clock import Simulation
from expertflow.sim.compare import simulate
from expertflow.sim.hardware import Costs
from expertflow.sim.recordings import foretell_all
from expertflow.sim.workload import foretell, make_workload
from expertflow.trace import Trace, TraceWriter, read_trace
from zoo import draft_trace

ROOT = Path(__file__).parents[2]
SWITCH = ROOT / "zoo" / "traces" / "switch-32" / "chat"
TINY = ROOT / "models" / "tiny-moe"


@pytest.fixture(scope="module")
def switch() -> Trace:
    return replace(trace := read_trace(SWITCH, weights=False), sequences=trace.split("test").sequences[:24])


def write(folder: Path, trace: Trace) -> Path:
    with TraceWriter(folder, trace.meta) as writer:
        for sequence in trace:
            writer.append(sequence)
    return folder


def hits(foretold, batch: int = 4) -> float:
    """Over a link that has time for everything: what is named is there."""
    work = make_workload(foretold, batch, 40)
    costs = Costs(expert_s=1e-3, dense_s=1e-3, chunk_s=1e-5, chunks=1)
    return (
        Simulation(POLICIES["plec"](work.shape, 16 * work.shape.num_layers), costs).run(work.passes).hit_ratio
    )


def test_a_draft_that_is_right_is_as_good_as_knowing_and_a_wrong_one_loses_its_say(switch):
    right = foretell(switch.meta, switch.sequences, "draft", drafted=switch)
    shifted = [
        replace(s, target_routes_TLK=(s.target_routes_TLK + 5) % max(switch.meta.experts_per_layer))
        for s in switch
    ]
    wrong = foretell(
        switch.meta, switch.sequences, "draft", drafted=replace(switch, sequences=tuple(shifted))
    )
    online = foretell(switch.meta, switch.sequences, "online")
    told = foretell(switch.meta, switch.sequences, "oracle")
    assert hits(right) > 0.9 * hits(told)
    assert hits(right) > hits(online) + 0.15
    assert hits(wrong) > hits(online) - 0.05
    assert right.p_TLE is not None
    first = right.sequences[0]
    for t, p_LE in enumerate(right.p_TLE[0][-3:], start=len(right.p_TLE[0]) - 3):
        routes_LK = first.target_routes_TLK[first.num_prefill + t]
        assert p_LE.argmax(-1).tolist() == routes_LK[:, 0].tolist()


def test_the_pass_of_a_draft_is_counted(switch):
    drafted = make_workload(foretell(switch.meta, switch.sequences, "draft", drafted=switch), 2, 10)
    free = Costs(expert_s=1e-9, dense_s=1e-3, chunk_s=1e-12, chunks=1)
    layers = drafted.shape.num_layers
    once = simulate("plec", replace(drafted, drafted=False), 4 * layers, free)
    assert once.seconds == pytest.approx(10 * layers * 1e-3, rel=1e-3)
    assert simulate("plec", drafted, 4 * layers, free).seconds == pytest.approx(2 * once.seconds, rel=1e-3)


@pytest.mark.parametrize(
    ("task", "sequences", "right"), [("chat", 324, 0.969), ("translation", 210, 0.969), ("math", 180, 0.966)]
)
def test_the_recordings_beside_the_traces_are_what_the_figures_say(task, sequences, right):
    """Golden: how often what `zoo/traces/switch-32/TASK/draft` names of held-out decode tokens was chosen."""
    drafted = {(s.prompt, s.run): s for s in read_trace(SWITCH.parent / task / "draft", weights=False)}
    test = read_trace(SWITCH.parent / task, weights=False).split("test").sequences
    assert len(drafted) == len(test) == sequences
    found = [
        (drafted[s.prompt, s.run].target_routes_TLK == s.target_routes_TLK)[s.num_prefill :] for s in test
    ]
    assert np.concatenate(found).mean() == pytest.approx(right, abs=0.001)


def test_a_recording_of_something_else_is_refused(switch, tmp_path):
    some = replace(switch, sequences=switch.sequences[:3])
    folder = write(tmp_path / "trace", switch)
    with pytest.raises(ValueError, match="was not drafted; record it"):
        foretell_all(switch, folder, "test", [str(write(tmp_path / "some", some))], warm=0)
    other = replace(switch, meta=replace(switch.meta, fingerprint="0" * 16, model="another"))
    with pytest.raises(ValueError, match="was recorded from another, not from switch-32"):
        foretell_all(switch, folder, "test", [str(write(tmp_path / "other", other))], warm=0)


def test_a_model_drafts_its_recording(tmp_path, capsys):
    chat = ROOT / "zoo" / "traces" / "tiny-moe" / "chat"
    trace = read_trace(chat, weights=False)
    short = sorted(trace.split("test").sequences, key=lambda s: len(s.target_ids_T) - s.num_prefill)
    few = replace(trace, sequences=tuple(s for s in short if len(s.target_ids_T) - s.num_prefill > 4)[:2])
    source, target = write(tmp_path / "few", few), tmp_path / "draft"
    assert draft_trace.main([str(TINY), str(source), str(target)]) == 0
    assert "of the experts named were chosen" in capsys.readouterr().out
    for said, came in zip(read_trace(target, weights=False), few, strict=True):
        first = came.num_prefill
        assert np.array_equal(said.target_ids_T, came.target_ids_T)
        assert (said.target_routes_TLK[:first] == max(few.meta.experts_per_layer)).all()
        named, chosen = said.target_routes_TLK[first:], came.target_routes_TLK[first:]
        right_L = (named[..., None] == chosen[..., None, :]).any(-1).mean((0, 2))
        assert right_L[0] == 1.0, "nothing that an expert says enters the first layer's router"
        assert 0.5 < right_L[1:].mean() < 1.0
    assert draft_trace.main([str(TINY), str(source), str(target)]) == 1
    assert "exists; give another folder" in capsys.readouterr().err
    assert draft_trace.main([str(TINY), str(SWITCH), str(tmp_path / "no")]) == 1
    assert "was recorded from another model" in capsys.readouterr().err
    assert not math.isnan(hits(foretell(few.meta, few.sequences, "draft", drafted=read_trace(target)), 2))
