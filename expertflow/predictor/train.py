"""Train a RoutingPathPredictor on traces, on the CPU, in minutes.

A killed run continues where its last checkpoint was: batches, rates and dropped tokens depend on the seed and
the step alone, so (without a time limit) the result is the one of an uninterrupted run.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expertflow.predictor.dataset import (
    RoutingPaths,
    TracedBatch,
    batches,
    collate,
    group,
    read_paths,
    within_horizons,
)
from expertflow.predictor.model import PredictedModel, RoutingPathPredictor
from expertflow.predictor.optimizer import MuonAndAdam
from expertflow.predictor.prior import start_from_counts
from expertflow.predictor.sizes import TrainSettings, sizes_of
from expertflow.predictor.storage import DESCRIPTION, save_predictor

CHECKPOINT = "training.pt"  # in the output folder while training is under way
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
_VALIDATIONS = 30  # over the whole schedule
_NEXT_USE_WEIGHT = 0.3  # of its loss beside the routes'
_NEXT_USE_POSITIONS = 512  # of a batch that train the next-use head: its targets are 5 x L x E each
_LEAST_GAIN = 0.0005  # of recall that counts as better for the early stop


class Validation(NamedTuple):
    """Recall per token at equal budget: as many experts predicted in each layer as the router chose."""

    step: int
    seconds: float
    recall: float
    loss: float
    train_loss: float


def train(
    predictor: RoutingPathPredictor,
    paths: RoutingPaths,
    settings: TrainSettings,
    folder: Path,
    say: Callable[[Validation], None] = lambda validation: None,
    advance: Callable[[int, int], None] = lambda step, steps: None,
) -> list[Validation]:
    """Train in place, leaving the best weights (by validation recall) in `predictor`, compacted.

    Continues from the checkpoint in `folder` when there is one. Returns the validation curve. Raises ValueError
    when the loss is no number, or when the checkpoint is of other settings or traces.
    """
    run = _Run(predictor, paths, settings, folder)
    run.resume()
    advance(run.step, run.steps)
    while run.step < run.steps and not run.out_of_time() and not run.stalled():
        run.train_step()
        if run.step % run.validate_every == 0 or run.step == run.steps or run.out_of_time():
            say(run.validate())
            run.save()
        elif time.monotonic() - run.saved_at > _SECONDS_BETWEEN_CHECKPOINTS:
            run.save()
        advance(run.step, run.steps)
    predictor.load_state_dict(run.best)
    forget_unseen(predictor, paths)
    predictor.fold()
    predictor.compact()
    return run.curve


def train_predictor(
    traces: Sequence[str | Path],
    output: str | Path,
    sizes: dict[str, Any],
    settings: TrainSettings,
    task: str | None = None,
    say: Callable[[str], None] | None = None,
    embedding_VD: Tensor | None = None,
) -> dict[str, Any]:
    """Train on recordings and leave a predictor in `output`; the body of `expertflow train-predictor`.

    sizes: fields of PredictorSizes that were given. embedding_VD: the traced model's input embedding, to lean on
    for tokens that the recordings hardly show. say: takes a line of text; None prints to stderr under a
    progress bar. Returns the metrics. Raises ValueError for traces, settings or folders that do not go together.
    """
    output, wanted = Path(output), sizes_of(**sizes)
    if (output / DESCRIPTION).exists():
        raise ValueError(f"{output} already has a trained predictor; give another folder, or delete that one")
    paths = read_paths(traces, task, settings.validation_share, settings.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            predictor = RoutingPathPredictor(wanted, PredictedModel.of(paths.meta))
            if embedding_VD is not None:
                predictor.anchor(embedding_VD)
            start_from_counts(predictor, paths)
        with _progress(say) as (tell, advance):
            tell(
                f"{wanted.arch} predictor for {paths.meta.model}: {predictor.num_bytes() / 1e6:.1f} MB while "
                f"training; {len(paths.train)} sequences to train on, {len(paths.validation)} to validate on"
            )
            curve = train(
                predictor, paths, settings, output, lambda validation: tell(_line(validation)), advance
            )
            recall, loss = evaluate(predictor, paths, settings.batch_tokens)
            metrics = {
                "recall": recall,
                "loss": loss,
                "seconds": curve[-1].seconds,
                "validation_prompts": len({s.prompt for s in paths.validation}),
                "curve": [v._asdict() for v in curve],
            }
            training = {**asdict(settings), "traces": [str(t) for t in traces], "task": task}
            training["model's embedding"] = embedding_VD is not None
            save_predictor(output, predictor, metrics, training)
            (output / CHECKPOINT).unlink(missing_ok=True)
            _draw_curve(curve, output / "training.png")
            tell(f"{output}: {predictor.num_bytes() / 1e6:.2f} MB, recall {recall:.3f} at equal budget")
    finally:
        torch.set_num_threads(threads)
    return metrics


def _line(v: Validation) -> str:
    return f"step {v.step}, {v.seconds:.0f} s: recall {v.recall:.4f}, loss {v.loss:.4f} (training {v.train_loss:.4f})"


@contextmanager
def _progress(
    say: Callable[[str], None] | None,
) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """(tell a line, show how far we are); a bar on stderr unless the lines go elsewhere."""
    if say is not None:
        yield say, lambda step, steps: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task("training")
        yield console.print, lambda step, steps: bar.update(row, completed=step, total=steps)


def _draw_curve(curve: list[Validation], path: Path) -> None:
    """Recall over time, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot(
        xlabel="minutes", ylabel="recall at equal budget", title="Held-out prompts, per token"
    )
    axes.plot([v.seconds / 60 for v in curve], [v.recall for v in curve], marker=".")
    figure.savefig(path, dpi=120)


