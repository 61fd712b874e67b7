"""Items of the paper: kept through kills, chosen by name, and what a page says of them."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest

from benchmarks.paper import __main__ as program
from benchmarks.paper import results, workers
from benchmarks.paper.item import Item, Part, Result, Section, Settings, Skipped, Table, Target
from benchmarks.paper.items import ITEMS
from benchmarks.paper.page import page, verdict


def item(made: list[str], fails_at: str | None = None, conditions: dict | None = None) -> Item:
    """Three parts that note that they ran."""

    def part(name: str) -> Part:
        def make(say):
            if name == fails_at:
                raise KeyboardInterrupt
            made.append(name)
            return [{"name": name, "value": len(name)}]

        return Part(name, make)

    def section(result: Result) -> Section:
        return Section("one, two and three.", ["A note."], [Table("All", ("name",), [("x|y",)])])

    def parts(settings: Settings) -> list[Part]:
        return [part(name) for name in "abc"]

    return Item("fig0", "simulated", "Fig. 0: nothing", lambda settings: conditions or {}, parts, section)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    """Parts that were made before the kill are read, not made again, and nothing half-written is left."""
    settings, made = Settings(out=tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        results.run(item(made, fails_at="b"), settings, print)
    kept = results.load(tmp_path / "fig0-simulated.json")
    assert made == ["a"]
    assert not kept.complete
    assert [row["name"] for row in kept.rows] == ["a"]
    done = results.run(item(made), settings, print)
    assert made == ["a", "b", "c"]
    assert done.complete
    assert results.load(tmp_path / "fig0-simulated.json").rows == done.rows
    assert [path.name for path in tmp_path.iterdir()] == ["fig0-simulated.json"]
    results.run(item(made), settings, print)
    assert made == ["a", "b", "c"], "a finished item was made again"


def test_other_conditions_begin_anew(tmp_path):
    settings, made, said = Settings(out=tmp_path), [], []
    results.run(item(made, conditions={"steps": 3}), settings, print)
    results.run(item(made, conditions={"steps": 4}), settings, said.append)
    assert made == [*"abc", *"abc"]
    assert "other conditions" in said[0]


def test_a_quick_run_leaves_a_whole_one_alone(tmp_path):
    made: list[str] = []
    whole = results.run(item(made), Settings(out=tmp_path), print)
    results.run(item(made), Settings(out=tmp_path, quick=True), print)
    assert made == [*"abc", *"abc"]
    assert results.load(tmp_path / "fig0-simulated.json") == whole
    assert results.load(tmp_path / "quick" / "fig0-simulated.json").conditions["quick"]


def test_what_cannot_run_here_says_why_on_the_page(tmp_path):
    def parts(settings):
        raise Skipped("30 GB of disk are needed and 2 are free")

    skipped = Item("big", "measured", "Big", lambda s: {}, parts, lambda result: Section("nothing"))
    found = results.run(skipped, Settings(out=tmp_path), print)
    assert "- big, measured: 30 GB of disk are needed and 2 are free" in page([(skipped, found)], [], {})


def test_a_file_that_is_no_result_is_refused(tmp_path):
    path = tmp_path / "fig0-simulated.json"
    path.write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match=r"is no result of this program .* delete it"):
        results.load(path)


def target(**given) -> Target:
    return Target(**{"name": "speed", "asked": 2.0, "got": 1.5, "unit": "x", "at": "CS=4", **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"got": 2.0}, "2.00x where the paper has 2.00x (CS=4)."),
        ({"got": 1.996}, "2.00x where the paper has 2.00x (CS=4)."),
        ({}, "1.50x where the paper has 2.00x, so we fall short (CS=4); no bound is known."),
        ({"bound": 3.0, "bound_name": "belady"},
         "1.50x where the paper has 2.00x, so we fall short (CS=4); belady reaches 3.00x here, so the rest is ours "
         "to find."),
        ({"bound": 1.8, "bound_name": "belady"},
         "1.50x where the paper has 2.00x, so we fall short (CS=4); belady reaches no more than 1.80x "
         "under these conditions."),
        ({"lower_is_better": True, "unit": "GB"}, "1.50 GB where the paper has 2.00 GB (CS=4)."),
        ({"got": 2.5, "lower_is_better": True, "unit": "GB", "bound": 2.2, "bound_name": "no slot"},
         "2.50 GB where the paper has 2.00 GB, so we fall short (CS=4); no slot reaches no more than 2.20 GB "
         "under these conditions."),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_numbers(given, said):
    assert verdict(target(**given)) == said


GOLDEN = """## What was to be reached

