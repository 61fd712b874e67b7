"""LLM on tiny checkpoints: the same tokens as transformers, and every request by its own rules."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from expertflow import LLM, SamplingParams, report
from expertflow.commands.session import fitting
from expertflow.engine.interrupts import Interrupts
from expertflow.engine.llm import ChatTemplateError, _batches
from expertflow.engine.request import Row, TextStream
from tests.families import write_checkpoint

PROMPTS = ["Hello there", "The quick brown fox jumps over it", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen2_moe", tmp_path_factory.mktemp("llm") / "qwen2_moe")


@pytest.fixture(scope="module")
def switch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("switch_safetensors", tmp_path_factory.mktemp("llm") / "switch")


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[LLM]:
    with LLM(folder, cache_size=3, batch=4, context=100) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> LLM:
    shared.reset_stats()
    return shared


@pytest.fixture(scope="module")
def switch(switch_folder: Path) -> Iterator[LLM]:
    with LLM(switch_folder, cache_size=3, batch=4, context=100) as llm:
        yield llm


def texts(llm: LLM, prompts: list[str], params: SamplingParams | list[SamplingParams]) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, params)]


def reference_greedy(folder: Path, prompts: list[str], new_tokens: int, **options: float) -> list[list[int]]:
    """transformers itself, with all experts in memory, one prompt at a time."""
    config = json.loads((folder / "config.json").read_text())
    seq2seq = config["model_type"] == "switch_transformers"
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        whole = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **options)[0].tolist()
        found.append(whole[1:] if seq2seq else whole[ids.shape[1] :])
    return found


def test_greedy_tokens_are_those_of_transformers(llm: LLM, folder: Path) -> None:
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == reference_greedy(folder, PROMPTS, 12)
    assert [output.prompt for output in outputs] == PROMPTS
    assert outputs[0].prompt_token_ids == llm.tokenizer("Hello there").input_ids
    assert outputs[0].outputs[0].finish_reason == "length"
    assert llm.stats.misses > 0, "with 3 of 8 experts per layer some must be read"


def test_encoder_decoder_too(switch: LLM, switch_folder: Path) -> None:
    outputs = switch.generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == reference_greedy(switch_folder, PROMPTS, 12)


@pytest.mark.parametrize("which", ["llm", "switch"])
def test_repetition_penalty_is_that_of_transformers(
    which: str, request: pytest.FixtureRequest, folder: Path, switch_folder: Path
) -> None:
    """In a batch, so that padding must not count as seen."""
    llm = request.getfixturevalue(which)
    where = folder if which == "llm" else switch_folder
    params = SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.5)
    expected = reference_greedy(where, PROMPTS, 12, repetition_penalty=1.5)
    assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params)] == expected
    assert expected != reference_greedy(where, PROMPTS, 12)


def test_padding_is_not_seen_by_the_penalty(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's own padding token is never a candidate, so counting it would go unnoticed."""
    params = SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.5)
    (alone,) = llm.generate("x", params)
    monkeypatch.setattr(LLM, "pad_token", alone.outputs[0].token_ids[0])
    assert llm.generate(["The quick brown fox", "x"], params)[1].outputs == alone.outputs


