"""What a conversation remembers, which commands it has, and how an answer is shown; the speaker here is a script."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from expertflow.commands import conversation as module
from expertflow.commands.answer_display import AnswerDisplay
from expertflow.commands.conversation import Conversation
from expertflow.commands.session import printable
from expertflow.commands.speakers import Counters, Message, Meter


class Scripted:
    """Says "one", "two", ...; a message "stop" is interrupted after the first piece, "fail" goes wrong."""

    name = "script"

    def __init__(self) -> None:
        self.sampling: dict[str, Any] = {}
        self.heard: list[list[Message]] = []
        self.now = Counters(0, 0, 0, 0.0)

    def check(self) -> None:
        pass

    def answer(self, messages: list[Message]) -> Iterator[str]:
        self.heard.append(list(messages))
        yield "one "
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        if messages[-1]["content"] == "fail":
            raise ValueError("too long for the context")
        yield "two\nthree"

    def counters(self) -> Counters:
        return self.now

    def tables(self) -> list[Table]:
        return [Table("all about the cache")]


@pytest.fixture
def speaker() -> Scripted:
    return Scripted()


def converse(speaker: Scripted, monkeypatch: pytest.MonkeyPatch, *turns: str, **options: Any) -> None:
    """As on a terminal."""
    left = iter(turns)
    monkeypatch.setattr(module, "_read_turn", lambda interactive: next(left, None))
    talk = Conversation(speaker, show=list, **options)
    monkeypatch.setattr(talk, "_interactive", True)
    talk.run()


def said(heard: list[Message]) -> list[str]:
    return [message["content"] for message in heard]


def test_what_was_said_is_remembered_also_when_it_was_stopped(speaker, monkeypatch):
    converse(speaker, monkeypatch, "hello", "stop", "and?", system="Be brief.")
    assert said(speaker.heard[1]) == ["Be brief.", "hello", "one two\nthree", "stop"]
    assert said(speaker.heard[2]) == ["Be brief.", "hello", "one two\nthree", "stop", "one ", "and?"]


def test_what_went_wrong_is_told_and_forgotten(speaker, monkeypatch, capsys):
    converse(speaker, monkeypatch, "fail", "and?")
    assert "error: too long for the context; /clear starts over" in capsys.readouterr().err
    assert said(speaker.heard[1]) == ["and?"]


def test_without_memory_each_message_stands_alone(speaker, monkeypatch):
    converse(speaker, monkeypatch, "hello", "and?", remembers=False)
    assert said(speaker.heard[1]) == ["and?"]


@pytest.mark.parametrize("command", ["/clear", "/reset"])
def test_clear_starts_over(speaker, monkeypatch, command):
    converse(speaker, monkeypatch, "hello", command, "and?", system="Be brief.")
    assert said(speaker.heard[1]) == ["Be brief.", "and?"]


@pytest.mark.parametrize("command", ["/quit", "/exit"])
def test_quit_leaves(speaker, monkeypatch, command):
    converse(speaker, monkeypatch, command, "hello")
    assert not speaker.heard


def test_set_changes_the_next_answers(speaker, monkeypatch, capsys):
    converse(
        speaker, monkeypatch, "/set temperature 0.5", "/set max_tokens 7", "/set seed 1", "/set seed", "/set"
    )
    assert speaker.sampling == {"temperature": 0.5, "max_tokens": 7}
    assert "temperature 0.5, max_tokens 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("/set temperature -1", "temperature=-1.0 must be a number at least 0"),
        ("/set temperature warm", "temperature='warm' is no number"),
        ("/set max_tokens 1.5", "max_tokens='1.5' is no whole number"),
        ("/set n 2", "with one of temperature, top_p"),
        ("/sett", "/sett is no command; there are /clear, /set"),
    ],
)
def test_a_wrong_command_is_told(speaker, monkeypatch, capsys, command, told):
    converse(speaker, monkeypatch, command)
    assert told in capsys.readouterr().err
    assert not speaker.sampling
    assert not speaker.heard


def test_a_path_is_no_command(speaker, monkeypatch):
    converse(speaker, monkeypatch, "/etc/hosts is where?", " ")
    assert said(speaker.heard[0]) == ["/etc/hosts is where?"]


def test_help_history_and_stats_go_to_stderr(speaker, monkeypatch, capsys):
    converse(speaker, monkeypatch, "hello", "/history", "/help", "/stats")
    out, err = capsys.readouterr()
    assert not out
    for text in ("user: hello\nassistant: one two\nthree", "/set temperature 0.7", "all about the cache"):
        assert text in err


def test_an_answer_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\x07\x9b1mc\r\x7f\td\ne\u00e9") == "a[2Jb1mc\td\ne\u00e9"


def test_the_meter_counts_this_answer_alone(speaker):
    speaker.now = Counters(tokens=100, hits=10, misses=10, stall_seconds=5.0)
    meter = Meter(speaker)
    assert str(meter) == "0 tokens, stalled 0.00 s"
    meter.piece()
    meter.piece()
    speaker.now = Counters(tokens=104, hits=16, misses=12, stall_seconds=5.25)
    meter.refresh()
    for text in ("4 tokens, ", " tokens/s, ", "hit ratio 75.0%, stalled 0.25 s, first in 0.0"):
        assert text in str(meter)


def screen(width: int = 40) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=10, color_system=None, _environ={}
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines_after(text: str) -> list[str]:
    """What a terminal shows after these characters: new lines, returns, lines erased, steps upwards."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[?\d]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif part[0] not in "\r\x1b":
            lines[row] += part
    return [line.rstrip() for line in lines if line.strip()]


def test_an_answer_is_drawn_with_its_status_beneath(speaker):
    text, status = screen(80), screen(100)
    AnswerDisplay(speaker, text, status)(speaker.answer([{"role": "user", "content": "hello"}]))
    everything = written(text)
    first_drawn = lines_after(everything[: everything.index("\x1b[2K")])
    assert first_drawn[0] == "one"
    assert first_drawn[1].startswith("1 token, stalled 0.00 s")
    assert lines_after(everything) == ["one two", "three"]
    assert written(status).startswith("2 tokens")


def test_a_stopped_answer_stays_on_the_screen(speaker):
    text, status = screen(), screen(100)
    with pytest.raises(KeyboardInterrupt):
        AnswerDisplay(speaker, text, status)(speaker.answer([{"role": "user", "content": "stop"}]))
    assert "one" in written(text)
    assert written(status).startswith("1 token,")
