"""SamplingParams: how one request wants its tokens chosen and where it ends, in vLLM's words.

Values and their checks only, no torch: the command line flags are generated from this class too. Every
field is honoured; a parameter of vLLM's that is not here is a TypeError rather than a silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from expertflow.config import setting

MOST_LOGPROBS = 20  # tokens at a position: OpenAI's limit and vLLM's default
_MOST_BIAS = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes. Immutable; wrong values raise ValueError with the limit.

    stop: a string or several; the text ends before the first that appears. stop_token_ids: the same for
    tokens, next to the model's own end-of-sequence tokens. presence_penalty, frequency_penalty: count the tokens of the
    answer so far, not those of the prompt. logit_bias: added to the logits of these token ids before any penalty; it
    is kept within -100 and 100. logprobs: log-probabilities of each chosen token and of this many likeliest ones, of
    the model's own distribution: before bias, penalties, temperature and filters (logprobs.py).
    """

    temperature: float = setting(
        1.0, "randomness of the text; 0 takes the likeliest token each time (greedy)"
    )
    top_p: float = setting(1.0, "draw from the likeliest tokens that make up this probability; 1 is all")
    top_k: int = setting(0, "draw from this many likeliest tokens; 0 (or -1) is all")
    min_p: float = setting(0.0, "draw from tokens at least this likely, relative to the likeliest")
    repetition_penalty: float = setting(1.0, "above 1: make tokens that occurred already less likely")
    presence_penalty: float = setting(
        0.0, "-2 to 2; above 0: make tokens that the answer has already less likely, however often"
    )
    frequency_penalty: float = setting(
        0.0, "-2 to 2; above 0: make tokens less likely each time that the answer has them"
    )
    max_tokens: int | None = setting(16, "end after this many tokens; None: as many as the context holds")
    stop: str | Iterable[str] = setting((), "end before this text")
    stop_token_ids: Iterable[int] = setting((), "end at this token id")
    ignore_eos: bool = setting(False, "go on past the model's own end-of-sequence token")
    seed: int | None = setting(None, "the same seed draws alike, alone or in any batch; default: random")
    n: int = setting(1, "answers to each prompt")
    logit_bias: Mapping[int, float] | None = setting(None, "by token id: what is added to its logit")
    logprobs: int | None = setting(
        None, "log-probability of each token, and of this many likeliest ones beside it"
    )

    def __post_init__(self) -> None:
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value and (isinstance(value, Mapping) or not isinstance(value, Iterable)):
                raise ValueError(f"{name}={value!r} must be a list")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos={self.ignore_eos!r} must be True or False")
        object.__setattr__(self, "stop", tuple(texts or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        self._check_number("temperature", 0, math.inf, "0 is greedy, 1 the model's own distribution")
        self._check_number("top_p", 0, 1, "1 keeps all tokens", above=True)
        self._check_number("min_p", 0, 1, "0 keeps all tokens")
        self._check_number("repetition_penalty", 0, math.inf, "1 changes nothing", above=True)
        self._check_number("presence_penalty", -2, 2, "0 changes nothing")
        self._check_number("frequency_penalty", -2, 2, "0 changes nothing")
        self._check_whole("top_k", 0, "0 keeps all tokens")
        if self.logprobs is not None:
            self._check_whole("logprobs", 0, "None gives none", most=MOST_LOGPROBS)
        object.__setattr__(self, "logit_bias", self._checked_bias())
        self._check_whole("n", 1, "it counts the answers to each prompt")
        if self.max_tokens is not None:
            self._check_whole("max_tokens", 1, "None fills the context")
        if self.seed is not None:
            self._check_whole("seed", 0, "None draws one")
            if self.seed >= 2**64:
                raise ValueError(f"seed={self.seed} must be below 2**64")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} answers at temperature=0 would be alike; use n=1 or a temperature above 0"
            )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={text!r} must be text of at least one character")
        for token in self.stop_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ValueError(f"stop_token_ids={token!r} must be token ids, whole numbers from 0 on")

    def _check_number(self, name: str, least: float, most: float, hint: str, above: bool = False) -> None:
        value = getattr(self, name)
        fits = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
        if not (fits and least <= value <= most) or (above and value == least):
            lower = f"above {least}" if above else f"at least {least}"
            upper = "" if most == math.inf else f" and at most {most}"
            raise ValueError(f"{name}={value!r} must be a number {lower}{upper}; {hint}")

    def _check_whole(self, name: str, least: int, hint: str, most: int | None = None) -> None:
        value = getattr(self, name)
        whole = not isinstance(value, bool) and isinstance(value, int)
        if not whole or value < least or (most is not None and value > most):
            upper = "" if most is None else f" and at most {most}"
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{upper}; {hint}")

    def _checked_bias(self) -> Mapping[int, float] | None:
        """By token id as a number: JSON has only text as keys."""
        if self.logit_bias is None:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(
                f"logit_bias={self.logit_bias!r} must have a bias for each token id, such as {{50256: -100}}"
            )
        bias: dict[int, float] = {}
        for key, value in self.logit_bias.items():
            digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10
            if isinstance(key, bool) or not (digits or (isinstance(key, int) and key >= 0)):
                raise ValueError(f"logit_bias of {key!r}: must be of token ids, whole numbers from 0 on")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ValueError(f"logit_bias of token {key} is {value!r}; it must be a number")
            bias[int(key)] = min(_MOST_BIAS, max(-_MOST_BIAS, float(value)))
        return bias or None
