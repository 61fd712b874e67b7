"""schedule=auto: the same texts whatever is predicted and when, fewer loads where paths are alike, and no hang."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from expertflow import LLM, SamplingParams
from expertflow.cache.gate import HOLD, LEARNING, WINDOW, WINDOWS, AlwaysOpen, PayoffGate
from expertflow.engine import auto_schedule
from expertflow.engine.auto_schedule import AutoSchedule, Payoff, Prepared
from expertflow.engine.engine import Engine
from expertflow.engine.unit import Seating, Unit
from expertflow.scheduler import regroup
from expertflow.timeline import Timeline
from tests.engine.test_engine import PARAMS, PROMPTS, check_at_rest, loads, tokens
from tests.families import VOCAB_SIZE, write_checkpoint
from tests.models.test_predicting import Noise, listen_to, trained_for

LONG = 60.0
ALL_PROMPTS, ALL_PARAMS = PROMPTS * 2, PARAMS * 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("auto")

    def folder(name: str) -> Path:
        at = root / name
        return at if at.exists() else write_checkpoint(name, at, dtype=torch.float64)

    return folder


@pytest.fixture(scope="module")
def alone(folders: Callable[[str], Path]) -> Callable[[str], list[list[int]]]:
    found: dict[str, list[list[int]]] = {}

    def tokens_alone(name: str) -> list[list[int]]:
        if name not in found:
            with LLM(folders(name), cache_size=3, context=64, batch=1) as llm:
                found[name] = tokens(llm.generate(PROMPTS, PARAMS)) * 2
        return found[name]

    return tokens_alone


def load(folder: Path, **settings: Any) -> LLM:
    """Two units of two batches of two."""
    sizes = {"cache_size": 2, "context": 64, "batch": 2, "sequences": 8, "predictor": "online"}
    return LLM(folder, **{**sizes, **settings})


@contextmanager
def auto(llm: LLM, **options: Any) -> Iterator[tuple[Engine, AutoSchedule]]:
    """Without trials of whether it pays, which the machine decides."""
    with Engine(llm, schedule="auto", **{"execution": "split", **options}) as engine:
        assert engine._auto is not None
        engine._auto.gate = AlwaysOpen()
        yield engine, engine._auto


class Patient(Payoff):
    """Every result is waited for, and moving costs next to nothing: what happens does not depend on the machine."""

    @property
    def seconds_saved(self) -> float:
        return math.inf

    def stepped(self, stall_seconds: float, activations: int) -> None:
        self.seconds_per_activation = 1.0


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "switch_safetensors"])
@pytest.mark.parametrize("execution", ["split", "joint"])
def test_no_text_changes(
    name: str, execution: str, folders: Callable[[str], Path], alone: Callable[[str], list[list[int]]]
) -> None:
    """Greedy and sampled answers that join and leave at different steps, in two units and more."""
    with load(folders(name)) as llm, auto(llm, execution=execution) as (engine, schedule):
        schedule.payoff = Patient()
        assert tokens(engine.generate(ALL_PROMPTS, ALL_PARAMS)) == alone(name)
        check_at_rest(engine)
        stats, predicting = engine.stats, llm.experts.predicting
        assert predicting is not None
        assert predicting.stats.failed is None
        assert predicting.stats.foreseen > 20
        assert stats.hidden_predict_seconds > 0
        assert stats.late == 0
        assert (stats.groupings > 10) == (stats.regroupings > 5) == (execution == "split")


@pytest.mark.parametrize("when", ["on time", "late"])
@pytest.mark.parametrize("predictor", ["online", "trained", "noise"])
def test_no_text_changes_whoever_predicts_and_however_late(
    when: str,
    predictor: str,
    folders: Callable[[str], Path],
    alone: Callable[[str], list[list[int]]],
    tmp_path: Path,
) -> None:
    name = "qwen2_moe"
    setting = "online"
    if predictor == "trained":
        with LLM(folders(name), cache_size=3) as plain:
            setting = str(trained_for(plain.model, tmp_path, "causal"))
    with load(folders(name), predictor=setting) as llm, auto(llm) as (engine, schedule):
        predicting: Any = llm.experts.predicting
        if predictor == "noise":
            listen_to(llm.model, Noise(llm.model))
        held = threading.Event()
        if when == "on time":
            held.set()
            schedule.payoff = Patient()
        foresee = predicting.foresee

        def held_up(question: Any, *, hidden: bool) -> Any:
            assert not hidden or held.wait(LONG)
            return foresee(question, hidden=hidden)

        predicting.foresee = held_up
        try:
            assert tokens(engine.generate(ALL_PROMPTS, ALL_PARAMS)) == alone(name)
        finally:
            held.set()
        assert predicting.stats.failed is None
        if when == "on time":
            assert engine.stats.late == 0
            assert predicting.stats.foreseen > 20
        else:
            assert engine.stats.late > 10
            assert engine.stats.regroupings == 0
            assert predicting.stats.foreseen == 0
            assert predicting.stats.passes > 20, "then they are asked when the pass begins"


def two_languages(folder: Path) -> Path:
    """Even token ids go to experts 0 to 3, odd ones to 4 to 7, and a text stays in its language.

    The first number of the residual stream says which: nothing writes it but the embedding.
    """
    write_checkpoint("qwen2_moe", folder, dtype=torch.float64)
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    language_V = torch.where(torch.arange(VOCAB_SIZE) % 2 == 0, 1.0, -1.0).double()
    for name, weight in state.items():
        if name.endswith("embed_tokens.weight"):
            weight[:, 0] = 4 * language_V
        elif name.endswith("lm_head.weight"):
            weight[:, 0] = 50 * language_V
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
        elif name.endswith("mlp.gate.weight"):
            weight[:, 0] = 30 * torch.where(torch.arange(len(weight)) < len(weight) // 2, 1.0, -1.0)
        elif "norm" in name:
            weight[0] = 1
    save_file(state, path, metadata={"format": "pt"})
    return folder


def test_sequences_of_a_language_share_a_batch_and_its_experts(tmp_path: Path) -> None:
    """They arrive in turn, so in order of arrival every batch needs the experts of both languages."""
    folder = two_languages(tmp_path / "languages")
    prompts = [[40 + 2 * n + n % 2, 60 + n % 2, 80 + n % 2] for n in range(8)]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True)
    found: dict[str, tuple[list[list[int]], int, int]] = {}
    for schedule in ("fixed", "auto"):
        with load(folder, cache_size=4) as llm, Engine(llm, execution="split", schedule=schedule) as engine:  # type: ignore[arg-type]
            if engine._auto is not None:
                engine._auto.payoff, engine._auto.gate = Patient(), AlwaysOpen()
            requests = [engine.submit(prompt, params) for prompt in prompts]
            for _ in range(20):
                engine.step()
            languages = [
                [{token % 2 for token in member.row.token_ids} for member in batch.members]
                for unit in engine.units
                for batch in unit.batches
            ]
            assert all(len(spoken) == 1 for batch in languages for spoken in batch), "a text mixes languages"
            together = [set.union(*batch) for batch in languages]
            assert all(len(spoken) == (1 if schedule == "auto" else 2) for spoken in together)
            while engine.step():
                pass
            uses = sum(map(sum, llm.stats.uses_LE))
            found[schedule] = (tokens([request.output() for request in requests]), loads(llm), uses)
    assert found["auto"][0] == found["fixed"][0]
    assert found["auto"][2] < 0.75 * found["fixed"][2]
    # .69 without what is fetched for the next pass, some of it in vain.
    assert found["auto"][1] < 0.9 * found["fixed"][1]


def test_what_moving_costs_decides(tmp_path: Path) -> None:
    """The same case with experts that cost less to load than a sequence to copy."""
    folder = two_languages(tmp_path / "languages")
    prompts = [[40 + 2 * n + n % 2, 60 + n % 2, 80 + n % 2] for n in range(8)]
    with load(folder, cache_size=4) as llm, auto(llm) as (engine, schedule):
        schedule.payoff = Patient()
        schedule.payoff.stepped = lambda *_: setattr(schedule.payoff, "seconds_per_activation", 1e-9)  # type: ignore[method-assign]
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))  # type: ignore[arg-type]
        assert engine.stats.groupings > 5
        assert engine.stats.regroupings == 0


def test_a_payoff_is_measured() -> None:
    payoff = Payoff()
    assert payoff.seconds_saved == 0
    payoff.stepped(2.0, 100)
    payoff.grouped(10)
    assert payoff.seconds_saved == pytest.approx(0.2)
    payoff.stepped(-1.0, 100)  # statistics were reset meanwhile
    payoff.stepped(0.0, 100)
    assert payoff.seconds_per_activation == pytest.approx(0.016)
    payoff.grouped(0)
    assert payoff.saved_activations == pytest.approx(8)
    assert payoff.cost_of_moving(2e9) == pytest.approx(1 / 0.016)


class Closed(PayoffGate):
    open = False  # type: ignore[assignment]


def test_where_it_does_not_pay_steps_are_those_of_fixed(
    folders: Callable[[str], Path], alone: Callable[[str], list[list[int]]]
) -> None:
    """Nothing is prepared, nothing hidden; passes ask for themselves."""
    with load(folders("qwen2_moe")) as llm, auto(llm) as (engine, schedule):
        schedule.payoff, schedule.gate = Patient(), Closed()
        schedule.admitting.next_question = lambda *_, **__: None  # type: ignore[method-assign]
        assert tokens(engine.generate(ALL_PROMPTS, ALL_PARAMS)) == alone("qwen2_moe")
        stats, predicting = engine.stats, llm.experts.predicting
        assert stats.groupings == stats.regroupings == stats.late == 0
        assert stats.hidden_predict_seconds == stats.hidden_group_seconds == 0
        assert schedule.pipeline._thread is None
        assert predicting is not None
        assert predicting.stats.foreseen == 0
        assert predicting.stats.passes > 20


@pytest.mark.parametrize(("grouped_takes", "stays"), [(0.5, True), (2.0, False)])
def test_it_is_kept_where_steps_are_faster_with_it(
    folders: Callable[[str], Path], grouped_takes: float, stays: bool
) -> None:
    """A clock that the test makes up, by whether the step was prepared for."""
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    with load(folders("qwen2_moe"), context=128) as llm, auto(llm) as (engine, schedule):
        llm.experts.predicting.gate = AlwaysOpen()  # type: ignore[union-attr]
        schedule.payoff, schedule.gate = Patient(), PayoffGate("the scheduler", ("step", "steps"))
        ended, open_before = schedule.ended, []

        def made_up(seconds: float, rows: int, *, prompts: bool) -> None:
            if not prompts:
                open_before.append(schedule.gate.open)
            ended(grouped_takes if schedule.gate.open else 1.0, rows, prompts=prompts)

        schedule.ended = made_up  # type: ignore[method-assign]
        engine.generate(PROMPTS[:4] * 2, params)
        trial = LEARNING + len(WINDOWS) * WINDOW
        windows = [kept for kept in (True, False, True, False) for _ in range(WINDOW)]
        assert open_before[:trial] == [True] * LEARNING + windows
        assert len(open_before) > trial
        assert set(open_before[trial:]) == {stays}
        said = engine.stats.scheduler
        assert said.startswith(f"{'on' if stays else 'off'}: {1e3 * grouped_takes:.0f} ms")
        assert "ms per step with the scheduler, 1000 ms without (4 rows, after 72 steps)" in said


def test_steps_with_prompts_and_trials_of_prefetching_are_not_compared(
    folders: Callable[[str], Path],
) -> None:
    with load(folders("qwen2_moe")) as llm, auto(llm) as (_, schedule):
        schedule.gate = gate = PayoffGate()
        prefetching = llm.experts.predicting.gate = PayoffGate()  # type: ignore[union-attr]
        for _ in range(2 * LEARNING):
            schedule.ended(1.0, 4, prompts=True)
            schedule.ended(1.0, 0, prompts=False)
        assert not gate.trying
        for _ in range(LEARNING - 1):
            schedule.ended(1.0, 4, prompts=False)
            prefetching.passed(1.0, 4)
        prefetching.passed(1.0, 4)
        assert prefetching.trying
        for _ in range(HOLD):
            schedule.ended(1.0, 4, prompts=False)
        assert not gate.trying
        while prefetching.trying:
            prefetching.passed(1.0 if prefetching.open else 0.5, 4)
        assert not prefetching.open
        schedule.ended(1.0, 4, prompts=False)
        assert not gate.trying, "nothing is predicted, so nothing can be grouped"
        prefetching.on = True
        schedule.ended(1.0, 4, prompts=False)
        assert gate.trying


def test_one_unit_alone_predicts_on_the_critical_path(
    folders: Callable[[str], Path], alone: Callable[[str], list[list[int]]]
) -> None:
    with load(folders("qwen2_moe"), sequences=4) as llm, auto(llm) as (engine, schedule):
        schedule.payoff = Patient()
        assert tokens(engine.generate(ALL_PROMPTS, ALL_PARAMS)) == alone("qwen2_moe")
        stats = engine.stats
        assert stats.hidden_predict_seconds == stats.hidden_group_seconds == 0
        assert schedule.pipeline._thread is None
        assert stats.predict_seconds > 0
        assert stats.group_seconds > 0
        assert stats.groupings > 10
        seconds = stats.predict_seconds + stats.group_seconds + stats.wait_seconds
        assert 0 < stats.scheduling_share == seconds / stats.step_seconds < 1
        assert 0 < stats.look_ahead_seconds < stats.predict_seconds
        assert stats.paths_share == pytest.approx((seconds - stats.look_ahead_seconds) / stats.step_seconds)
        engine.reset_stats()
        assert engine.stats.group_seconds == engine.stats.groupings == 0


@pytest.mark.parametrize("execution", ["split", "joint"])
def test_the_cache_is_told_of_the_pass_after_the_one_that_runs(
    folders: Callable[[str], Path], execution: str
) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with load(folders("qwen2_moe")) as llm, auto(llm, execution=execution) as (engine, schedule):
        schedule.payoff = Patient()  # so that what is said of a unit is there when it runs
        cache = llm.experts.cache
        begin_pass, expect_next = cache.begin_pass, cache.expect_next
        told: list[tuple[str, Any]] = []

        def begun(forecast: Any) -> None:
            told.append(("pass", None if forecast is None else forecast.p_LE))
            begin_pass(forecast)

        def expected(p_LE: Any) -> None:
            told.append(("next", p_LE))
            expect_next(p_LE)

        cache.begin_pass, cache.expect_next = begun, expected  # type: ignore[method-assign]
        engine.generate(PROMPTS[:4] * 2, params)

    assert not any(one == other == "next" for (one, _), (other, _) in pairwise(told)), "it was said twice"
    said = {"this": [], "next": []}  # type: ignore[var-annotated]
    now = None
    for number, (what, p_LE) in enumerate(told):
        if what == "pass":
            now = p_LE
            continue
        then = next((p for kind, p in told[number + 1 :] if kind == "pass"), None)
        if now is not None and then is not None:
            for name, other_LE in (("this", now), ("next", then)):
                said[name].append(float((torch.tensor(p_LE) - torch.tensor(other_LE)).abs().mean()))
    assert len(said["next"]) > 20
    assert sum(said["next"]) < 0.3 * sum(said["this"]), "it was said of other rows"


def test_one_unit_says_of_its_second_batch_alone_what_comes(folders: Callable[[str], Path]) -> None:
    """Its first batch's next token is not known while the second one runs."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with load(folders("qwen2_moe"), sequences=4) as llm, auto(llm) as (engine, schedule):
        schedule.payoff = Patient()
        predicting: Any = llm.experts.predicting
        following: list[list[int]] = []
        then = predicting.then
        predicting.then = lambda passes: (following.append([len(names) for names in passes]), then(passes))
        engine.generate(PROMPTS[:4], params)
        assert [2] in following
        assert all(passes in ([], [2], [1]) or set(passes) == {0} for passes in following), "0: prompts"


