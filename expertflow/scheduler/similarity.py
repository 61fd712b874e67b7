"""How alike routing paths are, and how many experts a grouping of them activates (paper, 3.3.1 and Eq. 2).

A path says which experts a row (a sequence's next token) needs. It is bool where it is known, or a probability
where it is predicted; then everything here is the expectation of what it is for known paths, the experts of a row
taken as independent of those of others. N rows, F = L * E experts of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NEARLY_CERTAIN = 0.999  # the largest probability whose logarithm of not being used we take
# Experts less likely than this count as not needed: grouping by 1e-3 saves as much within its noise (Qwen1.5 and
# Switch-32, two predictors each), by 0.2 less, and every swap costs in proportion to the experts that count.
_NEGLIGIBLE = 0.03
_CERTAIN_LOAD = 7.0 + 6.91  # needed but for 1e-3, even without the surest row
_WORTH_LEAVING_OUT = 0.9  # copying costs as much as carrying a tenth of unused experts along


class Paths:
    """Checked paths, laid out for grouping: F x N, experts that no row needs left out.

    A row's weight on an expert is 1 where a known path needs it, and -log(1 - p) for a probability, so that a
    group's load, the sum of its rows' weights, says how likely nobody needs the expert.
    """

    def __init__(self, paths_NLE: Tensor):
        """Raises ValueError unless paths_NLE is bool or float, 3-dimensional, and within [0, 1]."""
        check_paths(paths_NLE)
        self.num_rows = paths_NLE.shape[0]
        self.num_experts = paths_NLE.shape[1] * paths_NLE.shape[2]  # of all layers
        self.known = paths_NLE.dtype == torch.bool
        p_NF = paths_NLE.detach().cpu().flatten(1)
        if not self.known:
            p_NF = torch.nn.functional.threshold(p_NF.to(torch.float32), _NEGLIGIBLE, 0.0)
        used_NF = p_NF.numpy()
        used_F = np.atleast_1d(used_NF.any(0))
        if np.count_nonzero(used_F) < _WORTH_LEAVING_OUT * len(used_F):
            used_NF = used_NF[:, used_F]
        self.p_FN = np.ascontiguousarray(used_NF.T).astype(np.float32, copy=False)
        if self.known:
            self.weight_FN, self.weight_NF = self.p_FN, used_NF.view(np.int8)
        else:
            certain_FN = np.minimum(self.p_FN, np.float32(_NEARLY_CERTAIN))
            # Dividing by a row's probability of not needing an expert takes the row out of a product.
            self._without_FN = 1 / (1 - certain_FN)
            self.weight_FN = np.log(self._without_FN)
            self.weight_NF = np.ascontiguousarray(self.weight_FN.T)

    def others_absent(self, load_CG: np.ndarray, group_N: np.ndarray, experts_C: np.ndarray) -> np.ndarray:
        """others_CN: probability that nobody in a row's group but the row itself needs these experts."""
        if self.known:
            return (load_CG[:, group_N] == self.p_FN[experts_C]).astype(np.float32)
        return np.exp(-load_CG)[:, group_N] * self._without_FN[experts_C]

    def matters(self, least_load_C: np.ndarray) -> np.ndarray:
        """Whether one row may change that a group with this load needs the expert: mostly not, it is needed twice."""
        return least_load_C <= (1 if self.known else _CERTAIN_LOAD)

    def load_FG(self, group_N: np.ndarray, num_groups: int) -> np.ndarray:
        """Summed weights of each group; group_N: the group of each row."""
        member_NG = group_N[:, None] == np.arange(num_groups)
        return self.weight_FN @ member_NG.astype(np.float32)

    def activated(self, load_FG: np.ndarray) -> float:
        """Eq. 2 of groups with these loads. A whole number for known paths."""
        if self.known:
            return float(np.count_nonzero(load_FG))
        return float((1 - np.exp(-load_FG, dtype=np.float64)).sum())

    def similarity_NN(self) -> np.ndarray:
        """float32; with few enough experts (2**24) the counts behind it are exact."""
        both_NN = self.p_FN.T @ self.p_FN
        needs_N = self.p_FN.sum(0)
        hamming_NN = needs_N[:, None] + needs_N - 2 * both_NN
        np.fill_diagonal(hamming_NN, 0)
        return 1 - hamming_NN / np.float32(max(1, self.num_experts))


def check_paths(paths_NLE: Tensor) -> None:
    """Raises ValueError unless paths are N x L x E, and bool or probabilities."""
    shape, dtype = tuple(paths_NLE.shape), paths_NLE.dtype
    if paths_NLE.dim() != 3:
        raise ValueError(f"paths of shape {shape}: give rows x layers x experts")
    if dtype == torch.bool:
        return
    if not dtype.is_floating_point:
        raise ValueError(
            f"paths of shape {shape} are {dtype}; give bool, or probabilities as float (routes become paths by "
            f"core.routes_to_mask)"
        )
    if not paths_NLE.numel():
        return
    least, most = paths_NLE.aminmax()
    if not (least >= 0 and most <= 1):  # nan fails as well
        raise ValueError(f"paths of shape {shape} hold values outside of [0, 1]; probabilities are needed")


def similarity(paths_NLE: Tensor) -> Tensor:
    """S_ij = 1 - d_ij / (L E), d the Hamming distance of paths i and j (paper, 3.3.2); expected for probabilities.

    paths_NLE: bool, or float in [0, 1]. Returns similarity_NN, float32, symmetric, 1 on the diagonal.
    Raises ValueError for anything else.
    """
    return torch.from_numpy(Paths(paths_NLE).similarity_NN())


def activated(paths_NLE: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """Eq. 2: experts that each group needs, over all layers, summed over groups; expected for probabilities.

    groups: row indices. Raises ValueError unless every row is in exactly one of them.
    """
    paths = Paths(paths_NLE)
    return paths.activated(paths.load_FG(group_of_rows(groups, paths.num_rows), len(groups)))


def group_of_rows(groups: Sequence[Sequence[int]], num_rows: int) -> np.ndarray:
    """group_N. Raises ValueError unless the groups share all rows out among them."""
    rows = sorted(row for group in groups for row in group)
    if rows != list(range(num_rows)):
        raise ValueError(
            f"groups of {[len(group) for group in groups]} rows do not share out rows 0 to {num_rows - 1}"
        )
    group_N = np.zeros(num_rows, dtype=np.intp)
    for number, group in enumerate(groups):
        group_N[list(group)] = number
    return group_N
