"""The engine: the same tokens as one request alone, whoever else runs, however they are executed.

Float64 checkpoints: the rows of a product change with its neighbours, and then its last bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from expertflow import LLM, SamplingParams
from expertflow.engine.engine import Engine
from expertflow.engine.request import RequestOutput
from expertflow.engine.unit import LiveSequence, Seating
from expertflow.models.capture import capture_routes
from expertflow.models.rows import TAIL
from tests.families import EOS, write_checkpoint
from tests.models.test_predicting import Noise

PROMPTS = ["Hello there", "The quick brown fox jumps over it", "x", "abc def", "Some more text to read", "zz"]
PARAMS = [
    SamplingParams(temperature=0 if number % 2 else 0.9, seed=number, max_tokens=4 + 3 * number)
    for number in range(len(PROMPTS))
]
# Plain attention, grouped queries with a sliding window every other layer, relative positions, absolute ones.
FAMILIES = ("qwen2_moe", "gpt_oss", "switch_safetensors", "nllb_moe")

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("engine")

    def folder(name: str) -> Path:
        at = root / name
        return at if at.exists() else write_checkpoint(name, at, dtype=torch.float64)

    return folder


def load(folder: Path, **settings: Any) -> LLM:
    return LLM(folder, **{"cache_size": 3, "context": 64, "batch": 2, "sequences": 4, **settings})


@pytest.fixture(scope="module")
def shared(folders: Folders) -> Iterator[LLM]:
    with load(folders("qwen2_moe")) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> LLM:
    shared.reset_stats()
    return shared


@pytest.fixture(scope="module")
def alone(folders: Folders) -> Callable[[str], list[list[int]]]:
    """Tokens of each prompt by itself, through LLM's own loop."""
    found: dict[str, list[list[int]]] = {}

    def tokens_alone(name: str) -> list[list[int]]:
        if name not in found:
            with load(folders(name), batch=1, sequences=None) as llm:
                found[name] = tokens(llm.generate(PROMPTS, PARAMS))
        return found[name]

    return tokens_alone


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    return [answer.token_ids for output in outputs for answer in output.outputs]


def by_itself(llm: LLM, prompt: str, params: SamplingParams) -> RequestOutput:
    """Through LLM's own loop, each answer as a batch of one."""
    ((text, ids, rows),) = llm.checked_requests([prompt], params)
    for row in rows:
        for _ in llm._run([row]):
            pass
    return RequestOutput(text, ids, [row.output() for row in rows])


def loads(llm: LLM) -> int:
    return sum(map(sum, llm.stats.loads_LE))


def check_at_rest(engine: Engine) -> None:
    """Nothing is left of any request."""
    assert not engine.step()
    assert (engine.stats.waiting, engine.stats.running) == (0, 0)
    assert not engine._requests


@pytest.mark.parametrize("name", FAMILIES)
def test_joint_split_and_alone_agree_token_for_token(
    name: str, folders: Folders, alone: Callable[[str], list[list[int]]]
) -> None:
    """Sequences join and leave at different steps: six answers of 4 to 19 tokens at four places."""
    chunk = {} if name in ("switch_safetensors", "nllb_moe") else {"prefill_chunk": 8}
    found = {}
    with load(folders(name), cache_size=1, **chunk) as llm:
        for execution in ("joint", "split"):
            llm.reset_stats()
            engine = Engine(llm, execution=execution)  # type: ignore[arg-type]
            assert tokens(engine.generate(PROMPTS, PARAMS)) == alone(name), execution
            check_at_rest(engine)
            found[execution] = (loads(llm), engine.stats.steps, engine.stats.rows_per_step)
    assert found["joint"][1:] == found["split"][1:], "the same schedule"
    assert found["joint"][2] > 1.5, "they ran together"
    assert found["joint"][0] < found["split"][0], "experts are loaded once for both batches"


