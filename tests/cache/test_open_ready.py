"""The short way through a layer that finds all it needs: same books as the long way, only later."""

from __future__ import annotations

import threading

import pytest
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
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.cache import expert_cache
from expertflow.cache.expert_cache import ExpertCache
from expertflow.cache.policies import Forecast
from expertflow.core import ExpertId, MoEShape

SHAPE = MoEShape((6, 6, 6))


def use(cache: ExpertCache, layer: int, experts: list[int]) -> bool:
    """Through the short way if it is open; whether it was."""
    try:
        ready = cache.open_ready(layer, experts)
        for expert, weights in zip(experts, ready or [], strict=bool(ready)):
            for role, parts in cache.store.weights(ExpertId(layer, expert)).items():
                assert all(map(lambda a, b: a.equal(b), parts, weights[role]))
        return ready is not None
    finally:
        cache.close_ready()


def test_it_gives_what_open_layer_gives_in_the_order_asked_for(new_cache):
    cache = new_cache()
    consume(cache, 0, [1, 2, 3])
    assert use(cache, 0, [3, 1])
    assert (cache.stats.layers[0].hits, cache.stats.layers[0].misses) == (2, 3)
    assert cache.stats.uses_LE[0] == [0, 2, 1, 2, 0, 0]
    assert_no_pins(cache)


def test_none_when_one_is_missing_and_nothing_is_counted(new_cache):
    cache = new_cache()
    consume(cache, 0, [1])
    assert not use(cache, 0, [1, 2])
    assert not use(cache, 1, [1]), "of another layer"
    assert (cache.stats.layers[0].hits, cache.stats.layers[0].misses, cache.stats.layers[1].hits) == (0, 1, 0)
    assert consume(cache, 0, [1, 2]) == [1, 2]


def test_none_while_a_prefetch_is_under_way_or_after_close(new_cache):
    """Its layer may have to cancel it, which is more than counting."""
    cache = new_cache()
    consume(cache, 0, [1])
    gate = Turnstile(cache.store)
    cache.prefetch([ExpertId(1, 0)])
    assert not use(cache, 0, [1])
    gate.open()
    cache.wait_idle()
    assert use(cache, 0, [1])
    cache.close()
    assert not use(cache, 0, [1])
    with pytest.raises(RuntimeError, match="closed"):
        list(cache.open_layer(0, [1]))


def test_a_layer_that_finds_everything_lets_a_policy_fetch_for_the_next(new_cache):
    """The short way would count the layer later; a policy that looks ahead must hear of it now, while it computes."""
    cache = new_cache(4, policy="plec")
    consume(cache, 0, [0, 1])
    cache.begin_pass(Forecast([[0.0] * 6, [0.0] * 6, [0.0] * 5 + [1.0]], [[9.0] * 6] * 3))
    cache.wait_idle()
    assert not use(cache, 0, [0, 1])
    consume(cache, 1, [0])
    opened = cache.open_layer(0, [0, 1])  # a new pass that nobody has announced: the forecast lapses
    next(opened)
    cache.refine(1, [0.0] * 5 + [1.0])  # as look-ahead does, with the layer open
    cache.wait_idle()
    assert cache.table.is_ready(ExpertId(1, 5))
    assert cache.table.is_ready(ExpertId(0, 0))
    assert cache.table.is_ready(ExpertId(0, 1))
    opened.close()
    assert consume(cache, 1, [5]) == [5]
    assert cache.stats.prefetches == 2
    assert cache.stats.prefetches_useful == 1
    assert cache.stats.layers[1].hits == 1


def test_a_policy_that_was_told_nothing_of_this_pass_takes_the_short_way(new_cache):
    cache = new_cache(4, policy="plec")
    consume(cache, 0, [0, 1])
    assert use(cache, 0, [0, 1]), "nobody predicts at all"
    cache.begin_pass(Forecast([[1.0] * 2 + [0.0] * 4] * 3))
    assert not use(cache, 0, [0, 1])
    cache.begin_pass(None)  # as while the gate is off
    cache.wait_idle()
    assert use(cache, 0, [0, 1])
    cache.refine(1, [0.0] * 6)
    assert not use(cache, 0, [0, 1])


def test_use_is_remembered_when_a_victim_is_chosen(new_cache):
    """Expert 0 came first, but the short way used it last: 1 must go."""
    cache = new_cache(2)
    consume(cache, 0, [0])
    consume(cache, 0, [1])
    assert use(cache, 0, [0])
    consume(cache, 0, [2])
    assert cache.table.residents == {ExpertId(0, 0), ExpertId(0, 2)}


def test_what_is_open_is_not_evicted(new_cache):
    """A prefetch arrives while the layer computes; both slots are in use, so it must wait for one."""
    cache = new_cache(2, record_events=True)
    poison_pending_slots(cache)
    consume(cache, 0, [0, 1])
    ready = cache.open_ready(0, [0, 1])
    before = [weights["up"][0].clone() for weights in ready]
    cache.prefetch([ExpertId(1, 0)])
    assert cache.table.is_pinned(ExpertId(0, 0))
    assert cache.table.is_pinned(ExpertId(0, 1))
    cache.wait_idle()
    assert all(weights["up"][0].equal(bytes_) for weights, bytes_ in zip(ready, before, strict=True))
    cache.close_ready()
    cache.wait_idle()
    assert cache.table.is_ready(ExpertId(1, 0)), "the slot that came free was not used"
    assert_no_pins(cache)
    done, decided = replayed_actions(cache, "lru")
    assert done == decided


