"""What commands that run a model share: loading it, sampling as its checkpoint recommends, streaming, reporting."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertflow.commands.flags import DEFAULT_MAX_TOKENS
from expertflow.config import Settings
from expertflow.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

    from expertflow.engine.engine import Engine
    from expertflow.engine.llm import LLM

_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


_PIPE_WIDTH = 200


def load(model: str, revision: str | None, settings: dict[str, Any]) -> LLM:
    Settings(**settings)  # wrong values are reported before seconds of imports
    with importing_for(Path(model).expanduser()):
        quiet_unless_terminal()
        from expertflow.engine.llm import LLM

    return LLM(model, revision=revision, **settings)


@contextlib.contextmanager
def importing_for(model: Path) -> Iterator[None]:
    """Around the imports of a process that will load this model: they take as long as reading its dense weights.

    Nobody looks for garbage meanwhile: imports make a million objects that stay, and going through them again and
    again takes a sixth of the time. Nor later, among these.
    """
    from expertflow.read_ahead import read_early

    read_early(model)
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def quiet_unless_terminal() -> None:
    """Progress bars of downloads and of loading are for people who watch."""
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        disable_progress_bars()
        logging.disable_progress_bar()


def sampling_params(llm: LLM, given: dict[str, Any]) -> SamplingParams:
    """The checkpoint's recommendation, changed by what was given."""
    recommended = replace(llm.get_default_sampling_params(), max_tokens=DEFAULT_MAX_TOKENS)
    if (
        recommended.temperature == 0
        and "temperature" not in given
        and given.keys()
        & {
            "top_p",
            "top_k",
            "min_p",
            "seed",
        }
    ):
        # Whoever asks for a kind of randomness wants some.
        given = {"temperature": 1.0, **given}
    return replace(recommended, **given)


def fitting(llm: LLM, prompt: str | list[int], params: SamplingParams, length_given: bool) -> SamplingParams:
    """The same parameters; unless a length was given, with as many tokens as the context still holds."""
    if length_given:
        return params
    room = llm.context - len(llm.encode(prompt))
    return replace(params, max_tokens=min(DEFAULT_MAX_TOKENS, room)) if room > 0 else params


def write_answer(llm: LLM, prompt: str | list[int], params: SamplingParams, length_given: bool) -> str:
    """Stream an answer to stdout; returns it."""
    return write_pieces(llm.stream(prompt, fitting(llm, prompt, params, length_given)))


def printable(text: str) -> str:
    """Without control characters: what a model writes is to move no cursor and to set no title."""
    return text.translate(_CONTROLS)


def write_pieces(pieces: Iterable[str]) -> str:
    """To stdout, as they come; returns the whole."""
    written = []
    terminal = sys.stdout.isatty()
    try:
        for piece in pieces:
            written.append(piece)
            sys.stdout.write(printable(piece) if terminal else piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdout.isatty():
            raise
        sys.stdout.write("\n")
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(written)


def check_can_write(stats_json: Path | None, heatmap: Path | None, timeline: Path | None) -> None:
    """Before seconds of loading and minutes of running."""
    for path in (stats_json, heatmap, timeline):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"{path.absolute().parent} does not exist, so {path.name} cannot be written there"
            )
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"{path}: Is a directory; name a file in it")
    figures = [] if heatmap is None else [heatmap]
    if timeline is not None and timeline.suffix != ".json":
        figures.append(timeline)
    if figures:
        from expertflow.report import require_matplotlib

        require_matplotlib()
        from matplotlib.backend_bases import FigureCanvasBase

        for path in figures:
            if path.suffix[1:].lower() not in FigureCanvasBase.filetypes:
                raise ValueError(
                    f"{path}: figures are drawn as .png, .svg or .pdf"
                    + (", and .json is for Perfetto" if path == timeline else "")
                )


def checked_seating(
    execution: str, schedule: str, patience: int | None, settings: Settings
) -> dict[str, Any]:
    """The three for an Engine; what it would refuse is refused here, before a model is loaded."""
    from expertflow.engine.auto_schedule import SCHEDULES
    from expertflow.engine.unit import EXECUTIONS

    if execution not in EXECUTIONS:
        raise ValueError(f"--execution {execution}: use {' or '.join(EXECUTIONS)}")
    if schedule not in SCHEDULES:
        raise ValueError(f"--schedule {schedule}: use {' or '.join(SCHEDULES)}")
    if schedule == "auto" and settings.predictor == "none":
        raise ValueError(
            "--schedule auto groups by predicted experts; add --predictor online, or a trained one"
        )
    if schedule == "auto" and settings.predictor == "draft":
        raise ValueError(
            "--schedule auto groups by what is foreseen while another unit runs, and --predictor draft says it when a "
            "pass begins; use --predictor online or a trained one"
        )
    if patience is not None and schedule != "auto":
        raise ValueError(
            f"--patience {patience} is of --schedule auto, and --schedule {schedule} begins in order of arrival; "
            f"leave it out"
        )
    return {"execution": execution, "schedule": schedule, "patience": patience}


@contextlib.contextmanager
def saved_timeline(llm: LLM, path: Path | None) -> Iterator[None]:
    """Save what ran in this block, also when it was interrupted."""
    if path is None:
        yield
        return
    from expertflow.timeline import Timeline

    llm.timeline = timeline = Timeline()
    try:
        yield
    finally:
        timeline.save(path)


def report_run(
    llm: LLM, stats: bool, stats_json: Path | None, heatmap: Path | None, engine: Engine | None = None
) -> None:
    if not (stats or stats_json or heatmap):
        return
    from expertflow import report

    found = report.collect(llm, engine)
    if stats:
        print_tables(found, stderr())
    if stats_json is not None:
        report.save_json(found, stats_json)
    if heatmap is not None:
        report.save_heatmap(found, heatmap)


def print_tables(found: dict[str, Any], console: Console) -> None:
    from expertflow.report import tables

    for table in tables(found):
        console.print(table)


def stdout() -> Console:
    """For tables. A file or a pipe has no width, so nothing is cut off there."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH)


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


@contextlib.contextmanager
def progress_bar(doing: str) -> Iterator[Callable[..., None]]:
    """On terminals a bar, told (done, total) and, where there is one, a word on the speed; elsewhere nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=stderr(), disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task(doing, total=None, speed="")

        def show(done: int, total: int, speed: str = "") -> None:
            bar.update(shown, completed=done, total=total, speed=speed)

        yield show