|  | number | the paper | ours | bound |  |
| --- | --- | --- | --- | --- | --- |
| [fig0](#fig-0-nothing), simulated | speed | 2.00x | 1.50x | 1.80x (belady) | **not met** |
| [fig0](#fig-0-nothing), simulated | memory | 2.00 GB | 1.50 GB |  | met |

Bound: what a cache that knows all that comes reaches under the same conditions, or plain arithmetic, as named in \
brackets. Each section has a sentence on what is not met.

## Fig. 0: nothing

**The paper:** one, two and three.

### Simulated

Simulated: recorded routes on a virtual clock. No figure of this section was taken by a clock.

![Fig. 0: nothing, simulated](figures/paper/fig0.png)

**All**

| name |
| --- |
| x\\|y |

A note.

speed: 1.50x where the paper has 2.00x, so we fall short (CS=4); belady reaches no more than 1.80x \
under these conditions.

<sub>commit abc, seed 0, 2026-11-22T18:00+00:00, 2 s on 2 cores of P, torch 2; `fig0-simulated.json` has every row</sub>

## Not on this page

- fig1, simulated: not made; `python -m benchmarks.paper --only fig1 --mode simulated`
"""


def test_the_page_of_kept_results_is_as_it_was():
    targets = [
        target(bound=1.8, bound_name="belady"),
        target(name="memory", unit="GB", lower_is_better=True),
    ]

    def section(result: Result) -> Section:
        return Section("one, two and three.", ["A note."], [Table("All", ("name",), [("x|y",)])], targets)

    made = Item("fig0", "simulated", "Fig. 0: nothing", lambda s: {}, lambda s: [], section)
    missing = Item("fig1", "simulated", "Fig. 1: nothing", lambda s: {}, lambda s: [], section)
    about = {"commit": "abc", "seed": 0, "finished": "2026-11-22T18:00+00:00"}
    about["machine"] = {"cores": 2, "processor": "P", "torch": "2"}
    parts = {"a": {"rows": [{"value": 1}], "seconds": 2.2}}
    result = Result("fig0", "simulated", "", {"quick": False}, parts, about, True)
    text = page([(made, result)], [missing], {"fig0-simulated.json": ["figures/paper/fig0.png"]})
    assert text.partition("never mixed.\n\n")[2] == GOLDEN


def test_an_unfinished_item_and_a_quick_page_are_called_so(tmp_path):
    made: list[str] = []
    fig0 = item(made, fails_at="b")
    with pytest.raises(KeyboardInterrupt):
        results.run(fig0, Settings(out=tmp_path, quick=True), print)
    found = results.load(tmp_path / "quick" / "fig0-simulated.json")
    text = page([(fig0, found)], [], {})
    assert "**Unfinished: the run was stopped; the same command goes on.**" in text
    assert "**This page is of a `--quick` run: few conditions, untrained predictors.**" in text


def test_items_are_chosen_by_name_and_mode():
    assert [i.name for i in program.choose(ITEMS, "table1,fig8", None)] == ["table1", "fig8"]
    assert {i.mode for i in program.choose(ITEMS, "fig6", None)} == {"simulated", "measured"}
    assert [i.mode for i in program.choose(ITEMS, "fig6", "measured")] == ["measured"]
    with pytest.raises(
        ValueError, match=r"--only fig99: no such table or figure; known: table1, .*fig6.*table2"
    ):
        program.choose(ITEMS, "fig6,fig99", None)
    with pytest.raises(
        ValueError, match=r"--mode measured: table1 is not made in this way; there is counted"
    ):
        program.choose(ITEMS, "table1", "measured")


def test_every_item_has_a_place_of_its_own():
    assert len({item.file_name for item in ITEMS}) == len(ITEMS)


def test_ctrl_c_leaves_what_is_finished(tmp_path, monkeypatch):
    made: list[str] = []
    monkeypatch.setattr(program, "ITEMS", (item(made, fails_at="b"),))
    assert program.main(["-o", str(tmp_path)]) == 130
    assert len(results.load(tmp_path / "fig0-simulated.json").parts) == 1


def test_one_item_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def missing(settings):
        raise ValueError("zoo/traces has no recording")

    made: list[str] = []
    broken = Item("broken", "simulated", "Broken", lambda s: {}, missing, lambda result: Section("nothing"))
    monkeypatch.setattr(program, "ITEMS", (broken, item(made)))
    assert program.main(["-o", str(tmp_path)]) == 1
    assert made == [*"abc"]
    assert "broken, simulated: failed: zoo/traces has no recording" in capsys.readouterr().err
    assert "Fig. 0" in (tmp_path / "results.md").read_text()
    json.loads((tmp_path / "fig0-simulated.json").read_text())


def test_a_page_keeps_what_an_earlier_run_put_on_it(tmp_path: Path) -> None:
    """Made by two runs of one item each, from folders of their own."""
    one, other = item([]), replace(item([]), name="fig1", title="Fig. 1: nothing")
    path = tmp_path / "docs" / "results.md"
    for number, made in enumerate((one, other)):
        settings = Settings(out=tmp_path / str(number))
        results.run(made, settings, print)
        program.write_page([one, other], settings, path)
    assert "not made" not in path.read_text()
    kept = sorted(found.name for found in (path.parent / "results").iterdir())
    assert kept == ["fig0-simulated.json", "fig1-simulated.json"]
    quick = Settings(out=tmp_path / "2", quick=True)
    program.write_page([one, other], quick, path)
    assert path.read_text().count("not made") == 2, "a quick page has nothing of a whole run"


def test_parts_made_in_several_processes_are_those_made_in_one(tmp_path: Path) -> None:
    (fig8,) = (item for item in ITEMS if item.name == "fig8")
    alone = results.run(fig8, Settings(out=tmp_path / "alone", quick=True), print)
    steps: list[tuple[int, int]] = []
    settings = Settings(out=tmp_path / "together", quick=True)
    together = results.run(fig8, settings, print, lambda done, of: steps.append((done, of)), jobs=2)
    assert together.rows == alone.rows
    assert list(together.parts) == list(alone.parts), "in the order of the item"
    assert len(alone.parts) > 1
    assert steps == [(done, len(alone.parts)) for done in range(len(alone.parts) + 1)]
    assert not multiprocessing.active_children()


def test_what_is_measured_or_nobody_finds_by_name_is_made_here(tmp_path: Path) -> None:
    made: list[str] = []
    results.run(item(made), Settings(out=tmp_path), print, jobs=2)
    assert made == ["a", "b", "c"]
    assert {one.mode for one in ITEMS if workers.can_share(one)} == {"counted", "simulated"}


def test_what_a_part_raises_in_another_process_ends_the_others(tmp_path: Path) -> None:
    (fig6,) = (item for item in ITEMS if (item.name, item.mode) == ("fig6", "simulated"))
    settings = Settings(out=tmp_path, predictors=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"--predictors .* has no"):
        results.run(fig6, settings, print, jobs=2)
    assert not multiprocessing.active_children()


def test_what_workers_say_is_said() -> None:
    queue: SimpleQueue = SimpleQueue()
    for text in ("one", "two", None, "three"):
        queue.put(text)
    said: list[str] = []
    workers._speak(queue, said.append)
    assert said == ["one", "two"]
