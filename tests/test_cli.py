"""The command line: each flag has its effect, text alone on stdout, errors of one line, Ctrl-C leaves with 130."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from expertflow import LLM, SamplingParams, __version__, cli
from expertflow.config import Settings
from tests.engine.test_llm import CHAT_TEMPLATE, rewrite
from tests.families import write_checkpoint

ROOT = Path(__file__).parents[1]
GREEDY = ["--temperature", "0", "--max-tokens", "10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen2_moe", tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def chat_folder(folder: Path) -> Path:
    return rewrite(folder, folder.parent / "chat", "tokenizer_config.json", chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def greedy(folder: Path) -> str:
    with LLM(folder, cache_size=3) as llm:
        return llm.generate("Hello", SamplingParams(temperature=0, max_tokens=10))[0].outputs[0].text


def invoke(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


def run(folder: Path, *arguments: object, stdin: str | None = None) -> Result:
    return invoke("run", folder, "--cache-size", 3, *arguments, stdin=stdin)


def test_version() -> None:
    assert invoke("--version").output == f"expertflow {__version__}\n"


def test_help_teaches_and_imports_no_torch() -> None:
    code = "import sys; from expertflow import cli; cli.app(['run', '--help'], standalone_mode=False); "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert found.stdout.endswith("False False\n")
    assert 'expertflow run Qwen/Qwen1.5-MoE-A2.7B "Once upon a time" --memory 6GiB' in found.stdout
    for entry in (*fields(Settings), *fields(SamplingParams)):
        if entry.name not in ("n", "logit_bias", "logprobs"):
            assert f"--{entry.name.replace('_', '-')}" in found.stdout
            assert entry.metadata["help"].split()[0] in found.stdout


@pytest.mark.parametrize("command", ["run", "serve", "batch", "plan", "check", "trace", "stats", "demo"])
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "--debug" in result.output


def test_text_goes_to_stdout_and_nothing_else(folder: Path, greedy: str) -> None:
    result = run(folder, "Hello", *GREEDY)
    assert result.stdout == greedy + "\n"
    assert result.exit_code == 0


def test_prompt_from_a_file_or_stdin(folder: Path, greedy: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Hello")
    assert run(folder, "--file", tmp_path / "prompt.txt", *GREEDY).stdout == greedy + "\n"
    assert run(folder, *GREEDY, stdin="Hello").stdout == greedy + "\n"
    for end in ("\n", "\r\n"):
        assert run(folder, *GREEDY, stdin=f"Hello{end}").stdout == greedy + "\n", "as echo ends it"
    assert run(folder, *GREEDY, stdin="Hello\n\n").stdout != greedy + "\n", "one newline was meant"


class Recorded(Exception):
    """Stops a command where it would load a model."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `run` passes to LLM; nothing is loaded."""
    found: dict[str, Any] = {}

    def record(model: str, **settings: Any) -> None:
        found.update(model=model, **settings)
        raise Recorded

    monkeypatch.setattr("expertflow.engine.llm.LLM", record)
    return found


SETTINGS = {
    "memory": ("6GiB", "6GiB"),
    "device": ("cpu", "cpu"),
    "host_memory": ("16GiB", "16GiB"),
    "cache_size": ("2.5", 2.5),
    "context": ("77", 77),
    "batch": ("3", 3),
    "sequences": ("7", 7),
    "prefill_chunk": ("9", 9),
    "policy": ("lru", "lru"),
    "predictor": ("online", "online"),
    "store": ("ram", "ram"),
    "link": ("2GB/s", "2GB/s"),
    "direct_io": (None, True),
    "overlap": (None, True),
    "look_ahead": (None, True),
}


def test_every_setting_has_a_flag(loaded: dict[str, Any]) -> None:
    assert SETTINGS.keys() == set(Settings.names())
    for name, (text, value) in SETTINGS.items():
        loaded.clear()
        flag = "--" + name.replace("_", "-")
        assert isinstance(invoke("run", "m", "hi", flag, *([text] if text else [])).exception, Recorded)
        assert loaded == {"model": "m", "revision": None, name: value}
    for name in ("direct_io", "overlap", "look_ahead"):
        invoke("run", "m", "hi", "--no-" + name.replace("_", "-"))
        assert loaded[name] is False


