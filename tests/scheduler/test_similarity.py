from __future__ import annotations

import itertools

import pytest
import torch

from expertflow.scheduler.similarity import activated, similarity
from tests.scheduler.paths import count_activated, predicted, random_paths


@pytest.mark.parametrize("seed", range(5))
def test_similarity_is_one_minus_the_share_of_experts_that_differ(seed):
    paths_NLE = random_paths(7, seed)
    found_NN = similarity(paths_NLE)
    for i, j in itertools.product(range(7), repeat=2):
        differ = int((paths_NLE[i] != paths_NLE[j]).sum())
        assert float(found_NN[i, j]) == pytest.approx(1 - differ / 24, abs=1e-7)


def test_similarity_counts_exactly_in_large_shapes():
    """Sums of bfloat16 or float16 would round from 257 or 2049 experts on."""
    paths_NLE = torch.ones(3, 32, 128, dtype=torch.bool)
    paths_NLE[1, 0, 0] = False
    paths_NLE[2] = False
    expected = torch.tensor([[0, 1, 4096], [1, 0, 4095], [4096, 4095, 0]])
    assert torch.equal(torch.round((1 - similarity(paths_NLE).double()) * 4096).long(), expected)


def test_similarity_of_predictions_is_its_expectation():
    p_NLE = predicted(2, 0, layers=1, experts=3)
    p_NLE[p_NLE < 0.03] = 0
    expected = 0.0
    for bits in itertools.product((0, 1), repeat=6):
        drawn_NE = torch.tensor(bits).view(2, 3)
        chance = torch.where(drawn_NE == 1, p_NLE[:, 0], 1 - p_NLE[:, 0]).prod()
        expected += float(chance) * (1 - int((drawn_NE[0] != drawn_NE[1]).sum()) / 3)
    assert float(similarity(p_NLE)[0, 1]) == pytest.approx(expected, abs=1e-6)
    assert similarity(p_NLE).diagonal().tolist() == [1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_activated_is_equation_two(seed):
    paths_NLE = random_paths(9, seed)
    groups = ((0, 4, 8), (2, 1), (3, 5, 6, 7))
    assert activated(paths_NLE, groups) == count_activated(paths_NLE, groups)


def test_activated_of_predictions_is_its_expectation():
    p_NLE = predicted(4, 1)
    p_NLE[p_NLE < 0.03] = 0
    groups = ((0, 2), (1, 3))
    expected = sum(float((1 - (1 - p_NLE[list(rows)]).prod(0)).sum()) for rows in groups)
    assert activated(p_NLE, groups) == pytest.approx(expected, rel=1e-5)


def test_predictions_that_are_sure_count_as_known_paths():
    paths_NLE = random_paths(6, 2)
    groups = ((0, 1, 2), (3, 4, 5))
    assert activated(paths_NLE.float(), groups) == pytest.approx(activated(paths_NLE, groups), rel=2e-3)


@pytest.mark.parametrize(
    ("paths", "what"),
    [
        (torch.zeros(4, 3, dtype=torch.bool), r"\(4, 3\)"),
        (torch.zeros(4, 3, 2, dtype=torch.int64), r"\(4, 3, 2\).*int64"),
        (torch.full((4, 3, 2), 1.5), r"\(4, 3, 2\).*outside"),
        (torch.full((4, 3, 2), float("nan")), r"\(4, 3, 2\).*outside"),
    ],
)
def test_malformed_paths_are_refused(paths, what):
    with pytest.raises(ValueError, match=what):
        similarity(paths)


@pytest.mark.parametrize("groups", [((0, 1), (1, 2)), ((0,), (1,)), ((0, 1, 2, 3),)])
def test_groups_share_out_all_rows(groups):
    with pytest.raises(ValueError, match="rows 0 to 2"):
        activated(random_paths(3, 0), groups)
