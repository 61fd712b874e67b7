"""The endpoints that answer with text: /v1/completions, /v1/chat/completions and /v1/models."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from expertflow.engine.llm import ChatTemplateError
from expertflow.engine.sampling import SamplingParams
from expertflow.server.answers import Answer, ChatAnswer, CompletionAnswer, TokenTexts
from expertflow.server.driver import EngineDriver
from expertflow.server.errors import APIError, refused_value, unexpected
from expertflow.server.generation import Generation, Token
from expertflow.server.openapi import body_of, whole_or_stream
from expertflow.server.schemas import ChatRequest, CompletionRequest, Sampling
from expertflow.server.settings import ServerSettings
from expertflow.server.streams import EventStream, read_body, watching

_DONE = b"data: [DONE]\n\n"
_LEAST_LONGEST_TOKEN = 16
CLIENT_LEFT = "cancelled"

MakeAnswer = Callable[[], Answer]


class TextEndpoints:
    """Answers requests for text by one driver. name: what clients call the model."""

    def __init__(self, driver: EngineDriver, settings: ServerSettings, name: str):
        self._driver = driver
        self._settings = settings
        self._name = name
        self._texts = TokenTexts(driver.llm.tokenizer)
        self._created = int(time.time())
        longest = max(map(len, driver.llm.tokenizer.get_vocab()), default=0)
        self._most_characters = driver.llm.context * max(longest, _LEAST_LONGEST_TOKEN)

    @property
    def can_chat(self) -> bool:
        return bool(getattr(self._driver.llm.tokenizer, "chat_template", None))

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["text"])
        router.add_api_route("/models", self.models, methods=["GET"], summary="The model that is served")
        router.add_api_route("/models/{model:path}", self.model, methods=["GET"], summary="The same, by name")
        router.add_api_route(
            "/completions",
            self.completions,
            methods=["POST"],
            summary="Continue a text",
            openapi_extra=body_of(CompletionRequest),
            responses=whole_or_stream("Completion"),
        )
        router.add_api_route(
            "/chat/completions",
            self.chat,
            methods=["POST"],
            summary="Answer in a conversation",
            openapi_extra=body_of(ChatRequest),
            responses=whole_or_stream("ChatCompletion"),
        )
        return router

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, model: str) -> Response:
        Sampling(model=model).check_model(self._name)
        return JSONResponse(self._card())

    async def completions(self, request: Request) -> Response:
        with _counted(self._driver, "completions"):
            body = await read_body(request, CompletionRequest, self._settings.max_body_bytes)
            prompts = body.prompts()
            if len(prompts) > self._settings.max_prompts:
                raise APIError(
                    400,
                    f"{len(prompts)} prompts, and {self._settings.max_prompts} are the limit; send them in several "
                    f"requests, or start the server with a larger --max-prompts",
                    param="prompt",
                    code="too_many_prompts",
                )
            echo: list[str] | None = [] if body.echo else None

            def encode() -> list[list[int]]:
                tokenizer = self._driver.llm.tokenizer
                found = []
                for prompt in prompts:
                    if isinstance(prompt, str):
                        self._check_length(prompt, "prompt")
                    found.append(list(tokenizer(prompt).input_ids) if isinstance(prompt, str) else prompt)
                    if echo is not None:
                        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
                        echo.append(str(text))
                return found

            def answer(n: int) -> Answer:
                return CompletionAnswer(self._name, self._texts, body.include_usage, echo, n)

            return await self._respond(request, "completions", body, encode, len(prompts), answer)

    async def chat(self, request: Request) -> Response:
        with _counted(self._driver, "chat"):
            body = await read_body(request, ChatRequest, self._settings.max_body_bytes)
            if not self.can_chat:
                raise APIError(
                    400,
                    f"{self._name} has no chat template, so it is probably no chat model; use /v1/completions, or "
                    f"serve an instruct version of the model",
                    code="no_chat_template",
                )
            conversation = body.conversation()

            def encode() -> list[list[int]]:
                for number, message in enumerate(conversation):
                    self._check_length(message["content"], f"messages[{number}].content")
                try:
                    return [self._driver.llm.encode_chat(conversation)]
                except ChatTemplateError as error:
                    raise APIError(
                        400, str(error), param="messages", code="refused_by_chat_template"
                    ) from error

            def answer(n: int) -> Answer:
                return ChatAnswer(self._name, self._texts, body.include_usage)

            return await self._respond(request, "chat", body, encode, 1, answer)

    async def _respond(
        self,
        request: Request,
        endpoint: str,
        body: CompletionRequest | ChatRequest,
        encode: Callable[[], Sequence[list[int]]],
        num_prompts: int,
        answer_of: Callable[[int], Answer],
    ) -> Response:
        body.check_model(self._name)
        body.check_stream_options()
        params = self._params(body)
        generation = await self._driver.submit(encode, params, num_prompts, self._settings.deadline_seconds)
        answer = answer_of(params.n)
        if body.stream:
            # Counted when it has ended, not when it begins.
            outcome = _Outcome(self._driver, endpoint, generation)
            events = _events(generation, answer, body.include_usage, outcome)
            return EventStream(events, outcome.count, self._settings.write_seconds)
        tokens: list[Token] = []
        async with watching(request.receive, generation.cancel):
            while news := await generation.take():
                tokens += news
        self._driver.metrics.ended(endpoint, "ok", time.monotonic() - generation.started)
        return Response(to_json(answer.whole(generation, tokens)), media_type="application/json")

    def _params(self, body: CompletionRequest | ChatRequest) -> SamplingParams:
        try:
            return body.sampling_params(self._driver.llm.get_default_sampling_params())
        except ValueError as error:
            raise refused_value(error) from error

    def _check_length(self, text: str, param: str) -> None:
        """Before megabytes are encoded for nothing."""
        if len(text) > self._most_characters:
            raise APIError(
                400,
                f"{param} has {len(text)} characters, more than the {self._driver.llm.context} tokens of the context "
                f"can hold ({self._most_characters} characters, were each the longest token); shorten it, or start the "
                f"server with a larger --context",
                param=param,
                code="context_length_exceeded",
            )

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "expertflow",
            "expertflow": {"chat": self.can_chat, "context": self._driver.llm.context},
        }


class _counted:
    """Counts a request that fails in this block, under the code of its error."""

    def __init__(self, driver: EngineDriver, endpoint: str):
        self._driver, self._endpoint = driver, endpoint

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, APIError):
            self._driver.metrics.ended(self._endpoint, error.code or str(error.status))
        elif error is not None:
            self._driver.metrics.ended(self._endpoint, "internal_error")


class _Outcome:
    """How a stream ended; a client that leaves has its generation cancelled."""

    def __init__(self, driver: EngineDriver, endpoint: str, generation: Generation):
        self._driver, self._endpoint, self._generation = driver, endpoint, generation
        self.said = CLIENT_LEFT

    def count(self) -> None:
        seconds = None
        if self.said == "ok":
            seconds = time.monotonic() - self._generation.started
        else:
            self._generation.cancel()
        self._driver.metrics.ended(self._endpoint, self.said, seconds)


async def _events(
    generation: Generation, answer: Answer, include_usage: bool, outcome: _Outcome
) -> AsyncIterator[bytes]:
    """Server-sent events of a stream. An error in the midst of it is an event too: the status has been sent."""
    try:
        for chunk in answer.opening(generation.num_prompts * generation.n):
            yield _event(chunk)
        while news := await generation.take():
            by_choice: dict[int, list[Token]] = {}
            for token in news:
                by_choice.setdefault(token.choice, []).append(token)
            for choice, tokens in by_choice.items():
                for chunk in answer.chunk(choice, tokens):
                    yield _event(chunk)
        if include_usage:
            yield _event(answer.usage_chunk(generation))
        outcome.said = "ok"
    except APIError as error:
        outcome.said = error.code or str(error.status)
        yield _event(error.body)
    except Exception as error:  # a bug of ours
        outcome.said = "internal_error"
        yield _event(unexpected(error, "writing a stream").body)
    yield _DONE


def _event(message: dict[str, Any]) -> bytes:
    return (
        b"data: " + to_json(message) + b"\n\n"
    )  # 1.3 us a chunk, where json takes 25 (2 slow cores, 2026-11)