def test_generate_decodes_through_an_engine_where_more_is_held(
    folders: Folders, alone: Callable[[str], list[list[int]]]
) -> None:
    """An answer that ends makes room for the next: fewer uses of experts than batches that run to their ends."""
    uses = {}
    for sequences in (4, 2):
        with load(folders("qwen2_moe"), sequences=sequences) as llm:
            assert tokens(llm.generate(PROMPTS, PARAMS)) == alone("qwen2_moe")
            uses[sequences] = sum(map(sum, llm.stats.uses_LE))
            assert llm.timing.generated_tokens == sum(map(len, alone("qwen2_moe")))
            assert llm.timing.tokens_per_second > 0
    assert uses[4] < uses[2]


@pytest.mark.parametrize("settings", [{"sequences": 8}, {"sequences": 3}, {"batch": 1, "sequences": None}])
def test_any_number_of_units_gives_the_same_tokens(
    settings: dict[str, Any], folders: Folders, alone: Callable[[str], list[list[int]]]
) -> None:
    with load(folders("qwen2_moe"), **settings) as llm:
        engine = Engine(llm)
        assert tokens(engine.generate(PROMPTS, PARAMS)) == alone("qwen2_moe")
        assert len(engine.units) == (2 if settings["sequences"] == 8 else 1)


def test_the_cache_and_the_predictor_change_no_bit(folders: Folders) -> None:
    """Under the fixed schedule the very logits are the same, whatever is loaded when."""
    seen: list[list[bytes]] = []
    for settings in ({"cache_size": 1}, {"cache_size": 8}, {"predictor": "online"}, {"policy": "plec"}):
        with load(folders("qwen2_moe"), **settings) as llm:
            engine = Engine(llm)
            logits: list[bytes] = []
            llm.model.register_forward_hook(
                lambda module, args, output, logits=logits: logits.append(output.logits.numpy().tobytes())
            )
            engine.generate(PROMPTS, PARAMS)
            seen.append(logits)
            if llm.experts.predicting is not None:
                assert llm.experts.predicting.stats.failed is None
    assert len(seen[0]) > 20
    assert all(logits == seen[0] for logits in seen[1:])


def test_a_chunk_of_prompts_reads_each_expert_at_most_once_per_layer(folders: Folders) -> None:
    """Three prompts in chunks of 8 beside two decoding batches, with slots for a fraction of the experts."""
    with load(folders("qwen2_moe"), cache_size=1, batch=3, sequences=6, prefill_chunk=8, context=100) as llm:
        engine = Engine(llm)
        for prompt in PROMPTS[:3]:
            engine.submit(prompt, SamplingParams(temperature=0, max_tokens=30))
        for _ in range(6):
            engine.step()
        for prompt in PROMPTS[3:]:
            engine.submit(prompt * 2, SamplingParams(temperature=0, max_tokens=30))
        most = 0
        for _ in range(6):
            before = [list(loads_E) for loads_E in llm.stats.loads_LE]
            engine.step()
            llm.experts.cache.wait_idle()
            most = max(
                most,
                *(
                    now - was
                    for new, old in zip(llm.stats.loads_LE, before, strict=True)
                    for now, was in zip(new, old, strict=True)
                ),
            )
        assert engine.stats.running == 6
        assert most == 1
        engine.close()


def test_recording_follows_every_pass_of_a_joint_step(llm: LLM) -> None:
    """Passes that run side by side end in another order than they began, and each has its own tokens."""
    routes = {}
    for execution in ("joint", "split"):
        with capture_routes(llm.model) as capture:
            Engine(llm, execution=execution).generate(PROMPTS, PARAMS)  # type: ignore[arg-type]
        sequences = [one for taken in capture.take() for one in taken.sequences() if len(one.ids_T)]
        routes[execution] = sorted((one.ids_T.tolist(), one.routes_TLK.tolist()) for one in sequences)
    assert routes["joint"] == routes["split"]


