"""Prefetch by prediction in a running model: no predictor changes a bit, and the right ones are listened to."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from expertflow.core import MoEShape
from expertflow.models.attach import ExpertFlowConfig
from expertflow.models.capture import count_source_layers
from expertflow.models.fingerprint import fingerprint
from expertflow.models.foresight import Name, Question, Upcoming
from expertflow.models.predicting import Predicting
from expertflow.predictor.combine import Later, Opinions, at_once
from expertflow.predictor.model import PredictedModel, RoutingPathPredictor
from expertflow.predictor.serving import Expected, Foreseen
from expertflow.predictor.sizes import PredictorSizes
from expertflow.predictor.storage import save_predictor
from tests.families import FAMILIES, write_checkpoint
from tests.models.test_foresight import SaysItsTokens, rows

PROMPTS = [[40, 41, 42, 43, 44, 45, 46, 47, 48], [60, 61, 62], [99]]
NEW = 6
LONG = 60.0  # for what takes milliseconds


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("predicting")
    return {name: write_checkpoint(name, root / name) for name in ("qwen2_moe", "switch")}


def load(folder: Path, name: str, **settings: Any) -> Any:
    auto = AutoModelForSeq2SeqLM if FAMILIES[name].seq2seq else AutoModelForCausalLM
    settings = {"cache_size": 2, "batch": 6, **settings}
    return auto.from_pretrained(folder, quantization_config=ExpertFlowConfig(**settings)).eval()


def padded(left: bool) -> tuple[Tensor, Tensor]:
    longest = max(map(len, PROMPTS))
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        place = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return ids, mask


def answers(model: Any, name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """(tokens, scores of each step) of a left-padded batch (an encoder's: right-padded)."""
    ids, mask = padded(left=not FAMILIES[name].seq2seq)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits)


def trained_for(model: Any, folder: Path, arch: str) -> Path:
    """A tiny predictor of this model, as random as it began."""
    loaded: Any = model.expertflow
    predicted = PredictedModel(
        fingerprint(model),
        "tiny",
        loaded.cache.shape.experts_per_layer,
        count_source_layers(model),
        1 if model.config.is_encoder_decoder else 3,
        model.config.vocab_size,
    )
    sizes = PredictorSizes(arch=arch, hidden=8, feed_forward=16, heads=2, next_use=arch == "causal")
    save_predictor(folder, RoutingPathPredictor(sizes, predicted).compact(), {}, {})
    return folder


class Noise:
    """Says anything of any pass and layer."""

    def __init__(self, model: Any):
        self.layers = len(model.expertflow.moe_layers) - count_source_layers(model)
        self.experts = max(model.expertflow.cache.shape.experts_per_layer)
        self.draw = torch.Generator().manual_seed(0)
        self.begun: list[Any] = []
        self.ended: list[Any] = []
        self.learnt: list[Any] = []
        self.asked = 0

    def begin(self, context: Any, origin_B: Any, foreseen: Foreseen | None = None) -> Expected:
        self.begun.append((context, origin_B))
        p_LE = torch.rand(self.layers, self.experts, generator=self.draw)
        p_LE[0, 0], later = float("nan"), p_LE * 20
        return Expected(p_LE, later)

    def foresee(self, context: Any, origin_B: Any, lane: Any) -> Foreseen:
        rows = len(context.target_BT)
        p_NLE = torch.rand(rows, self.layers, self.experts, generator=self.draw)
        return Foreseen(Opinions(p_NLE[:, None], torch.zeros(rows, dtype=torch.int64), p_NLE))

    def soon(self, foreseen: Foreseen) -> Tensor:
        p_LE = torch.rand(self.layers, self.experts, generator=self.draw)
        p_LE[-1, -1] = float("nan")
        return p_LE

    def profile(self, ids_T: Tensor) -> Tensor:
        return torch.rand(self.layers, self.experts, generator=self.draw)

    def ahead(self, layer: int, hidden_ND: Tensor, routes_NK: Tensor) -> Tensor | None:
        self.asked += 1
        assert len(hidden_ND) == len(routes_NK)
        if layer + 1 == self.layers:
            return None
        return torch.rand(self.experts, generator=self.draw)

    def end(self, context: Any, routes_BSLK: Tensor, later: Later = at_once) -> None:
        self.ended.append(routes_BSLK)

    def learn(self, context: Any, routes_BSLK: Tensor, later: Later = at_once) -> None:
        self.learnt.append((context, routes_BSLK))

    def forget(self) -> None:
        pass


def listen_to(model: Any, predictor: Any) -> Any:
    predicting: Any = model.expertflow.predicting
    predicting.make = lambda top_k: predictor
    return predicting


