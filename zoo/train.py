"""Train a small mixture of experts from scratch: `python -m zoo.train --arch tiny -o DIR`.

Not a framework: one process, one device, one loop. Notable: models train through their published classes
with one fast experts function; weights have float32 masters; the order of the data and the learning
rate are functions of the token count, so a run can be stopped and resumed with another --tokens and its rate
still reaches zero exactly there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertflow.config import setting
from zoo.architectures import ARCHITECTURES, Architecture, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.checkpoint import Progress
    from zoo.corpus import Pairs, Rows
    from zoo.optimizer import MasterOptimizer
    from zoo.tokens import Tokens


SAMPLE = Path(__file__).parent / "sample"


@dataclass(frozen=True)
class Recipe:
    """One training run. Wrong values raise ValueError with the remedy."""

    arch: str = setting("tiny", f"what to train: {', '.join(ARCHITECTURES)}; `--list` describes them")
    corpus: Path = setting(SAMPLE, "directory with the text, see zoo/README.md")  # noqa: RUF009 - immutable
    tokens: float = setting(2e6, "tokens to train on; the learning rate reaches 0 there. 2e7 is 20 million")
    batch: int = setting(16, "sequences per step")
    context: int = setting(256, "tokens per sequence")
    vocab: int = setting(8192, "size of the byte-level BPE vocabulary that is learnt first")
    seed: int = setting(1234, "fixes initial weights, order of the text and samples")
    muon_lr: float = setting(0.02, "learning rate of hidden matrices (Muon), as a spectral norm per step")
    adam_lr: float = setting(3e-3, "learning rate of embeddings, routers, norms and biases (Adam)")
    warmup_tokens: float = setting(
        4e5, "tokens over which the learning rate rises from 0; at most a tenth of --tokens"
    )
    decay_share: float = setting(0.3, "last part of --tokens over which the learning rate falls to 0")
    balance: float = setting(0.02, "weight of the load-balancing loss; 0 lets experts starve")
    expert_every: int = setting(2, "steps whose gradients are collected into one update of the experts")
    hidden: int | None = setting(None, "width D of the model; default: the architecture's, see --list")
    expert_inner: int | None = setting(None, "inner width I of one expert")
    layers: int | None = setting(None, "layers (of each stack, in an encoder-decoder)")
    experts: int | None = setting(None, "experts E per MoE layer")
    top_k: int | None = setting(None, "experts K per token")
    compile: bool = setting(
        False, "fuse with torch.compile: a third faster after a minute; needs a C++ compiler"
    )
    dtype: str = setting(
        "auto",
        "of weights and products: bfloat16, or float32, which a processor without bfloat16 instructions multiplies "
        "many times as fast; auto asks it",
    )
    threads: int = setting(1, "threads; two runs of one thread beat one run of two")
    log_steps: int = setting(50, "steps between log lines")
    eval_steps: int = setting(500, "steps between measurements on held-out text")
    eval_rows: int = setting(16, "sequences per source of held-out text in such a measurement")
    save_seconds: float = setting(240.0, "seconds between checkpoints")

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"--arch {self.arch} is unknown; use one of {', '.join(ARCHITECTURES)}")
        for name in (
            "tokens",
            "batch",
            "context",
            "threads",
            "log_steps",
            "eval_steps",
            "eval_rows",
            "expert_every",
        ):
            if not getattr(self, name) >= 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.vocab < 260:
            raise ValueError(f"--vocab {self.vocab} is too small: 256 bytes and 4 marks need 260")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"--dtype {self.dtype} is unknown; use auto, bfloat16 or float32")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"--decay-share {self.decay_share} must lie between 0 and 1")

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.arch]

    def command(self) -> str:
        """The command that repeats this run; a corpus elsewhere is CORPUS, whatever its path here."""
        parts = ["python -m zoo.train"]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value == entry.default:
                continue
            flag = f"--{entry.name.replace('_', '-')}"
            if entry.name == "corpus":
                parts.append(f"{flag} CORPUS")
            elif value is True:
                parts.append(flag)
            else:
                parts.append(f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}")
        return " ".join([*parts, "-o DIR"])

    def shape(self, vocab: int) -> Shape:
        """The architecture's sizes with this recipe's changes."""
        names = ("hidden", "expert_inner", "layers", "experts", "top_k")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        base = self.architecture.shape
        if "expert_inner" in changes and base.shared_inner:
            changes["shared_inner"] = base.shared_inner // base.expert_inner * changes["expert_inner"]
        shape = replace(base, vocab=vocab, context=max(base.context, self.context), **changes)
        if shape.hidden % (2 * shape.heads):
            raise ValueError(f"--hidden {shape.hidden} must be a multiple of {2 * shape.heads}")
        if not 1 <= shape.top_k <= shape.experts:
            raise ValueError(f"--top-k {shape.top_k} must lie in 1..{shape.experts}, the number of experts")
        return shape


def dtype_here(wanted: str) -> str:
    """`wanted`, or for "auto" the type in which this processor multiplies fast."""
    from expertflow.models.products import halves_are_slow

    if wanted != "auto":
        return wanted
    return "float32" if halves_are_slow() else "bfloat16"


def rate_scale(tokens: int, recipe: Recipe) -> float:
    """Factor on every learning rate after `tokens`: warm-up, plateau, linear decay to 0 at recipe.tokens."""
    warmup = max(1.0, min(recipe.warmup_tokens, recipe.tokens / 10))
    decay = max(1.0, recipe.tokens * recipe.decay_share)
    return max(0.0, min(1.0, (tokens + 1) / warmup, (recipe.tokens - tokens) / decay))


class Run:
    """A model in training: weights, optimizer and position. `advance` is one step."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        import torch

        from zoo.architectures import build_model
        from zoo.checkpoint import Progress, load_state
        from zoo.optimizer import MasterOptimizer, OptimizerConfig
        from zoo.tokens import prepare_tokens

        self.recipe, self.out = recipe, out
        self.tokens: Tokens = prepare_tokens(recipe.corpus, out, recipe.vocab, recipe.seed)
        torch.manual_seed(recipe.seed)
        shape = recipe.shape(len(self.tokens.tokenizer))
        self.top_k = shape.top_k
        self.model: Any = build_model(recipe.architecture, shape, dtype_here(recipe.dtype))
        self.model.config.router_aux_loss_coef = recipe.balance
        self.optimizer: MasterOptimizer = MasterOptimizer(
            self.model,
            OptimizerConfig(muon_lr=recipe.muon_lr, adam_lr=recipe.adam_lr, expert_every=recipe.expert_every),
            recipe.architecture.rate_factors(shape),
        )
        self.examples: Rows | Pairs = self._examples()
        fresh = Progress(recipe.arch, recipe.seed, recipe.batch, recipe.context)
        self.progress: Progress = fresh
        self.history: list[dict[str, Any]] = []
        restored = load_state(out, self.optimizer)
        if restored is not None:
            self.progress, self.history = restored
            if replace(fresh, batch=self.progress.batch) != replace(
                self.progress, rows=0, tokens=0, steps=0, seconds=0.0
            ):
                raise ValueError(
                    f"{out} holds a run of --arch {self.progress.arch} --seed {self.progress.seed} "
                    f"--context {self.progress.context}; give the same, or another -o"
                )
            self.progress = replace(self.progress, batch=recipe.batch)

    def _examples(self) -> Rows | Pairs:
        from zoo.corpus import MIXTURE, Pairs, Rows

        kind = Pairs if self.recipe.architecture.seq2seq else Rows
        return kind(self.tokens.streams, MIXTURE, self.recipe.context, self.recipe.seed)

    def compile(self) -> None:
        """Fuse what is elementwise, layer by layer: layers share one compilation. Decoder-only models."""
        from zoo.experts import compile_elementwise
        from zoo.loss import compile_loss

        if self.recipe.architecture.seq2seq:
            raise ValueError("--compile works for decoder-only models; batches of pairs have no fixed shape")
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)
        compile_elementwise()
        compile_loss()

    def advance(self, routers: Any) -> dict[str, Any]:
        """One step: forward, backward, update. Returns what was measured; FloatingPointError on a NaN loss."""
        from zoo.routing import balance_loss

        recipe, B = self.recipe, self.recipe.batch
        scale = rate_scale(self.progress.tokens, recipe)
        loss, num_tokens = self._loss(self.examples.batch(self.progress.rows, B))
        balance, load_LE = balance_loss(routers.take(), self.top_k)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} after {self.progress.tokens:,} tokens; the last checkpoint is sound: "
                "resume with a lower --muon-lr and --adam-lr"
            )
        (loss + recipe.balance * balance).backward()
        norm = self.optimizer.step(scale)
        # What all tokens of a layer have in common tells none apart, but at first is most of what a router sees:
        # whichever expert it favours gets them all, and the balance loss makes the favourites alternate.
        self.optimizer.drop_directions(routers.mean_inputs(), scale)
        self.progress = replace(
            self.progress,
            rows=self.progress.rows + B,
            tokens=self.progress.tokens + num_tokens,
            steps=self.optimizer.steps,
        )
        relative_LE = load_LE * load_LE.shape[1]
        return {
            "loss": loss.item(),
            "balance": balance.item(),
            "norm": norm,
            "rate": scale,
            "load_max": relative_LE.max().item(),
            "load_min": relative_LE.min().item(),
        }

    def _loss(self, batch: Any) -> tuple[Tensor, int]:
        from zoo.evaluate import causal_loss, seq2seq_loss

        if self.recipe.architecture.seq2seq:
            return seq2seq_loss(self.model, batch), int(
                batch.input_mask_BT.sum() + (batch.labels_BT >= 0).sum()
            )
        return causal_loss(self.model, batch[:, :-1], batch[:, 1:]), batch[:, 1:].numel()

    def evaluate(self, max_rows: int | None) -> dict[str, Any]:
        from zoo.evaluate import bits_per_byte, bits_per_token

        measure = bits_per_token if self.recipe.architecture.seq2seq else bits_per_byte
        return measure(self.model, self.tokens.held_out, self.recipe.batch, self.recipe.context, max_rows)

    def save(self) -> None:
        """Checkpoint the state, and the model as it is now in its published format."""
        from zoo.checkpoint import export, save_state, training_dir, write_text

        recipe = {name: value for name, value in vars(self.recipe).items() if name != "corpus"}
        write_text(
            json.dumps({"command": self.recipe.command(), **recipe}, indent=1) + "\n",
            training_dir(self.out) / "recipe.json",
        )
        save_state(self.out, self.optimizer, self.progress, self.history)
        export(self.model, self.tokens.tokenizer, self.out)


