"""`expertflow chat`: a conversation in the terminal, with a model here or with a server's, and live statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertflow.commands.flags import RevisionOption, takes
from expertflow.commands.session import load, stderr
from expertflow.config import Settings
from expertflow.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from expertflow.commands.speakers import Speaker


@takes(settings=Settings, sampling=SamplingParams)
def chat(
    settings: dict[str, Any],
    sampling: dict[str, Any],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="a folder, or owner/name on the Hugging Face hub", show_default=False
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="talk to a server instead, such as http://127.0.0.1:8000"),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="EXPERTFLOW_API_KEY",
            show_envvar=True,
            help="the server's key, if it has one",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="system message of the conversation")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue plain text, for models without a chat template")
    ] = False,
    revision: RevisionOption = None,
) -> None:
    """Talk to a model, and see what its expert cache does.

    Beneath each answer: tokens per second, hit ratio, how long arithmetic waited for bytes. /help lists what can be
    done in between.

    [bold]Examples[/bold]

      expertflow chat ./qwen-chat --memory 6GiB --predictor online

      expertflow chat --server http://127.0.0.1:8000

      expertflow chat ./mixtral-base --memory 20GiB --raw
    """
    if (model is None) == (server is None):
        raise ValueError("chat with whom? Give a MODEL, or --server URL; one of them")
    if raw and system is not None:
        raise ValueError(
            "--system is the first message of a conversation, and --raw has none; leave one of them out"
        )
    SamplingParams(**sampling)  # before seconds of loading
    if server is not None:
        if given := [*settings, *(["revision"] if revision is not None else [])]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(
                f"{flags}: that is for `expertflow serve` to be told; leave it out with --server"
            )
        from expertflow.commands.speakers import ServerModel

        _converse(ServerModel(server, api_key, sampling, raw=raw), system, raw)
    else:
        assert model is not None, "checked above"
        from expertflow.commands.speakers import LocalModel

        with load(model, revision, settings) as llm:
            _converse(LocalModel(llm, sampling, raw=raw), system, raw)


def _converse(speaker: Speaker, system: str | None, raw: bool) -> None:
    from rich.console import Console

    from expertflow.commands.answer_display import AnswerDisplay
    from expertflow.commands.conversation import Conversation

    speaker.check()
    show = AnswerDisplay(speaker, Console(), stderr())
    Conversation(speaker, system=system, show=show, remembers=not raw).run()
