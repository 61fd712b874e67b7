"""Local search on Eq. 2: swap two rows of different groups while that activates fewer experts.

The best swap comes from one matrix. Let others_if be the probability (0 or 1 for known paths) that nobody else in
row i's group needs expert f, and reach_ij = sum over f of others_if * p_jf: what row j would activate anew in
row i's place. Then swapping i and j changes Eq. 2 by

    reach_ij + reach_ji - reach_ii - reach_jj

After a swap i stands where j stood, so their rows of `others` and `reach` change places; for everybody else only
the experts that exactly one of the two needs have changed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from expertflow.scheduler.similarity import Paths

_NEVER = np.float32(1e6)  # more than any swap can cost: added to swaps that are not allowed
_NOTHING = 1e-3  # changes of expected Eq. 2 below this are rounding
# A swapped row rests for N / 8 swaps. N / 16 and N / 4 come within 0.2 points of it (docs/log.md).
_RESTING_SHARE = 8


class Swapped(NamedTuple):
    group_N: np.ndarray
    objective: float  # Eq. 2, and what moving costs
    swaps: int  # tried, the useless ones too


def swap_while_it_pays(
    paths: Paths,
    group_N: np.ndarray,
    num_groups: int,
    moving_NG: np.ndarray | None,
    max_swaps: int,
    patience: int,
) -> Swapped:
    """The best assignment found by swapping rows, never worse than the one given. Group sizes stay.

    moving_NG: what it costs to put a row into a group, in experts. max_swaps bounds the work. patience: how many
    swaps in a row may be for the worse, the least bad ones, to get out of a local optimum (tabu search: a row that
    has been swapped then rests for a while). With 0 the search ends at the first local optimum. Deterministic; ties
    go to the first rows.
    """
    search = _Search(paths, group_N, num_groups, moving_NG)
    num_rows = len(group_N)
    best_N, best, found_at = group_N.copy(), search.objective, 0
    resting_until_N = np.zeros(num_rows, dtype=np.intp)
    done = 0
    while num_rows > 1 and done < max_swaps:
        change_NN = search.change_NN()
        i, j = divmod(int(change_NN.argmin()), num_rows)
        change = float(change_NN[i, j])
        if search.objective + change >= best - _NOTHING:
            if done - found_at >= patience:
                break
            resting_N = resting_until_N > done
            change_NN[resting_N] = _NEVER
            change_NN[:, resting_N] = _NEVER
            i, j = divmod(int(change_NN.argmin()), num_rows)
            change = float(change_NN[i, j])
            if change >= _NEVER:  # one group, or everybody rests
                break
        search.swap(i, j, change)
        done += 1
        resting_until_N[[i, j]] = done + max(1, num_rows // _RESTING_SHARE)
        if search.objective < best - _NOTHING:
            best_N, best, found_at = search.group_N.copy(), search.objective, done
    return Swapped(best_N, best, done)


class _Search:
    """One assignment of rows to groups, and the change of the objective by every swap."""

    def __init__(self, paths: Paths, group_N: np.ndarray, num_groups: int, moving_NG: np.ndarray | None):
        self.paths, self.group_N, self.moving_NG = paths, group_N.copy(), moving_NG
        self.load_FG = paths.load_FG(group_N, num_groups)
        others_CN, experts_C = paths.others_absent(self.load_FG, group_N)
        self.reach_NN = others_CN.T @ paths.p_FN[experts_C]
        self.forbidden_NN = np.where(group_N[:, None] == group_N, _NEVER, np.float32(0))
        self.objective = paths.activated(self.load_FG)
        if moving_NG is not None:
            self.objective += float(moving_NG[np.arange(len(group_N)), group_N].sum())

    def change_NN(self) -> np.ndarray:
        """How the objective changes by swapping i and j; at least _NEVER within a group."""
        own_N = self.reach_NN.diagonal()
        change_NN = self.reach_NN + self.reach_NN.T
        change_NN += self.forbidden_NN
        change_NN -= own_N
        change_NN -= own_N[:, None]
        if self.moving_NG is not None:
            there_NN = (
                self.moving_NG[:, self.group_N] - self.moving_NG[np.arange(len(own_N)), self.group_N][:, None]
            )
            change_NN += there_NN + there_NN.T
        return change_NN

    def swap(self, i: int, j: int, change: float) -> None:
        g, h = self.group_N[i], self.group_N[j]
        gained_F = self.paths.weight_FN[:, j] - self.paths.weight_FN[:, i]
        changed = np.flatnonzero(gained_F)
        gained_C = gained_F[changed]
        before_CG = self.load_FG[changed]
        after_CG = before_CG.copy()
        after_CG[:, g] += gained_C
        after_CG[:, h] -= gained_C
        self.load_FG[changed] = after_CG
        self.group_N[i], self.group_N[j] = h, g
        self.objective += change
        for rows in (self.reach_NN, self.forbidden_NN, self.forbidden_NN.T):
            rows[[i, j]] = rows[[j, i]]
        difference_DN, felt = self.paths.others_change(before_CG, after_CG, self.group_N, changed)
        difference_DN[:, [i, j]] = 0  # what was around i is now around j, and has not changed
        self.reach_NN += difference_DN.T @ self.paths.p_FN[felt]
