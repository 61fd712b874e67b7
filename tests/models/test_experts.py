"""Grouping, padding and the fixed-order sum, on a plain in-memory stand-in for the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from expertflow.models import experts
from expertflow.models.experts import Attachment, Products, expertflow_experts, padded_rows, run_experts


class ScalingExperts:
    """Expert e multiplies by e + 1; hands experts out in reverse, as late arrivals would come."""

    def open_layer(
        self, layer: int, experts: Sequence[int], meanwhile: None = None
    ) -> Iterator[tuple[int, dict]]:
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


def test_every_index_is_made_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator one that is made later waits until all products are done, and the host with it."""
    happened: list[str] = []
    index = experts._index

    def made(rows: list[int], like: Tensor) -> Tensor:
        happened.append("index")
        return index(rows, like)

    def multiplied(rows: Tensor, weights: dict) -> Tensor:
        happened.append("product")
        return multiply(rows, weights)

    monkeypatch.setattr(experts, "_index", made)
    attachment = Attachment(ScalingExperts(), 0, 3)  # type: ignore[arg-type]
    index_TK = torch.tensor([[0, 1], [1, 3], [2, 0]])
    run_experts(attachment, torch.ones(3, 4), index_TK, torch.ones(3, 2), multiplied)
    assert happened == ["index"] * 3 + ["product"] * 3


def test_row_counts_collapse_to_a_few_sizes() -> None:
    """Each number of rows made oneDNN keep another kernel, 0.66 MiB apiece, outside the memory budget."""
    assert len({padded_rows(rows) for rows in range(1, 1025)}) <= 32
    for rows in range(1, 1025):
        assert rows <= padded_rows(rows) <= max(2 * rows - 2, 1) or padded_rows(rows) <= rows * 1.25
    assert [padded_rows(rows) for rows in (1, 2, 3, 8, 9, 16, 17, 33)] == [1, 2, 4, 8, 10, 16, 20, 40]


def module_of(
    width: int, hidden: int, act: str, has_gate: bool = True, count: int = 6, **flags
) -> tuple[SimpleNamespace, list]:
    """An experts module as transformers makes it, and the weights of `count` experts."""
    module = SimpleNamespace(
        has_gate=has_gate, has_bias=False, is_transposed=False, has_post_expert_norm=False, act_fn=ACT2FN[act]
    )
    module._apply_gate = partial(_default_apply_gate, module)
    vars(module).update(flags)
    draw = torch.Generator().manual_seed(width)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).mul_(0.05).bfloat16()

    first = "gate_up_proj" if has_gate else "up_proj"
    rows = 2 * width if has_gate else width
    return module, [
        {first: (random(rows, hidden),), "down_proj": (random(hidden, width),)} for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("act", "has_gate"), [("silu", True), ("gelu_pytorch_tanh", False), ("relu2", False), ("tanh", True)]
)
@pytest.mark.parametrize("width", [128, 640, 1408])
@pytest.mark.parametrize("amx", [True, False])
def test_one_row_gets_the_same_bits_from_experts_together_and_alone(act, has_gate, width, amx, monkeypatch):
    monkeypatch.setattr("expertflow.models.products.has_amx", lambda: amx)
    module, weights = module_of(width, 1024, act, has_gate)
    products = Products(module, frozenset())
    for seed, chosen in enumerate(([0, 1, 2, 3], [5, 4, 3, 2], [1, 5])):
        row = torch.randn(1, 1024, generator=torch.Generator().manual_seed(seed)).bfloat16()
        alone = torch.cat([products.multiply(row, weights[expert]) for expert in chosen])
        assert products.most_together >= len(chosen)
        together = products.together(row, [weights[expert] for expert in chosen])
        assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("width", "flags", "stored_transposed"),
    [
        (1000, {}, ()),  # odd elements at the end of a row
        (8192, {}, ()),  # an activation of four rows is divided among threads
        (640, {"act_fn": nn.Softmax(dim=0)}, ()),  # not each row's own
        (640, {"has_bias": True}, ()),
        (640, {"is_transposed": True}, ()),
        (640, {"has_post_expert_norm": True}, ()),
        (640, {}, ("down_proj",)),
    ],
)
def test_what_may_change_a_bit_is_not_done_together(width, flags, stored_transposed):
    module, weights = module_of(width, 1024, "silu", count=1, **flags)
    products = Products(module, frozenset(stored_transposed))
    with suppress(
        RuntimeError, AttributeError, KeyError
    ):  # some of these have no such bias or norm to compute with
        products.multiply(torch.ones(1, 1024).bfloat16(), weights[0])
    assert products.most_together < 4


