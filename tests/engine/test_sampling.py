"""What a request may ask for, and how its tokens are drawn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from expertflow.engine.logprobs import token_logprobs
from expertflow.engine.sampler import candidates, choose_token, gumbel_noise, penalize, penalize_written
from expertflow.engine.sampling import SamplingParams


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be a number at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0 must be a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": -1}, "min_p=-1 must be a number at least 0 and at most 1"),
        ({"top_k": -2}, "top_k=-2 must be a whole number of at least 0"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be a number above 0"),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number of at least 1; None fills the context"),
        ({"n": 0}, "n=0"),
        ({"n": 2, "temperature": 0}, "would be alike"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, r"below 2\*\*64"),
        ({"stop": [""]}, "stop='' must be text"),
        ({"stop": [3]}, "stop=3 must be text"),
        ({"stop_token_ids": [-1]}, "stop_token_ids=-1"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5 must be a number at least -2 and at most 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"logprobs": 21}, "logprobs=21 must be a whole number of at least 0 and at most 20"),
        ({"logprobs": True}, "logprobs=True"),
        ({"logit_bias": [1]}, r"logit_bias=\[1\] must have a bias for each token id"),
        ({"logit_bias": {"x": 1}}, "logit_bias of 'x': must be of token ids"),
        ({"logit_bias": {-1: 1}}, "logit_bias of -1"),
        ({"logit_bias": {3: "much"}}, "logit_bias of token 3 is 'much'; it must be a number"),
    ],
)
def test_wrong_values_are_refused_with_their_limit(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**wrong)


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=1)  # type: ignore[call-arg]


def test_vllms_spellings() -> None:
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(logit_bias={"7": 1000, 8: -1000}).logit_bias == {7: 100.0, 8: -100.0}
    assert SamplingParams(logit_bias={}).logit_bias is None


def random_logits(seed: int, vocabulary: int = 200) -> Tensor:
    return 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(top_k=1),
        SamplingParams(top_k=7),
        SamplingParams(top_k=1000),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=1e-6),
        SamplingParams(min_p=0.05),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=0.5, top_k=20, top_p=0.8, min_p=0.02),
    ],
)
def test_candidates_are_those_of_transformers(params: SamplingParams, seed: int) -> None:
    logits_V = random_logits(seed)
    warpers: list[LogitsProcessor] = (
        [TemperatureLogitsWarper(params.temperature)] if params.temperature != 1 else []
    )
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    expected_1V = logits_V[None].clone()
    for warper in warpers:
        expected_1V = warper(torch.zeros(1, 1, dtype=torch.long), expected_1V)

    ids_N, logits_N = candidates(logits_V / params.temperature, params)
    found_V = torch.full_like(logits_V, float("-inf"))
    found_V[ids_N] = logits_N
    torch.testing.assert_close(found_V, expected_1V[0])


def test_ties_at_the_threshold_of_top_k_all_stay() -> None:
    ids_N, _ = candidates(torch.tensor([1.0, 2.0, 1.0, 0.0]), SamplingParams(top_k=2))
    assert ids_N.tolist() == [0, 1, 2]


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits_V, seen = random_logits(3), [5, 9, 5, 17]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits_V[None].clone())
    assert torch.equal(penalize(logits_V, seen, 1.7), expected[0])
    assert torch.equal(logits_V, random_logits(3)), "the caller's logits were changed"


def adjusted(logits_V: Tensor, params: SamplingParams, seen: list[int], written: list[int]) -> list[float]:
    """The slow, obvious version: OpenAI's and vLLM's formulas, token by token."""
    out = []
    for token, logit in enumerate(logits_V.tolist()):
        logit += (params.logit_bias or {}).get(token, 0.0)
        if token in seen:
            penalty = params.repetition_penalty
            logit = logit * penalty if logit < 0 else logit / penalty
        count = written.count(token)
        logit -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
        out.append(logit)
    return out


@given(
    seed=st.integers(0, 50),
    written=st.lists(st.integers(0, 9), max_size=12),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.sampled_from([1.0, 1.6]),
    bias=st.dictionaries(st.integers(0, 9), st.floats(-100, 100), max_size=4),
)
def test_penalties_and_bias_are_those_of_the_formulas(
    seed: int,
    written: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
) -> None:
    logits_V = random_logits(seed, vocabulary=10).double()
    before = logits_V.clone()
    params = SamplingParams(
        temperature=0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
    )
    seen = [1, 2, *written]
    expected = adjusted(logits_V, params, seen, written)
    found = choose_token(logits_V, params, seed=0, answer=0, position=0, seen=seen, written=written)
    assert expected[found] == pytest.approx(max(expected), abs=1e-9)
    assert torch.equal(logits_V, before), "the caller's logits were changed"


def test_presence_counts_a_token_once_and_frequency_each_time() -> None:
    logits_V = torch.tensor([1.0, 1.0, 1.0])
    found_V = penalize_written(logits_V, [0, 0, 0, 2], presence=0.5, frequency=0.25)
    assert found_V.tolist() == [1 - 0.5 - 0.75, 1.0, 1 - 0.5 - 0.25]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits_V = random_logits(4, vocabulary=30)
    found = token_logprobs(logits_V, 7, 3)
    assert found is not None
    assert found.logprob == pytest.approx(math.log(logits_V.softmax(0)[7].item()), abs=1e-5)
    best = sorted(range(30), key=lambda token: -logits_V[token].item())[:3]
    assert [token for token, _ in found.top] == best
    assert [logprob for _, logprob in found.top] == pytest.approx(
        [math.log(logits_V.softmax(0)[token].item()) for token in best], abs=1e-5
    )
    assert token_logprobs(logits_V, 7, None) is None


def test_draws_follow_the_distribution() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0])
    draws = [
        choose_token(logits_V, SamplingParams(temperature=2.0), seed=7, answer=0, position=position, seen=[])
        for position in range(4000)
    ]
    found_V = torch.bincount(torch.tensor(draws), minlength=5) / len(draws)
    # The standard deviation of a frequency is at most 0.008 here.
    torch.testing.assert_close(found_V, (logits_V / 2).softmax(0), atol=0.025, rtol=0)


def test_a_filtered_token_is_never_drawn() -> None:
    logits_V = random_logits(1, vocabulary=50)
    allowed = set(logits_V.topk(3).indices.tolist())
    params = SamplingParams(top_k=3, temperature=5.0)
    drawn = {
        choose_token(logits_V, params, seed=1, answer=0, position=position, seen=[])
        for position in range(200)
    }
    assert drawn == allowed


def test_temperature_zero_is_greedy_after_the_penalty() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0])
    greedy = SamplingParams(temperature=0)
    assert choose_token(logits_V, greedy, seed=1, answer=0, position=0, seen=[]) == 1
    penalized = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert choose_token(logits_V, penalized, seed=1, answer=0, position=0, seen=[1]) == 2


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-39, 5e-324])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_temperature_next_to_zero_is_greedy(temperature: float, top_p: float) -> None:
    """Divided by it, logits are infinite: the first of them was taken."""
    logits_V = torch.tensor([1.0, 5.0, 20.0, 3.0])
    params = SamplingParams(temperature=temperature, top_p=top_p)
    assert choose_token(logits_V, params, seed=1, answer=0, position=0, seen=[]) == 2


def test_noise_belongs_to_seed_answer_position_and_token() -> None:
    noise = gumbel_noise(64, seed=1, answer=0, position=5)
    assert torch.equal(noise, gumbel_noise(64, seed=1, answer=0, position=5))
    assert torch.isfinite(noise).all()
    for other in ({"seed": 2}, {"answer": 1}, {"position": 6}):
        assert not torch.equal(noise, gumbel_noise(64, **{"seed": 1, "answer": 0, "position": 5, **other}))
    gumbel_noise(64, seed=2**64 - 1, answer=0, position=0)  # the largest seed that SamplingParams allows


def test_noise_never_changes_between_versions() -> None:
    """Texts that users reproduce by their seed hang on these numbers."""
    expected = torch.tensor(GOLDEN, dtype=torch.float64)
    torch.testing.assert_close(gumbel_noise(4, seed=42, answer=1, position=3), expected, atol=1e-12, rtol=0)


GOLDEN = [-0.3261606121322238, 2.5853847556723464, 0.9538584261315007, 2.1463564717019943]
