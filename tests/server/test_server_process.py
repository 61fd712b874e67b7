"""`expertflow serve` as a process: ready, drained by SIGTERM, ended by a second, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from expertflow.cli import app

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 120.0
LONG = {"prompt": "Hello", "max_tokens": 100, "ignore_eos": True, "temperature": 0}


class Served:
    """A process that is ready. Slow link: its answers take seconds, so that something can happen meanwhile."""

    def __init__(self, folder: Path, *flags: str, key: str | None = None):
        command = [sys.executable, "-m", "expertflow.cli", "serve", str(folder), "--port", "0", *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if key is not None:
            environment["EXPERTFLOW_API_KEY"] = key
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if line.startswith("serving "):
                break
        else:
            raise AssertionError("".join(self.log))
        self.port = int(self.log[-1].split("http://127.0.0.1:")[1].split(",")[0])
        self._rest = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()), daemon=True)
        self._rest.start()

    def begin(self, body: dict[str, Any]) -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def status(self, path: str) -> int:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()

    def ended(self) -> int:
        code = self.process.wait(WAIT_SECONDS)
        self._rest.join(WAIT_SECONDS)
        return code


@contextmanager
def serving(folder: Path, *flags: str, key: str | None = None) -> Iterator[Served]:
    served = Served(folder, "--cache-size", "2", "--context", "128", "--batch", "2", *flags, key=key)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            os.kill(served.process.pid, signal.SIGKILL)
            served.process.wait(WAIT_SECONDS)


def text_of(stream: bytes) -> tuple[str, str]:
    """The text of a stream, and how it ended: finish_reason, or the code of the error in it."""
    text, end = "", ""
    for line in stream.split(b"\n"):
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                end = event["error"]["code"]
            else:
                text += event["choices"][0]["text"]
                end = event["choices"][0]["finish_reason"] or end
    return text, end


# A hundred tokens of it take some seconds: each reads some 100 kB.
SLOW = ("--link", "3MB/s", "--store", "ram")


def test_sigterm_lets_running_requests_end_and_takes_no_new_ones(chat_folder: Path) -> None:
    with serving(chat_folder, *SLOW) as served:
        assert served.status("/health/ready") == 200
        running = served.begin({**LONG, "stream": True})
        response = running.getresponse()
        first = response.readline()  # it has begun
        idle = HTTPConnection("127.0.0.1", served.port, timeout=WAIT_SECONDS)
        idle.request("GET", "/health/live")
        idle.getresponse().read()
        os.kill(served.process.pid, signal.SIGTERM)
        while served.status("/health/ready") != 503:
            pass
        assert served.status("/health/live") == 200
        refused = served.begin(LONG).getresponse()
        assert refused.status == 503
        assert refused.getheader("Retry-After")
        assert json.loads(refused.read())["error"]["code"] == "draining"
        body = first + response.read()
        text, end = text_of(body)
        assert end == "length"
        assert body.count(b'"text"') > 10
        assert text
        assert body.endswith(b"data: [DONE]\n\n")
        assert served.ended() == 0
        with pytest.raises(ConnectionRefusedError):
            served.status("/health")


@pytest.mark.parametrize("how", ["second signal", "time limit"])
def test_a_drain_can_be_cut_short_and_clients_are_told(chat_folder: Path, how: str) -> None:
    flags = ("--drain-seconds", "0.2") if how == "time limit" else ()
    with serving(chat_folder, "--link", "200kB/s", "--store", "ram", *flags) as served:
        response = served.begin({**LONG, "stream": True}).getresponse()
        first = response.readline()
        os.kill(served.process.pid, signal.SIGTERM)
        if how == "second signal":
            while served.status("/health/ready") != 503:
                pass
            os.kill(served.process.pid, signal.SIGTERM)
        _, end = text_of(first + response.read())
        assert end == "draining"
        assert served.ended() == 1
        assert any("were ended before they were complete" in line for line in served.log)


def test_ctrl_c_drains_as_well(chat_folder: Path) -> None:
    with serving(chat_folder) as served:
        os.kill(served.process.pid, signal.SIGINT)
        assert served.ended() == 0
        assert not any("Traceback" in line for line in served.log), served.log


def test_killed_under_load_it_is_ready_again_in_seconds(chat_folder: Path) -> None:
    """With the same port at once, the same answers, and the checkpoint's folder as it was."""

    def files() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in chat_folder.iterdir()}

    before = files()
    with serving(chat_folder, *SLOW) as served:
        response = served.begin({**LONG, "max_tokens": 20}).getresponse()
        answer = json.loads(response.read())["choices"][0]["text"]
        port = served.port
        clients = [served.begin({**LONG, "stream": True}) for _ in range(6)]
        first = clients[0].getresponse()
        first.readline()
        os.kill(served.process.pid, signal.SIGKILL)
        served.process.wait(WAIT_SECONDS)
        with pytest.raises((HTTPException, OSError)):
            first.read()
        for client in clients:
            client.close()
    started = time.monotonic()
    with serving(chat_folder, "--port", str(port)) as served:
        assert served.port == port
        response = served.begin({**LONG, "max_tokens": 20}).getresponse()
        assert json.loads(response.read())["choices"][0]["text"] == answer
        assert time.monotonic() - started < WAIT_SECONDS
    assert files() == before


def test_what_cannot_be_served_is_said_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXPERTFLOW_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, message in (
            (("--host", "0.0.0.0"), "can be reached by others, and no key is set"),
            (("--port", "99999"), "port=99999 must be a whole number"),
            (("--api-key-file", str(tmp_path / "none")), "No such file"),
            (("--execution", "sideways"), "--execution sideways: use joint or split"),
            (("--schedule", "auto"), "add --predictor online"),
            (("--port", str(taken.getsockname()[1])), "give another --port"),
        ):
            found = CliRunner().invoke(app, ["serve", "owner/absent", *flags])
            assert found.exit_code == 2, flags
            assert message in found.stderr
            assert found.stderr.count("\n") == 1, found.stderr


def test_the_key_of_the_environment_counts(chat_folder: Path) -> None:
    with serving(chat_folder, key="from-the-environment") as served:
        assert served.status("/v1/models") == 401
        assert served.status("/health") == 200
        assert "with a key" in served.log[-1]
        assert not any("from-the-environment" in line for line in served.log)
