"""The command line. Each command checks what it was given, calls the library and prints.

stdout carries generated text (or JSON) alone, all else goes to stderr, so that output can be piped. Imports
are inside the commands: torch takes seconds to import, and `--help` must not. Flags of models and of
sampling are generated from the dataclasses that hold them; no value is repeated here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from expertflow import __version__
from expertflow.config import BatchSettings, Settings, TraceSettings, Tracing, format_bytes
from expertflow.engine.sampling import SamplingParams
from expertflow.predictor.sizes import PredictorSizes, TrainSettings

if TYPE_CHECKING:
    from rich.console import Console

    from expertflow.engine.batch_run import BatchProgress
    from expertflow.engine.engine import Engine
    from expertflow.engine.llm import LLM

DEFAULT_MAX_TOKENS = 256
DEMO_PROMPT = "The old man went to the river"
DEMO_CACHE_SIZE = 8  # of 32 experts in each layer
DEMO_SEED = 0
_EXIT_ERROR = 2
_REPOSITORY = Path(__file__).resolve().parent.parent

app = typer.Typer(
    name="expertflow",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Run Mixture-of-Experts language models that do not fit in memory, exactly as transformers would.

Dense weights and a bounded set of experts stay in memory; the other experts are read from the untouched
checkpoint when a token needs them.

[bold]Does it fit, and how fast will it be?[/bold]  expertflow plan MODEL --memory 6GiB

[bold]Generate text:[/bold]  expertflow run MODEL "Once upon a time" --memory 6GiB

[bold]Is the output the same?[/bold]  expertflow check MODEL --memory 6GiB

MODEL is a folder or a model of the Hugging Face hub, such as Qwen/Qwen1.5-MoE-A2.7B.""",
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="a folder, or owner/name on the Hugging Face hub", show_default=False
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="branch, tag or commit of a hub model", show_default="main", metavar="NAME")
]

TimelineOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="save what ran when: .json for Perfetto (ui.perfetto.dev), .png or .svg for the last steps as a figure",
    ),
]


def takes(**groups: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one flag per field of each dataclass, and clean errors.

    groups: parameter name of the command -> dataclass. The command gets a dict of the flags that were given;
    those left out are absent, so defaults stay where they are defined. Adds --debug as well.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        kept = [parameter for parameter in signature.parameters.values() if parameter.name not in groups]
        flags = {name: list(_flags(group, _PANELS[name])) for name, group in groups.items()}
        debug = inspect.Parameter(
            "debug",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--debug", help="show the traceback of an error")],
        )

        @functools.wraps(command)
        def wrapper(*, debug: bool, **values: Any) -> None:
            for name, parameters in flags.items():
                given = {parameter.name: values.pop(parameter.name) for parameter in parameters}
                values[name] = {key: value for key, value in given.items() if value not in (None, [])}
            try:
                command(**values)
            except BrokenPipeError:  # `expertflow run ... | head`; typer leaves quietly
                raise
            except (ValueError, OSError) as error:
                if debug:
                    raise
                typer.echo(f"error: {str(error).strip() or type(error).__name__}", err=True)
                raise typer.Exit(_EXIT_ERROR) from None

        parameters = [*kept, *(flag for group in flags.values() for flag in group), debug]
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        wrapper.__signature__ = signature.replace(parameters=keyword_only)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in keyword_only}
        return wrapper

    return decorate


_PANELS = {
    "settings": "Memory",
    "sampling": "Sampling",
    "tracing": "Recording",
    "sizes": "Predictor",
    "training": "Training",
}
# `run` streams one answer; n belongs to LLM.generate.
_NO_FLAG = {"n"}


# Flags with more than the field's own name.
_FLAG_NAMES = {"batch": ("--batch", "--batch-size")}


def _flags(group: type[Any], panel: str) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group)
    for entry in fields(group):
        if entry.name in _NO_FLAG:
            continue
        shown: str | bool = str(entry.default) if entry.default not in (None, ()) else False
        if panel == "Sampling":
            shown = _SAMPLING_DEFAULTS.get(entry.name, shown)
        names = _FLAG_NAMES.get(entry.name, ())
        option = typer.Option(*names, help=entry.metadata["help"], rich_help_panel=panel, show_default=shown)
        yield inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_flag_type(hints[entry.name], repeatable=entry.default == ()), option],
        )