def test_requests_have_their_own_rules(llm: LLM) -> None:
    whole = by_itself(llm, "Hello there", SamplingParams(temperature=0, max_tokens=12))
    text = whole.outputs[0].text
    params = [
        SamplingParams(temperature=0, max_tokens=12, stop=text[3:5]),
        SamplingParams(temperature=0, max_tokens=5),
        SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[whole.outputs[0].token_ids[2]]),
        SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.5),
        SamplingParams(temperature=0.8, seed=3, n=3, max_tokens=6),
    ]
    outputs = Engine(llm).generate(["Hello there"] * len(params), params)
    assert outputs == [by_itself(llm, "Hello there", wanted) for wanted in params]
    assert outputs[0].outputs[0].stop_reason == text[3:5]
    assert outputs[2].outputs[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "wish",
    [
        {"forced_eos_token_id": EOS},  # as the last token, counted from the prompt's own length
        {"sequence_bias": {(EOS,): 50.0}, "min_new_tokens": 3},  # ends at once, but not before three tokens
    ],
)
def test_what_the_checkpoint_does_to_logits_counts_from_each_prompt(
    folders: Folders, wish: dict[str, Any]
) -> None:
    """And not from the longest one beside it, nor from padding."""
    with load(folders("qwen2_moe")) as llm:
        for name, value in wish.items():
            setattr(llm.model.generation_config, name, value)
        params = SamplingParams(temperature=0, max_tokens=6)
        expected = [by_itself(llm, prompt, params) for prompt in PROMPTS]
        assert all(EOS in one.outputs[0].token_ids for one in expected)
        assert Engine(llm).generate(PROMPTS, params) == expected


def test_text_streams_while_others_run(llm: LLM) -> None:
    engine = Engine(llm)
    heard: list[str] = []
    params = SamplingParams(temperature=0, max_tokens=12)
    other = engine.submit("abc def", params, on_text=lambda answer, text: heard.append(text))
    pieces = list(engine.stream("Hello there", params))
    assert len(pieces) > 5
    assert "".join(pieces) == by_itself(llm, "Hello there", params).outputs[0].text
    while engine.step():
        pass
    assert "".join(heard) == other.output().outputs[0].text == "".join(other.pieces())
    assert len(heard) > 5


def test_a_stream_that_is_left_gives_its_place_back(llm: LLM) -> None:
    engine = Engine(llm)
    stream = engine.stream("Hello there", SamplingParams(temperature=0, max_tokens=50))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    check_at_rest(engine)
    assert engine.stats.cancelled == 1


def test_a_request_that_does_not_fit_is_refused_and_the_others_go_on(llm: LLM) -> None:
    engine = Engine(llm)
    good = engine.submit("Hello there", PARAMS[1])
    for prompt, wrong in (
        [[], "is empty"],
        ["x" * 70, "does not fit the context of 64"],
        [[5000], "outside"],
    ):
        with pytest.raises(ValueError, match=wrong):
            engine.submit(prompt, PARAMS[1])
    with pytest.raises(ValueError, match="does not fit"):
        engine.submit("x", SamplingParams(max_tokens=64))
    while engine.step():
        pass
    assert good.output().outputs == by_itself(llm, "Hello there", PARAMS[1]).outputs


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding"])
def test_cancelling_frees_the_place_at_once_and_changes_nobody(when: str, folders: Folders) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    with load(folders("qwen2_moe"), prefill_chunk=8, sequences=3 if when == "waiting" else 4) as llm:
        expected = [by_itself(llm, prompt, params) for prompt in PROMPTS]
        engine = Engine(llm)
        requests = [engine.submit(prompt, params) for prompt in PROMPTS[:2]]
        engine.step()  # the first of five chunks of the second prompt
        victim = engine.submit("gone soon, gone too", params)
        more = [engine.submit(prompt, params) for prompt in PROMPTS[2:]]
        if when == "reading":
            victim = requests.pop(1)
            assert engine.units[0].prefills
            expected = [expected[0], *expected[2:]]
        if when == "decoding":
            while not victim.rows[0].token_ids:
                engine.step()
            engine.step()
        length = len(victim.rows[0].token_ids)
        victim.cancel()
        engine.step()
        assert victim.done
        assert victim.rows[0] not in engine.units[0].members
        (answer,) = victim.output().outputs
        assert (answer.finish_reason, len(answer.token_ids)) == ("abort", length)
        while engine.step():
            pass
        found = [request.output() for request in [*requests, *more] if not request.cancelled]
        assert [one.outputs for one in found][:2] == [one.outputs for one in expected][:2]
        assert all(one.outputs[0].finish_reason == "length" for one in found)
        check_at_rest(engine)


