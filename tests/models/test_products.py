"""linear: the same product as F.linear, whichever operand the weight is, and in whichever type."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expertflow.models import products
from expertflow.models.products import FlatLinear, linear, linear_into, speed_up_dense, weight_first, widens

OUT, IN = 768, 704  # just above a MiB of bf16


def weight(dtype: torch.dtype = torch.bfloat16, out: int = OUT) -> torch.Tensor:
    return torch.randn(out, IN, generator=torch.Generator().manual_seed(0)).mul(0.05).to(dtype)


@pytest.fixture(params=["amx", "plain", "avx2"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All kinds of processor: the products of each run on any."""
    monkeypatch.setattr(products, "has_amx", lambda: request.param == "amx")
    monkeypatch.setattr(products, "halves_are_slow", lambda: request.param == "avx2")
    return request.param


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 8, 17, 64, 65])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_equals_the_exact_product_as_closely_as_f_linear_does(
    processor: str, num_rows: int, with_bias: bool, strided: bool
) -> None:
    rows = torch.randn(num_rows, IN, generator=torch.Generator().manual_seed(num_rows)).bfloat16()
    if strided:  # as the gate leaves the inner activations
        rows = rows.t().contiguous().t()
    W, bias = weight(), torch.randn(OUT).bfloat16() if with_bias else None
    exact = rows.double() @ W.double().t() + (bias.double() if bias is not None else 0)
    out = linear(rows, W, bias)
    assert out.shape == (num_rows, OUT)
    assert out.dtype == torch.bfloat16
    if num_rows:
        allowed = 1.2 * (F.linear(rows, W, bias).double() - exact).norm()
        assert (out.double() - exact).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_row_into_a_given_place_has_the_same_bits(processor: str, dtype: torch.dtype) -> None:
    row, W, out = torch.randn(1, IN).to(dtype), weight(dtype), torch.full((3, OUT), 7.0).to(dtype)
    linear_into(out[1], row, W)
    assert torch.equal(out[1], linear(row, W)[0])
    assert (out[[0, 2]] == 7).all()


def test_the_weight_goes_first_where_it_pays_and_nowhere_else(processor: str) -> None:
    assert weight_first(1, weight()) is (processor == "amx")
    assert weight_first(64, weight()) is (processor == "amx")
    assert not weight_first(65, weight())
    assert not weight_first(1, weight(torch.float32))
    assert not weight_first(1, weight(torch.float16))
    assert not weight_first(1, weight(out=16)), "small weights: the second call would cost more"
    assert not weight_first(1, weight().to("meta"))


def test_float32_is_f_linear_to_the_bit() -> None:
    rows, W = torch.randn(3, IN), weight(torch.float32)
    assert torch.equal(linear(rows, W), F.linear(rows, W))


@pytest.mark.parametrize(
    ("capabilities", "slow"),
    [
        ({"avx2": True}, True),
        ({"avx2": True, "avx512_f": False, "avx_ne_convert": False}, True),
        ({"avx2": True, "avx512_f": True}, False),
        ({"avx2": True, "avx_ne_convert": True}, False),
        ({}, False),
    ],
)
def test_halves_are_slow_with_avx2_and_nothing_newer(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], slow: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert products.halves_are_slow.__wrapped__() is slow


