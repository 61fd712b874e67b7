"""Requests that come and go: cancelled, too many, too late, read slowly, cut off."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from expertflow import LLM, SamplingParams
from expertflow.engine.logprobs import token_logprobs
from expertflow.server import streams
from tests.server.running import WAIT_SECONDS, Answered, Running, events_of, running

ANSWER = {"max_tokens": 100, "ignore_eos": True, "temperature": 0}
LONG = {"prompt": "Hello", **ANSWER}


@pytest.fixture
def small(llm: LLM) -> Iterator[Running]:
    """Eight places and a queue of two."""
    with running(llm, queue=2) as server:
        yield server


def until(what: Callable[[], bool]) -> None:
    """Polls for something that another process or thread brings about."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not what():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def in_thread(call: Callable[[], Answered]) -> tuple[threading.Thread, list[Answered]]:
    found: list[Answered] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


def send(server: Running, stream: bool) -> socket.socket:
    """A request whose answer nobody reads yet."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT_SECONDS)
    body = json.dumps(LONG | {"stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert connection.sock is not None
    return connection.sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_at_once(small: Running, stream: bool) -> None:
    """Its row was decoded to the end once, for nobody. The engine is held in a step, so the answer cannot be done."""
    small.turnstile.close()
    before = small.driver.engine.stats.cancelled
    sock = send(small, stream)
    assert small.turnstile.held.wait(WAIT_SECONDS)
    sock.close()
    # The loop notices while the engine is in its step: nothing of the loop waits for that.
    until(lambda: all(generation.cancelled for generation in small.driver._generations))
    small.turnstile.open()
    until(lambda: small.driver.outstanding == 0)
    stats = small.driver.engine.stats
    assert stats.cancelled == before + 1
    assert stats.running == 0
    assert stats.generated_tokens < LONG["max_tokens"] / 2  # type: ignore[operator]
    until(lambda: "cancelled" in small.ask("/metrics").body.decode())


def test_a_full_queue_answers_429_and_when_to_come_again(small: Running) -> None:
    small.turnstile.close()
    waiting = [in_thread(lambda: small.complete(max_tokens=2)) for _ in range(10)]
    until(lambda: small.driver.outstanding == 10)
    refused = small.complete(max_tokens=2)
    assert refused.status == 429
    assert refused.error["code"] == "queue_full"
    assert refused.error["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert small.complete(max_tokens=2, prompt=["a"] * 11).error["code"] == "too_many_answers"
    small.turnstile.open()
    for thread, found in waiting:
        thread.join(WAIT_SECONDS)
        assert found[0].status == 200
    assert small.complete(max_tokens=2).status == 200, "there is room again"


def test_one_request_may_take_all_places(small: Running) -> None:
    assert len(small.complete(max_tokens=1, prompt=["a"] * 10).json["choices"]) == 10


def test_when_to_come_again_follows_the_last_requests_within_a_minute(small: Running) -> None:
    for mean_seconds, told in ((0.001, 1), (24.0, 3), (1e6, 60)):
        small.driver.metrics.mean_seconds = mean_seconds
        assert small.driver.retry_after_seconds() == told


def test_waiting_for_the_last_answer_ends_with_it(small: Running) -> None:
    """A drain waits so: nobody told it of the end, and it waited for its time limit."""
    loop = small.server._serving_loop
    assert loop is not None
    small.turnstile.close()
    thread, found = in_thread(lambda: small.complete(max_tokens=3))
    assert small.turnstile.held.wait(WAIT_SECONDS)
    idle = asyncio.run_coroutine_threadsafe(small.driver.wait_idle(10 * WAIT_SECONDS), loop)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(WAIT_SECONDS)
    assert not idle.done()
    small.turnstile.open()
    assert idle.result(WAIT_SECONDS)
    thread.join(WAIT_SECONDS)
    assert found[0].status == 200


def test_what_is_cancelled_while_prompts_are_encoded_is_not_answered(small: Running) -> None:
    """One is being encoded, one waits for its turn."""
    driver, loop, params = small.driver, small.server._serving_loop, SamplingParams(**ANSWER)
    assert loop is not None
    encoding, go_on, begun = threading.Event(), threading.Event(), []

    def slowly() -> list[list[int]]:
        encoding.set()
        assert go_on.wait(WAIT_SECONDS)
        return [[5]]

    def noted() -> list[list[int]]:
        begun.append(True)
        return [[5]]

    finished, cancelled = driver.engine.stats.finished, driver.engine.stats.cancelled
    asked = []
    for encode in (slowly, noted):
        submitting = driver.submit(encode, params, 1, WAIT_SECONDS)
        asked.append(asyncio.run_coroutine_threadsafe(submitting, loop))
    assert encoding.wait(WAIT_SECONDS)
    until(lambda: driver.outstanding == 2)
    for one in asked:
        one.cancel()
    until(lambda: [one.cancelled for one in driver._generations] == [True, True])
    go_on.set()
    until(lambda: driver.outstanding == 0)
    assert begun == []
    assert driver.engine.stats.finished == finished
    assert driver.engine.stats.cancelled == cancelled + 1


def test_a_prompt_that_fails_ends_the_others_of_its_request(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = small.driver.engine.stats.finished
    failed = []

    def fails_once(*args: object, **kwargs: object) -> object:
        if not failed:
            failed.append(True)
            raise OSError("it broke")
        return token_logprobs(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("expertflow.engine.engine.token_logprobs", fails_once)
    assert small.complete(**{**LONG, "prompt": ["a", "b", "c"]}).status == 500
    until(lambda: small.driver.outstanding == 0)
    assert small.driver.engine.stats.finished == finished, "they were decoded to the end, for nobody"


def test_refused_requests_give_their_places_back(small: Running) -> None:
    for _ in range(30):
        assert small.complete(max_tokens=1000).status == 400
        assert small.complete(prompt=["a", "x" * 125], max_tokens=30).status == 400, "the second does not fit"
    until(lambda: small.driver.outstanding == 0)
    assert small.driver.engine.stats.finished == 0, "no prompt of a refused request was answered"
    assert small.driver.engine.stats.cancelled == 0, "all are checked before the first is submitted"
    assert small.complete(max_tokens=2).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_an_answered_request_leaves_nothing_behind(small: Running, stream: bool) -> None:
    """Request and reader held one another, until the garbage collector came by; with it off, memory grew."""
    small.turnstile.close()
    thread, found = in_thread(lambda: small.complete(max_tokens=3, stream=stream))
    until(lambda: small.driver.outstanding == 1)
    assert small.turnstile.held.wait(WAIT_SECONDS)
    alive = [weakref.ref(generation) for generation in small.driver._generations]
    gc.disable()
    try:
        small.turnstile.open()
        thread.join(WAIT_SECONDS)
        assert found[0].status == 200
        until(lambda: not any(generation() for generation in alive))
    finally:
        gc.enable()
    assert alive


def test_a_deadline_ends_a_request(llm: LLM) -> None:
    with running(llm, deadline_seconds=0.01) as server:
        server.turnstile.close()
        thread, found = in_thread(lambda: server.complete(max_tokens=50))
        stream, streamed = in_thread(lambda: server.complete(max_tokens=50, stream=True))
        assert server.turnstile.held.wait(WAIT_SECONDS)
        time.sleep(0.02)  # the deadline itself
        server.turnstile.open()
        thread.join(WAIT_SECONDS)
        stream.join(WAIT_SECONDS)
        assert found[0].status == 504
        assert found[0].error["code"] == "deadline_exceeded"
        assert "max_tokens" in found[0].error["message"]
        assert events_of(streamed[0].body)[-1]["error"]["code"] == "deadline_exceeded"
        until(lambda: server.driver.outstanding == 0)
        counted = 'expertflow_requests_total{endpoint="completions",outcome="deadline_exceeded"} 2.0'
        until(lambda: counted in server.ask("/metrics").body.decode())


def connect_slowly(server: Running) -> socket.socket:
    """A request for far more than the buffers between server and client hold, whose answer nobody reads yet."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(WAIT_SECONDS)
    sock.connect(("127.0.0.1", server.port))
    wanted = LONG | {"max_tokens": 60, "stream": True, "logprobs": 20, "n": 4, "temperature": 1.0, "seed": 1}
    body = json.dumps(wanted).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    return sock


