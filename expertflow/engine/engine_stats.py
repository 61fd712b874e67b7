"""What an engine did, as plain counters: returned, never printed here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from expertflow.engine.unit import Execution


@dataclass
class EngineStats:
    """Since the start or the last reset."""

    execution: Execution
    steps: int = 0
    decode_rows: int = 0  # sequences that got a token in a decode step, over all steps
    prompt_tokens: int = 0  # of prompts that were read to their end
    generated_tokens: int = 0
    finished: int = 0  # requests, by how they ended
    cancelled: int = 0
    failed: int = 0
    regroupings: int = 0  # between steps, in which a scheduler moved a sequence that had a place
    step_seconds: float = 0.0
    waiting: int = 0  # answers in the queue now
    running: int = 0  # answers that hold KV cache now

    @property
    def rows_per_step(self) -> float:
        return self.decode_rows / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of answers, with the time for prompts included."""
        return self.generated_tokens / self.step_seconds if self.step_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        more = {"rows_per_step": self.rows_per_step, "tokens_per_second": self.tokens_per_second}
        return asdict(self) | more
