"""Requests of the OpenAI API, as we take them. A parameter that is not here, or not with this value, is an error.

Types are strict: "5" is no number. What OpenAI has and we do not is taken with the value that changes nothing, since
clients send their whole set of parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from expertflow.engine.sampling import MOST_LOGPROBS, SamplingParams
from expertflow.server.errors import APIError

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, when a completion names none; a chat may fill the context

Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Bias = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
]
Flat = dict[str, str]

# To SamplingParams, under the same name.
_PASSED_ON = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class Sampling(_Strict):
    """What both endpoints take. None: the checkpoint's recommendation, else OpenAI's default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Bias | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    # vLLM's, beside OpenAI's.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    # Marks for OpenAI's own records; they change no answer there either.
    user: str | None = None
    metadata: Flat | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    def check_model(self, served: str) -> None:
        if self.model is not None and self.model != served:
            shown = self.model if len(self.model) <= 100 else self.model[:97] + "..."
            raise APIError(
                404,
                f"model {shown!r} is not served here; use {served!r}, or leave model out",
                param="model",
                code="model_not_found",
            )

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise APIError(
                400,
                "stream_options is for streams; add stream=true, or leave it out",
                param="stream_options",
                code="invalid_value",
            )

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling_params(
        self, recommended: SamplingParams, max_tokens: int | None, **more: Any
    ) -> SamplingParams:
        given = {name: value for name in _PASSED_ON if (value := getattr(self, name)) is not None}
        if self.seed is not None:
            given["seed"] = self.seed % 2**64  # OpenAI's are signed
        return replace(recommended, max_tokens=max_tokens, **given, **more)


class CompletionRequest(Sampling):
    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]  # then all are: the type says so
        return self.prompt  # type: ignore[return-value]

    def sampling_params(self, recommended: SamplingParams) -> SamplingParams:
        if self.echo and self.logprobs is not None:
            raise APIError(
                400,
                "echo with logprobs would need those of the prompt, which are not computed; leave one of them out",
                param="echo",
                code="unsupported_parameter",
            )
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self._sampling_params(recommended, max_tokens, logprobs=self.logprobs)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    # What a client has in an answer of ours that it sends back.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None  # without tools it says nothing

    def conversation(self) -> list[dict[str, str]]:
        """For the chat template, to which a developer is the system. Raises APIError for an order without an answer."""
        roles = [message.role for message in self.messages]
        for number, role in enumerate(roles):
            if (
                role in ("system", "developer")
                and number > 0
                and roles[number - 1] not in ("system", "developer")
            ):
                raise APIError(
                    400,
                    f"messages[{number}] of role {role} comes after other roles; put it first",
                    param=f"messages[{number}].role",
                    code="invalid_role_order",
                )
        if roles[-1] != "user":
            raise APIError(
                400,
                f"the last message is of role {roles[-1]}, and the model answers the user: end with a user message",
                param=f"messages[{len(roles) - 1}].role",
                code="invalid_role_order",
            )
        return [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in self.messages
        ]

    def sampling_params(self, recommended: SamplingParams) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(
                400,
                "top_logprobs is for logprobs=true; add that, or leave it out",
                param="top_logprobs",
                code="invalid_value",
            )
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise APIError(
                400,
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} are two names of "
                f"one limit; give one of them",
                param="max_tokens",
                code="invalid_value",
            )
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling_params(recommended, next(iter(limits), None), logprobs=logprobs)
