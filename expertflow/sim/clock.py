"""The virtual clock: one link, one unit that computes, and the engine's own plan between them.

What ExpertCache and Loader do with threads happens here in order of time: ready experts are computed first, a
demand goes before every prefetch and waits for the chunk in flight at most, queued prefetches that nobody wants
are dropped. Nothing is decided here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil

from expertflow.cache.plan import Action, CachePlan, Cancel, Load, Promote
from expertflow.cache.policies import Forecast, Policy
from expertflow.cache.policies.belady import Belady
from expertflow.cache.slots import SlotTable
from expertflow.core import ExpertId
from expertflow.sim.hardware import Costs


@dataclass(frozen=True, slots=True)
class Pass:
    """One decode step of a batch: which experts each layer's router chose, and what was expected before.

    ahead_L: what look-ahead said of each layer while the one before it ran, None where nothing; empty: nothing at all.
    next_LE: what was expected of the pass after this one when this one began; None: nothing.
    first_layer: those before it do not run, as an encoder's while its decoder decodes.
    """

    experts_L: Sequence[Sequence[int]]
    forecast: Forecast | None
    ahead_L: Sequence[Sequence[float] | None] = ()
    next_LE: Sequence[Sequence[float]] | None = None
    first_layer: int = 0

    @property
    def visits(self) -> Iterator[tuple[int, Sequence[int]]]:
        """The layers that run, and their experts."""
        return islice(enumerate(self.experts_L), self.first_layer, None)


@dataclass
class Outcome:
    """Seconds are of the virtual clock. seconds = compute_seconds + stall_seconds."""

    passes: int = 0
    uses: int = 0  # an expert that a layer needs, once per pass
    hits: int = 0  # there when its layer opened, as the paper counts
    in_flight: int = 0  # on its way then
    chunks: int = 0  # that crossed the link
    loads: float = 0.0  # the same in experts
    seconds: float = 0.0
    compute_seconds: float = 0.0
    stall_seconds: float = 0.0
    link_seconds: float = 0.0
    waits: int = 0  # times that arithmetic stood still

    @property
    def hit_ratio(self) -> float:
        return self.hits / self.uses if self.uses else 0.0


class Link:
    """Carries one chunk at a time, urgent loads first; each kind in the order given (as loader.py does)."""

    def __init__(self, costs: Costs, finished: Callable[[ExpertId, float], None]):
        self._chunk_s, self._chunks, self._call_s = costs.chunk_s, costs.chunks, costs.call_s
        self._finished = finished
        self._urgent: dict[ExpertId, int] = {}  # chunks to go
        self._prefetch: dict[ExpertId, int] = {}
        self._carrying: ExpertId | None = None
        self._since = 0.0
        self._carrying_chunks = 0
        self.chunks_carried = 0

    @property
    def next_end(self) -> float | None:
        """When what is carried now will have arrived and be entered; None when idle."""
        if self._carrying is None:
            return None
        to_go = self._urgent.get(self._carrying) or self._prefetch[self._carrying]
        whole = to_go == self._carrying_chunks
        return self._since + self._carrying_chunks * self._chunk_s + (self._call_s if whole else 0.0)

    def submit(self, expert: ExpertId, urgent: bool, now: float) -> None:
        if urgent:
            self._urgent[expert] = self._chunks
            self._interrupt_prefetch(now)
        else:
            self._prefetch[expert] = self._chunks

    def promote(self, expert: ExpertId, now: float) -> None:
        to_go = self._prefetch.pop(expert, None)
        if to_go is not None:
            self._urgent[expert] = to_go
            if expert != self._carrying:
                self._interrupt_prefetch(now)

    def cancel(self, expert: ExpertId) -> bool:
        """Drop a prefetch of which no byte was asked for yet; True when dropped."""
        if expert == self._carrying or self._prefetch.get(expert) != self._chunks:
            return False
        del self._prefetch[expert]
        return True

    def start(self, now: float) -> None:
        """Take up the next load, if idle."""
        if self._carrying is None and (queue := self._urgent or self._prefetch):
            self._carrying, self._carrying_chunks = next(iter(queue.items()))
            self._since = now

    def run_until(self, time: float) -> None:
        """Let everything arrive that does so by then."""
        while (end := self.next_end) is not None and end <= time:
            self.arrive(end)

    def arrive(self, end: float) -> None:
        expert = self._carrying
        assert expert is not None
        queue = self._urgent if expert in self._urgent else self._prefetch
        self.chunks_carried += self._carrying_chunks
        queue[expert] -= self._carrying_chunks
        self._carrying = None
        if queue[expert] == 0:
            del queue[expert]
            self._finished(expert, end)
        self.start(end)

    def _interrupt_prefetch(self, now: float) -> None:
        """A demand has come: what is carried now ends with the chunk in flight."""
        if self._carrying is not None and self._carrying in self._prefetch:
            # A chunk that ends this very moment is the last; rounding must not make it one more.
            begun = max(1, ceil((now - self._since) / self._chunk_s - 1e-9))
            self._carrying_chunks = min(self._carrying_chunks, begun)


class Simulation:
    """Runs passes through a policy; `outcome` grows. events: the plan's inputs and actions, as ExpertCache records
    them, when asked for."""

    def __init__(self, policy: Policy, costs: Costs, record_events: bool = False):
        self.policy, self.costs = policy, costs
        self.table = SlotTable(policy.num_slots)
        self.plan = CachePlan(self.table, policy)
        self.link = Link(costs, self._load_finished)
        self.outcome = Outcome()
        self.events: list[tuple] | None = [] if record_events else None
        self._now = 0.0
        self._counted_from = 0.0
        self._carried_before = 0
        self._pending: set[ExpertId] = set()  # of the open layer, not computed yet
        self._ready: deque[ExpertId] = deque()  # those of them that are there

    def run(self, passes: Sequence[Pass], settle: int = 0) -> Outcome:
        """What came of the passes after the first `settle`, which run but do not count."""
        if isinstance(self.policy, Belady):
            self.policy.foresee([visit for step in passes for visit in step.visits])
        for number, step in enumerate(passes):
            if number == settle:
                self.outcome = Outcome()
                self._counted_from, self._carried_before = self._now, self.link.chunks_carried
            self._run_pass(step)
        outcome = self.outcome
        outcome.seconds = self._now - self._counted_from
        outcome.chunks = self.link.chunks_carried - self._carried_before
        outcome.loads = outcome.chunks / self.costs.chunks
        outcome.link_seconds = outcome.chunks * self.costs.chunk_s
        return outcome

    def _run_pass(self, step: Pass) -> None:
        self.outcome.passes += 1
        self._compute(self.costs.pass_s)
        self._record("begin_pass", step.forecast)
        self._execute(self.plan.begin_pass(step.forecast))
        if step.next_LE is not None:
            self._record("expect_next", step.next_LE)
            self._execute(self.plan.expect_next(step.next_LE))
        for layer, experts in step.visits:
            self._compute(self.costs.dense_s)
            after = layer + 1
            ahead_E = step.ahead_L[after] if after < len(step.ahead_L) else None
            self._run_layer(layer, [ExpertId(layer, expert) for expert in experts], ahead_E)

    def _run_layer(self, layer: int, routed: list[ExpertId], ahead_E: Sequence[float] | None) -> None:
        needed = routed
        if self.policy.whole_layers:
            others = set(range(self.policy.shape.experts_per_layer[layer])) - {e.expert for e in routed}
            needed = [*routed, *(ExpertId(layer, expert) for expert in sorted(others))]
        wanted = set(routed)
        self._compute(self.costs.miss_s * sum(self.table.lookup(expert) is None for expert in needed))
        self._pending = set(needed)
        self._record("open_layer", layer, tuple(needed))
        opened = self.plan.open_layer(layer, needed)
        self._ready = deque(opened.ready)
        self.outcome.uses += len(routed)
        self.outcome.hits += len(wanted.intersection(opened.ready))
        self.outcome.in_flight += len(wanted.intersection(opened.in_flight))
        self._execute(opened.actions)
        if ahead_E is not None:  # before anything is waited for, as run_experts asks
            self._compute(self.costs.ahead_s)
            self._record("refine", layer + 1, ahead_E)
            self._execute(self.plan.refine(layer + 1, ahead_E))
        while self._pending:
            self._wait_for_one()
            expert = self._ready.popleft()
            self._pending.remove(expert)
            if expert in wanted:
                self._compute(self.costs.expert_s)
            self._record("release", expert)
            self._execute(self.plan.release(expert))

    def _wait_for_one(self) -> None:
        """Until an expert of the open layer can be computed; by a blocking policy, until all are there."""
        waited = False
        while not self._ready or (self.policy.blocking and self._some_are_loading()):
            self._stall()
            waited = True
        if waited:
            self.outcome.waits += 1
            self._now += self.costs.wake_s
            self.outcome.stall_seconds += self.costs.wake_s
            self.link.run_until(self._now)

    def _some_are_loading(self) -> bool:
        return any(
            self.table.lookup(expert) is not None and not self.table.is_ready(expert)
            for expert in self._pending
        )

    def _compute(self, seconds: float) -> None:
        self._now += seconds
        self.outcome.compute_seconds += seconds
        self.link.run_until(self._now)

    def _stall(self) -> None:
        end = self.link.next_end
        assert end is not None, f"{self._pending} are waited for, and nothing is on its way"
        if end > self._now:
            self.outcome.stall_seconds += end - self._now
            self._now = end
        self.link.arrive(end)

    def _load_finished(self, expert: ExpertId, now: float) -> None:
        self._record("load_finished", expert)
        actions = self.plan.load_finished(expert)
        if expert in self._pending:
            self._ready.append(expert)
        self._carry_out(actions, now)

    def _execute(self, actions: Iterable[Action]) -> None:
        self._carry_out(actions, self._now)
        self.link.start(self._now)

    def _carry_out(self, actions: Iterable[Action], now: float) -> None:
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            self._record("action", action)
            if isinstance(action, Load):
                self.link.submit(action.expert, action.urgent, now)
            elif isinstance(action, Promote):
                self.link.promote(action.expert, now)
            elif isinstance(action, Cancel):
                if self.link.cancel(action.expert):
                    self._record("load_abandoned", action.expert)
                    todo.extend(self.plan.load_abandoned(action.expert))
                else:
                    self._record("cancel_refused", action.expert)
                    todo.extend(self.plan.cancel_refused(action.expert))

    def _record(self, *event: object) -> None:
        if self.events is not None:
            self.events.append(event)