@pytest.mark.parametrize("name", ["qwen2_moe", "switch"])
@pytest.mark.parametrize("kind", ["online", "draft", "causal", "paper", "noise", "failing"])
def test_no_predictor_changes_a_bit(folders: dict[str, Path], name: str, kind: str, tmp_path: Path) -> None:
    plain = load(folders[name], name)
    tokens, logits = answers(plain, name)
    setting = "draft" if kind == "draft" else "online"
    if kind in ("causal", "paper"):
        setting = str(trained_for(plain, tmp_path / kind, kind))
    model = load(folders[name], name, predictor=setting)
    predicting: Any = model.expertflow.predicting
    if kind == "noise":
        listen_to(model, Noise(model))
    if kind == "failing":
        failing: Any = Noise(model)
        failing.end = lambda context, routes, later: 1 / 0
        listen_to(model, failing)
    for _ in range(2):
        for each, expected in zip(answers(model, name), (tokens, logits), strict=True):
            assert torch.equal(each, expected)
    stats = predicting.stats
    assert (stats.failed is not None) == (kind == "failing"), stats.failed
    if kind != "failing":
        # Noise speaks of prompts too; Switch's prompt is one token. The very first pass makes the predictor.
        assert stats.passes == 2 * NEW - 1 if kind == "noise" or name == "switch" else 2 * (NEW - 1)
        assert stats.needed > 0
        assert 0 < stats.look_ahead_seconds < stats.predict_seconds
        assert model.expertflow.cache.stats.prefetches > 0


def test_a_predictor_that_fails_says_so_once_and_is_not_asked_again(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folders["qwen2_moe"], "qwen2_moe", predictor="online")
    failing: Any = Noise(model)

    def ahead(*args: Any) -> None:
        raise ArithmeticError("no number")

    failing.ahead = ahead
    predicting = listen_to(model, failing)
    with caplog.at_level(logging.WARNING):
        answers(model, "qwen2_moe")
        begun = len(failing.begun)
        answers(model, "qwen2_moe")
    assert len(failing.begun) == begun == 2, "the prompt, and the step in which it failed"
    assert [record.message for record in caplog.records if "no number" in record.message][1:] == []
    predicting.reset_stats()
    answers(model, "qwen2_moe")
    assert len(failing.begun) == begun
    assert predicting.stats.failed == "ArithmeticError: no number"
    assert predicting.newest_forecast_LE is None


def test_it_follows_rows_and_tells_what_came_true(folders: dict[str, Path]) -> None:
    model = load(folders["qwen2_moe"], "qwen2_moe", predictor="online")
    heard: Any = Noise(model)
    listen_to(model, heard)
    tokens, _ = answers(model, "qwen2_moe")
    prompt, *steps = heard.begun
    assert [
        row[mask].tolist() for row, mask in zip(prompt[0].target_BT, prompt[0].target_mask_BT, strict=True)
    ] == PROMPTS
    assert len(steps) == NEW - 1
    for number, (context, origin_B) in enumerate(steps):
        assert origin_B.tolist() == [0, 1, 2]
        assert context.num_new == 1
        for row, prompt_ids in enumerate(PROMPTS):
            known = context.target_BT[row][context.target_mask_BT[row]].tolist()
            written = tokens[row, tokens.shape[1] - NEW :][: number + 1].tolist()
            assert known == prompt_ids + written
        before = context.routes_BTLK[:, -2]
        assert torch.equal(before, heard.ended[number][:, -1])
    assert heard.asked == heard.layers * (NEW - 1)


def test_beams_that_change_places_keep_their_context(folders: dict[str, Path]) -> None:
    plain = load(folders["qwen2_moe"], "qwen2_moe")
    expected, _ = answers(plain, "qwen2_moe", num_beams=2)
    model = load(folders["qwen2_moe"], "qwen2_moe", predictor="online")
    heard: Any = Noise(model)
    listen_to(model, heard)
    tokens, _ = answers(model, "qwen2_moe", num_beams=2)
    assert torch.equal(tokens, expected)
    origins = [origin_B for _, origin_B in heard.begun[1:]]
    assert all(origin_B is not None for origin_B in origins)
    assert any(origin_B.tolist() != list(range(6)) for origin_B in origins), (
        "no beam moved: the test sees nothing"
    )


