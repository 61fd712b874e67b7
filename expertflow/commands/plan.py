"""`expertflow plan` and `expertflow measure`: before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from expertflow.commands.flags import SETTING_HELP, ModelArgument, RevisionOption, takes
from expertflow.commands.session import quiet_unless_terminal, stderr, stdout
from expertflow.config import Settings


@takes(settings=Settings)
def plan(
    model: ModelArgument,
    settings: dict[str, Any],
    revision: RevisionOption = None,
    hit_ratio: Annotated[
        float | None,
        typer.Option(help="share of needed experts found in memory, 0 to 1", show_default="estimated"),
    ] = None,
    past: Annotated[int, typer.Option(help="tokens that come before the decoded ones")] = 0,
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Does it fit, and how fast will it be? Before anything is downloaded.

    Reads the headers of the checkpoint and measures this machine. Leaves with 1 when the model does not fit.

    [bold]Example[/bold]

      expertflow plan Qwen/Qwen1.5-MoE-A2.7B --memory 6GiB
    """
    checked = Settings(**settings)
    quiet_unless_terminal()
    import expertflow.engine.llm  # noqa: F401 - what `run` holds is counted by what this process holds
    from expertflow.forecast import run_plan

    status = run_plan(model, checked, revision=revision, hit_ratio=hit_ratio, past=past, as_json=json)
    raise typer.Exit(status)


@takes()
def measure(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="a folder or hub model whose shapes are multiplied (headers are read, no weights)",
            show_default="experts like Qwen1.5-MoE-A2.7B's",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.json", help="write the profile for `simulate --hardware`"
        ),
    ] = None,
    store: Annotated[str, typer.Option(metavar="disk|ram", help=SETTING_HELP["store"])] = "disk",
    link: Annotated[str | None, typer.Option(metavar="RATE", help=SETTING_HELP["link"])] = None,
) -> None:
    """How fast is this machine? A profile of it for the simulator.

    Measures how fast experts come from the disk, how fast their weights are multiplied and what Python adds: some
    seconds, and for lack of a model's files 256 MiB written for a moment. Small matrices are slower per byte, so
    give the model that you mean. Says what others took of the processors meanwhile: measure again when it is much.

    [bold]Examples[/bold]

      expertflow measure models/tiny-moe -o mine.json

      expertflow simulate zoo/traces/tiny-moe/chat --hardware a40,mine.json

      expertflow measure Qwen/Qwen1.5-MoE-A2.7B --store ram --link 25GB/s -o bus.json
    """
    Settings(store=store, link=link)
    if output is not None and (output.suffix != ".json" or not output.absolute().parent.is_dir()):
        raise ValueError(
            f"-o {output}: a profile is a .json file in a folder that exists; write for example -o mine.json"
        )
    quiet_unless_terminal()
    from expertflow.machine_profile import profile_machine, save_profile, table

    with stderr().status("") as status:
        found = profile_machine(model, store, link, status.update)
    stdout().print(table(found))
    if found.disturbance.disturbed:
        typer.echo(f"not to be trusted: {found.disturbance}; measure again on a quiet machine", err=True)
    if output is not None:
        save_profile(found, output)
        typer.echo(f"{output}: expertflow simulate TRACE --hardware {output}", err=True)
