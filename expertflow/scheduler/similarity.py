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
# What an expert can add to the worth of any swap, below which it is left out of it (of about one expert saved by a
# swap that pays): 1,508 of 2,736 experts in the uniform case of `benchmarks.grouping`.
_UNFELT = 2e-3
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
        used_F = torch.from_numpy(p_NF.numpy().any(0))
        if int(used_F.sum()) < _WORTH_LEAVING_OUT * len(used_F):
            p_NF = p_NF[:, used_F]
        p_FN = p_NF.t().contiguous().to(torch.float32)
        self.p_FN = self.weight_FN = p_FN.numpy()
        if not self.known:
            # Dividing by a row's probability of not needing an expert takes the row out of a product.
            without_FN = (1 - p_FN.clamp(max=_NEARLY_CERTAIN)).reciprocal_()
            self._without_FN = without_FN.numpy()
            self.weight_FN = without_FN.log().numpy()
            worth_F = without_FN.numpy().max(1, initial=1) * self.p_FN.max(1, initial=0)
            self._unfelt_F = _UNFELT / np.maximum(worth_F, np.float32(_UNFELT))

    def others_absent(self, load_FG: np.ndarray, group_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """others_CN, experts_C: probability that nobody in a row's group but the row itself needs these experts.

        Experts are left out that somebody else needs anyway, whichever row one looks at.
        """
        if self.known:
            experts_C = np.flatnonzero(load_FG.min(1) <= 1)
            others_CN = load_FG[experts_C][:, group_N] == self.p_FN[experts_C]
            return others_CN.astype(np.float32), experts_C
        absent_FG = np.exp(-load_FG)
        experts_C = np.flatnonzero(absent_FG.max(1) > self._unfelt_F)
        return self._around(absent_FG[experts_C], group_N, experts_C), experts_C

    def others_change(
        self, before_CG: np.ndarray, after_CG: np.ndarray, group_N: np.ndarray, experts_C: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """difference_DN, experts_D: by how much others_absent changes as loads do, where that is felt."""
        if self.known:
            felt_C = np.minimum(before_CG, after_CG).min(1) <= 1
            before_DG, after_DG, experts_D = before_CG[felt_C], after_CG[felt_C], experts_C[felt_C]
            own_DN = self.p_FN[experts_D]
            is_DN, was_DN = after_DG[:, group_N] == own_DN, before_DG[:, group_N] == own_DN
            return is_DN.astype(np.float32) - was_DN, experts_D
        change_CG = np.exp(-after_CG) - np.exp(-before_CG)
        felt_C = np.abs(change_CG).max(1) > self._unfelt_F[experts_C]
        return self._around(change_CG[felt_C], group_N, experts_C[felt_C]), experts_C[felt_C]

    def _around(self, factor_CG: np.ndarray, group_N: np.ndarray, experts_C: np.ndarray) -> np.ndarray:
        """factor of each row's group, the row itself left out. A product picks columns faster than an index."""
        in_group_GN = (np.arange(factor_CG.shape[1])[:, None] == group_N).astype(np.float32)
        around_CN = factor_CG @ in_group_GN
        around_CN *= self._without_FN[experts_C]
        return around_CN

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
