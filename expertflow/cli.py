"""The command line. Each command checks what it was given, calls the library and prints; it is in `commands/`.

stdout carries generated text (or JSON) alone, all else goes to stderr, so that output can be piped. Imports
are inside the commands: torch takes seconds to import, and `--help` must not.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from expertflow import __version__
from expertflow.commands.batch import batch
from expertflow.commands.chat import chat
from expertflow.commands.check import check, demo
from expertflow.commands.plan import measure, plan
from expertflow.commands.predictors import eval_predictor, train_predictor
from expertflow.commands.run import run
from expertflow.commands.serve import serve
from expertflow.commands.simulate import simulate
from expertflow.commands.stats import stats
from expertflow.commands.trace import trace

app = typer.Typer(
    name="expertflow",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Run Mixture-of-Experts language models that do not fit in memory, exactly as transformers would.

Dense weights and a bounded set of experts stay in memory; the other experts are read from the untouched
checkpoint when a token needs them.

[bold]Does it fit, and how fast will it be?[/bold]  expertflow plan MODEL --memory 6GiB

[bold]Generate text:[/bold]  expertflow run MODEL "Once upon a time" --memory 6GiB

[bold]Is the output the same?[/bold]  expertflow check MODEL --memory 6GiB

MODEL is a folder or a model of the Hugging Face hub, such as Qwen/Qwen1.5-MoE-A2.7B.""",
)

# In the order of --help: from the first look at a model to what only those ask who tune it.
for command in (
    plan,
    run,
    chat,
    serve,
    batch,
    check,
    stats,
    measure,
    trace,
    train_predictor,
    eval_predictor,
    simulate,
    demo,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"expertflow {__version__}")
        raise typer.Exit


@app.callback()
def _expertflow(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and leave")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. Leaves with 0, with 2 after an error, with 130 after Ctrl-C."""
    _open_closed_streams()
    warnings.showwarning = _tell_warning
    try:
        app()
    except KeyboardInterrupt:  # between typer's own handling and the end
        sys.exit(130)


def _tell_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """To users what is for users; where in the code it was said is for developers."""
    where = "" if category is UserWarning else f"{filename}:{lineno}: {category.__name__}: "
    typer.echo(f"warning: {where}{message}", err=True)


def _open_closed_streams() -> None:
    """`expertflow ... >&-`: output goes nowhere, and no checkpoint is opened under the number of stdout."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            file = open(os.devnull, mode)  # noqa: SIM115 - as long as the process
            assert file.fileno() == number, "somebody took it first"
            setattr(sys, name, file)


if __name__ == "__main__":
    main()
