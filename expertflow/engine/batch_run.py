"""Offline batches: a file of requests through an engine, each result written as soon as it is there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from expertflow.engine.batch_file import BatchRequest, LineError, error_line, read_batch, result_line
from expertflow.engine.batch_results import BatchResults, key_of
from expertflow.engine.engine import Engine
from expertflow.engine.llm import LLM
from expertflow.engine.sampling import SamplingParams
from expertflow.engine.submitted import Submitted

# Requests that wait in the engine for each one that it holds: enough to choose from, and a file of any length takes
# no more memory than that.
_WAITING = 4


@dataclass
class BatchProgress:
    """Lines, those of earlier runs too; tokens and answers of this run alone."""

    total: int
    done: int
    failed: int
    answered_now: int = 0
    tokens_now: int = 0


class BatchRun:
    """Answers every line of a file that `results` lacks.

    defaults: where a line says nothing. default_tokens: the length where nobody says one, cut to what the context
    holds; None: that of `defaults`.
    """

    def __init__(
        self,
        llm: LLM,
        engine: Engine,
        path: str | Path,
        results: BatchResults,
        defaults: SamplingParams,
        default_tokens: int | None = None,
    ):
        self._llm, self._engine, self._results = llm, engine, results
        self._defaults, self._default_tokens = defaults, default_tokens
        self._left = (line for line in read_batch(path) if key_of(line.id, line.line) not in results.done)
        self._running: dict[Submitted, BatchRequest] = {}
        self.state = BatchProgress(sum(1 for _ in read_batch(path)), len(results.done), results.failed)

    def run(self, progress: Callable[[BatchProgress], None] = lambda state: None) -> BatchProgress:
        """To the end. A line that fails is written as failed, and the others go on.

        OSError, RuntimeError and Ctrl-C end the run: what was written stays, and another run continues.
        """
        progress(self.state)
        try:
            while self._fill() or self._running:
                self._engine.step()
                for request in [request for request in self._running if request.done]:
                    self._write(request, self._running.pop(request))
                progress(self.state)
        finally:
            for request in self._running:
                request.cancel()
        self._results.finish()
        return self.state

    def _fill(self) -> bool:
        """Submit lines until the engine has enough to choose from. False when there are none left."""
        while len(self._running) < self._llm.settings.held * (1 + _WAITING):
            line = next(self._left, None)
            if line is None:
                return False
            if isinstance(line, LineError):
                self._write_error(line)
                continue
            try:
                ids = self._ids(line)
                self._running[self._engine.submit(ids, self._params(line, len(ids)))] = line
            except ValueError as error:
                self._write_error(_failed(line, error))
        return True

    def _ids(self, line: BatchRequest) -> list[int]:
        if line.messages is not None:
            return self._llm.encode_chat(line.messages)
        if isinstance(line.prompt, str):
            return list(self._llm.tokenizer(line.prompt).input_ids)
        assert line.prompt is not None, "a request has a prompt or messages"
        return line.prompt

    def _params(self, line: BatchRequest, length: int) -> SamplingParams:
        wanted = dict(line.sampling)
        if "max_tokens" not in wanted and self._default_tokens is not None:
            wanted["max_tokens"] = max(1, min(self._default_tokens, self._llm.context - length))
        return replace(self._defaults, **wanted)

    def _write(self, request: Submitted, line: BatchRequest) -> None:
        try:
            output = request.output()
        except (OSError, RuntimeError, MemoryError):
            raise  # not this request's fault: the next ones would fail as well
        except Exception as error:
            self._write_error(_failed(line, error))
            return
        self._results.write(key_of(line.id, line.line), result_line(line, output, self._llm.name))
        self.state.done += 1
        self.state.answered_now += 1
        self.state.tokens_now += sum(len(answer.token_ids) for answer in output.outputs)

    def _write_error(self, error: LineError) -> None:
        self._results.write(key_of(error.id, error.line), error_line(error), failed=True)
        self.state.done += 1
        self.state.failed += 1


def _failed(line: BatchRequest, error: Exception) -> LineError:
    message = str(error) or type(error).__name__
    return LineError(line.line, message.replace("prompt 0 ", "prompt ", 1), line.id, line.url)


def sha256_of(path: str | Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
