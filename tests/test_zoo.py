"""The training recipe, at widths where a model learns in a second: fast paths equal slow ones, every
architecture learns, a stopped run continues as if it had not stopped, and what is saved is what is published."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from expertflow import LLM
from expertflow.models.fingerprint import fingerprint
from expertflow.trace import TracedSequence, TraceMeta, TraceWriter, read_trace
from zoo import make_sample
from zoo import optimizer as zoo_optimizer
from zoo import report as zoo_report
from zoo import train as zoo_train
from zoo.architectures import ARCHITECTURES, build_model
from zoo.corpus import (
    PARTS,
    PERMISSIVE,
    Document,
    Mixture,
    Pairs,
    Rows,
    build_tokenizer,
    pad_pairs,
    read_part,
)
from zoo.evaluate import HeldOut, seen_share, seq2seq_loss
from zoo.experts import _gated_experts, switch_experts_forward
from zoo.loss import linear_cross_entropy
from zoo.optimizer import MasterOptimizer, OptimizerConfig, orthogonalize
from zoo.routing import balance_loss, watch_routers
from zoo.thin_trace import thin
from zoo.train import Recipe, rate_scale

SMALL = [
    "--vocab",
    "300",
    "--hidden",
    "32",
    "--expert-inner",
    "16",
    "--context",
    "32",
    "--batch",
    "4",
    "--layers",
    "2",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    words = "the ship sails over a calm sea while we count seven white birds above it".split()  # noqa: SIM905
    rng = np.random.default_rng(0)

    def sentence(n: int) -> str:
        return " ".join(words[i] for i in rng.integers(len(words), size=n)) + "."

    def write(part: str, rows: list[dict[str, str]]) -> None:
        with lzma.open(directory / f"{part}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    text = [
        {"text": sentence(60), "source": "sotu", "split": "valid" if i % 8 == 0 else "train"}
        for i in range(40)
    ]
    write("pretrain", [*text, {"text": "secret " * 50, "source": "anarchism", "split": "train"}])
    for part in ("chat", "translation", "math", "summarization"):
        write(
            part,
            [
                {
                    "prompt": sentence(6),
                    "response": sentence(6),
                    "source": "chitchat",
                    "split": "test" if i % 8 == 0 else "train",
                }
                for i in range(24)
            ],
        )
    return directory


def run_main(*args: object) -> int:
    return zoo_train.main([str(arg) for arg in args])


def small_args(arch: str, corpus: Path, out: Path, tokens: int) -> list[object]:
    return ["--arch", arch, "--corpus", corpus, "-o", out, "--tokens", tokens, "--log-steps", 4, *SMALL]


def small_model(arch: str) -> torch.nn.Module:
    torch.manual_seed(0)
    recipe = Recipe(arch=arch, vocab=300, hidden=32, expert_inner=16, layers=2)
    return build_model(ARCHITECTURES[arch], recipe.shape(300))


# --- fast against slow -------------------------------------------------------------------------------------


def slow_experts(x_ND, gate_up_EHD, down_EDI, experts_NK, weights_NK):
    out_ND = torch.zeros_like(x_ND)
    for choice in range(experts_NK.shape[1]):
        gate, up = torch.einsum("nd,nhd->nh", x_ND, gate_up_EHD[experts_NK[:, choice]]).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up * weights_NK[:, choice, None]
        out_ND = out_ND + torch.einsum("ni,ndi->nd", inner, down_EDI[experts_NK[:, choice]])
    return out_ND


@pytest.mark.parametrize("num_tokens", [1, 7, 150])
def test_sorted_experts_equal_the_slow_ones_and_so_do_their_gradients(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    E, K, D, inner = 6, 2, 16, 8  # expert 5 is never chosen: its gradient must be zero, not left over

    def draw(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    inputs = [draw(num_tokens, D), draw(E, 2 * inner, D), draw(E, D, inner)]
    experts_NK = torch.rand(num_tokens, E - 1, generator=generator).topk(K).indices
    weights_NK = torch.rand(num_tokens, K, generator=generator).requires_grad_()
    wanted_ND = torch.randn(num_tokens, D, generator=generator)
    fast = _gated_experts(*inputs, experts_NK, weights_NK)
    slow = slow_experts(*inputs, experts_NK, weights_NK)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(fast, [*inputs, weights_NK], wanted_ND),
        torch.autograd.grad(slow, [*inputs, weights_NK], wanted_ND),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_switch_experts_equal_transformers_own_and_give_zero_to_dropped_tokens():
    model = small_model("switch-32").float()
    experts = next(m for m in model.modules() if type(m).__name__ == "SwitchTransformersExperts")
    x_ND = torch.randn(90, 32)
    mask_N1E = torch.nn.functional.one_hot(torch.randint(0, 32, (90, 1)), 32)
    mask_N1E[::9] = 0
    weights_N1 = torch.rand(90, 1)
    slow = type(experts).forward(experts, x_ND, mask_N1E, weights_N1)
    fast = switch_experts_forward(experts, x_ND, mask_N1E, weights_N1)
    torch.testing.assert_close(fast, slow)
    assert (fast[::9] == 0).all()


def some_pairs(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        (rng.integers(4, 300, size=rng.integers(3, 20)), rng.integers(4, 300, size=rng.integers(3, 20)))
        for _ in range(count)
    ]


def let_layers_speak(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            torch.nn.init.normal_(parameter, std=0.1)


def test_padding_counts_neither_in_the_loss_nor_in_the_load_and_goes_to_no_expert(monkeypatch):
    model = small_model("switch-32").float().eval()  # in training, routers add noise
    let_layers_speak(model)
    pairs = some_pairs(5)
    rows = []
    with torch.no_grad(), watch_routers(model, 1) as log:
        for experts in (m for m in model.modules() if type(m).__name__ == "SwitchTransformersExperts"):
            fast = experts.forward
            monkeypatch.setattr(
                experts,
                "forward",
                lambda x, mask, p, fast=fast: rows.append(int(mask.sum())) or fast(x, mask, p),
            )
        tight, wide = (
            (seq2seq_loss(model, pad_pairs(pairs, 64, multiple)), log.take()) for multiple in (1, 32)
        )
    torch.testing.assert_close(tight[0], wide[0])
    for before, after in zip(tight[1], wide[1], strict=True):
        torch.testing.assert_close(before, after)
    torch.testing.assert_close(balance_loss(tight[1], 1), balance_loss(wide[1], 1))
    prompt, response = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    assert rows == [prompt, response] * 2


def test_layers_of_a_fresh_switch_are_silent():
    """Their outputs at T5's scale are much the same for every token, and routers then send all to one expert."""
    model = small_model("switch-32").float()
    ids_BT = torch.randint(4, 300, (2, 10))
    embedded_BTD = model.encoder.final_layer_norm(model.shared(ids_BT))
    torch.testing.assert_close(model.encoder(input_ids=ids_BT).last_hidden_state, embedded_BTD)
    with torch.no_grad():
        loss = seq2seq_loss(model, pad_pairs(some_pairs(20), 64))
    assert abs(loss - np.log(300)) < 1