def test_a_slow_reader_holds_nobody_up_and_loses_nothing(llm: LLM) -> None:
    """Others are answered while it has read nothing, and its own answers are decoded to their end."""
    with running(llm, small_buffers=True, write_seconds=2 * WAIT_SECONDS) as server:
        check_slow_reader(server)


def check_slow_reader(served: Running) -> None:
    before = served.driver.engine.stats.finished
    with connect_slowly(served) as sock:
        until(lambda: served.driver.outstanding >= 4)
        for _ in range(3):
            assert served.complete(max_tokens=4).status == 200
        until(lambda: served.driver.outstanding == 0)
        assert served.driver.engine.stats.finished == before + 4
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)  # it was slow for long enough
        received = b""
        while part := sock.recv(65536):
            received += part
    assert len(received) > 120_000, "it may have fitted into the buffers: the test sees nothing"
    assert received.endswith(b"0\r\n\r\n"), "the stream ended as it should"
    params = SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=60, ignore_eos=True)
    (output,) = served.llm.generate("Hello", params)
    texts = [""] * 4
    for line in received.split(b"\n"):
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                texts[choice["index"]] += choice["text"]
    assert texts == [answer.text for answer in output.outputs]


def test_a_client_that_takes_no_byte_is_given_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_LOOK_SECONDS", 0.05)
    with running(llm, small_buffers=True, write_seconds=0.2) as server, connect_slowly(server) as sock:
        until(lambda: "cancelled" in server.ask("/metrics").body.decode())
        until(lambda: server.driver.outstanding == 0)
        received = b""
        try:
            while part := sock.recv(65536):
                received += part
        except ConnectionResetError:
            pass
        assert b"[DONE]" not in received


