"""The model card of a finished run: `python -m zoo.report RUN`, RUN being what zoo.train wrote to.

Measures the exported model (bits per byte of all held-out text, load per expert, samples) and writes
README.md, training.json and loss.png beside it. Every figure in the card comes from here.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.architectures import ARCHITECTURES
from zoo.checkpoint import Progress, training_dir, write_text

PROMPTS = {
    "plain text": "The President said that the people of this country",
    "documentation": "To create a new table,",
    "a story": "She had never been so happy in her life, and",
    "chat": "<|user|>User: Hi! What did you do last weekend?<|assistant|>",
    "encyclopaedia": "<|user|>What can you tell me about the climate in Austria?<|assistant|>",
    "translation": "<|user|>Translate German to English:\nKlicken Sie auf die Schaltfläche, um das Dokument zu "
    "speichern.<|assistant|>",
    "math": "<|user|>How many positive integers not exceeding $300$ are divisible by $7$ or by $5$?<|assistant|>",
}


def measure(run: Path, rows: int | None) -> dict[str, Any]:
    """Everything the card says about a decoder-only model, from the files in `run` alone."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from zoo.evaluate import bits_per_byte, expert_load, sample, seen_share
    from zoo.experts import EXPERTS_NAME, register_experts
    from zoo.tokens import read_tokens

    recipe = json.loads((training_dir(run) / "recipe.json").read_text(encoding="utf-8"))
    with safe_open(training_dir(run) / "state.safetensors", "pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
    register_experts()
    model = AutoModelForCausalLM.from_pretrained(
        run, experts_implementation=EXPERTS_NAME, attn_implementation="eager"
    )
    model.eval()
    tokens = read_tokens(run)
    top_k, B, T = model.config.num_experts_per_tok, progress.batch, progress.context
    held_out = bits_per_byte(model, tokens.held_out, B, T, rows)
    for source, share in seen_share(tokens.held_out, tokens.streams).items():
        if source in held_out["by_source"]:
            held_out["by_source"][source]["seen"] = round(share, 4)
    load: dict[str, Any] = {}
    for name, text in _task_streams(tokens.held_out).items():
        if len(text) > T:
            load_LE = expert_load(model, text, top_k, B, T, rows=64)
            load[name] = (load_LE * load_LE.shape[1]).tolist()
    torch.manual_seed(progress.seed)
    samples = {
        name: prompt + sample(model, tokens.tokenizer, prompt, progress.seed, 80)
        for name, prompt in PROMPTS.items()
    }
    return {
        "recipe": recipe,
        "arch": progress.arch,
        "seed": progress.seed,
        "batch": progress.batch,
        "context": progress.context,
        "tokens": progress.tokens,
        "steps": progress.steps,
        "seconds": round(progress.seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": (run / "model.safetensors").stat().st_size,
        "rows": rows,
        "held_out": held_out,
        "relative_load": load,
        "samples": samples,
    }


def _task_streams(held_out: dict[str, Any]) -> dict[str, Any]:
    """Held-out tokens by part: the sources of each joined."""
    import numpy as np

    parts = sorted({name.split("/")[0] for name in held_out})
    return {
        part: np.concatenate([text.stream for name, text in held_out.items() if name.startswith(part + "/")])
        for part in parts
    }


def curve(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss and held-out bits per byte over tokens, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    left.plot(
        [h["tokens"] / 1e6 for h in history],
        [h["loss"] for h in history],
        color="#4477aa",
        label="training loss",
    )
    left.set_xlabel("million tokens")
    left.set_ylabel("training loss, nats per token", color="#4477aa")
    left.set_ylim(top=min(history[0]["loss"], 7.5))
    held_out = [h for h in history if "bits_per_byte" in h.get("held_out", {})]
    right = left.twinx()
    right.plot(
        [h["tokens"] / 1e6 for h in held_out],
        [h["held_out"]["bits_per_byte"] for h in held_out],
        color="#cc6677",
        marker="o",
        label="held-out text",
    )
    right.set_ylabel("held-out text, bits per byte", color="#cc6677")
    left.grid(alpha=0.3)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)
    pyplot.close(figure)


def card(result: dict[str, Any], path: Path) -> str:
    """The README of the model at `path`, in Markdown."""
    held_out = result["held_out"]
    sources = "\n".join(
        f"| {name} | {figures['bits_per_byte']:.3f} | {figures['bytes']:,} | {100 * figures['seen']:.1f} % |"
        for name, figures in sorted(held_out["by_source"].items())
    )
    loads = "\n".join(
        f"| {part} | " + " | ".join(f"{min(layer):.2f} to {max(layer):.2f}" for layer in layers) + " |"
        for part, layers in result["relative_load"].items()
    )
    num_layers = len(next(iter(result["relative_load"].values())))
    header = " | ".join(f"layer {layer}" for layer in range(num_layers))
    samples = "\n\n".join(f"*{name}*\n\n```text\n{text}\n```" for name, text in result["samples"].items())
    limit = f"; at most {result['rows']} rows of each source" if result["rows"] else ""
    recipe = result["recipe"]
    size = f"{result['parameters'] / 1e6:.1f} M parameters, {result['weight_bytes'] / 1e6:.1f} MB"
    rows_each = f"{result['batch']} sequences of {result['context']} tokens"
    speed = result["tokens"] / max(result["seconds"], 0.1)
    summary = ARCHITECTURES[result["arch"]].summary
    return f"""---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
---

# {path.name}

A small real mixture-of-experts language model, trained from scratch to demonstrate and test expert offloading:
{summary}.

{size}, bf16, in the format in which the architecture is published
(a tensor per expert and projection). It learnt English text, some German, and the form of four tasks. Its phrases
read as English, its sentences wander, and its facts and sums are invented: use it to watch routing, not to ask it
anything.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path.parent.name}/{path.name}")
model = AutoModelForCausalLM.from_pretrained("{path.parent.name}/{path.name}")
```

Sample it (temperature 0.8, top-k 40, the default in `generation_config.json`); greedy text repeats itself.
The chat template is `<|user|>question<|assistant|>answer<|end|>`.

## Training

| | |
|---|---|
| text | the corpus described in `zoo/README.md`: permissive sources only, 63 % plain text, 37 % the four tasks |
| tokens | {result["tokens"]:,} in {result["steps"]:,} steps of {rows_each} |
| time | {result["seconds"] / 60:.0f} minutes on one CPU core with AMX, {speed:,.0f} tokens/s |
| optimizer | Muon ({recipe["muon_lr"]}) for hidden matrices, Adam ({recipe["adam_lr"]}) for the rest |
| rate | warm-up, plateau, linear decay to 0 over the last {100 * recipe["decay_share"]:.0f} % of the tokens |
| balance loss | weight {recipe["balance"]}, per layer |
| seed | {result["seed"]} |

```
{recipe["command"]}
```

![loss](loss.png)

The curve's figures are in `training.json`.

## Bits per byte of held-out text

**{unseen_text(held_out):.3f}** over the sources below of which less than a tenth occurs word for word in the training
text; {held_out["bits_per_byte"]:.3f} over all sources. Both are weighted by bytes; rows of {result["context"]} tokens,
each without the context of the row before it{limit}.

The split keeps documents apart but not the parts: some held-out sentences of one part are in another part's training
text, and generated problems repeat their templates. The last column is the share of held-out spans of 16 tokens that
the training text has too; about a third of that text was reached in training.

| source | bits per byte | bytes | seen |
|---|---|---|---|
{sources}

## Load per expert

Least and most used expert of each layer, 1 being an even share, on up to 64 held-out sequences of each part.

| | {header} |
|---|{"---|" * num_layers}
{loads}

## Samples

Seed {result["seed"]}, temperature 0.8, top-k 40, at most 80 new tokens; not selected.

{samples}

## Licence

Weights and tokenizer: Apache-2.0. The text's sources and their licences are listed in `zoo/README.md`.
"""


def unseen_text(held_out: dict[str, Any]) -> float:
    """Bits per byte over the sources of which less than a tenth is in the training text; NaN without any."""
    chosen = [figures for figures in held_out["by_source"].values() if figures["seen"] < 0.1]
    total = sum(figures["bytes"] for figures in chosen)
    return (
        sum(figures["bits_per_byte"] * figures["bytes"] for figures in chosen) / total if total else math.nan
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.report", description="Write the model card of a finished run."
    )
    parser.add_argument("run", type=Path, help="the directory that zoo.train wrote to")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="DIR", help="copy model and card there [beside the run]"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="at most so many sequences per source [all]")
    parser.add_argument(
        "--command", default="", metavar="TEXT", help="the training command, quoted in the card"
    )
    args = parser.parse_args(argv)
    out: Path = args.out or args.run
    try:
        result = measure(args.run, args.rows)
    except (OSError, ValueError) as error:
        print(f"zoo.report: {args.run} holds no finished run of zoo.train: {error}", file=sys.stderr)
        return 1
    lines = (training_dir(args.run) / "history.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    out.mkdir(parents=True, exist_ok=True)
    if out != args.run:
        for file in args.run.iterdir():
            if file.is_file():
                temporary = out / (file.name + ".part")
                shutil.copyfile(file, temporary)
                temporary.replace(out / file.name)
    curve(history, out / "loss.png")
    write_text(json.dumps({**result, "history": history}, indent=1) + "\n", out / "training.json")
    write_text(card(result, out.absolute()), out / "README.md")
    held_out = result["held_out"]
    print(
        f"{out}: {unseen_text(held_out):.3f} bits per byte, {held_out['bits_per_byte']:.3f} with text partly seen"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
