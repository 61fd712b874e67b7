"""The predictor of a setting: none, the online one, or a trained one from its folder; and what it takes in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expertflow.cache.policies import POLICIES
from expertflow.config import Settings
from expertflow.models.draft import Draft
from expertflow.models.fingerprint import fingerprint
from expertflow.models.footprint import kv_bytes_per_token
from expertflow.models.predicting import MakePredictor, Predicting
from expertflow.models.routers import decoder_layers, router_products
from expertflow.models.spans import MoELayer
from expertflow.predictor.layer_baselines import GateLookAhead
from expertflow.predictor.model import RoutingPathPredictor
from expertflow.predictor.serving import ServingPredictor
from expertflow.predictor.storage import load_predictor, read_description

if TYPE_CHECKING:
    from expertflow.models.attach import LoadedExperts

logger = logging.getLogger(__name__)
UNTRAINED = ("online", "draft")  # predictors that are no folder


def check_predictor(settings: Settings) -> None:
    """ValueError for a predictor that is not there, and for one that the policy would not listen to."""
    if settings.predictor == "none":
        return
    assert settings.policy is not None, "Settings chooses one"
    if not POLICIES[settings.policy].looks_ahead:
        listening = ", ".join(sorted(name for name, policy in POLICIES.items() if policy.looks_ahead))
        raise ValueError(
            f"policy={settings.policy!r} makes no use of predictor={settings.predictor!r}; leave the policy out, or "
            f"use one that looks ahead: {listening}"
        )
    if settings.predictor in UNTRAINED:
        return
    if not Path(settings.predictor).is_dir():
        raise ValueError(
            f"predictor={settings.predictor!r} is neither 'none', 'online', 'draft' nor a folder; make one with "
            f"`expertflow train-predictor`"
        )
    read_description(settings.predictor)


def predictor_bytes(model: PreTrainedModel, moe_layers: Sequence[MoELayer], settings: Settings) -> int:
    """What `new_predicting` will hold. model: may be on meta."""
    if settings.predictor == "none":
        return 0
    layers = decoder_layers(model, moe_layers)
    nbytes = ServingPredictor.num_bytes(len(layers), max(layer.num_experts for layer in layers))
    for layer in layers:
        try:
            ((weight, _),) = router_products(model, [layer])
        except ValueError:
            continue
        nbytes += 4 * weight.numel()
    nbytes += draft_bytes(model, settings)
    if settings.predictor not in UNTRAINED:
        nbytes += int(read_description(settings.predictor)["bytes"])
    return nbytes


def draft_bytes(model: PreTrainedModel, settings: Settings) -> int:
    """What a draft holds where the KV cache is: while it lasts there are the old states and the new ones."""
    if settings.predictor != "draft":
        return 0
    return kv_bytes_per_token(model) * settings.context * settings.unit


def new_predicting(model: PreTrainedModel, loaded: LoadedExperts) -> Predicting | None:
    """Who asks the predictor of the settings, not hooked up yet; None where nothing is to be predicted.

    Raises ValueError for a predictor of another model, and for damaged ones.
    """
    settings, cache = loaded.settings, loaded.cache
    if settings.predictor == "none":
        return None
    layers = decoder_layers(model, loaded.moe_layers)
    trained = None
    if settings.predictor not in UNTRAINED:
        # A seed set before loading must give the answers it would give.
        with torch.random.fork_rng(devices=[]):
            trained = load_predictor(settings.predictor, fingerprint(model))
    if cache.num_slots >= cache.shape.num_experts or not layers:
        return None  # nothing is ever read twice
    experts_L, source_layers = [layer.num_experts for layer in layers], len(loaded.moe_layers) - len(layers)
    drafts = settings.predictor == "draft"
    predicting = Predicting(
        cache,
        settings.predictor,
        _maker(experts_L, trained, _routers(model, layers), drafts),
        source_layers=source_layers,
    )
    if drafts:
        predicting.draft = Draft(model.get_decoder(), experts_L)
    return predicting


_Products = tuple[list[Tensor], list[Tensor | None]]


def _routers(model: PreTrainedModel, layers: Sequence[MoELayer]) -> _Products | None:
    """What look-ahead is made of, once it is known how many experts a token takes."""
    try:
        products = router_products(model, layers)
    except ValueError as error:
        logger.info("no look-ahead: %s", error)
        return None
    if len({len(weight) for weight, _ in products}) > 1:
        return None  # the mixture has one width
    # Predictors compute on the CPU, whatever the model computes on.
    return [weight.cpu() for weight, _ in products], [
        None if bias is None else bias.cpu() for _, bias in products
    ]


def _maker(
    experts_L: list[int], trained: RoutingPathPredictor | None, ahead: _Products | None, drafts: bool
) -> MakePredictor:
    def make(top_k: int) -> ServingPredictor:
        asked = None
        if ahead is not None:
            weight_LED, bias_LE = ahead
            asked = GateLookAhead(
                weight_LED, top_k, [None if bias is None else bias.float() for bias in bias_LE]
            )
        return ServingPredictor(len(experts_L), max(experts_L), top_k, trained, asked, drafts)

    return make
