"""How an answer looks on a terminal: its text as it is written, and beneath it a line on what the cache does.

Lines that are finished are printed for good, so that a long answer scrolls and can be copied; only the last line
and the status beneath it are drawn again. Elsewhere than on a terminal the text alone is written.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from expertflow.commands.session import printable, write_pieces
from expertflow.commands.speakers import Meter, Speaker

if TYPE_CHECKING:
    from rich.console import Console

_DRAWN_SECONDS = 0.1
_COUNTED_SECONDS = 1.0


class AnswerDisplay:
    """Shows answers of one speaker; to be called with the pieces of each."""

    def __init__(self, speaker: Speaker, console: Console, status_console: Console):
        self._speaker = speaker
        self._console = console
        self._status_console = status_console

    def __call__(self, pieces: Iterable[str]) -> None:
        """Raises whatever comes out of `pieces`, KeyboardInterrupt too, after the line on the answer so far."""
        meter = Meter(self._speaker)
        try:
            if self._console.is_terminal and not self._console.is_dumb_terminal:
                self._draw(pieces, meter)
            else:
                write_pieces(_measured(pieces, meter))
        finally:
            meter.refresh()
            if self._status_console.is_terminal:
                self._status_console.print(str(meter), style="dim", highlight=False)

    def _draw(self, pieces: Iterable[str], meter: Meter) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.text import Text

        unfinished, drawn, counted = "", 0.0, time.perf_counter()
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            try:
                for piece in _measured(pieces, meter):
                    *lines, unfinished = (unfinished + printable(piece)).split("\n")
                    for line in lines:
                        self._print(line)
                    now = time.perf_counter()
                    if now - counted > _COUNTED_SECONDS:
                        meter.refresh()
                        counted = now
                    if lines or now - drawn > _DRAWN_SECONDS:
                        # Of a line longer than the screen, its end: the status beneath it stays in sight.
                        room = self._console.width * max(1, self._console.height - 3)
                        live.update(
                            Group(Text(unfinished[-room:]), Text(str(meter), style="dim")), refresh=True
                        )
                        drawn = now
            finally:
                live.update(Text(), refresh=True)
                self._print(unfinished)

    def _print(self, line: str) -> None:
        # The terminal wraps it: then it is copied as one line.
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _measured(pieces: Iterable[str], meter: Meter) -> Iterable[str]:
    for piece in pieces:
        meter.piece()
        yield piece
