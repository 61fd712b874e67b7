"""Check: prove on a user's own checkpoint that expertflow computes what transformers computes.

Two claims, kept apart. Among ourselves (another cache size, every expert resident, forced mispredictions)
equality is bit for bit. Against transformers' eager experts it is within the rounding of sums in another
order. A model that does not fit in memory whole is compared layer by layer: each MoE layer's output, on the
real hidden states, with transformers' own experts module, filled by transformers' own loader. Of our code
the reference uses the list of experts modules and nothing else.
"""

from __future__ import annotations

import gc
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from expertflow import budget
from expertflow.config import Settings, format_bytes
from expertflow.core import ExpertId
from expertflow.engine.source import model_class, read_config, resolve_model
from expertflow.models.attach import ExpertFlowConfig, LoadedExperts
from expertflow.models.spans import find_moe_layers
from expertflow.store.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from rich.console import Console

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a small engine that",
    "Q: If a train leaves at noon and travels 60 km in an hour, how far is it by three?\nA:",
)
# Largest difference allowed, as a part of the largest magnitude compared. A wrong or stale expert is off by
# about 1. Logits carry the rounding of all layers, in half precision with now and then another route.
LOGIT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LAYER_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = ("auto", "float32", "bfloat16", "float16")
HINTS = ("nothing", "noise", "everything")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same prompts; `where` is where their logits differ most."""

    name: str
    bit_identical: bool
    largest: float
    where: str
    equal_tokens: int
    tokens: int


@dataclass(frozen=True)
class LayerComparison:
    """One MoE layer's output against transformers' experts on the same hidden states."""

    layer: int
    name: str
    tokens: int
    largest: float
    magnitude: float  # of the reference's largest output
    seconds: float  # to read the reference's parameters and compute
    reference_bytes: int

    def within(self, tolerance: float) -> bool:
        return self.largest <= tolerance * self.magnitude  # false for NaN


@dataclass(frozen=True)
class CheckReport:
    model: str
    mode: str  # "whole" or "layer by layer"
    dtype: str
    num_slots: int
    num_experts: int
    num_prompts: int
    seed: int
    ours: tuple[Comparison, ...]
    transformers: Comparison | None  # None: layer by layer
    layers: tuple[LayerComparison, ...]  # empty: whole
    magnitude: float  # of the largest logit
    tolerance: float
    tokens_must_agree: bool
    seconds: float
    peak_bytes: int  # of this process, since it started

    @property
    def ours_identical(self) -> bool:
        return all(run.bit_identical and run.equal_tokens == run.tokens for run in self.ours)

    @property
    def agrees_with_transformers(self) -> bool:
        if self.transformers is None:
            return bool(self.layers) and all(layer.within(self.tolerance) for layer in self.layers)
        tokens_agree = self.transformers.equal_tokens == self.transformers.tokens
        return self.transformers.largest <= self.tolerance * self.magnitude and (
            tokens_agree or not self.tokens_must_agree
        )

    @property
    def passed(self) -> bool:
        return self.ours_identical and self.agrees_with_transformers

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def lines(self) -> list[str]:
        """For people: what was compared, how far apart it is, the verdict last."""
        said = [
            f"{self.model}: {self.num_slots} of {self.num_experts} experts in memory, {self.num_prompts} "
            f"prompts, greedy, {self.dtype}"
        ]
        for run in self.ours:
            state = "bit-identical" if run.bit_identical else f"DIFFERS by {run.largest:.3g} at {run.where}"
            said.append(f"  {run.name}: {state}; tokens equal {run.equal_tokens} of {run.tokens}")
        if self.transformers is not None:
            run = self.transformers
            said.append(
                f"  against transformers' eager experts: max |Δlogit| = {run.largest:.3g} in {self.dtype} "
                f"(largest logit {self.magnitude:.3g}, allowed {self.tolerance * self.magnitude:.3g}), at "
                f"{run.where}; greedy tokens equal {run.equal_tokens} of {run.tokens}"
            )
        for layer in self.layers:
            state = "ok" if layer.within(self.tolerance) else "DIFFERS"
            said.append(
                f"  {layer.name}: {state}, max |Δ| = {layer.largest:.3g} of {layer.magnitude:.3g} over "
                f"{layer.tokens} tokens ({layer.seconds:.2f} s, {format_bytes(layer.reference_bytes)})"
            )
        said.append(f"  {self.seconds:.1f} s, peak memory of the process {format_bytes(self.peak_bytes)}")
        said.append(self.verdict())
        return said

    def verdict(self) -> str:
        if not self.ours_identical:
            return "FAILED: the cache changes the output. Please report it with the lines above."
        if not self.agrees_with_transformers:
            return "FAILED: the output is not that of transformers. Please report it with the lines above."
        if self.transformers is None:
            worst = max(self.layers, key=lambda layer: layer.largest / (layer.magnitude or 1))
            return (
                f"passed: bit-identical to ours whatever is cached or predicted; each of {len(self.layers)} MoE "
                f"layers agrees with transformers' eager experts (worst {worst.largest:.3g} of "
                f"{worst.magnitude:.3g} in {self.dtype})"
            )
        run = self.transformers
        return (
            f"passed: bit-identical to ours with all experts resident; max |Δlogit| = {run.largest:.3g} in "
            f"{self.dtype} against transformers' eager experts; greedy tokens equal {run.equal_tokens} of "
            f"{run.tokens}"
        )


def run_check(
    model: str,
    settings: Settings,
    *,
    revision: str | None = None,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    seed: int = 0,
    dtype: str = "auto",
    layer_by_layer: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """The command: check and print. Returns the exit status, 1 when parity fails."""
    from rich.console import Console as RichConsole

    _refuse_unknown(dtype)
    console = console or RichConsole()
    progress: Progress | None = None
    if not as_json:

        def progress(step: str) -> None:
            console.print(f"[dim]{step} ...[/dim]")

    report = check_model(
        resolve_model(model, revision),
        settings,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        seed=seed,
        dtype=dtype,
        layer_by_layer=layer_by_layer,
        on_progress=progress,
    )
    if as_json:
        console.print_json(json.dumps(report.to_dict()))
    else:
        for line in report.lines():
            console.print(line, markup=False, highlight=False)
    return 0 if report.passed else 1


def check_model(
    folder: Path,
    settings: Settings,
    *,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    seed: int = 0,
    dtype: str = "auto",
    layer_by_layer: bool = False,
    on_progress: Progress | None = None,
) -> CheckReport:
    """Compare the checkpoint in `folder`, under `settings`, with itself and with transformers.

    Settings without memory or cache_size keep a quarter of the experts. dtype: of DTYPES, what both compute
    in; "auto" is the checkpoint's. layer_by_layer: even when the whole model fits in memory. ValueError
    when not even one layer fits beside the model.
    """
    _refuse_unknown(dtype)
    started = time.perf_counter()
    say = on_progress or (lambda step: None)
    settings = settings.on_cpu("check")
    folder = resolve_model(folder)
    checkpoint = open_checkpoint(folder)
    inputs = _token_ids(folder, prompts, seed)
    longest = max(ids.shape[1] for ids in inputs)
    if longest + max_new_tokens > settings.context:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed context={settings.context}; "
            f"raise --context, or check with shorter prompts"
        )
    available = max(0, budget.free_bytes() - budget.process_bytes())
    fits = _weights_bytes(checkpoint, dtype) <= available
    whole = fits and not layer_by_layer
    theirs: _Run | None = None
    if whole:
        say("transformers, with its eager experts")
        theirs = _run_transformers(folder, dtype, inputs, max_new_tokens)
    settings = _bounded(settings, folder, dtype, available, fits)
    ours: list[Comparison] = []
    layers: list[LayerComparison] = []
    with _loaded(folder, settings, dtype) as model:
        say("expertflow, as it would run")
        base = _run(model, inputs, max_new_tokens)
        computed, attached = model.dtype, _attached(model)
        num_slots, shape = attached.cache.num_slots, attached.cache.shape
        for kind in HINTS:
            say(f"mispredictions: prefetch {kind}")
            with _hints(model, kind, seed):
                again = _run(model, inputs, max_new_tokens)
            ours.append(_compare(f"predictor that returns {kind}", again, base, inputs))
        if not whole:
            layers = _check_layers(model, folder, checkpoint, inputs, say)
    del model, attached  # the next variant needs their memory
    other = num_slots // 2 if num_slots >= 4 else num_slots + 1
    variants = {f"{other} slots instead of {num_slots}": other / shape.num_layers}
    if whole:
        variants["all experts resident"] = float(max(shape.experts_per_layer))
    for name, cache_size in variants.items():
        say(name)
        with _loaded(folder, replace(settings, memory=None, cache_size=cache_size), dtype) as model:
            ours.append(_compare(name, _run(model, inputs, max_new_tokens), base, inputs))
        del model
    tolerances = LOGIT_TOLERANCE if whole else LAYER_TOLERANCE
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return CheckReport(
        model=str(folder),
        mode="whole" if whole else "layer by layer",
        dtype=str(computed).removeprefix("torch."),
        num_slots=num_slots,
        num_experts=shape.num_experts,
        num_prompts=len(inputs),
        seed=seed,
        ours=tuple(ours),
        transformers=None if theirs is None else _compare("transformers", base, theirs, inputs),
        layers=tuple(layers),
        magnitude=max(logits.abs().max().item() for logits in (theirs or base).logits),
        tolerance=tolerances[computed],
        tokens_must_agree=computed.itemsize >= 4,
        seconds=time.perf_counter() - started,
        peak_bytes=peak if sys.platform == "darwin" else peak * 1024,
    )


# Prompts and settings.


def _refuse_unknown(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one to check in; use {', '.join(DTYPES)}")


def _token_ids(folder: Path, prompts: Sequence[str] | None, seed: int) -> list[Tensor]:
    """[1, T] per prompt; random ids for a checkpoint without a tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        if prompts is not None:
            raise ValueError(
                f"{folder}: prompts need a tokenizer, which could not be loaded: {error}"
            ) from None
        generator = torch.Generator().manual_seed(seed)
        vocabulary = AutoConfig.from_pretrained(folder).get_text_config(decoder=True).vocab_size
        return [
            torch.randint(0, vocabulary, (1, 8 + 4 * n), generator=generator) for n in range(len(PROMPTS))
        ]
    if prompts is not None and not prompts:
        raise ValueError("no prompts to check with; leave them out to use the built-in ones")
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in prompts or PROMPTS]
    for text, tokens in zip(prompts or PROMPTS, ids, strict=True):
        if not tokens.numel():
            raise ValueError(f"the prompt {text!r} has no tokens; leave it out")
    return ids


