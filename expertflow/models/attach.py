"""The seam to transformers: a registered quantizer that takes the experts out and hangs the cache on.

`from_pretrained(name, quantization_config=ExpertFlowConfig(memory="6GiB"))` is the whole integration.
The loader sees a model without expert parameters, so it never touches their bytes; they stay where
they are in the checkpoint and are read when a router asks for them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from expertflow import budget
from expertflow.budget import MemoryPlan
from expertflow.cache.expert_cache import ExpertCache
from expertflow.cache.host_cache import HostCache, host_slots
from expertflow.cache.loader import is_packed, slot_bytes
from expertflow.cache.policies import POLICIES
from expertflow.config import Settings, parse_bandwidth, parse_bytes
from expertflow.core import MoEShape
from expertflow.early_memory import EARLY
from expertflow.kv_name import kv_cache_in
from expertflow.models import deepseek_moe
from expertflow.models.continuous import keep_pages_in_budget
from expertflow.models.experts import Attachment, expertflow_experts
from expertflow.models.footprint import honoured_prefill, measure_model, within_training
from expertflow.models.lookahead import look_ahead_for
from expertflow.models.placement import device_memory, slot_device, take_inputs_from_anywhere
from expertflow.models.predicting import Predicting
from expertflow.models.predictors import check_predictor, draft_bytes, new_predicting, predictor_bytes
from expertflow.models.products import speed_up_dense
from expertflow.models.refusal import RefusingName
from expertflow.models.spans import ExpertSpans, MoELayer, derive_expert_spans, find_moe_layers
from expertflow.models.switch import OffloadedExperts
from expertflow.models.uncached import run_whole_without_cache
from expertflow.read_ahead import will_need
from expertflow.store.checkpoint import Checkpoint, TensorSpan, open_checkpoint
from expertflow.store.disk import DiskStore
from expertflow.store.layout import page_aligned
from expertflow.store.protocol import ExpertStore
from expertflow.store.quantized import refuse_quantized
from expertflow.store.ram import RamStore
from expertflow.store.throttled import ThrottledStore

logger = logging.getLogger(__name__)

METHOD = "expertflow"


class ExpertFlowConfig(QuantizationConfigMixin):
    """Settings of expertflow in the form that transformers' from_pretrained takes.

    Keyword arguments are the fields of expertflow.config.Settings: memory="6GiB" or cache_size=4, context,
    batch, policy, ... Unknown names and wrong values raise ValueError.
    """

    def __init__(self, **settings: Any):
        register()
        settings.pop("quant_method", None)
        unknown = sorted(set(settings) - set(Settings.names()))
        if unknown:
            raise ValueError(
                f"ExpertFlowConfig has no setting {unknown[0]!r}; it has: {', '.join(Settings.names())}"
            )
        self.quant_method: Any = METHOD  # transformers types it as its own enum, and takes any text
        self.settings = Settings(**settings)
        if self.settings.policy not in POLICIES:
            raise ValueError(
                f"policy={self.settings.policy!r} is unknown; it can be: {', '.join(sorted(POLICIES))}"
            )
        check_predictor(self.settings)
        # transformers runs a model beyond what it was trained for; `LLM` does not, and says so here.
        self.within_training = False

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, **asdict(self.settings)}


ExpertFlowConfig.__name__ = RefusingName(ExpertFlowConfig.__name__)


@dataclass
class LoadedExperts:
    """What a loaded model carries as `model.expertflow`."""

    cache: ExpertCache
    plan: MemoryPlan
    checkpoint: Checkpoint
    settings: Settings
    moe_layers: list[MoELayer]
    predicting: Predicting | None = None

    def close(self) -> None:
        """Stop the loader thread and close the checkpoint's files."""
        self.cache.close()
        self.cache.store.close()