def train(
    run: Run, say: Callable[[str], None], show: Callable[[int, str], None], stopped: Callable[[], bool]
) -> bool:
    """Train until recipe.tokens or until stopped(); checkpoints as it goes. True when all tokens are done.

    say: called with each log line; show: with the tokens done and a short status, every step.
    """
    from zoo.routing import watch_routers

    recipe, begun = run.recipe, run.progress
    start = saved = time.monotonic()
    seen: list[dict[str, Any]] = []
    with watch_routers(run.model, run.top_k) as routers:
        while run.progress.tokens < recipe.tokens and not stopped():
            seen.append(run.advance(routers))
            seconds = time.monotonic() - start
            run.progress = replace(run.progress, seconds=begun.seconds + seconds)
            speed = (run.progress.tokens - begun.tokens) / seconds
            show(run.progress.tokens, f"loss {seen[-1]['loss']:.3f}, {speed:,.0f} tokens/s")
            if run.progress.steps % recipe.log_steps == 0 or run.progress.tokens >= recipe.tokens:
                entry = _entry(run, seen)
                if run.progress.steps % recipe.eval_steps == 0 or run.progress.tokens >= recipe.tokens:
                    entry["held_out"] = run.evaluate(recipe.eval_rows)
                    routers.forget()
                run.history.append(entry)
                say(_line(entry, speed))
                seen = []
            if time.monotonic() - saved > recipe.save_seconds:
                run.save()
                saved = time.monotonic()
    run.save()
    return run.progress.tokens >= recipe.tokens