# The command leaves sampling to the checkpoint where LLM.generate's SamplingParams() has vLLM's defaults.
_SAMPLING_DEFAULTS: dict[str, str | bool] = {
    **dict.fromkeys(
        ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"), "what the checkpoint recommends"
    ),
    "max_tokens": f"{DEFAULT_MAX_TOKENS}, or what the context holds",
    "ignore_eos": False,
}


def _flag_type(hint: Any, repeatable: bool) -> Any:
    """The one type of a field that a command line can give: `str | int | None` is str, given as text."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = [option for option in options if option in (bool, int, float, str)]
    if repeatable:
        element = plain[0] if plain else get_args(options[0])[0]
        return list[element] | None  # type: ignore[valid-type]
    return plain[0] | None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"expertflow {__version__}")
        raise typer.Exit


@app.callback()
def _expertflow(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and leave")
    ] = False,
) -> None:
    pass


@app.command()
@takes(settings=Settings, sampling=SamplingParams)
def run(
    model: ModelArgument,
    settings: dict[str, Any],
    sampling: dict[str, Any],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="text to continue; without it --file, or stdin")
    ] = None,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="read the prompt from this file")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="a conversation, by the model's chat template")
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="system message of the conversation")
    ] = None,
    revision: RevisionOption = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="print statistics and the memory plan at the end")
    ] = False,
    stats_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="save the statistics as JSON")
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="draw how often each expert was used and read")
    ] = None,
    timeline: TimelineOption = None,
) -> None:
    """Generate text with a model that is larger than its memory budget.

    The text goes to stdout as it is written, everything else to stderr.

    [bold]Examples[/bold]

      expertflow run Qwen/Qwen1.5-MoE-A2.7B "Once upon a time" --memory 6GiB

      expertflow run ./mixtral --memory 20GiB --file question.txt --temperature 0.7 --seed 1 > answer.txt

      expertflow run ./qwen-chat --memory 6GiB --chat

      expertflow run ./qwen --cache-size 8 "Hello" --stats --heatmap experts.png
    """
    if system is not None and not chat:
        raise ValueError("--system is the first message of a conversation; add --chat, or leave it out")
    _check_can_write(stats_json, heatmap, timeline)
    SamplingParams(**sampling)  # before seconds of loading
    text = _read_prompt(prompt, file, chat)
    with _load(model, revision, settings) as llm, _timeline(llm, timeline):
        params = _sampling_params(llm, sampling)
        length_given = "max_tokens" in sampling
        try:
            if chat:
                _converse(llm, params, text, system, length_given)
            else:
                assert text is not None, "without --chat there is a prompt"
                _write(llm, text, params, length_given)
        finally:
            _report(llm, stats, stats_json, heatmap)


def _check_can_write(stats_json: Path | None, heatmap: Path | None, timeline: Path | None) -> None:
    """Before seconds of loading and minutes of running."""
    for path in (stats_json, heatmap, timeline):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"{path.absolute().parent} does not exist, so {path.name} cannot be written there"
            )
    if heatmap is not None or (timeline is not None and timeline.suffix != ".json"):
        from expertflow.report import require_matplotlib

        require_matplotlib()


@contextlib.contextmanager
def _timeline(llm: LLM, path: Path | None) -> Iterator[None]:
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


def _read_prompt(prompt: str | None, file: Path | None, chat: bool) -> str | None:
    """None only in a conversation, whose turns are then read one by one."""
    if prompt is not None and file is not None:
        raise ValueError("a prompt and --file were both given; give one of them")
    if file is not None:
        return file.read_text(encoding="utf-8")
    if prompt is not None or chat:
        return prompt
    if sys.stdin.isatty():
        raise ValueError(
            "no prompt: give it as an argument, with --file, or on stdin; or --chat for a conversation"
        )
    return sys.stdin.read()


def _load(model: str, revision: str | None, settings: dict[str, Any]) -> LLM:
    Settings(**settings)  # wrong values are reported before seconds of imports
    _quiet_unless_terminal()
    from expertflow.read_ahead import read_early

    read_early(Path(model).expanduser())  # before the imports: they take as long as reading
    from expertflow.engine.llm import LLM

    return LLM(model, revision=revision, **settings)


def _quiet_unless_terminal() -> None:
    """Progress bars of downloads and of loading are for people who watch."""
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        disable_progress_bars()
        logging.disable_progress_bar()


def _sampling_params(llm: LLM, given: dict[str, Any]) -> SamplingParams:
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


def _write(llm: LLM, prompt: str | list[int], params: SamplingParams, length_given: bool) -> str:
    """Stream an answer to stdout; returns it."""
    if not length_given:
        ids = prompt if isinstance(prompt, list) else list(llm.tokenizer(prompt).input_ids)
        room = llm.context - len(ids)
        if room > 0:
            params = replace(params, max_tokens=min(DEFAULT_MAX_TOKENS, room))
    pieces = []
    stream = llm.stream(prompt, params)
    try:
        for piece in stream:
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdout.isatty():
            raise
        sys.stdout.write("\n")
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(pieces)


def _converse(
    llm: LLM, params: SamplingParams, first: str | None, system: str | None, length_given: bool
) -> None:
    """Turns until end of input. On a terminal Ctrl-C stops an answer, and leaves at the prompt."""
    start = [{"role": "system", "content": system}] if system is not None else []
    llm.encode_chat([*start, {"role": "user", "content": ""}])  # no template is an error before any waiting
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        typer.echo("Ctrl-D leaves, Ctrl-C stops an answer, /clear starts over.", err=True)
    messages = list(start)
    turns = iter(functools.partial(_read_turn, interactive), None)
    if first is not None:
        turns = iter([first]) if not interactive and sys.stdin.isatty() else _chain(first, turns)
    for turn in turns:
        if turn.strip() == "/clear":
            messages = list(start)
            continue
        if not turn.strip():
            continue
        messages.append({"role": "user", "content": turn})
        try:
            answer = _write(llm, llm.encode_chat(messages), params, length_given)
        except KeyboardInterrupt:
            if not interactive:
                raise
            messages.pop()
            continue
        except ValueError as error:  # the conversation outgrew the context
            if not interactive:
                raise
            typer.echo(f"error: {error}; /clear starts over", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _read_turn(interactive: bool) -> str | None:
    """One line of the user's, None at the end of input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import readline  # noqa: F401  # gives input() history and editing

    try:
        return input("> ")
    except EOFError:
        typer.echo()
        return None