def _weights_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Of the whole model in memory."""
    stored = sum(identity.nbytes for identity in checkpoint.identities.values())
    if dtype == "auto":
        return stored
    spans = checkpoint.spans.values()
    widest = max((span.dtype.itemsize for span in spans if span.dtype.is_floating_point), default=4)
    return stored * getattr(torch, dtype).itemsize // widest


def _bounded(settings: Settings, folder: Path, dtype: str, available: int, fits: bool) -> Settings:
    """Settings that leave room for the reference and do not simply hold every expert."""
    if settings.memory is not None or settings.cache_size is not None:
        return settings
    skeleton = _Reference(folder, dtype)
    if fits:
        return replace(settings, cache_size=max(1.0, skeleton.most_experts / 4))
    reserve = 2 * skeleton.largest_layer_bytes
    if reserve >= available:
        raise ValueError(
            f"{folder}: comparing one MoE layer takes {format_bytes(reserve)}, and {format_bytes(available)} are "
            f"free; close other programs, or check on a machine with more memory"
        )
    return replace(settings, memory=budget.process_bytes() + available - reserve)


# Running.


@dataclass(frozen=True)
class _Run:
    tokens: list[list[int]]  # new ones, per prompt
    logits: list[Tensor]  # [positions, V] per prompt: those of the prompt (no encoder), then each new token's


@contextmanager
def _loaded(folder: Path, settings: Settings, dtype: str) -> Iterator[PreTrainedModel]:
    model = model_class(read_config(folder), str(folder)).from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=ExpertFlowConfig(**asdict(settings)),
        trust_remote_code=False,
    )
    try:
        yield model
    finally:
        _attached(model).close()
        del model
        gc.collect()


def _attached(model: PreTrainedModel) -> LoadedExperts:
    return cast(LoadedExperts, model.expertflow)


def _run_transformers(folder: Path, dtype: str, inputs: Sequence[Tensor], max_new_tokens: int) -> _Run:
    model = model_class(read_config(folder), str(folder)).from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", trust_remote_code=False
    )
    try:
        return _run(model, inputs, max_new_tokens)
    finally:
        del model
        gc.collect()


@torch.no_grad()
def _run(model: Any, inputs: Sequence[Tensor], max_new_tokens: int) -> _Run:
    """Greedy, one prompt at a time: rows then never change with what else is in the batch."""
    tokens, logits = [], []
    for ids in inputs:
        parts = [] if model.config.is_encoder_decoder else [model(input_ids=ids).logits[0]]
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        parts += [step.to(model.dtype) for step in answer.logits]
        tokens.append(answer.sequences[0, -len(answer.logits) :].tolist())
        logits.append(torch.cat(parts))
    return _Run(tokens, logits)


@contextmanager
def _hints(model: PreTrainedModel, kind: str, seed: int) -> Iterator[None]:
    """A predictor that is wrong: it speaks before every MoE layer."""
    cache, moe_layers = _attached(model).cache, _attached(model).moe_layers
    experts = sorted(cache.store.experts)
    draw = random.Random(seed)

    def hint(*_: Any) -> None:
        guessed: list[ExpertId] = {
            "nothing": [],
            "noise": draw.sample(experts, k=draw.randint(1, len(experts))),
            "everything": experts,
        }[kind]
        cache.prefetch(guessed)

    hooks = [model.get_submodule(layer.name).register_forward_pre_hook(hint) for layer in moe_layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _compare(name: str, ours: _Run, theirs: _Run, inputs: Sequence[Tensor]) -> Comparison:
    """Logits are compared up to the first token that differs: after it the questions differ too."""
    largest, where, identical, equal, total = 0.0, "nowhere", True, 0, 0
    for number, ids in enumerate(inputs):
        mine, other = ours.tokens[number], theirs.tokens[number]
        agreed = next(
            (step for step, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b),
            min(len(mine), len(other)),
        )
        equal, total = equal + agreed, total + max(len(mine), len(other))
        of_prompt = len(theirs.logits[number]) - len(other)
        comparable = of_prompt + min(agreed + 1, len(mine), len(other))
        a, b = ours.logits[number][:comparable], theirs.logits[number][:comparable]
        identical = identical and mine == other and torch.equal(a, b)
        for position, off in enumerate((a.double() - b.double()).abs().amax(dim=-1).tolist()):
            if off > largest or off != off:
                largest = off
                new = position - of_prompt
                place = f"new token {new + 1}" if new >= 0 else f"token {position + 1} of {ids.shape[1]}"
                where = f"prompt {number + 1}, {place}"
            if off != off:
                return Comparison(name, False, off, where, equal, total)
    return Comparison(name, identical, largest, where, equal, total)


# Layer by layer.


class _Reference:
    """transformers' own experts modules, one at a time: a model on meta whose layers are filled in turn."""

    def __init__(self, folder: Path, dtype: str):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config._experts_implementation = "eager"
        self.folder = folder
        with torch.device("meta"):
            auto_class = model_class(read_config(folder), str(folder))
            given = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
            self.model: PreTrainedModel = auto_class.from_config(
                config, trust_remote_code=False, **given
            ).eval()
        moe_layers = find_moe_layers(self.model)
        if not moe_layers:
            raise ValueError(f"{folder}: {type(self.model).__name__} has no experts to check")
        self.names = [layer.name for layer in moe_layers]
        self.most_experts = max(layer.num_experts for layer in moe_layers)
        self.largest_layer_bytes = max(_bytes(self.model.get_submodule(name)) for name in self.names)

    def index(self, checkpoint: Checkpoint) -> None:
        """Learn from transformers which tensors of the checkpoint make up which experts module."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        self.keys: dict[str, dict[Path, list[str]]] = {name: {} for name in self.names}
        for path in checkpoint.files:
            for key in _keys_of(path):
                target, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
                target = key if target not in state and key in state else target
                for name in self.names:
                    if target.startswith(f"{name}.") and target in state:
                        self.keys[name].setdefault(path, []).append(key)

    @contextmanager
    def layer(self, name: str, dtype: torch.dtype) -> Iterator[nn.Module]:
        """The experts module with its weights, which go when the context ends."""
        state: dict[str, Any] = {}
        files = []
        for path, keys in self.keys[name].items():
            if path.suffix == ".safetensors":
                file = safe_open(path, framework="pt")
                files.append(file)
                state |= {key: file.get_slice(key) for key in keys}
            else:
                every = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                state |= {key: every[key] for key in keys}
        mapping: list[Any] = list(
            get_model_conversion_mapping(self.model)
        )  # it collects: a new one each time
        config = LoadStateDictConfig(dtype=dtype, weight_mapping=mapping)
        convert_and_load_state_dict_in_model(self.model, state, config)
        module = self.model.get_submodule(name)
        missing = [role for role, parameter in module.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"{self.folder}: transformers finds no weights for {name}.{missing[0]}")
        try:
            yield module
        finally:
            module.to("meta")
            del state, files


def _keys_of(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    return list(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@torch.no_grad()
def _check_layers(
    model: PreTrainedModel, folder: Path, checkpoint: Checkpoint, inputs: Sequence[Tensor], say: Progress
) -> list[LayerComparison]:
    """Run each prompt through our model, then each layer's reference over all its hidden states at once."""
    reference = _Reference(folder, str(model.dtype).removeprefix("torch."))
    reference.index(checkpoint)
    seen: dict[str, list[tuple[tuple, dict[str, Any], Tensor]]] = {name: [] for name in reference.names}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            seen[name].append((args, kwargs, output))

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(remember(name), with_kwargs=True)
        for name in reference.names
    ]
    try:
        for ids in inputs:
            decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            model(input_ids=ids, **decoder)
    finally:
        for hook in hooks:
            hook.remove()
    checked = []
    for number, name in enumerate(reference.names):
        say(f"layer {number + 1} of {len(reference.names)}: {name}")
        started = time.perf_counter()
        largest = magnitude = 0.0
        with reference.layer(name, model.dtype) as module:
            nbytes = _bytes(module)
            for args, kwargs, ours in seen.pop(name):
                theirs = module(*args, **kwargs).double()
                off = (ours.double() - theirs).abs().max().item()
                largest = off if off != off or largest != largest else max(largest, off)
                magnitude = max(magnitude, theirs.abs().max().item())
        tokens = sum(ids.numel() for ids in inputs)
        checked.append(
            LayerComparison(number, name, tokens, largest, magnitude, time.perf_counter() - started, nbytes)
        )
    return checked