class ExpertFlowQuantizer(HfQuantizer):
    """Takes experts out before loading; brings dense weights into RAM and the cache up after it."""

    requires_calibration = False

    def __init__(self, quantization_config: ExpertFlowConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.settings = quantization_config.settings
        self._within_training = quantization_config.within_training

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        self._device = slot_device(self.settings, device_map)

    def update_device_map(self, device_map: Any) -> None:
        return None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise ValueError("expertflow reads experts from a checkpoint on disk; from_pretrained got none")
        moe_layers = find_moe_layers(model)
        if not moe_layers:
            raise ValueError(
                f"{type(model).__name__} (model_type {model.config.model_type!r}) has no experts that expertflow "
                f"knows: for a dense model use transformers or accelerate directly"
            )
        if self._within_training:
            self.settings = within_training(model, self.settings)
        self.settings = honoured_prefill(model, self.settings)
        # Hub files are links into a blob folder; the folder that names them is the checkpoint.
        folder = Path(os.path.abspath(checkpoint_files[0])).parent
        _refuse_skipped_quantization(folder)
        checkpoint = open_checkpoint(folder)
        spans = derive_expert_spans(model, moe_layers, checkpoint)
        # Before all that follows: measuring a model takes as long as reading a GB.
        dense = [span for key, span in checkpoint.spans.items() if key not in spans.checkpoint_keys]
        threading.Thread(target=read_ahead, args=(dense,), name="expertflow-read-ahead", daemon=True).start()
        store = DiskStore(checkpoint, spans.parts, direct=self.settings.direct_io)
        dtype = next(param.dtype for param in moe_layers[0].module.parameters())
        take_out_experts(model, moe_layers, spans)
        on_accelerator = self._device.queues
        bytes_per_slot = slot_bytes(store, dtype, on_accelerator)
        staging = 2 * store.slot_bytes if is_packed(store, dtype, on_accelerator) else 0
        expert_bytes = sum(part.nbytes for parts in spans.parts.values() for part in parts)
        if on_accelerator:
            held, free = device_memory(self._device.torch_device)
            _check_host_memory(self.settings, store, expert_bytes)
        else:
            held = budget.process_bytes() + (expert_bytes if self.settings.store == "ram" else 0)
            free = budget.free_bytes()
        self._plan = budget.plan_memory(
            measure_model(model, moe_layers, bytes_per_slot, staging, self.settings.context),
            self.settings,
            held,
            free,
            # Predictors are in the host's memory, but for a draft's second KV cache.
            draft_bytes(model, self.settings)
            if on_accelerator
            else predictor_bytes(model, moe_layers, self.settings),
            on_accelerator,
        )
        self._checkpoint, self._store, self._moe_layers, self._dtype = checkpoint, store, moe_layers, dtype
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        copy_dense_weights(model, self._checkpoint, self._device.torch_device)
        speed_up_dense(model)
        shape = MoEShape(tuple(layer.num_experts for layer in self._moe_layers))
        cache = ExpertCache(
            self._slow_tier(shape),
            shape,
            self._plan.num_slots,
            policy=self.settings.policy or "lru",
            dtype=self._dtype,
            overlap=self.settings.overlap,
            device=self._device,
        )
        ahead = look_ahead_for(model, self._moe_layers)
        for layer in self._moe_layers:
            experts: Any = model.get_submodule(layer.name)
            experts.expertflow.cache = cache
            if self.settings.look_ahead and cache.num_slots < cache.shape.num_experts:
                experts.expertflow.look_ahead = ahead[layer.layer]
        loaded = LoadedExperts(cache, self._plan, self._checkpoint, self.settings, self._moe_layers)
        model.expertflow = cast(Any, loaded)  # torch's stubs know attributes that are tensors or modules only
        weakref.finalize(model, LoadedExperts.close, loaded)
        self._predict(model, loaded)
        keep_pages_in_budget(model, self.settings)
        guard = _ContextGuard(self.settings)
        model.register_forward_pre_hook(guard, with_kwargs=True)
        if self._device.queues:
            take_inputs_from_anywhere(model, self._device.torch_device)
        if model.config.is_encoder_decoder:  # generate() calls the encoder past the model's own forward
            model.get_encoder().register_forward_pre_hook(guard, with_kwargs=True)
        if model.generation_config is not None and self.settings.prefill_chunk < self.settings.context:
            model.generation_config.prefill_chunk_size = self.settings.prefill_chunk
            run_whole_without_cache(model, self.settings)
        return model

    def _slow_tier(self, shape: MoEShape) -> ExpertStore:
        store = self._unhindered_slow_tier(shape)
        if self.settings.link is not None:
            return ThrottledStore(store, parse_bandwidth(self.settings.link))
        return store

    def _unhindered_slow_tier(self, shape: MoEShape) -> ExpertStore:
        pin = self._device.queues and torch.accelerator.is_available()
        if self.settings.store == "ram":
            return RamStore(self._store, pin=pin)
        if self.settings.host_memory is not None:
            nbytes = parse_bytes(self.settings.host_memory, "host_memory")
            return HostCache(self._store, shape, nbytes, pin=pin)
        return self._store

    def _predict(self, model: PreTrainedModel, loaded: LoadedExperts) -> None:
        try:
            loaded.predicting = predicting = new_predicting(model, loaded)
        except BaseException:
            loaded.close()
            raise
        if predicting is None:
            return
        for layer in self._moe_layers:
            experts: Any = model.get_submodule(layer.name)
            experts.expertflow.predicting = predicting
            experts.expertflow.draft = predicting.draft
        seq2seq = model.config.is_encoder_decoder
        predicting.listen(model.get_encoder() if seq2seq else None, model.get_decoder() if seq2seq else model)

    def is_serializable(self) -> bool:
        """Asked by save_pretrained, which then raises and refers to the log for the reason."""
        logger.warning(
            "not saved: the experts are in %s, not in the model. Nothing in it has changed: copy that folder, or "
            "load it with transformers alone to save it in another form",
            self._checkpoint.folder,
        )
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make transformers know expertflow's config, quantizer, experts function and extra models. Idempotent."""
    if METHOD in AUTO_QUANTIZER_MAPPING:
        return
    register_quantization_config(METHOD)(ExpertFlowConfig)
    register_quantizer(METHOD)(ExpertFlowQuantizer)
    ALL_EXPERTS_FUNCTIONS.register(METHOD, expertflow_experts)
    deepseek_moe.register()


def _refuse_skipped_quantization(folder: Path) -> None:
    """ValueError for a format that transformers does not know, and would load as if it were plain weights."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (config.get("quantization_config") or {}).get("quant_method") != METHOD:
        refuse_quantized(config, str(folder))


def _check_host_memory(settings: Settings, store: DiskStore, expert_bytes: int) -> None:
    """ValueError, before any weight is read, for RAM behind an accelerator that is not there or holds too little."""
    if settings.store == "ram":
        budget.check_host_memory(expert_bytes, "store='ram'")
    elif settings.host_memory is not None:
        nbytes = parse_bytes(settings.host_memory, "host_memory")
        slots = host_slots(nbytes, store.slot_bytes, len(store.experts), torch.accelerator.is_available())
        budget.check_host_memory(sum(slots) * store.slot_bytes, f"host_memory={settings.host_memory!r}")


def take_out_experts(model: PreTrainedModel, moe_layers: Sequence[MoELayer], spans: ExpertSpans) -> None:
    """Delete the experts' (meta) parameters and route their modules to the expert cache."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    prefix = rf"({re.escape(model.base_model_prefix)}\.)?" if model.base_model_prefix else ""
    for layer in moe_layers:
        attachment = Attachment(None, layer.layer, layer.num_experts, spans.stored_transposed)
        name = layer.name.removeprefix(f"{model.base_model_prefix}.")
        if layer.one_module_per_expert:
            module: Any = OffloadedExperts.replacing(layer.module)
            model.set_submodule(layer.name, module)
            # Its parent initialises experts by their names, which are gone; its router comes from the file.
            block: Any = model.get_submodule(layer.name.rpartition(".")[0])
            block._is_hf_initialized = True
            ignored.add(rf"^{prefix}{re.escape(name)}\.expert_\d+\.")
        else:
            module = layer.module
            for role in layer.role_shapes:
                delattr(module, role)
            module.config._experts_implementation_internal = METHOD
            roles = "|".join(map(re.escape, layer.role_shapes))
            ignored.add(rf"^{prefix}{re.escape(name)}\.({roles})$")
        module.expertflow = attachment
        module._is_hf_initialized = True
    # Exactly the experts' tensors are left in the file on purpose; anything else unexpected is reported.
    model._keys_to_ignore_on_load_unexpected = ignored


def read_ahead(spans: Sequence[TensorSpan]) -> None:
    """Ask the kernel for these tensors now, so that the disk works while the loader is still preparing."""
    for path in {span.path for span in spans}:
        will_need(path, [(span.offset, span.nbytes) for span in spans if span.path == path])


@torch.no_grad()
def copy_dense_weights(model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device) -> None:
    """Bring dense weights into RAM, or to the device, once.

    The loader leaves them mapped to the file: the first steps would crawl, and under memory pressure
    the kernel would drop and re-read them for ever.
    """
    if device.type == "cpu":
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers()] if not t.is_meta}
        for tensor, copy in zip(
            tensors.values(), page_aligned([t.data for t in tensors.values()]), strict=True
        ):
            tensor.data = copy
    else:
        EARLY.take(0)  # nobody needs it here
        model.to(device)  # type: ignore[arg-type]
        model.tie_weights()  # on some devices torch has to make new parameters, one for each name
    for path in checkpoint.files:
        # The mapped pages count against a memory cgroup until they are given back.
        with contextlib.suppress(OSError, AttributeError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _ContextGuard:
    """Refuses a forward pass whose KV cache would outgrow the budget, before it allocates anything."""

    def __init__(self, settings: Settings):
        self.limit = settings.context * settings.batch
        self.settings = settings

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = next(
            (
                value
                for value in (
                    kwargs.get("decoder_input_ids"),
                    kwargs.get("input_ids"),
                    kwargs.get("inputs_embeds"),
                    args[0] if args else None,
                )
                if isinstance(value, torch.Tensor)
            ),
            None,
        )
        if inputs is None or inputs.dim() < 2:
            return
        cache = kv_cache_in(kwargs)
        past = cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0
        sequences, tokens = inputs.shape[0], inputs.shape[1] + int(past)
        if sequences * tokens > self.limit:
            raise ValueError(
                f"{sequences} sequence(s) of {tokens} tokens exceed the KV budget of {self.settings.batch} x "
                f"{self.settings.context} tokens; load the model with a larger context= or batch= "
                f"(--context, --batch), or shorten the prompt"
            )