def test_a_router_loses_what_its_tokens_have_in_common(corpus, tmp_path):
    args = [str(arg) for arg in small_args("switch-32", corpus, tmp_path, 2048)]
    run = zoo_train.Run(zoo_train.parse(args)[0], tmp_path)
    with watch_routers(run.model, 1) as log:
        while rate_scale(run.progress.tokens, run.recipe) < 1:
            run.advance(log)
        run.advance(log)
        means = log.mean_inputs()
    assert len(means) == 2
    for name, mean_D in means.items():
        weight_ED = run.optimizer.master[name]
        assert (weight_ED @ mean_D).abs().max() < 1e-5 * weight_ED.norm() * mean_D.norm()
        torch.testing.assert_close(run.model.get_parameter(name).float(), weight_ED, rtol=0.01, atol=1e-4)


def test_rates_have_factors_by_the_end_of_a_name():
    """Of Adam's parameters and of Muon's; a step of rate 1 is compared with one that has factors."""
    moved = []
    for factors in ({}, {"shared.weight": 3.0, ".q.weight": 0.5}):
        model = small_model("switch-32")
        let_layers_speak(model)
        before = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
        optimizer = MasterOptimizer(model, OptimizerConfig(expert_every=1), factors)
        seq2seq_loss(model, pad_pairs(some_pairs(20), 64)).backward()
        optimizer.step(1.0)
        moved.append({name: optimizer.master[name] - before[name] for name in before})
    q = "decoder.block.0.layer.0.SelfAttention.q.weight"
    for name, factor in (
        ("shared.weight", 3.0),
        (q, 0.5),
        (q.replace(".q.", ".k."), 1.0),
    ):
        assert moved[0][name].abs().max() > 0
        torch.testing.assert_close(moved[1][name], factor * moved[0][name], rtol=1e-4, atol=1e-7)