class ResidentExperts(ScalingExperts):
    """All ready; counts the ways in."""

    def __init__(self, weights: list[dict]):
        self.weights, self.ways = weights, Counter[str]()

    def open_layer(
        self, layer: int, experts: Sequence[int], meanwhile: None = None
    ) -> Iterator[tuple[int, dict]]:
        self.ways["long"] += 1
        yield from ((expert, self.weights[expert]) for expert in reversed(experts))

    def open_ready(self, layer: int, experts: Sequence[int]) -> list[dict]:
        self.ways["short"] += 1
        return [self.weights[expert] for expert in experts]

    def close_ready(self) -> None:
        self.ways["closed"] += 1


def test_a_token_takes_the_short_way_and_gets_the_bits_of_the_long_one():
    module, weights = module_of(640, 1024, "silu")
    cache = ResidentExperts(weights)
    module.expertflow = Attachment(cache, 0, 6)  # type: ignore[arg-type]
    row, index = torch.randn(1, 1024).bfloat16(), torch.tensor([[4, 0, 3]])
    weight = torch.tensor([[0.5, 0.3, 0.2]]).bfloat16()
    long = expertflow_experts(module, row, index, weight)
    assert cache.ways == {"long": 1}, "the first token shows what the experts are like"
    short = expertflow_experts(module, row, index, weight)
    assert cache.ways == {"short": 1, "closed": 1, "long": 1}
    assert torch.equal(short, long)
    again = expertflow_experts(module, -row, index, weight)
    assert not torch.equal(again, short), "the scratch of the first call was handed out"


def test_any_grad_mode_after_any_other():
    """Scratch made in inference mode may not be written outside of it, and no gradient flows through any."""
    module, weights = module_of(640, 1024, "silu")
    cache = ResidentExperts(weights)
    module.expertflow = Attachment(cache, 0, 6)  # type: ignore[arg-type]
    row, index, weight = torch.randn(1, 1024).bfloat16(), torch.tensor([[1, 2]]), torch.ones(1, 2).bfloat16()
    with torch.inference_mode():
        expected = expertflow_experts(module, row, index, weight)
        assert torch.equal(expertflow_experts(module, row, index, weight), expected)
    with torch.no_grad():
        assert torch.equal(expertflow_experts(module, row, index, weight), expected)
    out = expertflow_experts(module, row.requires_grad_(), index, weight)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert row.grad.abs().sum() > 0
    weight.requires_grad_()
    outs = [expertflow_experts(module, row.detach() * scale, index, weight) for scale in (1, 2)]
    (outs[0] + outs[1]).float().sum().backward()
    assert weight.grad.abs().sum() > 0
    with torch.inference_mode():
        assert torch.equal(expertflow_experts(module, row.detach(), index, weight), expected)


def test_the_layer_is_closed_when_its_arithmetic_fails():
    module, weights = module_of(640, 1024, "silu")
    cache = ResidentExperts(weights)
    module.expertflow = Attachment(cache, 0, 6)  # type: ignore[arg-type]
    expertflow_experts(module, torch.randn(1, 1024).bfloat16(), torch.tensor([[1, 2]]), torch.ones(1, 2))
    with pytest.raises(RuntimeError):
        expertflow_experts(module, torch.randn(1, 7).bfloat16(), torch.tensor([[1, 2]]), torch.ones(1, 2))
    assert cache.ways["closed"] == 1
