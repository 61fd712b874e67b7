"""Every option of a trained predictor and of its training, once. No torch: the command line reads this."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from expertflow.config import setting


@dataclass(frozen=True)
class PredictorSizes:
    """The shape of a predictor; the defaults are those of `causal`. Wrong values raise ValueError."""

    arch: str = setting("causal", "causal (ours) or paper (section 3.2 of the paper)")
    hidden: int = setting(64, "width of the states (paper: 32)")
    feed_forward: int = setting(256, "width of the feed-forward layers (paper: 2048)")
    layers: int = setting(2, "layers of the decoder")
    encoder_layers: int = setting(2, "layers of the encoder, where there is one")
    heads: int = setting(4, "attention heads")
    window: int = setting(128, "tokens that a position sees, itself included (paper: 512)")
    token_rank: int = setting(64, "rank of the residual by token identity; 0 is none (paper: 0)")
    next_use: bool = setting(True, "learn when each expert is used next, for eviction (paper: no)")

    def __post_init__(self) -> None:
        if self.arch not in ("paper", "causal"):
            raise ValueError(f"arch={self.arch!r} is unknown; use 'causal' or 'paper'")
        for name in ("hidden", "feed_forward", "layers", "encoder_layers", "heads", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.token_rank < 0:
            raise ValueError(f"token_rank={self.token_rank} must be 0 (no residual) or more")
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} must be a multiple of heads={self.heads}")


ARCHS: dict[str, PredictorSizes] = {
    "causal": PredictorSizes(),
    "paper": PredictorSizes(
        arch="paper", hidden=32, feed_forward=2048, window=512, token_rank=0, next_use=False
    ),
}


def sizes_of(arch: str = "causal", **given: Any) -> PredictorSizes:
    """The sizes of an arch, with some replaced. Raises ValueError for an unknown arch or size."""
    if arch not in ARCHS:
        raise ValueError(f"arch={arch!r} is unknown; use one of {', '.join(ARCHS)}")
    return replace(ARCHS[arch], **given)


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast. Wrong values raise ValueError."""

    minutes: float | None = setting(15.0, "time limit; the learning rate reaches zero by then. 0 is none")
    epochs: int = setting(20, "passes over the traces, when time allows")
    learning_rate: float = setting(3e-3, "at its highest, after the warm-up")
    warmup: float = setting(0.03, "share of the schedule in which the learning rate rises")
    weight_decay: float = setting(0.01, "of matrices; tables and norms have none")
    batch_tokens: int = setting(2048, "tokens per step, padding included")
    unknown_share: float = setting(
        0.02, "share of tokens replaced by `never seen`, so that it means something"
    )
    validation_share: float = setting(0.05, "share of the train split's prompts held back for validation")
    patience: int = setting(8, "validations without a better recall before training stops")
    threads: int | None = setting(None, "threads of the arithmetic; default: torch's own choice")
    seed: int = setting(0, "of the initial weights, the order of batches and the validation prompts")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_tokens", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0; 0.003 is the default")
        for name in ("warmup", "unknown_share", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.minutes is not None and self.minutes < 0:
            raise ValueError(f"minutes={self.minutes} must be above 0, or 0 for no limit")
