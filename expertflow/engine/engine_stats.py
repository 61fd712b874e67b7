"""What an engine did, as plain counters: returned, never printed here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from expertflow.engine.auto_schedule import Schedule
from expertflow.engine.unit import Execution


@dataclass
class EngineStats:
    """Since the start or the last reset."""

    execution: Execution
    schedule: Schedule = "fixed"
    steps: int = 0
    decode_rows: int = 0  # sequences that got a token in a decode step, over all steps
    prompt_tokens: int = 0  # of prompts that were read to their end
    generated_tokens: int = 0
    finished: int = 0  # requests, by how they ended
    cancelled: int = 0
    failed: int = 0
    regroupings: int = 0  # between steps, in which a scheduler moved a sequence that had a place
    step_seconds: float = 0.0
    # Of step_seconds: prediction (with look-ahead, and learning when alone), grouping, waiting for what is late.
    predict_seconds: float = 0.0
    look_ahead_seconds: float = 0.0  # part of predict_seconds, which no other unit can hide
    group_seconds: float = 0.0
    wait_seconds: float = 0.0
    # While another unit computed.
    hidden_predict_seconds: float = 0.0
    hidden_group_seconds: float = 0.0
    exchanges: int = 0  # between units that are joint, before a step
    preferred: int = 0  # answers that began before one that had arrived earlier, to share experts
    groupings: int = 0  # made; `regroupings` were followed
    scheduler: str = ""  # schedule=auto: whether it pays, and why it is on or off
    late: int = 0  # steps in order of arrival, since nothing was prepared in time
    waiting: int = 0  # answers in the queue now
    running: int = 0  # answers that hold KV cache now

    @property
    def rows_per_step(self) -> float:
        return self.decode_rows / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of answers, with the time for prompts included."""
        return self.generated_tokens / self.step_seconds if self.step_seconds else 0.0

    @property
    def scheduling_share(self) -> float:
        """Of the time of steps, what prediction and grouping take of it."""
        seconds = self.predict_seconds + self.group_seconds + self.wait_seconds
        return seconds / self.step_seconds if self.step_seconds else 0.0

    @property
    def paths_share(self) -> float:
        """The same without look-ahead: what predicting paths before a pass and grouping by them take of steps."""
        seconds = self.predict_seconds - self.look_ahead_seconds + self.group_seconds + self.wait_seconds
        return seconds / self.step_seconds if self.step_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        more = ("rows_per_step", "tokens_per_second", "scheduling_share", "paths_share")
        return asdict(self) | {name: getattr(self, name) for name in more}
