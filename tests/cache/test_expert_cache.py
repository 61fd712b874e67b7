from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from fakes import (
    GUARD_S,
    FakeStore,
    Threads,
    Turnstile,
    assert_no_pins,
    consume,
    on_wait,
    poison_pending_slots,
    replayed_actions,
)

from expertflow.cache import expert_cache
from expertflow.cache.expert_cache import ExpertCache
from expertflow.cache.policies import POLICIES, Forecast, LayerLRU
from expertflow.core import ExpertId, MoEShape
from expertflow.timeline import Timeline

SHAPE = MoEShape((6, 6, 6))


def at(layer: int, *experts: int) -> list[ExpertId]:
    return [ExpertId(layer, expert) for expert in experts]


def turnstile_of(cache: ExpertCache) -> Turnstile:
    return Turnstile(cache.store)


def fail_reads(cache: ExpertCache, *experts: ExpertId) -> set[ExpertId]:
    """Reads of these experts fail until they are removed from the set returned."""
    broken = set(experts)

    def before_read(expert: ExpertId) -> None:
        if expert in broken:
            raise OSError(5, f"injected for {expert}")

    cache.store.before_read = before_read
    return broken


# What a layer gets, and in which order.


def test_ready_experts_come_first_while_the_others_are_on_their_way(new_cache):
    cache = new_cache(4)
    consume(cache, 0, [4, 5])
    gate = turnstile_of(cache)
    layer = cache.open_layer(0, [1, 4, 2, 5])
    assert [next(layer)[0], next(layer)[0]] == [4, 5]
    gate.open()
    assert [expert for expert, _ in layer] == [1, 2]
    assert_no_pins(cache)


@pytest.mark.parametrize("overlap", [True, False])
def test_whoever_has_something_to_do_meanwhile_does_it_before_the_first_wait(new_cache, overlap):
    """No byte arrives before it is done, so a layer that waited first would wait for ever."""
    cache = new_cache(4, overlap=overlap)
    gate = turnstile_of(cache)
    under_way = []

    def meanwhile():
        under_way.append(cache.observe().loading)
        gate.open()

    assert sorted(expert for expert, _ in cache.open_layer(0, [1, 2], meanwhile)) == [1, 2]
    assert under_way == [set(at(0, 1, 2))]
    assert [expert for expert, _ in cache.open_layer(0, [2, 1], meanwhile)] == [2, 1]
    assert under_way == [set(at(0, 1, 2)), set()]
    assert_no_pins(cache)


