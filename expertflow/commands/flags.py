"""Flags of commands, made from the dataclasses that hold the values; and how a command ends after an error.

No value is repeated here: a field with its help is a flag.
"""

from __future__ import annotations

import errno
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from expertflow.config import Settings

EXIT_ERROR = 2
DEFAULT_MAX_TOKENS = 256
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="a folder, or owner/name on the Hugging Face hub", show_default=False
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="branch, tag or commit of a hub model", show_default="main", metavar="NAME")
]
TimelineOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="save what ran when: .json for Perfetto (ui.perfetto.dev), .png or .svg for the last steps as a figure",
    ),
]
SETTING_HELP = {entry.name: entry.metadata["help"] for entry in fields(Settings)}


StatsOption = Annotated[bool, typer.Option("--stats", help="print statistics and the memory plan at the end")]
StatsJsonOption = Annotated[Path | None, typer.Option(metavar="FILE", help="save the statistics as JSON")]
ExecutionOption = Annotated[
    str,
    typer.Option(
        metavar="joint|split",
        help="the batches of a unit side by side, sharing experts, or one after the other",
    ),
]
ScheduleOption = Annotated[
    str,
    typer.Option(
        metavar="fixed|auto",
        help="seat sequences in order of arrival, or those together whose predicted experts are alike (with a "
        "--predictor)",
    ),
]
PatienceOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="with --schedule auto: how many that came later may begin before one that waits; four times as many as "
        "are held if not given",
        show_default=False,
    ),
]


def takes(**groups: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one flag per field of each dataclass, and clean errors.

    groups: parameter name of the command -> dataclass. The command gets a dict of the flags that were given;
    those left out are absent, so defaults stay where they are defined. Adds --debug as well.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        kept = [parameter for parameter in signature.parameters.values() if parameter.name not in groups]
        flags = {name: list(_flags(group, _PANELS[name])) for name, group in groups.items()}
        debug = inspect.Parameter(
            "debug",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--debug", help="show the traceback of an error")],
        )

        @functools.wraps(command)
        def wrapper(*, debug: bool, **values: Any) -> None:
            for name, parameters in flags.items():
                given = {parameter.name: values.pop(parameter.name) for parameter in parameters}
                values[name] = {key: value for key, value in given.items() if value not in (None, [])}
            try:
                command(**values)
            except BrokenPipeError:  # `expertflow run ... | head`; typer leaves quietly
                raise
            except (ValueError, OSError) as error:
                if debug:
                    raise
                typer.echo(f"error: {message_of(error)}", err=True)
                raise typer.Exit(EXIT_ERROR) from None

        parameters = [*kept, *(flag for group in flags.values() for flag in group), debug]
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        wrapper.__signature__ = signature.replace(parameters=keyword_only)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in keyword_only}
        return wrapper

    return decorate


_REMEDIES = {
    errno.ENOENT: "check the spelling",
    errno.ENOTDIR: "a part of this path is no folder",
    errno.EISDIR: "name a file in it",
    errno.EACCES: "allow reading or writing there, or name another place",
    errno.EPERM: "allow reading or writing there, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOSPC: "free some room, or name a place on another disk",
    errno.EDQUOT: "free some room, or name a place on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or name a place on another disk",
    errno.ENAMETOOLONG: "shorten it",
}


def message_of(error: ValueError | OSError) -> str:
    """What a user is told. An error straight from the system names its file first and gets a remedy."""
    if isinstance(error, OSError) and error.errno is not None:
        named = f"{error.filename}: " if error.filename is not None else ""
        remedy = _REMEDIES.get(error.errno)
        told = remedy is None or ";" in str(error.strerror)  # where it was raised, by who knows a better one
        return f"{named}{error.strerror}" + ("" if told else f"; {remedy}")
    return str(error).strip() or type(error).__name__


_PANELS = {
    "settings": "Memory",
    "sampling": "Sampling",
    "tracing": "Recording",
    "sizes": "Predictor",
    "training": "Training",
    "server": "Server",
}
# `run` streams one answer, as text; these belong to LLM.generate, batch files and the server.
_NO_FLAG = {"n", "logit_bias", "logprobs"}
# Flags with more than the field's own name.
_FLAG_NAMES = {"batch": ("--batch", "--batch-size")}


def _flags(group: type[Any], panel: str) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group)
    for entry in fields(group):
        if entry.name in _NO_FLAG:
            continue
        shown: str | bool = str(entry.default) if entry.default not in (None, ()) else False
        if panel == "Sampling":
            shown = _SAMPLING_DEFAULTS.get(entry.name, shown)
        names = _FLAG_NAMES.get(entry.name, ())
        option = typer.Option(*names, help=entry.metadata["help"], rich_help_panel=panel, show_default=shown)
        yield inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_flag_type(hints[entry.name], repeatable=entry.default == ()), option],
        )


# The command leaves sampling to the checkpoint where LLM.generate's SamplingParams() has vLLM's defaults.
_SAMPLING_DEFAULTS: dict[str, str | bool] = {
    **dict.fromkeys(
        ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"), "what the checkpoint recommends"
    ),
    "max_tokens": f"{DEFAULT_MAX_TOKENS}, or what the context holds",
    "ignore_eos": False,
}


def _flag_type(hint: Any, repeatable: bool) -> Any:
    """The one type of a field that a command line can give: `str | int | None` is str, given as text."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = [option for option in options if option in (bool, int, float, str)]
    if repeatable:
        element = plain[0] if plain else get_args(options[0])[0]
        return list[element] | None  # type: ignore[valid-type]
    return plain[0] | None
