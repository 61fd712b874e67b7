"""`expertflow run --chat` and `expertflow chat` as a person has them: on a pseudo-terminal, with the embedded model."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEADLINE_SECONDS = 500.0  # of a test, on a machine whose time others take
AGAIN_SECONDS = 20.0

pytestmark = pytest.mark.timeout(600)
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """The command behind a pseudo-terminal; what it writes is read until the expected text is there."""

    def __init__(self, *arguments: object):
        pid, self.screen = pty.fork()
        if pid == 0:
            # A child of a shell's background job ignores SIGINT, and so would the command.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "expertflow.cli", *map(str, arguments)]
            os.execve(sys.executable, command, environment)
        self.pid = pid
        self.status: int | None = None
        self._unread = ""
        self._deadline = time.monotonic() + DEADLINE_SECONDS

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def leave(self, key: str) -> str:
        """Type it, and again if nothing happens, and read to the end.

        Python's readline misses a signal that comes after its prompt and before it waits for a key.
        """
        self.type(key)
        while not select.select([self.screen], [], [], AGAIN_SECONDS)[0]:
            assert time.monotonic() < self._deadline, "it does not end"
            self.type(key)
        return self.read_to_the_end()

    def read_until(self, expected: str) -> str:
        """What came before and with `expected`."""
        while expected not in self._unread:
            more = self._more()
            assert more, f"it ended without {expected!r}: {self._unread}"
            self._unread += more
        end = self._unread.index(expected) + len(expected)
        found, self._unread = self._unread[:end], self._unread[end:]
        return found

    def read_answer(self, characters: int) -> str:
        """At least so many characters."""
        while len(self._unread) < characters:
            more = self._more()
            assert more, f"it ended early: {self._unread}"
            self._unread += more
        found, self._unread = self._unread, ""
        return found

    def read_to_the_end(self) -> str:
        while more := self._more():
            self._unread += more
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        return self._unread

    def _more(self) -> str:
        """Empty when the command has ended."""
        left = self._deadline - time.monotonic()
        ready, _, _ = select.select([self.screen], [], [], max(0.0, left))
        assert ready, f"nothing more within {DEADLINE_SECONDS} s; so far: {self._unread}"
        try:
            return os.read(self.screen, 65536).decode(errors="replace").replace("\r\n", "\n")
        except OSError:  # how Linux says that the other side is closed
            return ""

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.screen)


def chat(*arguments: object) -> Terminal:
    flags = ["--chat", "--cache-size", 8, "--temperature", 0, "--ignore-eos"]
    return Terminal("run", ROOT / "models" / "tiny-moe", *flags, *arguments)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """At its first prompt; an answer has six tokens."""
    terminal = chat("--max-tokens", 6)
    yield terminal
    terminal.close()


def expected_answers(*turns: str) -> list[str]:
    """What the same conversation says through pipes."""
    flags = ["--chat", "--cache-size", "8", "--temperature", "0", "--ignore-eos", "--max-tokens", "6"]
    answers = subprocess.run(
        [sys.executable, "-m", "expertflow.cli", "run", str(ROOT / "models" / "tiny-moe"), *flags],
        input="".join(f"{turn}\n" for turn in turns),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=DEADLINE_SECONDS,
    )
    return answers.stdout.splitlines()


def test_two_turns_then_ctrl_d(terminal: Terminal) -> None:
    assert "Ctrl-D leaves, Ctrl-C stops an answer" in terminal.read_until("> ")
    shown = []
    for turn in ("Who was Moses?", "And then?"):
        terminal.type(f"{turn}\n")
        terminal.read_until(f"{turn}\n")  # the terminal's echo
        shown.append(terminal.read_until("> ").removesuffix("> "))
    terminal.type(CTRL_D)
    assert terminal.read_to_the_end().strip() == ""
    assert terminal.status == 0
    assert "".join(shown).split() == " ".join(expected_answers("Who was Moses?", "And then?")).split()
    assert all(answer.strip() for answer in shown)


def test_ctrl_c_stops_an_answer_and_leaves_at_the_prompt(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    terminal = chat("--max-tokens", 900, "--stats-json", saved)
    try:
        terminal.read_until("> ")
        for turn in ("Tell me a story.", "Once more."):  # after a stopped answer the conversation goes on
            terminal.type(f"{turn}\n")
            terminal.read_until(f"{turn}\n")
            terminal.read_answer(20)
            terminal.type(CTRL_C)
            terminal.read_until("\n> ")
        assert "Traceback" not in terminal.leave(CTRL_C)
        assert terminal.status == 130
    finally:
        terminal.close()
    # Both answers together are shorter than one that nobody stops.
    assert 0 < json.loads(saved.read_text())["timing"]["generated_tokens"] < 900


STATUS = re.compile(
    r"^6 tokens, [\d.]+ tokens/s, hit ratio [\d.]+%, stalled [\d.]+ s, first in [\d.]+ s$", re.MULTILINE
)


def test_chat_says_beneath_each_answer_what_the_cache_did() -> None:
    flags = ["--cache-size", 8, "--temperature", 0, "--ignore-eos", "--max-tokens", 6]
    terminal = Terminal("chat", ROOT / "models" / "tiny-moe", *flags)
    try:
        assert "/help says more" in terminal.read_until("> ")
        terminal.type("Who was Moses?\n")
        terminal.read_until("Who was Moses?\n")
        answer = terminal.read_until("> ")
        assert STATUS.search(answer), answer
        assert (
            STATUS.sub("", answer).removesuffix("> ").split() == expected_answers("Who was Moses?")[0].split()
        )
        terminal.type("/set max_tokens 900\n")
        terminal.read_until("> ")
        terminal.type("Tell me a story.\n")
        terminal.read_until("Tell me a story.\n")
        terminal.read_answer(40)
        terminal.type(CTRL_C)
        assert re.search(r"\d+ tokens, .* first in", terminal.read_until("\n> "))
        terminal.type("/history\n")
        told = terminal.read_until("\n> ")
        assert "user: Who was Moses?" in told
        assert "user: Tell me a story." in told
        terminal.type("/stats\n")
        assert "experts by layer (48 of 192 held" in terminal.read_until("\n> ")
        terminal.type(CTRL_D)
        assert terminal.read_to_the_end().strip() == ""
        assert terminal.status == 0
    finally:
        terminal.close()
