"""LLM: text in, text out, as vLLM's users know it, under a memory budget.

Encodes prompts, forms batches in arrival order, hands them to runner.py and collects the answers. Not a
scheduler: a batch runs until its longest answer ends. Where more sequences are held than one batch has
(`sequences`), engine.py decodes them, and answers that end make room for the next.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from expertflow.cache.stats import CacheStats
from expertflow.config import Settings, format_bytes
from expertflow.engine.engine import Engine
from expertflow.engine.interrupts import Interrupts
from expertflow.engine.request import RequestOutput, Row, TextStream
from expertflow.engine.runner import decode, read_pairs
from expertflow.engine.sampling import SamplingParams
from expertflow.engine.source import load_tokenizer, model_class, read_config, resolve_model
from expertflow.models.attach import ExpertFlowConfig, LoadedExperts
from expertflow.models.footprint import trained_context
from expertflow.timeline import Timeline

Message = Mapping[str, str]
Prompt = str | list[int]


@dataclass
class Timing:
    """Since the start or the last reset. A token is counted for every answer of a batch.

    Where more sequences are held than run in a batch, prompts are read beside answers that are decoded: then
    `decode_seconds` has the time of both, `decoded_tokens` every token, and the two of prompts are 0.
    """

    load_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token_seconds: float = 0.0  # of the latest batch: from its prompts to the first token
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0  # those after the first of each answer

    @property
    def tokens_per_second(self) -> float:
        """While decoding, without the prompts."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, float]:
        return {**vars(self), "tokens_per_second": self.tokens_per_second}


class ChatTemplateError(ValueError):
    """The checkpoint's chat template does not take these messages, or is broken."""


