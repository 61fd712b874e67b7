"""The invariants of DESIGN.md, section 2, as far as the cache alone can keep or break them.

Every run here is poisoned: a slot is NaN from the moment a load into it is decided until its bytes are
whole, and what a layer holds is compared before and after other loads go on. The loader reads when a
seeded adversary lets it, so the order of arrivals is the adversary's, not the machine's.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fakes import (
    GUARD_S,
    HIDDEN,
    FakeStore,
    Threads,
    Turnstile,
    assert_no_pins,
    experts_of,
    on_wait,
    poison_pending_slots,
    replayed_actions,
)
from safetensors.torch import save_file
from torch import Tensor

from expertflow.cache.expert_cache import ExpertCache, Weights
from expertflow.cache.policies import POLICIES, Forecast
from expertflow.core import ExpertId, MoEShape
from expertflow.models.experts import Attachment, run_experts
from expertflow.store.checkpoint import open_checkpoint
from expertflow.store.disk import DiskStore
from expertflow.store.layout import Part
from expertflow.store.ram import RamStore
from expertflow.store.throttled import ThrottledStore

SHAPE = MoEShape((6, 6, 6))
PASSES, TOKENS, TOP_K = 3, 7, 2


@dataclass
class Routes:
    """Where tokens go in each pass and layer; fixed in advance, as under schedule=fixed."""

    index_TK: list[Tensor]
    weight_TK: list[Tensor]
    hidden_TD: Tensor

    @classmethod
    def random(cls, seed: int) -> Routes:
        draw = torch.Generator().manual_seed(seed)
        steps = range(PASSES * SHAPE.num_layers)
        tokens = 1 if seed % 3 == 0 else TOKENS
        chosen = [
            torch.stack([torch.randperm(7, generator=draw)[:TOP_K] for _ in range(tokens)]) for _ in steps
        ]  # expert 6 is "nowhere": a token dropped over capacity
        weights = [torch.rand(tokens, TOP_K, generator=draw) for _ in steps]
        return cls(chosen, weights, torch.randn(tokens, HIDDEN, generator=draw))

    def needed(self, step: int) -> list[ExpertId]:
        experts = sorted(set(self.index_TK[step].flatten().tolist()) - {6})
        return [ExpertId(step % SHAPE.num_layers, expert) for expert in experts]


def multiply(rows_ND: Tensor, weights: Weights) -> Tensor:
    return F.linear(F.relu(F.linear(rows_ND, weights["up"][0])), weights["down"][0])


class Predictions:
    """Hints before each layer, of a kind drawn by seed: right, wrong, everything, nothing, nonsense order."""

    KINDS = ("nothing", "everything", "noise", "right", "wrong", "late", "mixed")

    def __init__(self, kind: str, routes: Routes, seed: int):
        self.kind, self.routes, self.draw = kind, routes, random.Random(seed)

    def hints(self, step: int) -> list[ExpertId]:
        everyone = list(experts_of(SHAPE))
        kind = self.draw.choice(self.KINDS[:-1]) if self.kind == "mixed" else self.kind
        next_layer = (step + 1) % SHAPE.num_layers
        soon = self.routes.needed(min(step + 1, len(self.routes.index_TK) - 1))
        if kind == "right":
            return [*self.routes.needed(step), *soon]
        if kind == "wrong":
            return [e for e in everyone if e.layer == next_layer and e not in soon]
        if kind == "late":
            return self.routes.needed(step - 1) if step else []
        if kind == "noise":
            return self.draw.choices(everyone, k=self.draw.randrange(10))
        return everyone if kind == "everything" else []


class Forecasts:
    """What a predictor says before each pass, and of each next layer while it runs; of a kind, or mixed."""

    KINDS = ("nothing", "everything", "noise", "right", "nan", "infinite", "mixed")

    def __init__(self, kind: str, routes: Routes, seed: int):
        self.kind, self.routes, self.draw = kind, routes, random.Random(seed)

    def tell(self, cache: ExpertCache, step: int) -> None:
        layer = step % SHAPE.num_layers
        kind = self.draw.choice(self.KINDS[:-1]) if self.kind == "mixed" else self.kind
        if layer == 0:
            if self.draw.random() < 0.2:
                return cache.begin_pass(None)
            p_LE = [self.p_E(kind, step + after) for after in range(SHAPE.num_layers)]
            later_LE = [[20 * self.number(kind) for _ in range(6)] for _ in range(SHAPE.num_layers)]
            return cache.begin_pass(Forecast(p_LE, self.draw.choice([None, later_LE])))
        after = step - layer + SHAPE.num_layers  # where the next pass begins, unless this is the last
        is_last = after + SHAPE.num_layers > len(self.routes.index_TK)
        if not is_last and (layer == 2 or self.draw.random() < 0.3):
            cache.expect_next([self.p_E(kind, after + number) for number in range(SHAPE.num_layers)])
        return cache.refine(layer, self.p_E(kind, step))

    def number(self, kind: str) -> float:
        odd = {"nan": float("nan"), "infinite": self.draw.choice([float("inf"), -float("inf"), -3.0])}
        return odd.get(kind, 0.0) if self.draw.random() < 0.7 else self.draw.random()

    def p_E(self, kind: str, step: int) -> list[float]:
        if kind == "right":
            needed = {expert.expert for expert in self.routes.needed(step)}
            return [float(expert in needed) for expert in range(6)]
        same = {"nothing": 0.0, "everything": 1.0}
        if kind in same:
            return [same[kind]] * 6
        return [self.number(kind) if kind != "noise" else self.draw.random() for _ in range(6)]


class Adversary:
    """Lets the loader read one chunk here, ten there, and while an expert is being multiplied."""

    def __init__(self, cache: ExpertCache, seed: int):
        self.cache, self.draw = cache, random.Random(seed)
        self.gate = Turnstile(cache.store)
        self.whole_load = 1 + cache.store.num_chunks
        on_wait(cache, lambda: self.gate.let_at_least(self.whole_load + self.draw.randrange(4)))

    def multiply(self, rows_ND: Tensor, weights: Weights) -> Tensor:
        before = {role: parts[0].clone() for role, parts in weights.items()}
        first = multiply(rows_ND, weights)
        for _ in range(self.draw.choice((0, 0, 1, 4))):
            self.let_one_chunk_pass()
        for role, parts in weights.items():
            assert torch.equal(parts[0], before[role]), "an expert changed while it was in use"
        again = multiply(rows_ND, weights)
        assert torch.equal(first, again)
        assert not again.isnan().any(), "an expert was handed out before its bytes were whole"
        return again

    def let_one_chunk_pass(self) -> None:
        loader = self.cache._loader
        with self.cache._condition:
            passed = self.gate.passed
            jobs = [*loader._urgent.values(), *loader._prefetch.values()]
            if all(job.next_chunk == len(job.chunks) for job in jobs):
                return  # nothing is left to ask for, so nobody would come
        self.gate.let(1)
        self.gate.wait_for_passes(passed + 1)


def run(
    cache: ExpertCache,
    routes: Routes,
    multiply_one=multiply,
    predictions: Predictions | None = None,
    forecasts: Forecasts | None = None,
) -> Tensor:
    hidden_TD = routes.hidden_TD
    outputs = []
    for step, (index_TK, weight_TK) in enumerate(zip(routes.index_TK, routes.weight_TK, strict=True)):
        layer = step % SHAPE.num_layers
        if predictions is not None:
            cache.prefetch(predictions.hints(step))
        if forecasts is not None:
            forecasts.tell(cache, step)
        attachment = Attachment(cache, layer, SHAPE.experts_per_layer[layer])
        hidden_TD = F.layer_norm(
            hidden_TD + run_experts(attachment, hidden_TD, index_TK, weight_TK, multiply_one), (HIDDEN,)
        )
        outputs.append(hidden_TD)
    return torch.stack(outputs)


def all_resident(store, routes: Routes, dtype: torch.dtype | None = None) -> Tensor:
    """The reference: every expert in its slot before the first layer opens."""
    cache = ExpertCache(store, SHAPE, SHAPE.num_experts, dtype=dtype)
    try:
        cache.prefetch(experts_of(SHAPE))
        cache.wait_idle()
        output = run(cache, routes)
        assert cache.stats.misses == 0
        assert not output.isnan().any()
        return output
    finally:
        cache.close()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(24))
def test_the_cache_is_invisible(seed, policy):
    """Budget, overlap, arrival order and predictions, drawn at random, change no bit; nor does the plan
    decide anything that a replay of the record would not decide again. (Invariants 1, 2, 3, 7.)"""
    draw = random.Random(seed)
    routes = Routes.random(seed)
    dtype = draw.choice((None, None, torch.float64))
    if dtype is not None:
        routes.hidden_TD = routes.hidden_TD.to(dtype)
    expected = all_resident(FakeStore(SHAPE), routes, dtype)

    num_slots = draw.choice((2, 2, 3, 4, 5, 8, 12, 17))
    cache = ExpertCache(
        FakeStore(SHAPE),
        SHAPE,
        num_slots,
        policy=policy,
        overlap=seed % 2 == 0,
        dtype=dtype,
        record_events=True,
    )
    poison_pending_slots(cache)
    adversary = Adversary(cache, seed)
    predictions = Predictions(Predictions.KINDS[seed % len(Predictions.KINDS)], routes, seed)
    try:
        output = run(cache, routes, adversary.multiply, predictions)
        assert torch.equal(output, expected)
        assert_no_pins(cache)
        adversary.gate.open()
        cache.wait_idle()
        done, decided = replayed_actions(cache, policy)
        assert done == decided
        assert cache.table.residents == cache._weights.keys()
    finally:
        adversary.gate.open()
        cache.close()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(14))
def test_forecasts_are_invisible(seed, policy):
    """As above, with forecasts of passes and layers in place of hints, or beside them. (Invariants 1, 2, 3, 7.)"""
    draw = random.Random(seed)
    routes = Routes.random(seed)
    expected = all_resident(FakeStore(SHAPE), routes)
    cache = ExpertCache(
        FakeStore(SHAPE),
        SHAPE,
        draw.choice((2, 3, 4, 6, 9, 14)),
        policy=policy,
        overlap=seed % 4 != 0,
        record_events=True,
    )
    poison_pending_slots(cache)
    adversary = Adversary(cache, seed)
    forecasts = Forecasts(Forecasts.KINDS[seed % len(Forecasts.KINDS)], routes, seed)
    hints = Predictions("mixed", routes, seed) if seed % 5 == 0 else None
    try:
        output = run(cache, routes, adversary.multiply, hints, forecasts)
        assert torch.equal(output, expected)
        assert_no_pins(cache)
        adversary.gate.open()
        cache.wait_idle()  # with nan in it a policy once fetched two experts for ever, one in place of the other
        done, decided = replayed_actions(cache, policy)
        assert done == decided
        assert cache.table.residents == cache._weights.keys()
    finally:
        adversary.gate.open()
        cache.close()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(6))
def test_a_run_over_a_throttled_link_replays_exactly(seed, policy):
    """Forecasts and refinements as above, and a link that holds each chunk back for as long as a layer takes: its
    thread decides beside the layers', when its bytes have crossed. What was recorded is what the plan decides."""
    routes = Routes.random(seed)
    expected = all_resident(FakeStore(SHAPE), routes)
    fake = FakeStore(SHAPE)
    seconds = [0.0]
    permits = threading.Semaphore(0)

    def sleep(left: float) -> None:
        assert permits.acquire(timeout=GUARD_S), "nobody lets the link go on"
        seconds[0] += left

    store = ThrottledStore(fake, 1e6, clock=lambda: seconds[0], sleep=sleep)
    cache = ExpertCache(store, SHAPE, (3, 6, 12)[seed % 3], policy=policy, record_events=True)
    poison_pending_slots(cache)
    on_wait(cache, lambda: permits.release(1 + fake.num_chunks))

    def multiply_while_bytes_cross(rows_ND: Tensor, weights: Weights) -> Tensor:
        permits.release()
        return multiply(rows_ND, weights)

    try:
        kind = Forecasts.KINDS[seed % len(Forecasts.KINDS)] if seed < 4 else "right"
        output = run(cache, routes, multiply_while_bytes_cross, None, Forecasts(kind, routes, seed))
        assert torch.equal(output, expected)
        permits.release(10_000)
        cache.wait_idle()
        assert seconds[0] == pytest.approx(cache.stats.bytes_read / 1e6), (
            "the link was never idle on this clock"
        )
        events = cache.events
        assert events is not None
        told = {"begin_pass", "refine", "expect_next", "open_layer", "load_finished"}
        assert told <= {kind for kind, *_ in events}
        done, decided = replayed_actions(cache, policy)
        assert done == decided
    finally:
        permits.release(10_000)
        cache.close()