def test_without_tiles_or_a_word_on_them_nothing_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {"amx_tile": True, "amx_bf16": True}
    for capabilities, found in ((tiles, True), ({**tiles, "amx_bf16": False}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=capabilities: known, raising=False)
        assert products.has_amx.__wrapped__() is found
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert products.has_amx.__wrapped__() is False


def test_many_rows_go_in_float32_where_halves_are_slow_and_nowhere_else(processor: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert widens(4, weight(dtype)) is widens(999, weight(dtype, out=1)) is (processor == "avx2")
        assert not widens(3, weight(dtype)), "torch's own product of few rows takes less time"
    assert not widens(64, weight(torch.float32))
    assert not widens(64, weight().to("meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_bytes", [1, 3 * 4 * IN, 1 << 30])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_in_blocks_it_is_the_float32_product_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block_bytes: int, transposed: bool, with_bias: bool
) -> None:
    """Blocks of one line, of three (a last one of two left over), and the whole weight."""
    monkeypatch.setattr(products, "halves_are_slow", lambda: True)
    monkeypatch.setattr(products, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(products, "_scratch", threading.local())
    rows, bias = torch.randn(5, IN).to(dtype), torch.randn(50).to(dtype) if with_bias else None
    W = torch.randn(50, IN).mul(0.05).to(dtype)
    if transposed:
        W = W.t().contiguous().t()
    with torch.inference_mode():
        linear(rows, W, bias)  # scratch that was first got in inference mode can be used outside of it
    out = linear(rows, W, bias)
    exact = F.linear(rows.double(), W.double(), None if bias is None else bias.double())
    assert out.dtype == dtype
    # Half a unit in the last place, and what float32 sums are off.
    assert ((out.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-4).all()


def test_gradients_flow_where_halves_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "halves_are_slow", lambda: True)
    rows = torch.randn(8, IN).bfloat16().requires_grad_()
    linear(rows, weight()).float().sum().backward()
    torch.testing.assert_close(
        rows.grad, weight().float().sum(0).expand(8, -1).bfloat16(), rtol=0.02, atol=0.1
    )


def test_threads_do_not_share_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that compute at once would multiply with each other's weights, without an error."""
    monkeypatch.setattr(products, "halves_are_slow", lambda: True)
    places = []

    def note() -> None:
        linear(torch.randn(4, IN).bfloat16(), weight())
        places.append(products._scratch.flat.data_ptr())

    note()
    other = threading.Thread(target=note)
    other.start()
    other.join()
    assert len(set(places)) == 2


def test_a_slice_of_states_does_not_copy_the_weight(processor: str) -> None:
    """As logits of the last token are computed, of a model whose weights are frozen."""
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False)).bfloat16().requires_grad_(False)
    states = torch.randn(1, 5, IN).bfloat16()
    expected = linear(states[0, -1:], model[0].weight)
    allocated = {}
    for name in ("torch's", "ours"):
        with torch.profiler.profile(profile_memory=True) as profile:
            out = model(states[:, -1:])
        allocated[name] = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
        torch.testing.assert_close(out, expected[None], rtol=2e-2, atol=2e-2)
        speed_up_dense(model)
    assert torch.equal(out, expected[None])
    assert allocated["ours"] < model[0].weight.nbytes / 100
    if allocated["torch's"] < model[0].weight.nbytes:
        pytest.skip("torch does not copy it on this processor, so nothing was shown")


def test_dense_projections_keep_names_shapes_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_amx", lambda: True)
    monkeypatch.setattr(products, "halves_are_slow", lambda: False)

    class Special(nn.Linear):
        pass

    model = nn.ModuleDict(
        {"big": nn.Linear(IN, OUT), "small": nn.Linear(8, 8), "special": Special(IN, OUT)}
    ).bfloat16()
    names = list(model.state_dict())
    x = torch.randn(2, 3, IN).bfloat16()
    before = model["big"](x)
    assert speed_up_dense(model) == 1
    assert type(model["big"]) is FlatLinear
    assert type(model["special"]) is Special
    assert list(model.state_dict()) == names
    after = model["big"](x)
    assert after.shape == before.shape
    assert after.is_contiguous()
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)
    assert torch.equal(model["big"](x[0, :1]), model["big"](x[0, :1])), "deterministic"
    many = torch.randn(80, IN).bfloat16()
    assert torch.equal(model["big"](many), F.linear(many, model["big"].weight, model["big"].bias))
    with pytest.raises(RuntimeError, match="dtype"):
        model["big"](x.float())


def test_where_halves_are_slow_dense_projections_of_both_go_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "halves_are_slow", lambda: True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = nn.ModuleDict({"big": nn.Linear(IN, OUT), "small": nn.Linear(8, 8)}).to(dtype)
        x = torch.randn(2, 3, IN).to(dtype)
        assert speed_up_dense(model.requires_grad_(False)) == (dtype != torch.float32)
        alone = linear(x.flatten(0, 1), model["big"].weight, model["big"].bias)
        assert torch.equal(model["big"](x).flatten(0, 1), alone)