def _report(
    llm: LLM, stats: bool, stats_json: Path | None, heatmap: Path | None, engine: Engine | None = None
) -> None:
    if not (stats or stats_json or heatmap):
        return
    from expertflow import report

    found = report.collect(llm, engine)
    if stats:
        _print_tables(found, _stderr())
    if stats_json is not None:
        report.save_json(found, stats_json)
    if heatmap is not None:
        report.save_heatmap(found, heatmap)


def _print_tables(found: dict[str, Any], console: Console) -> None:
    from expertflow.report import tables

    for table in tables(found):
        console.print(table)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


@app.command()
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
    _print_tables(found, Console())
    if heatmap is not None:
        report.save_heatmap(found, heatmap)


@app.command()
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
    _quiet_unless_terminal()
    from expertflow.forecast import run_plan

    status = run_plan(model, checked, revision=revision, hit_ratio=hit_ratio, past=past, as_json=json)
    raise typer.Exit(status)


_SETTING_HELP = {entry.name: entry.metadata["help"] for entry in fields(Settings)}


@app.command()
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
    store: Annotated[str, typer.Option(metavar="disk|ram", help=_SETTING_HELP["store"])] = "disk",
    link: Annotated[str | None, typer.Option(metavar="RATE", help=_SETTING_HELP["link"])] = None,
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
    _quiet_unless_terminal()
    from rich.console import Console

    from expertflow.machine_profile import profile_machine, save_profile, table

    with _stderr().status("") as status:
        found = profile_machine(model, store, link, status.update)
    Console().print(table(found))
    if found.disturbance.disturbed:
        typer.echo(f"not to be trusted: {found.disturbance}; measure again on a quiet machine", err=True)
    if output is not None:
        save_profile(found, output)
        typer.echo(f"{output}: expertflow simulate TRACE --hardware {output}", err=True)


