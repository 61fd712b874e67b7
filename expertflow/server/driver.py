"""Driver: one thread steps the engine; requests of an event loop are submitted to it, and what they get comes back.

The loop never waits for the engine: prompts are encoded in a thread of their own, and after each step all new tokens
reach the loop by one call. The engine never waits for a reader: what is not read yet is kept with the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from expertflow.engine.engine import Engine
from expertflow.engine.llm import LLM
from expertflow.engine.request import Row
from expertflow.engine.sampling import SamplingParams
from expertflow.engine.submitted import Submitted
from expertflow.server.errors import APIError, refused_value
from expertflow.server.generation import Generation, Token
from expertflow.server.metrics import RequestMetrics
from expertflow.server.step_log import StepLog

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 0.5  # how often a thread without work looks whether it is to stop
_LONGEST_RETRY = 60


class EngineDriver:
    """Start it in a running event loop, whose requests it answers; close it. llm and engine stay the caller's.

    most_waiting: answers in the queue, beyond those that are decoded.
    """

    def __init__(self, llm: LLM, engine: Engine, *, most_waiting: int = 64):
        self.llm = llm
        self.engine = engine
        self.metrics = RequestMetrics()
        self.steps = StepLog()
        self.most = llm.settings.held + most_waiting
        self.draining = False
        self.died_of: BaseException | None = None
        self._held_answers = 0  # decoded or waiting
        self._generations: set[Generation] = set()
        self._outbox: list[tuple[Generation, Token | Submitted]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="expertflow-prompts")
        self._stop = threading.Event()
        self._idle = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="expertflow-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def usable(self) -> bool:
        """Whether a request would be answered: the thread runs, and so does the cache's."""
        return self.alive and self.llm.experts.cache.usable

    @property
    def outstanding(self) -> int:
        """Answers that were accepted and have not ended."""
        return self._held_answers

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(
        self,
        encode: Callable[[], Sequence[list[int]]],
        params: SamplingParams,
        num_prompts: int,
        deadline_seconds: float,
    ) -> Generation:
        """Queue prompts, each to be answered `params.n` times.

        encode: makes token ids of them, in another thread. Raises APIError: 400 for what does not fit, 429 when the
        queue is full, 503 when the server is going down.
        """
        answers = num_prompts * params.n
        self._check_room(answers)
        assert self._loop is not None, "the driver was not started"
        generation = Generation(num_prompts, params.n)
        self._held_answers += answers
        self._generations.add(generation)
        try:
            # Shielded: it gives back the places of what it did not submit, also when nobody waits for it any more.
            await asyncio.shield(
                self._loop.run_in_executor(
                    self._encoder, self._submit, encode, params, generation, deadline_seconds
                )
            )
        except BaseException as error:
            generation.cancel()
            if isinstance(error, ValueError):
                raise refused_value(error) from error
            raise
        return generation

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Until nothing is outstanding; False when that takes longer."""
        deadline = time.monotonic() + timeout_seconds
        while self._held_answers:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                return not self._held_answers
        return True

    def cancel_all(self, reason: APIError) -> None:
        """End every request; their clients are told the reason."""
        for generation in list(self._generations):
            generation.cancel(reason)

    def close(self) -> None:
        """Stop after the step under way; what is outstanding is cancelled. Idempotent."""
        self._stop.set()
        self._encoder.shutdown(wait=True, cancel_futures=True)
        if self._loop is None:  # it never started
            self.engine.close()
        elif self._thread.is_alive():
            self._thread.join()

    def retry_after_seconds(self) -> int:
        """When a place may be free: what waits, at the pace of the last requests."""
        mean = self.metrics.mean_seconds or 1.0
        waiting = max(1, self._held_answers - self.llm.settings.held + 1)
        return max(1, min(_LONGEST_RETRY, math.ceil(mean * waiting / self.llm.settings.held)))

    def _check_room(self, answers: int) -> None:
        if self.draining:
            raise APIError(
                503,
                "the server is going down; send the request again when it is back",
                code="draining",
                headers={"Retry-After": "10"},
            )
        if not self.usable:
            raise APIError(
                503, "the engine has stopped; start the server again, its log says why", code="engine_stopped"
            )
        if answers > self.most:
            raise APIError(
                400,
                f"{answers} answers in one request, and the server holds {self.most} at most; send fewer prompts or "
                f"a smaller n at once",
                code="too_many_answers",
            )
        if self._held_answers + answers > self.most:
            seconds = self.retry_after_seconds()
            raise APIError(
                429,
                f"{self._held_answers} answers are under way or waiting, and the server holds {self.most} at most; "
                f"try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def _submit(
        self,
        encode: Callable[[], Sequence[list[int]]],
        params: SamplingParams,
        generation: Generation,
        deadline_seconds: float,
    ) -> None:
        """In the thread for prompts. What was submitted before an error is cancelled by the caller."""
        left = generation.num_prompts
        try:
            if generation.cancelled:
                return
            prompts = encode()
            self.llm.checked_requests(prompts, params)  # all of them, before the first is submitted
            for number, ids in enumerate(prompts):
                request = self.engine.submit(
                    ids,
                    params,
                    on_token=partial(self._got_token, generation, number * params.n),
                    on_done=partial(self._got_end, generation),
                    deadline_seconds=deadline_seconds,
                )
                left -= 1
                generation.submitted(request)
        finally:
            if left:
                self._on_loop(self._release, generation, left)

    def _got_token(self, generation: Generation, first_choice: int, row: Row, text: str) -> None:
        logprobs = row.logprobs[-1] if row.logprobs else None
        token = Token(first_choice + row.answer, text, logprobs, row.finish_reason, row.admitted)
        self._outbox.append((generation, token))

    def _got_end(self, generation: Generation, request: Submitted) -> None:
        self._outbox.append((generation, request))

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if self.engine.wait_for_work(_IDLE_SECONDS):
                    with self.steps.step(self.engine, self.llm.experts.cache):
                        self.engine.step()
                    self._flush()
        except BaseException as error:  # a bug of ours: requests must hear of it
            self.died_of = error
            logger.exception("the engine's thread ended")
        finally:
            self.engine.close()
            self._flush()

    def _flush(self) -> None:
        if self._outbox:
            news, self._outbox = self._outbox, []
            self._on_loop(self._deliver, news, time.monotonic())

    def _on_loop(self, call: Callable[..., None], *args: object) -> None:
        assert self._loop is not None, "the driver was not started"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(call, *args)

    def _deliver(self, news: Sequence[tuple[Generation, Token | Submitted]], now: float) -> None:
        """In the loop: what a step brought, to whom it belongs."""
        for generation, item in news:
            if isinstance(item, Token):
                self.metrics.got_token(generation, item, now)
                generation.deliver(item)
            else:
                generation.ended(item, self.died_of)
                self._release(generation, 1)
        for generation in dict.fromkeys(generation for generation, _ in news):
            generation.wake()

    def _release(self, generation: Generation, prompts: int) -> None:
        self._held_answers -= prompts * generation.n
        generation.open_prompts -= prompts
        if not generation.open_prompts:
            self._generations.discard(generation)
        if not self._held_answers:
            self._idle.set()
