"""Prefetch by prediction in the running model: who asks the predictor, and when.

Hooks on the stacks tell of each pass, `run_experts` tells of each layer. Before a pass the predictor is asked and
the cache gets a forecast; at each layer look-ahead says more of the next one, after this layer's demands went out;
after the pass the predictor learns from what came true. None of it can change the output: routers have the last word.
A predictor that fails is not asked again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertflow.cache.expert_cache import ExpertCache
from expertflow.cache.gate import PayoffGate
from expertflow.cache.policies.base import FARTHEST, Forecast
from expertflow.models.rows import MAX_ROWS, Followed, Rows
from expertflow.predictor.baselines import multi_hot
from expertflow.predictor.serving import Expected, PassPredictor

logger = logging.getLogger(__name__)

_PREDICTED = 0.5  # a probability from which an expert counts as predicted
MakePredictor = Callable[[int], PassPredictor]  # for models that route each token to so many experts


@dataclass
class PredictionStats:
    """Since the start or the last reset. Experts are counted once for a layer of a pass, however many rows."""

    name: str  # the setting
    passes: int = 0  # that had a forecast
    predict_seconds: float = 0.0  # asking, looking ahead and learning
    needed: int = 0
    predicted: int = 0  # by what was known when the layer began
    right: int = 0  # predicted and needed
    failed: str | None = None  # why the predictor is not asked any more
    gate: str = ""  # whether prefetching pays, and why it is on or off

    @property
    def recall(self) -> float:
        return self.right / self.needed if self.needed else 0.0

    @property
    def precision(self) -> float:
        return self.right / self.predicted if self.predicted else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recall": self.recall, "precision": self.precision}


@dataclass
class _Pass:
    """One call of the decoder while it runs."""

    followed: Followed
    thread: int
    cache: Any  # past_key_values as the pass got them
    started: float
    p_LE: Tensor | None = None  # predicted for the whole batch, as far as is known
    routes_L: list[Tensor] | None = None


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
        self._make = make
        self._clock = clock
        self._predictor: PassPredictor | None = None
        self._rows = Rows()
        self._source: tuple[Tensor, Tensor] | None = None
        self._pass: _Pass | None = None
        self._stats = PredictionStats(name)

    @property
    def stats(self) -> PredictionStats:
        self._stats.gate = self.gate.reason
        return self._stats

    def reset_stats(self) -> None:
        self._stats = PredictionStats(self.name, failed=self._stats.failed)

    def listen(self, encoder: nn.Module | None, decoder: nn.Module) -> None:
        """Hook on to the stacks of a model; `encoder` is None where there is none."""
        if encoder is not None:
            encoder.register_forward_pre_hook(self._read_source, with_kwargs=True)
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.register_forward_hook(self._end)

    def routed(self, layer: int, index_TK: Tensor) -> None:
        """The router of `layer` has spoken."""
        running = self._running()
        if running is not None and layer >= self.source_layers and running.routes_L is not None:
            running.routes_L.append(index_TK.detach().to("cpu", torch.int64, copy=True))

    def look_ahead(self, layer: int, hidden_TD: Tensor) -> None:
        """What enters the experts of `layer`, whose demands are on their way."""
        running = self._running()
        if running is None or running.p_LE is None or not running.routes_L:
            return
        number = layer - self.source_layers
        refined_E: list[float] | None = None
        with self._asking() as predictor:
            if predictor is not None:
                mask_BS = running.followed.context.new_mask_BS
                assert mask_BS is not None
                real_N = mask_BS.flatten()
                p_E = predictor.ahead(number, hidden_TD.detach().cpu()[real_N], running.routes_L[-1][real_N])
                if p_E is not None:
                    running.p_LE[number + 1, : len(p_E)] = p_E
                    refined_E = p_E[: self._experts_L[number + 1]].tolist()
        if refined_E is not None:
            self.cache.refine(layer + 1, refined_E)

    def _running(self) -> _Pass | None:
        """The pass of this thread. Threads that share a model run their passes at once; one of them is followed."""
        running = self._pass
        return running if running is not None and running.thread == threading.get_ident() else None

    def _read_source(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._source = None
        with self._asking():
            ids_BS = _ids_of(args, kwargs)
            if ids_BS is not None:
                self._source = ids_BS, _mask_of(kwargs, ids_BS)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pass is not None:  # it ended in an error
            self._pass = None
            self._rows.forget()
        if self._stats.failed is not None:
            return
        if not self.gate.open:
            self._rows.forget()
            self._pass = self._unasked(args, kwargs)
            self.cache.begin_pass(None)
            return
        started = self._clock()
        forecast = None
        with self._asking() as predictor:
            if (followed := self._follow(args, kwargs)) is not None:
                self._pass = running = _Pass(
                    followed,
                    threading.get_ident(),
                    kwargs.get("past_key_values"),
                    started,
                    routes_L=[],
                )
                if predictor is not None:
                    said = predictor.begin(followed.context, followed.origin_B)
                    if said is not None:
                        running.p_LE = said.p_LE.clone()
                        forecast = self._forecast(said)
        self.cache.begin_pass(forecast)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running = self._running()
        if running is None:
            return
        self._pass = None
        context = running.followed.context
        if running.routes_L is not None:
            with self._asking() as predictor:
                self._learn(running, predictor, getattr(output, "past_key_values", None))
        decoding = context.num_new == 1
        if decoding and (running.p_LE is not None or running.routes_L is None):
            self.gate.passed(self._clock() - running.started, len(context.target_BT))

    def _learn(self, running: _Pass, predictor: PassPredictor | None, cache_after: Any) -> None:
        context, routes_L = running.followed.context, running.routes_L
        cache = cache_after if cache_after is not None else running.cache
        positions = context.new_BS.numel()
        if not routes_L or [len(routes_TK) for routes_TK in routes_L] != [positions] * len(self._experts_L):
            self._rows.forget()  # some layer did not run, or ran on something else
            if predictor is not None:
                predictor.forget()
            return
        routes_BSLK = torch.stack(routes_L, dim=1).unflatten(0, context.new_BS.shape)
        # "Nowhere" is the layer's own number of experts; of predictors it is that of the widest layer.
        widest = max(self._experts_L)
        nowhere = routes_BSLK == torch.tensor(self._experts_L)[:, None]
        routes_BSLK = routes_BSLK.masked_fill(nowhere, widest)
        if predictor is None:
            predictor = self._predictor = self._make(routes_BSLK.shape[-1])
            predictor.begin(context, running.followed.origin_B)
            predictor.end(context, routes_BSLK)
        else:
            predictor.end(context, routes_BSLK)
        self._rows.end(context, routes_BSLK, cache)
        if running.p_LE is not None:
            mask_BS = context.new_mask_BS
            assert mask_BS is not None
            used_LE = multi_hot(routes_BSLK[mask_BS], widest).any(0)
            guess_LE = running.p_LE >= _PREDICTED
            stats = self._stats
            stats.passes += 1
            stats.needed += int(used_LE.sum())
            stats.predicted += int(guess_LE.sum())
            stats.right += int((guess_LE & used_LE).sum())

    def _follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Followed | None:
        """The context of a pass, or None for one that is not followed: embeddings in place of tokens, several
        sequences in one row (continuous batching), too many rows."""
        ids_BS, cache = _ids_of(args, kwargs), kwargs.get("past_key_values")
        odd = kwargs.get("cu_seq_lens_q") is not None or (
            cache is not None and not hasattr(cache, "get_seq_length")
        )
        if ids_BS is None or odd or len(ids_BS) > MAX_ROWS or not ids_BS.numel():
            self._rows.forget()
            return None
        source = self._source
        states = kwargs.get("encoder_hidden_states")
        if source is not None and isinstance(states, Tensor):
            times, rest = divmod(len(states), len(source[0]))  # several answers to one source
            if rest or states.shape[1] != source[0].shape[1]:
                source = None  # the states of another source
            elif times > 1:
                source = source[0].repeat_interleave(times, 0), source[1].repeat_interleave(times, 0)
        return self._rows.begin(ids_BS, _mask_of(kwargs, ids_BS), cache, source)

    def _unasked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Pass | None:
        """A pass without prefetching, of which only the time is wanted."""
        started = self._clock()
        with self._asking():
            followed = self._follow(args, kwargs)
            if followed is not None:
                self._rows.forget()
                return _Pass(followed, threading.get_ident(), None, started)
        return None

    def _forecast(self, said: Expected) -> Forecast:
        """For the cache, which knows of the encoder's layers too: nobody needs them for long."""
        encoder_L = self.cache.shape.experts_per_layer[: self.source_layers]
        p_LE, later_LE = said.p_LE.tolist(), said.later_LE.tolist()
        return Forecast(
            [[0.0] * experts for experts in encoder_L]
            + [p_E[:experts] for p_E, experts in zip(p_LE, self._experts_L, strict=True)],
            [[FARTHEST] * experts for experts in encoder_L]
            + [later_E[:experts] for later_E, experts in zip(later_LE, self._experts_L, strict=True)],
        )

    @contextmanager
    def _asking(self) -> Iterator[PassPredictor | None]:
        """Keep the time of a block that may fail, and must not fail the run. Yields the predictor once there is one.

        What is learnt in it may be changed under any mode later, so it is never made in inference mode.
        """
        if self._stats.failed is not None:
            yield None
            return
        began = time.perf_counter()
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield self._predictor
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            self._stats.failed = cause
            self._predictor, self._pass = None, None
            self._rows.forget()
            logger.warning(
                "the predictor %s failed (%s) and is not asked again; the run goes on without prefetching, and its "
                "output is the same",
                self.name,
                cause,
            )
        finally:
            self._stats.predict_seconds += time.perf_counter() - began


def _ids_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Token ids of a pass, [B, S] on the CPU; None where it got embeddings."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    return ids.detach().to("cpu", torch.int64, copy=True)


def _mask_of(kwargs: dict[str, Any], ids_BS: Tensor) -> Tensor:
    """True where the new positions are no padding."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < ids_BS.shape[1]:
        return torch.ones_like(ids_BS, dtype=torch.bool)  # as in capture.py
    return mask[:, mask.shape[1] - ids_BS.shape[1] :].detach().to("cpu", torch.bool, copy=True)