def test_revision_reaches_the_hub(loaded: dict[str, Any]) -> None:
    invoke("run", "owner/model", "hi", "--revision", "v2")
    assert (loaded["model"], loaded["revision"]) == ("owner/model", "v2")


@pytest.mark.parametrize(
    ("flags", "params"),
    [
        (["--temperature", "0.7", "--seed", "3"], {"temperature": 0.7}),
        (
            ["--top-k", "5", "--seed", "3"],
            {"top_k": 5},
        ),  # on a checkpoint that recommends greedy: sampling is meant
        (["--top-p", "0.5", "--seed", "3"], {"top_p": 0.5}),
        (["--min-p", "0.2", "--seed", "3"], {"min_p": 0.2}),
        (["--seed", "3"], {}),
        (
            ["--temperature", "0", "--repetition-penalty", "1.9"],
            {"temperature": 0, "repetition_penalty": 1.9},
        ),
        (["--temperature", "0", "--presence-penalty", "2"], {"temperature": 0, "presence_penalty": 2.0}),
        (["--temperature", "0", "--frequency-penalty", "2"], {"temperature": 0, "frequency_penalty": 2.0}),
    ],
)
def test_sampling_flags(folder: Path, flags: list[str], params: dict[str, Any]) -> None:
    with LLM(folder, cache_size=3) as llm:
        expected = llm.generate("Hello", SamplingParams(**{"seed": 3, "max_tokens": 10, **params}))[
            0
        ].outputs[0]
    assert run(folder, "Hello", "--max-tokens", 10, *flags).stdout == expected.text + "\n"


def test_stop_flags(folder: Path, greedy: str) -> None:
    stop = greedy[4]
    before = greedy[: greedy.index(stop)] + "\n"
    assert run(folder, "Hello", *GREEDY, "--stop", stop).stdout == before
    assert run(folder, "Hello", *GREEDY, "--stop", "never", "--stop", stop).stdout == before


def test_stop_token_and_ignore_eos(folder: Path, greedy: str, tmp_path: Path) -> None:
    with LLM(folder, cache_size=3) as llm:
        tokens = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=10))[0].outputs[0].token_ids
        before = llm.tokenizer.decode(tokens[: tokens.index(tokens[4])])
    assert run(folder, "Hello", *GREEDY, "--stop-token-ids", tokens[4]).stdout == f"{before}\n"
    ends = rewrite(folder, tmp_path / "ends", "generation_config.json", eos_token_id=tokens[4])
    assert run(ends, "Hello", *GREEDY).stdout == f"{before}\n"
    assert run(ends, "Hello", *GREEDY, "--ignore-eos").stdout == greedy + "\n"


def test_the_default_length_bows_to_the_context(folder: Path) -> None:
    result = run(folder, "Hello", "--context", 25, "--temperature", 0)
    assert result.exit_code == 0
    assert result.stdout.strip()
    too_long = run(folder, "Hello", "--context", 25, "--max-tokens", 21)
    assert (too_long.exit_code, too_long.stdout) == (2, "")
    assert "lower max_tokens to 20" in too_long.stderr


