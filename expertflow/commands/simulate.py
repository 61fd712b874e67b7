"""`expertflow simulate`: recorded routes through cache policies, with a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from expertflow.commands.flags import takes
from expertflow.commands.session import check_can_write, stderr, stdout


@takes()
def simulate(
    trace: Annotated[
        Path,
        typer.Argument(metavar="TRACE", help="a recording made by `expertflow trace`", show_default=False),
    ],
    policy: Annotated[
        str, typer.Option(metavar="NAME,...", help="cache policies; an unknown name lists those there are")
    ] = "lru,lfu,plec",
    cache_size: Annotated[
        str, typer.Option(metavar="N,...", help="experts kept per MoE layer on average (the paper's CS)")
    ] = "8",
    batch: Annotated[str, typer.Option(metavar="N,...", help="sequences that decode in step")] = "1,8",
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME,...", help="a40, rtx4090, h100, or a JSON file with a machine's own figures"
        ),
    ] = "a40",
    predictor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR|online|oracle|noise|none",
            help="a trained predictor's folder, the online table, what really comes, noise, or nobody; also the folder "
            "of what a draft said (zoo/draft_trace.py), whose passes are counted; may be repeated",
            show_default="online",
        ),
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option(
            metavar="R,...",
            help="instead of the hardware's link, one on which LRU's transfers take R x arithmetic",
        ),
    ] = None,
    model_size: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="the published model that the trace stands for",
            show_default="of the same shape",
        ),
    ] = None,
    expert_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="or the bytes of one expert, such as 17MB")
    ] = None,
    split: Annotated[str, typer.Option(help="train or test: which of the recorded sequences")] = "test",
    in_turn: Annotated[
        bool,
        typer.Option(
            "--in-turn",
            help="two batches take turns, and the next pass of one is foreseen while the other runs",
        ),
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="decode steps of each batch size")] = 500,
    warm: Annotated[
        int, typer.Option(min=0, help="sequences of the other split that predictors have served before")
    ] = 64,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write every figure here")
    ] = None,
) -> None:
    """How would a cache policy do on other hardware? Replays recorded routes with a virtual clock.

    The engine's own slots, policies and plan decide; nothing is loaded or multiplied. A recording of a small
    model stands for a large one with as many experts: only sizes and speeds differ.

    [bold]Examples[/bold]

      expertflow simulate traces/chat --policy lru,plec --cache-size 4,8,16 --batch 1,4,16

      expertflow simulate traces/chat --predictor predictors/chat --predictor noise --ratio 0.5,1,4

      expertflow simulate traces/chat --policy cache-moe,se-moe,plec --hardware rtx4090 --json simulated.json
    """
    from dataclasses import asdict

    from expertflow.config import parse_bytes
    from expertflow.predictor.report import save_json
    from expertflow.sim import report
    from expertflow.sim.compare import FORMAT, Conditions, compare
    from expertflow.sim.hardware import hardware as machine
    from expertflow.sim.recordings import foretell_all, size_of
    from expertflow.trace import read_trace

    check_can_write(json_file, None, None)
    recording = read_trace(trace, weights=False)
    given_bytes = parse_bytes(expert_bytes, "--expert-bytes") if expert_bytes is not None else None
    size, stands_for = size_of(recording.meta, model_size, given_bytes)
    conditions = Conditions(
        policies=tuple(dict.fromkeys(policy.split(","))),
        cache_sizes=tuple(_numbers("--cache-size", cache_size, float)),
        batches=tuple(_numbers("--batch", batch, int)),
        machines=tuple(machine(name) for name in dict.fromkeys(hardware.split(","))),
        expert_bytes=size.expert_bytes,
        dense_bytes=size.dense_bytes,
        ratios=tuple(_numbers("--ratio", ratio, float)) if ratio is not None else (),
        max_steps=steps,
        in_turn=in_turn,
    )
    with stderr().status("") as status:
        foretold = foretell_all(recording, trace, split, predictor or ["online"], warm, status.update)
        rows = compare(foretold, conditions, status.update)
    console = stdout()
    for table in report.tables(rows, stands_for):
        console.print(table)
    stderr().print(report.LEGEND)
    if json_file is not None:
        machines = [asdict(one) for one in conditions.machines]
        found = {"format": FORMAT, "trace": recording.meta.model, "stands_for": stands_for, "split": split}
        save_json(found | {"hardware": machines, "rows": rows}, json_file)


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{flag} {text!r} is no list of numbers; write {flag} 1,4,16") from None
