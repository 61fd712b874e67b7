"""Speakers: who answers in a conversation. A model in this process, or a server's.

They give text in pieces and count; what is shown of that is conversation.py's and answer_display.py's.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from expertflow.commands.flags import DEFAULT_MAX_TOKENS
from expertflow.commands.session import fitting, sampling_params

if TYPE_CHECKING:
    from rich.table import Table

    from expertflow.engine.llm import LLM

Message = dict[str, str]

_CONNECT_SECONDS = 10.0
_SILENT_SECONDS = 600.0  # a long prompt on a slow disk
_STATS_SECONDS = 2.0


class Counters(NamedTuple):
    """Since the model was loaded or the server started."""

    tokens: int  # in answers of this conversation
    hits: int
    misses: int
    stall_seconds: float


class Speaker(Protocol):
    """sampling: what was asked for, by names of SamplingParams; to be changed between two answers."""

    name: str
    sampling: dict[str, Any]

    def check(self) -> None:
        """Raises ValueError when this model cannot converse."""

    def answer(self, messages: list[Message]) -> Iterator[str]:
        """The next message in pieces; the last of `messages` is the user's. Closing it ends the answer."""

    def counters(self) -> Counters | None:
        """None where they cannot be had."""

    def tables(self) -> list[Table]:
        """All statistics, for people."""


class LocalModel:
    """raw: continue the newest message as plain text, without a chat template and without what came before."""

    def __init__(self, llm: LLM, sampling: dict[str, Any], *, raw: bool = False):
        self.name = llm.name
        self.sampling = sampling
        self._llm = llm
        self._raw = raw

    def check(self) -> None:
        if not self._raw:
            self._llm.encode_chat([{"role": "user", "content": ""}])

    def answer(self, messages: list[Message]) -> Iterator[str]:
        llm, newest = self._llm, messages[-1]["content"]
        prompt = newest if self._raw else llm.encode_chat(messages)
        params = sampling_params(llm, self.sampling)
        return llm.stream(prompt, fitting(llm, prompt, params, "max_tokens" in self.sampling))

    def counters(self) -> Counters | None:
        stats = self._llm.stats
        return Counters(self._llm.timing.generated_tokens, stats.hits, stats.misses, stats.stall_seconds)

    def tables(self) -> list[Table]:
        from expertflow import report

        return report.tables(report.collect(self._llm))


class ServerModel:
    """The model of a server with OpenAI's API. ValueError for what it refuses, OSError when it cannot be reached."""

    def __init__(self, url: str, key: str | None, sampling: dict[str, Any], *, raw: bool = False):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--server {url!r} is no address; write --server http://127.0.0.1:8000")
        # Where other clients are told http://host:8000/v1.
        parts = parts._replace(path=parts.path.rstrip("/").removesuffix("/v1"))
        self._parts, self._url, self._key, self._raw = parts, url, key, raw
        self.sampling = sampling
        self._tokens = 0
        models = self._json("/v1/models")["data"]
        self.name: str = models[0]["id"]
        self._chats: bool = models[0].get("expertflow", {}).get("chat", True)

    def check(self) -> None:
        if not self._raw and not self._chats:
            raise ValueError(
                f"{self.name} has no chat template, so it is probably no chat model; give --raw to have plain text "
                f"continued, or serve an instruct version of the model"
            )

    def answer(self, messages: list[Message]) -> Iterator[str]:
        body: dict[str, Any] = {"model": self.name, "stream": True, "stream_options": {"include_usage": True}}
        body |= self.sampling
        if self._raw:
            path = "/v1/completions"
            body = {"max_tokens": DEFAULT_MAX_TOKENS, **body, "prompt": messages[-1]["content"]}
        else:
            path = "/v1/chat/completions"
            body |= {"messages": messages}
        told = 0  # tokens, as far as pieces tell: the server counts at the end
        with closing(self._connection(_SILENT_SECONDS)) as connection:
            for event in _events(self._ask(connection, "POST", path, body)):
                if (error := event.get("error")) is not None:
                    raise ValueError(error["message"])
                for choice in event.get("choices", []):
                    piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    if piece:
                        told += 1
                        self._tokens += 1
                        yield piece
                if usage := event.get("usage"):
                    self._tokens += usage["completion_tokens"] - told

    def counters(self) -> Counters | None:
        try:
            cache = self._json("/stats", _STATS_SECONDS)["cache"]
            return Counters(self._tokens, cache["hits"], cache["misses"], cache["stall_seconds"])
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            http.client.HTTPException,
        ):  # another server, or none now
            return None

    def tables(self) -> list[Table]:
        from expertflow import report

        found = self._json("/stats")
        try:
            return [report.layer_table(found)]
        except (KeyError, TypeError, IndexError):
            raise ValueError(f"{self._url} gives no statistics of expertflow") from None

    def _json(self, path: str, timeout_seconds: float = _CONNECT_SECONDS) -> Any:
        with closing(self._connection(timeout_seconds)) as connection:
            return json.loads(self._ask(connection, "GET", path).read())

    def _connection(self, timeout_seconds: float) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        assert self._parts.hostname is not None, "checked at the start"
        return kind(self._parts.hostname, self._parts.port, timeout=timeout_seconds)

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        sent = json.dumps(body) if body is not None else None
        try:
            connection.request(method, self._parts.path.rstrip("/") + path, sent, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"no answer from {self._url} ({str(error) or type(error).__name__}); start a server with `expertflow "
                f"serve MODEL`, or give the address of one"
            ) from None
        if response.status != 200:
            raise ValueError(_refusal(response))
        return response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:  # a connection that breaks off ends it like any other
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        if line.startswith(b"data:"):
            yield json.loads(data)
    raise ConnectionError("the server ended in the middle of its answer; say it again")


def _refusal(response: http.client.HTTPResponse) -> str:
    text = response.read().decode(errors="replace")
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {response.status} {response.reason}"
    return f"{message} (here: --api-key)" if response.status == 401 else message


class Meter:
    """An answer as it comes: tokens, speed, hits and stall of it alone. To be told of each piece."""

    def __init__(self, speaker: Speaker):
        self._speaker = speaker
        self._before = self._newest = speaker.counters()
        self._asked = time.perf_counter()
        self._began: float | None = None
        self._seconds = 0.0
        self._pieces = 0

    def piece(self) -> None:
        now = time.perf_counter()
        self._began = now if self._began is None else self._began
        self._seconds = now - self._began
        self._pieces += 1

    def refresh(self) -> None:
        self._newest = self._speaker.counters()

    def __str__(self) -> str:
        before, now = self._before, self._newest
        # A server counts at the end only; a piece is a token at least.
        tokens = max(self._pieces, now.tokens - before.tokens if before and now else 0)
        said = [f"{tokens} token{'' if tokens == 1 else 's'}"]
        if tokens > 1 and self._seconds:
            said.append(f"{(tokens - 1) / self._seconds:.3g} tokens/s")
        if before and now:
            hits, needed = now.hits - before.hits, now.hits + now.misses - before.hits - before.misses
            if needed > 0:
                said.append(f"hit ratio {hits / needed:.1%}")
            said.append(f"stalled {max(0.0, now.stall_seconds - before.stall_seconds):.2f} s")
        if self._began is not None:
            said.append(f"first in {self._began - self._asked:.2f} s")
        return ", ".join(said)