def _entry(run: Run, seen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of history.jsonl: the mean loss since the last line, and the last step's other figures."""
    mean = sum(step["loss"] for step in seen) / len(seen)
    last = {name: round(value, 4) for name, value in seen[-1].items()}
    return {
        "tokens": run.progress.tokens,
        "seconds": round(run.progress.seconds, 1),
        **last,
        "loss": round(mean, 4),
    }


def _line(entry: dict[str, Any], speed: float) -> str:
    line = (
        f"{entry['tokens']:>12,} tokens  loss {entry['loss']:.4f}  rate {entry['rate']:.2f}  load "
        f"{entry['load_min']:.2f} to {entry['load_max']:.2f}  {speed:,.0f} tokens/s"
    )
    for name in ("bits_per_byte", "bits_per_token"):
        if name in entry.get("held_out", {}):
            line += f"  held-out {entry['held_out'][name]:.3f} {name.replace('_', ' ')}"
    return line


def tune_process(threads: int) -> None:
    """Allocator and oneDNN settings that save a third of the time: keep freed pages and compiled kernels."""
    import torch

    torch.set_num_threads(threads)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in (
            (-4, 0),
            (-1, 2**31 - 1),
            (-2, 2**28),
        ):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        pass  # not glibc: only slower


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks the loop to finish its step and save; a second one interrupts."""
    asked: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_display(
    total: int, done: int
) -> Iterator[tuple[Callable[[str], None], Callable[[int, str], None]]]:
    """(say, show): log lines, and a bar below them where there is a terminal to draw it on."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        yield lambda line: print(time.strftime("%H:%M:%S"), line, flush=True), lambda tokens, status: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    status = TextColumn("{task.fields[status]}")
    columns = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(), TimeRemainingColumn(), status)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=total, completed=done, status="")
        yield bar.console.print, lambda tokens, status: bar.update(task, completed=tokens, status=status)


