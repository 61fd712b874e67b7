from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from expertflow.core import routes_to_mask
from expertflow.scheduler.group import group, refine_by_swaps
from expertflow.scheduler.similarity import _UNFELT, Paths, activated
from expertflow.scheduler.swaps import _Search, swap_while_it_pays
from expertflow.scheduler.two_means import two_means
from tests.scheduler.paths import brute_force, count_activated, predicted, random_paths


def test_the_papers_worked_example():
    """Fig. 3: one layer of four experts, two batches of four tokens; every batch needs every expert. Two-means cannot
    tell which experts belong together here (all are equally unlike), and saves 2 of the 4.
    """
    paths_NLE = routes_to_mask(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]).view(8, 1, 1), 4)
    found = group(paths_NLE)
    assert found.activated_in_arrival_order == 8
    assert found.activated == 4 == brute_force(paths_NLE)
    assert found.moved == 4
    for rows in found.groups:
        assert len(rows) == 4
        assert len({row % 4 for row in rows}) == 2  # each expert has two tokens, both in one batch
    assert two_means(paths_NLE).activated == 6


def exchanged(groups, i, j):
    return [[j if row == i else i if row == j else row for row in rows] for rows in groups]


def assert_search_is_right(search: _Search, paths_NLE, num_groups: int, moving_NG) -> None:
    """Every change the search knows of, against Eq. 2 and costs counted anew."""
    tolerance = 1e-6 if paths_NLE.dtype == torch.bool else 5 * _UNFELT
    groups = [np.flatnonzero(search.group_N == g).tolist() for g in range(num_groups)]

    def objective(groups):
        return activated(paths_NLE, groups) + sum(
            float(moving_NG[row, g]) for g, rows in enumerate(groups) for row in rows
        )

    here = objective(groups)
    assert search.objective == pytest.approx(here, abs=tolerance)
    change_NN = search.change_NN()
    for i, j in itertools.combinations(range(len(paths_NLE)), 2):
        if search.group_N[i] == search.group_N[j]:
            assert change_NN[i, j] > 1e5
        else:
            expected = objective(exchanged(groups, i, j)) - here
            assert change_NN[i, j] == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("make", [random_paths, predicted])
@pytest.mark.parametrize("num_groups", [2, 3])
def test_changes_by_swapping_equal_recomputed_ones(make, num_groups):
    paths_NLE = make(9, 4)
    draw = np.random.default_rng(0)
    group_N = draw.permutation(np.arange(9) % num_groups)
    moving_NG = draw.integers(0, 8, (9, num_groups)).astype(np.float32)
    search = _Search(Paths(paths_NLE), group_N, num_groups, moving_NG)
    assert_search_is_right(search, paths_NLE, num_groups, moving_NG)
    for _ in range(12):
        i, j = draw.permutation(9)[:2]
        if search.group_N[i] != search.group_N[j]:
            search.swap(int(i), int(j), float(search.change_NN()[i, j]))
            assert_search_is_right(search, paths_NLE, num_groups, moving_NG)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_groups", [2, 4])
def test_swaps_end_where_no_swap_helps(seed, num_groups):
    paths_NLE = random_paths(16, seed)
    start = [list(part) for part in np.array_split(np.arange(16), num_groups)]
    found = refine_by_swaps(paths_NLE, start, max_swaps=1000)
    reached = count_activated(paths_NLE, found)
    assert reached < count_activated(paths_NLE, start)
    assert [len(rows) for rows in found] == [len(rows) for rows in start]
    for i, j in itertools.combinations(range(16), 2):
        assert count_activated(paths_NLE, exchanged(found, i, j)) >= reached


def test_swaps_are_bounded_and_each_one_counts():
    paths = Paths(random_paths(24, 0))
    start_N = np.arange(24) // 12
    reached = [swap_while_it_pays(paths, start_N, 2, None, limit, 0) for limit in (0, 1, 2, 1000)]
    assert [found.swaps for found in reached[:3]] == [0, 1, 2]
    assert reached[0].objective > reached[1].objective > reached[2].objective > reached[3].objective
    assert 2 < reached[3].swaps < 1000
    assert (reached[0].group_N == start_N).all()


def test_patience_leaves_local_optima_and_never_loses():
    at_once = patient = 0
    for seed in range(10):
        paths_NLE = random_paths(24, seed)
        start = [range(12), range(12, 24)]
        plain = count_activated(paths_NLE, refine_by_swaps(paths_NLE, start, 1000))
        further = count_activated(paths_NLE, refine_by_swaps(paths_NLE, start, 1000, patience=12))
        assert further <= plain
        at_once, patient = at_once + plain, patient + further
    assert patient < at_once