@pytest.mark.parametrize("which", ["llm", "switch"])
def test_a_seed_gives_the_same_text_alone_and_at_any_row(which: str, request: pytest.FixtureRequest) -> None:
    llm = request.getfixturevalue(which)
    params = [SamplingParams(seed=seed, max_tokens=10 + seed, top_k=40) for seed in range(3)]
    alone = [texts(llm, [prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    assert texts(llm, PROMPTS, params) == alone
    assert texts(llm, PROMPTS[::-1], params[::-1]) == alone[::-1]


def test_a_seed_gives_the_same_text_with_any_budget(llm: LLM, folder: Path) -> None:
    params = SamplingParams(seed=5, max_tokens=20)
    expected = texts(llm, PROMPTS, params)
    with LLM(folder, cache_size=8, batch=4, context=100) as roomy:
        assert texts(roomy, PROMPTS, params) == expected


def test_seeds_differ_and_no_seed_is_random(llm: LLM) -> None:
    def sample(seed: int | None) -> str:
        return texts(llm, ["Hello"], SamplingParams(seed=seed, max_tokens=12))[0]

    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_n_answers_differ_and_the_first_is_that_of_n_1(llm: LLM) -> None:
    (output,) = llm.generate("Hello", SamplingParams(seed=1, n=3, max_tokens=8))
    found = [answer.text for answer in output.outputs]
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len(set(found)) == 3
    assert found[:1] == texts(llm, ["Hello"], SamplingParams(seed=1, max_tokens=8))


def test_each_prompt_has_its_own_parameters(llm: LLM) -> None:
    greedy = texts(llm, PROMPTS[:1], GREEDY)[0]
    params = [
        GREEDY,
        SamplingParams(temperature=0, max_tokens=5),
        SamplingParams(temperature=0, max_tokens=12, stop=greedy[3:5]),
        SamplingParams(temperature=0.9, seed=3, max_tokens=9),
    ]
    outputs = llm.generate(PROMPTS[:1] * 4, params)
    assert [len(output.outputs[0].token_ids) for output in outputs][:2] == [12, 5]
    assert outputs[2].outputs[0].text == greedy[: greedy.index(greedy[3:5])]
    assert outputs[2].outputs[0].stop_reason == greedy[3:5]
    assert outputs[3].outputs[0].text == texts(llm, PROMPTS[:1], params[3])[0]


def test_token_ids_in_place_of_text(llm: LLM) -> None:
    ids = llm.tokenizer("Hello there").input_ids
    expected = texts(llm, ["Hello there"], GREEDY)
    for prompts in (ids, [ids]):
        (output,) = llm.generate(prompts, GREEDY)
        assert [output.outputs[0].text] == expected
        assert output.prompt is None


def test_max_tokens_none_fills_the_context(llm: LLM) -> None:
    (output,) = llm.generate("x" * 90, SamplingParams(temperature=0, max_tokens=None))
    assert len(output.outputs[0].token_ids) == 10


def test_stream_gives_the_text_of_generate(llm: LLM) -> None:
    params = SamplingParams(seed=2, max_tokens=15)
    pieces = list(llm.stream("Hello", params))
    assert len(pieces) > 5
    assert ["".join(pieces)] == texts(llm, ["Hello"], params)


def test_stream_is_one_answer(llm: LLM) -> None:
    with pytest.raises(ValueError, match="stream gives one answer, not 2; use generate"):
        llm.stream("Hello", SamplingParams(n=2))


def test_a_stream_may_be_left_early(llm: LLM) -> None:
    stream = llm.stream("Hello", SamplingParams(seed=2, max_tokens=15))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert llm.timing.generated_tokens == 1
    assert_at_rest(llm)
    assert texts(llm, ["Hello there"], GREEDY) == texts(llm, ["Hello there"], GREEDY)


def test_gradients_are_off_inside_and_untouched_outside(llm: LLM) -> None:
    inside: list[bool] = []
    hook = llm.model.register_forward_hook(lambda *_: inside.append(torch.is_grad_enabled()))
    try:
        stream = llm.stream("Hello", GREEDY)
        for _ in range(3):
            next(stream)
            assert torch.is_grad_enabled()
        stream.close()  # type: ignore[attr-defined]
    finally:
        hook.remove()
    assert inside == [False, False, False]


def assert_at_rest(llm: LLM) -> None:
    cache = llm.experts.cache
    cache.wait_idle()
    cache.table.check()
    assert cache.table.evictable == set(cache.table.residents), "an expert stayed pinned or loading"


@pytest.mark.parametrize("when", ["prompt", "answer"])
def test_ctrl_c_waits_for_the_books_and_the_next_call_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """SIGINT arrives between pinning experts and noting so: raised there, they would stay pinned for ever.

    Each interruption would cost slots, until no layer finds room and generation hangs.
    """
    expected = texts(llm, ["Hello there"], GREEDY)
    plan = llm.experts.cache.plan
    open_layer = plan.open_layer
    calls = 0

    def open_layer_interrupted(layer: int, needed: list) -> object:
        nonlocal calls
        calls += 1
        opened = open_layer(layer, needed)
        if calls == (1 if when == "prompt" else 6):
            signal.raise_signal(signal.SIGINT)
        return opened

    monkeypatch.setattr(plan, "open_layer", open_layer_interrupted)
    stream = llm.stream("Hello there", GREEDY)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert calls == (1 if when == "prompt" else 6), "the interrupt should be raised before the next layer"
    assert_at_rest(llm)
    assert texts(llm, ["Hello there"], GREEDY) == expected


def test_a_second_ctrl_c_is_not_put_off() -> None:
    interrupts = Interrupts()
    came_back = 0

    def twice() -> None:
        nonlocal came_back
        with interrupts.deferred():
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
                came_back += 1

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert came_back == 1


def test_an_applications_own_handler_stays(llm: LLM) -> None:
    received = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        with llm.interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT]


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["ok", "x" * 100], GREEDY, r"prompt 1 of 100 tokens and max_tokens=12 .* context of 100 tokens"),
        (
            ["x" * 95],
            GREEDY,
            r"context=107 or more \(--context\), shorten the prompt, or lower max_tokens to 5",
        ),
        (["x" * 200], SamplingParams(max_tokens=None), r"prompt 0 of 200 tokens does not fit .* context=201"),
        ([""], GREEDY, "prompt 0 is empty"),
        ([[5, 999]], GREEDY, "token ids outside 0 to 127"),
        (["a", "b"], [GREEDY], "1 SamplingParams for 2 prompts"),
        (["a"], [{"temperature": 0}], "must be SamplingParams"),
        (["a"], {"temperature": 0}, r"no SamplingParams; give SamplingParams\(\*\*\{'temperature': 0\}\)"),
        (7, GREEDY, "not int"),
        (
            ["x" * 20],
            SamplingParams(max_tokens=300),
            r"with context=256 \(--context\), all it was trained for, and .* lower max_tokens to 236",
        ),
        (
            ["x" * 300],
            GREEDY,
            r"with context=256 \(--context\), all it was trained for, and shorten the prompt$",
        ),
        (["ok", "half \ud83d"], GREEDY, r"prompt 1 is no text in UTF-8: '\\ud83d' at character 5"),
        (["a", 5], GREEDY, "prompt 1 is 5; it must be text, or a list of token ids"),
    ],
)
def test_bad_requests_are_refused_before_any_is_computed(
    llm: LLM, prompts: object, params: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)  # type: ignore[arg-type]
    assert llm.stats.hits + llm.stats.misses == 0