def test_a_request_ends_when_its_time_is_up(llm: LLM) -> None:
    now = [100.0]
    engine = Engine(llm, clock=lambda: now[0])
    params = SamplingParams(temperature=0, max_tokens=20)
    hurried, patient = engine.submit("Hello", params, deadline_seconds=5), engine.submit("there", params)
    for _ in range(4):
        engine.step()
    now[0] += 5
    engine.step()
    assert hurried.done
    assert hurried.output().outputs[0].finish_reason == "abort"
    while engine.step():
        pass
    assert patient.output().outputs == by_itself(llm, "there", params).outputs


def test_a_request_whose_sampling_or_listener_fails_is_alone_in_that(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llm)
    params = SamplingParams(temperature=0, max_tokens=8)
    good = engine.submit("Hello there", params)
    bad = engine.submit("abc def", SamplingParams(seed=666, max_tokens=8, n=2))
    deaf = engine.submit("zz", params, on_text=lambda answer, text: 1 / 0)  # type: ignore[func-returns-value]
    choose = LiveSequence.choose

    def failing(self: LiveSequence, logits_V: torch.Tensor) -> int:
        if self.row.seed == 666 and len(self.row.token_ids) == 2:
            raise ArithmeticError("no number")
        return choose(self, logits_V)

    monkeypatch.setattr(LiveSequence, "choose", failing)
    while engine.step():
        pass
    assert good.output().outputs == by_itself(llm, "Hello there", params).outputs
    with pytest.raises(ArithmeticError, match="no number"):
        bad.output()
    with pytest.raises(ZeroDivisionError):
        deaf.output()
    assert (engine.stats.finished, engine.stats.failed) == (1, 2)
    check_at_rest(engine)


