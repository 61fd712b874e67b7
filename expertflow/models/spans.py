"""Where each expert's bytes lie, derived from transformers' own conversion mapping.

There is no table of families here. transformers knows which checkpoint tensor feeds which parameter
(renamings and converters); this file replays that for the experts' parameters and reads off the byte
range of each expert: one tensor per expert and projection, or a row of one packed tensor per layer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from expertflow.core import ExpertId
from expertflow.models.switch import find_modulelist_experts
from expertflow.store.checkpoint import Checkpoint, TensorSpan
from expertflow.store.layout import Part


@dataclass(frozen=True, slots=True)
class MoELayer:
    """One experts module of a model; `layer` counts MoE layers in the order of the module tree."""

    layer: int
    name: str
    module: nn.Module
    num_experts: int
    # role -> shape of one expert's parameter; a role is the parameter's name within the module.
    role_shapes: Mapping[str, tuple[int, ...]]
    one_module_per_expert: bool  # Switch and NLLB: ModuleDict "expert_0", "expert_1", ...

    def parameter_names(self) -> list[str]:
        """Qualified names, as in the model's state dict."""
        if self.one_module_per_expert:
            return [f"{self.name}.{name}" for name, _ in self.module.named_parameters()]
        return [f"{self.name}.{role}" for role in self.role_shapes]


@dataclass(frozen=True, slots=True)
class ExpertSpans:
    """What the store and the arithmetic need to know of a checkpoint's experts."""

    parts: Mapping[ExpertId, tuple[Part, ...]]
    # Roles stored as [out, in] where the module multiplies by [in, out], or the other way round.
    stored_transposed: frozenset[str]
    # Checkpoint keys that hold experts: the loader must not read them, nor report them as unexpected.
    checkpoint_keys: frozenset[str]


def find_moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """Every experts module, in order. Empty for a dense model.

    Knows transformers' experts interface (`use_experts_implementation`) and Switch/NLLB's module dicts.
    """
    layers: list[MoELayer] = []
    modulelists = dict(find_modulelist_experts(model))
    for name, module in model.named_modules():
        if name in modulelists:
            # NLLB keeps its token dropout among the experts.
            experts = [child for name, child in module.named_children() if name.startswith("expert_")]
            role_shapes = {role: tuple(p.shape) for role, p in experts[0].named_parameters()}
            layers.append(MoELayer(len(layers), name, module, len(experts), role_shapes, True))
        elif hasattr(module, "has_gate") and hasattr(module, "_apply_gate") and hasattr(module, "down_proj"):
            shapes = {role: tuple(p.shape) for role, p in module.named_parameters(recurse=False)}
            num_experts = shapes["down_proj"][0]
            packed = {role: shape[1:] for role, shape in shapes.items() if shape[0] == num_experts}
            layers.append(MoELayer(len(layers), name, module, num_experts, packed, False))
    return layers


