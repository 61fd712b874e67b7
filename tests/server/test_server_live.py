"""The live view and the metrics say what the cache's own books say."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from expertflow import LLM
from expertflow.core import ExpertId
from expertflow.server import live
from expertflow.server.errors import APIError
from expertflow.server.generation import Generation, Token
from expertflow.server.live import LiveFeed, snapshot
from expertflow.server.metrics import RequestMetrics
from expertflow.server.step_log import StepLog, StepRecord
from tests.server.running import WAIT_SECONDS, Running, running

FIELDS = {
    "time_s", "layers", "experts", "slots", "slot_bytes", "resident_LE", "uses_LE", "loads_LE", "misses_LE",
    "predicted_LE", "hits", "misses", "hit_ratio", "bytes_read", "stall_seconds", "stall_by_layer", "tokens_generated",
    "prompt_tokens", "tokens_per_s", "link_bytes_per_s", "running", "waiting", "predictor", "steps",
}  # fmt: skip


@pytest.fixture(scope="module")
def predicted(chat_folder: Path) -> Iterator[Running]:
    with (
        LLM(chat_folder, cache_size=4, context=128, batch=2, sequences=4, predictor="online") as llm,
        running(llm) as server,
    ):
        yield server


class Viewer:
    """Reads /live event by event."""

    def __init__(self, server: Running):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_SECONDS)
        self.connection.request("GET", "/live")
        self.response = self.connection.getresponse()

    def next(self) -> dict[str, Any]:
        line = self.response.readline()
        assert line.startswith(b"data: "), line
        assert self.response.readline() == b"\n"
        return json.loads(line[6:])

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def test_a_snapshot_is_what_the_books_say(served: Running) -> None:
    assert served.complete(max_tokens=10).status == 200
    cache = served.llm.experts.cache
    cache.wait_idle()
    found, stats = snapshot(served.driver), served.llm.stats
    assert found.keys() == FIELDS
    assert json.loads(json.dumps(found)) == found, "plain JSON"
    for layer, experts in enumerate(stats.shape.experts_per_layer):
        for expert in range(experts):
            state = found["resident_LE"][layer][expert]
            assert state == (2 if cache.table.is_ready(ExpertId(layer, expert)) else 0)
    assert sum(state == 2 for row in found["resident_LE"] for state in row) == stats.num_slots
    assert found["uses_LE"] == stats.uses_LE
    assert found["loads_LE"] == stats.loads_LE
    assert sum(map(sum, found["uses_LE"])) == found["hits"] + found["misses"] == stats.hits + stats.misses
    assert found["bytes_read"] == stats.bytes_read
    assert found["predicted_LE"] is None
    assert found["predictor"] is None
    assert found["steps"]
    assert sum(step["load_bytes"] for step in found["steps"]) <= found["bytes_read"]
    assert all(step["rows"] <= 1 for step in found["steps"][-9:])


def test_who_is_loading_is_told_while_it_loads(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot is taken in another thread, in the midst of a step."""
    cache = served.llm.experts.cache
    seen = []
    store = type(served.llm.experts.cache.store)
    read = store.read_chunk  # type: ignore[attr-defined]

    def look(self: Any, *arguments: Any) -> Any:
        seen.append(live.residency(cache.observe(), cache.shape))
        return read(self, *arguments)

    monkeypatch.setattr(store, "read_chunk", look)
    assert served.complete(max_tokens=5).status == 200
    assert seen, "nothing was read: the test sees nothing"
    assert all(sum(state == 1 for row in state_LE for state in row) >= 1 for state_LE in seen)