class LLM:
    """A Mixture-of-Experts model, its tokenizer and its expert cache.

    model: a folder or a hub id ("owner/name"), at `revision`. settings: the fields of
    expertflow.config.Settings (memory="6GiB", context=4096, batch=8, ...). Close it, or use it in a `with`
    block, to stop its loader thread.
    """

    def __init__(self, model: str | Path, *, revision: str | None = None, **settings: Any):
        started = time.perf_counter()
        quantization_config = ExpertFlowConfig(**settings)
        quantization_config.within_training = True
        folder = resolve_model(model, revision)
        self.name = str(model)
        self.folder = folder
        # Before the model: a vocabulary takes tens of MB, and what this process holds counts against the budget.
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        self.model: PreTrainedModel = model_class(read_config(folder), str(folder)).from_pretrained(
            folder, quantization_config=quantization_config, trust_remote_code=False
        )
        self.experts: LoadedExperts = self.model.expertflow
        self.settings: Settings = self.experts.settings
        self._default_params = _recommended_params(self.model)
        self._end_tokens = _end_tokens(self.model, self.tokenizer)
        self.interrupts = Interrupts()
        for layer in self.experts.moe_layers:
            self.model.get_submodule(layer.name).register_forward_pre_hook(self.interrupts.check)
        self.timing = Timing(load_seconds=time.perf_counter() - started)

    @property
    def stats(self) -> CacheStats:
        return self.experts.cache.stats

    @property
    def timeline(self) -> Timeline | None:
        """Who is told what this model did when; None: nobody. To be set between two requests."""
        return self.experts.cache.timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        self.experts.cache.timeline = timeline

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.settings.context

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends, as transformers would apply it."""
        return self._default_params

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts (text or token ids), each by its own parameters if a list of them is given.

        Every prompt is checked before the first is computed: ValueError names the one that does not fit.
        """
        if self.settings.held > self.settings.batch:
            return self._through_engine(_as_prompts(prompts), sampling_params)
        requests = self.checked_requests(_as_prompts(prompts), sampling_params)
        rows = [row for _, _, answers in requests for row in answers]
        for batch in _batches(rows, self.settings.batch, self.context):
            for _ in self._run(batch):
                pass
        return [
            RequestOutput(text, ids, [row.output() for row in answers]) for text, ids, answers in requests
        ]

    def stream(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        """The answer to one prompt in pieces, as they become certain. Close the iterator to stop early."""
        (_, _, rows), *more = self.checked_requests(_as_prompts(prompt), sampling_params)
        if more or len(rows) > 1:
            raise ValueError(f"stream gives one answer, not {max(len(rows), 1 + len(more))}; use generate")
        return self._stream(rows[0])

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """The next answer in one conversation or several; messages are {"role": ..., "content": ...}."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate([self.encode_chat(messages) for messages in conversations], sampling_params)  # type: ignore[arg-type]

    def encode(self, prompt: Prompt, what: str = "the prompt") -> list[int]:
        """Token ids of a prompt, which may be some already. what: it is called in errors (ValueError)."""
        if isinstance(prompt, str):
            return list(self.tokenizer(_utf8(prompt, what)).input_ids)
        if not isinstance(prompt, list):
            raise ValueError(f"{what} is {prompt!r}; it must be text, or a list of token ids")
        return prompt

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that waits for the assistant, by the tokenizer's chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"{self.name} has no chat template, so it is probably no chat model; give it plain prompts "
                f"(`run` without --chat, `chat --raw`), or use an instruct version of the model"
            )
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not message.keys() & {"content", "tool_calls"}:
                raise ValueError(
                    f"message {number} is {message!r}; give {{'role': 'user', 'content': 'text'}} for each"
                )
            if isinstance(content := message.get("content"), str):
                _utf8(content, "a message")
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # a template raises what it likes at roles that it does not know
            line = f" (its line {error.lineno})" if hasattr(error, "lineno") else ""
            raise ChatTemplateError(
                f"the model's chat template refuses these messages: {error}{line}; change their roles or order"
            ) from error
        return list(encoded["input_ids"])

    def read_pairs(self, sources: Sequence[list[int]], targets: Sequence[list[int]]) -> None:
        """Run an encoder-decoder over token ids and their known answers (start token first), as one batch."""
        read_pairs(self.model, sources, targets, self.pad_token, self.interrupts)

    def reset_stats(self) -> None:
        self.experts.cache.reset_stats()
        if self.experts.predicting is not None:
            self.experts.predicting.reset_stats()
        self.timing = Timing(load_seconds=self.timing.load_seconds)

    def close(self) -> None:
        """Stop the loader thread and close the checkpoint. Idempotent."""
        self.experts.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _through_engine(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[RequestOutput]:
        with Engine(self) as engine:
            try:
                return engine.generate(prompts, params)
            finally:
                stats, timing = engine.stats, self.timing
                timing.prompt_tokens += stats.prompt_tokens
                timing.generated_tokens += stats.generated_tokens
                # Prompts are read beside tokens that are decoded: their time is not told apart.
                timing.decode_seconds += stats.step_seconds
                timing.decoded_tokens += stats.generated_tokens

    def _stream(self, row: Row) -> Iterator[str]:
        for texts in self._run([row]):
            if texts[0]:
                yield texts[0]

    def _run(self, rows: Sequence[Row]) -> Iterator[list[str]]:
        """Decode one batch and keep the time. What the caller does between two steps is not counted."""
        timing = self.timing
        timing.prompt_tokens += sum(len(row.prompt_ids) for row in rows)
        done = 0
        started = time.perf_counter()
        for texts in decode(self.model, rows, self.pad_token, self.interrupts):
            ended = time.perf_counter()
            seconds = ended - started
            if (timeline := self.timeline) is not None:
                timeline.add("compute", "decode" if done else "prompt", started, ended, rows=len(rows))
            produced = sum(len(row.token_ids) for row in rows)
            timing.generated_tokens += produced - done
            if done:
                timing.decode_seconds += seconds
                timing.decoded_tokens += produced - done
            else:
                timing.first_token_seconds = seconds
                timing.prefill_seconds += seconds
            done = produced
            yield texts
            started = time.perf_counter()

    def checked_requests(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[str | None, list[int], list[Row]]]:
        """(text, token ids, rows) of each prompt, all checked."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or self._default_params] * len(prompts)
        if isinstance(params, Mapping):
            raise ValueError(
                f"sampling_params={params!r} is no SamplingParams; give SamplingParams(**{params!r})"
            )
        if len(params) != len(prompts):
            raise ValueError(
                f"{len(params)} SamplingParams for {len(prompts)} prompts; give one, or one for each"
            )
        requests = []
        for number, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
            if not isinstance(wanted, SamplingParams):
                raise ValueError(
                    f"sampling_params of prompt {number} is {wanted!r}; it must be SamplingParams(...)"
                )
            ids = self.encode(prompt, f"prompt {number}")
            max_tokens = self._max_tokens(number, ids, wanted)
            seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
            rows = [
                Row(
                    request=number,
                    answer=answer,
                    prompt_ids=ids,
                    params=wanted,
                    max_tokens=max_tokens,
                    seed=seed,
                    stream=TextStream(self.tokenizer, wanted.stop),  # type: ignore[arg-type]
                    end_tokens=self._end_tokens,
                )
                for answer in range(wanted.n)
            ]
            requests.append((prompt if isinstance(prompt, str) else None, ids, rows))
        return requests

    def _max_tokens(self, number: int, ids: list[int], params: SamplingParams) -> int:
        embeddings: Any = self.model.get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
        if not ids:
            raise ValueError(f"prompt {number} is empty; give at least one token to start from")
        if not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
            raise ValueError(f"prompt {number} has token ids outside 0 to {vocabulary - 1}, the vocabulary")
        for name, named in (
            ("logit_bias", params.logit_bias or ()),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if (most := max(named, default=0)) >= vocabulary:
                raise ValueError(
                    f"{name} of token {most}: the ids of this model's vocabulary are 0 to {vocabulary - 1}"
                )
        room = self.context - len(ids)
        if room < 1 or (params.max_tokens or 0) > room:
            wanted = f" and max_tokens={params.max_tokens}" if params.max_tokens else ""
            need = len(ids) + (params.max_tokens or 1)
            trained = trained_context(self.model)
            if trained is None or need <= trained:
                more = f"load the model with context={need} or more (--context), "
            elif self.context < trained:
                more = f"load the model with context={trained} (--context), all it was trained for, and "
                room = trained - len(ids)
            else:
                more = "that is what the model was trained for; "
            raise ValueError(
                f"prompt {number} of {len(ids)} tokens{wanted} does not fit the context of {self.context} "
                f"tokens "
                f"({format_bytes(self.context * self.experts.plan.model.kv_bytes_per_token)} of KV cache); "
                + more
                + ("shorten the prompt" if room < 1 else f"shorten the prompt, or lower max_tokens to {room}")
            )
        return params.max_tokens or room

    @property
    def pad_token(self) -> int:
        """Any id will do: padding is masked. The model's own, since some look for it by value."""
        for owner in (self.model.generation_config, self.model.config, self.tokenizer):
            if isinstance(token := getattr(owner, "pad_token_id", None), int):
                return token
        return min(self._end_tokens, default=0)


def _utf8(text: str, what: str) -> str:
    """ValueError for what Python carries in a str and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is no text in UTF-8: {text[error.start : error.end]!a} at character {error.start}; convert it "
            f"(iconv -t UTF-8), or leave that out"
        ) from None
    return text


def _recommended_params(model: PreTrainedModel) -> SamplingParams:
    """Moves the checkpoint's sampling defaults out of the model, so that they are not applied twice."""
    config = model.generation_config
    found = {
        name: getattr(config, name, None)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "num_beams",
            "max_length",
        )
    }
    sampled = bool(config.do_sample)
    config.do_sample = False
    for name in found:
        setattr(config, name, None)
    params: dict[str, Any] = {"repetition_penalty": found["repetition_penalty"] or 1.0}
    if not sampled:
        return SamplingParams(temperature=0.0, **params)
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if found[name] is not None:
            params[name] = found[name]
    return SamplingParams(**params)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    for owner in (model.generation_config, model.config, tokenizer):
        token = getattr(owner, "eos_token_id", None)
        if token is not None:
            return frozenset(token if isinstance(token, (list, tuple)) else [token])
    return frozenset()


def _as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or many, each text or token ids, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"prompts must be text, a list of texts, or token ids, not {type(prompts).__name__}")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [list(prompts)]
    return [
        list(item) if isinstance(item, Sequence) and not isinstance(item, str) else item for item in prompts
    ]


def _batches(rows: Sequence[Row], width: int, context: int) -> Iterator[list[Row]]:
    """Rows in arrival order, at most `width` at a time.

    A batch is as long as its longest prompt plus its longest answer, and that must fit the context too: one
    long prompt and one long answer that fit alone may not fit together.
    """
    batch: list[Row] = []
    for row in rows:
        candidates = [*batch, row]
        length = max(len(r.prompt_ids) for r in candidates) + max(r.max_tokens for r in candidates)
        if batch and (len(candidates) > width or length > context):
            yield batch
            candidates = [row]
        batch = candidates
    if batch:
        yield batch