def test_a_layer_whose_meanwhile_fails_is_closed(new_cache):
    cache = new_cache(4)
    consume(cache, 0, [4])
    layer = cache.open_layer(0, [4, 1], lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        next(layer)
    assert_no_pins(cache)
    consume(cache, 0, [4, 1])


def test_without_overlap_everything_is_read_before_anything_is_computed(new_cache):
    cache = new_cache(4, overlap=False)
    consume(cache, 0, [4])
    reads_before = len(cache.store.reads)
    layer = cache.open_layer(0, [4, 1, 2])
    assert next(layer)[0] == 4
    assert len(cache.store.reads) - reads_before == 2 * cache.store.num_chunks
    assert [expert for expert, _ in layer] == [1, 2]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_slots", [2, 3, 5])
def test_a_layer_that_needs_more_experts_than_slots_runs_in_waves(new_cache, num_slots, overlap):
    cache = new_cache(num_slots, overlap=overlap)
    poison_pending_slots(cache)
    for layer in (0, 1, 0):
        consume(cache, layer, range(6))
        assert_no_pins(cache)


def test_no_experts_is_no_work(new_cache):
    cache = new_cache()
    assert list(cache.open_layer(0, [])) == []
    assert_no_pins(cache)


def test_demand_takes_the_slot_of_a_queued_prefetch(new_cache):
    """Two slots, both held by prefetches, one begun. The other is dropped, and the demand waits for one
    chunk of the begun prefetch, no more."""
    cache = new_cache(2)
    gate = turnstile_of(cache)
    begun, queued = at(1, 0, 1)
    cache.prefetch([begun, queued])
    gate.wait_for_arrivals(1)
    chunks = cache.store.num_chunks
    on_wait(cache, lambda: gate.let_at_least(1 + chunks))
    assert consume(cache, 0, [0]) == [0]
    demand = ExpertId(0, 0)
    assert cache.store.reads[: 1 + chunks] == [begun] + [demand] * chunks
    assert (cache.stats.cancelled, cache.stats.prefetches_unused) == (1, 1)
    gate.open()
    cache.wait_idle()
    assert cache.table.is_ready(begun)


def test_demands_outlive_a_begun_prefetch_that_holds_the_last_slot(new_cache):
    """Two slots: the begun prefetch keeps one until it is whole, and it only goes on when no demand is
    queued. Three demands must pass through the other slot, or take this one in the end."""
    cache = new_cache(2, record_events=True)
    gate = turnstile_of(cache)
    cache.prefetch(at(1, 0, 1))
    gate.wait_for_arrivals(1)
    # Enough for the chunk that has begun and one whole load, whichever it is.
    on_wait(cache, lambda: gate.let_at_least(1 + cache.store.num_chunks))
    consume(cache, 0, [0, 1, 2])
    gate.open()
    cache.wait_idle()
    assert_no_pins(cache)
    done, decided = replayed_actions(cache, "lru")
    assert done == decided


def test_weights_stay_whole_while_they_are_used(new_cache):
    """The consumer keeps expert 0 while all other loads are done; its bytes may not move."""
    cache = new_cache(2)
    poison_pending_slots(cache)
    layer = cache.open_layer(0, [0, 1, 2, 3])
    for expert, weights in layer:
        before = weights["up"][0].clone()
        cache.prefetch(at(1, 0, 1, 2))
        cache.wait_idle()
        assert torch.equal(weights["up"][0], before)
        assert torch.equal(before, cache.store.weights(ExpertId(0, expert))["up"][0])


# Failures.


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_slots", [2, 4])
def test_a_failed_read_reaches_its_layer_and_the_next_try_works(new_cache, num_slots, overlap):
    cache = new_cache(num_slots, overlap=overlap, record_events=True)
    broken = fail_reads(cache, ExpertId(0, 2))
    for _ in range(2):
        with pytest.raises(OSError, match="injected for expert 2 of MoE layer 0"):
            consume(cache, 0, range(6))
        assert_no_pins(cache)
    broken.clear()
    consume(cache, 0, range(6))
    cache.wait_idle()
    assert not cache._failed
    assert_no_pins(cache)
    done, decided = replayed_actions(cache, "lru")
    assert done == decided


def test_every_read_fails_at_once_and_the_loader_lives_on(new_cache):
    cache = new_cache(4)
    broken = fail_reads(cache, *at(0, 0, 1, 2))
    with pytest.raises(OSError, match="injected"):
        consume(cache, 0, [0, 1, 2])
    cache.wait_idle()
    assert_no_pins(cache)
    assert not cache.table.residents
    broken.clear()
    assert sorted(consume(cache, 0, [0, 1, 2])) == [0, 1, 2]


def test_a_failed_prefetch_is_logged_and_costs_nothing_but_the_try(new_cache, caplog):
    cache = new_cache(4)
    broken = fail_reads(cache, ExpertId(1, 3))
    cache.prefetch(at(1, 3, 4))
    cache.wait_idle()
    assert "prefetch of expert 3 of MoE layer 1 failed: [Errno 5] injected" in caplog.text
    assert cache.table.residents == {ExpertId(1, 4)}
    assert (cache.stats.prefetches, cache.stats.prefetches_unused) == (2, 1)
    broken.clear()
    consume(cache, 1, [3, 4])
    assert (cache.stats.layers[1].hits, cache.stats.layers[1].misses) == (1, 1)


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.looks_ahead])
def test_a_prefetch_that_fails_is_not_tried_again_before_its_layer_opens(new_cache, policy):
    """The policy named it again at once: 5000 failing reads a second, with a warning each, until the layer opened."""
    cache = new_cache(6, policy=policy, record_events=True)
    tries = []

    def fail_twice(expert: ExpertId) -> None:
        if expert == ExpertId(1, 2):
            tries.append(expert)
            if len(tries) <= 2:
                raise OSError(5, "injected")

    cache.store.before_read = fail_twice
    forecast = Forecast([[0.0] * 6, [0, 0, 0.9, 0.8, 0, 0], [0.0] * 6])
    for opened, tried in ([0], 1), ([1], 1), ([0], 2):
        cache.begin_pass(forecast)
        cache.refine(1, forecast.p_LE[1])
        cache.wait_idle()
        assert len(tries) == tried
        assert cache.table.is_ready(ExpertId(1, 3)), "the others are fetched"
        for layer in opened:
            consume(cache, layer, [3])
    consume(cache, 1, [2, 3])
    done, decided = replayed_actions(cache, policy)
    assert done == decided


