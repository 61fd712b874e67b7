"""The two who may answer: a model here and a server's say the same, and end at once when nobody listens."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs it: pip install 'expertflow-moe[serve]'")

from expertflow import LLM
from expertflow.commands.speakers import LocalModel, ServerModel
from tests.server.running import Running, chat_checkpoint, running

HELLO = [{"role": "user", "content": "Hello"}]
LONGER = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Why"}]
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(chat_checkpoint(tmp_path_factory.mktemp("speakers")), cache_size=4, context=256, batch=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm, api_key="sesame", served_model_name="tiny") as server:
        yield server


@pytest.mark.parametrize("messages", [HELLO, LONGER], ids=["first", "later"])
@pytest.mark.parametrize("raw", [False, True], ids=["chat", "raw"])
def test_both_say_the_same(llm, server, messages, raw):
    there = ServerModel(server.url, "sesame", dict(GREEDY), raw=raw)
    assert there.name == "tiny"
    there.check()
    text = "".join(there.answer(messages))
    assert text
    assert text == "".join(LocalModel(llm, dict(GREEDY), raw=raw).answer(messages))


def test_raw_continues_the_newest_message_alone(llm):
    here = LocalModel(llm, dict(GREEDY), raw=True)
    assert "".join(here.answer(LONGER)) == "".join(here.answer(LONGER[-1:]))
    assert "".join(here.answer(LONGER)) != "".join(LocalModel(llm, dict(GREEDY)).answer(LONGER))


def test_both_count(llm, server):
    for speaker in (LocalModel(llm, dict(GREEDY)), ServerModel(server.url, "sesame", dict(GREEDY))):
        before = speaker.counters()
        "".join(speaker.answer(HELLO))
        after = speaker.counters()
        assert before is not None
        assert after is not None
        assert after.tokens - before.tokens == 12
        assert after.hits + after.misses > before.hits + before.misses
        assert any(str(number) in speaker.tables()[-1].columns[0]._cells for number in ("all", "generated"))


def test_an_answer_that_is_closed_ends_in_the_server(server):
    def stats() -> Any:
        return server.ask("/stats", headers={"Authorization": "Bearer sesame"}).json

    before = stats()["engine"]
    answer = ServerModel(server.url, "sesame", {**GREEDY, "max_tokens": 200}).answer(HELLO)
    next(answer)
    answer.close()
    while stats()["outstanding"]:
        pass
    after = stats()["engine"]
    assert after["generated_tokens"] - before["generated_tokens"] < 200
    assert after["cancelled"] - before["cancelled"] == 1


def test_sampling_reaches_the_server(server):
    there = ServerModel(server.url, "sesame", {"temperature": 3.0})
    with pytest.raises(ValueError, match="temperature"):
        "".join(there.answer(HELLO))


@pytest.mark.parametrize("key", [None, "wrong"])
def test_the_key_is_asked_for(server, key):
    with pytest.raises(ValueError, match=r"key.*--api-key"):
        ServerModel(server.url, key, {})


@pytest.mark.parametrize("end", ["/", "/v1", "/v1/"])
def test_an_address_may_end_as_other_clients_are_told(server, end):
    assert ServerModel(server.url + end, "sesame", {}).name == "tiny"


def test_nobody_there_and_no_address():
    with pytest.raises(
        ConnectionError, match=r"no answer from http://127\.0\.0\.1:9 .*expertflow serve MODEL"
    ):
        ServerModel("http://127.0.0.1:9", None, {})
    with pytest.raises(ValueError, match="is no address; write --server http://127"):
        ServerModel("ftp://127.0.0.1", None, {})


def test_a_model_without_a_template_is_refused_with_the_remedy(llm, server, monkeypatch):
    there = ServerModel(server.url, "sesame", {})
    monkeypatch.setattr(there, "_chats", False)
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    for speaker in (there, LocalModel(llm, {})):
        with pytest.raises(ValueError, match=r"no chat template.*--raw"):
            speaker.check()
    LocalModel(llm, {}, raw=True).check()


class Foreign(http.server.BaseHTTPRequestHandler):
    """Another server with OpenAI's API, which knows nothing of experts, and breaks off in the midst of an answer."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        models = self.path == "/v1/models"
        self._send(200 if models else 404, json.dumps({"data": [{"id": "other"}]} if models else {}))

    def do_POST(self) -> None:
        event = {"choices": [{"delta": {"content": "half an "}}]}
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        data = f"data: {json.dumps(event)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


def test_another_server_can_be_talked_to_and_may_break_off():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Foreign) as foreign:
        threading.Thread(target=foreign.serve_forever, daemon=True).start()
        there = ServerModel(f"127.0.0.1:{foreign.server_port}", None, {})
        there.check()
        assert there.counters() is None
        with pytest.raises(ValueError, match="404"):
            there.tables()
        said = []
        with pytest.raises(ConnectionError, match="in the middle of its answer"):
            said.extend(there.answer(HELLO))
        foreign.shutdown()


def test_the_command_says_what_does_not_go_together(capsys, tmp_path: Path):
    from typer.testing import CliRunner

    from expertflow.cli import app

    for arguments, told in (
        ([], "chat with whom?"),
        (["model", "--server", "http://127.0.0.1:9"], "chat with whom?"),
        (["--server", "http://127.0.0.1:9", "--memory", "1GiB"], "--memory: that is for `expertflow serve`"),
        (["model", "--raw", "--system", "x"], "--raw has none"),
        (["model", "--temperature", "-1"], "temperature=-1.0"),
        (["--server", "http://127.0.0.1:9"], "no answer from"),
    ):
        result = CliRunner().invoke(app, ["chat", *arguments])
        assert result.exit_code == 2
        assert told in result.stderr