def test_nobody_expects_anything_of_prompts(folders: Callable[[str], Path]) -> None:
    """They are read behind the batches, and need nearly every expert."""

    def sitting(*ids: int) -> Any:
        return [
            SimpleNamespace(members=[SimpleNamespace(row=SimpleNamespace(token_ids=[]), id=n)]) for n in ids
        ]

    this = SimpleNamespace(batches=sitting(1, 2), prefills=["one", "two"])
    after = SimpleNamespace(batches=sitting(3, 4), prefills=[])
    with load(folders("qwen2_moe")) as llm, auto(llm) as (_, schedule):
        found: list[Any] = []
        llm.experts.predicting.then = found.append  # type: ignore[union-attr,method-assign]
        schedule.runs(this, after)  # type: ignore[arg-type]
        schedule.runs(SimpleNamespace(batches=[], prefills=["one"]), after)  # type: ignore[arg-type]
    ids = [[[name.sequence.id for name in names] for names in following] for following in found]
    assert ids == [[[2], [], [], [3]], [[3]]]


def test_learning_is_done_while_the_next_unit_computes(folders: Callable[[str], Path]) -> None:
    """In the thread, from every pass that other units follow; alone, before the next step."""
    threads: dict[bool, set[str]] = {}
    for units in (1, 2):
        with load(folders("qwen2_moe"), sequences=4 * units) as llm, auto(llm) as (engine, schedule):
            schedule.payoff = Patient()
            engine.generate(PROMPTS[:2], PARAMS[0])
            predictor: Any = llm.experts.predicting._predictor  # type: ignore[union-attr]
            heard: list[str] = []
            learn = predictor.combination.before.learn

            def listening(*args: Any, heard: list[str] = heard, learn: Any = learn) -> None:
                heard.append(threading.current_thread().name)
                learn(*args)

            predictor.combination.before.learn = listening
            requests = [engine.submit(prompt, PARAMS[5]) for prompt in PROMPTS]
            while all(unit.members for unit in engine.units) or engine.stats.steps < 10:
                engine.step()
            in_time = list(heard)
            for request in requests:
                request.cancel()
            engine.step()
            assert len(in_time) > 10
            assert schedule.pipeline.stats.left_out == 0
            threads[units == 2] = set(in_time[-10:])
    assert threads == {False: {threading.current_thread().name}, True: {"pipeline"}}


