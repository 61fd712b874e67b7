"""SamplingParams: how one request wants its tokens chosen and where it ends, in vLLM's words.

Values and their checks only, no torch: the command line flags are generated from this class too. Every
field is honoured; a parameter of vLLM's that is not here is a TypeError rather than a silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from expertflow.config import setting


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes. Immutable; wrong values raise ValueError with the limit.

    stop: a string or several; the text ends before the first that appears. stop_token_ids: the same for
    tokens, next to the model's own end-of-sequence tokens.
    """

    temperature: float = setting(
        1.0, "randomness of the text; 0 takes the likeliest token each time (greedy)"
    )
    top_p: float = setting(1.0, "draw from the likeliest tokens that make up this probability; 1 is all")
    top_k: int = setting(0, "draw from this many likeliest tokens; 0 (or -1) is all")
    min_p: float = setting(0.0, "draw from tokens at least this likely, relative to the likeliest")
    repetition_penalty: float = setting(1.0, "above 1: make tokens that occurred already less likely")
    max_tokens: int | None = setting(16, "end after this many tokens; None: as many as the context holds")
    stop: str | Iterable[str] = setting((), "end before this text")
    stop_token_ids: Iterable[int] = setting((), "end at this token id")
    ignore_eos: bool = setting(False, "go on past the model's own end-of-sequence token")
    seed: int | None = setting(
        None, "the same seed gives the same text, alone or in any batch; default: random"
    )
    n: int = setting(1, "answers to each prompt")

    def __post_init__(self) -> None:
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(texts or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        self._check_number("temperature", 0, math.inf, "0 is greedy, 1 the model's own distribution")
        self._check_number("top_p", 0, 1, "1 keeps all tokens", above=True)
        self._check_number("min_p", 0, 1, "0 keeps all tokens")
        self._check_number("repetition_penalty", 0, math.inf, "1 changes nothing", above=True)
        self._check_whole("top_k", 0, "0 keeps all tokens")
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

    def _check_whole(self, name: str, least: int, hint: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}; {hint}")
