"""Batch files: requests in, results out, one JSON object a line. OpenAI's batch format, and plain prompts.

Format only: nothing here knows a model. A line that makes no sense is a LineError of its own, and the others go on.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from expertflow.engine.request import RequestOutput
from expertflow.engine.sampling import SamplingParams

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
# Results have no place for logprobs yet.
_SAMPLING = {entry.name for entry in fields(SamplingParams)} - {"logprobs"}
# What the format has and we honour by doing nothing: names for the caller's own records, and the only value we serve.
_NO_EFFECT: dict[str, Any] = {"model": None, "user": None, "metadata": None, "stream": False}
_LONGEST_SHOWN = 60


@dataclass(frozen=True)
class BatchRequest:
    """One line of a batch file. sampling: the fields of SamplingParams that the line sets.

    id: custom_id in OpenAI's format, else "id", else "line-N". url: of OpenAI's format; None for a plain line.
    messages, or a prompt: text or token ids.
    """

    line: int  # from 1
    id: str
    prompt: str | list[int] | None
    messages: list[dict[str, str]] | None
    sampling: Mapping[str, Any]
    url: str | None = None
    model: str | None = None  # as the line calls it, repeated in its result


@dataclass(frozen=True)
class LineError:
    """A line that cannot be run. id, url: as far as they could be read."""

    line: int
    message: str
    id: str | None = None
    url: str | None = None


def read_batch(path: str | Path) -> Iterator[BatchRequest | LineError]:
    """Every line that is not blank, in order; a second use of an id is an error of the second.

    Raises OSError when the file cannot be read.
    """
    seen: dict[str, int] = {}
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            found = parse_line(line, raw)
            if found.id is not None:
                first = seen.setdefault(found.id, line)
                if first != line:
                    found = LineError(
                        line, f"the id {found.id!r} was used in line {first} already; give each its own"
                    )
            yield found


def parse_line(line: int, raw: bytes) -> BatchRequest | LineError:
    """One line of either format."""
    known: dict[str, str] = {}  # what an error can be filed under
    try:
        try:
            fields_of_line = json.loads(raw.decode("utf-8"))
            json.dumps(fields_of_line, ensure_ascii=False).encode("utf-8")
        except RecursionError:
            raise ValueError(f"nested too deeply: {_shortened(raw)}") from None
        except UnicodeEncodeError as error:  # "\\ud83d" alone is JSON, and no text
            half = error.object[error.start : error.end]
            raise ValueError(
                f"{half!a} is half of a character, which no text has: {_shortened(raw)}"
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a line of JSON in UTF-8 ({error}): {_shortened(raw)}") from None
        if isinstance(fields_of_line, str):
            fields_of_line = {"prompt": fields_of_line}
        if not isinstance(fields_of_line, dict):
            raise ValueError(
                f'not an object: {_shortened(raw)}; write {{"prompt": "..."}} or an OpenAI request'
            )
        if "body" in fields_of_line or "custom_id" in fields_of_line:
            return _openai(line, fields_of_line, known)
        return _plain(line, fields_of_line, known)
    except ValueError as error:
        return LineError(line, str(error), **known)


def _plain(line: int, given: dict[str, Any], known: dict[str, str]) -> BatchRequest:
    wishes = dict(given)
    known["id"] = identity = _identity("id", wishes.pop("id", f"line-{line}"))
    prompt, messages = _what_to_answer(wishes)
    if "n" in wishes:
        raise ValueError(
            "n: a plain line has one answer; use OpenAI's format, or a line for each with its own seed"
        )
    return BatchRequest(line, identity, prompt, messages, _sampling(wishes))


def _openai(line: int, given: dict[str, Any], known: dict[str, str]) -> BatchRequest:
    known["id"] = identity = _identity("custom_id", given.get("custom_id"))
    url, body = given.get("url", COMPLETION), given.get("body")
    known["url"] = str(url)
    if url not in (COMPLETION, CHAT):
        raise ValueError(f"url {url!r} is not served in batches; use {COMPLETION} or {CHAT}")
    if given.get("method", "POST") != "POST":
        raise ValueError(f"method {given['method']!r} is not POST")
    if not isinstance(body, dict):
        raise ValueError(f"body is {body!r}; it must be an object with the request")
    wishes = {name: value for name, value in body.items() if value is not None}
    model = wishes.get("model")
    for name, served in _NO_EFFECT.items():
        value = wishes.pop(name, served)
        if served is not None and value != served:
            raise ValueError(f"{name}={value!r} has no meaning in a batch; leave it out")
    if "max_completion_tokens" in wishes:
        wishes["max_tokens"] = wishes.pop("max_completion_tokens")
    seed = wishes.get("seed")
    if type(seed) is int and -(2**63) <= seed < 0:
        wishes["seed"] = seed % 2**64  # OpenAI's are signed
    wishes["messages"] = _with_joined_parts(wishes.get("messages"))
    prompt, messages = _what_to_answer(wishes)
    if (messages is None) == (url == CHAT):
        wanted = "messages" if url == CHAT else "prompt"
        raise ValueError(f"{url} takes {wanted!r}, and body has none")
    return BatchRequest(line, identity, prompt, messages, _sampling(wishes), url, model)


def _with_joined_parts(messages: Any) -> Any:
    """OpenAI's content may be a list of parts; those of text become one text, anything else is left for the checks."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if isinstance(message, dict) and _is_text_parts(message.get("content"))
        else message
        for message in messages
    ]


