"""Two texts side by side: what differs is marked, and every line shown once or counted."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from data_beam.inspect import diff, show

WORDS = st.lists(st.sampled_from(["a", "b", "cat", " ", "  ", ",", "的", "一"]), max_size=40)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_marks_are_what_differs_and_the_rest_is_equal(left, right):
    codes = diff._opcodes(left, right)
    assert [w for tag, a, b, _, _ in codes for w in left[a:b]] == left
    assert [w for tag, _, _, a, b in codes for w in right[a:b]] == right
    for tag, a, b, c, d in codes:
        assert (tag == "equal") == (left[a:b] == right[c:d]) or a == b or c == d


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["one", "two", "", "three three"]), max_size=12),
       st.lists(st.sampled_from(["one", "two", "", "three 3"]), max_size=12))  # fmt: skip
def test_every_line_is_shown_once_or_counted(left, right):
    rows = diff.compare("\n".join(left), "\n".join(right), max_rows=99)
    if left == right or "\n".join(left) == "\n".join(right):
        assert len(rows) == 1 and "same" in rows[0].skipped
        return
    for side, lines in (("left", left), ("right", right)):
        shown = 0
        for row in rows:
            if row.same is not None:
                shown += 1
            elif row.skipped:
                shown += int(row.skipped.split()[0])
            else:
                shown += bool(getattr(row, side))
        assert shown == max(len(lines), 1)


def test_comparing_never_takes_long():
    """Lines of two words repeated, which take difflib minutes."""
    import time

    start = time.process_time()
    diff.compare("a b " * 500, "b c " * 500)
    diff.compare("a\n" * 30_000, "b\na\n" * 15_000)
    assert time.process_time() - start < 5
    (row,) = diff.compare("a b " * 100 + "x", "a b " * 50 + "c " + "a b " * 50 + "x")
    assert "".join(p.text for p in row.right if p.changed).strip() == "c"


def test_invisible_signs_are_made_visible():
    assert show.visible("a\x00b\u202ec\ud800\td\n") == "a⟨U+0000⟩b⟨U+202E⟩c⟨U+D800⟩\td\n"
