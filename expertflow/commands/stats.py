"""`expertflow stats`: what `run --stats-json` saved, shown again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertflow.commands.flags import takes
from expertflow.commands.session import print_tables


@takes()
def stats(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="what `run --stats-json` saved")],
    heatmap: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="draw how often each expert was used and read")
    ] = None,
) -> None:
    """Show saved statistics.

    [bold]Example[/bold]

      expertflow run MODEL "Hello" --memory 6GiB --stats-json run.json

      expertflow stats run.json --heatmap run.png
    """
    from rich.console import Console

    from expertflow import report

    found = report.load_json(file)
    print_tables(found, Console())
    if heatmap is not None:
        report.save_heatmap(found, heatmap)
