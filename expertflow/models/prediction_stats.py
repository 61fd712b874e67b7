"""How well the running model was predicted, and what that cost, as plain counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class PredictionStats:
    """Since the start or the last reset. Experts are counted once for a layer of a pass, however many rows."""

    name: str  # the setting
    passes: int = 0  # that had a forecast
    foreseen: int = 0  # passes among them whose rows had been asked about before
    predict_seconds: float = 0.0  # asking, looking ahead and learning, while no pass could run
    look_ahead_seconds: float = 0.0  # part of it: asking the next layer's router while a pass runs
    draft_seconds: float = 0.0  # part of predict_seconds too: passes without experts, before those with them
    hidden_seconds: float = 0.0  # asking and learning in a thread of its own
    needed: int = 0
    predicted: int = 0  # by what was known when the layer began
    right: int = 0  # predicted and needed
    failed: str | None = None  # why the predictor is not asked any more
    draft_failed: str | None = None  # why no draft is made any more, while the others are asked
    gate: str = ""  # whether prefetching pays, and why it is on or off

    @property
    def recall(self) -> float:
        return self.right / self.needed if self.needed else 0.0

    @property
    def precision(self) -> float:
        return self.right / self.predicted if self.predicted else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recall": self.recall, "precision": self.precision}
