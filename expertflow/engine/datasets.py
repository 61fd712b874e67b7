"""Data sets as prompts: four sets of the hub, by name, and files of {"prompt", "response"} lines.

The hub's sets come through the `datasets` package, an optional extra, as a stream: only as many rows are
downloaded as are asked for. What a row becomes is decided here, by the functions below.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from expertflow.trace import SPLITS

TEST_SHARE = 10  # one prompt in so many is of the test split, where a data set does not say


@dataclass(frozen=True)
class Example:
    """A prompt, the data set's own answer to it if there is one, and where it belongs."""

    prompt: str
    response: str | None
    split: str  # "train" | "test"
    task: str


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub and what its rows become."""

    repository: str
    task: str
    convert: Callable[[Mapping[str, Any]], tuple[str, str]]  # a row -> (prompt, response)
    configuration: str | None = None


def alpaca(row: Mapping[str, Any]) -> tuple[str, str]:
    """{instruction, input, output}; input is often empty."""
    prompt = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return prompt, row["output"]


def wmt16(row: Mapping[str, Any]) -> tuple[str, str]:
    """{translation: {de, en}}, from German to English."""
    return f"Translate German to English:\n{row['translation']['de']}", row["translation"]["en"]


def xsum(row: Mapping[str, Any]) -> tuple[str, str]:
    """{document, summary}"""
    return f"Summarize the following text in one sentence:\n{row['document']}", row["summary"]


def aime2024(row: Mapping[str, Any]) -> tuple[str, str]:
    """{Problem, Solution, Answer}; the answer is a number."""
    return row["Problem"], f"{row['Solution']}\n\nAnswer: {row['Answer']}"


HUB_SETS = {
    "alpaca": HubSet("tatsu-lab/alpaca", "chat", alpaca),
    "wmt16": HubSet("wmt/wmt16", "translation", wmt16, "de-en"),
    "xsum": HubSet("EdinburghNLP/xsum", "summarization", xsum),
    "aime2024": HubSet("Maxwell-Jia/AIME_2024", "math", aime2024),
}


def load_examples(dataset: str, limit: int, task: str | None = None) -> list[Example]:
    """The first `limit` examples of a data set (fewer when it has fewer), in its order.

    dataset: a name in HUB_SETS, or a file of JSON lines, plain or .xz. task: replaces what the examples
    would be recorded as. Raises ValueError, FileNotFoundError or ConnectionError with the remedy.
    """
    if dataset in HUB_SETS:
        examples = _from_hub(HUB_SETS[dataset], limit, task)
    else:
        path = Path(dataset).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"dataset={dataset!r} is no file and none of {', '.join(HUB_SETS)}; give one of these, or a "
                f'file of {{"prompt": ..., "response": ...}} lines (.jsonl or .jsonl.xz)'
            )
        examples = list(islice(_from_file(path, task), limit))
    if not examples:
        raise ValueError(f"{dataset} has no prompts; give a data set with at least one")
    return examples


def split_of(prompt: str) -> str:
    """By the prompt's text, so that equal prompts of different rows are on one side."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def _from_hub(hub_set: HubSet, limit: int, task: str | None) -> list[Example]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{hub_set.repository} is loaded with the datasets package, which is not installed; "
            f"`pip install 'expertflow-moe[datasets]'`, or give a file of prompts"
        ) from None
    try:
        stream = datasets.load_dataset(
            hub_set.repository, hub_set.configuration, split="train", streaming=True
        )
        rows = list(islice(stream, limit))
    except Exception as error:  # the HTTP clients underneath, and so their errors, differ between versions
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConnectionError(
            f"{hub_set.repository} could not be loaded ({type(error).__name__}: {reason}); check the network "
            f"and HF_HUB_OFFLINE, or give a file of prompts"
        ) from None
    examples = []
    for number, row in enumerate(rows):
        try:
            prompt, response = hub_set.convert(row)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"row {number} of {hub_set.repository} has fields {sorted(row)}, without what is expected "
                f"({error}); the data set has changed: save it as a file of prompts and give that"
            ) from None
        examples.append(Example(prompt, response, split_of(prompt), task or hub_set.task))
    return examples


def _from_file(path: Path, task: str | None) -> Iterator[Example]:
    task_of_file = path.name.removesuffix(".xz").removesuffix(".jsonl")
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _from_line(line, f"line {number} of {path}", task, task_of_file)
        except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} cannot be read to its end ({error}); give a whole .jsonl file"
            ) from None


def _from_line(line: str, where: str, task: str | None, task_of_file: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); each line is one {{...}} object") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f'{where} has no "prompt" text; each line is {{"prompt": ..., "response": ...}}')
    for name in ("response", "split", "task"):
        if not isinstance(row.get(name), (str, type(None))):
            raise ValueError(f'{where}: "{name}" is {row[name]!r}; write it as text, or leave it out')
    split = row.get("split") or split_of(row["prompt"])
    if split not in SPLITS:
        raise ValueError(f'{where}: "split" is {split!r}; it can be {" or ".join(SPLITS)}, or left out')
    return Example(row["prompt"], row.get("response"), split, task or row.get("task") or task_of_file)