def test_stats_json_heatmap_and_stats_command(folder: Path, greedy: str, tmp_path: Path) -> None:
    saved, picture, again = (tmp_path / name for name in ("run.json", "run.png", "again.png"))
    result = run(folder, "Hello", *GREEDY, "--stats", "--stats-json", saved, "--heatmap", picture)
    assert result.stdout == greedy + "\n"
    for words in ("dense weights", "KV cache", "hit ratio", "time to first token", "tokens/s", "stalled"):
        assert words in result.stderr
    report = json.loads(saved.read_text())
    cache = report["cache"]
    assert cache["hits"] + cache["misses"] == sum(map(sum, cache["uses_LE"])) > 0
    assert cache["bytes_read"] > 0
    assert report["timing"]["generated_tokens"] == 10
    assert picture.read_bytes().startswith(b"\x89PNG")

    shown = invoke("stats", saved, "--heatmap", again)
    assert shown.exit_code == 0
    assert "hit ratio" in shown.stdout
    assert again.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_heat_map_is_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch, loaded: dict[str, Any], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("run", "m", "hi", "--heatmap", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "pip install 'expertflow-moe[plots]'" in result.stderr
    assert not loaded


def test_a_heat_map_of_layers_with_different_numbers_of_experts(tmp_path: Path) -> None:
    from expertflow.report import save_heatmap

    cache = {
        "uses_LE": [[1, 2], [1, 2, 3]],
        "loads_LE": [[0, 1], [1, 1, 1]],
        "num_slots": 2,
        "num_experts": 5,
    }
    save_heatmap({"model": "m", "cache": cache}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"name it FILE\.png"):
        save_heatmap({"model": "m", "cache": cache}, tmp_path / "x.txt")


def chat_text(folder: Path, conversation: str) -> str:
    with LLM(folder, cache_size=3) as llm:
        return llm.generate(conversation, SamplingParams(temperature=0, max_tokens=10))[0].outputs[0].text


def test_chat_keeps_its_history(chat_folder: Path) -> None:
    one = chat_text(chat_folder, "<user>Hi<assistant>")
    two = chat_text(chat_folder, f"<user>Hi<assistant>{one}<user>Why<assistant>")
    assert run(chat_folder, "--chat", *GREEDY, stdin="Hi\n\nWhy\n").stdout == f"{one}\n{two}\n"
    # The prompt is the first turn; /clear forgets.
    assert run(chat_folder, "Hi", "--chat", *GREEDY, stdin="Why\n").stdout == f"{one}\n{two}\n"
    assert run(chat_folder, "Why", "--chat", *GREEDY, stdin="/clear\nHi\n").stdout.endswith(f"\n{one}\n")


def test_chat_with_a_system_message(chat_folder: Path) -> None:
    expected = chat_text(chat_folder, "<system>Be brief<user>Hi<assistant>")
    assert run(chat_folder, "Hi", "--chat", "--system", "Be brief", *GREEDY).stdout == expected + "\n"


def test_chat_without_a_template_is_refused(folder: Path) -> None:
    result = run(folder, "--chat", *GREEDY, stdin="Hi\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "has no chat template" in result.stderr


def test_warnings_are_one_line_for_users(tmp_path: Path) -> None:
    """Not a line of our code. In a process of its own: pytest shows warnings its own way."""
    recording = Path(__file__).parents[1] / "zoo/traces/tiny-moe/math/routes.trace"
    (tmp_path / "routes.trace").write_bytes(recording.read_bytes()[:-10])
    command = [
        sys.executable,
        "-m",
        "expertflow.cli",
        "simulate",
        str(tmp_path),
        "--cache-size",
        "8",
        "--batch",
        "1",
    ]
    found = subprocess.run([*command, "--policy", "nobody"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    warning, error = found.stderr.splitlines()
    assert re.fullmatch(r"warning: record \d+ of .*routes\.trace was cut short, .*", warning)
    assert error.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "/no/where", "hi"], "/no/where does not exist"),
        (["run", "m", "hi", "--memory", "6"], "memory='6' has no unit; write '6GiB'"),
        (["run", "m", "hi", "--memory", "lots"], "memory='lots' is not a size"),
        (["run", "m", "hi", "--link", "2GB"], "link='2GB' is not per second; write for example '2GB/s'"),
        (["run", "m", "hi", "--memory=-1GiB"], "must be above zero"),
        (["run", "m", "hi", "--memory", "0"], "must be above zero"),
        (["run", "m", "hi", "--memory", "1GiB", "--cache-size", "3"], "give one of them"),
        (["run", "m", "hi", "--store", "tape"], "store='tape' is unknown"),
        (["run", "m", "hi", "--top-p", "2"], "top_p=2.0 must be"),
        (["run", "m", "hi", "--file", "x"], "give one of them"),
        (
            ["run", "m", "--file", "/no/where.txt"],
            "/no/where.txt: No such file or directory; check the spelling",
        ),
        (["run", "m", "--file", "/"], "/: Is a directory; name a file in it"),
        (["run", "m", "hi", "--system", "x"], "add --chat"),
        (["run", "m", "hi", "--stats-json", "/no/where/x.json"], "/no/where does not exist"),
        (["run", "m", "hi", "--stats-json", "/"], "/: Is a directory; name a file in it"),
        (["plan", "m", "--memory", "6"], "has no unit"),
        (["check", "m", "--memory", "6"], "has no unit"),
        (["check", "m", "--dtype", "int8"], "use auto, float32, bfloat16, float16"),
        (["stats", "/no/where.json"], "/no/where.json"),
        (["stats", __file__], "is not JSON"),
        (["demo", "--model", "/no/where"], "/no/where does not exist"),
    ],
)
def test_errors_are_one_clean_message(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_statistics_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert "holds no statistics of expertflow" in invoke("stats", tmp_path / "x.json").stderr


def test_debug_shows_the_traceback() -> None:
    assert isinstance(invoke("run", "/no/where", "hi", "--debug").exception, FileNotFoundError)


def test_plan_and_check_pass_their_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("expertflow.forecast.run_plan", lambda *a, **k: calls.append((a, k)) or 1)
    monkeypatch.setattr("expertflow.check.run_check", lambda *a, **k: calls.append((a, k)) or 0)
    flags = ["m", "--cache-size", 4, "--revision", "v2", "--json"]
    assert invoke("plan", *flags, "--hit-ratio", 0.5, "--past", 7).exit_code == 1
    more = [
        "--prompt",
        "a",
        "--prompt",
        "b",
        "--max-tokens",
        5,
        "--seed",
        6,
        "--dtype",
        "float16",
        "--layer-by-layer",
    ]
    assert invoke("check", *flags, *more).exit_code == 0
    settings = Settings(cache_size=4.0)
    assert calls == [
        (("m", settings), {"revision": "v2", "hit_ratio": 0.5, "past": 7, "as_json": True}),
        (
            ("m", settings),
            {
                "revision": "v2",
                "prompts": ["a", "b"],
                "max_new_tokens": 5,
                "seed": 6,
                "dtype": "float16",
                "layer_by_layer": True,
                "as_json": True,
            },
        ),
    ]


def batch(folder: Path, lines: list[Any], tmp_path: Path, *arguments: object) -> Result:
    requests = tmp_path / "in.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = ["--cache-size", 3, "--context", 64, *GREEDY]
    return invoke("batch", requests, tmp_path / "out.jsonl", "--model", folder, *small, *arguments)


def test_batch_answers_a_file(folder: Path, greedy: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("stats.json", "timeline.json")]
    result = batch(
        folder, ["Hello", {"prompt": ""}, "Bye"], tmp_path, "--stats-json", files[0], "--timeline", files[1]
    )
    assert result.exit_code == 1
    assert "3 lines, 2 answered now with 20 tokens" in result.stderr
    assert "1 failed, their results say why" in result.stderr
    found = {line["id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert found["line-1"]["text"] == greedy
    assert "prompt is empty" in found["line-2"]["error"]["message"]
    saved = json.loads(files[0].read_text())
    assert (saved["engine"]["generated_tokens"], saved["engine"]["finished"]) == (20, 2)
    shown = invoke("stats", files[0]).output
    assert "20 tokens in" in shown
    assert "sequences, joint" in shown
    names = {event.get("cat") for event in json.loads(files[1].read_text())["traceEvents"]}
    assert {"compute", "link"} <= names


def test_batch_groups_by_predicted_experts(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "stats.json"
    result = batch(
        folder,
        [{"prompt": letter * 3, "ignore_eos": True} for letter in "abcdefgh"],
        tmp_path,
        *("--schedule", "auto", "--execution", "split", "--predictor", "online", "--stats-json", saved),
        *("--batch-size", 2, "--sequences", 8, "--cache-size", 2),
    )
    assert result.exit_code == 0, result.output
    engine = json.loads(saved.read_text())["engine"]
    assert engine["schedule"] == "auto"
    assert engine["groupings"] + engine["late"] > 5
    shown = invoke("stats", saved).output
    assert "predicting and grouping" in shown
    assert "hidden, late" in shown


def test_batch_settings_reach_the_model(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []

    def load(model: str, revision: str | None, settings: dict[str, Any]) -> None:
        seen.append(settings)
        raise ValueError("seen")

    monkeypatch.setattr("expertflow.commands.batch.load", load)
    batch(folder, ["a"], tmp_path, "--batch-size", 3, "--predictor", "online")
    batch(folder, ["a"], tmp_path, "--sequences", 40)
    assert [(s["batch"], s["sequences"]) for s in seen] == [(3, 6), (8, 40)]
    assert seen[0]["predictor"] == "online"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--execution", "sideways"], "--execution sideways: use joint or split"),
        (["--schedule", "best"], "--schedule best: use fixed or auto"),
        (["--schedule", "auto"], "groups by predicted experts; add --predictor online"),
        (["--patience", "3"], "--patience 3 is of --schedule auto"),
        (["--sequences", "2"], "sequences=2 must be a whole number of at least batch=8"),
        (["--temperature", "-1"], "temperature=-1.0 must be a number at least 0"),
        (["--timeline", "no/such/folder/x.json"], "does not exist, so x.json cannot be written"),
    ],
)
def test_batch_checks_before_loading(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = batch(folder, ["a"], tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out.jsonl").exists()


def test_batch_files_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    missing = invoke("batch", tmp_path / "no.jsonl", tmp_path / "out.jsonl", "--model", folder)
    assert missing.exit_code == 2
    assert "no.jsonl is no file; give one with a request in each line" in " ".join(missing.stderr.split())
    requests = tmp_path / "in.jsonl"
    requests.write_text('"a"\n')
    same = invoke("batch", requests, requests, "--model", folder)
    assert "is the file of requests" in same.stderr
    (tmp_path / "out.jsonl").write_text("precious")
    assert "exists and is no unfinished batch" in batch(folder, ["a"], tmp_path).stderr


def test_run_saves_a_timeline(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert run(folder, "Hello", *GREEDY, "--timeline", path).exit_code == 0
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert names.count("prompt") == 1
    assert names.count("decode") == 9


def test_demo_shows_a_sample_statistics_and_parity(folder: Path) -> None:
    result = invoke("demo", "--model", folder, "--prompt", "Hello", "--max-tokens", 6)
    assert result.exit_code == 0, result.output
    for words in ("Hello", "hit ratio", "transformers", "passed"):
        assert words in result.stdout
    assert "max |Δlogit|" in result.stdout.split("And in float32")[1]


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_are_nobodys_files(closed: tuple[int, ...], folder: Path, tmp_path: Path) -> None:
    """`expertflow run ... >&-` is no traceback, and nothing else gets the numbers of the streams."""
    saved = tmp_path / "run.json"
    script = "import os, sys\n"
    script += f"for number in {closed}: os.close(number)\n"
    # A new interpreter, since this one has its streams already.
    script += "os.execv(sys.executable, [sys.executable, '-m', 'expertflow.cli', *sys.argv[1:]])"
    arguments = ["run", folder, "Hello", "--cache-size", 3, *GREEDY, "--stats-json", saved]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(saved.read_text())["timing"]["generated_tokens"] > 0


def expertflow(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "expertflow.cli", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_ctrl_c_during_generation_leaves_with_130(folder: Path, tmp_path: Path) -> None:
    """Sent when the first characters are there; statistics are still written."""
    saved = tmp_path / "run.json"
    # ignore_eos and the whole context: it cannot end by itself before the signal.
    process = expertflow(
        "run", folder, "Hello", "--cache-size", 3, "--max-tokens", 240, "--ignore-eos", "--stats-json", saved
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert len(first + rest) < 240
    assert 0 < json.loads(saved.read_text())["timing"]["generated_tokens"] < 240


INTERRUPTED_LOAD = """
import signal, sys
from expertflow import cli
from expertflow.models.attach import ExpertFlowQuantizer

finish = ExpertFlowQuantizer._process_model_after_weight_loading

def interrupted(self, model, **kwargs):
    finish(self, model, **kwargs)  # the loader thread runs now
    signal.raise_signal(signal.SIGINT)

ExpertFlowQuantizer._process_model_after_weight_loading = interrupted
sys.argv[0] = "expertflow"
cli.main()
"""


def test_ctrl_c_during_loading_leaves_with_130(folder: Path) -> None:
    arguments = ["run", str(folder), "Hello", "--cache-size", "3"]
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_LOAD, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert process.returncode == 130, process.stderr
    assert (process.stdout, process.stderr) == ("", "")


def test_a_reader_that_leaves_is_no_error(folder: Path) -> None:
    process = expertflow("run", folder, "Hello", "--cache-size", 3, "--max-tokens", 200, "--ignore-eos")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in errors
