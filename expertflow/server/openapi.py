"""The server's own description: shapes of requests and answers, for `/openapi.json` and for tests against it.

Requests are checked by schemas.py; answers are written by answers.py, and these models only say how they look.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from expertflow.server.schemas import ChatRequest, CompletionRequest

_REF = "#/components/schemas/{model}"
FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenWithTop(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenWithTop]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


_REQUESTS: tuple[type[BaseModel], ...] = (CompletionRequest, ChatRequest)
_ANSWERS: tuple[type[BaseModel], ...] = (Error, Completion, ChatCompletion)


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """The part of an operation's description that names its request."""
    schema = {"$ref": _REF.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def whole_or_stream(answer: str) -> dict[int | str, dict[str, Any]]:
    """Responses of an endpoint that gives text, with its errors."""
    errors = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
    content = {
        "application/json": {"schema": {"$ref": _REF.format(model=answer)}},
        # Without a schema: some read it as of the whole stream, others as of each of its events.
        "text/event-stream": {},
    }
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return {
        200: {"description": "the answer, or with stream=true its chunks", "content": content},
        **{status: {"description": "an error", "content": error} for status in errors},
    }


def describe(app: FastAPI, needs_key: bool) -> None:
    """Have `/openapi.json` say what is above."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            components = found.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            modes: list[tuple[tuple[type[BaseModel], ...], JsonSchemaMode]] = [
                (_REQUESTS, "validation"),
                (_ANSWERS, "serialization"),
            ]
            for models, mode in modes:
                _, definitions = models_json_schema([(model, mode) for model in models], ref_template=_REF)
                schemas |= definitions["$defs"]
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # ours are 400
            if needs_key:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                found["security"] = [{"key": []}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change it