def test_a_prefetch_that_fails_once_a_layer_waits_for_it_is_raised_there(new_cache):
    cache = new_cache(4)
    gate = turnstile_of(cache)
    cache.prefetch(at(0, 0))
    gate.wait_for_arrivals(1)
    passed = cache.store.before_read

    def fail_after_the_gate(expert: ExpertId) -> None:
        passed(expert)
        raise OSError("injected")

    cache.store.before_read = fail_after_the_gate
    on_wait(cache, gate.open)
    with pytest.raises(OSError, match="injected"):
        consume(cache, 0, [0])
    cache.store.before_read = passed
    assert_no_pins(cache)
    assert consume(cache, 0, [0]) == [0]


class Wrong(BaseException):
    """Stands for whatever may end a computation: an exception, Ctrl-C, GeneratorExit."""


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_layer_that_fails_releases_everything_and_starts_nothing(new_cache, after):
    cache = new_cache(3, record_events=True)

    def submitted() -> int:
        return sum(event[0] == "action" for event in cache.events)

    def compute() -> None:
        for count, _ in enumerate(cache.open_layer(0, range(6)), start=1):
            if count == after:
                raise Wrong(submitted())

    with pytest.raises(Wrong) as caught:
        compute()
    assert_no_pins(cache)
    assert submitted() == caught.value.args[0], "a load for nobody"
    cache.wait_idle()
    consume(cache, 0, range(6))
    done, decided = replayed_actions(cache, "lru")
    assert done == decided


def test_an_abandoned_iterator_opens_the_way(new_cache):
    cache = new_cache(3)
    layer = cache.open_layer(0, [0, 1, 2, 3])
    next(layer)
    layer.close()
    assert_no_pins(cache)
    untouched = cache.open_layer(0, [0])  # never asked for an item: nothing was opened
    consume(cache, 1, range(6))
    untouched.close()
    assert_no_pins(cache)


