"""Record a trace: run many prompts through a model and keep what its routers chose.

The routing path dataset of the paper (section 4.3.1): each prompt runs several times with sampling, and input,
output and path are kept. The decode loop is LLM's own. Batches are formed from the list of all sequences
before anything runs, and a resumed recording runs the whole batch in which a sequence is missing: so it gets
the bits that an uninterrupted one would have got.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expertflow.config import Tracing
from expertflow.engine.datasets import Example
from expertflow.engine.llm import LLM
from expertflow.engine.sampling import SamplingParams
from expertflow.models.capture import (
    Capture,
    RoutedPass,
    SequenceRoutes,
    capture_routes,
    count_source_layers,
    routed_experts_per_token,
)
from expertflow.models.fingerprint import fingerprint
from expertflow.trace import TracedSequence, TraceMeta, TraceWriter


@dataclass(frozen=True)
class Recorded:
    """What one call of record_trace did."""

    sequences: int  # in the folder now, of those that were asked for
    recorded: int  # by this call
    tokens: int  # in these
    too_long: int  # prompts left out, since with their answer they exceed the context


@dataclass(frozen=True)
class _Job:
    """One sequence to run."""

    prompt: int
    run: int
    example: Example
    prompt_ids: list[int]
    response_ids: list[int]  # empty unless teacher-forced


def record_trace(
    llm: LLM,
    examples: Sequence[Example],
    folder: str | Path,
    tracing: Tracing,
    dataset: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Recorded:
    """Record every example into `folder`, or those that are missing there.

    dataset: a name for the trace's meta data. progress(done, total) counts sequences. An interrupt leaves a
    folder that can be read, and continued by the same call. Raises ValueError when the folder has a trace of
    another model, data set or setting, when an example lacks the response that is to be forced, or when the model
    was loaded to hold more sequences than one batch has.
    """
    if llm.settings.held > llm.settings.batch:
        raise ValueError(
            f"sequences={llm.settings.held} and batch={llm.settings.batch}: a recording runs one batch at a time, so "
            f"that it can be continued; leave sequences (--sequences) out, or make batch (--batch) as large"
        )
    jobs, too_long = _jobs(llm, examples, tracing)
    batches = [jobs[at : at + llm.settings.batch] for at in range(0, len(jobs), llm.settings.batch)]
    recorded = tokens = 0
    with (
        TraceWriter(folder, trace_meta(llm, tracing, dataset)) as writer,
        capture_routes(llm.model) as capture,
    ):
        missing = {(job.prompt, job.run) for job in jobs} - writer.done()
        progress(len(jobs) - len(missing), len(jobs))
        for batch in batches:
            if not any((job.prompt, job.run) in missing for job in batch):
                continue
            for job, sequence in zip(batch, _run(llm, capture, batch, tracing, writer.meta), strict=True):
                if (job.prompt, job.run) not in missing:
                    continue
                writer.append(sequence)
                missing.discard((job.prompt, job.run))
                recorded += 1
                tokens += len(sequence.source_ids_S) + len(sequence.target_ids_T)
            progress(len(jobs) - len(missing), len(jobs))
    return Recorded(len(jobs), recorded, tokens, too_long)


def trace_meta(llm: LLM, tracing: Tracing, dataset: str) -> TraceMeta:
    """What every sequence of a recording has in common."""
    # More prompts may be recorded into the same folder later. All else changes what the sequences are; the
    # number of them in a batch changes the last bits of a product, and so now and then a route.
    settings = {name: value for name, value in asdict(tracing).items() if name != "prompts"}
    if tracing.teacher_forced:
        settings = {name: settings[name] for name in ("teacher_forced", "max_tokens")}
    embedding: Any = llm.model.get_input_embeddings()
    return TraceMeta(
        fingerprint=fingerprint(llm.model),
        model=Path(llm.name).name if Path(llm.name).is_dir() else llm.name,
        experts_per_layer=llm.experts.cache.shape.experts_per_layer,
        source_layers=count_source_layers(llm.model),
        top_k=routed_experts_per_token(llm.model),
        vocab_size=embedding.weight.shape[0],
        dataset=dataset,
        settings={**settings, "batch": llm.settings.batch, "chat": _is_chat(llm)},
    )


def _jobs(llm: LLM, examples: Sequence[Example], tracing: Tracing) -> tuple[list[_Job], int]:
    """Every sequence in order, runs of a prompt side by side; and how many prompts are too long."""
    jobs: list[_Job] = []
    too_long = 0
    for number, example in enumerate(examples[: tracing.prompts]):
        prompt_ids = _render(llm, example.prompt)
        response_ids: list[int] = []
        if tracing.teacher_forced:
            if not example.response:
                raise ValueError(
                    f"prompt {number} has no response to force; give the data set responses, or leave "
                    f"teacher_forced (--teacher-forced) out"
                )
            encoded: Any = llm.tokenizer(example.response, add_special_tokens=False)
            response_ids = list(encoded.input_ids)[: tracing.max_tokens]
        # Room for max_tokens whatever the answer: then any of these prompts fit one batch, since LLM counts
        # its longest prompt and its longest answer together. One token is sampled behind a forced response.
        if len(prompt_ids) + tracing.max_tokens + 1 > llm.context:
            too_long += 1
            continue
        runs = 1 if tracing.teacher_forced else tracing.runs
        jobs += [_Job(number, run, example, prompt_ids, response_ids) for run in range(runs)]
    if not jobs:
        raise ValueError(
            f"no prompt fits the context of {llm.context} tokens with max_tokens={tracing.max_tokens}; give a "
            f"larger context= (--context), or a smaller max_tokens= (--max-tokens)"
        )
    return jobs, too_long


def _is_chat(llm: LLM) -> bool:
    return bool(getattr(llm.tokenizer, "chat_template", None))


def _render(llm: LLM, prompt: str) -> list[int]:
    if _is_chat(llm):
        return llm.encode_chat([{"role": "user", "content": prompt}])
    encoded: Any = llm.tokenizer(prompt)
    return list(encoded.input_ids)


def _run(
    llm: LLM, capture: Capture, batch: Sequence[_Job], tracing: Tracing, meta: TraceMeta
) -> list[TracedSequence]:
    """Run one batch; a sequence for each job. The last token that is sampled never runs, so it has no routes."""
    seq2seq = llm.model.config.is_encoder_decoder
    capture.take()
    if not tracing.teacher_forced:
        params = [
            SamplingParams(
                temperature=tracing.temperature,
                max_tokens=tracing.max_tokens,
                seed=_seed(tracing.seed, job.prompt, job.run),
            )
            for job in batch
        ]
        outputs = llm.generate([job.prompt_ids for job in batch], params)
        answers = [output.outputs[0].token_ids[:-1] for output in outputs]
    elif seq2seq:
        answers = [job.response_ids for job in batch]
        start = _start_token(llm)
        llm.read_pairs([job.prompt_ids for job in batch], [[start, *answer] for answer in answers])
    else:
        answers = [job.response_ids for job in batch]
        llm.generate(
            [job.prompt_ids + job.response_ids for job in batch], SamplingParams(temperature=0, max_tokens=1)
        )
    passes = capture.take()
    source = _joined([routed for routed in passes if routed.side == "source"], len(batch), meta)
    target = _joined([routed for routed in passes if routed.side == "target"], len(batch), meta)
    found = []
    for job, answer, read, written in zip(batch, answers, source, target, strict=True):
        known = [_start_token(llm)] if seq2seq else job.prompt_ids
        assert written.ids_T[: len(known) + len(answer)].tolist() == known + answer, "rows were mixed up"
        assert not seq2seq or read.ids_T.tolist() == job.prompt_ids, "rows were mixed up"
        found.append(_sequence(job, read, written, len(known), len(known) + len(answer), meta))
    return found


def _sequence(
    job: _Job, source: SequenceRoutes, target: SequenceRoutes, num_prefill: int, length: int, meta: TraceMeta
) -> TracedSequence:
    return TracedSequence(
        prompt=job.prompt,
        run=job.run,
        split=job.example.split,
        task=job.example.task,
        source_ids_S=source.ids_T,
        source_routes_SLK=source.routes_TLK.astype(meta.route_dtype),
        source_weights_SLK=source.weights_TLK,
        # A row that has ended is run on with padding until the longest of its batch ends.
        target_ids_T=target.ids_T[:length],
        target_routes_TLK=target.routes_TLK[:length].astype(meta.route_dtype),
        target_weights_TLK=target.weights_TLK[:length],
        num_prefill=num_prefill,
    )


def _joined(passes: Sequence[RoutedPass], rows: int, meta: TraceMeta) -> list[SequenceRoutes]:
    """Prefill chunks and decode steps of one stack, one behind the other, for each row."""
    if not passes:  # the source of a decoder-only model
        nothing = np.zeros((0, meta.source_layers, meta.top_k))
        return [
            SequenceRoutes(np.zeros(0, np.int32), nothing.astype(np.int32), nothing.astype(np.float32))
        ] * rows
    by_pass = [routed.sequences() for routed in passes]
    return [
        SequenceRoutes(*map(np.concatenate, zip(*row, strict=True))) for row in zip(*by_pass, strict=True)
    ]


def _seed(seed: int, prompt: int, run: int) -> int:
    """Of one answer, whenever and beside whatever it is sampled."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt}/{run}".encode()).digest()[:7], "big")


def _start_token(llm: LLM) -> int:
    """What a decoder with an encoder reads first."""
    for owner in (llm.model.generation_config, llm.model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(token := getattr(owner, name, None), int):
                return token
    raise ValueError(f"{llm.name} names no decoder_start_token_id; add it to its generation_config.json")
