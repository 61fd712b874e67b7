"""Regrouping changes no text: every sequence gets the logits it would have had alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from expertflow.scheduler.batch_state import BatchState
from expertflow.scheduler.regroup import bytes_moved, merge, regroup, regroup_by_copying, reindex
from tests.scheduler import caches
from tests.scheduler.decoding import KINDS, alone, model_of, prefill, prompts, step

STEPS = 10


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return model_of(kind)


@pytest.fixture(scope="module")
def texts_and_logits(model):
    """Prompts of 1 to 14 tokens, and the logits [STEPS, V] of each decoded alone."""
    texts = prompts(5, seed=0)
    return texts, [alone(model, text, STEPS) for text in texts]


class Run:
    """Sequences decoded greedily while they change batches; each logit is compared with the lone run's."""

    def __init__(self, model, texts: Sequence[Sequence[int]], expected: Sequence[Tensor]):
        self.model, self.texts, self.expected = model, texts, expected
        self.written: list[list[int]] = [[] for _ in texts]
        self.states: list[BatchState] = []
        self.members: list[list[int]] = []

    def start(self, members: Sequence[int]) -> None:
        logits_BV, state = prefill(self.model, [self.texts[member] for member in members])
        self._check(members, logits_BV)
        self.states.append(state)
        self.members.append(list(members))

    def step(self, batch: int) -> None:
        tokens = [self.written[member][-1] for member in self.members[batch]]
        logits_BV, self.states[batch] = step(self.model, self.states[batch], tokens)
        self._check(self.members[batch], logits_BV)

    def regroup(self, layout, move: Callable = regroup) -> None:
        self.states = move(self.states, layout)
        self.members = [[self.members[batch][row] for batch, row in rows] for rows in layout]

    def drop_finished(self, steps: int) -> list[tuple[int, int]]:
        """The places of those who have fewer tokens than that."""
        return [
            (batch, row)
            for batch, members in enumerate(self.members)
            for row, member in enumerate(members)
            if len(self.written[member]) < steps
        ]

    def _check(self, members: Sequence[int], logits_BV: Tensor) -> None:
        for member, logits_V in zip(members, logits_BV, strict=True):
            expected_V = self.expected[member][len(self.written[member])]
            error = (logits_V - expected_V).abs().max() / expected_V.abs().max()
            assert error < 1e-9, f"sequence {member}, token {len(self.written[member])}: {error:.1e}"
            self.written[member].append(int(logits_V.argmax()))


def random_layout(places: list[tuple[int, int]], batches: int, rng: random.Random):
    """Everybody somewhere, in batches of random sizes."""
    shuffled = rng.sample(places, len(places))
    cuts = sorted(rng.sample(range(1, len(places)), min(batches, len(places)) - 1))
    return [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(places)], strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_text_is_unchanged_by_regrouping(model, kind, texts_and_logits, seed):
    rng = random.Random(seed)
    run = Run(model, *texts_and_logits)
    run.start([0, 1])
    if kind != "sinusoids":  # its sequences must have the same number of tokens; those below have not
        for _ in range(rng.randrange(1, 4)):
            run.step(0)
    run.start([2, 3, 4])
    while places := run.drop_finished(STEPS):
        run.regroup(random_layout(places, rng.choice([1, 2, 2, 3]), rng))
        for batch in range(len(run.members)):
            run.step(batch)
    texts = [logits_SV.argmax(-1).tolist() for logits_SV in run.expected]
    assert run.written == texts


def all_tensors(state: BatchState) -> dict:
    return {name: part.tensor for name, part in state.tensors().items()} | state.masks()


def assert_same_bits(one: BatchState, other: BatchState) -> None:
    first, second = all_tensors(one), all_tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert flags(one.cache) == flags(other.cache)


def flags(cache) -> list:
    """Everything a cache knows besides its tensors."""
    if isinstance(cache, EncoderDecoderCache):
        own, cross = flags(cache.self_attention_cache), flags(cache.cross_attention_cache)
        return [own, cross, cache.is_updated]
    plain = int | bool | str | torch.dtype | None
    return [
        {"type": type(layer)}
        | {
            field: value
            for field, value in vars(layer).items()
            if isinstance(value, plain)
            or (isinstance(value, dict) and field not in ("conv_states", "recurrent_states"))
        }
        for layer in cache.layers
    ]


@settings(deadline=None)
@given(st.sampled_from(caches.KINDS), st.integers(2, 8), st.randoms(use_true_random=False))
def test_regroup_equals_merge_and_reindex_bit_for_bit(kind, window, rng):
    states, layout = random_unit(kind, window, rng)
    expected = regroup_by_copying(states, layout)
    for one, other in zip(regroup(states, layout), expected, strict=True):
        assert_same_bits(one, other)


@settings(deadline=None)
@given(st.sampled_from(caches.KINDS), st.integers(2, 8), st.randoms(use_true_random=False))
def test_the_bytes_foretold_are_those_copied(kind, window, rng):
    states, layout = random_unit(kind, window, rng)
    foretold = bytes_moved(states, layout)
    with caches.CountCopies() as count:
        regroup(states, layout)
    assert count.num_bytes == foretold