def test_the_forecast_and_its_quality_are_shown(predicted: Running) -> None:
    for seed in range(3):
        assert predicted.complete(max_tokens=12, seed=seed).status == 200
    predicted.llm.experts.cache.wait_idle()
    found, books = snapshot(predicted.driver), predicted.llm.stats
    assert (found["misses_LE"], found["loads_LE"]) == (books.misses_LE, books.loads_LE)
    assert books.misses_LE != books.loads_LE, "nothing was prefetched: the test sees nothing"
    stats = predicted.llm.experts.predicting.stats  # type: ignore[union-attr]
    assert found["predictor"] == {
        "name": "online", "recall": round(stats.recall, 4), "precision": round(stats.precision, 4),
        "gate": stats.gate,
    }  # fmt: skip
    assert stats.passes > 0
    if found["predicted_LE"] is not None:  # the gate may have stopped it
        assert len(found["predicted_LE"]) == found["layers"]
        assert all(0 <= p <= 1 for row in found["predicted_LE"] for p in row)
        assert any(p > 0 for row in found["predicted_LE"] for p in row)


def test_layers_of_other_widths_are_padded() -> None:
    from expertflow.cache.stats import CacheStats, Observed
    from expertflow.core import MoEShape

    shape = MoEShape((2, 3))
    seen = Observed(CacheStats(shape, 2, 1, "direct"), {ExpertId(0, 1)}, {ExpertId(1, 2)})
    assert live.residency(seen, shape) == [[0, 1, -1], [0, 0, 2]]


def test_rates_are_of_the_last_two_seconds() -> None:
    log = StepLog()
    for began in (0.0, 7.5, 9.0, 9.5):
        log._steps.append(StepRecord(began, 0.25, 1, 1, 0.0, 10))
    assert [step.began for step in log.recent(10.0)] == [9.0, 9.5]
    assert [step.began for step in log.newest(3)] == [7.5, 9.0, 9.5]


def test_viewers_see_changes_and_leave_nothing_behind(served: Running) -> None:
    feed = served.server.config.app.state.live_feed  # type: ignore[union-attr]
    viewer = Viewer(served)
    assert viewer.response.getheader("content-type", "").startswith("text/event-stream")
    first = viewer.next()
    assert first.keys() == FIELDS
    assert served.complete(max_tokens=10, temperature=0, ignore_eos=True).status == 200
    deadline = time.monotonic() + WAIT_SECONDS
    while viewer.next()["tokens_generated"] != first["tokens_generated"] + 10:
        assert time.monotonic() < deadline
    viewer.close()
    while feed._viewers or feed._task:
        assert time.monotonic() < deadline, "an observer works for nobody"
        time.sleep(0.01)


def test_a_new_viewer_sees_what_is_not_what_was(served: Running) -> None:
    feed = served.server.config.app.state.live_feed  # type: ignore[union-attr]
    viewer = Viewer(served)
    before = viewer.next()["tokens_generated"]
    viewer.close()
    deadline = time.monotonic() + WAIT_SECONDS
    while feed._viewers or feed._task:
        assert time.monotonic() < deadline, "an observer works for nobody"
        time.sleep(0.01)
    assert served.complete(max_tokens=3, temperature=0, ignore_eos=True).status == 200
    viewer = Viewer(served)
    assert viewer.next()["tokens_generated"] == before + 3
    viewer.close()


def test_the_streams_of_viewers_end_with_the_server(llm: LLM) -> None:
    with running(llm) as server:
        viewer = Viewer(server)
        viewer.next()
    viewer.response.read()  # a stream that breaks off raises here
    viewer.close()


