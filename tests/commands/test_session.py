from __future__ import annotations

import gc
from pathlib import Path

import pytest

from expertflow import read_ahead
from expertflow.commands.session import check_can_write, checked_seating, importing_for
from expertflow.config import Settings


@pytest.fixture(autouse=True)
def collecting():
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("was_collecting", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_nobody_collects_garbage_during_imports_and_afterwards_it_is_as_before(
    was_collecting: bool, fails: bool, tmp_path: Path
) -> None:
    if not was_collecting:
        gc.disable()
    frozen = gc.get_freeze_count()
    try:
        with importing_for(tmp_path):
            assert not gc.isenabled()
            kept = [[] for _ in range(100)]
            if fails:
                raise ImportError("no torch")
    except ImportError:
        pass
    assert gc.isenabled() == was_collecting
    assert gc.get_freeze_count() >= frozen + len(kept)


def test_reading_begins_before_the_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(read_ahead, "read_early", asked.append)
    with importing_for(tmp_path):
        assert asked == [tmp_path]


@pytest.mark.parametrize(("heatmap", "timeline"), [("x.txt", None), (None, "x.foo"), ("x.png", "x")])
def test_figures_that_cannot_be_drawn_are_refused_at_once(
    heatmap: str | None, timeline: str | None, tmp_path: Path
) -> None:
    paths = [None if name is None else tmp_path / name for name in (heatmap, timeline)]
    with pytest.raises(ValueError, match=r"figures are drawn as .png, .svg or .pdf"):
        check_can_write(None, *paths)
    check_can_write(None, tmp_path / "x.SVG", tmp_path / "x.json")
    check_can_write(None, None, tmp_path / "x.pdf")


def test_patience_reaches_the_engine_under_auto_alone() -> None:
    settings = Settings(predictor="online")
    assert checked_seating("split", "auto", 2, settings) == {
        "execution": "split",
        "schedule": "auto",
        "patience": 2,
    }
    with pytest.raises(ValueError, match="--patience 0 is of --schedule auto"):
        checked_seating("joint", "fixed", 0, settings)