def test_a_body_that_does_not_come_is_given_up(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_BODY_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", small.port), timeout=WAIT_SECONDS) as sock:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: 20\r\n\r\n".encode() + b'{"prompt"')
        assert sock.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_an_answer_that_fails_is_one_clients_and_says_no_more_than_an_id(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("/secret/path/of/a/disk: it broke")

    with monkeypatch.context() as broken:
        broken.setattr("expertflow.engine.engine.token_logprobs", fails)
        found = served.complete(max_tokens=3)
    assert found.status == 500
    assert "secret" not in found.body.decode()
    number = found.error["message"].split("under id ")[1].split(".")[0]
    assert any(number in record.getMessage() for record in caplog.records)
    assert "/secret/path" in caplog.text
    assert served.complete(max_tokens=3).status == 200


def test_an_endpoint_that_fails_says_no_more_than_an_id(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("/secret")

    monkeypatch.setattr("expertflow.server.app.all_stats", fails)
    found = served.ask("/stats")
    assert found.status == 500
    assert "secret" not in found.body.decode()
    assert found.error["code"] == "internal_error"


def test_when_the_engine_stops_requests_hear_of_it_and_probes_too(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(llm) as server:
        assert server.ask("/health/live").status == 200
        monkeypatch.setattr(server.driver.engine, "step", lambda: 1 / 0)
        assert server.complete(max_tokens=3).error["code"] == "engine_stopped"
        assert server.ask("/health/live").status == 503
        assert server.ask("/health/ready").status == 503
        assert server.complete(max_tokens=3).status == 503


def test_when_the_cache_stops_requests_hear_of_it_and_probes_too(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(small.llm.experts.cache), "usable", property(lambda self: False))
    assert small.ask("/health/live").status == 503
    assert small.ask("/health/ready").status == 503
    found = small.complete(max_tokens=3)
    assert (found.status, found.error["code"]) == (503, "engine_stopped")
