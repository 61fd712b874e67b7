"""A conversation on the terminal or through pipes: turns, commands that start with a slash, and what is remembered.

Who speaks is told (speakers.py), how an answer looks too (answer_display.py).
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any

import typer

from expertflow.commands.session import stderr, write_pieces
from expertflow.commands.speakers import Message, Speaker
from expertflow.engine.sampling import SamplingParams

COMMANDS = {
    "/clear": "start over (/reset is the same)",
    "/set": "/set temperature 0.7: how the next answers are sampled; /set temperature: as recommended",
    "/stats": "what the expert cache did so far",
    "/history": "the conversation so far",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}
_ALIASES = {"/reset": "/clear", "/exit": "/quit"}
_COMMAND = re.compile(r"/[a-z]+(\s|$)")  # "/etc/hosts is where?" is none
_SETTABLE = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_tokens", "seed",
)  # fmt: skip

Show = Callable[[Iterable[str]], object]


class Conversation:
    """Turns until end of input. On a terminal Ctrl-C stops an answer, and leaves at the prompt.

    show: writes pieces of an answer as they come. remembers: whether the model is told what was said before.
    """

    def __init__(
        self,
        speaker: Speaker,
        *,
        system: str | None = None,
        show: Show = write_pieces,
        remembers: bool = True,
    ):
        self._speaker = speaker
        self._start: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self._messages = list(self._start)
        self._show = show
        self._remembers = remembers
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self, first: str | None = None) -> None:
        """first: the user's first message. Errors of an answer are told on a terminal, and end it through pipes."""
        if self._interactive:
            typer.echo(
                "Ctrl-D leaves, Ctrl-C stops an answer, /clear starts over, /help says more.", err=True
            )
        turns = iter(functools.partial(_read_turn, self._interactive), None)
        if first is not None:
            turns = iter([first]) if not self._interactive and sys.stdin.isatty() else _chain(first, turns)
        for turn in turns:
            if turn.strip() in ("/quit", "/exit"):
                return
            try:
                if _COMMAND.match(turn.strip()):
                    self._obey(*turn.split())
                elif turn.strip():
                    self._say(turn)
            except (ValueError, OSError) as error:
                if not self._interactive:
                    raise
                hint = "; /clear starts over" if "context" in str(error) else ""
                typer.echo(f"error: {error}{hint}", err=True)

    def _say(self, text: str) -> None:
        said: Message = {"role": "user", "content": text}
        pieces: list[str] = []
        try:
            self._show(_kept(self._speaker.answer([*self._messages, said]), pieces))
        except KeyboardInterrupt:
            if not self._interactive:
                raise
        if pieces and self._remembers:  # what was stopped was said as well
            self._messages += [said, {"role": "assistant", "content": "".join(pieces)}]

    def _obey(self, command: str, *arguments: str) -> None:
        command = _ALIASES.get(command, command)
        if command == "/clear":
            self._messages = list(self._start)
        elif command == "/set":
            self._set(*arguments)
        elif command == "/stats":
            for table in self._speaker.tables():
                stderr().print(table)
        elif command == "/history":
            for message in self._messages:
                typer.echo(f"{message['role']}: {message['content']}", err=True)
        elif command == "/help":
            for name, meaning in COMMANDS.items():
                typer.echo(f"{name:<9} {meaning}", err=True)
        else:
            raise ValueError(f"{command} is no command; there are {', '.join(COMMANDS)}")

    def _set(self, name: str | None = None, value: str | None = None, *more: str) -> None:
        sampling = self._speaker.sampling
        if name is None:
            typer.echo(
                ", ".join(f"{key} {value}" for key, value in sampling.items()) or "all as recommended",
                err=True,
            )
            return
        if name not in _SETTABLE or more:
            raise ValueError(
                f"/set {name!r} cannot be; write /set NAME VALUE, with one of {', '.join(_SETTABLE)}"
            )
        if value is None:
            sampling.pop(name, None)
            return
        number = _number(name, value)
        changed: dict[str, Any] = {name: number}
        SamplingParams(**changed)  # wrong values are told at once
        sampling[name] = number


def _number(name: str, text: str) -> float | int:
    whole = {entry.name: "int" in str(entry.type) for entry in fields(SamplingParams)}[name]
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is no {'whole ' if whole else ''}number") from None


def _kept(pieces: Iterator[str], into: list[str]) -> Iterator[str]:
    for piece in pieces:
        into.append(piece)
        yield piece


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _read_turn(interactive: bool) -> str | None:
    """One line of the user's, None at the end of input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import readline  # noqa: F401  # gives input() history and editing

    try:
        return input("> ")
    except EOFError:
        typer.echo()
        return None