def _is_text_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )


def _identity(name: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {_shortened(value)}; it must be text of at least one character")
    return value


def _what_to_answer(wishes: dict[str, Any]) -> tuple[str | list[int] | None, list[dict[str, str]] | None]:
    """Takes prompt or messages out of `wishes`."""
    prompt, messages = wishes.pop("prompt", None), wishes.pop("messages", None)
    if (prompt is None) == (messages is None):
        raise ValueError('give one of "prompt" and "messages"')
    if messages is not None:
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list of at least one")
        for message in messages:
            if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")
            ):
                raise ValueError(
                    f'message {_shortened(message)} must be {{"role": "...", "content": "..."}} of text'
                )
        return None, messages
    of_ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if not isinstance(prompt, str) and not of_ids:
        raise ValueError(f"prompt {_shortened(prompt)} is neither text nor a list of token ids")
    if not prompt:
        raise ValueError("prompt is empty; there is nothing to continue")
    return prompt, None


def _sampling(wishes: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(wishes.keys() - _SAMPLING)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not supported; known: {', '.join(sorted(_SAMPLING))}")
    try:
        SamplingParams(**wishes)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return wishes


def result_line(request: BatchRequest, output: RequestOutput, model: str) -> dict[str, Any]:
    """What is written for an answered request: OpenAI's object for OpenAI's line, else text beside its prompt."""
    completion_tokens = sum(len(answer.token_ids) for answer in output.outputs)
    prompt_tokens = len(output.prompt_token_ids)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if request.url is None:
        (answer,) = output.outputs
        asked = {"messages": request.messages} if request.messages else {"prompt": request.prompt}
        return {
            "id": request.id,
            **asked,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "usage": usage,
        }
    chat = request.url == CHAT
    choices: list[dict[str, Any]] = []
    for answer in output.outputs:
        said = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
        choices.append(
            {"index": answer.index, **said, "logprobs": None, "finish_reason": answer.finish_reason}
        )
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": request.model or model,
        "choices": choices,
        "usage": usage,
    }
    return _response(request.id, 200, body)


def error_line(error: LineError) -> dict[str, Any]:
    """What is written for a line that was not answered."""
    if error.url is None:
        return {"id": error.id, "line": error.line, "error": {"message": error.message}}
    said = {"message": error.message, "type": "invalid_request_error", "param": None, "code": None}
    return _response(error.id, 400, {"error": said})


def _response(custom_id: str | None, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": body},
        "error": None,
    }


def _shortened(value: Any) -> str:
    text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."