def random_unit(kind: str, window: int, rng: random.Random):
    """A few batches, and a layout that often leaves rows where they are, as grouping does."""
    states = [caches.random_state(kind, window, rng) for _ in range(rng.randrange(1, 4))]
    places = [(batch, row) for batch, state in enumerate(states) for row in range(state.num_rows)]
    if rng.random() < 0.5:
        return states, random_layout(rng.sample(places, rng.randrange(1, len(places) + 1)), 2, rng)
    layout = [[(batch, row) for row in range(state.num_rows)] for batch, state in enumerate(states)]
    for _ in range(rng.randrange(3)):
        (a, b), (c, d) = rng.choice(places), rng.choice(places)
        layout[a][b], layout[c][d] = layout[c][d], layout[a][b]
    return states, layout


@pytest.mark.parametrize("kind", caches.KINDS)
def test_rows_that_stay_are_not_copied(kind):
    """A swap of one pair between batches of one length writes three rows: one set aside, two in place."""
    lengths = [7] * 4
    states = [
        BatchState(
            caches.filled_cache(kind, 5, 4, 7, 6),
            caches.mask(lengths, 7, left=True),
            *(
                (torch.randn(4, 6, 4), caches.mask([6] * 4, 6, left=False))
                if kind == "encoder_decoder"
                else ()
            ),
        )
        for _ in range(2)
    ]
    before = [all_tensors(state) for state in states]
    one_row = sum(tensor[0].nbytes for name, tensor in before[0].items() if name not in states[0].masks())
    versions = [part.tensor._version for part in states[0].tensors().values()]
    with caches.CountCopies() as count:
        same = regroup(states, [[(0, row) for row in range(4)], [(1, row) for row in range(4)]])
    assert count.num_bytes == 0
    assert [part.tensor._version for part in same[0].tensors().values()] == versions, "nothing was written"
    layout = [[(0, 0), (1, 2), (0, 2), (0, 3)], [(1, 0), (1, 1), (0, 1), (1, 3)]]
    with caches.CountCopies() as count:
        after = regroup(same, layout)
    assert count.num_bytes == 3 * one_row
    for old, new in zip(before, after, strict=True):
        for name, part in new.tensors().items():
            assert part.tensor.data_ptr() == old[name].data_ptr(), f"{name} was moved"


def test_a_batch_that_must_grow_gets_memory_of_its_own_and_the_other_keeps_its():
    states = [
        BatchState(caches.filled_cache("full", 0, 2, length), caches.mask([length] * 2, length, left=True))
        for length in (9, 4)
    ]
    keys = states[0].cache.layers[0].keys
    wide, narrow = regroup(states, [[(1, 0), (0, 1)], [(1, 1), (0, 0)]])
    assert wide.cache.layers[0].keys.data_ptr() == keys.data_ptr()
    assert narrow.mask_BT.tolist() == [[0] * 5 + [1] * 4, [1] * 9]
    assert wide.mask_BT.tolist() == [[0] * 5 + [1] * 4, [1] * 9]
    assert not narrow.cache.layers[0].keys[0, :, :5].any(), "padding is zeros"


def test_columns_that_nobody_uses_are_cut_off_without_copying():
    state = BatchState(caches.filled_cache("mixed", 6, 3, 9), caches.mask([3, 9, 4], 9, left=True))
    full, sliding = state.cache.layers[2].keys.clone(), state.cache.layers[1].keys.clone()
    assert bytes_moved([state], [[(0, 0)]]) == 0
    (short,) = regroup([state], [[(0, 0)]])
    assert torch.equal(short.cache.layers[2].keys, full[:1, :, 6:])
    assert torch.equal(short.cache.layers[1].keys, sliding[:1, :, 2:])
    assert short.cache.get_seq_length(1) == 3


def test_the_old_masks_are_left_alone():
    """The engine may still read them: only caches and encoder states are used up."""
    rng = random.Random(0)
    states = [caches.random_state("full", 0, rng, rows=3) for _ in range(2)]
    masks = [state.mask_BT.clone() for state in states]
    regroup(states, [[(1, 0), (1, 1), (0, 2)], [(0, 0), (0, 1), (1, 2)]])
    assert all(torch.equal(state.mask_BT, mask) for state, mask in zip(states, masks, strict=True))


def test_merge_and_reindex_copy():
    """The reference must not share memory with what the fast form overwrites."""
    state = caches.random_state("mixed", 4, random.Random(0), rows=3)
    old = {part.tensor.untyped_storage().data_ptr() for part in state.tensors().values()}
    for copied in (merge([state]), reindex(state, [0, 1, 2])):
        assert not old & {part.tensor.untyped_storage().data_ptr() for part in copied.tensors().values()}


def test_batches_of_another_model_are_refused():
    one, other = (caches.random_state(kind, 4, random.Random(0)) for kind in ("full", "sliding"))
    for move in (regroup, regroup_by_copying, bytes_moved):
        with pytest.raises(ValueError, match="batches 0 and 1 are not of one model"):
            move([one, other], [[(0, 0), (1, 0)]])
    with pytest.raises(ValueError, match="no batch"):
        merge([])
