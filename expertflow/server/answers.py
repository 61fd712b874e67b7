"""Answers in OpenAI's shapes: whole, and as chunks of a stream. Plain dictionaries; the shapes are in `openapi.py`."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from expertflow.engine.logprobs import TokenLogprobs
from expertflow.server.generation import Generation, Token

_TEXTS_KEPT = 2**17  # more than most vocabularies have
_LEAST_LOGPROB = -9999.0  # of what cannot be; JSON has no infinity
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def usage_of(generation: Generation) -> dict[str, int]:
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class TokenTexts:
    """The text of single tokens, as logprobs show them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # 21 for each token of each stream, in the event loop: decoding them anew took most of its time.
        self.of = lru_cache(_TEXTS_KEPT)(self._decoded)

    def _decoded(self, token_id: int) -> str:
        text = self._tokenizer.decode(
            [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one list of ids is one text"
        # Sentencepiece drops the space before the first word of what it decodes.
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        return f" {text}" if isinstance(name, str) and name.startswith("▁") and text[:1] != " " else text


class Answer(ABC):
    """How one endpoint writes what a generation brings. Its state: the id, the time, and where each choice is."""

    object_whole = object_chunk = id_prefix = ""

    def __init__(self, model: str, texts: TokenTexts, with_usage: bool):
        self._texts = texts
        self._with_usage = with_usage
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def opening(self, choices: int) -> Iterator[dict[str, Any]]:
        """Chunks before the first token."""
        return iter(())

    @abstractmethod
    def chunk(self, choice: int, tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
        """What these tokens of one choice add, if there is anything to see."""

    def usage_chunk(self, generation: Generation) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage_of(generation)}

    def whole(self, generation: Generation, tokens: Sequence[Token]) -> dict[str, Any]:
        by_choice: dict[int, list[Token]] = {}
        for token in tokens:
            by_choice.setdefault(token.choice, []).append(token)
        choices = [self._choice(choice, by_choice[choice]) for choice in sorted(by_choice)]
        return {**self._head, "object": self.object_whole, "choices": choices, "usage": usage_of(generation)}

    @abstractmethod
    def _choice(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """A choice of a whole answer."""

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.object_chunk, "choices": choices}
        return {**chunk, "usage": None} if self._with_usage else chunk


class ChatAnswer(Answer):
    object_whole, object_chunk, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, choices: int) -> Iterator[dict[str, Any]]:
        for choice in range(choices):
            yield self._delta(choice, {"role": "assistant", "content": ""})

    def chunk(self, choice: int, tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
        text, logprobs = "".join(token.text for token in tokens), self._logprobs(tokens)
        if text or logprobs:
            yield self._delta(choice, {"content": text}, logprobs)
        if (reason := tokens[-1].finish_reason) is not None:
            yield self._delta(choice, {}, finish_reason=reason)

    def _choice(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any]:
        text = "".join(token.text for token in tokens)
        return {
            "index": choice,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": tokens[-1].finish_reason,
        }

    def _delta(
        self, choice: int, delta: dict[str, str], logprobs: Any = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return self._chunk(
            [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        )

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        found = [token.logprobs for token in tokens if token.logprobs is not None]
        if not found:
            return None
        content = [
            {
                **self._token(one.token_id, one.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in one.top],
            }
            for one in found
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._texts.of(token_id)
        # A token may be a part of a character; then it is no text, and these would not be its bytes.
        return {
            "token": text,
            "logprob": max(_LEAST_LOGPROB, logprob),
            "bytes": None if _BROKEN in text else list(text.encode()),
        }


class CompletionAnswer(Answer):
    """echo: by prompt, the text to put before its answers; None: nothing. n: answers to each prompt."""

    object_whole = object_chunk = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, model: str, texts: TokenTexts, with_usage: bool, echo: Sequence[str] | None, n: int):
        super().__init__(model, texts, with_usage)
        self._echo = echo
        self._n = n
        self._offset: dict[int, int] = {}  # by choice: characters of its logprobs so far

    def opening(self, choices: int) -> Iterator[dict[str, Any]]:
        if self._echo is not None:
            for choice in range(choices):
                yield self._chunk([self._part(choice, self._echo[choice // self._n], None, None)])

    def chunk(self, choice: int, tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
        text, logprobs = "".join(token.text for token in tokens), self._logprobs(choice, tokens)
        reason = tokens[-1].finish_reason
        if text or logprobs or reason is not None:
            yield self._chunk([self._part(choice, text, logprobs, reason)])

    def _choice(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any]:
        text = "" if self._echo is None else self._echo[choice // self._n]
        text += "".join(token.text for token in tokens)
        return self._part(choice, text, self._logprobs(choice, tokens), tokens[-1].finish_reason)

    def _part(self, choice: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        found: list[TokenLogprobs] = [token.logprobs for token in tokens if token.logprobs is not None]
        if not found:
            return None
        names = [self._texts.of(one.token_id) for one in found]
        offsets, offset = [], self._offset.get(choice, 0)
        for name in names:
            offsets.append(offset)
            offset += len(name)
        self._offset[choice] = offset
        top: list[dict[str, float]] = []
        for one, name in zip(found, names, strict=True):
            by_text: dict[str, float] = {}
            for token_id, logprob in one.top:  # of tokens that look alike the likelier one is told
                by_text.setdefault(self._texts.of(token_id), max(_LEAST_LOGPROB, logprob))
            top.append(by_text | {name: max(_LEAST_LOGPROB, one.logprob)})
        return {
            "tokens": names,
            "token_logprobs": [max(_LEAST_LOGPROB, one.logprob) for one in found],
            "top_logprobs": top,
            "text_offset": offsets,
        }