def test_rows_that_were_swapped_rest():
    """Else the way out of a local optimum is the way back in: the same two rows for ever."""
    seen = []

    class Watched(_Search):
        def swap(self, i, j, change):
            seen.append(frozenset((i, j)))
            super().swap(i, j, change)

    paths = Paths(random_paths(24, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expertflow.scheduler.swaps._Search", Watched)
        swap_while_it_pays(paths, np.arange(24) // 12, 2, None, 1000, patience=40)
    assert len(seen) > 40
    assert all(not first & second for first, second in itertools.pairwise(seen[-40:]))


def test_two_groups_of_ten_come_within_a_hundredth_of_the_optimum():
    found = best = 0
    for seed in range(20):
        paths_NLE = random_paths(10, seed)
        here, least = group(paths_NLE).activated, brute_force(paths_NLE)
        assert here >= least
        found, best = found + here, best + least
    assert found <= 1.01 * best


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
@pytest.mark.parametrize("make", [random_paths, predicted])
def test_any_number_of_groups(num_rows, num_groups, make):
    paths_NLE = make(num_rows, 7)
    found = group(paths_NLE, num_groups)
    sizes = [len(rows) for rows in found.groups]
    assert len(sizes) == num_groups
    assert max(sizes) - min(sizes) <= 1
    assert sorted(row for rows in found.groups for row in rows) == list(range(num_rows))
    assert found.activated <= found.activated_in_arrival_order
    assert found.activated == pytest.approx(activated(paths_NLE, found.groups), abs=1e-6)


def test_a_queue_becomes_units_of_alike_sequences():
    paths_NLE = torch.zeros(16, 2, 16, dtype=torch.bool)
    for row in range(16):
        paths_NLE[row, :, 4 * (row % 4) : 4 * (row % 4) + 4] = True
    found = group(paths_NLE, 4)
    assert {frozenset(row % 4 for row in rows) for rows in found.groups} == {frozenset([n]) for n in range(4)}
    assert (found.activated_in_arrival_order, found.activated) == (128, 32)


def test_sizes_are_kept():
    found = group(random_paths(11, 1), sizes=(5, 2, 4))
    assert [len(rows) for rows in found.groups] == [5, 2, 4]
    assert found.activated < found.activated_in_arrival_order


def test_without_swaps_it_is_two_means():
    with_swaps = without = 0.0
    for seed in range(10):
        paths_NLE = random_paths(24, seed)
        bare = group(paths_NLE, max_swaps=0)
        assert bare.swaps == 0
        without, with_swaps = without + bare.activated, with_swaps + group(paths_NLE).activated
    assert with_swaps < without


@pytest.mark.parametrize("seed", range(6))
def test_no_more_rows_move_than_the_groups_ask_for(seed):
    """Calling the groups by each other's names would move all the others."""
    assert group(random_paths(20, seed), max_swaps=0).moved <= 10


def test_moving_costs():
    """A row moves only where that saves more experts than it costs."""
    paths_NLE = random_paths(20, 5)
    free = group(paths_NLE, cost_of_moving_N=torch.zeros(20))
    dear = group(paths_NLE, cost_of_moving_N=torch.full((20,), 1000.0))
    some = group(paths_NLE, cost_of_moving_N=torch.full((20,), 0.5))
    assert dear.kept_arrival_order
    assert dear.activated == dear.activated_in_arrival_order
    assert 0 < some.moved <= free.moved
    assert some.activated + 0.5 * some.moved < some.activated_in_arrival_order
    pinned = torch.zeros(20)
    pinned[:5] = float("inf")
    assert set(range(5)) <= set(group(paths_NLE, cost_of_moving_N=pinned).groups[0])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rounds_of_swaps", [0, 20])
def test_it_never_costs_more_than_it_saves(seed, rounds_of_swaps):
    cost = 0.2 + 0.1 * (seed % 10)
    paths_NLE = random_paths(12, seed)
    found = group(paths_NLE, cost_of_moving_N=torch.full((12,), cost), max_swaps=rounds_of_swaps)
    assert found.activated + cost * found.moved <= found.activated_in_arrival_order + 1e-4


def test_the_same_twice_on_paths_full_of_ties():
    paths_NLE = random_paths(30, 2, layers=1, experts=4, top_k=1)
    assert group(paths_NLE, 3) == group(paths_NLE.clone(), 3)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"num_groups": 0}, "num_groups=0"),
        ({"sizes": (3, 2)}, r"\(3, 2\) do not take 6"),
        ({"sizes": (7, -1)}, r"\(7, -1\) do not take 6"),
        ({"cost_of_moving_N": torch.zeros(5)}, r"\(5,\).*6 costs"),
        ({"cost_of_moving_N": -torch.ones(6)}, "none below 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, what):
    with pytest.raises(ValueError, match=what):
        group(random_paths(6, 0), **arguments)