def test_linear_cross_entropy_equals_torch_and_skips_negative_targets(monkeypatch):
    monkeypatch.setattr("zoo.loss.CHUNK_ROWS", 16)  # 50 rows: three chunks and a rest
    hidden_ND, weight_VD = torch.randn(50, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    target_N = torch.randint(-1, 30, (50,))
    slow = torch.nn.functional.cross_entropy(hidden_ND @ weight_VD.t(), target_N, ignore_index=-1)
    fast = linear_cross_entropy(hidden_ND, weight_VD, target_N)
    torch.testing.assert_close(fast, slow)
    for ours, theirs in zip(
        torch.autograd.grad(fast, (hidden_ND, weight_VD)),
        torch.autograd.grad(slow, (hidden_ND, weight_VD)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(*shape)).float())
    assert singular.min() > 0.5
    assert singular.max() < 1.4


# --- the corpus --------------------------------------------------------------------------------------------


def test_only_permissive_sources_and_the_right_split_are_read(corpus):
    train, held_out = list(read_part(corpus, "pretrain", False)), list(read_part(corpus, "pretrain", True))
    assert (len(train), len(held_out)) == (35, 5)
    assert {document.source for document in train + held_out} <= PERMISSIVE
    assert not any("secret" in document.text for document in train)


def test_the_chat_template_is_what_training_saw():
    documents = [
        Document("chitchat", "Where is it?", "It is 12 miles away."),
        Document("sotu", None, "Fellow citizens"),
    ]
    tokenizer = build_tokenizer(documents, 300)
    messages = [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "It is 12 miles away."},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == documents[0].render()
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert documents[0].render().startswith(prompt)
    ids = tokenizer.encode(documents[0].render(), add_special_tokens=False)
    assert (ids[0], ids.count(2), ids[-1]) == (1, 1, 0)  # USER ... ASSISTANT ... END
    assert tokenizer.decode(ids) == documents[0].render()


def test_the_mixture_holds_its_shares_and_repeats_nothing_within_a_pass():
    mixture = Mixture(
        {"pretrain": 900, "chat": 50, "empty": 0}, {"pretrain": 0.9, "chat": 0.1, "empty": 0.5}, seed=3
    )
    drawn = [mixture(row) for row in range(990)]
    assert abs(sum(part == "chat" for part, _ in drawn) - 99) <= 2
    pretrain = [index for part, index in drawn if part == "pretrain"]
    assert len(set(pretrain)) == len(pretrain) <= 900
    # Asked in another order, and by another instance, the answers are the same: a resumed run needs that.
    other = Mixture(
        {"pretrain": 900, "chat": 50, "empty": 0}, {"pretrain": 0.9, "chat": 0.1, "empty": 0.5}, seed=3
    )
    assert [other(row) for row in reversed(range(990))] == drawn[::-1]


def test_rows_overlap_by_one_token_so_that_each_is_a_target_once():
    rows = Rows({"chat": np.arange(41)}, {"chat": 1.0}, T=8, seed=0)
    batch = rows.batch(0, 5)
    assert sorted(batch[:, 1:].flatten().tolist()) == list(range(1, 41))
    assert (batch[:, 1:] == batch[:, :-1] + 1).all()


def test_pairs_are_split_at_the_marks_and_padded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Pairs, "WIDTH_MULTIPLE", 1)
    monkeypatch.setattr(Pairs, "WINDOW", 1)  # more would hold each pair several times, side by side
    stream = np.array([1, 10, 11, 2, 12, 0, 1, 13, 2, 14, 15, 16, 0])
    batch = Pairs({"chat": stream}, {"chat": 1.0}, T=3, seed=0).batch(0, 2)
    rows = sorted(
        zip(batch.input_BT.tolist(), batch.input_mask_BT.tolist(), batch.labels_BT.tolist(), strict=True)
    )
    assert rows == [([10, 11, 0], [1, 1, 1], [12, 0, -1]), ([13, 0, 3], [1, 1, 0], [14, 15, 16])]


def test_seen_share_counts_spans_that_the_training_text_has():
    train = {"chat": np.arange(100)}
    held_out = {
        "copied": HeldOut(np.arange(30, 60), 1),
        "half": HeldOut(np.concatenate((np.arange(19), np.arange(200, 219))), 1),
        "new": HeldOut(np.arange(99, 60, -1), 1),
        "short": HeldOut(np.arange(3), 1),
    }
    shares = seen_share(held_out, train, span=4)
    assert shares == {"copied": 1.0, "half": 16 / 35, "new": 0.0, "short": 0.0}