@pytest.mark.parametrize("policy", ["plec", "plec-paper"])
def test_forecasts_do_move_experts(policy):
    """The test above would prove nothing if forecasts were ignored."""
    routes = Routes.random(1)
    misses = {}
    for kind in ("nothing", "right"):
        cache = ExpertCache(FakeStore(SHAPE), SHAPE, 12, policy=policy)
        forecasts = Forecasts(kind, routes, 3)
        for step in range(len(routes.index_TK)):
            forecasts.tell(cache, step)
            cache.wait_idle()
            for _ in cache.open_layer(step % 3, [expert.expert for expert in routes.needed(step)]):
                pass
        misses[kind] = cache.stats.misses
        assert (cache.stats.prefetches > 0) == (kind == "right")
        cache.close()
    assert misses["right"] < misses["nothing"]


@pytest.mark.parametrize(
    ("forecast", "message"),
    [
        (Forecast([[0.5] * 6] * 2), "2 layers, and the model has 3"),
        (Forecast([[0.5] * 6, [0.5] * 5, [0.5] * 6]), "5 experts for a layer of 6"),
        (Forecast([[0.5] * 6] * 3, [[2.0] * 7] * 3), "7 experts for a layer of 6"),
    ],
)
def test_a_forecast_of_another_shape_is_refused_and_breaks_nothing(forecast, message):
    cache = ExpertCache(FakeStore(SHAPE), SHAPE, 4, policy="plec")
    try:
        with pytest.raises(ValueError, match=message):
            cache.begin_pass(forecast)
        with pytest.raises(ValueError, match=message.replace("7 experts", "2 layers|7 experts")):
            cache.expect_next(forecast.later_LE or forecast.p_LE)
        for layer, p_E in ((3, [0.5] * 6), (0, [0.5])):
            with pytest.raises(ValueError, match="layer"):
                cache.refine(layer, p_E)
        assert [expert for expert, _ in cache.open_layer(0, [1, 2])] == [1, 2]
    finally:
        cache.close()


