"""Every wrong request gets OpenAI's error with a message that says what to change; none gets a 500."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.running import Running

COMPLETION = [
    ({}, "prompt", "prompt is missing; give it"),
    ({"prompt": ""}, "prompt", "must be text, a list of texts"),
    ({"prompt": []}, "prompt", "none of them empty"),
    ({"prompt": [[]]}, "prompt", "none of them empty"),
    ({"prompt": ["a", 1]}, "prompt", "must be text"),
    ({"prompt": [-1]}, "prompt", "must be text"),
    ({"prompt": [5000]}, None, "outside 0 to 127, the vocabulary"),
    ({"prompt": {"a": 1}}, "prompt", "must be text"),
    ({"prompt": "x" * 200}, None, "does not fit the context of 128"),
    ({"prompt": "x" * 900_000}, "prompt", "900000 characters, more than the 128 tokens"),
    ({"prompt": ["a"] * 65}, "prompt", "65 prompts, and 64 are the limit"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1 (got 0)"),
    ({"max_tokens": -3}, "max_tokens", "got -3"),
    ({"max_tokens": 127}, None, "lower max_tokens to"),
    ({"max_tokens": 10**30}, "max_tokens", "less than"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer (got '5')"),
    ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 100, "temperature": 1}, None, "100 answers in one request"),
    ({"n": 2, "temperature": 0}, "n", "would be alike"),
    ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": None, "seed": 2**70}, "seed", "less than"),
    ({"n": 129, "temperature": 1}, "n", "less than or equal to 128"),
    ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"top_k": 2**31}, "top_k", "less than"),
    ({"min_p": -0.1}, "min_p", "greater than or equal to 0"),
    ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"repetition_penalty": 101}, "repetition_penalty", "less than or equal to 100"),
    ({"presence_penalty": -3}, "presence_penalty", "greater than or equal to -2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
    ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
    ({"seed": -(2**63) - 1}, "seed", "greater than or equal to"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids", "at most 128"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "at most 1024"),
    ({"logit_bias": {"5": -101}}, "logit_bias", "greater than or equal to -100"),
    ({"stop": "a" * 1001}, "stop", "1 to 1000"),
    ({"logit_bias": {"abc": 1}}, "logit_bias.abc", "match"),
    ({"logit_bias": {"5": 500}}, "logit_bias", "less than or equal to 100"),
    ({"logit_bias": {"5000": 5}}, "logit_bias", "vocabulary are 0 to 127"),
    ({"stop": ["a"] * 20}, "stop", "at most 16"),
    ({"stop": [""]}, "stop", "1 to 1000"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"echo": True, "logprobs": 1}, "echo", "are not computed"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "add stream=true"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"suffix": "x"}, "suffix", "suffix is not supported"),
    ({"best_of": 3}, "best_of", "input should be 1"),
    ({"frobnicate": 1}, "frobnicate", "frobnicate is not supported"),
    ({"model": "gpt"}, "model", "use 'tiny'"),
    ({"model": 3}, "model", "valid string"),
]
USER = {"role": "user", "content": "Hi"}
CHAT = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [USER] * 4097}, "messages", "at most 4096"),
    ({"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens", "or equal to 1"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system', 'developer', 'user'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "must be text, or a list"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
        "must be text, or a list",
    ),
    ({"messages": [USER, {"role": "system", "content": "x"}]}, "messages[1].role", "put it first"),
    (
        {"messages": [USER, {"role": "assistant", "content": "x"}]},
        "messages[1].role",
        "end with a user message",
    ),
    ({"messages": [{**USER, "name": "Bob"}]}, "messages[0].name", "is not supported"),
    ({"messages": [USER], "tools": [{"type": "function"}]}, "tools", "at most 0"),
    ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
    ({"messages": [USER], "top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    (
        {"messages": [USER], "max_tokens": 3, "max_completion_tokens": 4},
        "max_tokens",
        "two names of one limit",
    ),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, None, "does not fit the context"),
    ({"messages": [USER], "store": True}, "store", "should be False"),
]


def check(found: Any, param: str | None, message: str, status: int) -> None:
    assert found.status == status, found.body
    assert message in found.error["message"]
    assert found.error["param"] == param
    assert found.error["type"] == "invalid_request_error"
    assert len(found.error["message"]) < 1000, "the whole prompt was sent back"


@pytest.mark.parametrize(("wrong", "param", "message"), COMPLETION, ids=lambda value: str(value)[:40])
def test_completions(served: Running, wrong: dict[str, Any], param: str | None, message: str) -> None:
    body = wrong if "prompt" in wrong or not wrong else {"prompt": "Hello", **wrong}
    found = served.ask("/v1/completions", body)
    check(found, param, message, 404 if param == "model" and "gpt" in str(wrong) else 400)


@pytest.mark.parametrize(("wrong", "param", "message"), CHAT, ids=lambda value: str(value)[:60])
def test_chat(served: Running, wrong: dict[str, Any], param: str | None, message: str) -> None:
    check(served.ask("/v1/chat/completions", wrong), param, message, 400)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "send one JSON object"),
        (b"null", "send one JSON object"),
        (b'"prompt"', "send one JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "finite number"),
        (b'{"prompt": "a", "temperature": 1e999}', "finite number"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "a", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bodies_that_are_no_request(served: Running, body: bytes, message: str) -> None:
    found = served.ask("/v1/completions", body, headers={"Content-Type": "application/json"})
    assert found.status == 400
    assert message in found.error["message"]


def test_content_types_methods_and_paths(served: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        found = served.ask("/v1/completions", b"{}", headers={"Content-Type": kind})
        assert found.status == 415
        assert "application/json" in found.error["message"]
    found = served.ask("/v1/completions")
    assert found.status == 405
    assert found.headers["allow"] == "POST"
    assert found.error["code"] == "method_not_allowed"
    for path in ("/v1/embeddings", "/page/../app.py", "/page/%2e%2e/app.py", "/page/app.py", "/docs", "//"):
        found = served.ask(path)
        assert found.status == 404, path
        assert found.error["code"] == "not_found"


def test_a_refusing_template_is_a_400(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ raise_exception('Conversation roles must alternate') }}"
    monkeypatch.setattr(served.llm.tokenizer, "chat_template", template)
    found = served.ask("/v1/chat/completions", {"messages": [USER]})
    assert found.status == 400
    assert "Conversation roles must alternate" in found.error["message"]


def test_without_a_chat_template_chat_says_so(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.llm.tokenizer, "chat_template", None)
    found = served.ask("/v1/chat/completions", {"messages": [USER]})
    assert found.status == 400
    assert "use /v1/completions" in found.error["message"]
    (model,) = served.ask("/v1/models").json["data"]
    assert model["expertflow"] == {"chat": False, "context": 128}


def test_neutral_values_of_what_is_not_supported_are_taken(served: Running) -> None:
    neutral = {"suffix": None, "best_of": 1, "user": "me", "store": False, "echo": False, "logprobs": None}
    assert served.complete(max_tokens=2, **neutral).status == 200
    chat = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    found = served.ask("/v1/chat/completions", {"messages": [USER], "max_completion_tokens": 2, **chat})
    assert found.status == 200
    assert found.json["usage"]["completion_tokens"] == 2


def test_seeds_may_be_negative_as_openais_are(served: Running) -> None:
    assert served.complete(max_tokens=2, temperature=1.0, seed=-(2**63)).status == 200
