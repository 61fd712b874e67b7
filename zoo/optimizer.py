"""Muon for hidden matrices, Adam for the rest, on float32 masters of the weights.

Muon orthogonalises the momentum of each matrix (Jordan et al., 2024); experts are stacks of matrices and go
through the same batched iteration. Gate and up halves of a fused projection are orthogonalised apart.
State is plain tensors by name, so that it is stored as safetensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ADAM_ONLY = (
    "embed",
    "lm_head",
    "shared.weight",
    "gate.weight",
    "shared_expert_gate",
    "router",
    "relative_attention",
)


@dataclass(frozen=True)
class OptimizerConfig:
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    # An expert sees K/E of the tokens, so its gradient is that much noisier: collecting two steps of it
    # loses nothing measurable and halves the most expensive part of the update.
    expert_every: int = 2


def orthogonalize(momentum_XRC: Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrix, roughly, of each of X matrices R x C, by a quintic Newton-Schulz iteration.

    dtype: of its products; bfloat16 is precise enough.
    """
    a, b, c = _COEFFICIENTS
    x_XRC = momentum_XRC.to(dtype)
    flip = x_XRC.shape[1] > x_XRC.shape[2]
    if flip:
        x_XRC = x_XRC.transpose(1, 2).contiguous()
    x_XRC = x_XRC / (x_XRC.float().flatten(1).norm(dim=1)[:, None, None] + 1e-7).to(x_XRC.dtype)
    for _ in range(steps):
        gram_XRR = x_XRC @ x_XRC.transpose(1, 2)
        poly_XRR = torch.baddbmm(gram_XRR, gram_XRR, gram_XRR, beta=b, alpha=c)
        x_XRC = torch.baddbmm(x_XRC, poly_XRR, x_XRC, beta=a)
    return x_XRC.transpose(1, 2) if flip else x_XRC


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """View a parameter as X matrices R x C; fused gate_up halves count as two."""
    if "gate_up_proj" in name:
        return tensor.reshape(-1, tensor.shape[-2] // 2, tensor.shape[-1])
    return tensor.reshape(-1, *tensor.shape[-2:])


def uses_muon(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and not any(part in name for part in _ADAM_ONLY)


def is_expert(name: str) -> bool:
    return ".experts." in name


class MasterOptimizer:
    """Owns float32 masters; `step` consumes the gradients and rewrites the model's weights."""

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, factors: Mapping[str, float] | None = None
    ) -> None:
        """factors: of the learning rate, for parameters whose name ends so; 1 for all others."""
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._factor = {
            name: next((factor for end, factor in (factors or {}).items() if name.endswith(end)), 1.0)
            for name in self.parameters
        }
        self.master = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.momentum: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self._muon_groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        self._adam: list[str] = []
        for name, p in self.parameters.items():
            self.momentum[name] = torch.zeros_like(self.master[name])
            if uses_muon(name, p):
                _, rows, columns = as_matrices(name, p).shape
                self._muon_groups[rows, columns].append(name)
            else:
                self._adam.append(name)
                self.second[name] = torch.zeros_like(self.master[name])
        self.steps = 0

    @torch.no_grad()
    def step(self, scale: float) -> float:
        """One update with all rates times `scale`; returns the gradient norm before clipping."""
        experts_too = (self.steps + 1) % self.config.expert_every == 0
        grads = {
            name: p.grad
            for name, p in self.parameters.items()
            if p.grad is not None and (experts_too or not is_expert(name))
        }
        norm = float(torch.stack([g.float().norm() for g in grads.values()]).norm())
        self.steps += 1
        if norm != norm or norm == float("inf"):
            return norm
        self._adam_step(grads, scale, min(1.0, self.config.clip_norm / (norm + 1e-12)))
        for shape, names in self._muon_groups.items():
            self._muon_step(shape, [name for name in names if name in grads], grads, scale)
        for name in grads:
            self.parameters[name].copy_(self.master[name])
            self.parameters[name].grad = None
        return norm

    @torch.no_grad()
    def drop_directions(self, directions: dict[str, Tensor], share: float) -> None:
        """Take `share` of the part along directions[name] [C] out of every row of the matrix `name` [R, C]."""
        for name, direction_C in directions.items():
            unit_C = direction_C / (direction_C.norm() + 1e-12)
            self.master[name].addr_(self.master[name] @ unit_C, unit_C, alpha=-share)
            self.parameters[name].copy_(self.master[name])

    def _adam_step(self, grads: dict[str, Tensor], scale: float, clip: float) -> None:
        c = self.config
        for name in self._adam:
            if name not in grads:
                continue
            grad = grads[name].float() * clip
            self.momentum[name].lerp_(grad, 1 - c.beta1)
            self.second[name].lerp_(grad.square_(), 1 - c.beta2)
            first = self.momentum[name] / (1 - c.beta1**self.steps)
            root = (self.second[name] / (1 - c.beta2**self.steps)).sqrt_().add_(1e-10)
            self.master[name].addcdiv_(first, root, value=-c.adam_lr * scale * self._factor[name])

    def _muon_step(
        self, shape: tuple[int, int], names: list[str], grads: dict[str, Tensor], scale: float
    ) -> None:
        c = self.config
        rate = c.muon_lr * scale * max(1.0, shape[0] / shape[1]) ** 0.5
        for batch in self._batches(names):
            momenta = []
            for name in batch:
                grad = grads[name].float()
                self.momentum[name].lerp_(grad, 1 - c.momentum)
                momenta.append(as_matrices(name, grad.lerp_(self.momentum[name], c.momentum)))
            # In the weights' own type: the one in which this machine multiplies fast.
            dtype = self.parameters[batch[0]].dtype
            updates_XRC = orthogonalize(torch.cat(momenta), dtype).float()
            for name, update_XRC in zip(batch, updates_XRC.split([len(m) for m in momenta]), strict=True):
                as_matrices(name, self.master[name]).add_(update_XRC, alpha=-rate * self._factor[name])

    def _batches(self, names: list[str]) -> Iterator[list[str]]:
        """Names in groups of about 64 matrices: fewer calls than one by one, and still in cache."""
        batch: list[str] = []
        matrices = 0
        for name in names:
            batch.append(name)
            matrices += len(as_matrices(name, self.master[name]))
            if matrices >= 64:
                yield batch
                batch, matrices = [], 0
        if batch:
            yield batch

    def state(self) -> dict[str, Tensor]:
        tensors = {f"master.{name}": t for name, t in self.master.items()}
        tensors |= {f"momentum.{name}": t for name, t in self.momentum.items()}
        tensors |= {f"second.{name}": t for name, t in self.second.items()}
        # Collected but not yet used: a run stopped between two updates of the experts.
        tensors |= {f"pending.{name}": p.grad for name, p in self.parameters.items() if p.grad is not None}
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Restore `state()`; every tensor must be present and of the same shape."""
        for name, tensor in self.state().items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ValueError(
                    f"the checkpoint has no {name} of shape {tuple(tensor.shape)}; was it another --arch?"
                )
            tensor.copy_(tensors[name])
        for name, p in self.parameters.items():
            p.copy_(self.master[name])
            p.grad = tensors.get(f"pending.{name}")
        self.steps = steps
