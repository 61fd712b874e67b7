"""`expertflow check` and `expertflow demo`: is the output that of transformers?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from expertflow.commands.flags import ModelArgument, RevisionOption, takes
from expertflow.commands.session import load, print_tables, quiet_unless_terminal, write_answer
from expertflow.config import Settings
from expertflow.engine.sampling import SamplingParams

DEMO_PROMPT = "The old man went to the river"
DEMO_CACHE_SIZE = 8  # of 32 experts in each layer
DEMO_SEED = 0
_REPOSITORY = Path(__file__).resolve().parents[2]


@takes(settings=Settings)
def check(
    model: ModelArgument,
    settings: dict[str, Any],
    revision: RevisionOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="compare on this text; may be repeated", show_default="a few built in"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="greedy tokens to compare after each prompt")] = 32,
    seed: Annotated[int, typer.Option(help="of the forced mispredictions")] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|float32|bfloat16|float16",
            help="what both compute in; auto is the checkpoint's, and float32 hardly rounds",
        ),
    ] = "auto",
    layer_by_layer: Annotated[
        bool, typer.Option("--layer-by-layer", help="even when the whole model fits in memory")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Is the output the same as that of transformers? Tried on your own checkpoint.

    Compares logits and greedy tokens, forced mispredictions included; layer by layer when the whole model
    does not fit in memory. Leaves with 1 when they differ.

    [bold]Example[/bold]

      expertflow check ./mixtral --memory 20GiB
    """
    checked = Settings(**settings)
    quiet_unless_terminal()
    from expertflow.check import run_check

    status = run_check(
        model,
        checked,
        revision=revision,
        prompts=prompt or None,
        max_new_tokens=max_tokens,
        seed=seed,
        dtype=dtype,
        layer_by_layer=layer_by_layer,
        as_json=json,
    )
    raise typer.Exit(status)


@takes()
def demo(
    model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="another model", show_default="models/tiny-moe")
    ] = None,
    prompt: Annotated[str, typer.Option(help="what the sample continues")] = DEMO_PROMPT,
    max_tokens: Annotated[int, typer.Option(help="length of the sample")] = 120,
) -> None:
    """Show it on the small model of this repository: a sample, its statistics, the parity check."""
    from rich.console import Console

    folder = model or _REPOSITORY / "models" / "tiny-moe"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist: the demo's model comes with the repository, not with the package; run "
            f"it "
            f"from a clone, or give --model FOLDER"
        )
    console = Console(highlight=False)
    with load(str(folder), None, {"cache_size": DEMO_CACHE_SIZE, "context": 512}) as llm:
        stats = llm.stats
        shape = stats.shape
        console.print(
            f"{folder.name}: {shape.num_layers} layers of {max(shape.experts_per_layer)} experts. Of these "
            f"{shape.num_experts}, {stats.num_slots} are in memory at a time; the others are read from "
            f"{folder} when a token needs them.\n"
            f"The model is tiny and trained for the demonstration; look at the machinery, not at the prose.\n"
        )
        params = SamplingParams(temperature=0.8, top_k=40, seed=DEMO_SEED, max_tokens=max_tokens)
        sys.stdout.write(prompt)
        write_answer(llm, prompt, params, length_given=True)
        sys.stdout.write("\n")
        from expertflow import report

        print_tables(report.collect(llm), console)
    from expertflow.check import check_model, run_check

    console.print("\nIs that what transformers would compute? The same model, all in memory, beside ours:")
    settings = Settings(cache_size=DEMO_CACHE_SIZE, context=512)
    status = run_check(str(folder), settings, prompts=[prompt], max_new_tokens=16, console=console)
    console.print("\nAnd in float32, where hardly two tokens are tied:")
    exact = check_model(folder, settings, prompts=[prompt], max_new_tokens=16, dtype="float32")
    console.print(exact.lines()[-1])
    raise typer.Exit(status or not exact.passed)