def test_predictions_do_move_experts():
    """The test above would prove nothing if hints were ignored."""
    routes = Routes.random(1)
    misses = {}
    for kind in ("nothing", "right", "wrong"):
        cache = ExpertCache(FakeStore(SHAPE), SHAPE, 12)
        predictions = Predictions(kind, routes, 0)
        for step in range(len(routes.index_TK)):
            cache.prefetch(predictions.hints(step))
            cache.wait_idle()
            for _ in cache.open_layer(step % 3, [expert.expert for expert in routes.needed(step)]):
                pass
        misses[kind] = cache.stats.misses
        assert (cache.stats.prefetches > 0) == (kind != "nothing")
        cache.close()
    assert misses["right"] < misses["nothing"] <= misses["wrong"]


def test_poison_is_noticed():
    """A loader that reports before its bytes are there must fail here. Without this test, a poison that
    the cache overwrites by chance (or that is no NaN) would let invariant 3 pass for nothing."""
    cache = ExpertCache(FakeStore(SHAPE), SHAPE, 3)
    poison_pending_slots(cache)
    cache.store.read_chunk = lambda chunk, buffer: chunk.nbytes  # type: ignore[method-assign]
    rows = torch.ones(1, HIDDEN)
    try:
        for _, weights in cache.open_layer(0, [0, 1]):
            assert multiply(rows, weights).isnan().all()
    finally:
        cache.close()


