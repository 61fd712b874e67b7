"""Offline batches: every line gets its answer once, whatever befalls the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expertflow import LLM, SamplingParams
from expertflow.engine.batch_results import BatchResults
from expertflow.engine.batch_run import BatchProgress, BatchRun
from expertflow.engine.engine import Engine
from tests.families import write_checkpoint

LINES: list[Any] = [
    {"id": f"q{number}", "prompt": f"text {'x' * number}", "max_tokens": 2 + number % 4, "ignore_eos": True}
    for number in range(12)
]
DEFAULTS = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = write_checkpoint(
        "qwen2_moe", tmp_path_factory.mktemp("batch") / "qwen2_moe", dtype=torch.float64
    )
    with LLM(folder, cache_size=3, context=64, batch=2, sequences=4) as llm:
        yield llm


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def run(
    llm: LLM, lines: list[Any], folder: Path, progress: Any = lambda state: None, **options: Any
) -> BatchProgress:
    path = write(folder / "in.jsonl", lines)
    with Engine(llm) as engine, BatchResults(folder / "out.jsonl", {}) as results:
        return BatchRun(llm, engine, path, results, DEFAULTS, **options).run(progress)


def answers(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    found = {line.get("custom_id") or line["id"] or f"line {line['line']}": line for line in lines}
    assert len(found) == len(lines), "a line was answered twice"
    return found


def test_every_line_gets_the_answer_it_gets_alone(llm: LLM, tmp_path: Path) -> None:
    state = run(llm, LINES, tmp_path)
    assert (state.total, state.done, state.failed, state.answered_now) == (12, 12, 0, 12)
    assert state.tokens_now == sum(line["max_tokens"] for line in LINES)
    found = answers(tmp_path)
    for line in LINES:
        params = SamplingParams(temperature=0, max_tokens=line["max_tokens"], ignore_eos=True)
        ((alone,),) = (output.outputs for output in llm.generate(line["prompt"], params))
        assert found[line["id"]]["text"] == alone.text
        assert found[line["id"]]["prompt"] == line["prompt"]
    assert not (tmp_path / "out.jsonl.run").exists()


def test_a_run_that_was_stopped_continues_without_loss_or_repetition(llm: LLM, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    run(llm, LINES, whole)

    def stop(state: BatchProgress) -> None:
        if state.done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(llm, LINES, tmp_path, stop)
    first = (tmp_path / "out.jsonl").read_text()
    assert 5 <= len(first.splitlines()) < 12
    state = run(llm, LINES, tmp_path)
    assert (tmp_path / "out.jsonl").read_text().startswith(first)
    assert (state.done, state.answered_now) == (12, 12 - len(first.splitlines()))
    texts, wanted = ({key: line["text"] for key, line in answers(at).items()} for at in (tmp_path, whole))
    assert texts == wanted


def test_lines_that_fail_are_reported_and_the_others_go_on(llm: LLM, tmp_path: Path) -> None:
    lines = [
        LINES[0],
        "nonsense",
        {"id": "long", "prompt": "x" * 300},
        {"id": "role", "messages": [{"role": "user", "content": "Hello"}]},
        {"id": "token", "prompt": [10**6]},
        LINES[0],
        {"custom_id": "o", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 99}},
        LINES[1],
    ]
    state = run(llm, lines, tmp_path)
    assert (state.done, state.failed) == (8, 6)
    found = answers(tmp_path)
    assert "not a line of JSON" in found["line 2"]["error"]["message"]
    assert "does not fit the context of 64" in found["long"]["error"]["message"]
    assert "chat template" in found["role"]["error"]["message"]
    assert "token ids outside" in found["token"]["error"]["message"]
    assert "used in line 1 already" in found["line 6"]["error"]["message"]
    assert found["o"]["response"]["status_code"] == 400
    assert found["q0"]["text"]
    assert found["q1"]["text"]


def test_messages_go_through_the_chat_template(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'wizard' %}{{ raise_exception('no wizards') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    monkeypatch.setattr(llm.tokenizer, "chat_template", template, raising=False)
    lines = [
        {"id": role, "messages": [{"role": role, "content": "Hi"}], "max_tokens": 3}
        for role in ("user", "wizard")
    ]
    run(llm, lines, tmp_path)
    found = answers(tmp_path)
    alone = llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(temperature=0, max_tokens=3))
    assert found["user"]["text"] == alone[0].outputs[0].text
    assert found["user"]["messages"] == lines[0]["messages"]
    assert "no wizards" in found["wizard"]["error"]["message"]


@pytest.mark.parametrize(("prompt", "tokens"), [("ab", 40), ("a" * 50, None)])
def test_the_length_that_nobody_gave_is_cut_to_the_context(
    llm: LLM, tmp_path: Path, prompt: str, tokens: int | None
) -> None:
    room = llm.context - len(llm.tokenizer(prompt).input_ids)
    run(llm, [{"id": "a", "prompt": prompt, "ignore_eos": True}], tmp_path, default_tokens=40)
    assert answers(tmp_path)["a"]["usage"]["completion_tokens"] == (tokens or room)


def test_a_prompt_that_fills_the_context_is_told_so(llm: LLM, tmp_path: Path) -> None:
    """Not that its answer may have -29 tokens, which nobody asked for."""
    run(llm, [{"id": "a", "prompt": "a" * (llm.context + 30)}], tmp_path, default_tokens=40)
    message = answers(tmp_path)["a"]["error"]["message"]
    assert "prompt" in message
    assert str(llm.context) in message
    assert "max_tokens=-" not in message


@pytest.mark.parametrize(
    "error", [OSError("the disk is gone"), RuntimeError("closed"), MemoryError("no room")]
)
def test_an_error_that_is_not_the_requests_ends_the_run_and_loses_nothing(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    steps = 0
    real = Engine._take

    def fail(self: Engine, outcomes: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise error
        real(self, outcomes)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "_take", fail)
        with pytest.raises(type(error), match=str(error)):
            run(llm, LINES, tmp_path)
    before = len((tmp_path / "out.jsonl").read_text().splitlines())
    assert 0 < before < 12
    assert run(llm, LINES, tmp_path).answered_now == 12 - before


def test_no_more_lines_are_held_than_there_is_use_for(llm: LLM, tmp_path: Path) -> None:
    seen = []
    path = write(tmp_path / "in.jsonl", [line | {"id": str(n)} for n, line in enumerate(LINES * 5)])
    with Engine(llm) as engine, BatchResults(tmp_path / "out.jsonl", {}) as results:
        batch = BatchRun(llm, engine, path, results, DEFAULTS)
        batch.run(lambda state: seen.append(len(batch._running)))
    assert max(seen) == 20
    assert len(answers(tmp_path)) == 60


KILLED = """
import os, signal, sys
from expertflow import LLM, SamplingParams
from expertflow.engine.batch_results import BatchResults
from expertflow.engine.batch_run import BatchRun
from expertflow.engine.engine import Engine

def kill(state):
    if state.done >= 5:
        os.kill(os.getpid(), signal.SIGKILL)

folder, requests, out = sys.argv[1:]
with LLM(folder, cache_size=3, context=64, batch=2, sequences=4) as llm, Engine(llm) as engine:
    BatchRun(llm, engine, requests, BatchResults(out, {}), SamplingParams(temperature=0)).run(kill)
"""


def test_a_run_that_was_killed_continues_without_loss_or_repetition(llm: LLM, tmp_path: Path) -> None:
    path, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, llm.name, path, out],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    first = out.read_text()
    assert 5 <= len(first.splitlines()) < 12
    state = run(llm, LINES, tmp_path)
    assert (state.done, state.answered_now) == (12, 12 - len(first.splitlines()))
    assert out.read_text().startswith(first)
    assert answers(tmp_path).keys() == {line["id"] for line in LINES}
