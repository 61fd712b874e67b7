"""Is a trained model's routing worth studying? `python -m zoo.quality RUN`, RUN being what zoo.train wrote to.

Two questions, for decoders and encoder-decoders alike: how far is its held-out loss below that of a unigram
model (a model that learnt nothing routes noise), and does any expert starve. Writes quality.json beside the
model and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.checkpoint import Progress, training_dir, write_text
from zoo.corpus import MIXTURE, TASKS, PairBatch, pad_pairs, pairs_of
from zoo.evaluate import causal_loss, causal_rows, seq2seq_loss
from zoo.routing import load_of, watch_routers

MIN_GAIN_NATS = 1.5  # below a unigram model; less, and the routing is noise


def unigram_nats(
    train_ids: Sequence[np.ndarray], shares: Sequence[float], targets: np.ndarray, V: int
) -> float:
    """Cross-entropy per target of token frequencies: each training stream weighs its share; add-one smoothing."""
    probability_V = np.zeros(V)
    for ids, share in zip(train_ids, shares, strict=True):
        counts_V = np.bincount(ids.astype(np.int64), minlength=V) + 1.0
        probability_V += share * counts_V / counts_V.sum()
    probability_V /= probability_V.sum()
    return float(-np.log(probability_V[targets]).mean())


def responses(stream: np.ndarray, T: int) -> np.ndarray:
    """The response tokens of a stream of pairs, END included, each cut off after T."""
    return np.concatenate([response[:T] for _, response in pairs_of(stream)])


def measure(run: Path, rows: int) -> dict[str, Any]:
    """Loss by task and load per expert on up to `rows` held-out sequences of each of the four tasks."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from zoo.architectures import ARCHITECTURES
    from zoo.experts import EXPERTS_NAME, register_experts, speed_up_switch
    from zoo.tokens import read_tokens

    with safe_open(training_dir(run) / "state.safetensors", "pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
    architecture = ARCHITECTURES[progress.arch]
    register_experts()
    model: Any
    if progress.arch.startswith("deepseek"):
        from expertflow.models import deepseek_moe

        deepseek_moe.register()
    if architecture.seq2seq:
        model = AutoModelForSeq2SeqLM.from_pretrained(run)
        speed_up_switch(model)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            run, experts_implementation=EXPERTS_NAME, attn_implementation="eager"
        )
    model.eval()
    tokens, T, B, V = read_tokens(run), progress.context, progress.batch, model.config.vocab_size
    parts = [
        part for part in (TASKS if architecture.seq2seq else MIXTURE) if len(tokens.streams.get(part, ()))
    ]
    train = [tokens.streams[part] for part in parts]
    if architecture.seq2seq:
        train = [responses(stream, T) for stream in train]
    shares = [MIXTURE[part] for part in parts]
    by_task: dict[str, dict[str, float]] = {}
    total_LE: Tensor | None = None
    with torch.no_grad(), watch_routers(model, architecture.shape.top_k) as log:
        for task in parts:
            streams = [text.stream for name, text in tokens.held_out.items() if name.startswith(f"{task}/")]
            if not streams:
                continue
            losses, counts, seen = [], [], []
            for loss, count, targets in _passes(
                model, np.concatenate(streams), architecture.seq2seq, B, T, rows
            ):
                losses.append(loss * count)
                counts.append(count)
                seen.append(targets)
                load_LE = torch.stack([load_of(logits_NE, log.top_k) for logits_NE in log.take()]) * count
                total_LE = load_LE if total_LE is None else total_LE + load_LE
            if counts:
                by_task[task] = {
                    "nats": sum(losses) / sum(counts),
                    "unigram_nats": unigram_nats(train, shares, np.concatenate(seen), V),
                    "tokens": sum(counts),
                }
    assert total_LE is not None, f"{run} has no held-out text"
    relative_LE = total_LE / total_LE.sum(dim=1, keepdim=True) * total_LE.shape[1]
    num_tokens = sum(task["tokens"] for task in by_task.values())
    nats, unigram = (
        sum(task[name] * task["tokens"] for task in by_task.values()) / num_tokens
        for name in ("nats", "unigram_nats")
    )
    return {
        "arch": progress.arch,
        "trained_tokens": progress.tokens,
        "trained_minutes": round(progress.seconds / 60, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "nats": nats,
        "unigram_nats": unigram,
        "gain_nats": unigram - nats,
        "enough": unigram - nats >= MIN_GAIN_NATS,
        "by_task": by_task,
        "load": {
            "least": [round(x, 3) for x in relative_LE.min(dim=1).values.tolist()],
            "most": [round(x, 3) for x in relative_LE.max(dim=1).values.tolist()],
            "entropy_share": [round(_entropy_share(load_E), 3) for load_E in relative_LE],
            "starving": int((relative_LE < 0.05).sum()),
            "relative": [[round(x, 3) for x in layer] for layer in relative_LE.tolist()],
        },
    }


def _passes(
    model: Any, stream: np.ndarray, seq2seq: bool, B: int, T: int, rows: int
) -> Iterable[tuple[float, int, np.ndarray]]:
    """(mean loss, number of targets, targets) of each forward pass over held-out text."""
    if seq2seq:
        pairs = pairs_of(stream)[:rows]
        for first in range(0, len(pairs), B):
            batch: PairBatch = pad_pairs(pairs[first : first + B], T)
            targets = batch.labels_BT[batch.labels_BT >= 0].numpy()
            yield seq2seq_loss(model, batch).item(), len(targets), targets
        return
    count = min(rows, (len(stream) - 1) // T)
    for first in range(0, count, B):
        here = min(B, count - first)
        input_BT, target_BT = causal_rows(stream, first, here, here, T)
        yield causal_loss(model, input_BT, target_BT).item(), here * T, target_BT.flatten().numpy()


def _entropy_share(load_E: Tensor) -> float:
    """Entropy of a layer's load over that of an even one: 1 when balanced."""
    p_E = load_E / load_E.sum()
    return float(-(p_E * p_E.clamp(min=1e-12).log()).sum() / math.log(len(p_E)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo.quality", description=__doc__.split("\n", 1)[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory that zoo.train wrote to")
    parser.add_argument("--rows", type=int, default=64, help="held-out sequences per task [64]")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(
        f"{'model':14}{'tokens':>12}{'nats':>8}{'unigram':>9}{'gain':>7}{'least load':>12}{'most':>7}{'starving':>10}"
    )
    for run in options.runs:
        try:
            result = measure(run, options.rows)
        except (OSError, ValueError) as error:
            print(f"zoo.quality: {run} holds no run of zoo.train: {error}", file=sys.stderr)
            return 1
        write_text(json.dumps(result, indent=1) + "\n", run / "quality.json")
        load = result["load"]
        print(
            f"{result['arch']:14}{result['trained_tokens']:>12,}{result['nats']:>8.2f}{result['unigram_nats']:>9.2f}"
            f"{result['gain_nats']:>7.2f}{min(load['least']):>12.2f}{max(load['most']):>7.2f}{load['starving']:>10}"
            + ("" if result["enough"] else f"   less than {MIN_GAIN_NATS} nats below a unigram: train longer")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
