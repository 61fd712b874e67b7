"""Recording a trace: what is in it, that a kill loses and repeats nothing, and what is refused."""

from __future__ import annotations

import json
import lzma
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from expertflow import LLM, SamplingParams, cli
from expertflow.config import Tracing
from expertflow.engine.datasets import HUB_SETS, Example, load_examples, split_of
from expertflow.engine.tracing import record_trace
from expertflow.models.capture import capture_routes
from expertflow.trace import FILE_NAME, Trace, TracedSequence, read_trace
from tests.engine.test_llm import CHAT_TEMPLATE, rewrite
from tests.families import FAMILIES, NUM_EXPERTS, PAD, write_checkpoint

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    Example("Hello", "World", "train", "chat"),
    Example("A longer question than that", "No", "test", "chat"),
    Example("Why?", "Because of it", "train", "math"),
]
SHORT = Tracing(runs=2, max_tokens=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tracing")
    return {name: write_checkpoint(name, root / name) for name in ("qwen2_moe", "switch")}


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "talk.jsonl"
    rows = [{"prompt": f"Question {n}" + "?" * (n % 4), "response": f"Answer {n}"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def record(folder: Path, output: Path, tracing: Tracing = SHORT, **settings: Any) -> Trace:
    with LLM(folder, **{"cache_size": 3, "batch": 4, **settings}) as llm:
        record_trace(llm, EXAMPLES, output, tracing, "few")
    return read_trace(output)


def assert_same(a: TracedSequence, b: TracedSequence) -> None:
    for name, value in vars(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def routes_alone(llm: LLM, ids: list[int], decoder_ids: list[int] | None = None) -> list[np.ndarray]:
    """Routes of each stack in one plain forward pass of one sequence."""
    kwargs = {} if decoder_ids is None else {"decoder_input_ids": torch.tensor([decoder_ids])}
    with torch.no_grad(), capture_routes(llm.model) as capture:
        llm.model(input_ids=torch.tensor([ids]), **kwargs)  # type: ignore[operator]
    return [routed.sequences()[0].routes_TLK for routed in capture.passes]


@pytest.mark.parametrize("chunk", [512, 4])
def test_a_decoder_only_recording(folders: dict[str, Path], tmp_path: Path, chunk: int) -> None:
    """Tokens are those that LLM.generate gives, routes those of one pass over them, also in prefill chunks."""
    trace = record(folders["qwen2_moe"], tmp_path, prefill_chunk=chunk)
    meta = trace.meta
    assert (meta.experts_per_layer, meta.source_layers, meta.top_k) == ((NUM_EXPERTS,) * 2, 0, 3)
    assert (meta.vocab_size, meta.dataset, meta.model) == (128, "few", "qwen2_moe")
    assert [(s.prompt, s.run) for s in trace] == [(p, r) for p in range(3) for r in range(2)]
    assert [(s.split, s.task) for s in trace][::2] == [("train", "chat"), ("test", "chat"), ("train", "math")]
    with LLM(folders["qwen2_moe"], cache_size=3) as llm:
        for sequence in trace:
            prompt = list(llm.tokenizer(EXAMPLES[sequence.prompt].prompt).input_ids)
            assert sequence.num_prefill == len(prompt)
            assert sequence.target_ids_T[: len(prompt)].tolist() == prompt
            assert sequence.source_ids_S.size == sequence.source_routes_SLK.size == 0
            # Six sampled, unless the text ended; the last one never ran.
            assert len(sequence.target_ids_T) <= len(prompt) + 5
            (routes,) = routes_alone(llm, sequence.target_ids_T.tolist())
            np.testing.assert_array_equal(sequence.target_routes_TLK, routes)
            assert sequence.target_weights_TLK is not None
            # The largest of eight probabilities; small ones may be rounded to 0 on disk.
            assert sequence.target_weights_TLK[:, :, 0].min() >= 1 / NUM_EXPERTS
    for first, second in zip(list(trace)[::2], list(trace)[1::2], strict=True):
        assert first.target_ids_T.tolist() != second.target_ids_T.tolist(), "two runs drew the same answer"


def test_an_encoder_decoder_recording(folders: dict[str, Path], tmp_path: Path) -> None:
    trace = record(folders["switch"], tmp_path)
    assert (trace.meta.experts_per_layer, trace.meta.source_layers, trace.meta.top_k) == (
        (NUM_EXPERTS,) * 4,
        2,
        1,
    )
    with LLM(folders["switch"], cache_size=3) as llm:
        for sequence in trace:
            assert sequence.source_ids_S.tolist() == llm.tokenizer(EXAMPLES[sequence.prompt].prompt).input_ids
            assert (sequence.target_ids_T[0], sequence.num_prefill) == (PAD, 1)
            source, _ = routes_alone(llm, sequence.source_ids_S.tolist(), sequence.target_ids_T.tolist())
            np.testing.assert_array_equal(sequence.source_routes_SLK, source)
            # Step by step the capacity of 4 is never reached, so only the first tokens compare with one pass.
            for step in range(1, len(sequence.target_ids_T) + 1):
                _, target = routes_alone(
                    llm, sequence.source_ids_S.tolist(), sequence.target_ids_T[:step].tolist()
                )
                placed = target[-1] < NUM_EXPERTS
                np.testing.assert_array_equal(
                    sequence.target_routes_TLK[step - 1][placed], target[-1][placed]
                )
    assert (np.concatenate([s.target_routes_TLK for s in trace]) < NUM_EXPERTS).all()


def test_the_answer_is_the_one_that_generate_gives(folders: dict[str, Path], tmp_path: Path) -> None:
    trace = record(folders["qwen2_moe"], tmp_path, Tracing(runs=1, max_tokens=6, temperature=0))
    with LLM(folders["qwen2_moe"], cache_size=3) as llm:
        for example, sequence in zip(EXAMPLES, trace, strict=True):
            (output,) = llm.generate(example.prompt, SamplingParams(temperature=0, max_tokens=6))
            assert sequence.target_ids_T[sequence.num_prefill :].tolist() == output.outputs[0].token_ids[:-1]


@pytest.mark.parametrize("name", ["qwen2_moe", "switch"])
def test_rows_that_end_before_others_end_there(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A batch runs on until its longest answer ends; what the others then read is padding, not theirs."""
    ends = list(range(1, 30))  # a quarter of the vocabulary
    folder = rewrite(folders[name], tmp_path / "ends", "generation_config.json", eos_token_id=ends)
    trace = record(folder, tmp_path / "out", Tracing(runs=2, max_tokens=12))
    answers = [sequence.target_ids_T[sequence.num_prefill :] for sequence in trace]
    assert len(set(map(len, answers))) > 2
    assert not np.isin(np.concatenate(answers), ends).any()
    assert all(len(sequence.target_routes_TLK) == len(sequence.target_ids_T) for sequence in trace)


@pytest.mark.parametrize("name", ["qwen2_moe", "switch"])
def test_forced_responses(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """One run a prompt: the data set's own response, cut at max_tokens, with the routes of one pass over it."""
    trace = record(folders[name], tmp_path, Tracing(teacher_forced=True, max_tokens=9))
    assert [(s.prompt, s.run) for s in trace] == [(0, 0), (1, 0), (2, 0)]
    with LLM(folders[name], cache_size=3) as llm:
        for example, sequence in zip(EXAMPLES, trace, strict=True):
            assert example.response is not None
            prompt = list(llm.tokenizer(example.prompt).input_ids)
            response = llm.tokenizer(example.response[:9], add_special_tokens=False).input_ids
            known = [PAD] if FAMILIES[name].seq2seq else prompt
            assert sequence.target_ids_T.tolist() == known + response
            assert sequence.num_prefill == len(known)
            *_, target = routes_alone(
                llm, *((prompt, known + response) if FAMILIES[name].seq2seq else (known + response,))
            )
            np.testing.assert_array_equal(sequence.target_routes_TLK, target)


def test_prompts_are_rendered_with_the_chat_template(folders: dict[str, Path], tmp_path: Path) -> None:
    chat = rewrite(
        folders["qwen2_moe"], tmp_path / "chat", "tokenizer_config.json", chat_template=CHAT_TEMPLATE
    )
    trace = record(chat, tmp_path / "out")
    with LLM(chat, cache_size=3) as llm:
        expected = llm.encode_chat([{"role": "user", "content": "Hello"}])
    assert trace[0].target_ids_T[: trace[0].num_prefill].tolist() == expected
    assert trace.meta.settings["chat"] is True


def test_more_prompts_may_follow_but_not_other_settings(folders: dict[str, Path], tmp_path: Path) -> None:
    record(folders["qwen2_moe"], tmp_path, Tracing(prompts=1, runs=2, max_tokens=6))
    assert len(record(folders["qwen2_moe"], tmp_path)) == 6
    with pytest.raises(ValueError, match="was recorded with settings="):
        record(folders["qwen2_moe"], tmp_path, Tracing(runs=2, max_tokens=6, seed=1))
    with pytest.raises(ValueError, match="was recorded with fingerprint="):
        record(folders["switch"], tmp_path)


def test_a_recording_of_more_sequences_than_a_batch_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """They would join and leave between steps, and passes would have other rows than the recording's batches."""
    with pytest.raises(
        ValueError, match=r"sequences=8 and batch=4: a recording runs one batch at a time.*--sequences"
    ):
        record(folders["qwen2_moe"], tmp_path, sequences=8)


def test_long_prompts_are_left_out_and_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    with LLM(folders["qwen2_moe"], cache_size=3, batch=4, context=14) as llm:
        assert record_trace(llm, EXAMPLES, tmp_path, SHORT, "few").too_long == 1
        with pytest.raises(ValueError, match=r"no prompt fits the context of 14 tokens.*--context"):
            record_trace(llm, EXAMPLES, tmp_path, Tracing(max_tokens=60), "few")
    assert [s.prompt for s in read_trace(tmp_path)] == [0, 0, 2, 2]


def test_a_missing_response_cannot_be_forced(folders: dict[str, Path], tmp_path: Path) -> None:
    with (
        LLM(folders["qwen2_moe"], cache_size=3) as llm,
        pytest.raises(ValueError, match="prompt 0 has no response"),
    ):
        record_trace(llm, [Example("Hi", None, "train", "x")], tmp_path, Tracing(teacher_forced=True), "few")


STOPPED = """
import os, signal, sys
from expertflow import cli
from expertflow.trace import TraceWriter

signum, left = signal.Signals[sys.argv.pop(1)], int(sys.argv.pop(1))
append = TraceWriter.append

def counted(self, sequence):
    global left
    append(self, sequence)
    left -= 1
    if left == 0:
        if signum == signal.SIGKILL:
            self._file.write(b"half")  # as a kill in the middle of a write leaves it
        os.kill(os.getpid(), signum)

TraceWriter.append = counted
cli.main()
"""


def stopped(signum: str, after: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that gets a signal behind its `after`-th sequence."""
    return subprocess.run(
        [sys.executable, "-c", STOPPED, signum, str(after), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )


def trace_command(folder: Path, prompt_file: Path, output: Path) -> list[str]:
    return [
        "trace", str(folder), "--dataset", str(prompt_file), "-o", str(output), "--runs", "2", "--max-tokens", "5",
        "--cache-size", "3", "--batch", "4",
    ]  # fmt: skip


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_a_killed_recording_goes_on_as_if_nothing_had_happened(
    folders: dict[str, Path], prompt_file: Path, tmp_path: Path
) -> None:
    """kill -9 in the middle of a batch of four, twice, each time with half a record at the end of the file.

    The rest of a batch run alone has other last bits; so whole batches run again. Equal files mean equal
    order as well: nothing lost, nothing twice.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert invoke(*trace_command(folders["switch"], prompt_file, whole)).exit_code == 0
    arguments = trace_command(folders["switch"], prompt_file, parts)
    for after, there in ((3, 3), (7, 10)):
        killed = stopped("SIGKILL", after, arguments)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with pytest.warns(UserWarning, match="cut short"):
            assert len(read_trace(parts)) == there
    result = invoke(*arguments)
    assert "24 sequences (14 new" in result.stderr
    assert "24 sequences (0 new" in invoke(*arguments).stderr
    for a, b in zip(read_trace(whole), read_trace(parts), strict=True):
        assert_same(a, b)
    assert (whole / FILE_NAME).read_bytes() == (parts / FILE_NAME).read_bytes()


def test_ctrl_c_leaves_a_readable_trace(folders: dict[str, Path], prompt_file: Path, tmp_path: Path) -> None:
    process = stopped("SIGINT", 5, trace_command(folders["qwen2_moe"], prompt_file, tmp_path / "out"))
    assert process.returncode == 130, process.stderr
    assert "Traceback" not in process.stderr
    assert len(read_trace(tmp_path / "out")) == 5


def test_flags_reach_the_recording(folders: dict[str, Path], prompt_file: Path, tmp_path: Path) -> None:
    flags = ["--prompts", 3, "--temperature", 0.5, "--seed", 4, "--task", "questions", "--batch", 3]
    assert invoke(*trace_command(folders["qwen2_moe"], prompt_file, tmp_path), *flags).exit_code == 0
    trace = read_trace(tmp_path)
    assert trace.tasks == ("questions",)
    assert len(trace) == 6
    expected = {
        "runs": 2,
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 4,
        "batch": 3,
        "teacher_forced": False,
    }
    assert trace.meta.settings == {**expected, "chat": False}
    assert trace.meta.dataset == "talk.jsonl"


def test_eight_at_once_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, prompt_file: Path, tmp_path: Path
) -> None:
    found: dict[str, Any] = {}

    def note(model: str, **settings: Any) -> None:
        found.update(settings)
        raise ValueError("far enough")

    monkeypatch.setattr("expertflow.engine.llm.LLM", note)
    invoke("trace", "m", "--dataset", prompt_file, "-o", tmp_path / "out")
    assert found["batch"] == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "squad"], "no file and none of alpaca, wmt16, xsum, aime2024"),
        (["--runs", "0"], "runs=0 must be a whole number of at least 1"),
        (["--temperature", "0"], "runs=3 at temperature=0 would be alike"),
        (["--temperature", "-1"], "temperature=-1.0 must be finite"),
        (["--teacher-forced", "--seed", "1"], "--seed is of sampled answers"),
        (["-o", __file__], "is a file; -o takes a folder"),
        (["--cache-size", "0"], "cache_size=0.0 must be a finite number above 0"),
    ],
)
def test_wrong_flags_are_one_line_of_error(
    prompt_file: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    result = invoke("trace", "nowhere/", "--dataset", prompt_file, "-o", tmp_path / "out", *flags)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is not JSON"),
        ("[1]", 'line 2 of .* has no "prompt" text'),
        ('{"prompt": "  "}', 'line 2 of .* has no "prompt" text'),
        ('{"prompt": "a", "response": 3}', 'line 2 of .*"response" is 3'),
        ('{"prompt": "a", "split": "valid"}', "\"split\" is 'valid'; it can be train or test"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_examples(str(path), 10)
    assert len(load_examples(str(path), 1)) == 1


def test_files_plain_and_compressed(tmp_path: Path) -> None:
    text = (
        '{"prompt": "a", "response": "b", "split": "test", "source": "s", "task": "t"}\n\n{"prompt": "c"}\n'
    )
    (tmp_path / "mine.jsonl").write_text(text)
    (tmp_path / "mine.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    expected = [Example("a", "b", "test", "t"), Example("c", None, split_of("c"), "mine")]
    assert load_examples(str(tmp_path / "mine.jsonl"), 10) == expected
    assert load_examples(str(tmp_path / "mine.jsonl.xz"), 10) == expected
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(text.encode())[:-20])
    with pytest.raises(ValueError, match="cannot be read to its end"):
        load_examples(str(tmp_path / "cut.jsonl.xz"), 10)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no prompts"):
        load_examples(str(tmp_path / "empty.jsonl"), 10)


def test_about_a_tenth_of_the_prompts_is_for_testing() -> None:
    splits = [split_of(f"prompt {n}") for n in range(2000)]
    assert 160 < splits.count("test") < 240
    assert split_of("Hello") == "train"  # for ever: recordings of years must agree


ROWS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str]]]] = {
    "alpaca": (
        [
            {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is"},
            {"instruction": "Say hi.", "input": "", "output": "hi", "text": "Below is"},
        ],
        [("Add.\n\n1 and 2", "3"), ("Say hi.", "hi")],
    ),
    "wmt16": ([{"translation": {"de": "Ja", "en": "Yes"}}], [("Translate German to English:\nJa", "Yes")]),
    "xsum": (
        [{"document": "Long.", "summary": "Short.", "id": "1"}],
        [("Summarize the following text in one sentence:\nLong.", "Short.")],
    ),
    "aime2024": (
        [{"ID": "2024-I-1", "Problem": "1+1?", "Solution": "Count.", "Answer": 2}],
        [("1+1?", "Count.\n\nAnswer: 2")],
    ),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the datasets package that streams ROWS and notes what it was asked."""
    asked: dict[str, Any] = {}

    def load_dataset(
        repository: str, configuration: str | None, split: str, streaming: bool
    ) -> Iterator[dict]:
        asked.update(repository=repository, configuration=configuration, split=split, streaming=streaming)
        (name,) = [name for name, hub_set in HUB_SETS.items() if hub_set.repository == repository]
        yield from asked.get("rows") or ROWS[name][0]
        if "limited" in asked:
            raise AssertionError("more rows were downloaded than were asked for")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize("name", list(HUB_SETS))
def test_rows_of_the_hub_become_prompts(hub: dict[str, Any], name: str) -> None:
    examples = load_examples(name, 10)
    assert [(example.prompt, example.response) for example in examples] == ROWS[name][1]
    assert all(example.task == HUB_SETS[name].task for example in examples)
    assert hub["configuration"] == ("de-en" if name == "wmt16" else None)
    assert (hub["split"], hub["streaming"]) == ("train", True)
    hub["limited"] = True
    assert len(load_examples(name, 1, task="mine")) == 1
    assert load_examples(name, 1, task="mine")[0].task == "mine"


def test_a_changed_schema_is_named(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"question": "?"}]
    with pytest.raises(ValueError, match=r"row 0 of EdinburghNLP/xsum has fields \['question'\]"):
        load_examples("xsum", 1)


def test_without_the_package_or_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'expertflow-moe\[datasets\]'"):
        load_examples("alpaca", 1)

    def offline(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no route to host\nmore lines")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(
        ConnectionError, match=r"could not be loaded \(RuntimeError: no route to host\); check"
    ):
        load_examples("alpaca", 1)