@pytest.mark.parametrize("num_slots", [3, 6])
def test_threads_that_share_a_cache_get_what_each_would_get_alone(num_slots):
    routes = [Routes.random(seed) for seed in (1, 2, 4)]
    expected = [all_resident(FakeStore(SHAPE), one) for one in routes]
    cache = ExpertCache(FakeStore(SHAPE), SHAPE, num_slots, record_events=True)
    poison_pending_slots(cache)
    outputs: dict[int, Tensor] = {}

    def run_one(number: int) -> None:
        predictions = Predictions("mixed", routes[number], number)
        outputs[number] = run(cache, routes[number], predictions=predictions)

    try:
        with Threads() as threads:
            for number in range(len(routes)):
                threads.start(run_one, number)
        for number, output in outputs.items():
            assert torch.equal(output, expected[number])
        assert len(outputs) == len(routes)
        assert_no_pins(cache)
        cache.wait_idle()
        done, decided = replayed_actions(cache, "lru")
        assert done == decided
    finally:
        cache.close()


# The real stores.


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    fake = FakeStore(SHAPE)
    weights = {
        f"layers.{expert.layer}.experts.{expert.expert}.{role}": parts[0].clone()
        for expert in experts_of(SHAPE)
        for role, parts in fake.weights(expert).items()
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def open_store(folder: Path, kind: str) -> DiskStore | RamStore:
    checkpoint = open_checkpoint(folder)

    def part(expert: ExpertId, role: str) -> Part:
        span = checkpoint.spans[f"layers.{expert.layer}.experts.{expert.expert}.{role}"]
        return Part(role, span.path, span.offset, span.nbytes, span.dtype, span.shape)

    parts: dict[ExpertId, Sequence[Part]] = {e: (part(e, "up"), part(e, "down")) for e in experts_of(SHAPE)}
    disk = DiskStore(checkpoint, parts, direct=False if kind == "buffered" else None, chunk_bytes=4096)
    return RamStore(disk) if kind == "ram" else disk


def fingerprint(folder: Path) -> list[tuple]:
    return [
        (
            path.name,
            path.stat().st_mtime_ns,
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
    ]


@pytest.mark.parametrize("kind", ["disk", "buffered", "ram"])
def test_no_store_shows_in_the_output_and_none_writes(checkpoint_folder, kind):
    """Invariants 1 and 5."""
    before = fingerprint(checkpoint_folder)
    routes = Routes.random(5)
    with open_store(checkpoint_folder, "ram") as reference, open_store(checkpoint_folder, kind) as store:
        expected = all_resident(reference, routes)
        for num_slots, overlap in [(2, True), (5, False), (9, True)]:
            cache = ExpertCache(store, SHAPE, num_slots, overlap=overlap)
            poison_pending_slots(cache)
            try:
                output = run(cache, routes, predictions=Predictions("mixed", routes, num_slots))
                assert torch.equal(output, expected)
                assert cache.stats.bytes_read > 0
            finally:
                cache.close()
    assert fingerprint(checkpoint_folder) == before


def test_fake_and_real_stores_hold_the_same_weights(checkpoint_folder):
    fake = FakeStore(SHAPE)
    with open_store(checkpoint_folder, "disk") as store:
        cache = ExpertCache(store, SHAPE, 4)
        for layer in range(SHAPE.num_layers):
            for expert, weights in cache.open_layer(layer, range(6)):
                for role, parts in fake.weights(ExpertId(layer, expert)).items():
                    assert torch.equal(torch.cat(weights[role]), parts[0])
        cache.close()
