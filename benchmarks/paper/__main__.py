"""The paper's tables and figures, ours beside the paper's.

    python -m benchmarks.paper                                    # everything; an hour and a half on two cores
    python -m benchmarks.paper --quick                            # few conditions, untrained predictors; minutes
    python -m benchmarks.paper --only fig6,table2 --mode simulated
    python -m benchmarks.paper --page docs/results.md             # and write the page (`make paper`)

A killed or interrupted run goes on where it stopped. Results are JSON in --out, with figures as PNG and SVG beside
them; the page is made of both. A page elsewhere keeps the results it is made of in results/ beside it, so that a run
of some items later leaves the others on it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from benchmarks.common import console
from benchmarks.paper import results
from benchmarks.paper.item import MODES, Item, Result, Settings
from benchmarks.paper.items import ITEMS
from benchmarks.paper.page import page
from benchmarks.paper.workers import usable_cores

_INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(dict.fromkeys(item.name for item in ITEMS))
    parser.add_argument("--only", default=None, metavar="NAMES", help=f"of {', '.join(names)}; by commas")
    parser.add_argument("--mode", choices=MODES, default=None, help="only what is made in this way [all]")
    parser.add_argument("--quick", action="store_true", help="few conditions, untrained predictors")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/paper"), help="results [%(default)s]")
    parser.add_argument(
        "--predictors", type=Path, default=None, metavar="DIR", help="trained ones [OUT/predictors]"
    )
    parser.add_argument("--page", type=Path, default=None, metavar="FILE", help="[results.md in OUT]")
    parser.add_argument(
        "--page-only", action="store_true", help="make the page of what is there; run nothing"
    )
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=None,
        metavar="DIR",
        help="a source tree of it with a build, for full-size",
    )
    parser.add_argument("--threads", type=int, default=1, help="of arithmetic; the loader has one of its own")
    parser.add_argument(
        "--jobs",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="so many processes for what is counted or simulated, 1 to 2 GB each; what is measured runs alone "
        "[the cores there are: %(default)s]",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    try:
        chosen = choose(ITEMS, options.only, options.mode)
        settings = Settings(
            out=options.out,
            quick=options.quick,
            seed=options.seed,
            predictors=options.predictors,
            llama_cpp=options.llama_cpp,
        )
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()  # of models that are loaded a hundred times
    try:
        failed = [] if options.page_only else run_all(chosen, settings, options.jobs)
    except KeyboardInterrupt:
        console.print(f"stopped; what is finished lies in {settings.results}, and the same command goes on")
        return _INTERRUPTED
    try:
        write_page(ITEMS, settings, options.page or settings.results / "results.md")
    except ValueError as error:
        failed.append(str(error))
        console.print(f"[red]the page:[/red] {error}", highlight=False)
    return 1 if failed else 0


def choose(items: Sequence[Item], only: str | None, mode: str | None) -> list[Item]:
    """Raises ValueError for a name that no item has, or where nothing is left."""
    known = list(dict.fromkeys(item.name for item in items))
    wanted = [name.strip() for name in only.split(",") if name.strip()] if only is not None else known
    for name in wanted:
        if name not in known:
            raise ValueError(f"--only {name}: no such table or figure; known: {', '.join(known)}")
    chosen = [item for item in items if item.name in wanted and mode in (None, item.mode)]
    if not chosen:
        modes = sorted({item.mode for item in items if item.name in wanted})
        raise ValueError(
            f"--mode {mode}: {', '.join(wanted) or 'nothing'} is not made in this way; there is "
            f"{', '.join(modes)}"
        )
    return chosen


def run_all(chosen: Sequence[Item], settings: Settings, jobs: int = 1) -> list[str]:
    """Run items one after the other; what fails is said and does not stop the others."""
    failed: list[str] = []
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        whole = bar.add_task("all", total=len(chosen))
        for item in chosen:
            title = f"{item.name}, {item.mode}"
            row = bar.add_task(title, total=None)

            def advance(done: int, of: int, row: int = row) -> None:
                bar.update(row, completed=done, total=of)  # type: ignore[arg-type]

            def say(text: str, title: str = title) -> None:
                bar.console.print(f"{title}: {text}", highlight=False, soft_wrap=True)

            try:
                found = results.run(item, settings, say, advance, jobs)
                if found.skipped:
                    say(f"skipped: {found.skipped}")
                else:
                    draw(item, found, settings)
                    say(f"{len(found.parts)} of {len(found.parts)} parts")
            except (ValueError, OSError, BrokenProcessPool) as error:
                failed.append(title)
                say(f"failed: {error}")
            bar.advance(whole)
    return failed


def draw(item: Item, result: Result, settings: Settings) -> list[Path]:
    """The item's figures, as PNG and SVG in OUT/figures."""
    from benchmarks.paper import style

    with style.styled():
        figures = item.figures(result)
    return [
        path
        for name, figure in figures.items()
        for path in style.save(figure, settings.results / "figures" / name)
    ]


def write_page(items: Sequence[Item], settings: Settings, path: Path) -> None:
    """The page of all that is kept, figures and results beside it. Raises ValueError for a broken result.

    What is not in the settings' folder is taken from the results beside the page, if it was made as thoroughly.
    """
    made: list[tuple[Item, Result]] = []
    missing: list[Item] = []
    figures: dict[str, list[str]] = {}
    folder = path.parent / "figures" / "paper"
    for item in items:
        beside = path.parent / "results" / item.file_name
        found = results.load(settings.results / item.file_name)
        if found is not None and path.parent.resolve() != settings.results.resolve():
            results.save(found, beside)
        elif found is None and (kept := results.load(beside)) is not None:
            found = kept if kept.conditions.get("quick", False) == settings.quick else None
        if found is None:
            missing.append(item)
            continue
        made.append((item, found))
        if found.rows and not found.skipped:
            drawn = [drawing for drawing in draw(item, found, settings) if drawing.suffix == ".png"]
            folder.mkdir(parents=True, exist_ok=True)
            for drawing in drawn:
                (folder / drawing.name).write_bytes(drawing.read_bytes())
            figures[item.file_name] = [f"figures/paper/{drawing.name}" for drawing in drawn]
    text = page(made, missing, figures)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
    console.print(f"{path}: {len(made)} of {len(items)} items", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
