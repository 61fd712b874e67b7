"""`expertflow serve`: a model behind OpenAI's API."""

from __future__ import annotations

import logging
import os
from typing import Any

import typer

from expertflow.commands.flags import (
    ExecutionOption,
    ModelArgument,
    PatienceOption,
    RevisionOption,
    ScheduleOption,
    takes,
)
from expertflow.commands.session import checked_seating, load
from expertflow.config import BatchSettings
from expertflow.server.settings import ServerSettings


@takes(settings=BatchSettings, server=ServerSettings)
def serve(
    model: ModelArgument,
    settings: dict[str, Any],
    server: dict[str, Any],
    execution: ExecutionOption = "joint",
    schedule: ScheduleOption = "fixed",
    patience: PatienceOption = None,
    revision: RevisionOption = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's API has it, with a live page and metrics.

    Requests are decoded together. Only programs of this machine can ask, unless --host says otherwise, and then only
    with a key. SIGTERM and Ctrl-C let running requests end; a second one does not.

    [bold]Examples[/bold]

      expertflow serve Qwen/Qwen1.5-MoE-A2.7B --memory 6GiB

      EXPERTFLOW_API_KEY=... expertflow serve ./mixtral --memory 20GiB --host 0.0.0.0 --batch-size 16
    """
    checked = BatchSettings(**settings)
    wanted = ServerSettings(**server).with_keys(os.environ)
    seating = checked_seating(execution, schedule, patience, checked)
    try:
        from expertflow.server.serve import listening_socket
        from expertflow.server.serve import serve as serve_model
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed, and a server needs it; pip install 'expertflow-moe[serve]'"
        ) from None
    from expertflow.engine.engine import Engine

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    bound = listening_socket(wanted)
    settings = {**settings, "batch": checked.batch, "sequences": checked.sequences}
    with bound, load(model, revision, settings) as llm:
        engine = Engine(llm, **seating)
        keys = "with a key" if wanted.api_key else "without a key"
        complete = serve_model(
            llm,
            engine,
            wanted,
            bound,
            started=lambda address: typer.echo(f"serving {llm.name} at {address}, {keys}", err=True),
        )
    if not complete:
        raise typer.Exit(1)