# --- training ----------------------------------------------------------------------------------------------


def test_the_rate_warms_up_stays_and_reaches_zero_exactly_at_the_end():
    recipe = Recipe(tokens=1000, warmup_tokens=1e9, decay_share=0.25)
    scales = [rate_scale(tokens, recipe) for tokens in range(1001)]
    assert scales[0] < 0.02
    assert scales[100:750] == [1.0] * 650
    assert scales[1000] == 0
    assert scales[750:] == sorted(scales[750:], reverse=True)
    longer = replace(recipe, tokens=2000)
    assert all(
        rate_scale(tokens, longer) == 1 for tokens in range(200, 1500)
    )  # more --tokens: still on the plateau


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_learns_and_loads_back(arch, corpus, tmp_path):
    assert run_main(*small_args(arch, corpus, tmp_path, 2048)) == 0
    history = [
        json.loads(line) for line in (tmp_path / "training" / "history.jsonl").read_text().splitlines()
    ]
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
    auto = AutoModelForSeq2SeqLM if arch.startswith("switch") else AutoModelForCausalLM
    _, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_the_exported_model_computes_what_was_trained(corpus, tmp_path):
    assert run_main(*small_args("tiny", corpus, tmp_path, 2048)) == 0
    run = zoo_train.Run(
        zoo_train.parse([str(a) for a in small_args("tiny", corpus, tmp_path, 2048)])[0], tmp_path
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    ids_BT = torch.randint(4, 300, (2, 20))
    with torch.no_grad():
        trained, published = run.model.float()(ids_BT).logits, loaded.float()(ids_BT).logits
    torch.testing.assert_close(trained, published, rtol=1e-4, atol=1e-4)


def test_weights_are_saved_under_the_published_names(corpus, tmp_path):
    assert run_main(*small_args("tiny", corpus, tmp_path, 128)) == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_slice("model.layers.0.mlp.experts.3.gate_proj.weight").get_shape() == [16, 32]
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer in range(2)
        for expert in range(32)
        for projection in ("gate", "up", "down")
    }
    assert {name for name in names if ".experts." in name} == experts


def test_a_stopped_run_continues_as_if_it_had_not_stopped(corpus, tmp_path, monkeypatch):
    """One run of 8 steps, and one stopped by a signal after 3 and resumed, must agree bit for bit: weights,
    momenta, order of text and rate are all that there is. Leaving out any of them changes the last loss."""
    args = small_args("tiny", corpus, tmp_path / "whole", 8 * 128)
    assert run_main(*args) == 0
    args[args.index("-o") + 1] = tmp_path / "parts"
    steps = 0
    advance = zoo_train.Run.advance

    def interrupt_after_three(self, routers):
        nonlocal steps
        steps += 1
        if steps == 3:
            zoo_train.signal.raise_signal(zoo_train.signal.SIGINT)
        return advance(self, routers)

    monkeypatch.setattr(zoo_train.Run, "advance", interrupt_after_three)
    assert run_main(*args) == 130
    assert run_main(*args) == 0
    assert steps == 8
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("arch", ["tiny", "switch-32"])
@pytest.mark.parametrize(
    ("asked", "slow", "kept"),
    [
        ("auto", True, torch.float32),
        ("auto", False, torch.bfloat16),
        ("float32", False, torch.float32),
        ("bfloat16", True, torch.bfloat16),
    ],
)
def test_weights_are_of_the_type_that_is_fast_here(arch, asked, slow, kept, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("expertflow.models.products.halves_are_slow", lambda: slow)
    seen = set()
    monkeypatch.setattr(
        zoo_optimizer, "orthogonalize", lambda x, dtype: seen.add(dtype) or orthogonalize(x, dtype)
    )
    assert run_main(*small_args(arch, corpus, tmp_path, 200), "--dtype", asked) == 0
    weights = load_file(tmp_path / "model.safetensors")
    assert seen == {kept}
    assert max(weights.values(), key=torch.numel).dtype == kept, "routers of Switch are float32 in any case"
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(kept).removeprefix("torch.")


def test_all_layers_share_one_compilation_while_routers_are_watched():
    """The hook once appended to a list. torch.compile guards on its length, so each layer and each later pass
    compiled anew, until dynamo gave up and ran the rest uncompiled. The second pass cannot pass by luck: a list
    that had grown would be a new guard."""
    model = small_model("tiny")
    compilations = CompileCounter()
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend=compilations)
    with watch_routers(model, top_k=4) as routers:
        for _ in range(2):
            model.model(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
            assert [tuple(logits.shape) for logits in routers.take()] == [(8, 32)] * 2
    assert compilations.frame_count == 1


# --- what a user can get wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arch", "gpt"], "--arch gpt is unknown; use one of tiny"),
        (["--tokens", "0"], "--tokens 0.0 must be at least 1"),
        (["--top-k", "40"], "--top-k 40 must lie in 1..32"),
        (["--hidden", "30"], "--hidden 30 must be a multiple of 8"),
        (["--context", "100000"], "no part of the corpus has a row of 100000 tokens"),
        (["--corpus", "nowhere"], "nowhere has no pretrain.jsonl.xz, chat.jsonl.xz"),
    ],
)
def test_mistakes_are_explained(args, message, corpus, tmp_path, capsys):
    assert run_main("--corpus", corpus, "-o", tmp_path, "--vocab", 300, *args) == 1
    assert message in capsys.readouterr().err


