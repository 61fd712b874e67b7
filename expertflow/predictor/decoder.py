"""The causal stack, whole or column by column: both give the same states.

Each column sees the last `window` columns, itself included. So a step costs the same however long the text
is, and the keys and values of a stream fit a ring of `window` columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from expertflow.predictor.layers import Block, DistanceBias, blocked


@dataclass(frozen=True)
class Memory:
    """What the decoder looks up of an encoder: keys and values of each decoder layer, and who may be seen."""

    keys_XBHSF: Tensor  # X counts decoder layers
    values_XBHSF: Tensor
    mask_BS: Tensor

    def select(self, rows: Tensor) -> Memory:
        return Memory(self.keys_XBHSF[:, rows], self.values_XBHSF[:, rows], self.mask_BS[rows])


@dataclass
class PathState:
    """The decoder's keys and values of B sequences between passes. `RoutingPathPredictor.advance` updates it.

    Column c of a stream lies in place c % W. All rows advance together; rows may begin at different columns.
    """

    keys_XBHWF: Tensor
    values_XBHWF: Tensor
    seen_BW: Tensor  # bool: false for padding and for columns not yet written
    column: int  # the next one
    memory: Memory | None

    @property
    def num_rows(self) -> int:
        return self.seen_BW.shape[0]

    def select(self, rows: Tensor) -> PathState:
        """A state of these rows, in this order (int64); a row may be left out or repeated. Copies."""
        memory = None if self.memory is None else self.memory.select(rows)
        return replace(
            self,
            keys_XBHWF=self.keys_XBHWF[:, rows],
            values_XBHWF=self.values_XBHWF[:, rows],
            seen_BW=self.seen_BW[rows],
            memory=memory,
        )


class Decoder(nn.Module):
    def __init__(self, hidden: int, feed_forward: int, heads: int, layers: int, window: int, cross: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden, feed_forward, heads, cross) for _ in range(layers))
        self.bias = DistanceBias(heads, both_ways=False)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.heads, self.window = heads, window

    def remember(self, states_BSD: Tensor, mask_BS: Tensor) -> Memory:
        pairs = [block.cross.keys_values(states_BSD) for block in self.blocks]
        return Memory(torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs]), mask_BS)

    def forward(self, states_BTD: Tensor, mask_BT: Tensor, memory: Memory | None) -> Tensor:
        """All columns at once."""
        columns_T = torch.arange(states_BTD.shape[1], device=states_BTD.device)
        bias = self._bias(columns_T, columns_T, mask_BT)
        for layer, block in enumerate(self.blocks):
            normed_BTD = block.attention_norm(states_BTD)
            pair = block.attention.keys_values(normed_BTD)
            states_BTD = block.attend_and_feed(states_BTD, normed_BTD, pair, bias, _of_layer(memory, layer))
        return self.norm(states_BTD)

    def start(self, num_rows: int, memory: Memory | None) -> PathState:
        """A state that has seen nothing."""
        like = self.norm.weight
        shape = (len(self.blocks), num_rows, self.heads, self.window, like.shape[0] // self.heads)
        seen_BW = torch.zeros(num_rows, self.window, dtype=torch.bool, device=like.device)
        return PathState(like.new_zeros(shape), like.new_zeros(shape), seen_BW, 0, memory)

    def advance(self, state: PathState, states_BND: Tensor, mask_BN: Tensor) -> Tensor:
        """The next N columns; writes their keys and values into `state`."""
        num_new, window = states_BND.shape[1], self.window
        device = states_BND.device
        new_N = torch.arange(state.column, state.column + num_new, device=device)
        # The column that lies in each place of the ring, before the new ones are written.
        old_W = state.column - 1 - (state.column - 1 - torch.arange(window, device=device)) % window
        kept_N = new_N[-window:]
        if num_new == 1:
            # Overwriting first drops exactly the column that leaves the window: no copy of the ring.
            state.seen_BW[:, kept_N % window] = mask_BN
            old_W[kept_N % window] = kept_N
            columns_M, seen_BM = old_W, state.seen_BW
        else:
            columns_M, seen_BM = torch.cat([old_W, new_N]), torch.cat([state.seen_BW, mask_BN], 1)
        bias = self._bias(new_N, columns_M, seen_BM)
        for layer, block in enumerate(self.blocks):
            normed_BND = block.attention_norm(states_BND)
            keys, values = block.attention.keys_values(normed_BND)
            ring = (state.keys_XBHWF[layer], state.values_XBHWF[layer])
            if num_new > 1:
                pair = (torch.cat([ring[0], keys], 2), torch.cat([ring[1], values], 2))
            for place, fresh in zip(ring, (keys, values), strict=True):
                place[:, :, kept_N % window] = fresh[:, :, -window:]
            if num_new == 1:
                pair = ring
            states_BND = block.attend_and_feed(
                states_BND, normed_BND, pair, bias, _of_layer(state.memory, layer)
            )
        if num_new > 1:
            state.seen_BW[:, kept_N % window] = mask_BN[:, -window:]
        state.column += num_new
        return self.norm(states_BND)

    def _bias(self, query_N: Tensor, key_M: Tensor, seen_BM: Tensor) -> Tensor:
        """bias_BHNM: by distance, and nothing outside the window, in the future or in padding."""
        distance_NM = query_N[:, None] - key_M[None, :]
        near_NM = (distance_NM >= 0) & (distance_NM < self.window)
        bias_HNM = self.bias(query_N, key_M) + blocked(near_NM)
        return bias_HNM[None] + blocked(seen_BM)[:, None, None]


def _of_layer(memory: Memory | None, layer: int) -> tuple[Tensor, Tensor, Tensor] | None:
    if memory is None:
        return None
    bias_B11S = blocked(memory.mask_BS)[:, None, None]
    return memory.keys_XBHSF[layer], memory.values_XBHSF[layer], bias_B11S
