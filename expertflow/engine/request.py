"""Requests and their answers: what was asked, what has come out so far, and whether it is finished.

No model here: a Row is told each token and turns it into text. Text leaves in whole characters, and never
a part of a stop string.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from expertflow.engine.logprobs import TokenLogprobs
from expertflow.engine.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]  # abort: it was cancelled, or failed


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. token_ids has every token, the one that ended it included; text ends before the stop.

    logprobs: of each of token_ids, where SamplingParams.logprobs asked for them.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None  # the stop string or stop token id; None for end of sequence and length
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its n answers. prompt is None when token ids were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class TextStream:
    """Token ids to text, piece by piece."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Decoding starts a little before what is new, since a tokenizer may join a token to the one before.
        self._context_start = 0
        self._decoded_to = 0
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """The text that is certain by now and was not given before; often empty."""
        self._ids.append(token)
        fresh = self._decode_fresh()
        # A replacement character at the end is a character whose other bytes are still to come.
        if fresh.endswith("�"):
            return ""
        return self._emit(fresh)

    def finish(self) -> str:
        """No more tokens will come: whatever was held back."""
        piece = self._emit(self._decode_fresh()) + self._held  # of which nothing is left where it stopped
        self._held = ""
        return piece

    def _decode_fresh(self) -> str:
        before = self._decode(self._ids[self._context_start : self._decoded_to])
        return self._decode(self._ids[self._context_start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up spaces around punctuation would depend on where a piece ends.
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one list of ids is one text"
        return text

    def _emit(self, fresh: str) -> str:
        if self.stopped_by is not None:
            return ""
        if fresh:
            self._context_start, self._decoded_to = self._decoded_to, len(self._ids)
        self._held += fresh
        found = [(at, text) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            piece, self._held = self._held[:at], ""
            return piece
        certain = len(self._held) - longest_stop_prefix(self._held, self._stop)
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece


def longest_stop_prefix(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that could grow into one of `stop`."""
    longest = max((len(word) for word in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[-length:]) for word in stop):
            return length
    return 0


@dataclass
class Row:
    """One answer in the making. `max_tokens` and `seed` are settled, whatever params left open."""

    request: int
    answer: int
    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    stream: TextStream
    end_tokens: Collection[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of each token, or none at all
    admitted: float | None = None  # when it left the queue, by the engine's clock

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> str:
        """Take the next token; returns the text that became certain."""
        assert self.finish_reason is None, "a finished answer got another token"
        self.token_ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token in self.params.stop_token_ids:
            piece = self._finish("stop", token)
        elif token in self.end_tokens and not self.params.ignore_eos:
            piece = self._finish("stop", None)
        else:
            piece = self.stream.push(token)
            if self.stream.stopped_by is not None:
                piece += self._finish("stop", self.stream.stopped_by)
            elif len(self.token_ids) == self.max_tokens:
                piece += self._finish("length", None)
        self.text += piece
        return piece

    def abort(self) -> None:
        """No more tokens will come. Nothing happens to an answer that has ended already."""
        if self.finish_reason is None:
            self.finish_reason = "abort"

    def output(self) -> CompletionOutput:
        assert self.finish_reason is not None, "this answer is not finished"
        return CompletionOutput(
            self.answer,
            self.text,
            self.token_ids,
            self.finish_reason,
            self.stop_reason,
            self.logprobs if self.params.logprobs is not None else None,
        )

    def _finish(self, reason: FinishReason, cause: str | int | None) -> str:
        piece = self.stream.finish()
        # The last bytes may have completed a stop string that was held back until now.
        if self.stream.stopped_by is not None:
            reason, cause = "stop", self.stream.stopped_by
        self.finish_reason, self.stop_reason = reason, cause
        return piece
