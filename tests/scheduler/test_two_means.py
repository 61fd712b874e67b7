from __future__ import annotations

import numpy as np
import pytest
import torch

from expertflow.scheduler.similarity import Paths, activated, similarity
from expertflow.scheduler.two_means import keep_names, split, two_means
from tests.scheduler.paths import brute_force, count_activated, predicted, random_paths


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 7, 16, 33])
@pytest.mark.parametrize("seed", range(3))
def test_balanced_and_never_worse_than_arrival_order(num_rows, seed):
    paths_NLE = random_paths(num_rows, seed)
    found = two_means(paths_NLE)
    assert sorted(row for rows in found.groups for row in rows) == list(range(num_rows))
    assert [len(rows) for rows in found.groups] == [(num_rows + 1) // 2, num_rows // 2]
    assert all(list(rows) == sorted(rows) for rows in found.groups)
    arrival = (tuple(range((num_rows + 1) // 2)), tuple(range((num_rows + 1) // 2, num_rows)))
    assert found.activated == count_activated(paths_NLE, found.groups)
    assert found.activated_in_arrival_order == count_activated(paths_NLE, arrival)
    assert found.kept_arrival_order == (found.groups == arrival)
    assert found.kept_arrival_order or found.activated < found.activated_in_arrival_order


def test_finds_two_kinds_that_arrive_in_turns():
    paths_NLE = torch.zeros(10, 2, 8, dtype=torch.bool)
    paths_NLE[0::2, :, :3] = True
    paths_NLE[1::2, :, 4:] = True
    assert two_means(paths_NLE).groups == ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9))


def slow_two_means(paths_NLE, rounds: int) -> set[frozenset[int]]:
    """The iteration, row by row, for even numbers of rows."""
    rows = range(len(paths_NLE))
    close = similarity(paths_NLE).tolist()
    medoids = min(((i, j) for i in rows for j in rows), key=lambda pair: close[pair[0]][pair[1]])
    found = []
    for _ in range(rounds):
        nearer = sorted(rows, key=lambda row: close[row][medoids[1]] - close[row][medoids[0]])
        groups = sorted(nearer[: len(rows) // 2]), sorted(nearer[len(rows) // 2 :])
        found.append((activated(paths_NLE, groups), groups))
        medoids = tuple(max(group, key=lambda row: sum(close[row][k] for k in group)) for group in groups)
    return {frozenset(rows) for rows in min(found, key=lambda pair: pair[0])[1]}


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_the_slow_obvious_iteration(seed):
    p_NLE = predicted(14, seed, kinds=3)
    found = two_means(p_NLE)
    assert not found.kept_arrival_order
    assert {frozenset(rows) for rows in found.groups} == slow_two_means(p_NLE, 20)


def test_keeps_arrival_order_where_splitting_does_not_help():
    """Paths without any likeness: what is least like is chance, and often the split is worse."""
    kept = 0
    for seed in range(40):
        found = two_means(random_paths(6, seed, kinds=6))
        assert found.activated <= found.activated_in_arrival_order
        kept += found.kept_arrival_order
    assert 0 < kept < 40


@pytest.mark.parametrize("value", [True, False])
def test_equal_paths_stay_in_arrival_order(value):
    found = two_means(torch.full((6, 2, 4), value))
    assert found.kept_arrival_order
    assert found.groups == ((0, 1, 2), (3, 4, 5))


def test_close_to_the_optimum_on_small_cases():
    """Of what the best split saves, two-means finds more than half: fewer would be chance (see the next test)."""
    saved = possible = 0
    for seed in range(20):
        paths_NLE = random_paths(10, seed)
        found, best = two_means(paths_NLE), brute_force(paths_NLE)
        assert found.activated >= best
        saved += found.activated_in_arrival_order - found.activated
        possible += found.activated_in_arrival_order - best
    assert saved > 0.6 * possible


def test_one_round_finds_less_than_many():
    """The option has an effect: medoids that are only the two rows least alike are worse ones."""
    one = many = 0.0
    for seed in range(20):
        paths_NLE = random_paths(24, seed, layers=4, experts=12)
        one += two_means(paths_NLE, max_rounds=1).activated
        many += two_means(paths_NLE).activated
    assert many < one


@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_rows_does_not_matter_without_ties(seed):
    p_NLE = predicted(12, seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    found, permuted = (
        split(paths, paths.similarity_NN(), np.arange(12), 6, 20)[0]
        for paths in (Paths(p_NLE), Paths(p_NLE[order]))
    )
    back = np.empty_like(permuted)
    back[order.numpy()] = permuted
    assert (back == found).all() or (back == 1 - found).all()


def test_the_same_twice():
    paths_NLE = random_paths(40, 3)
    assert two_means(paths_NLE) == two_means(paths_NLE.clone())


def test_groups_are_numbered_so_that_rows_stay():
    arrival_N = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    found_N = np.array([1, 1, 0, 0, 0, 1, 2, 2])
    assert keep_names(found_N, arrival_N, (3, 3, 2)).tolist() == [0, 0, 1, 1, 1, 0, 2, 2]
    # A group of two cannot take the name of a group of three, however many rows they share.
    assert keep_names(np.array([1, 1, 0, 0, 0]), np.array([0, 0, 0, 1, 1]), (3, 2)).tolist() == [
        1,
        1,
        0,
        0,
        0,
    ]
