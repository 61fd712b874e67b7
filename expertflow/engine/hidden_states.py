"""Hidden states for the predictors that read them: look-ahead and the pre-gate, on recorded sequences.

The model runs once more over each sequence, one at a time, and what enters the decoder's experts is taken by hooks
that are gone afterwards. What the predictors say is kept, the hidden states are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expertflow.engine.llm import LLM
from expertflow.engine.sampling import SamplingParams
from expertflow.models import routers as routers_of
from expertflow.models.spans import MoELayer
from expertflow.predictor.layer_baselines import GateLookAhead, PreGate
from expertflow.predictor.protocol import LayerPredictor
from expertflow.predictor.replay import Group
from expertflow.trace import TracedSequence, TraceMeta

# (token ids, those that the encoder read or none) -> hidden_TLD of the decoder's MoE layers
Read = Callable[[Sequence[int], Sequence[int]], Tensor]


@contextmanager
def hidden_states(llm: LLM) -> Iterator[Read]:
    """A function that runs tokens and returns what entered each MoE layer's experts, hidden_TLD in float16."""
    layers = decoder_layers(llm)
    taken: list[list[Tensor]] = [[] for _ in layers]

    def listen(number: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            taken[number].append(args[0].detach().reshape(-1, args[0].shape[-1]).to("cpu", torch.float16))

        return llm.model.get_submodule(layers[number].name).register_forward_pre_hook(hook)

    def read(ids: Sequence[int], source: Sequence[int] = ()) -> Tensor:
        for passes in taken:
            passes.clear()
        if llm.model.config.is_encoder_decoder:
            with torch.inference_mode():
                llm.model(input_ids=torch.tensor([list(source)]), decoder_input_ids=torch.tensor([list(ids)]))
        else:
            llm.generate([list(ids)], SamplingParams(temperature=0, max_tokens=1))
        return torch.stack([torch.cat(passes)[: len(ids)] for passes in taken], dim=1)

    handles = [listen(number) for number in range(len(layers))]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(llm: LLM) -> list[MoELayer]:
    """The MoE layers that decode: all of a decoder-only model."""
    return routers_of.decoder_layers(llm.model, llm.experts.moe_layers)


def routers(llm: LLM) -> list[tuple[Tensor, Tensor | None]]:
    """Weight (E x D) and bias of each MoE layer's router. Raises ValueError where it is no plain product."""
    return [
        (weight.float().cpu(), bias.float().cpu() if bias is not None else None)
        for weight, bias in routers_of.router_products(llm.model, decoder_layers(llm))
    ]


def hidden_predictors(
    llm: LLM,
    read: Read,
    meta: TraceMeta,
    train: Sequence[TracedSequence],
    train_tokens: int,
    progress: Callable[[str], None] = lambda what: None,
) -> Callable[[Group], Mapping[str, Tensor]]:
    """Look-ahead, and a pre-gate trained on the first train_tokens of `train`, for predictor.evaluate."""
    weights = routers(llm)
    hidden, routes, tokens = [], [], 0
    for sequence in train:
        if tokens >= train_tokens:
            break
        ids = sequence.target_ids_T.tolist()
        hidden.append(read(ids, sequence.source_ids_S.tolist()))
        routes.append(torch.from_numpy(sequence.target_routes_TLK.astype("int64")))
        tokens += len(ids)
        progress(f"hidden states to train the pre-gate on: {tokens} of {train_tokens} tokens")
    experts = max(meta.experts_per_layer)
    torch.manual_seed(0)
    gate = PreGate(len(weights), weights[0][0].shape[1], experts)
    gate.fit(torch.cat(hidden), torch.cat(routes))
    ahead = GateLookAhead([weight for weight, _ in weights], meta.top_k, [bias for _, bias in weights])
    asked: dict[str, LayerPredictor] = {"look-ahead": ahead, "pre-gate": gate}

    return lambda group: say_ahead(asked, read, group, experts, progress)


def say_ahead(
    asked: Mapping[str, LayerPredictor],
    read: Read,
    group: Group,
    num_experts: int,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Tensor]:
    """What predictors of hidden states say of recorded sequences: p_BTLE by name, nan at the first layer."""
    shape = (*group.ids_BT.shape, group.routes_BTLK.shape[2], num_experts)
    said = {name: torch.full(shape, float("nan"), dtype=torch.float16) for name in asked}
    for row in range(len(group)):
        mask_T = group.mask_BT[row]
        source = group.sequences[row].source_ids_S.tolist()
        hidden_TLD = read(group.ids_BT[row][mask_T].tolist(), source)
        routes_TLK = group.routes_BTLK[row][mask_T]
        progress(f"hidden states of held-out sequences: {row + 1} of {len(group)}")
        for name, predictor in asked.items():
            for layer in range(shape[2]):
                p_TE = predictor.observe(layer, hidden_TLD[:, layer], routes_TLK[:, layer])
                if p_TE is not None:  # both speak of every layer but the first
                    said[name][row, mask_T, layer + 1, : p_TE.shape[1]] = p_TE.half()
    return said
