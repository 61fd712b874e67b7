"""`expertflow batch`: a file of requests, answered many at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertflow.commands.flags import (
    DEFAULT_MAX_TOKENS,
    ExecutionOption,
    PatienceOption,
    RevisionOption,
    ScheduleOption,
    StatsJsonOption,
    StatsOption,
    TimelineOption,
    takes,
)
from expertflow.commands.session import (
    check_can_write,
    checked_seating,
    load,
    progress_bar,
    report_run,
    sampling_params,
    saved_timeline,
)
from expertflow.config import BatchSettings
from expertflow.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from expertflow.engine.batch_run import BatchProgress


@takes(settings=BatchSettings, sampling=SamplingParams)
def batch(
    requests: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="a request in each line")],
    results: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="a result in each line, as they finish")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="a folder, or owner/name on the Hugging Face hub"
        ),
    ],
    settings: dict[str, Any],
    sampling: dict[str, Any],
    execution: ExecutionOption = "joint",
    schedule: ScheduleOption = "fixed",
    patience: PatienceOption = None,
    revision: RevisionOption = None,
    stats: StatsOption = False,
    stats_json: StatsJsonOption = None,
    timeline: TimelineOption = None,
) -> None:
    """Answer a file of prompts, many at once.

    A line is {"prompt": ...} or {"messages": [...]}, with "id" and sampling parameters where wanted, or a request of
    OpenAI's batch format. Results come in the order in which they finish. A run that was killed continues when the
    same command is given again. Leaves with 1 when lines failed: their results say why.

    [bold]Examples[/bold]

      expertflow batch prompts.jsonl answers.jsonl --model ./mixtral --memory 20GiB --batch-size 16

      expertflow batch openai.jsonl out.jsonl -m ./qwen-chat --memory 6GiB --max-tokens 200 --temperature 0
    """
    check_can_write(stats_json, None, timeline)
    checked = BatchSettings(**settings)
    SamplingParams(**sampling)
    if not requests.is_file():
        raise FileNotFoundError(
            f"{requests} is no file; give one with a request in each line, as --help says"
        )
    if requests.absolute() == results.absolute():
        raise ValueError(f"{results} is the file of requests; give another name to the results")
    seating = checked_seating(execution, schedule, patience, checked)
    from expertflow.engine.batch_results import BatchResults
    from expertflow.engine.batch_run import BatchRun, sha256_of

    given = {"input_sha256": sha256_of(requests), "model": model, "revision": revision, "sampling": sampling}
    settings = {**settings, "batch": checked.batch, "sequences": checked.sequences}
    with (
        BatchResults(results, given) as kept,
        load(model, revision, settings) as llm,
        saved_timeline(llm, timeline),
    ):
        from expertflow.engine.engine import Engine

        default_tokens = None if "max_tokens" in sampling else DEFAULT_MAX_TOKENS
        with Engine(llm, **seating) as engine, _answering() as progress:
            run = BatchRun(llm, engine, requests, kept, sampling_params(llm, sampling), default_tokens)
            try:
                run.run(progress)
            except KeyboardInterrupt:
                typer.echo(
                    f"{run.state.done} of {run.state.total} lines done; the same command continues", err=True
                )
                raise
        report_run(llm, stats, stats_json, None, engine)
    state = run.state
    typer.echo(
        f"{results}: {state.total} lines, {state.answered_now} answered now with {state.tokens_now} tokens, "
        f"{engine.stats.tokens_per_second:.3g} tokens/s"
        + (f"; {state.failed} failed, their results say why" if state.failed else ""),
        err=True,
    )
    if state.failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _answering() -> Iterator[Callable[[BatchProgress], None]]:
    """A bar of lines, with tokens per second."""
    started = time.perf_counter()
    with progress_bar("answering") as show:

        def tell(state: BatchProgress) -> None:
            speed = f"{state.tokens_now / (time.perf_counter() - started):.3g} tokens/s"
            if state.failed:
                speed += f", {state.failed} failed"
            show(state.done, state.total, speed)

        yield tell