def test_ctrl_c_while_a_layer_waits(new_cache):
    cache = new_cache(3)
    gate = turnstile_of(cache)
    interrupts = iter([KeyboardInterrupt])

    def interrupt_once() -> None:
        if (interrupt := next(interrupts, None)) is not None:
            raise interrupt
        gate.open()

    on_wait(cache, interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        consume(cache, 0, [0, 1, 2, 3, 4])
    assert_no_pins(cache)
    consume(cache, 0, [0, 1, 2, 3, 4])
    assert_no_pins(cache)


def test_a_change_cut_short_ends_the_cache_instead_of_reading_unknown_slots(new_cache, monkeypatch):
    """Ctrl-C may fall between two lines that change the books. The slots then hold who knows what."""
    cache = new_cache(3)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache._loader, "submit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            consume(cache, 0, [0])
    for use in (lambda: consume(cache, 0, [0]), lambda: cache.prefetch(at(0, 1))):
        with pytest.raises(RuntimeError, match="interrupted in the middle of a change; load the model again"):
            use()
    cache.wait_idle()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_in_the_loader_thread_does_not_leave_a_layer_waiting(new_cache, monkeypatch):
    cache = new_cache(3)
    monkeypatch.setattr(cache.memory, "placement", lambda expert: 1 / 0)
    on_wait(cache, lambda: None)
    with pytest.raises(RuntimeError, match="load the model again") as caught:
        consume(cache, 0, [0])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# Several threads.


def test_a_second_thread_waits_until_the_layer_is_closed(new_cache):
    """Two threads once had layers open at a time. When one of them failed, it withdrew the demands of
    both, and the other waited for ever. Here the second asks for what the first has, and for more than
    there are slots: let in, it would get the ready experts at once and then wait for a slot."""
    cache = new_cache(3)
    poison_pending_slots(cache)
    first_thread = threading.current_thread()
    second_waits = threading.Event()
    order = []

    def second() -> None:
        for expert, _ in cache.open_layer(0, range(6)):
            order.append(("second", expert))

    with Threads() as threads:
        for count, (expert, weights) in enumerate(cache.open_layer(0, [0, 1, 2])):
            if count == 0:
                on_wait(cache, lambda: threading.current_thread() is first_thread or second_waits.set())
                threads.start(second)
                assert second_waits.wait(GUARD_S)
            assert torch.equal(weights["up"][0], cache.store.weights(ExpertId(0, expert))["up"][0])
            order.append(("first", expert))
    assert [who for who, _ in order] == ["first"] * 3 + ["second"] * 6
    assert_no_pins(cache)


def test_threads_take_turns_in_the_order_they_came(new_cache):
    cache = new_cache(3)
    arrived = threading.Semaphore(0)
    turns: list[int] = []

    def other(name: int) -> None:
        for _ in cache.open_layer(1, [name]):
            turns.append(name)

    main = threading.current_thread()
    queued: set[threading.Thread] = set()

    def tell() -> None:
        if threading.current_thread() is not main and threading.current_thread() not in queued:
            queued.add(threading.current_thread())
            arrived.release()

    with Threads() as threads:
        layer = cache.open_layer(0, [0])
        next(layer)
        on_wait(cache, tell)
        for name in range(4):
            threads.start(other, name)
            assert arrived.acquire(timeout=GUARD_S)
        assert turns == []
        layer.close()
    assert turns == [0, 1, 2, 3]


def test_opening_twice_in_one_thread_is_an_error_not_a_hang(new_cache):
    cache = new_cache(3)
    layer = cache.open_layer(0, [0, 1])
    next(layer)
    with pytest.raises(RuntimeError, match="has a layer open already"):
        next(cache.open_layer(1, [0]))
    assert [expert for expert, _ in layer] == [1], "the first layer is none the worse"
    consume(cache, 1, [0])
    assert_no_pins(cache)


def test_ctrl_c_while_waiting_in_line(new_cache):
    cache = new_cache(3)
    layer = cache.open_layer(0, [0, 1])
    next(layer)
    seen: list[type[BaseException]] = []

    def second() -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        on_wait(cache, interrupt)
        try:
            consume(cache, 0, [0])
        except KeyboardInterrupt as error:
            seen.append(type(error))

    with Threads() as threads:
        threads.start(second)
    assert seen == [KeyboardInterrupt]
    del cache._condition.wait
    assert [expert for expert, _ in layer] == [1]
    assert_no_pins(cache)


def test_many_threads_and_hints_at_once(new_cache):
    cache = new_cache(5, record_events=True)
    poison_pending_slots(cache)
    start = threading.Barrier(4)

    def run(seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        start.wait(GUARD_S)
        for step in range(15):
            cache.prefetch(at((step + 1) % 3, *torch.randint(6, (3,), generator=draw).tolist()))
            experts = torch.randperm(6, generator=draw)[: 1 + seed].tolist()
            consume(cache, step % 3, experts)

    with Threads() as threads:
        for seed in range(4):
            threads.start(run, seed)
    cache.wait_idle()
    assert_no_pins(cache)
    done, decided = replayed_actions(cache, "lru")
    assert done == decided


# Closing.


def test_close_wakes_a_layer_that_waits_and_one_that_waits_in_line(new_cache):
    cache = new_cache(3)
    gate = turnstile_of(cache)
    waiting = threading.Semaphore(0)
    on_wait(cache, waiting.release)
    closed: list[str] = []

    def use(layer: int) -> None:
        with pytest.raises(RuntimeError, match="closed; load the model again"):
            consume(cache, layer, [0, 1])
        closed.append("told")

    with Threads() as threads:
        users = [threads.start(use, layer) for layer in range(2)]
        for _ in users:
            assert waiting.acquire(timeout=GUARD_S)
        threads.start(cache.close)  # returns when the read under way has ended
        for user in users:
            user.join(GUARD_S)
        assert closed == ["told", "told"], "woken while the loader is still reading"
        gate.open()
    assert not cache._loader._thread.is_alive()
    assert_no_pins(cache)


def test_close_is_final_and_may_be_repeated(new_cache):
    cache = new_cache(3)
    consume(cache, 0, [0])
    layer = cache.open_layer(0, [0, 1])
    next(layer)
    cache.close()
    cache.close()
    for use in (lambda: next(layer), lambda: consume(cache, 0, [0]), lambda: cache.prefetch(at(0, 1))):
        with pytest.raises(RuntimeError, match="closed; load the model again"):
            use()
    cache.wait_idle()
    assert_no_pins(cache)


def test_it_can_be_closed_by_a_thread_that_holds_its_lock(new_cache):
    """The garbage collector runs the finalizer of a model in any thread, in the midst of anything."""
    cache = new_cache(3)
    gate = turnstile_of(cache)
    cache.prefetch(at(0, 0, 1))
    gate.wait_for_arrivals(1)
    known = set(cache.table.ready), set(cache.table.residents)

    def close() -> None:
        with cache._lock:
            cache.close()
            assert (set(cache.table.ready), set(cache.table.residents)) == known, (
                "the books did not change meanwhile"
            )

    with Threads() as threads:
        closer = threads.start(close)
        gate.open()
        closer.join(GUARD_S)
        assert not closer.is_alive()
    assert not cache._loader._thread.is_alive()


def test_wait_idle_ends_when_the_cache_is_closed_with_loads_queued(new_cache):
    cache = new_cache(3)
    gate = turnstile_of(cache)
    cache.prefetch(at(0, 0, 1, 2))
    gate.wait_for_arrivals(1)
    waits = threading.Event()
    on_wait(cache, waits.set)
    with Threads() as threads:
        threads.start(cache.wait_idle)
        assert waits.wait(GUARD_S)
        threads.start(cache.close)
        gate.let(1)
    assert cache.store.reads == at(0, 0)


# Bad input.


def test_unknown_names_are_refused_before_anything_changes(new_cache):
    cache = new_cache(3)
    with pytest.raises(ValueError, match=r"unknown cache policy 'lifo'; known: .*lru"):
        ExpertCache(FakeStore(SHAPE), SHAPE, 3, policy="lifo")
    with pytest.raises(ValueError, match=r"num_slots=1 .* use 2 or more"):
        ExpertCache(FakeStore(SHAPE), SHAPE, 1)
    with pytest.raises(ValueError, match="expert 6 of MoE layer 0"):
        consume(cache, 0, [0, 6])
    with pytest.raises(ValueError, match="expert 0 of MoE layer 3"):
        cache.prefetch(at(3, 0))
    with pytest.raises(ValueError, match="not distinct"):
        consume(cache, 0, [1, 1])
    assert not cache.store.reads
    assert_no_pins(cache)


# Statistics.


def layer_counts(cache: ExpertCache, layer: int) -> tuple[int, int, int]:
    counters = cache.stats.layers[layer]
    return counters.hits, counters.in_flight, counters.misses


def test_statistics_of_a_scripted_run(new_cache):
    cache = new_cache(4)
    gate = turnstile_of(cache)
    bytes_of_one = len(cache.store._files[ExpertId(0, 0)])
    chunks = cache.store.num_chunks

    gate.let(2 * chunks)
    consume(cache, 0, [0, 1])
    cache.wait_idle()
    assert layer_counts(cache, 0) == (0, 0, 2)

    cache.prefetch(at(1, 0, 1))  # both free slots; 0 begins, 1 is queued
    gate.wait_for_arrivals(2 * chunks + 1)
    on_wait(cache, lambda: gate.let_at_least(2 * chunks))
    consume(cache, 1, [0, 2])  # 0 in flight, 1 unwanted and dropped, 2 demanded into its slot
    assert layer_counts(cache, 1) == (0, 1, 1)
    assert (cache.stats.prefetches, cache.stats.cancelled, cache.stats.prefetches_unused) == (2, 1, 1)

    gate.open()
    consume(cache, 0, [0, 1])
    assert layer_counts(cache, 0) == (2, 0, 2)

    assert cache.stats.uses_LE == [[2, 2, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0] * 6]
    assert cache.stats.loads_LE == [[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0] * 6]
    assert cache.stats.misses_LE == [[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0] * 6]  # in flight is late too
    assert [layer.bytes_read for layer in cache.stats.layers] == [2 * bytes_of_one, 2 * bytes_of_one, 0]
    assert (cache.stats.hits, cache.stats.misses, cache.stats.hit_ratio) == (2, 4, 2 / 6)
    assert cache.stats.bytes_read == 4 * bytes_of_one
    report = cache.stats.to_dict()
    assert report["num_slots"] == 4
    assert report["num_experts"] == 18
    assert report["io_mode"] == "fake"
    assert report["layers"][1]["in_flight"] == 1


def test_a_report_stays_as_it_was(new_cache):
    cache = new_cache(2)
    consume(cache, 0, [1])
    report = cache.stats.to_dict()
    before = json.dumps(report)
    consume(cache, 0, [1, 0])
    assert json.dumps(report) == before
    assert json.dumps(cache.stats.to_dict()) != before


def test_a_prefetch_is_unused_when_it_goes_before_a_layer_asked_for_it(new_cache):
    cache = new_cache(2)
    cache.prefetch(at(0, 0, 1))
    cache.wait_idle()
    consume(cache, 0, [0])
    assert (cache.stats.uses_LE[0][0], cache.stats.loads_LE[0][0], cache.stats.misses_LE[0][0]) == (1, 1, 0)
    consume(cache, 1, [0, 1])  # both slots are needed: expert 0 was used, expert 1 was not
    assert (cache.stats.prefetches, cache.stats.prefetches_unused, cache.stats.cancelled) == (2, 1, 0)


def test_reset_forgets_prefetches_too(new_cache):
    """After a reset, the eviction of an older prefetch was once counted: more unused than prefetched."""
    cache = new_cache(2)
    cache.prefetch(at(0, 0, 1))
    cache.wait_idle()
    cache.reset_stats()
    consume(cache, 1, [0, 1])
    assert (cache.stats.prefetches, cache.stats.prefetches_unused) == (0, 0)
    assert cache.stats.uses_LE[0] == [0] * 6


def test_stalls_are_the_time_a_layer_waited_and_nothing_else(new_cache, monkeypatch):
    cache = new_cache(4)
    gate = turnstile_of(cache)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(expert_cache, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def wait_five_seconds() -> None:
        clock.now += 5
        gate.let_at_least(cache.store.num_chunks)

    on_wait(cache, wait_five_seconds)
    for _ in cache.open_layer(0, [0, 1]):
        clock.now += 100  # arithmetic
    first = cache.stats.layers[0]
    assert first.stall_seconds in (5, 10), "one wait for each load, or one when the second was there by then"
    assert first.open_seconds == 200 + first.stall_seconds
    for _ in cache.open_layer(0, [0, 1]):
        clock.now += 100
    assert first.open_seconds == 400 + first.stall_seconds
    assert cache.stats.stall_seconds == first.stall_seconds


def test_io_mode_is_the_one_that_reads_ended_up_with(new_cache):
    """A store learns at its first read whether the file system takes direct I/O; the stats once kept
    what it had hoped for."""
    cache = new_cache(2)
    cache.store.io_mode = "buffered (refused)"
    consume(cache, 0, [0])
    assert cache.stats.to_dict()["io_mode"] == "buffered (refused)"


# Every setting has an effect (DESIGN.md, invariant 6).


def test_policy_decides_who_goes(new_cache, monkeypatch):
    class MostRecent(LayerLRU):
        def choose_victim(self, offered, wanted):
            experts = [expert for order in self._order for expert in order if expert in offered]
            return experts[-1] if experts else None

    monkeypatch.setitem(POLICIES, "most recent", MostRecent)
    left = {}
    for policy in ("lru", "most recent"):
        cache = new_cache(2, policy=policy)
        for expert in (0, 1, 2):
            consume(cache, 0, [expert])
        left[policy] = set(cache.table.residents)
    assert left == {"lru": set(at(0, 1, 2)), "most recent": set(at(0, 0, 2))}


def test_num_slots_decides_how_many_stay(new_cache):
    for num_slots in (2, 5, 18, 1000):
        cache = new_cache(num_slots)
        for layer in range(3):
            consume(cache, layer, range(6))
        assert len(cache.table.residents) == cache.num_slots == cache.stats.num_slots == min(num_slots, 18)
        assert cache.memory._memory.numel() == cache.num_slots * cache.memory.slot_bytes


def test_record_events_records(new_cache):
    silent, recording = new_cache(3), new_cache(3, record_events=True)
    for cache in (silent, recording):
        consume(cache, 0, [1])
    assert silent.events is None
    assert [event[0] for event in recording.events] == ["open_layer", "action", "load_finished", "release"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_what_weights_are_handed_out_in(new_cache, dtype):
    cache = new_cache(3, dtype=dtype)
    poison_pending_slots(cache)
    gate_order = [(0, [0, 1, 2, 3]), (1, [5]), (0, [3, 0])]
    for layer, experts in gate_order:
        cache.prefetch(at((layer + 1) % 3, 5))
        for expert, weights in cache.open_layer(layer, experts):
            stored = cache.store.weights(ExpertId(layer, expert))
            for role in ("up", "down"):
                assert torch.equal(weights[role][0], stored[role][0].to(dtype))
    assert len(cache._loader._staging) == 2 or not cache._loader.idle
    assert cache.memory.slot_bytes % 4096 == 0
    if dtype == torch.bfloat16:
        assert cache.memory.slot_bytes < cache.store.slot_bytes


def test_the_stored_dtype_is_not_cast(new_cache):
    cache = new_cache(3, dtype=torch.float32)
    assert not cache.memory.packs
    assert cache._loader.staging_bytes == 0


def test_experts_at_odd_offsets_are_copied_to_where_they_can_be_read(new_cache):
    cache = new_cache(3, FakeStore(SHAPE, offset=13))
    assert cache.memory.packs
    aligned = FakeStore(SHAPE)
    for expert, weights in cache.open_layer(0, range(6)):
        for role in ("up", "down"):
            assert torch.equal(weights[role][0], aligned.weights(ExpertId(0, expert))[role][0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_layer_hears_of_a_loader_that_died(new_cache, monkeypatch):
    """A fault outside of the reads once ended the thread in silence, and the layer waited for ever."""

    class Unreadable(tuple):
        def __getitem__(self, index):
            raise KeyError("a bug")

    cache = new_cache(3)
    monkeypatch.setattr(cache.store, "chunks", lambda expert: Unreadable([None]))
    with pytest.raises(RuntimeError, match="loader thread died"):
        consume(cache, 0, [0])


def test_a_timeline_hears_of_every_wait_and_of_every_read(new_cache):
    cache = new_cache(3)
    consume(cache, 0, [0])  # before anybody listens
    cache.reset_stats()
    cache.timeline = timeline = Timeline()
    consume(cache, 0, [1, 2])
    consume(cache, 1, [3])
    cache.prefetch(at(2, 5))
    cache.wait_idle()
    reads = [span for span in timeline.spans if span.track == "link"]
    assert {(span.name, span.detail["urgent"]) for span in reads} == {
        ("1 of layer 0", True), ("2 of layer 0", True), ("3 of layer 1", True), ("5 of layer 2", False),
    }  # fmt: skip
    assert len(reads) == 4 * cache.store.num_chunks
    assert sum(span.end - span.begin for span in reads) == pytest.approx(cache.stats.read_seconds)
    waits = [span for span in timeline.spans if span.track == "stall"]
    assert sum(span.end - span.begin for span in waits) == pytest.approx(cache.stats.stall_seconds)
    cache.timeline = None
    consume(cache, 2, [1])
    assert len([span for span in timeline.spans if span.track == "link"]) == len(reads)