@app.command()
@takes(settings=Settings)
def check(
    model: ModelArgument,
    settings: dict[str, Any],
    revision: RevisionOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="compare on this text; may be repeated", show_default="a few built in"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="greedy tokens to compare after each prompt")] = 32,
    seed: Annotated[int, typer.Option(help="of the forced mispredictions")] = 0,
    layer_by_layer: Annotated[
        bool, typer.Option("--layer-by-layer", help="even when the whole model fits in memory")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Is the output the same as that of transformers? A proof on your own checkpoint.

    Compares logits and greedy tokens, forced mispredictions included; layer by layer when the whole model
    does not fit in memory. Leaves with 1 when they differ.

    [bold]Example[/bold]

      expertflow check ./mixtral --memory 20GiB
    """
    checked = Settings(**settings)
    _quiet_unless_terminal()
    from expertflow.check import run_check

    status = run_check(
        model,
        checked,
        revision=revision,
        prompts=prompt or None,
        max_new_tokens=max_tokens,
        seed=seed,
        layer_by_layer=layer_by_layer,
        as_json=json,
    )
    raise typer.Exit(status)


@app.command()
@takes(settings=TraceSettings, tracing=Tracing)
def trace(
    model: ModelArgument,
    settings: dict[str, Any],
    tracing: dict[str, Any],
    dataset: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help='alpaca, wmt16, xsum or aime2024 of the hub, or lines of {"prompt", "response"} (.jsonl, .jsonl.xz)',
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder of the trace")],
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="what the prompts are recorded as", show_default="the data set's"),
    ] = None,
    revision: RevisionOption = None,
) -> None:
    """Record which experts a model uses for the prompts of a data set: what predictors are trained on.

    Runs each prompt several times with sampling. Stopped at any moment, the same command goes on where it was.

    [bold]Examples[/bold]

      expertflow trace Qwen/Qwen1.5-MoE-A2.7B-Chat --dataset alpaca -o traces/alpaca --prompts 1000

      expertflow trace ./mixtral --dataset chats.jsonl.xz --teacher-forced -o traces/chats --memory 20GiB
    """
    wanted = Tracing(**tracing)
    for name in ("runs", "temperature", "seed"):
        if wanted.teacher_forced and name in tracing:
            raise ValueError(
                f"--{name} is of sampled answers, and --teacher-forced samples none; leave one of them out"
            )
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; -o takes a folder, which is made when it is not there")
    settings = {"batch": TraceSettings.batch, **settings}
    Settings(**settings)
    from expertflow.engine.datasets import HUB_SETS, load_examples

    examples = load_examples(dataset, wanted.prompts, task)
    with _load(model, revision, settings) as llm:
        from expertflow.engine.tracing import record_trace

        name = dataset if dataset in HUB_SETS else Path(dataset).name
        with _progress() as progress:
            recorded = record_trace(llm, examples, output, wanted, name, progress)
    if recorded.too_long:
        typer.echo(
            f"left out {recorded.too_long} of {min(len(examples), wanted.prompts)} prompts: with an answer they "
            f"exceed the context of {llm.context} tokens (--context)",
            err=True,
        )
    size = sum(path.stat().st_size for path in output.iterdir())
    typer.echo(
        f"{output}: {recorded.sequences} sequences ({recorded.recorded} new, {recorded.tokens} tokens), "
        f"{format_bytes(size)}",
        err=True,
    )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of sequences on terminals; elsewhere nothing."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("recording"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_stderr(), disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task("recording", total=None)
        yield lambda done, total: bar.update(shown, completed=done, total=total)


@app.command()
@takes(settings=BatchSettings, sampling=SamplingParams)
def batch(
    requests: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="a request in each line")],
    results: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", help="a result in each line, as they finish")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="a folder, or owner/name on the Hugging Face hub"
        ),
    ],
    settings: dict[str, Any],
    sampling: dict[str, Any],
    execution: Annotated[
        str,
        typer.Option(
            metavar="joint|split",
            help="the batches of a unit side by side, sharing experts, or one after the other",
        ),
    ] = "joint",
    schedule: Annotated[
        str,
        typer.Option(
            metavar="fixed|auto",
            help="seat sequences in order of arrival, or those together whose predicted experts are alike (with "
            "a --predictor)",
        ),
    ] = "fixed",
    revision: RevisionOption = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="print statistics and the memory plan at the end")
    ] = False,
    stats_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="save the statistics as JSON")
    ] = None,
    timeline: TimelineOption = None,
) -> None:
    """Answer a file of prompts, many at once.

    A line is {"prompt": ...} or {"messages": [...]}, with "id" and sampling parameters where wanted, or a request of
    OpenAI's batch format. Results come in the order in which they finish. A run that was killed continues when the
    same command is given again. Leaves with 1 when lines failed: their results say why.

    [bold]Examples[/bold]

      expertflow batch prompts.jsonl answers.jsonl --model ./mixtral --memory 20GiB --batch-size 16

      expertflow batch openai.jsonl out.jsonl -m ./qwen-chat --memory 6GiB --max-tokens 200 --temperature 0
    """
    _check_can_write(stats_json, None, timeline)
    checked = BatchSettings(**settings)
    SamplingParams(**sampling)
    if not requests.is_file():
        raise FileNotFoundError(
            f"{requests} is no file; give one with a request in each line, as --help says"
        )
    if requests.absolute() == results.absolute():
        raise ValueError(f"{results} is the file of requests; give another name to the results")
    from expertflow.engine.auto_schedule import SCHEDULES
    from expertflow.engine.batch_results import BatchResults
    from expertflow.engine.batch_run import BatchRun, sha256_of
    from expertflow.engine.unit import EXECUTIONS

    if execution not in EXECUTIONS:
        raise ValueError(f"--execution {execution}: use {' or '.join(EXECUTIONS)}")
    if schedule not in SCHEDULES:
        raise ValueError(f"--schedule {schedule}: use {' or '.join(SCHEDULES)}")
    if schedule == "auto" and checked.predictor == "none":
        raise ValueError(
            "--schedule auto groups by predicted experts; add --predictor online, or a trained one"
        )
    given = {"input_sha256": sha256_of(requests), "model": model, "revision": revision, "sampling": sampling}
    settings = {**settings, "batch": checked.batch, "sequences": checked.sequences}
    with (
        BatchResults(results, given) as kept,
        _load(model, revision, settings) as llm,
        _timeline(llm, timeline),
    ):
        from expertflow.engine.engine import Engine

        default_tokens = None if "max_tokens" in sampling else DEFAULT_MAX_TOKENS
        with Engine(llm, execution=execution, schedule=schedule) as engine, _batch_progress() as progress:
            run = BatchRun(llm, engine, requests, kept, _sampling_params(llm, sampling), default_tokens)
            try:
                run.run(progress)
            except KeyboardInterrupt:
                typer.echo(
                    f"{run.state.done} of {run.state.total} lines done; the same command continues", err=True
                )
                raise
        _report(llm, stats, stats_json, None, engine)
    state = run.state
    typer.echo(
        f"{results}: {state.total} lines, {state.answered_now} answered now with {state.tokens_now} tokens, "
        f"{engine.stats.tokens_per_second:.3g} tokens/s"
        + (f"; {state.failed} failed, their results say why" if state.failed else ""),
        err=True,
    )
    if state.failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _batch_progress() -> Iterator[Callable[[BatchProgress], None]]:
    """A bar of lines with tokens per second on terminals; elsewhere nothing."""
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("answering"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=_stderr(), disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task("answering", total=None, speed="")
        started = time.perf_counter()

        def show(state: BatchProgress) -> None:
            speed = f"{state.tokens_now / (time.perf_counter() - started):.3g} tokens/s"
            if state.failed:
                speed += f", {state.failed} failed"
            bar.update(shown, completed=state.done, total=state.total, speed=speed)

        yield show


@app.command("eval-predictor")
@takes()
def eval_predictor(
    traces: Annotated[
        list[Path], typer.Option(metavar="DIR", help="a recording with held-out prompts; may be repeated")
    ],
    predictors: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PREDICTOR]...", help="trained predictors; without any, the baselines alone"),
    ] = None,
    fitted_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="a task that the baselines are counted on; may be repeated",
            show_default="all",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="a task to judge them on; may be repeated", show_default="all"),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="batch sizes, 1 to 64")] = "1,2,4,8,16,32,64",
    max_tokens: Annotated[int, typer.Option(help="held-out tokens of each task")] = 50_000,
    warm_tokens: Annotated[
        int, typer.Option(help="tokens of the training split that the online table has served before")
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="the traced model, to measure look-ahead and the pre-gate as well"
        ),
    ] = None,
    gate_tokens: Annotated[int, typer.Option(min=1, help="tokens to train the pre-gate on")] = 4000,
    expert_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="bytes of one expert, such as 17MB: wrong guesses in MB"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the choice of sequences and batches")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="folder for the JSON and the figures")
    ] = None,
) -> None:
    """How well are a model's routes predicted, on prompts that were held out?

    Every baseline stands beside the predictors. Figures are drawn where matplotlib is installed.

    [bold]Examples[/bold]

      expertflow eval-predictor --traces traces/alpaca

      expertflow eval-predictor rpp --traces traces/chat --traces traces/math --fitted-on chat -o evaluation
    """
    from rich.console import Console

    from expertflow.config import parse_bytes
    from expertflow.predictor import report
    from expertflow.predictor.evaluate import Conditions, evaluate
    from expertflow.predictor.recordings import load_predictors, read_recordings

    try:
        batches = tuple(sorted({int(size) for size in batch.split(",")}))
    except ValueError:
        raise ValueError(f"--batch {batch!r} is no list of numbers; write --batch 1,8,64") from None
    conditions = Conditions(batches=batches, max_tokens=max_tokens, warm_tokens=warm_tokens, seed=seed)
    size = parse_bytes(expert_bytes) if expert_bytes is not None else None
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; -o takes a folder, which is made when it is not there")
    meta, sequences = read_recordings(traces)
    loaded = load_predictors(predictors or [], meta, traces)
    counted = fitted_on or sorted({s.task for s in sequences if s.split == "train"})
    with _hidden(model, meta, sequences, counted, gate_tokens) as hidden, _stderr().status("") as status:
        found = evaluate(meta, sequences, loaded, counted, task or None, conditions, hidden, status.update)
    console = Console()
    for table in report.tables(found, size):
        console.print(table)
    if (ranking := report.next_use_table(found)) is not None:
        console.print(ranking)
    _stderr().print(report.LEGEND)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        report.save_json(found, output / "evaluation.json")
        drawn = report.save_figures(found, output)
        typer.echo(f"{output}: evaluation.json and {len(drawn)} figures", err=True)
        if not drawn:
            typer.echo("figures need matplotlib; `pip install 'expertflow-moe[plots]'`", err=True)


@contextlib.contextmanager
def _hidden(
    model: str | None, meta: Any, sequences: list[Any], counted: list[str], gate_tokens: int
) -> Iterator[Any]:
    """Predictors of hidden states when the model was given, else None."""
    if model is None:
        yield None
        return
    with _load(model, None, {}) as llm:
        from expertflow.engine.hidden_states import hidden_predictors, hidden_states

        _verify_traced(llm, model, meta)
        train = [s for s in sequences if s.split == "train" and s.task in counted]
        with hidden_states(llm) as read:
            yield hidden_predictors(llm, read, meta, train, gate_tokens)


def _verify_traced(llm: LLM, model: str, meta: Any) -> None:
    from expertflow.models.fingerprint import fingerprint

    if (found := fingerprint(llm.model)) != meta.fingerprint:
        raise ValueError(
            f"{model} has fingerprint {found}, and the traces were recorded with {meta.model} "
            f"({meta.fingerprint}); give the model that was traced, or leave --model out"
        )


@app.command()
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
            help="a trained predictor's folder, the online table, what really comes, noise, or nobody; may be "
            "repeated",
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

    from rich.console import Console

    from expertflow.config import parse_bytes
    from expertflow.predictor.report import save_json
    from expertflow.sim import report
    from expertflow.sim.compare import FORMAT, Conditions, compare
    from expertflow.sim.hardware import hardware as machine
    from expertflow.sim.recordings import foretell_all, size_of
    from expertflow.trace import read_trace

    recording = read_trace(trace, weights=False)
    given_bytes = parse_bytes(expert_bytes) if expert_bytes is not None else None
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
    )
    with _stderr().status("") as status:
        foretold = foretell_all(recording, trace, split, predictor or ["online"], warm, status.update)
        rows = compare(foretold, conditions, status.update)
    console = Console()
    for table in report.tables(rows, stands_for):
        console.print(table)
    _stderr().print(report.LEGEND)
    if json_file is not None:
        machines = [asdict(one) for one in conditions.machines]
        found = {"format": FORMAT, "trace": recording.meta.model, "stands_for": stands_for, "split": split}
        save_json(found | {"hardware": machines, "rows": rows}, json_file)


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{flag} {text!r} is no list of numbers; write {flag} 1,4,16") from None


@app.command()
@takes(sizes=PredictorSizes, training=TrainSettings)
def train_predictor(
    traces: Annotated[
        list[Path],
        typer.Argument(metavar="TRACES...", help="folders that `expertflow trace` wrote", show_default=False),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="where the predictor goes")],
    sizes: dict[str, Any],
    training: dict[str, Any],
    task: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="train on this task's sequences only", show_default="all tasks"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="the traced model: its embedding tells of tokens that the traces hardly show",
            show_default="none: tokens are only numbers",
        ),
    ] = None,
) -> None:
    """Learn from recorded routes which experts a text will need, for prefetching and eviction.

    A run that was interrupted continues when the same command is given again. With --model the predictor knows
    other subjects better than those it is trained on, and costs the same.

    [bold]Example[/bold]

      expertflow train-predictor traces/chat --model models/tiny-moe -o predictors/chat --minutes 10
    """
    checked = TrainSettings(**training)
    from expertflow.predictor.train import train_predictor as run_training

    embedding_VD = None if model is None else _input_embedding(model, traces[0])
    run_training(traces, output, sizes, checked, task=task, embedding_VD=embedding_VD)


def _input_embedding(model: str, trace: Path) -> Any:
    """A copy of the traced model's, V x D. Raises ValueError for another model than the traced one."""
    from expertflow.trace import read_trace

    meta = read_trace(trace, weights=False).meta
    with _load(model, None, {"cache_size": 2.0}) as llm:
        _verify_traced(llm, model, meta)
        embedding: Any = llm.model.get_input_embeddings()
        return embedding.weight.detach().clone()


@app.command()
@takes()
def demo(
    model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="another model", show_default="models/tiny-moe")
    ] = None,
    prompt: Annotated[str, typer.Option(help="what the sample continues")] = DEMO_PROMPT,
    max_tokens: Annotated[int, typer.Option(help="length of the sample")] = 120,
) -> None:
    """Show it on the small model of this repository: a sample, its statistics, the parity check."""
    from rich.console import Console

    folder = model or _REPOSITORY / "models" / "tiny-moe"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist: the demo's model comes with the repository, not with the package; run "
            f"it "
            f"from a clone, or give --model FOLDER"
        )
    console = Console(highlight=False)
    with _load(str(folder), None, {"cache_size": DEMO_CACHE_SIZE, "context": 512}) as llm:
        stats = llm.stats
        shape = stats.shape
        console.print(
            f"{folder.name}: {shape.num_layers} layers of {max(shape.experts_per_layer)} experts. Of these "
            f"{shape.num_experts}, {stats.num_slots} are in memory at a time; the others are read from "
            f"{folder} when a token needs them.\n"
            f"The model is tiny and trained for the demonstration; look at the machinery, not at the prose.\n"
        )
        params = SamplingParams(temperature=0.8, top_k=40, seed=DEMO_SEED, max_tokens=max_tokens)
        sys.stdout.write(prompt)
        _write(llm, prompt, params, length_given=True)
        sys.stdout.write("\n")
        from expertflow import report

        _print_tables(report.collect(llm), console)
    from expertflow.check import run_check

    console.print("\nIs that what transformers would compute? The same model, all in memory, beside ours:")
    settings = Settings(cache_size=DEMO_CACHE_SIZE, context=512)
    raise typer.Exit(run_check(str(folder), settings, prompts=[prompt], max_new_tokens=16, console=console))


def main() -> None:
    """Entry point. Leaves with 0, with 2 after an error, with 130 after Ctrl-C."""
    try:
        app()
    except KeyboardInterrupt:  # between typer's own handling and the end
        sys.exit(130)


if __name__ == "__main__":
    main()
