"""A row of numbers per token, and what the model's own embedding says of tokens that training hardly showed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FOLDED_ROWS = 16_384  # at a time
_RIDGE = 0.02  # share of the mean curvature: little, since there are many tokens for each of D numbers


class Table(nn.Embedding):
    """A row for each of `vocab_size` tokens, and a last one for "never seen".

    Anchored, while it is trained: a token's row is its own plus a linear function of the model's embedding of
    it, so what is learnt of one token is half known of its neighbours, and a token that training never showed
    is not nameless. `fold` then adds the two: a trained table costs no more bytes, nor time, than another.

    Training hides tokens now and then (`hide`), so that the last row means something.
    """

    def __init__(self, vocab_size: int, width: int):
        super().__init__(vocab_size + 1, width)
        self.project: nn.Linear | None = None
        self._anchor_VD: Tensor | None = None  # shared by the tables, no parameter of any

    def hide(self, ids: Tensor) -> Tensor:
        """Ids that stand for the same tokens, as if they had never been seen."""
        return ids + self.num_embeddings

    def anchor(self, anchor_VD: Tensor, std: float) -> None:
        """anchor_VD: numbers of about unit size for each token. std: of the function of them, at the start."""
        self._anchor_VD = anchor_VD
        self.project = nn.Linear(anchor_VD.shape[1], self.embedding_dim, bias=False)
        nn.init.normal_(self.project.weight, std=std * anchor_VD.shape[1] ** -0.5)
        nn.init.zeros_(self.weight)

    def explain(self, seen_U: Tensor, times_U: Tensor) -> None:
        """Move what the anchor can say of these rows into its function (ridge regression): the sums stay."""
        if self.project is None or self._anchor_VD is None:
            return
        x_UD, weight_U1 = self._anchor_VD[seen_U].float(), times_U[:, None].float()
        gram_DD = x_UD.T @ (x_UD * weight_U1)
        gram_DD += _RIDGE * gram_DD.diagonal().mean() * torch.eye(len(gram_DD))
        with torch.no_grad():
            self.project.weight.copy_(
                torch.linalg.solve(gram_DD, x_UD.T @ (self.weight[seen_U] * weight_U1)).T
            )
            self.weight[seen_U] -= self.project(x_UD)

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids.clamp(max=self.num_embeddings - 1)).float()
        if self.project is not None and self._anchor_VD is not None:
            rows = rows + self.project(self._anchor_VD[ids % self.num_embeddings].float())
        return rows

    @torch.no_grad()
    def fold(self) -> None:
        if self.project is None or self._anchor_VD is None:
            return
        for rows in torch.arange(self.num_embeddings).split(_FOLDED_ROWS):
            self.weight[rows] += self.project(self._anchor_VD[rows].float())
        self.project = self._anchor_VD = None


def anchor_of(embedding_VD: Tensor, vocab_size: int) -> Tensor:
    """The model's input embedding as an anchor, in bfloat16: centred, of unit size, zero for "never seen".

    Embeddings may have more rows than the vocabulary (padding), or fewer; missing rows are zero.
    """
    known_VD = embedding_VD[:vocab_size].detach().float()
    mean_D = known_VD.mean(0)
    scale = 1 / (known_VD - mean_D).std().clamp(min=1e-12)
    anchor_VD = torch.zeros(vocab_size + 1, embedding_VD.shape[1], dtype=torch.bfloat16)
    anchor_VD[: len(known_VD)] = ((known_VD - mean_D) * scale).to(torch.bfloat16)
    return anchor_VD
