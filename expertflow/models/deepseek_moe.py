"""DeepSeek-MoE-16B (model_type "deepseek"), which transformers has no class for.

The published repository brings its own Python; we never run it. This is the same architecture on
transformers' own Llama parts: plain multi-head attention, a dense first layer, then layers with shared
experts that every token uses and routed ones behind transformers' experts interface, so that any registered
experts function applies.
Nothing happens at import: call `register` to let the Auto classes know the architecture.
Not for DeepSeek-V2 or V3, which transformers has under "deepseek_v2" and "deepseek_v3".
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, LlamaConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from expertflow.kv_name import KV_CACHE, kv_cache_of


@strict
class DeepseekConfig(LlamaConfig):
    """The fields of the published config.json; defaults are those of deepseek-ai/deepseek-moe-16b-base.

    first_k_dense_replace: that many first layers are dense. moe_layer_freq: of the others, those whose number
    is a multiple of it have experts. n_shared_experts: None for none; they are one MLP of that many widths.
    aux_loss_alpha: weight of the balance loss, added in training when output_router_logits is set.
    Raises ValueError for a scoring function or a number of experts that the architecture does not have.
    """

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}  # noqa: RUF012

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    n_shared_experts: int | None = 2
    n_routed_experts: int = 64
    num_experts_per_tok: int = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func={self.scoring_func!r}: DeepSeek-MoE routes by softmax only")
        if not 0 < self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie in 1..n_routed_experts="
                f"{self.n_routed_experts}"
            )


@use_experts_implementation
class DeepseekExperts(nn.Module):
    """The routed experts of a layer, packed: gate_up_proj [E, 2I, D], gate first, and down_proj [E, D, I]."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        )
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The slow form, experts_implementation="eager".

        hidden_states: [T, D]; top_k_index: [T, K] expert numbers; top_k_weights: [T, K]. Returns [T, D].
        """
        out_TD = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, choice = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            routed = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out_TD.index_add_(0, tokens, (routed * top_k_weights[tokens, choice, None]).to(out_TD.dtype))
        return out_TD


class DeepseekRouter(nn.Module):
    """Softmax over all experts, then the greedy top K, rescaled to sum 1 only where norm_topk_prob is set."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits_TE, weights_TK in the dtype of hidden_TD, and index_TK, best expert first."""
        logits_TE = F.linear(hidden_TD, self.weight)
        # In float32: probabilities rounded to bf16 tie, and which of two tied experts runs would be chance.
        weights_TK, index_TK = logits_TE.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return logits_TE, weights_TK.to(hidden_TD.dtype), index_TK


class DeepseekMoE(nn.Module):
    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.gate = DeepseekRouter(config)
        self.experts = DeepseekExperts(config)
        self.shared_experts = _shared_experts(config)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        _, weights_TK, index_TK = self.gate(hidden_TD)
        out_BTD = self.experts(hidden_TD, index_TK, weights_TK).view_as(hidden_BTD)
        if self.shared_experts is not None:
            out_BTD = out_BTD + self.shared_experts(hidden_BTD)
        return out_BTD


def _shared_experts(config: DeepseekConfig) -> LlamaMLP | None:
    if not config.n_shared_experts:
        return None
    narrow = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.n_shared_experts * config.moe_intermediate_size,
        hidden_act=config.hidden_act,
    )
    return LlamaMLP(narrow)


def has_experts(config: DeepseekConfig, layer: int) -> bool:
    """Whether decoder layer `layer`, counted from 0, is an MoE layer."""
    return layer >= config.first_k_dense_replace and layer % config.moe_layer_freq == 0


class DeepseekDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if has_experts(config, layer_idx):
            self.mlp = DeepseekMoE(config)  # type: ignore[assignment]  # not a LlamaMLP, on purpose


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    config: DeepseekConfig
    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(DeepseekRouter, index=0),
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, DeepseekRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class DeepseekModel(DeepseekPreTrainedModel):
    """The decoder stack without the language-model head."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As every transformers decoder: input_ids [B, T] or inputs_embeds [B, T, D], exactly one of them.

        cache: what transformers called past_key_values before 5.24.
        """
        cache = _one_of(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (
                torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            ).unsqueeze(0)

        handed_on: dict[str, Any] = {KV_CACHE: cache}
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **handed_on,
        )
        hidden_BTD = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_BTD, position_ids=position_ids)
        for layer in self.layers:
            hidden_BTD = layer(
                hidden_BTD,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **handed_on,
                **kwargs,
            )
        returned: dict[str, Any] = {KV_CACHE: cache if use_cache else None}
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_BTD), **returned)


class DeepseekForCausalLM(DeepseekPreTrainedModel, GenerationMixin):
    """DeepSeek-MoE-16B and its chat version, base for training too."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As every causal model of transformers; labels [B, T], -100 where there is no loss.

        With output_router_logits the balance loss is aux_loss and, weighted by aux_loss_alpha, in the loss.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **{KV_CACHE: _one_of(cache, past_key_values)},
            **kwargs,
        )
        hidden_BTD = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(hidden_BTD[:, kept])

        aux_loss = None
        if output_router_logits:
            aux_loss = balance_loss(
                outputs.router_logits, hidden_BTD.shape[0], self.config.num_experts_per_tok
            )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, self.vocab_size, **kwargs)
            if aux_loss is not None:
                loss = loss + self.config.aux_loss_alpha * aux_loss
        returned: dict[str, Any] = {KV_CACHE: kv_cache_of(outputs)}
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits_BTV,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **returned,
        )


def _one_of(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    if cache is not None and past_key_values is not None:
        raise ValueError("give cache or past_key_values, which are two names of one thing, and not both")
    return cache if cache is not None else past_key_values


def balance_loss(router_logits: tuple[Tensor, ...], batch_size: int, top_k: int) -> Tensor:
    """The balance loss of the published code with seq_aux: one term per sequence and layer.

    router_logits: one [B * T, E] per MoE layer. A term is the sum over experts of (tokens routed there,
    relative to an even split) x (mean probability), 1 when even; the result is averaged over sequences and
    summed over layers. Padding counts as tokens, as in the published code.
    """
    total = router_logits[0].new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        probability_BTE = logits.softmax(dim=-1, dtype=torch.float32).view(batch_size, -1, logits.shape[-1])
        _, tokens, experts = probability_BTE.shape
        index_BN = probability_BTE.topk(top_k, dim=-1).indices.view(batch_size, -1)
        count_BE = probability_BTE.new_zeros(batch_size, experts).scatter_add_(
            1, index_BN, probability_BTE.new_ones(batch_size, tokens * top_k)
        )
        relative_BE = count_BE / (tokens * top_k / experts)
        total = total + (relative_BE * probability_BTE.mean(dim=1)).sum(dim=1).mean()
    return total


def register() -> None:
    """Let the Auto classes load model_type "deepseek", and transformers find the published tensor names.

    Local classes win over a checkpoint's auto_map, so its remote code is neither asked about nor run.
    May be called again.
    """
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
    AutoModel.register(DeepseekConfig, DeepseekModel, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    # mlp.experts.E.{gate,up,down}_proj.weight, a tensor per expert and projection: as Qwen2-MoE is published.
    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    assert mapping is not None
    register_checkpoint_conversion_mapping("deepseek", mapping, overwrite=True)
