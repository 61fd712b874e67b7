"""Several predictors as one: a mixture in logit space, calibrated online by the routes that come true.

    logit p = bias + sum over sources of weight * logit(p of the source)

with weights of their own for each layer and kind of token (how much the online table has seen of it). They
start as the plain mean of the logits and follow by an online Newton step on the cross-entropy: no learning
rate to tune, and each has settled after some hundred tokens. Beside the mixture its parts are judged as well;
where a part has lately been better than the mixture, that part speaks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from expertflow.predictor.baselines import multi_hot
from expertflow.predictor.logits import CLAMP, logit, sigmoid
from expertflow.predictor.lots import Lots
from expertflow.predictor.online_table import RINGS, OnlineTokenTable
from expertflow.predictor.protocol import LayerPredictor, OnlinePredictor, PathContext, PathPredictor

_FORGET = 0.9995  # by token, of the curvature: weights follow a change of subject within some thousand
_START_TOKENS = 4.0  # the start counts as this many
_JUDGE = 0.995  # by token, of the running losses
# Learning needs no more rows of one pass than this: a prefill of a thousand tokens would cost milliseconds.
MAX_ROWS = 32


Later = Callable[
    [Callable[[], None]], None
]  # runs what it is given: in order, now or soon, in whatever thread


def at_once(job: Callable[[], None]) -> None:
    """The Later of those who have no other thread."""
    job()


class Mixture:
    """Weights per layer and kind of token. `present_ML`: false where source m has nothing to say of layer l."""

    def __init__(self, present_ML: Tensor, num_kinds: int = 1):
        sources, layers = present_ML.shape
        self.present_ML = present_ML
        self.num_kinds = num_kinds
        mean_ML = present_ML.float() / present_ML.sum(0).clamp(min=1)
        start_LM = torch.cat([mean_ML, torch.zeros(1, layers)]).T  # the last one is the bias
        self.weight_LCM = start_LM[:, None].repeat(1, num_kinds, 1).contiguous()
        self._start_LCM = self.weight_LCM.clone()
        # The prior's curvature: about that of _START_TOKENS rows of 32 experts.
        self._prior = torch.eye(sources + 1) * _START_TOKENS * 8
        self._curvature_LCMM = self._prior.repeat(layers, num_kinds, 1, 1)
        # Running cross-entropy of the mixture (first) and of each part.
        self._loss_ML = torch.zeros(sources + 1, layers)
        self._judged = 0.0
        self._speaker_L = [0] * layers
        self._present_ML1 = present_ML.float().numpy()[..., None]
        self._seen = self.weight_LCM, self.weight_LCM.numpy()  # the second is a view of the first

    def logits(self, p_NMLE: Tensor) -> Tensor:
        """x_NMLE: the logits of what the sources said, a row of ones for the bias; 0 where one is absent."""
        logit_NMLE = torch.logit(p_NMLE.float(), eps=CLAMP) * self.present_ML[:, :, None]
        return torch.cat([logit_NMLE, torch.ones_like(logit_NMLE[:, :1])], dim=1)

    def mix(self, p_NMLE: Tensor, kind_N: Tensor) -> Tensor:
        """p_NLE of N tokens from M sources."""
        if len(p_NMLE) == 1:
            return torch.from_numpy(self._mix_one(p_NMLE.float().numpy()[0], kind_N.tolist()[0]))
        logit_NMLE = torch.logit(p_NMLE.float(), eps=CLAMP) * self.present_ML[:, :, None]
        weight_NLM = self.weight_LCM[:, kind_N].transpose(0, 1)
        mixed = torch.einsum("nlm,nmle->nle", weight_NLM[..., :-1], logit_NMLE) + weight_NLM[..., -1:]
        mixed = torch.sigmoid(mixed)
        for index, best in enumerate(self._speaker_L):
            if best:
                mixed[:, index] = p_NMLE[:, best - 1, index].float()
        return mixed

    def _mix_one(self, p_MLE: np.ndarray, kind: int) -> np.ndarray:
        """`mix` of one token, [1, L, E]: in numpy, whose calls cost a fifth of torch's between large products."""
        weight_ML1 = self._weights()[:, kind].T[..., None]
        z_LE = (weight_ML1[:-1] * self._present_ML1 * logit(p_MLE)).sum(0) + weight_ML1[-1]
        mixed_1LE = sigmoid(z_LE)[None]
        for layer, best in enumerate(self._speaker_L):
            if best:
                mixed_1LE[0, layer] = p_MLE[best - 1, layer]
        return mixed_1LE

    def mix_layer(
        self, said_NME: np.ndarray, last_NE: np.ndarray, kind_N: np.ndarray, layer: int
    ) -> np.ndarray:
        """p_NE of one layer, as `mix` would have it: in numpy, since it is asked at each layer of each pass.

        said_NME: of all sources but the last, which has said last_NE.
        """
        if best := self._speaker_L[layer]:
            return last_NE if best == len(self.present_ML) else said_NME[:, best - 1]
        weight_NM = self._weights()[layer, kind_N]
        weight_NM1 = weight_NM[:, :-1, None] * self._present_ML1[:, layer]
        p_NME = np.concatenate((said_NME, last_NE[:, None]), 1)
        z_NE = (weight_NM1 * logit(p_NME)).sum(1) + weight_NM[:, -1:]
        return sigmoid(z_NE)

    def _weights(self) -> np.ndarray:
        """weight_LCM as numpy sees it."""
        seen, weight_LCM = self._seen
        if seen is not self.weight_LCM:  # learnt since
            seen = self.weight_LCM
            self._seen = seen, (weight_LCM := seen.numpy())
        return weight_LCM

    def speaker_L(self) -> Tensor:
        """0 where the mixture speaks, else 1 + the source that has lately been better alone."""
        if self._judged == 0:
            return torch.zeros(self._loss_ML.shape[1], dtype=torch.int64)
        # The mixture keeps the word until it is clearly worse: half a percent is chance.
        handicap = torch.ones(len(self._loss_ML), 1)
        handicap[0] = 0.995
        return (self._loss_ML * handicap).argmin(0)

    def learn(self, p_NMLE: Tensor, truth_NLE: Tensor, kind_N: Tensor) -> None:
        """Move the weights by what came true."""
        if len(p_NMLE) > MAX_ROWS:
            # Evenly spread: the first positions of a prompt are unlike the rest.
            picked = torch.linspace(0, len(p_NMLE) - 1, MAX_ROWS).long()
            p_NMLE, truth_NLE, kind_N = p_NMLE[picked], truth_NLE[picked], kind_N[picked]
        truth = truth_NLE.float()
        x_NMLE = self.logits(p_NMLE)
        weight_NLM = self.weight_LCM[:, kind_N].transpose(0, 1)
        z_NLE = torch.einsum("nlm,nmle->nle", weight_NLM, x_NMLE)
        self._judge(z_NLE, x_NMLE, truth)
        p_NLE = torch.sigmoid(z_NLE)
        error_NLE = p_NLE - truth
        x_LNME = x_NMLE.permute(2, 0, 1, 3)
        gradient_NLM = (x_LNME @ error_NLE.permute(1, 0, 2)[..., None])[..., 0].transpose(0, 1)
        spread_LN1E = (p_NLE * (1 - p_NLE)).permute(1, 0, 2)[:, :, None]
        curvature_NLMM = ((x_LNME * spread_LN1E) @ x_LNME.transpose(2, 3)).transpose(0, 1)
        weight_LCM = self.weight_LCM.clone()  # another thread may be mixing: it sees the old ones or the new
        for kind in kind_N.unique().tolist():
            own = kind_N == kind
            forget = _FORGET ** int(own.sum())
            curvature = self._curvature_LCMM[:, kind]
            curvature.sub_(self._prior).mul_(forget).add_(self._prior).add_(curvature_NLMM[own].sum(0))
            step_LM = torch.linalg.solve(curvature, gradient_NLM[own].sum(0))
            weight_LCM[:, kind] -= step_LM.clamp(-0.5, 0.5)
        self.weight_LCM = weight_LCM

    def _judge(self, z_NLE: Tensor, x_NMLE: Tensor, truth_NLE: Tensor) -> None:
        all_NMLE = torch.cat([z_NLE[:, None], x_NMLE[:, :-1]], dim=1)
        loss = F.binary_cross_entropy_with_logits(
            all_NMLE, truth_NLE[:, None].expand_as(all_NMLE), reduction="none"
        )
        loss_ML = loss.mean((0, 3))
        loss_ML[1:][~self.present_ML] = float("inf")
        keep = _JUDGE ** len(z_NLE)
        self._judged = self._judged * keep + (1 - keep)
        share = (1 - keep) / self._judged
        self._loss_ML = loss_ML if share == 1 else self._loss_ML + share * (loss_ML - self._loss_ML)
        self._loss_ML[1:][~self.present_ML] = float("inf")
        self._speaker_L = self.speaker_L().tolist()