def test_what_is_no_text_is_refused_wherever_it_is_encoded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python carries bytes that are no UTF-8 from stdin and arguments as halves of characters."""
    with pytest.raises(ValueError, match=r"the prompt is no text in UTF-8: '\\udcff' at character 1"):
        fitting(llm, "a\udcff", SamplingParams(), length_given=False)
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ messages[0]['content'] }}", raising=False)
    with pytest.raises(ValueError, match="a message is no text in UTF-8"):
        llm.encode_chat([{"role": "user", "content": "\ud83d"}])


def test_the_trained_context_is_a_limit_too(folder: Path, tmp_path: Path) -> None:
    with LLM(folder, cache_size=2, context=4000) as llm:
        assert llm.context == 256  # max_position_embeddings of the tiny model
        plan = llm.experts.plan
        assert plan.kv_bytes == 256 * plan.model.kv_bytes_per_token, "and no memory is kept for more"
        with pytest.raises(ValueError, match="that is what the model was trained for"):
            llm.generate("x" * 300, GREEDY)


def test_timing_counts_tokens(llm: LLM) -> None:
    llm.generate(["ab", "abc"], [SamplingParams(temperature=0, max_tokens=m) for m in (4, 7)])
    timing = llm.timing
    assert (timing.prompt_tokens, timing.generated_tokens, timing.decoded_tokens) == (5, 11, 9)
    assert timing.first_token_seconds > 0
    assert timing.tokens_per_second == pytest.approx(9 / timing.decode_seconds)


def test_prompts_read_beside_others_have_no_time_of_their_own(folder: Path) -> None:
    with LLM(folder, cache_size=2, context=100, batch=1, sequences=2) as llm:
        llm.generate(["ab", "abc"], SamplingParams(temperature=0, max_tokens=4))
        names, texts_shown = (column.cells for column in report.speed_table(report.collect(llm)).columns)
        shown = dict(zip(names, texts_shown, strict=True))
    assert "time to first token" not in shown
    assert shown["prompts"] == "5 tokens, in the time below"
    assert shown["generated"] == "8 tokens"


def rows(*lengths: tuple[int, int]) -> list[Row]:
    stream = TextStream(None)  # type: ignore[arg-type]
    return [Row(i, 0, [0] * n, SamplingParams(), m, 0, stream, ()) for i, (n, m) in enumerate(lengths)]


def test_batches_keep_arrival_order_and_fit_the_context() -> None:
    found = list(_batches(rows((5, 5), (5, 5), (5, 5), (90, 5), (5, 90), (1, 1)), width=2, context=100))
    assert [[row.request for row in batch] for batch in found] == [[0, 1], [2, 3], [4, 5]]
    # 90 + 90 tokens in one batch would be 180 positions for each row.
    found = list(_batches(rows((90, 5), (5, 90)), width=2, context=100))
    assert [[row.request for row in batch] for batch in found] == [[0], [1]]


def rewrite(folder: Path, target: Path, name: str, **fields: object) -> Path:
    """A copy of a checkpoint with fields of one JSON file changed."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    content = json.loads((target / name).read_text()) | fields
    (target / name).write_text(json.dumps(content))
    return target


