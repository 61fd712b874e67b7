"""Batch files: both formats are read, and what makes no sense is an error of its line alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from expertflow.engine.batch_file import (
    CHAT,
    COMPLETION,
    BatchRequest,
    LineError,
    error_line,
    parse_line,
    read_batch,
    result_line,
)
from expertflow.engine.request import CompletionOutput, RequestOutput

HELLO = [{"role": "user", "content": "Hello"}]


def parsed(line: Any) -> BatchRequest | LineError:
    return parse_line(7, json.dumps(line).encode())


def openai(url: str = COMPLETION, custom_id: Any = "a", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("Once", BatchRequest(7, "line-7", "Once", None, {})),
        ({"prompt": "Once", "id": 3}, BatchRequest(7, "3", "Once", None, {})),
        ({"prompt": [1, 2], "max_tokens": 5}, BatchRequest(7, "line-7", [1, 2], None, {"max_tokens": 5})),
        ({"messages": HELLO, "seed": 1}, BatchRequest(7, "line-7", None, HELLO, {"seed": 1})),
        (
            openai(prompt="Once", temperature=0.5, user="me", stream=False, top_p=None),
            BatchRequest(7, "a", "Once", None, {"temperature": 0.5}, COMPLETION, "m"),
        ),
        (
            openai(CHAT, messages=HELLO, max_completion_tokens=9, n=2),
            BatchRequest(7, "a", None, HELLO, {"max_tokens": 9, "n": 2}, CHAT, "m"),
        ),
    ],
)
def test_both_formats(line: Any, wanted: BatchRequest) -> None:
    assert parsed(line) == wanted


@pytest.mark.parametrize(
    ("line", "identity", "url", "message"),
    [
        (17, None, None, "not an object: 17"),
        ({}, "line-7", None, 'one of "prompt" and "messages"'),
        ({"prompt": "a", "messages": HELLO}, "line-7", None, 'one of "prompt" and "messages"'),
        ({"prompt": "", "id": "x"}, "x", None, "prompt is empty"),
        ({"prompt": []}, "line-7", None, "prompt is empty"),
        ({"prompt": [1, "a"]}, "line-7", None, "neither text nor a list of token ids"),
        ({"prompt": [True]}, "line-7", None, "neither text nor a list of token ids"),
        ({"prompt": "a", "id": ""}, None, None, 'id is ""; it must be text'),
        ({"prompt": "a", "n": 2}, "line-7", None, "a plain line has one answer"),
        ({"prompt": "a", "maxtokens": 3}, "line-7", None, "maxtokens: not supported; known: .*max_tokens"),
        ({"prompt": "a", "temperature": -1}, "line-7", None, "temperature=-1 must be a number at least 0"),
        ({"prompt": "a", "stop": 3}, "line-7", None, "stop=3 must be a list"),
        ({"prompt": "a", "stop": {"a": 1}}, "line-7", None, "stop=.* must be a list"),
        ({"prompt": "a", "stop_token_ids": 5}, "line-7", None, "stop_token_ids=5 must be a list"),
        ({"prompt": "a", "ignore_eos": "no"}, "line-7", None, "ignore_eos='no' must be True or False"),
        ({"messages": [{"role": "user"}]}, "line-7", None, 'must be {"role"'),
        ({"messages": []}, "line-7", None, "at least one"),
        (openai(prompt="a", custom_id=None), None, None, "custom_id is null; it must be text"),
        (openai("/v1/embeddings", input="a"), "a", "/v1/embeddings", "'/v1/embeddings' is not served"),
        (openai(prompt="a") | {"method": "GET"}, "a", COMPLETION, "'GET' is not POST"),
        (openai() | {"body": 3}, "a", COMPLETION, "body is 3"),
        (openai(prompt="a", stream=True), "a", COMPLETION, "stream=True has no meaning"),
        (openai(prompt="a", logprobs=3), "a", COMPLETION, "logprobs: not supported"),
        (openai(CHAT, prompt="a"), "a", CHAT, "takes 'messages'"),
        (openai(messages=HELLO), "a", COMPLETION, "takes 'prompt'"),
    ],
)
def test_what_makes_no_sense(line: Any, identity: str | None, url: str | None, message: str) -> None:
    error = parsed(line)
    assert isinstance(error, LineError)
    assert (error.line, error.id, error.url) == (7, identity, url)
    assert re.search(message, error.message)


@pytest.mark.parametrize("raw", [b'{"prompt": "a"', b"\xff\xfe", b'{"prompt": "' + b"a" * 500])
def test_a_line_that_is_no_json_is_shown_in_short(raw: bytes) -> None:
    error = parse_line(3, raw)
    assert isinstance(error, LineError)
    assert "not a line of JSON" in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "lone \\ud83d"}', r"'\\ud83d' is half of a character"),
        (b'{"prompt": "a", "id": "\\ud83d"}', "half of a character"),
        (b'{"prompt": "a", "\\udc00": 1}', "half of a character"),
    ],
)
def test_a_line_that_is_json_and_no_text_is_an_error_of_its_own(raw: bytes, message: str) -> None:
    error = parse_line(3, raw)
    assert isinstance(error, LineError)
    assert re.search(message, error.message)
    assert len(error.message) < 200
    json.dumps(error_line(error), ensure_ascii=False).encode()


def test_openai_s_parts_of_text_and_signed_seeds() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    line = parsed(openai(CHAT, messages=[{"role": "user", "content": parts}], seed=-1))
    assert isinstance(line, BatchRequest)
    assert line.messages == [{"role": "user", "content": "Hello"}]
    assert line.sampling["seed"] == 2**64 - 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "of text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "of text"),
        ({"messages": "Hello"}, "messages must be a list"),
        ({"messages": ["Hello"]}, "of text"),
        ({"messages": HELLO, "seed": -(2**63) - 1}, "seed"),
        ({"messages": HELLO, "seed": True}, "seed"),
    ],
)
def test_what_is_no_text_and_no_seed_is_an_error_of_its_line(body: dict, message: str) -> None:
    error = parsed(openai(CHAT, **body))
    assert isinstance(error, LineError)
    assert message in error.message


def test_a_file_is_read_line_by_line_and_ids_are_used_once(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "id": "x"}\n\n  \nnonsense\n{"prompt": "b", "id": "x"}\n"c"')
    first, second, third, fourth = read_batch(path)
    assert isinstance(first, BatchRequest)
    assert isinstance(second, LineError)
    assert (first.id, second.line) == ("x", 4)
    assert third == LineError(5, "the id 'x' was used in line 1 already; give each its own")
    assert fourth == BatchRequest(6, "line-6", "c", None, {})


def test_the_id_of_a_line_that_failed_counts_as_used(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "", "id": "x"}\n{"prompt": "b", "id": "x"}\n')
    first, second = read_batch(path)
    assert isinstance(first, LineError)
    assert first.id == "x"
    assert isinstance(second, LineError)
    assert second.id is None


ANSWERS = RequestOutput(
    "Once", [1, 2], [CompletionOutput(k, f"text {k}", [3, 4, 5], "length", None) for k in range(2)]
)


def test_openai_lines_get_openai_results() -> None:
    chat = parsed(openai(CHAT, messages=HELLO, n=2))
    assert isinstance(chat, BatchRequest)
    line = result_line(chat, ANSWERS, "models/tiny-moe")
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("a", None, 200)
    body = line["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    assert [choice["message"]["content"] for choice in body["choices"]] == ["text 0", "text 1"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    completion = parsed(openai(prompt="Once", model=None))
    assert isinstance(completion, BatchRequest)
    body = result_line(completion, ANSWERS, "models/tiny-moe")["response"]["body"]
    assert (body["object"], body["model"], body["choices"][1]["text"]) == (
        "text_completion",
        "models/tiny-moe",
        "text 1",
    )


def test_plain_lines_get_their_text() -> None:
    request = parsed({"prompt": "Once", "id": "x"})
    assert isinstance(request, BatchRequest)
    output = RequestOutput("Once", [1], ANSWERS.outputs[:1])
    assert result_line(request, output, "m") == {
        "id": "x",
        "prompt": "Once",
        "text": "text 0",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
    }


def test_errors_are_written_in_the_format_of_their_line() -> None:
    assert error_line(LineError(4, "why")) == {"id": None, "line": 4, "error": {"message": "why"}}
    line = error_line(LineError(4, "why", "a", CHAT))
    assert (line["custom_id"], line["response"]["status_code"]) == ("a", 400)
    assert line["response"]["body"]["error"]["message"] == "why"