class Opinions(NamedTuple):
    """What was said of N positions before their pass. All of it goes by position, so rows may change batches."""

    p_NMLE: Tensor  # by source
    kind_N: Tensor  # of token: how much the online table has seen of it
    mixed_NLE: Tensor

    def select(self, rows_N: Tensor) -> Opinions:
        """Of these positions, in this order: indices or a mask."""
        return Opinions(self.p_NMLE[rows_N], self.kind_N[rows_N], self.mixed_NLE[rows_N])

    @staticmethod
    def join(parts: Sequence[Opinions]) -> Opinions:
        """Of all their positions, one part after the other."""
        return Opinions(*(torch.cat(said) for said in zip(*parts, strict=True)))


class _Lesson(NamedTuple):
    """What a pass leaves to learn from: what was said of N positions, and what came of them."""

    p_NMLE: Tensor
    ahead: dict[int, Tensor]  # p_NE by layer, of look-ahead
    kind_N: Tensor
    routes_NLK: Tensor


class Combination:
    """Path predictors, and one that looks a layer ahead, as one predictor that learns while serving.

    PathPredictor, OnlinePredictor and LayerPredictor at once: `predict` before the pass, `observe` at each
    layer, `observe_pass` afterwards. Rows of `observe` are the real new positions of the last `predict`, in
    order: sequence by sequence. `consult` may be called from another thread at any time.
    """

    def __init__(
        self,
        sources: Sequence[PathPredictor],
        layers: int,
        num_experts: int,
        ahead: LayerPredictor | None = None,
    ):
        if not sources:
            raise ValueError("a combination needs a source that predicts before the pass, such as the table")
        self.sources = list(sources)
        self.ahead = ahead
        self.num_experts = num_experts
        kinds = len(RINGS) + 1 if any(isinstance(source, OnlineTokenTable) for source in sources) else 1
        present_ML = torch.ones(len(self.sources), layers, dtype=torch.bool)
        self.before = Mixture(present_ML, kinds)
        ahead_1L = torch.ones(1, layers, dtype=torch.bool)
        ahead_1L[:, 0] = False
        self.during = Mixture(torch.cat([present_ML, ahead_1L]), kinds)
        self._p_NMLE: Tensor | None = None
        self._kind_N = torch.zeros(0, dtype=torch.int64)
        self._adopted: tuple[np.ndarray, np.ndarray] | None = None  # views of both
        self._ahead: dict[int, Tensor] = {}
        self._lots: Lots[_Lesson] = Lots()
        # Of what `consult` reads and `observe_pass` changes. Held for one source at a time: a pass waits for it.
        self._learning = threading.Lock()

    def predict(self, context: PathContext) -> Tensor:
        """Remembers what each source said until `observe_pass`."""
        said = self.consult(context)
        self.adopt(said.select(_real(context)))
        return said.mixed_NLE.reshape(*context.new_BS.shape, *said.mixed_NLE.shape[1:])

    def consult(self, context: PathContext, answers: Mapping[int, Tensor] | None = None) -> Opinions:
        """Ask all sources about the new positions, padding included. Changes nothing.

        answers: p_BSLE of sources, by number, that have been asked already.
        """
        answers = answers or {}
        kind_BS = torch.zeros(context.new_BS.shape, dtype=torch.int64)
        said = []
        for number, source in enumerate(self.sources):
            if number in answers:
                p_BSLE = answers[number]
            elif isinstance(source, OnlineTokenTable):
                with self._learning:
                    p_BSLE, kind_BS = source.predict_with_support(context)
            else:
                p_BSLE = source.predict(context)
            said.append(p_BSLE)
        p_NMLE, kind_N = torch.stack(said, dim=2).flatten(0, 1), kind_BS.flatten()
        with self._learning:
            mixed_NLE = self.before.mix(p_NMLE, kind_N)
        return Opinions(p_NMLE, kind_N, mixed_NLE)

    def profile(self, ids_T: Tensor) -> Tensor | None:
        """p_LE: how often a text of such tokens needs each expert, by the online table; None without one.

        Of a prompt that nobody has read yet: no route of it is known, and what a trained predictor would have to read
        costs more than the guess is worth.
        """
        context = PathContext(target_BT=ids_T[None], num_new=len(ids_T))
        for source in self.sources:
            if isinstance(source, OnlineTokenTable):
                with self._learning:
                    return source.predict(context)[0].mean(0)
        return None

    def adopt(self, said: Opinions) -> None:
        """The pass that begins is over these positions, real ones only: `observe_pass` will learn from it."""
        self._p_NMLE, self._kind_N, self._ahead = said.p_NMLE, said.kind_N, {}
        self._adopted = said.p_NMLE.float().numpy(), said.kind_N.numpy()

    def observe(self, layer: int, hidden_BD: Tensor | None, routes_BK: Tensor | None) -> Tensor | None:
        if self.ahead is None or self._p_NMLE is None or self._adopted is None:
            return None
        p_NE = self.ahead.observe(layer, hidden_BD, routes_BK)
        if p_NE is None:
            return None
        if len(p_NE) != len(self._p_NMLE):
            raise ValueError(
                f"{len(p_NE)} rows at layer {layer}, but {len(self._p_NMLE)} positions were predicted before "
                f"the pass; observe each real new position once"
            )
        after = layer + 1
        self._ahead[after] = p_NE
        said_NMLE, kind_N = self._adopted
        return torch.from_numpy(self.during.mix_layer(said_NMLE[:, :, after], p_NE.numpy(), kind_N, after))

    def forget(self) -> None:
        """The pass that was predicted last will not be observed."""
        self._p_NMLE, self._ahead = None, {}

    def observe_pass(self, context: PathContext, routes_BSLK: Tensor, later: Later = at_once) -> None:
        """later: who does the learning, which may be under way while the next pass runs."""
        said = (self._p_NMLE, self._ahead, self._kind_N)
        self._p_NMLE, self._ahead = None, {}
        later(partial(self._learn, context, routes_BSLK, *said))

    def _learn(
        self,
        context: PathContext,
        routes_BSLK: Tensor,
        p_NMLE: Tensor | None,
        ahead: dict[int, Tensor],
        kind_N: Tensor,
    ) -> None:
        routes_NLK = routes_BSLK.flatten(0, 1)
        if context.new_mask_BS is not None:
            routes_NLK = routes_NLK[context.new_mask_BS.flatten()]
        rows = len(routes_NLK)
        if p_NMLE is not None and rows == len(p_NMLE) > 0:
            lesson = _Lesson(p_NMLE, ahead, kind_N, routes_NLK)
            if lot := self._lots.add(lesson, rows):
                self._learn_weights(lot)
        for source in self.sources:
            if isinstance(source, OnlinePredictor):
                with self._learning:
                    source.observe_pass(context, routes_BSLK)

    def _learn_weights(self, lot: Sequence[_Lesson]) -> None:
        truth_NLE = multi_hot(torch.cat([lesson.routes_NLK for lesson in lot]), self.num_experts)
        p_NMLE, kind_N = (
            torch.cat([lesson.p_NMLE for lesson in lot]),
            torch.cat([lesson.kind_N for lesson in lot]),
        )
        with self._learning:
            self.before.learn(p_NMLE, truth_NLE, kind_N)
        if all(lesson.ahead for lesson in lot):
            ahead_NLE, begin = torch.full_like(truth_NLE, 0.5, dtype=p_NMLE.dtype), 0
            for lesson in lot:
                end = begin + len(lesson.kind_N)
                for layer, p_NE in lesson.ahead.items():
                    ahead_NLE[begin:end, layer] = p_NE
                begin = end
            self.during.learn(torch.cat([p_NMLE, ahead_NLE[:, None]], dim=1), truth_NLE, kind_N)


def _real(context: PathContext) -> Tensor:
    mask = context.new_mask_BS
    return torch.ones(context.new_BS.numel(), dtype=torch.bool) if mask is None else mask.flatten()


def untrained(
    layers: int,
    num_experts: int,
    top_k: int,
    ahead: LayerPredictor | None = None,
    max_bytes: int = 16 << 20,
) -> Combination:
    """The default until a trained predictor is given: the online table and, where there is one, look-ahead."""
    return Combination([OnlineTokenTable(layers, num_experts, top_k, max_bytes)], layers, num_experts, ahead)