def test_the_checkpoints_recommendation_is_the_default_and_applies_once(folder: Path, tmp_path: Path) -> None:
    recommended = {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3}
    changed = rewrite(folder, tmp_path / "model", "generation_config.json", **recommended)
    expected = SamplingParams(temperature=0.6, top_k=5, top_p=0.9, repetition_penalty=1.3)
    with LLM(changed, cache_size=3, batch=4, context=100) as llm:
        assert llm.get_default_sampling_params() == expected
        # Explicit parameters replace it: nothing of it may be left in the model's own generation_config.
        found = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
    assert found == reference_greedy(folder, PROMPTS, 12)


def test_without_a_recommendation_the_default_is_greedy(llm: LLM, folder: Path) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0)
    (output,) = llm.generate("Hello")
    assert output.outputs[0].token_ids == reference_greedy(folder, ["Hello"], 16)[0]


def test_end_of_sequence_and_ignore_eos(folder: Path, tmp_path: Path, llm: LLM) -> None:
    (free,) = llm.generate("Hello", GREEDY)
    end = free.outputs[0].token_ids[4]
    at = free.outputs[0].token_ids.index(end)
    changed = rewrite(folder, tmp_path / "model", "generation_config.json", eos_token_id=[1, end])
    with LLM(changed, cache_size=3, context=100) as stopping:
        (output,) = stopping.generate("Hello", GREEDY)
        assert output.outputs[0].finish_reason == "stop"
        assert output.outputs[0].token_ids == free.outputs[0].token_ids[: at + 1]
        (output,) = stopping.generate("Hello", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        assert output.outputs[0].token_ids == free.outputs[0].token_ids


def test_chat_uses_the_template(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.tokenizer, "chat_template", CHAT_TEMPLATE)
    conversation = [{"role": "user", "content": "Hi"}]
    (one,) = llm.chat(conversation, GREEDY)
    assert one.prompt_token_ids == llm.tokenizer("<user>Hi<assistant>").input_ids
    assert [one.outputs[0].text] == texts(llm, ["<user>Hi<assistant>"], GREEDY)
    assert len(llm.chat([conversation, conversation], GREEDY)) == 2


def test_chat_without_a_template_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY)


@pytest.mark.parametrize("messages", ["Hi", [{"role": "user"}], [["Hi"]]])
def test_what_is_no_conversation_is_refused(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, messages: object
) -> None:
    monkeypatch.setattr(llm.tokenizer, "chat_template", CHAT_TEMPLATE)
    with pytest.raises(
        ValueError, match=r"message 0 is .*; give {'role': 'user', 'content': 'text'} for each"
    ):
        llm.chat(messages, GREEDY)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", ["{% for", "{{ messages[0].content + 1 }}"])
def test_a_broken_template_is_told(llm: LLM, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    with pytest.raises(
        ChatTemplateError, match=r"chat template refuses these messages: .*; change their roles"
    ):
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY)


def test_unknown_settings_are_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no setting 'memmory'"):
        LLM(tmp_path, memmory="6GiB")


def test_a_folder_without_tokenizer_is_an_error_with_remedy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are read; so what it holds is there when memory is planned."""
    monkeypatch.setattr("expertflow.engine.llm.model_class", lambda *_: pytest.fail("loads a model"))
    target = rewrite(folder, tmp_path / "model", "config.json")
    for path in target.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="no tokenizer that can be loaded"):
        LLM(target, cache_size=2)


def test_a_closed_llm_says_so(folder: Path) -> None:
    llm = LLM(folder, cache_size=2)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("Hello", GREEDY)
