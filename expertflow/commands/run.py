"""`expertflow run`: text, or a conversation, streamed to stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from expertflow.commands.conversation import Conversation
from expertflow.commands.flags import (
    ModelArgument,
    RevisionOption,
    StatsJsonOption,
    StatsOption,
    TimelineOption,
    takes,
)
from expertflow.commands.session import (
    check_can_write,
    load,
    report_run,
    sampling_params,
    saved_timeline,
    write_answer,
)
from expertflow.commands.speakers import LocalModel
from expertflow.config import Settings
from expertflow.engine.sampling import SamplingParams


@takes(settings=Settings, sampling=SamplingParams)
def run(
    model: ModelArgument,
    settings: dict[str, Any],
    sampling: dict[str, Any],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="text to continue; without it --file, or stdin")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="read the prompt from this file, without the newline at its end"),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="a conversation, by the model's chat template")
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="system message of the conversation")
    ] = None,
    revision: RevisionOption = None,
    stats: StatsOption = False,
    stats_json: StatsJsonOption = None,
    heatmap: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="draw how often each expert was used and read")
    ] = None,
    timeline: TimelineOption = None,
) -> None:
    """Generate text with a model that is larger than its memory budget.

    The text goes to stdout as it is written, everything else to stderr.

    [bold]Examples[/bold]

      expertflow run Qwen/Qwen1.5-MoE-A2.7B "Once upon a time" --memory 6GiB

      expertflow run ./mixtral --memory 20GiB --file question.txt --temperature 0.7 --seed 1 > answer.txt

      expertflow run ./qwen-chat --memory 6GiB --chat

      expertflow run ./qwen --cache-size 8 "Hello" --stats --heatmap experts.png
    """
    if system is not None and not chat:
        raise ValueError("--system is the first message of a conversation; add --chat, or leave it out")
    check_can_write(stats_json, heatmap, timeline)
    SamplingParams(**sampling)  # before seconds of loading
    text = _read_prompt(prompt, file, chat)
    with load(model, revision, settings) as llm, saved_timeline(llm, timeline):
        try:
            if chat:
                speaker = LocalModel(llm, sampling)
                speaker.check()  # before any waiting
                Conversation(speaker, system=system).run(text)
            else:
                assert text is not None, "without --chat there is a prompt"
                write_answer(llm, text, sampling_params(llm, sampling), "max_tokens" in sampling)
        finally:
            report_run(llm, stats, stats_json, heatmap)


def _read_prompt(prompt: str | None, file: Path | None, chat: bool) -> str | None:
    """None only in a conversation, whose turns are then read one by one."""
    if prompt is not None and file is not None:
        raise ValueError("a prompt and --file were both given; give one of them")
    if file is not None:
        try:
            return _without_last_newline(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8 ({error}); convert it (iconv -t UTF-8)") from None
    if prompt is not None or chat:
        return prompt
    if sys.stdin.isatty():
        raise ValueError(
            "no prompt: give it as an argument, with --file, or on stdin; or --chat for a conversation"
        )
    return _without_last_newline(sys.stdin.read())


def _without_last_newline(text: str) -> str:
    """As editors and `echo` end a text; one that the prompt is meant to have needs another after it."""
    return text.removesuffix("\n").removesuffix("\r")