def derive_expert_spans(
    model: PreTrainedModel, moe_layers: Sequence[MoELayer], checkpoint: Checkpoint
) -> ExpertSpans:
    """Map every expert of `model` (on meta, its experts still in place) to byte ranges of `checkpoint`.

    Raises ValueError, naming the tensor and its file, for a missing tensor, a wrong shape or dtype, and
    for a conversion that is not a plain stacking (then this family needs code here).
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state_dict = model.state_dict()
    owners = {name: layer for layer in moe_layers for name in layer.parameter_names()}

    sources: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    # The loader walks keys in this order and stacks experts in the order it meets them.
    for key in sorted(checkpoint.spans, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state_dict)
        if target not in state_dict and key in state_dict:
            target, pattern = key, None
        if target in owners:
            sources[target][pattern].append(key)

    parts: dict[ExpertId, list[Part]] = defaultdict(list)
    transposed: set[str] = set()
    for target, owner in owners.items():
        if target not in sources:
            raise ValueError(
                f"{checkpoint.folder}: no tensor for {target}; the checkpoint is incomplete or of another "
                f"architecture than its config.json says ({model.config.model_type}): download it again"
            )
        if owner.one_module_per_expert:
            found = re.fullmatch(rf"{re.escape(owner.name)}\.expert_(\d+)\.(.+)", target)
            assert found, f"{target} is no parameter of an expert"
            expert, role = ExpertId(owner.layer, int(found[1])), found[2]
            key = _only(sources[target], target, checkpoint)
            parts[expert].append(_whole(checkpoint.spans[key], role, owner.role_shapes[role]))
            continue
        role = target.removeprefix(f"{owner.name}.")
        for expert_index, pieces in enumerate(
            _stack(target, role, owner, sources[target], converter_of, checkpoint, transposed)
        ):
            parts[ExpertId(owner.layer, expert_index)] += pieces
    keys = {key for by_pattern in sources.values() for keys in by_pattern.values() for key in keys}
    return ExpertSpans(
        {expert: tuple(found) for expert, found in parts.items()}, frozenset(transposed), frozenset(keys)
    )


def _only(by_pattern: Mapping[str | None, list[str]], target: str, checkpoint: Checkpoint) -> str:
    """The one tensor that is the parameter `target`."""
    first, *more = by_pattern[None]
    if more:
        raise ValueError(
            f"{checkpoint.folder}: {first} and {more[0]} are both {target}; delete the one that does not belong to "
            f"the model ({checkpoint.spans[first].path.name}, {checkpoint.spans[more[0]].path.name})"
        )
    return first


def _stack(
    target: str,
    role: str,
    owner: MoELayer,
    by_pattern: Mapping[str | None, list[str]],
    converter_of: Mapping[str, WeightConverter],
    checkpoint: Checkpoint,
    transposed: set[str],
) -> list[list[Part]]:
    """Per expert, the parts that make up its row of the packed parameter `target`."""
    shape, count = owner.role_shapes[role], owner.num_experts
    if set(by_pattern) == {None}:
        key = _only(by_pattern, target, checkpoint)
        return [[part] for part in _rows(checkpoint.spans[key], role, (count, *shape))]
    pattern = next(pattern for pattern in by_pattern if pattern is not None)
    converter = converter_of[pattern]
    patterns = list(converter.source_patterns)
    operations = list(converter.operations)
    if missing := [pattern for pattern in patterns if pattern not in by_pattern]:
        raise ValueError(f"{checkpoint.folder}: {target} needs tensors like {missing[0]}, and there are none")

    merged = bool(operations) and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    rest = operations[1:] if merged else operations
    if not rest and len(patterns) == 1:
        concatenated = 1
    elif len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1:
        concatenated = len(patterns)
    elif len(rest) == 1 and isinstance(rest[0], Transpose) and (rest[0].dim0, rest[0].dim1) == (1, 2):
        concatenated = 1
        if getattr(rest[0], "check_dims", False):
            stored = checkpoint.spans[by_pattern[patterns[0]][0]].shape
            if tuple(stored) == (count, *shape):  # already as the module wants it; transformers skips it too
                return [
                    [part] for part in _rows(checkpoint.spans[by_pattern[pattern][0]], role, (count, *shape))
                ]
        transposed.add(role)
        shape = (shape[1], shape[0])
    else:
        names = ", ".join(type(operation).__name__ for operation in operations)
        raise ValueError(
            f"{checkpoint.folder}: {target} is made by {names}, which expertflow cannot read in place yet; "
            f"please report the model, and run it with transformers alone meanwhile"
        )
    if shape[0] % concatenated:
        raise ValueError(f"{target}: {shape[0]} rows cannot be split in {concatenated} equal projections")
    piece_shape = (shape[0] // concatenated, *shape[1:])

    stacks: list[list[Part]] = [[] for _ in range(count)]
    for index, source in enumerate(patterns):
        keys = by_pattern[source]
        if merged:
            if len(keys) != count:
                raise ValueError(
                    f"{checkpoint.folder}: {len(keys)} tensors like {keys[0]} for the {count} experts of "
                    f"{target}; the checkpoint is incomplete: download it again"
                )
            pieces = [_whole(checkpoint.spans[key], role, piece_shape, index) for key in keys]
        else:
            (key,) = keys
            pieces = _rows(checkpoint.spans[key], role, (count, *piece_shape), index)
        for stack, piece in zip(stacks, pieces, strict=True):
            stack.append(piece)
    return stacks


def _whole(span: TensorSpan, role: str, shape: tuple[int, ...], index: int = 0) -> Part:
    _check(span, shape)
    return Part(role, span.path, span.offset, span.nbytes, span.dtype, shape, index)


def _rows(span: TensorSpan, role: str, shape: tuple[int, ...], index: int = 0) -> list[Part]:
    _check(span, shape)
    row_bytes = span.nbytes // shape[0]
    return [
        Part(role, span.path, span.offset + row * row_bytes, row_bytes, span.dtype, shape[1:], index)
        for row in range(shape[0])
    ]


def _check(span: TensorSpan, shape: tuple[int, ...]) -> None:
    if tuple(span.shape) != tuple(shape):
        raise ValueError(
            f"{span.path}: tensor {span.key} has shape {tuple(span.shape)}, the model's config.json asks for "
            f"{tuple(shape)}; config and weights do not belong together"
        )
    if span.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{span.path}: tensor {span.key} is {str(span.dtype).removeprefix('torch.')}; experts must be "
            f"bfloat16, float16, float32 or float64: use an unquantized copy of the model"
        )
