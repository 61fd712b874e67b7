"""Tokens to text: whole characters only, never a part of a stop string, an end for every reason."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from expertflow.engine.request import Row, TextStream, longest_stop_prefix
from expertflow.engine.sampling import SamplingParams

EOS = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as the rarest characters of real vocabularies are written."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(alphabet)} | {"</s>": EOS}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


TOKENIZER = byte_tokenizer()


def row(text_ids: list[int] | None = None, max_tokens: int = 1000, **params: object) -> Row:
    wanted = SamplingParams(**params)  # type: ignore[arg-type]
    stream = TextStream(TOKENIZER, wanted.stop)  # type: ignore[arg-type]
    return Row(0, 0, text_ids or [0], wanted, max_tokens, 0, stream, frozenset([EOS]))


def pieces_of(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    stream = TextStream(TOKENIZER, stop)
    pieces = [stream.push(token) for token in TOKENIZER(text).input_ids]
    return [*pieces, stream.finish()], stream.stopped_by


def test_a_character_leaves_when_its_last_byte_is_there() -> None:
    pieces, _ = pieces_of("aé€😀b")
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_is_shown_as_the_tokenizer_shows_it() -> None:
    ids = TOKENIZER("ok😀").input_ids[:-1]
    stream = TextStream(TOKENIZER)
    assert "".join([*map(stream.push, ids), stream.finish()]) == TOKENIZER.decode(ids)


def test_special_tokens_have_no_text() -> None:
    stream = TextStream(TOKENIZER)
    assert [stream.push(token) for token in (*TOKENIZER("a").input_ids, EOS, *TOKENIZER("b").input_ids)] == [
        "a",
        "",
        "b",
    ]


def test_a_stop_string_is_held_back_until_it_is_refuted() -> None:
    pieces, stopped_by = pieces_of("one EN or END two", ("END",))
    assert "".join(pieces) == "one EN or "
    assert stopped_by == "END"
    assert pieces[4:7] == ["", "", "EN "], "the prefix EN leaves only once it cannot become END"


def test_a_stop_prefix_at_the_end_is_text() -> None:
    assert "".join(pieces_of("wait EN", ("END",))[0]) == "wait EN"


@given(text=st.text("abé", max_size=30), stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
@example(text="ab", stop=["b", "ab"])
@settings(deadline=None, max_examples=200)
def test_the_stream_is_the_text_up_to_the_first_stop(text: str, stop: list[str]) -> None:
    """Brute force: at the first moment when any stop string is there, cut before the leftmost one."""
    expected, reason = text, None
    for end in range(len(text) + 1):
        found = [(text[:end].find(word), word) for word in stop if word in text[:end]]
        if found:
            at, reason = min(found)
            expected = text[:at]
            break
    pieces, stopped_by = pieces_of(text, tuple(stop))
    assert "".join(pieces) == expected
    assert stopped_by == reason
    assert "�" not in "".join(pieces)


def test_longest_stop_prefix() -> None:
    assert longest_stop_prefix("abcab", ("abx", "bcd")) == 2
    assert longest_stop_prefix("abc", ("xyz",)) == 0
    assert longest_stop_prefix("abc", ()) == 0


def feed(one: Row, text: str) -> None:
    for token in TOKENIZER(text).input_ids:
        if one.finish_reason is None:
            one.push(token)


def test_ends_at_max_tokens() -> None:
    one = row(max_tokens=3)
    feed(one, "abcdef")
    output = one.output()
    assert (output.text, len(output.token_ids), output.finish_reason, output.stop_reason) == (
        "abc",
        3,
        "length",
        None,
    )


def test_ends_at_a_stop_string_and_keeps_its_tokens() -> None:
    one = row(stop=["cd"])
    feed(one, "abcdef")
    output = one.output()
    assert (output.text, len(output.token_ids), output.finish_reason, output.stop_reason) == (
        "ab",
        4,
        "stop",
        "cd",
    )


def test_ends_at_a_stop_token_whose_text_is_left_out() -> None:
    (c,) = TOKENIZER("c").input_ids
    one = row(stop_token_ids=[c])
    feed(one, "abcdef")
    output = one.output()
    assert (output.text, output.token_ids[-1], output.finish_reason, output.stop_reason) == (
        "ab",
        c,
        "stop",
        c,
    )


def test_end_of_sequence_ends_it_unless_ignored() -> None:
    ends, goes_on = row(), row(ignore_eos=True)
    for one in (ends, goes_on):
        feed(one, "ab")
        one.push(EOS)
    assert ends.output().finish_reason == "stop"
    assert ends.output().stop_reason is None
    assert ends.output().token_ids[-1] == EOS
    assert goes_on.finish_reason is None


def test_text_is_the_sum_of_the_pieces() -> None:
    one = row(stop=["END"])
    pieces = [one.push(token) for token in TOKENIZER("é EN END").input_ids]
    assert "".join(pieces) == one.output().text == "é EN "


def test_a_finished_row_takes_no_token() -> None:
    one = row(max_tokens=1)
    one.push(1)
    with pytest.raises(AssertionError, match="finished"):
        one.push(1)
