"""Results of a batch survive kills, full disks and second thoughts."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from expertflow.engine import batch_results
from expertflow.engine.batch_file import CHAT, LineError, error_line
from expertflow.engine.batch_results import FORMAT, BatchResults, key_of

RUN = {"input": "abc", "model": "m"}


def write(results: BatchResults, *ids: str) -> None:
    for identity in ids:
        results.write(key_of(identity, 1), {"id": identity, "text": "ü"})


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_results_are_there_at_once_and_a_later_run_continues(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with BatchResults(path, RUN) as results:
        assert not results.continued
        write(results, "a", "b")
        assert ids(path) == ["a", "b"]
    with BatchResults(path, RUN) as results:
        assert results.continued
        assert results.done == {"id a", "id b"}
        write(results, "c")
        results.finish()
    assert ids(path) == ["a", "b", "c"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_cut_short_by_a_kill_is_done_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    with BatchResults(path, RUN) as results:
        write(results, "a", "b")
    os.truncate(path, path.stat().st_size - cut)
    with BatchResults(path, RUN) as results:
        assert results.done == {"id a"}
        write(results, "b")
    assert ids(path) == ["a", "b"]


def test_a_marker_cut_short_by_a_kill_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.run").write_text('{"format": "exp')
    with BatchResults(path, RUN) as results:
        write(results, "a")
    with BatchResults(path, RUN) as results:
        assert results.done == {"id a"}


@pytest.mark.parametrize("marker", ["", '{"format": "exp'])
def test_results_without_a_word_of_whose_they_are_are_left_alone(tmp_path: Path, marker: str) -> None:
    """After a power cut: any run was taken for the one that wrote them."""
    path = tmp_path / "out.jsonl"
    with BatchResults(path, RUN) as results:
        write(results, "a")
    (tmp_path / "out.jsonl.run").write_text(marker)
    before = path.read_text()
    with pytest.raises(FileExistsError, match="no unfinished batch of ours"):
        BatchResults(path, {"model": "other"})
    assert path.read_text() == before


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_run_that_finishes_while_another_looks_keeps_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Its results were taken for those of the other, which appended its own."""
    path = tmp_path / "out.jsonl"
    first = BatchResults(path, RUN)
    write(first, "a")

    def ends() -> None:
        monkeypatch.undo()
        first.finish()
        first.close()

    def opening(*args: Any, **kwargs: Any) -> Any:
        if moment == "before it is opened":
            ends()
            return open(*args, **kwargs)
        file = open(*args, **kwargs)  # noqa: SIM115
        ends()
        return file

    monkeypatch.setattr(batch_results, "open", opening, raising=False)
    with pytest.raises(FileExistsError, match="no unfinished batch of ours"):
        BatchResults(path, {"model": "other"})
    assert ids(path) == ["a"]
    assert [at.name for at in tmp_path.iterdir()] == ["out.jsonl"]


def test_failures_are_known_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    errors = [LineError(3, "no JSON"), LineError(4, "empty", "x"), LineError(5, "too long", "y", CHAT)]
    with BatchResults(path, RUN) as results:
        for error in errors:
            results.write(key_of(error.id, error.line), error_line(error), failed=True)
        write(results, "a")
        assert results.failed == 3
    with BatchResults(path, RUN) as results:
        assert results.done == {"line 3", "id x", "id y", "id a"}
        assert results.failed == 3


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    with pytest.raises(FileExistsError, match=r"no unfinished batch of ours .*; give another name"):
        BatchResults(path, RUN)
    (tmp_path / "out.jsonl.run").write_text(json.dumps({"format": "expertflow-batch-1", **RUN}) + "\n")
    with pytest.raises(ValueError, match="line 1: not a result of ours"):
        BatchResults(path, RUN)
    assert path.read_text() == "precious\n"


@pytest.mark.parametrize("marker", ["[]\n", '{"format": "other"}\n', "nonsense\n"])
def test_a_marker_that_is_not_ours_is_left_alone(tmp_path: Path, marker: str) -> None:
    (tmp_path / "out.jsonl.run").write_text(marker)
    with pytest.raises(ValueError, match=r"out\.jsonl\.run is not a run of ours"):
        BatchResults(tmp_path / "out.jsonl", RUN)
    assert (tmp_path / "out.jsonl.run").read_text() == marker


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with BatchResults(path, RUN) as results:
        write(results, "a")
    with pytest.raises(ValueError, match=r"was begun with model='m' \(now 'n'\); give the same"):
        BatchResults(path, RUN | {"model": "n"})


def test_a_run_that_ends_before_its_first_result_leaves_nothing_to_be_mistaken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(FileNotFoundError), BatchResults(path, RUN | {"model": "mistyped"}):
        raise FileNotFoundError("there is no such model")
    assert not list(tmp_path.iterdir())
    # Killed: nobody could tidy up.
    path.touch()
    path.with_name("out.jsonl.run").write_text(
        json.dumps({"format": FORMAT, **RUN, "model": "mistyped"}) + "\n"
    )
    with BatchResults(path, RUN) as results:
        write(results, "a")
    with BatchResults(path, RUN) as results:
        assert results.done == {"id a"}


def test_a_run_without_a_line_leaves_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with BatchResults(path, RUN) as results:
        results.finish()
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; make it"):
        BatchResults(tmp_path / "no" / "out.jsonl", RUN)


def _open_and_report(path: Path, queue: Any) -> None:
    try:
        BatchResults(path, RUN)
    except BlockingIOError as error:
        queue.put(str(error))
    else:
        queue.put("opened")


def test_two_never_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with BatchResults(path, RUN):
        process = context.Process(target=_open_and_report, args=(path, queue))
        process.start()
        assert "another process" in queue.get(timeout=120)
        process.join()


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with BatchResults(path, RUN) as results:
        write(results, "a")
        real = results._file

        class Full:
            def write(self, data: memoryview) -> int:
                if len(data) > 10:
                    return real.write(data[:10])
                raise OSError(errno.ENOSPC, "No space left on device")

            def close(self) -> None:
                real.close()

        results._file = Full()  # type: ignore[assignment]
        with pytest.raises(OSError, match="No space left on device; make room and give the same command"):
            results.write("id b", {"id": "b", "text": "x" * 9})
    assert ids(path) == ["a"]
    with BatchResults(path, RUN) as results:
        assert results.done == {"id a"}