def test_passes_that_cannot_be_followed_run_without_a_forecast(folders: dict[str, Path]) -> None:
    model = load(folders["qwen2_moe"], "qwen2_moe", predictor="online", batch=70)
    heard: Any = Noise(model)
    predicting = listen_to(model, heard)
    ids = torch.arange(5, 5 + 66)[:, None]
    with torch.no_grad():
        model(input_ids=ids)  # more rows than are followed
        model(inputs_embeds=model.get_input_embeddings()(ids[:2]))
        assert heard.begun == []
        out = model(input_ids=ids[:2].T, use_cache=True)
        out.past_key_values.crop(-1)
        model(input_ids=ids[:1], past_key_values=out.past_key_values)
    assert [origin_B for _, origin_B in heard.begun] == [None, None]
    assert predicting.stats.failed is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predictor": "online", "policy": "lru"}, "policy='lru' makes no use of predictor='online'"),
        ({"predictor": "nowhere"}, "neither 'none', 'online', 'draft' nor a folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertFlowConfig(**settings)


def test_a_predictor_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = trained_for(load(folders["switch"], "switch"), tmp_path / "other", "causal")
    with pytest.raises(ValueError, match="train a predictor on traces of this model"):
        load(folders["qwen2_moe"], "qwen2_moe", predictor=str(other))


def test_defaults_and_the_memory_of_a_predictor(folders: dict[str, Path]) -> None:
    assert ExpertFlowConfig().settings.policy == "lru"
    assert ExpertFlowConfig(predictor="online").settings.policy == "plec"
    assert ExpertFlowConfig(predictor="online", policy="plec-paper").settings.policy == "plec-paper"
    plain, model = (load(folders["qwen2_moe"], "qwen2_moe", predictor=p) for p in ("none", "online"))
    assert plain.expertflow.predicting is None
    assert plain.expertflow.plan.predictor_bytes == 0
    plan = model.expertflow.plan
    assert plan.predictor_bytes > 16 << 20
    assert ("predictor", plan.predictor_bytes) in [row[:2] for row in plan.rows()]
    assert sum(row[1] for row in plan.rows()) == plan.total_bytes


def test_a_closed_gate_stops_prefetching_and_asking(folders: dict[str, Path]) -> None:
    model = load(folders["qwen2_moe"], "qwen2_moe", predictor="online")
    heard: Any = Noise(model)
    predicting = listen_to(model, heard)
    answers(model, "qwen2_moe")
    begun, prefetches = len(heard.begun), model.expertflow.cache.stats.prefetches
    upcoming = Upcoming([Name("a", 0)], torch.tensor([[7]]), None)
    assert predicting.newest_forecast_LE is not None
    assert predicting.question("lane", [upcoming]) is not None
    predicting.gate.on = False
    assert predicting.newest_forecast_LE is None
    assert predicting.question("lane", [upcoming]) is None
    counted = predicting.gate._passes
    answers(model, "qwen2_moe")
    assert len(heard.begun) == begun
    assert model.expertflow.cache.stats.prefetches == prefetches
    assert predicting.gate._passes == counted + NEW - 1


@pytest.mark.parametrize("name", ["qwen2_moe", "switch"])
def test_look_ahead_is_asked_of_real_tokens_and_heard_of_the_next_layer(
    folders: dict[str, Path], name: str
) -> None:
    model = load(folders[name], name, predictor="online")
    heard: Any = Noise(model)
    predicting = listen_to(model, heard)
    ahead, said, tokens = heard.ahead, [], set()

    def noted(layer: int, hidden_ND: Tensor, routes_NK: Tensor) -> Tensor | None:
        p_E = ahead(layer, hidden_ND, routes_NK)
        tokens.add(len(hidden_ND))
        if p_E is not None:
            said.append((predicting.source_layers + layer + 1, p_E.tolist()))
        return p_E

    heard.ahead = noted
    cache, told = model.expertflow.cache, []
    refine = cache.refine
    cache.refine = lambda *news: (told.append(news), refine(*news))
    for _ in range(2):  # the first pass of all makes the predictor
        answers(model, name)
    assert told == said
    assert len(said) >= (heard.layers - 1) * (2 * NEW - 1)
    prompt = len(PROMPTS) if name == "switch" else sum(map(len, PROMPTS))
    assert tokens == {prompt, len(PROMPTS)}


def test_recall_and_precision_are_of_experts_by_layer_and_pass(folders: dict[str, Path]) -> None:
    model = load(folders["qwen2_moe"], "qwen2_moe", predictor="online")
    heard: Any = Noise(model)
    predicting = listen_to(model, heard)
    guess_LE = torch.zeros(heard.layers, heard.experts)
    guess_LE[:, :2] = 0.5
    guess_LE[:, 2:] = 0.49
    heard.begin = lambda *_: Expected(guess_LE, guess_LE * 0)
    heard.ahead = lambda *_: None
    answers(model, "qwen2_moe")
    used = [set(routes.flatten().tolist()) for passed in heard.ended[1:] for routes in passed[:, 0].unbind(1)]
    stats = predicting.stats
    assert stats.passes == NEW - 1
    assert stats.needed == sum(map(len, used))
    assert stats.predicted == 2 * heard.layers * stats.passes
    assert stats.right == sum(len(experts & {0, 1}) for experts in used)
    assert (stats.recall, stats.precision) == (stats.right / stats.needed, stats.right / stats.predicted)


class Hearing:
    """A cache that writes down what it is told: None for a pass that begins, else of whom the next one is."""

    timeline = None
    shape = MoEShape((3, 3))

    def __init__(self) -> None:
        self.heard: list[float | None] = []

    def begin_pass(self, forecast: Any) -> None:
        self.heard.append(None)

    def expect_next(self, p_LE: list[list[float]]) -> None:
        self.heard.append(round(p_LE[0][0], 4))

    def news(self) -> list[float | None]:
        news, self.heard = self.heard, []
        return news


class Adds(SaysItsTokens):
    """Of a pass to come: a hundredth of the sum of its rows' tokens."""

    def soon(self, foreseen: Foreseen) -> Tensor:
        return foreseen.p_NLE.sum(0)


def hearing(predictor: Any) -> tuple[Hearing, Any]:
    cache = Hearing()
    predicting: Any = Predicting(cache, "adds", lambda top_k: predictor)  # type: ignore[arg-type]
    predicting._predictor = predictor
    return cache, predicting


def question(*tokens: int) -> Question:
    """About sequences that are named by their tokens."""
    return Question(tokens, [Name(token, 0) for token in tokens], rows(*tokens))


def test_of_the_next_pass_is_said_what_is_known_and_more_when_more_is_known() -> None:
    cache, predicting = hearing(Adds())
    predicting.then([question(1, 2, 3).names, question(4).names])
    predicting.foresee(question(1, 2), hidden=False)
    assert cache.news() == [], "no pass has begun"
    predicting._begin(None, (), {})
    assert cache.news() == [None, 0.03]
    predicting.foresee(question(3), hidden=True)
    assert cache.news() == [0.06]
    predicting.foresee(question(4), hidden=True)
    assert cache.news() == [], "all has been said of the pass after this one"
    predicting._begin(None, (), {})
    assert cache.news() == [None, 0.04]
    predicting._begin(None, (), {})
    predicting.foresee(question(5), hidden=True)
    assert cache.news() == [None], "nobody knows who comes next"
    predicting.then([question(6).names])
    predicting._begin(None, (), {})
    assert cache.news() == [None], "nothing was said of them"
    predicting.then([question(5).names])
    predicting._begin(None, (), {})
    assert cache.news() == [None, 0.05]


def test_a_closed_gate_says_nothing_of_the_next_pass() -> None:
    cache, predicting = hearing(Adds())
    predicting.gate.on = False
    predicting.then([question(1).names])
    predicting.foresee(question(1), hidden=False)
    predicting._begin(None, (), {})
    assert cache.news() == [None]


def test_who_fails_at_the_next_pass_is_not_asked_again_and_the_pass_goes_on() -> None:
    asked: list[Any] = []

    class Fails(Adds):
        def soon(self, foreseen: Foreseen) -> Tensor:
            asked.append(foreseen)
            raise ArithmeticError("no number")

    cache, predicting = hearing(Fails())
    predicting.foresee(question(1), hidden=False)
    for _ in range(2):
        predicting.then([question(1).names])
        predicting._begin(None, (), {})
    assert len(asked) == 1
    assert predicting.stats.failed == "ArithmeticError: no number"
    assert predicting.foresee(question(1), hidden=False) is None
    assert cache.news() == [None]


def test_nobody_speaks_of_a_pass_that_has_begun_meanwhile() -> None:
    """Another thread knows what follows this pass; before it has said so the next one is about to begin."""
    speaking, waiting = threading.Event(), threading.Event()

    class Slow(Adds):
        def soon(self, foreseen: Foreseen) -> Tensor:
            speaking.set()
            assert waiting.wait(LONG), "the next pass has begun"
            return super().soon(foreseen)

    class Turns:
        """Tells that somebody waits for it."""

        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __enter__(self) -> None:
            if not self.lock.acquire(blocking=False):
                waiting.set()
                assert self.lock.acquire(timeout=LONG)

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    cache, predicting = hearing(Slow())
    predicting._turns = Turns()
    predicting.then([question(1).names])
    predicting._begin(None, (), {})
    assert cache.news() == [None]
    thread = threading.Thread(target=lambda: predicting.foresee(question(1), hidden=True))
    thread.start()
    assert speaking.wait(LONG)
    predicting._begin(None, (), {})
    thread.join(LONG)
    assert cache.news() == [0.01, None]
