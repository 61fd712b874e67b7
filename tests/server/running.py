"""A server in a thread of the test, on a free loopback port; and requests without a client library."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertflow import LLM
from expertflow.engine.engine import Engine
from expertflow.engine.unit import Seating, arrival_order
from expertflow.server.driver import EngineDriver
from expertflow.server.serve import DrainingServer, listening_socket, make_server
from expertflow.server.settings import ServerSettings

WAIT_SECONDS = 60.0  # for what takes milliseconds, on a machine that is busy with something else


class Turnstile:
    """A scheduler that lets the engine's steps through, or holds the engine in one until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.held = threading.Event()  # somebody waits

    def __call__(self, seating: Seating) -> Any:
        if not self._open.is_set():
            self.held.set()
            assert self._open.wait(WAIT_SECONDS), "the turnstile was never opened"
        return arrival_order(seating)

    def close(self) -> None:
        self.held.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()


@dataclass
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, with all that it must have."""
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str)
        assert error["message"]
        return error


@dataclass
class Running:
    port: int
    driver: EngineDriver
    server: DrainingServer
    turnstile: Turnstile
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def llm(self) -> LLM:
        return self.driver.llm

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> Answered:
        """body: JSON, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answered(response.status, found, response.read())
        finally:
            connection.close()

    def complete(self, **body: Any) -> Answered:
        return self.ask("/v1/completions", {"prompt": "Hello", **body})

    def stop(self) -> None:
        self.turnstile.open()
        self.server.handle_exit(15, None)
        self.server.handle_exit(15, None)  # at once
        self.thread.join(WAIT_SECONDS)
        assert not self.thread.is_alive(), "the server did not end"


@contextmanager
def running(llm: LLM, *, small_buffers: bool = False, **settings: Any) -> Iterator[Running]:
    """In a thread of its own, until the block ends. small_buffers: the kernel takes few bytes that nobody reads."""
    wanted = ServerSettings(port=0, **settings)
    turnstile, bound = Turnstile(), listening_socket(wanted)
    if small_buffers:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
    server, driver = make_server(llm, Engine(llm, scheduler=turnstile), wanted)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])), name="test-server")
    thread.start()
    try:
        assert server.ready.wait(WAIT_SECONDS), "the server did not start"
        run = Running(bound.getsockname()[1], driver, server, turnstile, thread)
        yield run
    finally:
        run.stop()
        bound.close()


def events_of(body: bytes) -> list[Any]:
    """Of a stream that was read to its end, without its [DONE]."""
    lines = [line for line in body.decode().split("\n") if line]
    assert all(line.startswith("data: ") for line in lines), lines
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def chat_checkpoint(folder: Path) -> Path:
    """The tiny random model of qwen2_moe with a chat template."""
    from tests.engine.test_llm import CHAT_TEMPLATE, rewrite
    from tests.families import write_checkpoint

    plain = write_checkpoint("qwen2_moe", folder / "plain")
    return rewrite(plain, folder / "chat", "tokenizer_config.json", chat_template=CHAT_TEMPLATE)
