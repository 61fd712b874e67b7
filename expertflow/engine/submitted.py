"""Submitted requests: what a caller holds of a request while an engine works on it, from any thread.

The engine writes, others read, wait and cancel. Nothing is computed here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from expertflow.engine.request import RequestOutput, Row

# (answer number, new text), in the thread that steps the engine: to be brief, or it holds up everybody.
OnText = Callable[[int, str], None]
# (answer with its newest token, the text that became certain with it), for every token, in that thread too.
OnToken = Callable[[Row, str], None]
# Nothing more will come, for whatever reason; in the thread that steps or closes the engine.
OnDone = Callable[["Submitted"], None]


class Submitted:
    """One prompt and its answers in the making. All methods may be called from any thread."""

    def __init__(
        self,
        prompt: str | None,
        prompt_ids: list[int],
        rows: list[Row],
        on_text: OnText | None = None,
        expires: float | None = None,
        wake: Callable[[], None] = lambda: None,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ):
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.rows = rows
        self.expires = expires  # by the engine's clock: it is cancelled then
        self.error: BaseException | None = None
        self._on_text, self._on_token, self._on_done = on_text, on_token, on_done
        self._wake = wake
        self._cancelled = False
        self._finished = threading.Event()
        self._pieces: SimpleQueue[str | None] = SimpleQueue()

    @property
    def done(self) -> bool:
        """Nothing more will come."""
        return self._finished.is_set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """End it before the engine's next step; what has come so far stays, with finish_reason "abort"."""
        self._cancelled = True
        self._wake()

    def output(self) -> RequestOutput:
        """All answers. Raises what went wrong with this request, if anything did. RuntimeError before it is `done`."""
        if not self.done:
            raise RuntimeError("the request is not done; step the engine until it is, or wait() for it")
        if self.error is not None:
            raise self.error
        return RequestOutput(self.prompt, self.prompt_ids, [row.output() for row in self.rows])

    def wait(self, timeout_seconds: float | None = None) -> RequestOutput:
        """`output`, as soon as it is done; another thread must step the engine. TimeoutError when that takes longer."""
        if not self._finished.wait(timeout_seconds):
            raise TimeoutError(
                f"the request was not done within {timeout_seconds} s; wait longer, or cancel it"
            )
        return self.output()

    def pieces(self) -> Iterator[str]:
        """The text of a single answer as it becomes certain; another thread must step the engine. To be read once.

        Raises what went wrong with this request.
        """
        if len(self.rows) > 1:
            raise ValueError(f"pieces are of one answer, not of {len(self.rows)}; give on_text= instead")
        while (piece := self._pieces.get()) is not None:
            yield piece
        if self.error is not None:
            raise self.error

    def tell(self, row: Row, piece: str) -> None:
        """For the engine: a new token of one answer, and the text that became certain with it."""
        if self._on_token is not None:
            self._on_token(row, piece)
        if piece:
            self._pieces.put(piece)
            if self._on_text is not None:
                self._on_text(row.answer, piece)

    def finish(self, error: BaseException | None = None) -> None:
        """For the engine: all answers are there, or none will be."""
        if not self.done:
            self.error = error
            self._finished.set()
            self._pieces.put(None)
            on_done = self._on_done
            # Whoever is told often holds this request: let both go as soon as nobody else wants them.
            self._on_text = self._on_token = self._on_done = None
            if on_done is not None:
                on_done(self)
