"""The budget is a promise: in a memory cgroup of exactly that size, a run neither dies nor thrashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

LAYERS, EXPERTS, HIDDEN, INNER, VOCABULARY = 6, 32, 512, 768, 60000

WORKER = """
import json, resource, sys
import torch
from transformers import AutoModelForCausalLM
from expertflow import ExpertFlowConfig

torch.set_num_threads(1)
folder, memory = sys.argv[1], int(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(
    folder, quantization_config=ExpertFlowConfig(memory=memory, context=256, batch=2, prefill_chunk=128)
)
loading = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
ids = torch.randint(0, model.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False)
usage = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss: a child starts with its parent's, and that of pytest may be larger than the budget.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({
    "tokens": out.shape[1], "peak_rss_bytes": int(peak.split()[1]) * 1024, "faults_loading": loading,
    "faults_running": usage.ru_majflt - loading, "slots": model.expertflow.plan.num_slots,
    "bytes_read": model.expertflow.cache.stats.bytes_read,
    "planned_bytes": model.expertflow.plan.total_bytes,
}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-MoE checkpoint of 0.5 GB, nearly all of it experts; random weights."""
    folder = tmp_path_factory.mktemp("half-a-gigabyte")
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)

    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for projection in "qkvo":
            tensors[f"{prefix}.self_attn.{projection}_proj.weight"] = random(HIDDEN, HIDDEN)
            if projection != "o":
                tensors[f"{prefix}.self_attn.{projection}_proj.bias"] = random(HIDDEN)
        tensors[f"{prefix}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
        tensors[f"{prefix}.mlp.shared_expert_gate.weight"] = random(1, HIDDEN)
        for name in ("shared_expert", *(f"experts.{expert}" for expert in range(EXPERTS))):
            tensors[f"{prefix}.mlp.{name}.gate_proj.weight"] = random(INNER, HIDDEN)
            tensors[f"{prefix}.mlp.{name}.up_proj.weight"] = random(INNER, HIDDEN)
            tensors[f"{prefix}.mlp.{name}.down_proj.weight"] = random(HIDDEN, INNER)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": INNER,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def memory_cgroup() -> Iterator[Callable[[int], Path]]:
    """Make a memory cgroup with a limit in bytes; skips where the machine does not let us."""
    made: list[Path] = []

    def make(limit: int) -> Path:
        roots = (
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
            (Path("/sys/fs/cgroup"), "memory.max"),
        )
        for root, limit_file in roots:
            folder = root / f"expertflow-test-{os.getpid()}-{len(made)}"
            try:
                folder.mkdir()
                made.append(folder)
                (folder / limit_file).write_text(str(limit))
            except OSError:
                continue
            return folder
        pytest.skip("no memory cgroup can be made here (needs root and the memory controller)")

    yield make
    for folder in made:
        folder.rmdir()


def run_limited(checkpoint: Path, memory: int, group: Path) -> subprocess.CompletedProcess[str]:
    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.run(
        [sys.executable, "-c", WORKER, str(checkpoint), str(memory)],
        preexec_fn=enter,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_run_stays_inside_its_memory_cgroup(checkpoint: Path, memory_cgroup: Callable[[int], Path]) -> None:
    """The checkpoint and the process together need twice the limit, so caching pages cannot hide a leak."""
    memory = 800 * 2**20
    done = run_limited(checkpoint, memory, memory_cgroup(memory))
    assert done.returncode == 0, f"killed or failed under {memory} bytes: {done.stderr[-2000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tokens"] == 256
    assert result["slots"] < LAYERS * EXPERTS, "the test proves nothing when every expert fits"
    assert result["bytes_read"] > 0
    assert result["peak_rss_bytes"] <= memory
    assert result["planned_bytes"] <= memory
    # A thrashing run faults thousands of times: each step touches every dense page.
    assert result["faults_running"] < 100
    assert result["faults_loading"] < 2000


def test_the_smallest_budget_that_is_named_works(
    checkpoint: Path, memory_cgroup: Callable[[int], Path]
) -> None:
    too_small = 300 * 2**20
    refused = subprocess.run(
        [sys.executable, "-c", WORKER, str(checkpoint), str(too_small)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert refused.returncode != 0
    words = refused.stderr.split("smallest budget that works is ")[1]
    smallest = int(words.split("MiB")[0]) * 2**20
    # The interpreter's own size varies by a few MiB between runs.
    done = run_limited(checkpoint, smallest + 2**24, memory_cgroup(smallest + 2**24))
    assert done.returncode == 0, done.stderr[-2000:]