def test_other_threads_wait_until_it_is_closed(new_cache):
    cache = new_cache()
    consume(cache, 0, [0])
    consume(cache, 1, [0])  # so that the other thread waits for its turn and for nothing else
    assert cache.open_ready(0, [0]) is not None
    order = []
    # Called with the lock held when the other thread goes to sleep: this one may only close afterwards.
    on_wait(cache, lambda: order.append("waits"))
    with Threads() as threads:

        def other() -> None:
            assert not use(cache, 0, [0]), "two layers open at once; closing must not end the other's"
            consume(cache, 1, [0])
            order.append("through")

        thread = threads.start(other)
        while not order and thread.is_alive():
            thread.join(0.001)
        assert order == ["waits"]
        cache.close_ready()
    assert order[-1] == "through"


def test_the_books_do_not_lag_for_ever(new_cache, monkeypatch):
    monkeypatch.setattr(expert_cache, "_MOST_DEFERRED", 3)
    cache = new_cache()
    consume(cache, 0, [0])
    for _ in range(10):
        assert use(cache, 0, [0])
        assert len(cache._deferred) <= 3
    assert cache.stats.layers[0].hits == 10
    cache.reset_stats()
    assert use(cache, 0, [0])
    cache.reset_stats()
    assert cache.stats.layers[0].hits == 0, "counted after the reset what came before it"


def test_the_time_that_a_layer_is_open_counts(new_cache, monkeypatch):
    cache = new_cache()
    consume(cache, 1, [0])
    before = cache.stats.layers[1].open_seconds
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(expert_cache.time, "perf_counter", lambda: next(clock))
    assert use(cache, 1, [0])
    monkeypatch.undo()
    assert cache.stats.layers[1].open_seconds == pytest.approx(before + 2.5)


@pytest.mark.parametrize(
    "ask",
    [
        lambda cache: cache.stats,
        lambda cache: cache.events,
        lambda cache: cache.reset_stats(),
        lambda cache: cache.open_ready(0, [0]),
        lambda cache: cache.prefetch([ExpertId(1, 1)]),
    ],
    ids=["stats", "events", "reset_stats", "open_ready", "prefetch"],
)
def test_books_that_were_cut_short_are_used_no_more(new_cache, monkeypatch, ask):
    """Ctrl-C between two lines of catching up: pins may be left, and a later layer would wait for ever."""
    monkeypatch.setattr(expert_cache, "_MOST_DEFERRED", 1)
    cache = new_cache()
    consume(cache, 0, [0])
    assert use(cache, 0, [0])

    def interrupted(expert: ExpertId) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_release", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(cache)
    with pytest.raises(RuntimeError, match="interrupted in the middle of a change"):
        next(cache.open_layer(1, [2]))


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2), st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), st.booleans()
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=60)
@given(STEPS, st.integers(3, 9), st.sampled_from(["lru", "lfu", "plec"]))
def test_any_mixture_of_both_ways_leaves_the_books_of_the_long_one(steps, num_slots, policy):
    # Without overlap the order of events does not depend on when bytes arrive.
    options = {"overlap": False, "record_events": True, "policy": policy}
    caches = [ExpertCache(FakeStore(SHAPE), SHAPE, num_slots, **options) for _ in range(2)]
    long_way, mixed = caches
    try:
        for layer, experts, hint in steps:
            consume(long_way, layer, experts)
            if not use(mixed, layer, experts):
                consume(mixed, layer, experts)
            if hint:
                for cache in caches:
                    cache.prefetch([ExpertId((layer + 1) % 3, experts[0])])
                    cache.wait_idle()
        # open_layer ends by withdrawing demands that are none.
        mixed_events, long_events = (
            [e for e in cache.events if e[0] != "withdraw"] for cache in caches[::-1]
        )
        assert mixed_events == long_events
        assert mixed.stats.uses_LE == long_way.stats.uses_LE
        assert mixed.stats.hits == long_way.stats.hits
        assert mixed.table.residents == long_way.table.residents
    finally:
        for cache in caches:
            cache.close()


def test_a_layer_whose_closing_was_interrupted_is_closed_by_the_threads_next(new_cache):
    """Ctrl-C at the very entry of close_ready, before its lock."""
    cache = new_cache()
    consume(cache, 0, [1, 2, 3])
    assert cache.open_ready(0, [1, 2])
    with Threads() as threads:
        queued = threading.Event()
        on_wait(cache, queued.set)
        threads.start(consume, cache, 0, [3])
        assert queued.wait(GUARD_S)
        consume(cache, 0, [1])
    cache.close_ready()  # harmless
    assert cache.open_ready(0, [2])
    assert cache.open_ready(0, [3]) is None
    assert use(cache, 0, [3]) is False
    consume(cache, 1, [4])
    assert_no_pins(cache)
    assert cache.stats.uses_LE[0] == [0, 3, 3, 2, 0, 0]