def parse(argv: Sequence[str] | None) -> tuple[Recipe, Path] | None:
    """Recipe and output directory from the command line; None after --list."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.train",
        description="Train a small mixture-of-experts model from scratch on one CPU core.",
        epilog="examples:\n"
        "  python -m zoo.train -o out/first                  two million tokens of zoo/sample, a quarter of an hour\n"
        "  python -m zoo.train -o out/first --tokens 4e6     the same run, continued\n"
        "  python -m zoo.train --arch switch-32 -o out/switch --corpus DIR --tokens 1e7\n\n"
        "-o DIR then loads with transformers' from_pretrained. Ctrl-C saves and stops; the same command resumes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="where model and checkpoints go")
    parser.add_argument("--list", action="store_true", help="describe the architectures and exit")
    for entry in fields(Recipe):
        flag, help_text = f"--{entry.name.replace('_', '-')}", entry.metadata["help"]
        if isinstance(entry.default, bool):
            parser.add_argument(flag, action="store_true", help=help_text)
            continue
        kind = int if entry.default is None else type(entry.default)
        shown = "zoo/sample" if entry.name == "corpus" else entry.default
        suffix = "" if entry.default is None else f" [{shown}]"
        metavar = {int: "N", float: "X", str: "NAME"}.get(kind, "DIR")
        parser.add_argument(
            flag,
            type=Path if kind not in (int, float, str) else kind,
            default=entry.default,
            metavar=metavar,
            help=help_text.replace("%", "%%") + suffix,
        )
    args = vars(parser.parse_args(argv))
    if args.pop("list"):
        for name, architecture in ARCHITECTURES.items():
            shape = architecture.shape
            print(f"{name:13} {architecture.summary}\n{'':13} here D={shape.hidden}, I={shape.expert_inner}")
        return None
    out = args.pop("out")
    if out is None:
        parser.error("-o DIR is missing: where should model and checkpoints go?")
    return Recipe(**args), out


def main(argv: Sequence[str] | None = None) -> int:
    """0: trained; 1: failed, with a message; 130: stopped by Ctrl-C, checkpoint written."""
    try:
        parsed = parse(argv)
        if parsed is None:
            return 0
        recipe, out = parsed
        tune_process(recipe.threads)
        run = Run(recipe, out)
        if run.progress.tokens >= recipe.tokens:
            raise ValueError(
                f"{out} is already trained on {run.progress.tokens:,} tokens; give more --tokens or another -o"
            )
        if recipe.compile:
            run.compile()
        with (
            asked_to_stop() as stopped,
            progress_display(int(recipe.tokens), run.progress.tokens) as (say, show),
        ):
            parameters = sum(p.numel() for p in run.model.parameters())
            say(f"{recipe.arch}: {parameters / 1e6:.1f} M parameters, from {run.progress.tokens:,} tokens on")
            finished = train(run, say, show, stopped)
    except (ValueError, FloatingPointError) as error:
        print(f"zoo.train: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {'trained on' if finished else 'stopped and saved after'} {run.progress.tokens:,} tokens")
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main())