@pytest.mark.parametrize("execution", ["joint", "split"])
def test_an_error_in_the_arithmetic_ends_its_unit_and_not_the_engine(
    llm: LLM, execution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(llm, execution=execution)
    params = SamplingParams(temperature=0, max_tokens=8)
    requests = [engine.submit(prompt, params) for prompt in PROMPTS[:5]]
    for _ in range(3):
        engine.step()
    real, calls = llm.experts.cache.store.read_chunk, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise OSError("the disk is gone")

    monkeypatch.setattr(llm.experts.cache.store, "read_chunk", failing)
    while not calls:
        engine.step()
    monkeypatch.setattr(llm.experts.cache.store, "read_chunk", real)
    while engine.step():
        pass
    for request in requests[:4]:
        with pytest.raises(OSError, match="the disk is gone"):
            request.output()
    assert requests[4].output().outputs == by_itself(llm, PROMPTS[4], params).outputs
    check_at_rest(engine)


@pytest.mark.parametrize("execution", ["joint", "split"])
def test_ctrl_c_comes_out_and_the_engine_lives(llm: LLM, execution: Any) -> None:
    engine = Engine(llm, execution=execution)
    params = SamplingParams(temperature=0, max_tokens=8)
    requests = [engine.submit(prompt, params) for prompt in PROMPTS[:5]]
    for _ in range(3):
        engine.step()
    experts = llm.model.get_submodule(llm.experts.moe_layers[1].name)
    hook = experts.register_forward_pre_hook(lambda *_: llm.interrupts._note(2, None))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    hook.remove()
    llm.interrupts._pending = False
    while engine.step():
        pass
    with pytest.raises(RuntimeError, match="interrupted in the middle of a step"):
        requests[0].output()
    assert requests[4].output().outputs == by_itself(llm, PROMPTS[4], params).outputs
    check_at_rest(engine)


def test_threads_submit_and_cancel_while_one_steps(llm: LLM) -> None:
    engine = Engine(llm)
    params = SamplingParams(temperature=0, max_tokens=6)
    expected = {prompt: by_itself(llm, prompt, params).outputs for prompt in PROMPTS}
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            if not engine.step():
                engine.wait_for_work()

    def ask(prompt: str) -> None:
        for _ in range(3):
            cancelled = engine.submit(prompt, SamplingParams(max_tokens=30))
            wanted = engine.submit(prompt, params)
            cancelled.cancel()
            text = "".join(wanted.pieces())
            if wanted.wait(60).outputs != expected[prompt] or text != expected[prompt][0].text:
                wrong.append(prompt)
            cancelled.wait(60)

    wrong: list[str] = []
    server = threading.Thread(target=serve)
    askers = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS[:4]]
    for thread in (server, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    done.set()
    engine.submit("x", params).cancel()  # wakes it
    server.join()
    assert not wrong
    assert engine.stats.finished == 12


def test_two_threads_may_not_step(llm: LLM) -> None:
    engine = Engine(llm)
    found: list[BaseException] = []

    def step() -> None:
        try:
            engine.step()
        except RuntimeError as error:
            found.append(error)

    def on_text(answer: int, text: str) -> None:
        if not found:
            other = threading.Thread(target=step)
            other.start()
            other.join()

    engine.submit("Hello", PARAMS[1], on_text=on_text)
    while engine.step():
        pass
    assert "another thread is stepping this engine" in str(found[0])


def test_a_scheduler_decides_who_sits_together(llm: LLM, alone: Callable[[str], list[list[int]]]) -> None:
    """Whoever is moved, and however often: the text is the same."""
    asked: list[Seating] = []

    def turning(seating: Seating) -> list[list[LiveSequence]]:
        asked.append(seating)
        everybody = [member for batch in [*seating.batches, *seating.joining] for member in batch]
        everybody = everybody[1:] + everybody[:1]
        half = -(-len(everybody) // 2)
        return [batch for batch in (everybody[:half], everybody[half:]) if batch]

    engine = Engine(llm, scheduler=turning)
    assert tokens(engine.generate(PROMPTS, PARAMS)) == alone("qwen2_moe")
    assert engine.stats.regroupings > 10
    assert max(len(batch) for seating in asked for batch in seating.batches) == 2


def test_a_scheduler_that_loses_somebody_is_found_out(llm: LLM) -> None:
    engine = Engine(llm, scheduler=lambda seating: [seating.joining[0][:1]])
    engine.submit("Hello", PARAMS[1])
    other = engine.submit("there", PARAMS[1])
    while engine.step():
        pass
    with pytest.raises(ValueError, match="the scheduler seated 1 sequences where there are 2"):
        other.output()


def test_a_closed_engine_takes_nothing_and_keeps_nobody_waiting(llm: LLM) -> None:
    with Engine(llm) as engine:
        request = engine.submit("Hello", PARAMS[1])
        engine.step()
    assert request.wait(0).outputs[0].finish_reason == "abort"
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit("Hello")
    assert llm.generate("x", SamplingParams(max_tokens=1))


def test_unknown_execution(llm: LLM) -> None:
    with pytest.raises(ValueError, match="execution='both' is unknown; use 'joint' or 'split'"):
        Engine(llm, execution="both")  # type: ignore[arg-type]


def test_a_cache_that_cannot_be_taken_apart_is_refused_at_the_start(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(llm.model), "_supports_default_dynamic_cache", lambda self: False)
    with pytest.raises(
        ValueError, match=r"has a KV cache of its own.*use LLM.generate, with sequences= left out"
    ):
        Engine(llm)
    monkeypatch.undo()
    monkeypatch.setattr("expertflow.engine.batch.objection", lambda cache: "it is odd")
    with pytest.raises(ValueError, match="join or leave the KV cache of Qwen2MoeForCausalLM: it is odd; use"):
        Engine(llm)


def test_a_short_prompt_does_not_wait_for_a_long_one(folders: Folders) -> None:
    params = SamplingParams(temperature=0, max_tokens=3)
    with load(folders("qwen2_moe"), prefill_chunk=8) as llm:
        engine = Engine(llm)
        long, short = engine.submit("x" * 60, params), engine.submit("abc", params)
        while not short.done:
            engine.step()
        assert not long.rows[0].token_ids, "it has read 24 of 60 tokens"
        late = engine.submit("zz", params)
        while not late.done:
            engine.step()
        assert not long.rows[0].token_ids
        while engine.step():
            pass
        for request, prompt in ((long, "x" * 60), (short, "abc"), (late, "zz")):
            assert request.output().outputs == by_itself(llm, prompt, params).outputs


def test_stats_count_what_happened(llm: LLM) -> None:
    engine = Engine(llm)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    outputs = engine.generate(PROMPTS[:4], params)
    stats = engine.stats.to_dict()
    assert (stats["finished"], stats["generated_tokens"], stats["execution"]) == (4, 16, "joint")
    assert stats["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in outputs)
    assert stats["steps"] == 5, "two prompts, two more beside the first two's second token, and so on"
    assert stats["decode_rows"] == 12, "the first token of each comes from its prompt"
    assert stats["rows_per_step"] == 12 / 5
    engine.reset_stats()
    assert engine.stats.steps == 0
    assert EOS not in tokens(outputs)[0]


@pytest.mark.parametrize("execution", ["joint", "split"])
def test_predictors_follow_sequences_through_batches(
    folders: Folders, alone: Callable[[str], list[list[int]]], execution: Any
) -> None:
    """A joint step is one pass to them: every sequence that decodes, wherever it sits, with what it has read before."""
    with load(folders("qwen2_moe"), cache_size=1, predictor="online") as llm:
        heard = Noise(llm.model)
        predicting: Any = llm.experts.predicting
        predicting.make = lambda top_k: heard
        forecasts: list[Any] = []
        begin_pass = llm.experts.cache.begin_pass
        llm.experts.cache.begin_pass = lambda forecast: (forecasts.append(forecast), begin_pass(forecast))  # type: ignore[method-assign,assignment,return-value]
        engine = Engine(llm, execution=execution)
        requests = [engine.submit(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
        rows = [request.rows[0] for request in requests]
        asked: list[set[int]] = []
        while True:
            before = len(heard.begun)
            decoding = [member.row for batch in engine.units[0].batches for member in batch.members]
            texts = [row.prompt_ids + row.token_ids for row in decoding]
            if not engine.step():
                break
            contexts = [context for context, _ in heard.begun[before:] if context.num_new == 1 and decoding]
            known = [
                ids[mask].tolist()
                for context in contexts
                for ids, mask in zip(context.target_BT, context.target_mask_BT, strict=True)
            ]
            assert known == [text[-len(ids) :] for text, ids in zip(texts, known, strict=True)]
            assert all(len(ids) == min(len(text), TAIL + 1) for text, ids in zip(texts, known, strict=True))
            if execution == "joint":
                assert len(heard.begun) == before + 1
            asked.append({len(known)})
        assert predicting.stats.failed is None
        assert [row.token_ids for row in rows] == alone("qwen2_moe")
        assert len(forecasts) == len(heard.begun)
        assert len(heard.learnt) == (3 if execution == "joint" else 0), (
            "prompts beside others; alone they are asked about"
        )
        assert len(set.union(*asked)) > 2, "sequences joined and left"
        assert heard.asked > 0
