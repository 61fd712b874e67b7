"""The results of a batch run on disk: written line by line as they come, and continued after a kill.

Beside OUT.jsonl lies OUT.jsonl.run while the batch is unfinished. It says which run the results are of, so that a
later one continues its own file and never another's, and it is locked, so that two never write at once.
"""

from __future__ import annotations

import fcntl
import json
import os
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

FORMAT = "expertflow-batch-1"


class BatchResults:
    """OUT.jsonl, opened to append. `done` has the ids that it holds results of, `failed` how many are errors.

    run: plain JSON that says what is run (input, model, sampling); a file of another run is refused. Raises
    FileExistsError for a file that is not ours, BlockingIOError while another process writes it, ValueError for
    one of another run: each names the file and the remedy.
    """

    def __init__(self, path: str | Path, run: dict[str, Any]):
        self.path = Path(path)
        self.marker = self.path.with_name(self.path.name + ".run")
        if not self.path.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"{self.path.absolute().parent} does not exist; make it, or write elsewhere"
            )
        self._lock = self._locked_marker()
        try:
            self._claim({"format": FORMAT, **run})
            self.done, self.failed = self._read_back()
            self._ended = False  # finished or closed
            self._file: FileIO = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except BaseException:
            self._lock.close()
            raise

    @property
    def continued(self) -> bool:
        return bool(self.done)

    def write(self, key: str, result: dict[str, Any], *, failed: bool = False) -> None:
        """Append one result, whole: a disk that is full leaves no half of a line behind.

        key: what `done` will know it by. Raises OSError with the remedy.
        """
        begin = self.path.stat().st_size
        left = memoryview((json.dumps(result, ensure_ascii=False) + "\n").encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            os.truncate(self.path, begin)
            raise OSError(
                error.errno,
                f"{error.strerror}; make room and give the same command to continue",
                str(self.path),
            ) from error
        self.done.add(key)
        self.failed += failed

    def finish(self) -> None:
        """Every line has its result: nothing is left to continue."""
        os.fsync(self._file.fileno())
        self.marker.unlink()
        self._ended = True

    def close(self) -> None:
        """Idempotent. A run that ends before its first result leaves no trace: nothing could be continued."""
        if not self._ended and not self.done:
            self.path.unlink(missing_ok=True)
            self.marker.unlink(missing_ok=True)
        self._ended = True
        self._file.close()
        self._lock.close()

    def __enter__(self) -> BatchResults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _locked_marker(self) -> TextIO:
        """The marker that lies there, made if need be, open and locked."""
        while True:
            if self.path.exists() and not self.marker.exists():
                raise self._not_ours()
            lock = open(self.marker, "a+", encoding="utf-8")  # noqa: SIM115 - held until close
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise BlockingIOError(
                    f"{self.path} is being written by another process; wait for it, or give another name"
                ) from None
            if os.fstat(lock.fileno()).st_nlink:
                return lock
            lock.close()  # its owner ended, and took it away, between our opening and locking it

    def _not_ours(self) -> FileExistsError:
        return FileExistsError(
            f"{self.path} exists and is no unfinished batch of ours (finished, or something else); give another name, "
            f"or remove it"
        )

    def _claim(self, run: dict[str, Any]) -> None:
        self._lock.seek(0)
        text = self._lock.read()
        if not text or not text.endswith("\n"):
            # New, or killed while it was written: then no result was. Results without a word of whose they are
            # come of a power cut, or of a run that finished since we looked for its marker.
            if self.path.exists() and self.path.stat().st_size:
                self.marker.unlink()
                raise self._not_ours()
            self._begin(run)
            return
        try:
            before = json.loads(text)
        except json.JSONDecodeError:
            before = {}
        if not isinstance(before, dict) or before.get("format") != FORMAT:
            raise ValueError(f"{self.marker} is not a run of ours; give another output name")
        if not self.path.exists() or not self.path.stat().st_size:  # it ended before its first result
            self._begin(run)
            return
        differing = sorted(key for key in before.keys() | run.keys() if before.get(key) != run.get(key))
        if differing:
            was = ", ".join(f"{key}={before.get(key)!r} (now {run.get(key)!r})" for key in differing)
            raise ValueError(
                f"{self.path} was begun with {was}; give the same to continue, or another output name"
            )

    def _begin(self, run: dict[str, Any]) -> None:
        self._lock.truncate(0)
        self._lock.write(json.dumps(run) + "\n")
        self._lock.flush()

    def _read_back(self) -> tuple[set[str], int]:
        """Ids and failures of what is there; a last line that a kill cut short is cut off."""
        done: set[str] = set()
        failed = 0
        if not self.path.exists():
            return done, failed
        with open(self.path, "r+b") as file:
            whole = 0
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    key, error = _key_of(json.loads(raw))
                except (ValueError, TypeError, AttributeError):
                    raise ValueError(
                        f"{self.path}, line {number}: not a result of ours; give another output name"
                    ) from None
                done.add(key)
                failed += error
                whole += len(raw)
            file.truncate(whole)
        return done, failed


def key_of(identity: str | None, line: int) -> str:
    """What a result is known by: its id, or its line where it has none of its own."""
    return f"id {identity}" if identity is not None else f"line {line}"


def _key_of(result: dict[str, Any]) -> tuple[str, bool]:
    if "custom_id" in result:
        return key_of(result["custom_id"], 0), result["response"]["status_code"] != 200
    return key_of(result["id"], result.get("line", 0)), "error" in result
