"""Text that is streamed is the text, and no part of a stop string shows."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.infer.text import TextStream


def streamed(vocabulary, ids, stops=()):
    stream, pieces = TextStream(vocabulary, stops), []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


@hypothesis.given(st.lists(st.integers(0, 511), max_size=40))
def test_pieces_join_to_the_decoded_text(vocabulary, ids):
    pieces, _ = streamed(vocabulary, ids)
    assert "".join(pieces) == vocabulary.decode(ids)


def test_characters_come_whole(vocabulary):
    ids = vocabulary.encode("a😀b")
    pieces, _ = streamed(vocabulary, ids)
    assert "".join(pieces) == "a😀b" and not any("\ufffd" in piece for piece in pieces)


@hypothesis.given(
    st.text("ab c", max_size=30), st.lists(st.text("ab c", min_size=1, max_size=4), max_size=3)
)
def test_stop_strings_never_show(vocabulary, text, stops):
    pieces, stopped = streamed(vocabulary, vocabulary.encode(text), stops)
    ends = [at for at in map(text.find, stops) if at >= 0]
    assert stopped == bool(ends)
    # Of several, the one that is complete first ends the text.
    shown = "".join(pieces)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not ends:
        assert shown == text
    elif len(stops) == 1:
        assert shown == text[: ends[0]]


def test_special_tokens_leave_no_trace(vocabulary):
    ids = [*vocabulary.encode("x"), vocabulary.im_end_id, vocabulary.im_start_id]
    assert "".join(streamed(vocabulary, ids)[0]) == "x"


def test_an_empty_stop_is_refused(vocabulary):
    with pytest.raises(UserError, match="a stop string is empty"):
        TextStream(vocabulary, [""])
