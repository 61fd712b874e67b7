"""Grouping, padding and the fixed-order sum, on a plain in-memory stand-in for the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from expertflow.models.experts import Attachment, padded_rows, run_experts


class ScalingExperts:
    """Expert e multiplies by e + 1; hands experts out in reverse, as late arrivals would come."""

    def open_layer(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, dict]]:
        for expert in reversed(experts):
            yield expert, {"scale": (torch.tensor(expert + 1.0),)}


def multiply(rows: Tensor, weights: dict) -> Tensor:
    return rows * weights["scale"][0].to(rows.dtype)


def brute_force(hidden: Tensor, index: Tensor, weight: Tensor, num_experts: int) -> Tensor:
    out = torch.zeros_like(hidden)
    for token in range(hidden.shape[0]):
        for k in range(index.shape[1]):
            if index[token, k] < num_experts:
                out[token] += weight[token, k] * hidden[token] * (index[token, k] + 1)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 4), (3, 2), (40, 4)])
def test_each_token_gets_its_experts_whatever_the_order(tokens: int, top_k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 6, generator=generator).to(dtype)
    index = torch.rand(tokens, 7, generator=generator).topk(top_k).indices
    weight = torch.rand(tokens, top_k, generator=generator).to(dtype)
    attachment = Attachment(ScalingExperts(), 0, 7)  # type: ignore[arg-type]
    out = run_experts(attachment, hidden, index, weight, multiply)
    expected = brute_force(hidden.float(), index, weight.float(), 7)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.float(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2
    )


def test_dropped_tokens_get_exactly_zero_even_with_a_useless_weight() -> None:
    attachment = Attachment(ScalingExperts(), 0, 7)  # type: ignore[arg-type]
    index = torch.tensor([[7, 7], [2, 7]])
    weight = torch.tensor([[float("inf"), 1.0], [1.0, float("nan")]])
    out = run_experts(attachment, torch.ones(2, 3), index, weight, multiply)
    assert out.tolist() == [[0, 0, 0], [3, 3, 3]]
    out = run_experts(attachment, torch.ones(2, 3), torch.full((2, 2), 7), weight, multiply)
    assert out.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_row_counts_collapse_to_a_few_sizes() -> None:
    """Each number of rows made oneDNN keep another kernel, 0.66 MiB apiece, outside the memory budget."""
    assert len({padded_rows(rows) for rows in range(1, 1025)}) <= 32
    for rows in range(1, 1025):
        assert rows <= padded_rows(rows) <= max(2 * rows - 2, 1) or padded_rows(rows) <= rows * 1.25
    assert [padded_rows(rows) for rows in (1, 2, 3, 8, 9, 16, 17, 33)] == [1, 2, 4, 8, 10, 16, 20, 40]
