"""A file that cannot be written whole leaves what was there, and says which it was."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from expertflow.commands.flags import message_of
from expertflow.whole_file import write_whole


def test_it_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("one", "two"):
        write_whole(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_cannot_be_written_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "before")

    def half(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text.encode(encoding)[:3])
        raise error

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(type(error)) as raised:
        write_whole(path, "afterwards")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "before"
    if isinstance(raised.value, OSError):
        assert message_of(raised.value) == (
            f"{path}: No space left on device; free some room, or name a place on another disk"
        )


def test_an_error_without_a_file_has_its_remedy_too() -> None:
    """As of standard output."""
    message = message_of(OSError(errno.ENOSPC, "No space left on device"))
    assert message == "No space left on device; free some room, or name a place on another disk"
