"""RoutingPathPredictor: which experts every layer will need, from token ids alone, before the pass.

One stack in two shapes (`sizes.ARCHS`):
  paper   section 3.2: a T5-style encoder-decoder, hidden 32, feed-forward 2048, L heads of E logits.
  causal  ours: a causal transformer plus a residual by token identity of low rank.

Who reads what:
  decoder-only model     the decoder reads all target tokens, causally; prompt positions are predicted too.
                         paper: the encoder reads the prompt, which is known whole before prefill.
  encoder-decoder model  (both shapes) the encoder reads the source, and its states, which see both directions,
                         predict the encoder's layers; the decoder reads the target and predicts the others.

Notable: `advance` passes only the newest tokens and equals the whole pass. Tables of V rows are kept in
bfloat16 once trained (`compact`): they are most of the bytes. Their last row stands for tokens never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertflow.predictor.decoder import Decoder, PathState
from expertflow.predictor.layers import Encoder
from expertflow.predictor.next_use import HORIZONS, expected_passes
from expertflow.predictor.protocol import PathContext
from expertflow.predictor.sizes import PredictorSizes
from expertflow.predictor.tables import Table, anchor_of
from expertflow.trace import TraceMeta

_EMBEDDING_STD = 0.5
_NO_EXPERT = -30.0  # logit of an expert that a narrower layer does not have


@dataclass(frozen=True)
class PredictedModel:
    """Whose routes are predicted."""

    fingerprint: str
    model: str
    experts_per_layer: tuple[int, ...]  # the encoder's layers first
    source_layers: int
    top_k: int
    vocab_size: int

    @classmethod
    def of(cls, meta: TraceMeta) -> PredictedModel:
        return cls(
            meta.fingerprint,
            meta.model,
            tuple(meta.experts_per_layer),
            meta.source_layers,
            meta.top_k,
            meta.vocab_size,
        )

    @property
    def target_layers(self) -> int:
        return len(self.experts_per_layer) - self.source_layers


class PathLogits(NamedTuple):
    target_BTLE: Tensor
    target_states_BTD: Tensor
    source_BSLE: Tensor | None  # encoder-decoder models only


class Heads(nn.Module):
    """States and token ids -> logits of L layers of E experts, as one projection plus the residual."""

    def __init__(self, sizes: PredictorSizes, experts_L: tuple[int, ...], vocab_size: int):
        super().__init__()
        self.shape = (len(experts_L), max(experts_L))
        outputs = self.shape[0] * self.shape[1]
        self.project = nn.Linear(sizes.hidden, outputs)
        nn.init.zeros_(self.project.bias)
        self.token_table: Table | None = None
        if sizes.token_rank:
            # Zero: a token never seen in training adds nothing.
            self.token_table = Table(vocab_size, sizes.token_rank)
            nn.init.zeros_(self.token_table.weight)
            self.token_project = nn.Linear(sizes.token_rank, outputs, bias=False)
            nn.init.normal_(self.token_project.weight, std=sizes.token_rank**-0.5)
        missing_LE = torch.arange(self.shape[1]) >= torch.tensor(experts_L)[:, None]
        self.register_buffer("missing_LE", missing_LE if missing_LE.any() else None, persistent=False)

    def forward(self, states_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        logits = self.project(states_BTD)
        if self.token_table is not None:
            logits = logits + self.token_project(self.token_table(ids_BT))
        logits_BTLE = logits.unflatten(-1, self.shape)
        if self.missing_LE is not None:
            logits_BTLE = logits_BTLE.masked_fill(self.missing_LE, _NO_EXPERT)
        return logits_BTLE


class RoutingPathPredictor(nn.Module):
    """A PathPredictor, and for encoder-decoder models a SourcePredictor."""

    def __init__(self, sizes: PredictorSizes, model: PredictedModel):
        super().__init__()
        self.sizes, self.model = sizes, model
        source, target = (
            model.experts_per_layer[: model.source_layers],
            model.experts_per_layer[model.source_layers :],
        )
        if not target:
            raise ValueError(f"{model.model} has no MoE layers in its decoder; nothing to predict in decode")
        size = (sizes.hidden, sizes.feed_forward, sizes.heads)
        self.embedding = Table(model.vocab_size, sizes.hidden)
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_STD)
        self.reads_source = model.source_layers > 0
        with_encoder = self.reads_source or sizes.arch == "paper"
        self.encoder = Encoder(*size, sizes.encoder_layers) if with_encoder else None
        self.decoder = Decoder(*size, sizes.layers, sizes.window, cross=with_encoder)
        self.target_heads = Heads(sizes, target, model.vocab_size)
        self.source_heads = Heads(sizes, source, model.vocab_size) if source else None
        outputs = self.target_heads.shape[0] * self.target_heads.shape[1] * len(HORIZONS)
        self.next_use_head = nn.Linear(sizes.hidden, outputs) if sizes.next_use else None

    def forward(
        self,
        target_BT: Tensor,
        target_mask_BT: Tensor,
        source_BS: Tensor | None = None,
        source_mask_BS: Tensor | None = None,
        num_prefill_B: Tensor | None = None,
    ) -> PathLogits:
        """All positions in one pass. Target padded on the left, source on the right; masks true where real.

        num_prefill_B: prompt tokens per row; needed by `paper` on decoder-only models, else unused.
        """
        memory, source_BSLE = None, None
        read = self._encode(target_BT, target_mask_BT, source_BS, source_mask_BS, num_prefill_B)
        if read is not None:
            states_BSD, mask_BS = read
            memory = self.decoder.remember(states_BSD, mask_BS)
            if self.source_heads is not None and source_BS is not None:
                source_BSLE = self.source_heads(states_BSD, source_BS)
        states_BTD = self.decoder(self.embedding(target_BT), target_mask_BT, memory)
        return PathLogits(self.target_heads(states_BTD, target_BT), states_BTD, source_BSLE)

    @torch.inference_mode()
    def predict(self, context: PathContext) -> Tensor:
        """p_BSLE at the new positions, from the whole context: the slow, obvious way (see `advance`)."""
        target_BT, mask_BT = context.target_BT, _mask(context.target_BT, context.target_mask_BT)
        source_mask = None if context.source_BS is None else _mask(context.source_BS, context.source_mask_BS)
        logits = self(target_BT, mask_BT, context.source_BS, source_mask, context.num_prefill_B)
        return logits.target_BTLE[:, target_BT.shape[1] - context.num_new :].sigmoid()

    @torch.inference_mode()
    def predict_source(self, context: PathContext) -> Tensor:
        """p_BSLE of the encoder's layers at the source positions."""
        if self.source_heads is None or context.source_BS is None:
            raise ValueError(f"{self.model.model} has no MoE layers in an encoder, or no source was given")
        mask_BS = _mask(context.source_BS, context.source_mask_BS)
        assert self.encoder is not None
        states_BSD = self.encoder(self.embedding(context.source_BS), mask_BS)
        return self.source_heads(states_BSD, context.source_BS).sigmoid()

    @torch.inference_mode()
    def start(self, known_BS: Tensor | None = None, mask_BS: Tensor | None = None) -> PathState:
        """The state before the first target token.

        known_BS: what the encoder reads, padded on the right: the source, or for `paper` on decoder-only models
        the prompt. None without an encoder; then `mask_BS` has B rows and no columns, or B is 1.
        """
        if self.encoder is None:
            return self.decoder.start(1 if mask_BS is None else mask_BS.shape[0], None)
        if known_BS is None:
            raise ValueError("this predictor has an encoder; give it the source, or the prompt")
        mask_BS = _mask(known_BS, mask_BS)
        memory = self.decoder.remember(self.encoder(self.embedding(known_BS), mask_BS), mask_BS)
        return self.decoder.start(known_BS.shape[0], memory)

    @torch.inference_mode()
    def advance(
        self, state: PathState, new_BN: Tensor, mask_BN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next N tokens of each row, padded on the left. Updates `state`.

        Returns (p_BNLE, states_BND); the states are what `next_use` reads.
        """
        states_BND = self.decoder.advance(state, self.embedding(new_BN), _mask(new_BN, mask_BN))
        return self.target_heads(states_BND, new_BN).sigmoid(), states_BND

    def next_use_logits(self, states_BND: Tensor) -> Tensor:
        """logits_BNCLE that an expert is used within 1, 2, 4, 8, 16 passes after this one.

        Whether it is used in this pass is what `advance` says; once the layer has run, that use is over.
        """
        if self.next_use_head is None:
            raise ValueError(
                "this predictor was trained without a next-use head; train it again with --next-use"
            )
        return self.next_use_head(states_BND).unflatten(-1, (len(HORIZONS), *self.target_heads.shape))

    @torch.inference_mode()
    def next_use(self, states_BD: Tensor) -> Tensor:
        """passes_LE: how many passes from now until any of B rows uses the expert, in expectation.

        Between 1 (the next pass) and 32 (not soon). The largest is the first to evict. Rows count as independent.
        """
        logits_BCLE = self.next_use_logits(states_BD).cummax(1).values  # a longer horizon includes a shorter
        # softplus(x) is -log P(not used): over rows, probabilities multiply.
        return expected_passes(F.softplus(logits_BCLE).sum(0).neg().exp())

    @torch.inference_mode()
    def next_use_path(self, context: PathContext) -> Tensor:
        """passes_BSLE: `next_use` of each row alone, just after each of the new positions."""
        target_BT, mask_BT = context.target_BT, _mask(context.target_BT, context.target_mask_BT)
        source_mask = None if context.source_BS is None else _mask(context.source_BS, context.source_mask_BS)
        logits = self(target_BT, mask_BT, context.source_BS, source_mask, context.num_prefill_B)
        states_BSD = logits.target_states_BTD[:, target_BT.shape[1] - context.num_new :]
        passes = [self.next_use(states_1D[None]) for states_1D in states_BSD.flatten(0, 1)]
        return torch.stack(passes).unflatten(0, states_BSD.shape[:2])

    def num_bytes(self) -> int:
        """Of all parameters as they are held now (`compact` first to see what a trained one takes)."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def anchor(self, embedding_VD: Tensor) -> None:
        """Let training lean on the model's own input embedding, until `fold` (see `Table`).

        embedding_VD: its rows by token id, of the model whose routes are predicted.
        """
        anchor_VD = anchor_of(embedding_VD, self.model.vocab_size)
        for table in self.tables():
            table.anchor(anchor_VD, _EMBEDDING_STD if table is self.embedding else 0.0)

    def fold(self) -> None:
        for table in self.tables():
            table.fold()

    def compact(self) -> RoutingPathPredictor:
        """Round the tables of V rows to bfloat16, in place. Returns self, ready to predict."""
        for table in self.tables():
            table.weight.data = table.weight.data.to(torch.bfloat16)
        return self.eval().requires_grad_(False)

    def tables(self) -> list[Table]:
        """Those with a row per token; the last row is "never seen"."""
        heads = [h for h in (self.target_heads, self.source_heads) if h is not None]
        return [self.embedding, *(h.token_table for h in heads if h.token_table is not None)]

    def _encode(
        self,
        target_BT: Tensor,
        target_mask_BT: Tensor,
        source_BS: Tensor | None,
        source_mask_BS: Tensor | None,
        num_prefill_B: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """(states_BSD, mask_BS) of what the encoder reads; None without an encoder."""
        if self.encoder is None:
            return None
        if self.reads_source:
            known_BS, mask_BS = source_BS, source_mask_BS
        elif num_prefill_B is not None:
            known_BS, mask_BS = prompts_of(target_BT, target_mask_BT, num_prefill_B)
        else:
            known_BS = mask_BS = None
        if known_BS is None or mask_BS is None:
            raise ValueError(
                "this predictor has an encoder; give PathContext.source_BS, or num_prefill_B where the model has "
                "no encoder of its own and the prompt is read"
            )
        return self.encoder(self.embedding(known_BS), mask_BS), mask_BS


def prompts_of(target_BT: Tensor, mask_BT: Tensor, num_prefill_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first num_prefill real tokens of rows padded on the left -> (known_BS, mask_BS) padded on the right."""
    begin_B = target_BT.shape[1] - mask_BT.sum(1)
    column_S = torch.arange(int(num_prefill_B.max()), device=target_BT.device)
    column_BS = (begin_B[:, None] + column_S).clamp(max=target_BT.shape[1] - 1)
    mask_BS = column_S < num_prefill_B[:, None]
    return target_BT.gather(1, column_BS).masked_fill(~mask_BS, 0), mask_BS


def _mask(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