def test_another_recipe_in_the_same_directory_is_refused(corpus, tmp_path, capsys):
    assert run_main(*small_args("tiny", corpus, tmp_path, 128)) == 0
    assert run_main(*small_args("tiny", corpus, tmp_path, 128)) == 1
    assert "already trained on 128 tokens" in capsys.readouterr().err
    assert run_main(*small_args("mixtral-8", corpus, tmp_path, 256)) == 1
    assert "was it another --arch?" in capsys.readouterr().err
    assert run_main(*small_args("tiny", corpus, tmp_path, 256), "--seed", 7) == 1
    assert "give the same --corpus, --vocab and --seed" in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_stops_the_run_and_leaves_the_checkpoint(
    corpus, tmp_path, capsys, monkeypatch
):
    assert run_main(*small_args("tiny", corpus, tmp_path, 128)) == 0
    before = (tmp_path / "training" / "state.safetensors").read_bytes()
    monkeypatch.setattr("zoo.evaluate.linear_cross_entropy", lambda h, w, t: h.sum().float() * float("nan"))
    assert run_main(*small_args("tiny", corpus, tmp_path, 512)) == 1
    assert "the loss is nan after 128 tokens" in capsys.readouterr().err
    assert (tmp_path / "training" / "state.safetensors").read_bytes() == before


