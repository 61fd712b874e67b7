"""The real openai client, sync and async, streaming and not, gets what LLM.generate gives."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest

from expertflow import SamplingParams
from tests.server.running import Running

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


def expected(served: Running, prompt: Any, **params: Any) -> Any:
    (output,) = served.llm.generate(prompt, SamplingParams(**params))
    return output


def test_models_tell_what_is_served(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert model.model_extra == {"expertflow": {"chat": True, "context": 128}}
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        client.models.retrieve("gpt")


def test_a_completion_is_what_generate_gives(client: openai.OpenAI, served: Running) -> None:
    found = client.completions.create(model="tiny", prompt="Hello", **SAMPLED)
    output = expected(served, "Hello", **SAMPLED)
    assert found.choices[0].text == output.outputs[0].text
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": 12,
        "total_tokens": len(output.prompt_token_ids) + 12,
    }


def test_a_stream_has_the_same_text_and_its_usage(client: openai.OpenAI, served: Running) -> None:
    stream = client.completions.create(
        model="tiny", prompt="Hello", stream=True, stream_options={"include_usage": True}, **SAMPLED
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == (
        expected(served, "Hello", **SAMPLED).outputs[0].text
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert len(chunks) > 5, "it came in pieces"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_goes_by_the_template(client: openai.OpenAI, served: Running) -> None:
    found = client.chat.completions.create(model="tiny", messages=CHAT, **SAMPLED)  # type: ignore[arg-type]
    (output,) = served.llm.chat(CHAT, SamplingParams(**SAMPLED))
    assert found.choices[0].message.content == output.outputs[0].text
    # What the client got it can send back.
    again = [
        *CHAT,
        found.choices[0].message.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "So"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=again, **SAMPLED)  # type: ignore[arg-type]
    plain = [
        *CHAT,
        {"role": "assistant", "content": output.outputs[0].text},
        {"role": "user", "content": "So"},
    ]
    (output,) = served.llm.chat(plain, SamplingParams(**SAMPLED))
    assert answer.choices[0].message.content == output.outputs[0].text


def test_chat_streams(client: openai.OpenAI, served: Running) -> None:
    stream = client.chat.completions.create(model="tiny", messages=CHAT, stream=True, **SAMPLED)  # type: ignore[call-overload]
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == served.llm.chat(CHAT, SamplingParams(**SAMPLED))[0].outputs[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [
        "length"
    ]


def test_several_prompts_and_answers_keep_their_order(client: openai.OpenAI, served: Running) -> None:
    ids = served.llm.tokenizer("Some text").input_ids
    found = client.completions.create(model="tiny", prompt=["Hello", "abc"], n=2, **SAMPLED)
    texts = [a.text for p in ("Hello", "abc") for a in expected(served, p, n=2, **SAMPLED).outputs]
    assert [choice.text for choice in found.choices] == texts
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    by_ids = client.completions.create(model="tiny", prompt=[ids, ids], **SAMPLED)
    assert [c.text for c in by_ids.choices] == 2 * [expected(served, "Some text", **SAMPLED).outputs[0].text]
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(
        model="tiny", prompt=["Hello", "abc"], n=2, stream=True, **SAMPLED
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_stop_ends_the_text(client: openai.OpenAI, served: Running) -> None:
    greedy = expected(served, "Hello", temperature=0, max_tokens=12).outputs[0].text
    found = client.completions.create(
        model="tiny", prompt="Hello", temperature=0, max_tokens=12, stop=greedy[4:6]
    )
    assert found.choices[0].text == greedy[: greedy.index(greedy[4:6])]
    assert found.choices[0].finish_reason == "stop"


def test_each_parameter_reaches_the_sampler(client: openai.OpenAI, served: Running) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    plain = expected(served, "Hello", **greedy).outputs[0]
    for name, value in (
        ("presence_penalty", 2.0),
        ("frequency_penalty", 1.5),
        ("logit_bias", {str(plain.token_ids[0]): -100}),
    ):
        found = client.completions.create(model="tiny", prompt="Hello", **greedy, **{name: value})
        wanted = expected(served, "Hello", **greedy, **{name: value}).outputs[0]
        assert found.choices[0].text == wanted.text, name
        assert wanted.text != plain.text, f"{name} has no effect here: the test would not see it"
    for name, value in (("top_k", 3), ("min_p", 0.3), ("repetition_penalty", 1.8), ("top_p", 0.3)):
        found = client.completions.create(model="tiny", prompt="Hello", **SAMPLED, extra_body={name: value})
        wanted = expected(served, "Hello", **SAMPLED, **{name: value}).outputs[0]
        assert found.choices[0].text == wanted.text, name
    stop = plain.token_ids[3]
    found = client.completions.create(
        model="tiny", prompt="Hello", **greedy, extra_body={"stop_token_ids": [stop]}
    )
    assert found.usage is not None
    assert found.usage.completion_tokens == plain.token_ids.index(stop) + 1


def test_echo_puts_the_prompt_first(client: openai.OpenAI, served: Running) -> None:
    text = expected(served, "Hello", **SAMPLED).outputs[0].text
    found = client.completions.create(model="tiny", prompt="Hello", echo=True, **SAMPLED)
    assert found.choices[0].text == "Hello" + text
    pieces = client.completions.create(model="tiny", prompt="Hello", echo=True, stream=True, **SAMPLED)
    assert "".join(chunk.choices[0].text for chunk in pieces) == "Hello" + text


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(client: openai.OpenAI, served: Running, stream: bool) -> None:
    wanted = expected(served, "Hello", logprobs=3, **SAMPLED).outputs[0]
    if stream:
        parts = [
            chunk.choices[0].logprobs
            for chunk in client.completions.create(
                model="tiny", prompt="Hello", logprobs=3, stream=True, **SAMPLED
            )
            if chunk.choices[0].logprobs is not None
        ]
    else:
        parts = [
            client.completions.create(model="tiny", prompt="Hello", logprobs=3, **SAMPLED).choices[0].logprobs
        ]
    token_logprobs = [value for part in parts for value in part.token_logprobs or []]
    assert token_logprobs == pytest.approx([one.logprob for one in wanted.logprobs])
    tokens = [token for part in parts for token in part.tokens or []]
    tops = [top for part in parts for top in part.top_logprobs or []]
    assert all(token in top and len(top) in (3, 4) for token, top in zip(tokens, tops, strict=True))
    offsets = [offset for part in parts for offset in part.text_offset or []]
    assert offsets == [sum(map(len, tokens[:i])) for i in range(len(tokens))]


def test_logprobs_of_chat(client: openai.OpenAI, served: Running) -> None:
    found = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        logprobs=True,
        top_logprobs=2,
        **SAMPLED,  # type: ignore[arg-type]
    )
    (output,) = served.llm.chat(CHAT, SamplingParams(logprobs=2, **SAMPLED))
    assert found.choices[0].logprobs is not None
    content = found.choices[0].logprobs.content or []
    assert [one.logprob for one in content] == pytest.approx([o.logprob for o in output.outputs[0].logprobs])
    for one in content:
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
        assert one.bytes == list(one.token.encode())
        assert sum(math.exp(top.logprob) for top in one.top_logprobs) <= 1 + 1e-6
    plain = client.chat.completions.create(model="tiny", messages=CHAT, **SAMPLED)  # type: ignore[arg-type]
    assert plain.choices[0].logprobs is None


def test_many_at_once_get_what_each_gets_alone(served: Running) -> None:
    """More than there are places, through one event loop; streams and whole answers mixed."""

    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        params: dict[str, Any] = {"model": "tiny", "prompt": f"No {seed}", "seed": seed, "max_tokens": 8}
        if seed % 2:
            answer = await client.completions.create(temperature=0.9, **params)
            return answer.choices[0].text
        pieces = await client.completions.create(temperature=0.9, stream=True, **params)
        return "".join([chunk.choices[0].text async for chunk in pieces])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(20)))

    alone = [
        expected(served, f"No {seed}", temperature=0.9, seed=seed, max_tokens=8).outputs[0].text
        for seed in range(20)
    ]
    assert asyncio.run(all_of_them()) == alone


def test_errors_are_those_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="lower max_tokens to") as refused:
        client.completions.create(model="tiny", prompt="Hello", max_tokens=1000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        client.completions.create(model="gpt-4", prompt="Hello")
    with pytest.raises(openai.BadRequestError, match="not supported") as refused:
        client.completions.create(model="tiny", prompt="Hello", suffix="!")
    assert refused.value.param == "suffix"
