"""`expertflow train-predictor` and `expertflow eval-predictor`: learn from recorded routes, and judge it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertflow.commands.flags import takes
from expertflow.commands.session import load, stderr, stdout
from expertflow.predictor.sizes import PredictorSizes, TrainSettings

if TYPE_CHECKING:
    from expertflow.engine.llm import LLM


@takes(sizes=PredictorSizes, training=TrainSettings)
def train_predictor(
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACES...", help="folders that `expertflow trace` wrote", show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="where the predictor goes")],
    sizes: dict[str, Any],
    training: dict[str, Any],
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="train on this task's sequences only", show_default="all tasks"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="the traced model: its embedding tells of tokens that the traces hardly show",
            show_default="none: tokens are only numbers",
        ),
    ] = None,
) -> None:
    """Learn from recorded routes which experts a text will need, for prefetching and eviction.

    A run that was interrupted continues when the same command is given again. With --model the predictor knows
    other subjects better than those it is trained on, and costs the same.

    [bold]Example[/bold]

      expertflow train-predictor traces/chat --model models/tiny-moe -o predictors/chat --minutes 10
    """
    checked = TrainSettings(**training)
    from expertflow.predictor.train import train_predictor as run_training

    embedding_VD = None if model is None else _input_embedding(model, traces[0])
    run_training(traces, output, sizes, checked, task=task, embedding_VD=embedding_VD)


def _input_embedding(model: str, trace: Path) -> Any:
    """A copy of the traced model's, V x D. Raises ValueError for another model than the traced one."""
    from expertflow.trace import read_trace

    meta = read_trace(trace, weights=False).meta
    with load(model, None, {"cache_size": 2.0}) as llm:
        verify_traced(llm, model, meta)
        embedding: Any = llm.model.get_input_embeddings()
        return embedding.weight.detach().clone()


@takes()
def eval_predictor(
    traces: Annotated[
        list[Path], typer.Option(metavar="DIR", help="a recording with held-out prompts; may be repeated")
    ],
    predictors: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PREDICTOR]...", help="trained predictors; without any, the baselines alone"),
    ] = None,
    fitted_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="a task that the baselines are counted on; may be repeated",
            show_default="all",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="a task to judge them on; may be repeated", show_default="all"),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="batch sizes, 1 to 64")] = "1,2,4,8,16,32,64",
    max_tokens: Annotated[int, typer.Option(help="held-out tokens of each task")] = 50_000,
    warm_tokens: Annotated[
        int, typer.Option(help="tokens of the training split that the online table has served before")
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="the traced model, to measure look-ahead and the pre-gate as well"
        ),
    ] = None,
    gate_tokens: Annotated[int, typer.Option(min=1, help="tokens to train the pre-gate on")] = 4000,
    expert_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="bytes of one expert, such as 17MB: wrong guesses in MB"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the choice of sequences and batches")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="folder for the JSON and the figures")
    ] = None,
) -> None:
    """How well are a model's routes predicted, on prompts that were held out?

    Every baseline stands beside the predictors. Figures are drawn where matplotlib is installed.

    [bold]Examples[/bold]

      expertflow eval-predictor --traces traces/alpaca

      expertflow eval-predictor rpp --traces traces/chat --traces traces/math --fitted-on chat -o evaluation
    """
    from expertflow.config import parse_bytes
    from expertflow.predictor import report
    from expertflow.predictor.evaluate import Conditions, check_tasks, evaluate
    from expertflow.predictor.recordings import load_predictors, read_recordings

    try:
        batches = tuple(sorted({int(size) for size in batch.split(",")}))
    except ValueError:
        raise ValueError(f"--batch {batch!r} is no list of numbers; write --batch 1,8,64") from None
    conditions = Conditions(batches=batches, max_tokens=max_tokens, warm_tokens=warm_tokens, seed=seed)
    size = parse_bytes(expert_bytes, "--expert-bytes") if expert_bytes is not None else None
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; -o takes a folder, which is made when it is not there")
    meta, sequences = read_recordings(traces)
    loaded = load_predictors(predictors or [], meta, traces)
    counted = fitted_on or sorted({s.task for s in sequences if s.split == "train"})
    check_tasks(sequences, counted, task)  # before a model is loaded
    with _hidden(model, meta, sequences, counted, gate_tokens) as hidden, stderr().status("") as status:
        found = evaluate(meta, sequences, loaded, counted, task or None, conditions, hidden, status.update)
    console = stdout()
    for table in report.tables(found, size):
        console.print(table)
    if (ranking := report.next_use_table(found)) is not None:
        console.print(ranking)
    stderr().print(report.LEGEND)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        report.save_json(found, output / "evaluation.json")
        drawn = report.save_figures(found, output)
        typer.echo(f"{output}: evaluation.json and {len(drawn)} figures", err=True)
        if not drawn:
            typer.echo("figures need matplotlib; `pip install 'expertflow-moe[plots]'`", err=True)


@contextlib.contextmanager
def _hidden(
    model: str | None, meta: Any, sequences: list[Any], counted: list[str], gate_tokens: int
) -> Iterator[Any]:
    """Predictors of hidden states when the model was given, else None."""
    if model is None:
        yield None
        return
    with load(model, None, {}) as llm:
        from expertflow.engine.hidden_states import hidden_predictors, hidden_states

        verify_traced(llm, model, meta)
        train = [s for s in sequences if s.split == "train" and s.task in counted]
        with hidden_states(llm) as read:
            yield hidden_predictors(llm, read, meta, train, gate_tokens)


def verify_traced(llm: LLM, model: str, meta: Any) -> None:
    from expertflow.models.fingerprint import fingerprint

    if (found := fingerprint(llm.model)) != meta.fingerprint:
        raise ValueError(
            f"{model} has fingerprint {found}, and the traces were recorded with {meta.model} "
            f"({meta.fingerprint}); give the model that was traced, or leave --model out"
        )