class _Run:
    """State of one training run: what is in a checkpoint."""

    def __init__(
        self, predictor: RoutingPathPredictor, paths: RoutingPaths, settings: TrainSettings, folder: Path
    ):
        self.predictor, self.paths, self.settings, self.folder = predictor, paths, settings, folder
        self.optimizer = MuonAndAdam(predictor, settings.weight_decay)
        self.per_epoch = len(group(paths.train, settings.batch_tokens, 0))
        self.steps = self.per_epoch * settings.epochs
        self.validate_every = max(1, self.steps // _VALIDATIONS)
        self.step, self.seconds, self.losses = 0, 0.0, [0.0, 0.0]  # losses: sum and number since validation
        self.curve: list[Validation] = []
        self.best = {name: value.clone() for name, value in predictor.state_dict().items()}
        self.saved_at = time.monotonic()
        self._epoch: tuple[int, list[Any]] = (-1, [])
        seen = sum(len(s.target_ids_T) for s in paths.train)
        self.identity = {
            **{k: v for k, v in asdict(settings).items() if k not in ("threads", "minutes")},
            **asdict(predictor.sizes),
            "fingerprint": predictor.model.fingerprint,
            "model's embedding": predictor.embedding.project is not None,
            "tokens": seen,
            "sequences": len(paths.train),
            "optimizer": "muon and adam",
        }

    def progress(self) -> float:
        """0 to 1, by steps or by time, whichever is further."""
        by_time = self.seconds / (60 * self.settings.minutes) if self.settings.minutes else 0.0
        return min(1.0, max(self.step / self.steps, by_time))

    def out_of_time(self) -> bool:
        return bool(self.settings.minutes) and self.seconds >= 60 * (self.settings.minutes or 0)

    def stalled(self) -> bool:
        """No validation of the last `patience` beat what came before."""
        recent, before = self.curve[-self.settings.patience :], self.curve[: -self.settings.patience]
        if not before:
            return False
        return max(v.recall for v in recent) < max(v.recall for v in before) + _LEAST_GAIN

    def train_step(self) -> None:
        begun = time.monotonic()
        epoch, index = divmod(self.step, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (
                epoch,
                group(self.paths.train, self.settings.batch_tokens, _mix(self.settings, epoch)),
            )
        # Another order packs other batches: an epoch may have one more or less than the first.
        chosen = self._epoch[1][index % len(self._epoch[1])]
        batch = collate(chosen, self.paths.meta)
        draw = torch.Generator().manual_seed(_mix(self.settings, 1_000_000 + self.step))
        self.predictor.train()
        rate = self.settings.learning_rate * schedule(self.progress(), self.settings.warmup)
        loss = path_loss(
            self.predictor, hide_some(batch, self.predictor, self.settings.unknown_share, draw), draw
        )
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} at step {self.step} with learning rate {rate:.2g}; lower --learning-rate (now "
                f"{self.settings.learning_rate}), and delete {self.folder / CHECKPOINT} to begin anew"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), 1.0)
        self.optimizer.step(rate)
        self.losses = [self.losses[0] + value, self.losses[1] + 1]
        self.step += 1
        self.seconds += time.monotonic() - begun

    def validate(self) -> Validation:
        begun = time.monotonic()
        recall, loss = evaluate(self.predictor, self.paths, self.settings.batch_tokens)
        self.seconds += time.monotonic() - begun
        train_loss = self.losses[0] / max(1.0, self.losses[1])
        self.losses = [0.0, 0.0]
        # Of equals the latest: its next-use head has learnt for longer.
        if not self.curve or recall >= max(v.recall for v in self.curve):
            self.best = {name: value.clone() for name, value in self.predictor.state_dict().items()}
        self.curve.append(Validation(self.step, round(self.seconds, 1), recall, loss, train_loss))
        return self.curve[-1]

    def save(self) -> None:
        """All or nothing: a kill leaves the checkpoint before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "curve": [tuple(v) for v in self.curve],
            "predictor": self.predictor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }
        temporary = self.folder / f"{CHECKPOINT}.{os.getpid()}.new"
        torch.save(state, temporary)
        temporary.replace(self.folder / CHECKPOINT)
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise ValueError(f"{path} is damaged ({error}); delete it to begin anew") from error
        if state["identity"] != self.identity:
            other = {k for k, v in self.identity.items() if state["identity"].get(k) != v}
            raise ValueError(
                f"{path} is of a run that differs in {', '.join(sorted(other))}; continue with the same traces and "
                f"settings, or give another folder"
            )
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.curve, self.best = [Validation(*v) for v in state["curve"]], state["best"]
        self.predictor.load_state_dict(state["predictor"])
        self.optimizer.load_state_dict(state["optimizer"])


def schedule(progress: float, warmup: float) -> float:
    """Share of the highest learning rate: a linear rise, then a cosine to zero."""
    if progress < warmup:
        return (progress + 0.1 * warmup) / (1.1 * warmup)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def path_loss(predictor: RoutingPathPredictor, batch: TracedBatch, draw: torch.Generator) -> Tensor:
    """Equation 1 of the paper (a binary cross-entropy per expert), and that of the next-use head."""
    logits = predictor(
        batch.target_BT, batch.target_mask_BT, batch.source_BS, batch.source_mask_BS, batch.num_prefill_B
    )
    loss = _cross_entropy(logits.target_BTLE, batch.target_needed_BTLE, batch.target_mask_BT)
    if logits.source_BSLE is not None and batch.source_mask_BS is not None:
        loss = loss + _cross_entropy(logits.source_BSLE, batch.source_needed_BSLE, batch.source_mask_BS)
    if predictor.next_use_head is not None:
        used_BTCLE, known_BTCLE = within_horizons(batch.target_needed_BTLE, batch.target_mask_BT)
        place_N = torch.nonzero(batch.target_mask_BT.flatten()).squeeze(1)
        place_N = place_N[torch.randperm(len(place_N), generator=draw)[:_NEXT_USE_POSITIONS]]
        used_NCLE, known_NCLE = used_BTCLE.flatten(0, 1)[place_N], known_BTCLE.flatten(0, 1)[place_N]
        guess_NCLE = predictor.next_use_logits(logits.target_states_BTD.flatten(0, 1)[place_N])
        each = F.binary_cross_entropy_with_logits(guess_NCLE, used_NCLE.float(), reduction="none")
        loss = loss + _NEXT_USE_WEIGHT * (each * known_NCLE).sum() / known_NCLE.sum().clamp(min=1)
    return loss


def _cross_entropy(logits: Tensor, needed: Tensor | None, mask: Tensor) -> Tensor:
    assert needed is not None
    return F.binary_cross_entropy_with_logits(logits[mask], needed[mask].float())


def hide_some(
    batch: TracedBatch, predictor: RoutingPathPredictor, share: float, draw: torch.Generator
) -> TracedBatch:
    """Give a share of the tokens the last row of the tables, "never seen"."""

    def hide(ids: Tensor) -> Tensor:
        return torch.where(torch.rand(ids.shape, generator=draw) < share, predictor.embedding.hide(ids), ids)

    source_BS = None if batch.source_BS is None else hide(batch.source_BS)
    return batch._replace(target_BT=hide(batch.target_BT), source_BS=source_BS)


def forget_unseen(predictor: RoutingPathPredictor, paths: RoutingPaths) -> None:
    """Give tokens that training never showed the row of "never seen" instead of their initial noise."""
    seen = torch.zeros(predictor.model.vocab_size + 1, dtype=torch.bool)
    for sequence in paths.train:
        for ids in (sequence.source_ids_S, sequence.target_ids_T):
            seen[torch.from_numpy(ids).long()] = True
    with torch.no_grad():
        for table in predictor.tables():
            table.weight[~seen] = table.weight[-1].clone()


@torch.inference_mode()
def evaluate(predictor: RoutingPathPredictor, paths: RoutingPaths, batch_tokens: int) -> tuple[float, float]:
    """(recall per token at equal budget, loss) on the validation prompts."""
    predictor.eval()
    draw = torch.Generator().manual_seed(0)
    found = needed = loss = tokens = 0.0
    for batch in batches(paths.validation, paths.meta, batch_tokens):
        logits = predictor(
            batch.target_BT, batch.target_mask_BT, batch.source_BS, batch.source_mask_BS, batch.num_prefill_B
        )
        sides: list[Any] = [(logits.target_BTLE, batch.target_needed_BTLE, batch.target_mask_BT)]
        if logits.source_BSLE is not None:
            sides.append((logits.source_BSLE, batch.source_needed_BSLE, batch.source_mask_BS))
        for logits_BTLE, needed_BTLE, mask_BT in sides:
            hits, active = hits_at_equal_budget(logits_BTLE[mask_BT], needed_BTLE[mask_BT])
            found, needed = found + hits, needed + active
        loss += path_loss(predictor, batch, draw).item() * batch.num_tokens
        tokens += batch.num_tokens
    return found / max(1.0, needed), loss / max(1.0, tokens)


def hits_at_equal_budget(score_NLE: Tensor, needed_NLE: Tensor) -> tuple[int, int]:
    """(how many needed experts are among the best scored, how many were needed).

    In each row as many experts count as best as the row needs.
    """
    budget_NL = needed_NLE.sum(-1)
    most = int(budget_NL.max()) if budget_NL.numel() else 0
    if not most:
        return 0, 0
    best_NLK = score_NLE.topk(most, dim=-1).indices
    right_NLK = needed_NLE.gather(-1, best_NLK) & (torch.arange(most) < budget_NL[..., None])
    return int(right_NLK.sum()), int(budget_NL.sum())


def _mix(settings: TrainSettings, number: int) -> int:
    return settings.seed * 1_000_003 + number