def test_a_predictor_that_fails_in_the_thread_is_not_asked_again(
    folders: Callable[[str], Path],
    alone: Callable[[str], list[list[int]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with load(folders("qwen2_moe")) as llm, auto(llm) as (engine, schedule):
        schedule.payoff = Patient()
        heard: Any = Noise(llm.model)
        predicting = listen_to(llm.model, heard)
        foresee, threads = heard.foresee, []
        about_to_fail, in_pass = threading.Event(), threading.Event()

        def failing(*args: Any) -> Any:
            threads.append(threading.current_thread().name)
            if len(threads) == 5:
                about_to_fail.set()
                assert in_pass.wait(LONG)
                raise ArithmeticError("no number")
            return foresee(*args)

        def during_a_pass(*args: Any) -> None:
            """It fails in the middle of one, which has begun with a predictor and ends without."""
            if about_to_fail.is_set() and not in_pass.is_set():
                begun.append(len(heard.begun))
                in_pass.set()
                while predicting.stats.failed is None:
                    threading.Event().wait(0.001)

        begun: list[int] = []
        heard.foresee = failing
        llm.model.get_submodule(llm.experts.moe_layers[0].name).register_forward_pre_hook(during_a_pass)
        with caplog.at_level(logging.WARNING):
            assert tokens(engine.generate(ALL_PROMPTS, ALL_PARAMS)) == alone("qwen2_moe")
        assert len(threads) == 5
        assert threads[-1] == "pipeline"
        assert begun == [len(heard.begun)], "it is not asked about the passes after, nor made anew"
        assert predicting.stats.failed == "ArithmeticError: no number"
        assert len([record for record in caplog.records if "no number" in record.message]) == 1
        assert engine.stats.failed == 0


def test_a_bug_in_the_thread_surfaces_where_it_steps(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folders("qwen2_moe")) as llm, auto(llm) as (engine, schedule):
        schedule.payoff = Patient()

        def broken(*args: Any, **kwargs: Any) -> None:
            raise ArithmeticError("no number")

        monkeypatch.setattr(auto_schedule, "group", broken)
        with pytest.raises(RuntimeError, match=r"preparing a step failed.*no number") as raised:
            engine.generate(ALL_PROMPTS, ALL_PARAMS)
        assert isinstance(raised.value.__cause__, ArithmeticError)
        check_at_rest(engine)
        monkeypatch.undo()
        assert engine.generate("x", PARAMS[1])


def test_sequences_leave_and_join_between_prediction_and_step(
    folders: Callable[[str], Path], alone: Callable[[str], list[list[int]]]
) -> None:
    """After each of many steps, with the next steps of both units prepared: one is cancelled, one submitted."""
    expected = alone("qwen2_moe")
    with load(folders("qwen2_moe")) as llm, auto(llm) as (engine, schedule):
        schedule.payoff = Patient()
        requests = {engine.submit(PROMPTS[n], PARAMS[n]): n for n in (5, 4, 3, 5, 4, 5, 5)}
        cancelled = 0
        for step in range(40):
            engine.step()
            if step % 4 == 3 and step < 24:
                requests[engine.submit(PROMPTS[step % 6], PARAMS[step % 6])] = step % 6
                victim = next(one for one in requests if not one.done and one.rows[0].token_ids)
                victim.cancel()
                cancelled += 1
        while engine.step():
            pass
        found = {request: request.output().outputs[0] for request in requests}
        assert engine.stats.cancelled == cancelled == 6
        for request, n in requests.items():
            answer = found[request].token_ids
            assert answer == expected[n][: len(answer)]
            assert request.cancelled or len(answer) == len(expected[n])
        assert engine.stats.regroupings > 5


def test_ctrl_c_and_errors_leave_no_thread_behind(folders: Callable[[str], Path]) -> None:
    for error in (KeyboardInterrupt(), ArithmeticError("no number")):
        with load(folders("qwen2_moe")) as llm:
            with auto(llm) as (engine, schedule):
                schedule.payoff = Patient()
                for prompt in PROMPTS:
                    engine.submit(prompt, PARAMS[5])
                for _ in range(8):
                    engine.step()
                thread = schedule.pipeline._thread
                assert thread is not None

                def stop(*args: Any, error: BaseException = error) -> None:
                    raise error

                hook = llm.model.register_forward_pre_hook(stop)
                if isinstance(error, KeyboardInterrupt):
                    with pytest.raises(KeyboardInterrupt):
                        engine.step()
                else:
                    engine.step()
                hook.remove()
                engine.step()  # the other unit goes on
            thread.join(LONG)
            assert not thread.is_alive()


@pytest.mark.parametrize("when", ["while they move", "in the step after"])
@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()])
def test_an_error_about_an_exchange_ends_whom_it_may_have_harmed(
    when: str,
    error: BaseException,
    folders: Callable[[str], Path],
    alone: Callable[[str], list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the other unit went on with half moved caches; and those who had just come were waited for for ever."""
    moves, in_exchange, raised = 0, False, False
    move, exchange, step = regroup._move, Unit.exchange, Unit.step

    def failing_move(*args: Any) -> Any:
        nonlocal moves, raised
        moves += in_exchange
        if in_exchange and moves >= 3 and when == "while they move" and not raised:
            raised = True
            raise error
        return move(*args)

    def counted_exchange(unit: Unit, *args: Any) -> None:
        nonlocal in_exchange
        in_exchange = True
        try:
            exchange(unit, *args)
        finally:
            in_exchange = False

    def failing_step(unit: Unit, *args: Any) -> Any:
        nonlocal raised
        if moves and when == "in the step after" and not raised:
            raised = True
            raise error
        return step(unit, *args)

    monkeypatch.setattr(regroup, "_move", failing_move)
    monkeypatch.setattr(Unit, "exchange", counted_exchange)
    monkeypatch.setattr(Unit, "step", failing_step)
    with (
        load(folders("qwen2_moe"), batch=1, sequences=6) as llm,
        auto(llm, execution="joint", patience=0) as (engine, schedule),
    ):
        schedule.payoff = Patient()
        requests = [engine.submit(p, q) for p, q in zip(ALL_PROMPTS * 2, ALL_PARAMS * 2, strict=True)]
        going = True
        while going:
            with suppress(KeyboardInterrupt):
                going = engine.step()
        check_at_rest(engine)
        assert raised
        failed = [request for request in requests if request.error is not None]
        assert len(failed) == (4 if when == "while they move" else 2)
        for request, expected in zip(requests, alone("qwen2_moe") * 2, strict=True):
            assert request.done
            if request.error is None:
                assert request.output().outputs[0].token_ids == expected


def test_spans_of_the_thread_are_on_the_timeline(folders: Callable[[str], Path]) -> None:
    with load(folders("qwen2_moe")) as llm, auto(llm) as (engine, schedule):
        schedule.payoff = Patient()
        llm.timeline = Timeline()
        engine.generate(ALL_PROMPTS, ALL_PARAMS)
        spans = llm.timeline.spans
        assert len([span for span in spans if span.track == "group"]) == engine.stats.groupings > 0
        hidden = [span for span in spans if span.track == "predict" and span.detail["hidden"]]
        computed = [span for span in spans if span.track == "compute"]
        assert any(step.begin < span.begin < step.end for span in hidden for step in computed)


def test_what_cannot_be_had_is_refused(folders: Callable[[str], Path]) -> None:
    with load(folders("qwen2_moe"), predictor="none") as llm:
        with pytest.raises(ValueError, match=r"predictor='none'.*--predictor online"):
            Engine(llm, schedule="auto")
        with pytest.raises(ValueError, match="schedule='best' is unknown; use 'fixed' or 'auto'"):
            Engine(llm, schedule="best")  # type: ignore[arg-type]
    with load(folders("qwen2_moe")) as llm, pytest.raises(ValueError, match="give one of them"):
        Engine(llm, schedule="auto", scheduler=lambda seating: seating.batches)
    with load(folders("nllb_moe")) as llm, pytest.raises(ValueError, match=r"Nllb.*use schedule='fixed'"):
        Engine(llm, schedule="auto")


@pytest.mark.parametrize(
    ("sequences", "execution", "told"), [(8, "joint", True), (10, "joint", False), (4, "split", False)]
)
def test_too_few_units_to_exchange_are_told(
    folders: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    sequences: int,
    execution: str,
    told: bool,
) -> None:
    with load(folders("qwen2_moe"), sequences=sequences) as llm, caplog.at_level(logging.WARNING):
        with auto(llm, execution=execution):
            pass
        assert ("give sequences=9 or more" in caplog.text) == told


def test_with_every_expert_in_memory_nobody_moves(folders: Callable[[str], Path]) -> None:
    with load(folders("qwen2_moe"), cache_size=8) as llm:
        assert Engine(llm, schedule="auto", execution="split")._auto is None


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "switch_safetensors"])
@pytest.mark.parametrize("patience", [0, 3, None])
def test_no_text_changes_when_units_exchange_sequences_and_choose_who_joins(
    name: str, patience: int | None, folders: Callable[[str], Path], alone: Callable[[str], list[list[int]]]
) -> None:
    """Three joint units of two, and as many answers again in the queue."""
    with (
        load(folders(name), batch=1, sequences=6) as llm,
        auto(llm, execution="joint", patience=patience) as (engine, schedule),
    ):
        schedule.payoff = Patient()
        assert tokens(engine.generate(ALL_PROMPTS * 2, ALL_PARAMS * 2)) == alone(name) * 2
        check_at_rest(engine)
        stats, predicting = engine.stats, llm.experts.predicting
        assert predicting is not None
        assert predicting.stats.failed is None
        assert predicting.stats.foreseen > 20, "what was said of exchanged rows in other units is found"
        assert stats.late == 0
        assert stats.exchanges > 5
        assert (stats.preferred > 0) == (patience != 0)


@pytest.mark.parametrize("units", [3, 4])
def test_joint_units_end_up_with_one_language_each(tmp_path: Path, units: int) -> None:
    """They arrive in turn, and units exchange them until each speaks one, but for a unit of what is left over."""
    folder = two_languages(tmp_path / "languages")
    prompts = [[40 + 2 * n + n % 2, 60 + n % 2, 80 + n % 2] for n in range(4 * units)]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=24, ignore_eos=True)
    found: dict[str, tuple[list[list[int]], int, int]] = {}
    for schedule in ("fixed", "auto"):
        with (
            load(folder, cache_size=4, sequences=4 * units) as llm,
            Engine(llm, execution="joint", schedule=schedule) as engine,  # type: ignore[arg-type]
        ):
            if engine._auto is not None:
                engine._auto.payoff, engine._auto.gate = Patient(), AlwaysOpen()
            requests = [engine.submit(prompt, params) for prompt in prompts]
            for _ in range(14 * units):
                engine.step()
            languages = [{row.token_ids[-1] % 2 for row in unit.members} for unit in engine.units]
            mixed = sum(len(spoken) == 2 for spoken in languages)
            assert mixed == (units if schedule == "fixed" else units % 2)
            assert [len(unit.members) for unit in engine.units] == [4] * units
            while engine.step():
                pass
            uses = sum(map(sum, llm.stats.uses_LE))
            found[schedule] = (tokens([request.output() for request in requests]), loads(llm), uses)
    assert found["auto"][0] == found["fixed"][0]
    assert found["auto"][2] < 0.85 * found["fixed"][2]
    assert found["auto"][1] < 0.85 * found["fixed"][1]


def test_those_join_who_speak_the_language_of_a_unit(tmp_path: Path) -> None:
    """One unit of two, both languages waiting: after what has been learnt, it fills with one, and keeps to the rule."""
    folder = two_languages(tmp_path / "languages")
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=4, ignore_eos=True)
    prompts = [[40 + 2 * n + n % 2, 60 + n % 2, 80 + n % 2] for n in range(16)]
    begun: dict[int, list[int]] = {}
    for patience in (0, 2, 100):
        with (
            load(folder, cache_size=4, batch=1, sequences=2) as llm,
            auto(llm, execution="joint", patience=patience) as (engine, _),
        ):
            engine.generate(prompts[:6], params)  # type: ignore[arg-type]
            order: list[int] = []
            requests = [engine.submit(prompt, params) for prompt in prompts]
            while engine.step():
                # Two prompts that are read in one step begin together, and are listed in order of arrival.
                order += [n for n, one in enumerate(requests) if one.rows[0].token_ids and n not in order]
            begun[patience] = order
            for number in range(len(prompts)):
                assert sum(other > number for other in order[: order.index(number)]) <= patience
            assert (engine.stats.preferred > 0) == (patience > 0)

    def changes(order: list[int]) -> int:
        return sum(one % 2 != other % 2 for one, other in pairwise(order))

    assert begun[0] == list(range(16))
    assert changes(begun[100]) < changes(begun[2]) < changes(begun[0])


def test_patience_is_of_auto_alone(folders: Callable[[str], Path]) -> None:
    with load(folders("qwen2_moe")) as llm:
        with pytest.raises(ValueError, match="patience=3 is of schedule='auto'"):
            Engine(llm, patience=3)
        with pytest.raises(ValueError, match="patience=-1"):
            Engine(llm, schedule="auto", patience=-1)


class _Sitting(NamedTuple):
    prepared: list[list[int]]
    batches: list[list[int]]
    joining: list[int]


@st.composite
def sittings(draw: st.DrawFn) -> _Sitting:
    """Some of those who were prepared have left, others sit there or join, in a unit of two batches of four."""
    prepared = draw(st.permutations(range(draw(st.integers(1, 8)))))
    batches = [list(prepared[:4]), list(prepared[4:])]
    left = draw(st.sets(st.sampled_from(prepared)))
    now = [sorted(set(batch) - left) for batch in draw(st.sampled_from([batches, batches[::-1]]))]
    room = 8 - sum(map(len, now))
    joining = list(range(100, 100 + draw(st.integers(0, room))))
    new = draw(st.sets(st.sampled_from(prepared)))
    batches = [[member for member in batch if member not in new] for batch in batches]
    return _Sitting([batch for batch in batches if batch], [batch for batch in now if batch], joining)


@given(sittings())
def test_seats_hold_everybody_once(sitting: _Sitting) -> None:
    class Ready:
        def take(self, lane: int, worth_seconds: float) -> Prepared:
            return Prepared(sitting.prepared)  # type: ignore[arg-type]

    schedule: Any = AutoSchedule.__new__(AutoSchedule)
    schedule.pipeline, schedule.payoff = Ready(), Payoff()
    found: Sequence[Sequence[int]] = schedule.seats(
        0, Seating(sitting.batches, [sitting.joining], rows=4, num_batches=2, keep_apart=False)
    )
    everybody = [member for batch in [*sitting.batches, sitting.joining] for member in batch]
    assert sorted(member for batch in found for member in batch) == sorted(everybody)
    assert all(0 < len(batch) <= 4 for batch in found)
    assert len(found) <= 2
