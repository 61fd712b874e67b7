"""Generation: the answers of one HTTP request in the making, as the event loop sees them.

The driver delivers tokens, the endpoint takes them as fast as its client reads. Everything but `submitted`, which the
thread for prompts calls, belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import NamedTuple

from expertflow.engine.logprobs import TokenLogprobs
from expertflow.engine.request import FinishReason
from expertflow.engine.submitted import Submitted
from expertflow.server.errors import APIError, unexpected


class Token(NamedTuple):
    """choice: of the answers to all prompts of the request, in order. text: what became certain, often nothing."""

    choice: int
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None  # with the last token of the answer
    admitted: float | None  # when the answer left the queue, by time.monotonic


class Generation:
    """`num_prompts` prompts, each answered `n` times."""

    def __init__(self, num_prompts: int, n: int):
        self.num_prompts, self.n = num_prompts, n
        self.open_prompts = num_prompts  # of which the driver still holds places
        self.started = time.monotonic()
        self.last_token: dict[int, float] = {}  # by choice, for the times between tokens
        self.requests: list[Submitted] = []
        self._pending: deque[Token] = deque()
        self._left = num_prompts
        self._error: APIError | None = None
        self._cancelled = False
        self._news = asyncio.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt_ids) for request in self.requests)

    @property
    def completion_tokens(self) -> int:
        return sum(len(row.token_ids) for request in self.requests for row in request.rows)

    async def take(self) -> list[Token]:
        """All tokens that came since the last call, at least one; none when the last has been taken.

        Raises APIError when the request cannot be ended: deadline, failure, cancelled by the server.
        """
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self._left:
                return []
            self._news.clear()
            await self._news.wait()
        tokens = list(self._pending)
        self._pending.clear()
        return tokens

    def cancel(self, reason: APIError | None = None) -> None:
        """End it before the engine's next step. reason: what its client is told, if there is one to tell."""
        self._cancelled = True
        if self._left:
            self._fail(reason or APIError(499, "the request was cancelled", code="cancelled"))
        for request in list(self.requests):
            request.cancel()

    def submitted(self, request: Submitted) -> None:
        self.requests.append(request)
        if self._cancelled:
            request.cancel()

    def deliver(self, token: Token) -> None:
        self._pending.append(token)

    def ended(self, request: Submitted, engine_died_of: BaseException | None) -> None:
        """All answers to one prompt are there, or none will be."""
        self._left -= 1
        if request.error is not None:
            self._fail(unexpected(request.error, "answering a request"))
        elif any(row.finish_reason == "abort" for row in request.rows):
            if engine_died_of is not None:
                self._fail(
                    APIError(500, "the engine has stopped; the server's log says why", code="engine_stopped")
                )
            elif not self._cancelled:
                self._fail(_too_late(self.completion_tokens))

    def wake(self) -> None:
        self._news.set()

    def _fail(self, error: APIError) -> None:
        """The first error counts. The other prompts of the request are of no use then."""
        if self._error is None:
            self._error = error
            for request in list(self.requests):
                request.cancel()
        self._news.set()


def _too_late(tokens: int) -> APIError:
    return APIError(
        504,
        f"the request was not done at its deadline, after {tokens} tokens; ask for fewer (max_tokens), try again when "
        f"the server has less to do, or start it with a larger --deadline-seconds",
        code="deadline_exceeded",
    )
