"""Experts that the checkpoint stores the other way round: transformers transposes a copy, we multiply by what is there.

Qwen3-VL-MoE is published so: packed [E, D, 2I] and [E, I, D], where its module holds [E, 2I, D] and [E, D, I].
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from expertflow.models.attach import ExpertFlowConfig
from tests.families import EOS, NUM_EXPERTS, PAD, VOCAB_SIZE

CONFIG = {
    "text_config": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
    "image_token_id": 4,
    "video_token_id": 5,
    "vision_start_token_id": 6,
    "vision_end_token_id": 7,
}


def write(folder: Path, stored: str) -> None:
    config = Qwen3VLMoeConfig(**CONFIG)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3VLMoeForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    state = model.state_dict()
    for key, tensor in state.items():
        if stored == "published" and ".experts." in key:
            state[key] = tensor.transpose(1, 2)
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config.save_pretrained(folder)


@pytest.fixture(scope="module", params=["published", "as the module"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("qwen3_vl_moe")
    write(folder, request.param)
    reference = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, experts_implementation="eager")
    return SimpleNamespace(folder=folder, reference=reference, transposed=request.param == "published")


def load(folder: Path, cache_size: float) -> PreTrainedModel:
    return Qwen3VLMoeForConditionalGeneration.from_pretrained(
        folder, quantization_config=ExpertFlowConfig(cache_size=cache_size, context=64, batch=2)
    )


@pytest.fixture
def few(checkpoint: SimpleNamespace) -> Iterator[PreTrainedModel]:
    model = load(checkpoint.folder, 1.5)
    yield model
    model.expertflow.close()


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: int) -> Tensor:
    ids = torch.randint(8, VOCAB_SIZE, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    return model(input_ids=ids).logits


def test_transposed_experts_give_what_transformers_gives(
    checkpoint: SimpleNamespace, few: PreTrainedModel
) -> None:
    """Also at one token, whose experts are multiplied together only where nothing is transposed."""
    found = {tokens: logits(few, tokens) for tokens in (17, 1)}
    for tokens, mine in found.items():
        torch.testing.assert_close(mine, logits(checkpoint.reference, tokens), rtol=1e-4, atol=1e-4)
    assert few.expertflow.cache.stats.misses > few.expertflow.cache.num_slots
    whole = load(checkpoint.folder, NUM_EXPERTS)
    for tokens, mine in found.items():
        assert torch.equal(mine, logits(whole, tokens))
    whole.expertflow.close()


def test_the_bytes_are_where_the_checkpoint_has_them(
    checkpoint: SimpleNamespace, few: PreTrainedModel
) -> None:
    """No copy and no conversion: shapes in the slots are the file's, and the module is told which way round."""
    experts = few.get_submodule(few.expertflow.moe_layers[1].name)
    gate_up, down = ((32, 48), (24, 32)) if checkpoint.transposed else ((48, 32), (32, 24))
    expected = {"gate_up_proj", "down_proj"} if checkpoint.transposed else set()
    assert experts.expertflow.stored_transposed == expected
    wanted = checkpoint.reference.get_submodule(few.expertflow.moe_layers[1].name)
    for expert, weights in few.expertflow.cache.open_layer(1, [2, 5]):
        for role, shape in (("gate_up_proj", gate_up), ("down_proj", down)):
            (matrix,) = weights[role]
            assert matrix.shape == shape
            module_matrix = matrix.T if checkpoint.transposed else matrix
            assert torch.equal(module_matrix, getattr(wanted, role)[expert])