def test_idle_viewers_get_a_heartbeat_and_no_more(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVENT_SECONDS", 0.01)
    monkeypatch.setattr(live, "HEARTBEAT_SECONDS", 0.3)
    viewer = Viewer(served)
    before = viewer.next()
    while (found := viewer.next()) and found["tokens_per_s"] + found["link_bytes_per_s"] > 0:
        before = found  # of requests of the tests before this
    before, found = found, viewer.next()
    viewer.close()
    assert found | {"time_s": 0} == before | {"time_s": 0}
    assert found["time_s"] - before["time_s"] >= 0.2, "an event comes each 0.01 s where something happens"


def test_viewers_are_limited(llm: LLM) -> None:
    with running(llm, viewers=1) as server:
        viewer = Viewer(server)
        viewer.next()
        assert server.ask("/live").error["code"] == "too_many_viewers"
        viewer.close()


def test_viewers_count_from_when_they_are_let_in(llm: LLM) -> None:
    """And no longer than until they are gone, even if they never read."""
    feed = LiveFeed(SimpleNamespace(), most_viewers=1)  # type: ignore[arg-type]
    first = feed.watch()
    with pytest.raises(APIError, match="1 viewers watch already"):
        feed.watch()
    del first
    feed.watch()


def test_waits_and_the_pace_of_requests_are_remembered() -> None:
    metrics = RequestMetrics()
    for waited in (0.5, 2.0, 1.0):
        generation = Generation(1, 1)
        token = Token(0, "a", None, None, generation.started + waited)
        metrics.got_token(generation, token, generation.started + 3.0)
    assert metrics.longest_wait_seconds == pytest.approx(2.0)
    assert metrics.mean_wait_seconds == pytest.approx(3.5 / 3)
    metrics.ended("chat", "ok", 2.0)
    metrics.ended("chat", "queue_full")
    metrics.ended("chat", "ok", 12.0)
    assert metrics.mean_seconds == pytest.approx(3.0)
    said = metrics.expose().decode()
    assert "expertflow_request_duration_seconds_count 2.0" in said
    assert "expertflow_request_duration_seconds_sum 14.0" in said
    assert 'expertflow_requests_total{endpoint="chat",outcome="queue_full"} 1.0' in said


def metrics(server: Running) -> dict[str, float]:
    """By name and labels, of what a real parser reads."""
    found = server.ask("/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    return {
        sample.name
        + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(found.body.decode())
        for sample in family.samples
    }


def test_metrics_count_what_happened(predicted: Running) -> None:
    before = metrics(predicted)
    assert predicted.complete(max_tokens=7, temperature=0, ignore_eos=True).status == 200
    assert predicted.complete(max_tokens=5, temperature=0, ignore_eos=True, stream=True).status == 200
    assert predicted.complete(max_tokens=0).status == 400
    after = metrics(predicted)

    def grew(name: str) -> float:
        return after[f"expertflow_{name}"] - before.get(f"expertflow_{name}", 0.0)

    assert grew("requests_total{endpoint=completions}{outcome=ok}") == 2
    assert grew("requests_total{endpoint=completions}{outcome=invalid_value}") == 1
    assert grew("generated_tokens_total") == 12
    assert grew("prompt_tokens_total") == 2 * len(predicted.llm.tokenizer("Hello").input_ids)
    assert grew("time_to_first_token_seconds_count") == 2
    assert grew("queue_wait_seconds_count") == 2
    assert grew("inter_token_latency_seconds_count") == 6 + 4
    assert 0 < grew("inter_token_latency_seconds_sum") < WAIT_SECONDS
    stats = predicted.llm.stats
    assert after["expertflow_cache_hits_total"] == stats.hits
    assert after["expertflow_cache_misses_total"] == stats.misses
    assert after["expertflow_cache_read_bytes_total"] == stats.bytes_read
    assert after["expertflow_cache_slots"] == stats.num_slots
    for layer, counters in enumerate(stats.layers):
        assert after[f"expertflow_cache_stall_seconds_total{{layer={layer}}}"] == counters.stall_seconds
    assert 0 <= after["expertflow_predictor_recall"] <= 1
    assert after["expertflow_running"] == after["expertflow_waiting"] == 0


def test_stats_are_the_same_as_json(served: Running) -> None:
    found = served.ask("/stats").json
    assert found["cache"]["hits"] == served.llm.stats.hits
    assert found["engine"]["generated_tokens"] == served.driver.engine.stats.generated_tokens
    assert found["live"].keys() == FIELDS
    assert str(served.llm.folder) not in json.dumps(found)
