"""Logprobs of answers are those of transformers' own logits, whatever bends the choice; tokens are told one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expertflow import LLM, SamplingParams
from expertflow.engine.engine import Engine
from expertflow.engine.request import Row
from expertflow.engine.submitted import Submitted
from tests.families import write_checkpoint

BENT = SamplingParams(
    temperature=0.7, top_k=5, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3,
    logit_bias={9: 3.0}, seed=4, max_tokens=8, logprobs=3,
)  # fmt: skip


@pytest.fixture(scope="module", params=["qwen2_moe", "switch_safetensors"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp("logprobs") / "tiny", dtype=torch.float64)


@pytest.fixture(scope="module", params=[1, 4], ids=["runner", "engine"])
def llm(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(folder, cache_size=4, context=64, batch=1, sequences=request.param) as loaded:
        yield loaded


@torch.no_grad()
def transformers_logprobs(llm: LLM, prompt_ids: list[int], answer: list[int]) -> torch.Tensor:
    """The slow, obvious version, [T, V]: a pass for each token. One pass for all would fill Switch's experts."""
    model: Any = llm.model
    ids_1T = torch.tensor([prompt_ids])
    rows, cache = [], None
    if model.config.is_encoder_decoder:
        encoded = model.get_encoder()(ids_1T)
        for token in [model.generation_config.decoder_start_token_id, *answer[:-1]]:
            newest_11 = torch.tensor([[token]])
            out = model(
                encoder_outputs=encoded, decoder_input_ids=newest_11, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            rows.append(out.logits[0, -1])
    else:
        for number in range(len(answer)):
            rows.append(model(torch.tensor([[*prompt_ids, *answer[:number]]])).logits[0, -1])
    return torch.stack(rows).log_softmax(-1)


def test_logprobs_are_of_the_models_own_distribution(llm: LLM) -> None:
    (output,) = llm.generate("Hello there", BENT)
    answer = output.outputs[0]
    logprobs_TV = transformers_logprobs(llm, output.prompt_token_ids, answer.token_ids)
    assert answer.logprobs is not None
    assert [one.token_id for one in answer.logprobs] == answer.token_ids
    for one, logprobs_V in zip(answer.logprobs, logprobs_TV, strict=True):
        assert one.logprob == pytest.approx(logprobs_V[one.token_id].item(), abs=1e-4)
        best = logprobs_V.topk(3)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_asking_for_logprobs_changes_no_token_and_others_have_none(llm: LLM) -> None:
    from dataclasses import replace

    plain = llm.generate("Hello there", replace(BENT, logprobs=None))[0].outputs[0]
    assert plain.logprobs is None
    assert plain.token_ids == llm.generate("Hello there", BENT)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("name", "value"), [("logit_bias", {3: 1, 100000: 1}), ("stop_token_ids", [3, 100000])]
)
def test_a_token_outside_the_vocabulary_is_refused(llm: LLM, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} of token 100000: the ids"):
        llm.generate("Hello", SamplingParams(**{name: value}))


@pytest.mark.parametrize("end", ["finished", "cancelled", "failed", "closed"])
def test_tokens_and_the_end_are_told(llm: LLM, end: str) -> None:
    """on_token: every one, with the text that became certain. on_done: once, however it ends."""
    told: list[tuple[int, str]] = []
    done: list[Submitted] = []

    def token(row: Row, piece: str) -> None:
        if end == "failed":
            raise RuntimeError("the reader broke")
        told.append((row.token_ids[-1], piece))

    params: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    engine = Engine(llm)
    request = engine.submit("Hello", SamplingParams(**params), on_token=token, on_done=done.append)
    for _ in range(3):
        engine.step()
    if end == "finished":
        while not request.done:
            engine.step()
        answer = request.output().outputs[0]
        assert [token_id for token_id, _ in told] == answer.token_ids
        assert "".join(piece for _, piece in told) == answer.text
    elif end == "cancelled":
        request.cancel()
        engine.step()
    elif end == "closed":
        engine.close()
    assert done == [request]
    assert request.done
    engine.close()
    assert done == [request], "told twice"