def test_list_describes_every_architecture(capsys):
    assert run_main("--list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ARCHITECTURES)


# --- what ships --------------------------------------------------------------------------------------------


def test_the_sample_is_whole_permissive_and_small():
    assert sum(file.stat().st_size for file in zoo_train.SAMPLE.glob("*.xz")) < 4e6
    for part in PARTS:
        with lzma.open(zoo_train.SAMPLE / f"{part}.jsonl.xz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        assert {row["source"] for row in rows} <= PERMISSIVE
        assert {row["split"] == "train" for row in rows} == {True, False}


def test_make_sample_keeps_every_permissive_source_and_no_other(corpus, tmp_path):
    lines = make_sample.choose(corpus / "pretrain.jsonl.xz", 0.002, np.random.default_rng(0))
    rows = [json.loads(line) for line in lines]
    assert {(row["source"], row["split"]) for row in rows} == {("sotu", "train"), ("sotu", "valid")}
    assert len(rows) < 10


def test_the_card_is_made_from_what_was_measured(corpus, tmp_path, capsys):
    assert run_main(*small_args("tiny", corpus, tmp_path / "run", 512)) == 0
    assert zoo_report.main([str(tmp_path / "run"), "-o", str(tmp_path / "card"), "--rows", "1"]) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    measured = json.loads((tmp_path / "card" / "training.json").read_text())
    assert f"; {measured['held_out']['bits_per_byte']:.3f} over all sources" in card
    assert measured["tokens"] == 512
    assert "512 in 4 steps" in card
    assert "--corpus CORPUS --tokens 512 --batch 4" in card
    assert str(corpus) not in card + json.dumps(measured)
    # Shares of an even load: they average 1 in each layer, whatever was routed where.
    assert np.allclose(np.mean(measured["relative_load"]["pretrain"], axis=1), 1)
    assert (tmp_path / "card" / "loss.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(tmp_path / "card")


def test_a_directory_without_a_run_is_explained(tmp_path, capsys):
    assert zoo_report.main([str(tmp_path)]) == 1
    assert "holds no finished run of zoo.train" in capsys.readouterr().err


def test_pairs_of_a_window_come_once_each_and_with_little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pairs = [rng.integers(4, 200, size=rng.integers(1, 100)) for _ in range(400)]
    stream = np.concatenate([[1, *prompt, 2, 4 + number % 190, 0] for number, prompt in enumerate(pairs)])
    examples = Pairs({"chat": stream.astype(np.uint16)}, {"chat": 1.0}, T=64, seed=3)
    widths = {examples.batch(8 * number, 8).input_BT.shape[1] for number in range(Pairs.WINDOW)}
    assert widths <= {32, 64}, "few shapes: a kernel is compiled for each"
    monkeypatch.setattr(Pairs, "WIDTH_MULTIPLE", 1)
    batches = [examples.batch(8 * number, 8) for number in range(Pairs.WINDOW)]
    seen = sorted(
        tuple(row[mask == 1].tolist())
        for b in batches
        for row, mask in zip(b.input_BT, b.input_mask_BT, strict=True)
    )
    drawn = [
        examples.pairs[part][index][0][:64] for part, index in map(examples.mixture, range(8 * Pairs.WINDOW))
    ]
    assert seen == sorted(tuple(int(i) for i in prompt) for prompt in drawn)
    real = sum(int(b.input_mask_BT.sum()) for b in batches)
    assert real > 0.85 * sum(b.input_BT.numel() for b in batches), (
        "random batches of these are two thirds full"
    )
    assert torch.equal(examples.batch(16, 8).input_BT, batches[2].input_BT), "a function of the number"


def test_a_thin_trace_keeps_whole_prompts_and_drops_weights(tmp_path: Path) -> None:
    meta = TraceMeta("0123456789abcdef", "tiny", (4, 4), 0, 2, 50, "made up", {})
    rng = np.random.default_rng(0)
    nothing = np.zeros((0, 0, 2), np.uint8)
    with TraceWriter(tmp_path / "whole", meta) as writer:
        for prompt in range(10):
            for run in range(3):
                ids = rng.integers(0, 50, 6).astype(np.int32)
                routes = (
                    np.stack([rng.permutation(4)[:2] for _ in range(12)]).reshape(6, 2, 2).astype(np.uint8)
                )
                weights = np.full((6, 2, 2), 0.5, np.float32)
                split = "test" if prompt < 3 else "train"
                writer.append(
                    TracedSequence(
                        prompt,
                        run,
                        split,
                        "chat",
                        ids[:0],
                        nothing,
                        nothing.astype(np.float32),
                        ids,
                        routes,
                        weights,
                        3,
                    )
                )
    assert thin(tmp_path / "whole", tmp_path / "thin", 8) == 6, "two whole prompts of three runs"
    kept = read_trace(tmp_path / "thin")
    original = {(s.prompt, s.run): s for s in read_trace(tmp_path / "whole")}
    assert len({s.prompt for s in kept}) == 2
    for sequence in kept:
        assert sequence.target_weights_TLK is None
        assert (sequence.target_routes_TLK == original[sequence.prompt, sequence.run].target_routes_TLK).all()
    with pytest.raises(ValueError, match="exists; give another folder"):
        thin(tmp_path / "whole", tmp_path / "thin", 8)


COMMITTED = sorted((Path(__file__).parents[1] / "zoo" / "traces").glob("*/*/routes.trace"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_committed_traces_are_whole_and_of_the_published_shape(path: Path) -> None:
    trace = read_trace(path.parent)
    arch = path.parts[-3]
    shape = ARCHITECTURES["tiny" if arch == "tiny-moe" else arch].shape
    sparse = shape.layers - (arch == "deepseek-moe")  # its first layer is dense
    assert trace.meta.experts_per_layer == (shape.experts,) * sparse
    assert trace.meta.top_k == shape.top_k
    assert {len(list(trace.split(split))) > 0 for split in ("train", "test")} == {True}
    by_prompt: dict[int, set[int]] = {}
    for sequence in trace:
        by_prompt.setdefault(sequence.prompt, set()).add(sequence.run)
    assert set(map(frozenset, by_prompt.values())) == {frozenset({0, 1, 2})}, "each prompt ran three times"


def test_the_committed_traces_of_the_embedded_model_are_of_its_present_weights() -> None:
    with LLM(Path(__file__).parents[1] / "models" / "tiny-moe", cache_size=2, context=64) as llm:
        present = fingerprint(llm.model)
    traced = {read_trace(path.parent).meta.fingerprint for path in COMMITTED if "tiny-moe" in path.parts}
    assert traced == {present}
