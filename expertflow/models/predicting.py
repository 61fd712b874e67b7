"""Prefetch by prediction in the running model: who asks the predictor, and when.

Hooks on the stacks tell of each pass, `run_experts` tells of each layer. Before a pass the predictor is asked and
the cache gets a forecast; at each layer look-ahead says more of the next one, after this layer's demands went out;
after the pass the predictor learns from what came true. None of it can change the output: routers have the last word.
A predictor that fails is not asked again.

Passes that run together (meeting.py) are one pass to the cache: they wait for each other before the first layer and
behind the last, those that decode get one forecast, and prompts beside them are only learnt from.

A scheduler may have the predictor asked before the pass, and in another thread (`question`, `foresee`): the pass finds
what was said and does not ask again. If it says as well whose passes follow (`then`), the cache learns of the next one
while a pass runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expertflow.cache.expert_cache import ExpertCache
from expertflow.cache.gate import PayoffGate
from expertflow.cache.policies.base import FARTHEST, Forecast
from expertflow.kv_name import kv_cache_in, kv_cache_of
from expertflow.models.draft import Draft
from expertflow.models.foresight import Foresight, Name, Question, Upcoming
from expertflow.models.meeting import END, meet
from expertflow.models.prediction_stats import PredictionStats
from expertflow.models.rows import MAX_ROWS, Rows, Sources, joined
from expertflow.models.running_pass import Call, RunningPass, ids_of, mask_of, packs_sequences
from expertflow.predictor.baselines import used_by_any
from expertflow.predictor.combine import Later, at_once
from expertflow.predictor.serving import Expected, PassPredictor

logger = logging.getLogger(__name__)

_PROFILE_TOKENS = 64  # the last ones of a prompt say what its answer will be like
_PREDICTED = 0.5  # a probability from which an expert counts as predicted
MakePredictor = Callable[[int], PassPredictor]  # for models that route each token to so many experts


class Predicting:
    """Asks one predictor about the passes of one model. Layers are numbered as in the cache: the encoder's first."""

    def __init__(
        self,
        cache: ExpertCache,
        name: str,
        make: MakePredictor,
        source_layers: int = 0,
        gate: PayoffGate | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.cache = cache
        self.name = name
        self.source_layers = source_layers
        self.gate = PayoffGate() if gate is None else gate
        self._experts_L = cache.shape.experts_per_layer[source_layers:]
        self.make = make
        self._clock = clock
        self._predictor: PassPredictor | None = None
        self._rows = Rows()
        self._sources = Sources()
        self._foresight = Foresight()
        self._following: Sequence[Sequence[Name]] = ()  # by pass from the one that runs, who comes after it
        self._begun = -1  # passes since that was said, less 1
        self._told = -1  # of which of them the cache has heard what follows
        self._turns = threading.Lock()  # of the two, so that nobody speaks of a pass that has begun meanwhile
        self.draft: Draft | None = None
        self.learn_later: Later | None = None  # who learns while the next pass runs; None: it waits
        self._pass: RunningPass | None = None
        self._stats = PredictionStats(name)
        self._newest_p_LE: np.ndarray | None = None

    @property
    def newest_forecast_LE(self) -> list[list[float]] | None:
        """Of the last pass that had one: probability that it needs each expert, by all layers of the cache.

        None where nobody predicts now. From any thread; look-ahead may be refining it meanwhile.
        """
        p_LE = self._newest_p_LE
        if p_LE is None or self._stats.failed is not None or not self.gate.open:
            return None
        return self._of_cache(p_LE.tolist(), 0.0)

    @property
    def stats(self) -> PredictionStats:
        self._stats.gate = self.gate.reason
        return self._stats

    def reset_stats(self) -> None:
        self._stats = PredictionStats(
            self.name, failed=self._stats.failed, draft_failed=self._stats.draft_failed
        )

    def listen(self, encoder: nn.Module | None, decoder: nn.Module) -> None:
        """Hook on to the stacks of a model; `encoder` is None where there is none."""
        if encoder is not None:
            encoder.register_forward_hook(self._read_source, with_kwargs=True)
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.register_forward_hook(self._end)

    def routed(self, layer: int, index_TK: Tensor) -> None:
        """The router of `layer` has spoken."""
        running = self._running()
        if running is not None and layer >= self.source_layers and running.routes_L is not None:
            # No copy, as in capture.py: nobody writes to what a router has chosen.
            running.routes_L.append(index_TK.detach().to("cpu", torch.int64))

    def look_ahead(self, layer: int, hidden_TD: Tensor) -> None:
        """What enters the experts of `layer`, whose demands are on their way."""
        running = self._running()
        if running is None or running.p_LE is None or not running.routes_L:
            return
        number = layer - self.source_layers
        refined_E: list[float] | None = None
        before = self._stats.predict_seconds
        with self._asking() as predictor:
            if predictor is not None:
                hidden_ND, routes_NK = hidden_TD.detach().cpu(), running.routes_L[-1]
                if not running.all_asked:
                    hidden_ND, routes_NK = hidden_ND[running.asked_N], routes_NK[running.asked_N]
                said_E = predictor.ahead(number, hidden_ND, routes_NK)
                if said_E is not None:
                    p_E = said_E.numpy()
                    running.p_LE[number + 1, : len(p_E)] = p_E
                    refined_E = p_E[: self._experts_L[number + 1]].tolist()
        self._stats.look_ahead_seconds += self._stats.predict_seconds - before
        if refined_E is not None:
            self.cache.refine(layer + 1, refined_E)

    def question(self, lane: Hashable, upcoming: Sequence[Upcoming]) -> Question | None:
        """What to ask of sequences that have got their newest tokens, for `foresee`; None where nothing can be said.

        lane: whose sequences these are. To be called between passes, by the thread that runs them.
        """
        if not upcoming or not self.gate.open or any(len(one.names) > MAX_ROWS for one in upcoming):
            return None
        with self._asking() as predictor:
            if predictor is None:
                return None
            followed = [
                self._rows.foresee(
                    one.newest_B1,
                    one.cache,
                    None if one.encoder_BSD is None else self._sources.of(one.encoder_BSD),
                )
                for one in upcoming
            ]
            return Question(lane, [name for one in upcoming for name in one.names], joined(followed))
        return None  # it failed

    def foresee(self, question: Question, *, hidden: bool) -> Tensor | None:
        """p_NLE that each row of the question needs each expert; None where nothing is said. Kept for their pass.

        hidden: this is not the thread that runs the passes. One call at a time.
        """
        p_NLE = None
        with self._asking(hidden) as predictor:
            if predictor is not None:
                p_NLE = self._foresight.ask(predictor, question)
        self._tell_of_next(hidden)
        return p_NLE

    def then(self, following: Sequence[Sequence[Name]]) -> None:
        """Whose passes come: following[n] is the one after the n-th pass from now on, counted from 0."""
        with self._turns:
            self._following, self._begun, self._told = following, -1, -1

    def _tell_of_next(self, hidden: bool) -> None:
        """Tell the cache what is known of the pass after the one that runs."""
        with self._turns:
            if not (self._told < self._begun < len(self._following) and self.gate.open):
                return
            p_LE: list[list[float]] | None = None
            names, foreseen = self._following[self._begun], None
            with self._asking(hidden) as predictor:
                if predictor is not None:
                    foreseen = self._foresight.of(names)
                    p_LE = (
                        None if foreseen is None else self._of_cache(predictor.soon(foreseen).tolist(), 0.0)
                    )
            if p_LE is not None and foreseen is not None:
                if len(foreseen.p_NLE) == len(names):  # else more of them may be known soon
                    self._told = self._begun
                try:
                    self.cache.expect_next(p_LE)
                except RuntimeError:
                    if self.cache.usable:
                        raise
                    # Closed or broken meanwhile: whoever opens a layer is told why.

    def profile(self, prompt_ids: Sequence[int], *, hidden: bool) -> Tensor | None:
        """p_LE: how often a text that begins so is expected to need each expert; None where nothing is said.

        hidden: this is not the thread that runs the passes.
        """
        with self._asking(hidden) as predictor:
            if predictor is not None:
                return predictor.profile(torch.tensor(prompt_ids[-_PROFILE_TOKENS:]))
        return None

    def _running(self) -> RunningPass | None:
        """The pass of this thread. Threads that share a model run their passes at once; one of them is followed."""
        running = self._pass
        return running if running is not None and running.thread == threading.get_ident() else None

    def _read_source(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        with self._asking():
            ids_BS, states = ids_of(args, kwargs), getattr(output, "last_hidden_state", None)
            if ids_BS is not None and isinstance(states, Tensor):
                self._sources.read(ids_BS, mask_of(kwargs, ids_BS), states)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        meet(self.source_layers - 0.5, self._begin_all, Call(args, kwargs))

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        meet(END, self._end_all, kv_cache_of(output))

    def _begin_all(self, calls: list[Call]) -> list[None]:
        nothing = [None] * len(calls)
        if self._pass is not None:  # it ended in an error
            self._pass = None
            self._rows.forget()
        if self._stats.failed is not None:
            return nothing
        started = self._clock()
        forecast, inference = None, torch.is_inference_mode_enabled()
        with self._asking() as predictor:
            self._pass = running = self._follow(calls, started)
            if running is not None and not self.gate.open:
                self._rows.forget()  # of this pass only the time is wanted
            elif running is not None:
                running.routes_L = []
                if predictor is not None:
                    foreseen = self._foresight.find(running.whole)
                    asked = running.whole.context, running.whole.origin_B, foreseen
                    drafted_B1LE = self._drafted(running, inference)
                    said = (
                        predictor.begin(*asked)
                        if drafted_B1LE is None
                        else predictor.begin(*asked, drafted_B1LE)
                    )
                    if said is not None:
                        self._stats.foreseen += foreseen is not None
                        self._newest_p_LE = running.p_LE = said.p_LE.numpy().copy()
                        forecast = self._forecast(said)
        with self._turns:
            self.cache.begin_pass(forecast)
            self._begun += 1
        self._tell_of_next(hidden=False)
        return nothing

    def _drafted(self, running: RunningPass, inference: bool) -> Tensor | None:
        """What a draft says of the rows that are asked about; None of prompts, which need nearly everything.

        One that fails is not made again, and the others are asked as before.
        """
        if running.whole.context.num_new != 1 or self.draft is None:
            return None
        before = self._clock()
        asked = [call for call, is_asked in zip(running.calls, running.asked, strict=True) if is_asked]
        try:
            self.cache.begin_pass(None)  # the forecast that follows begins it anew, with all that is known
            return self.draft.p_N1LE(asked, inference, self._drafted_layer)
        except Exception as error:
            self.draft = None
            self._stats.draft_failed = f"{type(error).__name__}: {error}"
            logger.warning(
                "no draft is made any more (%s); the online table and look-ahead go on, and the output is the same",
                self._stats.draft_failed,
            )
            return None
        finally:
            self._stats.draft_seconds += self._clock() - before

    def _drafted_layer(self, layer: int, p_E: Tensor) -> None:
        self.cache.refine(self.source_layers + layer, p_E[: self._experts_L[layer]].tolist())

    def _end_all(self, caches: list[Any]) -> list[None]:
        running = self._running()
        if running is not None:
            self._pass = None
            if running.routes_L is not None:
                with self._asking() as predictor:
                    self._learn(running, predictor, caches)
            decoding = all(one.context.num_new == 1 for one in running.followed)
            if decoding and (running.p_LE is not None or running.routes_L is None):
                self.gate.passed(self._clock() - running.started, len(running.whole.context.target_BT))
        return [None] * len(caches)

    def _learn(self, running: RunningPass, predictor: PassPredictor | None, caches: list[Any]) -> None:
        if predictor is None and self._stats.failed is not None:
            return  # in another thread, while the pass ran
        routes_L = running.routes_L
        shapes = [one.context.new_BS.shape for one in running.followed]
        positions = sum(shape.numel() for shape in shapes)
        if not routes_L or [len(routes_TK) for routes_TK in routes_L] != [positions] * len(self._experts_L):
            self._rows.forget()  # some layer did not run, or ran on something else
            if predictor is not None:
                predictor.forget()
            return
        routes_NLK = torch.stack(routes_L, dim=1)
        # "Nowhere" is the layer's own number of experts; of predictors it is that of the widest layer.
        widest = max(self._experts_L)
        if min(self._experts_L) < widest:
            nowhere = routes_NLK == torch.tensor(self._experts_L)[:, None]
            routes_NLK = routes_NLK.masked_fill(nowhere, widest)
        parts = routes_NLK.split([shape.numel() for shape in shapes]) if len(shapes) > 1 else [routes_NLK]
        routes = [part.view(*shape, *routes_NLK.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]
        of_asked = [part for part, asked in zip(routes, running.asked, strict=True) if asked]
        asked_BSLK = torch.cat(of_asked) if len(of_asked) > 1 else of_asked[0]
        context = running.whole.context
        if predictor is None:
            predictor = self._predictor = self.make(routes_NLK.shape[-1])
            predictor.begin(context, running.whole.origin_B)
        later = at_once if self.learn_later is None else partial(self._hand_over, self.learn_later)
        predictor.end(context, asked_BSLK, later)
        for one, part, asked in zip(running.followed, routes, running.asked, strict=True):
            if not asked:
                predictor.learn(one.context, part, later)
        after = [
            cache if cache is not None else kv_cache_in(call.kwargs)
            for cache, call in zip(caches, running.calls, strict=True)
        ]
        contexts = [one.context for one in running.followed]
        self._rows.end(list(zip(contexts, routes, after, strict=True)), running.asked)
        if running.p_LE is not None:
            asked_NLK = routes_NLK if running.all_asked else routes_NLK[running.asked_N]
            used_LE = used_by_any(asked_NLK, widest).numpy()
            guess_LE = running.p_LE >= _PREDICTED
            stats = self._stats
            stats.passes += 1
            stats.needed += int(used_LE.sum())
            stats.predicted += int(guess_LE.sum())
            stats.right += int((guess_LE & used_LE).sum())

    def _hand_over(self, later: Later, learn: Callable[[], None]) -> None:
        def hidden() -> None:
            with self._asking(hidden=True) as predictor:
                if predictor is not None:
                    learn()

        later(hidden)

    def _follow(self, calls: list[Call], started: float) -> RunningPass | None:
        """What is known of the sequences of these calls. None where one of them is not to be followed: embeddings in
        place of tokens, several sequences in one row (continuous batching of transformers), too many rows."""
        ids = [ids_of(call.args, call.kwargs) for call in calls]
        known = [ids_BS for ids_BS in ids if ids_BS is not None and ids_BS.numel()]
        odd = any(packs_sequences(call.kwargs) for call in calls)
        if odd or len(known) < len(calls) or sum(map(len, known)) > MAX_ROWS:
            self._rows.forget()
            return None
        followed = [
            self._rows.begin(
                ids_BS,
                mask_of(call.kwargs, ids_BS),
                kv_cache_in(call.kwargs),
                self._source_of(call.kwargs),
            )
            for call, ids_BS in zip(calls, known, strict=True)
        ]
        asked = [one.context.num_new == 1 for one in followed]
        if not any(asked):
            asked[0] = True  # of several prompts the first
        whole = joined([one for one, is_asked in zip(followed, asked, strict=True) if is_asked])
        return RunningPass(calls, followed, asked, whole, threading.get_ident(), started)

    def _source_of(self, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        states = kwargs.get("encoder_hidden_states")
        return self._sources.of(states) if isinstance(states, Tensor) else None

    def _forecast(self, said: Expected) -> Forecast:
        """For the cache, which knows of the encoder's layers too: nobody needs them for long."""
        later_LE: list[list[float]] = [[] for _ in self._experts_L]  # by use
        if said.later_LE is not None:
            later_LE = said.later_LE.tolist()
        return Forecast(self._of_cache(said.p_LE.tolist(), 0.0), self._of_cache(later_LE, FARTHEST))

    def _of_cache(self, value_LE: list[list[float]], of_encoder: float) -> list[list[float]]:
        encoder_L = self.cache.shape.experts_per_layer[: self.source_layers]
        return [[of_encoder] * experts for experts in encoder_L] + [
            value_E[:experts] for value_E, experts in zip(value_LE, self._experts_L, strict=True)
        ]

    def _asking(self, hidden: bool = False) -> _Asking:
        """Keep the time of a block that may fail, and must not fail the run: with the predictor once there is one.

        hidden: in another thread, which leaves the pass under way alone.
        """
        return _Asking(self, hidden)

    def _asked(self, began: float, hidden: bool, error: Exception | None) -> None:
        """A block that asked is over."""
        if error is not None:
            cause = f"{type(error).__name__}: {error}"
            self._stats.failed = cause
            self._predictor = None
            if not hidden:
                self._pass = None
                self._rows.forget()
            logger.warning(
                "the predictor %s failed (%s) and is not asked again; the run goes on without prefetching, and its "
                "output is the same",
                self.name,
                cause,
            )
        ended = time.perf_counter()
        if hidden:
            self._stats.hidden_seconds += ended - began
        else:
            self._stats.predict_seconds += ended - began
        if (timeline := self.cache.timeline) is not None:
            timeline.add("predict", self.name, began, ended, hidden=hidden)


class _Asking(AbstractContextManager["PassPredictor | None"]):
    """See `Predicting._asking`. Entered at each layer, so no generator, and modes are changed only where need be.

    What is learnt in it may be changed under any mode later, so it is never made in inference mode.
    """

    def __init__(self, predicting: Predicting, hidden: bool):
        self._predicting, self._hidden = predicting, hidden
        self._began: float | None = None  # None: it has failed before
        self._modes: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> PassPredictor | None:
        predicting = self._predicting
        if predicting._stats.failed is not None:
            return None
        self._began = time.perf_counter()
        if torch.is_inference_mode_enabled():
            self._modes = [torch.inference_mode(False), torch.no_grad()]  # the first allows gradients again
        elif torch.is_grad_enabled():
            self._modes = [torch.no_grad()]
        for mode in self._modes:
            mode.__enter__()
        return predicting._predictor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)
        if self._began is None:
            return False
        caught = error if isinstance(error, Exception) else None
        self._predicting._asked(self._began, self._hidden, caught)
        return caught is not None
