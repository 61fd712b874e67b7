"""`expertflow trace`: record which experts a model uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expertflow.commands.flags import ModelArgument, RevisionOption, takes
from expertflow.commands.session import load, progress_bar
from expertflow.config import Settings, TraceSettings, Tracing, format_bytes


@takes(settings=TraceSettings, tracing=Tracing)
def trace(
    model: ModelArgument,
    settings: dict[str, Any],
    tracing: dict[str, Any],
    dataset: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help='alpaca, wmt16, xsum or aime2024 of the hub, or lines of {"prompt", "response"} (.jsonl, .jsonl.xz)',
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder of the trace")],
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="what the prompts are recorded as", show_default="the data set's"),
    ] = None,
    revision: RevisionOption = None,
) -> None:
    """Record which experts a model uses for the prompts of a data set: what predictors are trained on.

    Runs each prompt several times with sampling. Stopped at any moment, the same command goes on where it was.

    [bold]Examples[/bold]

      expertflow trace Qwen/Qwen1.5-MoE-A2.7B-Chat --dataset alpaca -o traces/alpaca --prompts 1000

      expertflow trace ./mixtral --dataset chats.jsonl.xz --teacher-forced -o traces/chats --memory 20GiB
    """
    wanted = Tracing(**tracing)
    for name in ("runs", "temperature", "seed"):
        if wanted.teacher_forced and name in tracing:
            raise ValueError(
                f"--{name} is of sampled answers, and --teacher-forced samples none; leave one of them out"
            )
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; -o takes a folder, which is made when it is not there")
    settings = {"batch": TraceSettings.batch, **settings}
    Settings(**settings)
    from expertflow.engine.datasets import HUB_SETS, load_examples

    examples = load_examples(dataset, wanted.prompts, task)
    with load(model, revision, settings) as llm:
        from expertflow.engine.tracing import record_trace

        name = dataset if dataset in HUB_SETS else Path(dataset).name
        with progress_bar("recording") as progress:
            recorded = record_trace(llm, examples, output, wanted, name, progress)
    if recorded.too_long:
        typer.echo(
            f"left out {recorded.too_long} of {min(len(examples), wanted.prompts)} prompts: with an answer they "
            f"exceed the context of {llm.context} tokens (--context)",
            err=True,
        )
    size = sum(path.stat().st_size for path in output.iterdir())
    typer.echo(
        f"{output}: {recorded.sequences} sequences ({recorded.recorded} new, {recorded.tokens} tokens), "
        f"{format_bytes(size)}",
        err=True,
    )
