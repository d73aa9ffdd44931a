"""Labelled files, their split, damaged writing, and the data sets made from real text."""

from __future__ import annotations

import collections
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_beam.scoring import corrupt, labelled
from data_beam.scoring.labelled import Labelled
from internlm2_jax import files
from internlm2_jax.errors import UserError

PROSE = (
    "The harbour lies open to the south, and in winter the wind brings the swell straight in. "
    "Boats that come late are moved behind the long wall, where the water is quiet. "
    "An old man keeps the light. He writes the weather into a book every evening.\n"
)
CHINESE = "港口向南敞开，冬天的风把浪直接带进来。来得晚的船被移到长墙后面，那里的水很平静。" * 3


def damage(text, kind, strength=0.6, seed=0):
    return corrupt.corrupt(text, kind, strength, random.Random(seed))


def words(text):
    return collections.Counter(text.split())


@pytest.mark.parametrize("kind", sorted(corrupt.KINDS))
@pytest.mark.parametrize("text", [PROSE, CHINESE], ids=["en", "zh"])
def test_every_kind_damages_and_repeats_itself(kind, text):
    damaged = damage(text, kind)
    assert damaged != text and damaged == damage(text, kind)
    assert damaged != damage(text, kind, seed=1)

    # More of it does more: characters that stand where they stood, over a few draws.
    def kept(strength):
        return sum(
            sum(a == b for a, b in zip(damage(text, kind, strength, s), text, strict=False))
            for s in range(8)
        )

    assert kept(0.05) > kept(1.0)


def test_kinds_do_what_they_say():
    assert words(damage(PROSE, "shuffled")) == words(PROSE)
    assert words(damage(PROSE, "dropped")) < words(PROSE)
    assert words(damage(PROSE, "repeated")) > words(PROSE)
    assert any(piece in damage(PROSE, "markup") for piece in corrupt._MARKUP)
    garbled = damage("Grüße aus Köln, schöne Straße für müde Füße", "garbled", 1.0)
    assert "Ã" in garbled
    scanned = damage(PROSE, "scanned", 1.0)
    assert abs(len(scanned) - len(PROSE)) < len(PROSE) / 4
    assert sorted(damage(CHINESE, "shuffled")) == sorted(CHINESE)


@settings(deadline=None, max_examples=60)
@given(
    st.text(max_size=60), st.sampled_from(sorted(corrupt.KINDS)), st.floats(0.01, 1), st.integers()
)
def test_any_text_survives(text, kind, strength, seed):
    damaged = corrupt.corrupt(text, kind, strength, random.Random(seed))
    assert isinstance(damaged, str)
    if not text.strip():
        assert damaged == text


def test_wrong_kinds_and_strengths():
    with pytest.raises(UserError, match="no kind of damage 'melted'; there are shuffled, "):
        damage(PROSE, "melted")
    with pytest.raises(UserError, match="strength is 0"):
        damage(PROSE, "markup", 0)


# ------------------------------------------------------------------------ the file


@pytest.mark.parametrize(
    "row,message",
    [
        ({"label": 1}, "row 2 has no text"),
        ({"text": "x", "label": 1.5}, "row 2: label is 1.5"),
        ({"text": "x", "label": True}, "row 2: label is True"),
        ({"text": "x"}, "row 2: label is None"),
        ({"text": "x", "label": 1, "weight": 0}, "row 2: weight is 0"),
        (["x", 1], "row 2 has no text"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    files.write_jsonl(tmp_path / "rows.jsonl", [{"text": "fine", "label": 0}, row])
    with pytest.raises(UserError, match=message):
        labelled.read(tmp_path / "rows.jsonl")


def test_the_split_is_by_content_and_group():
    rows = [Labelled(f"text {i}", i % 2) for i in range(4000)]
    parts = labelled.split(rows, 0.1, "rows")
    assert [round(len(part) / 400) for part in parts] == [8, 1, 1]
    assert labelled.split(rows[::-1], 0.1, "rows").test == parts.test[::-1]
    # whatever the case and the white space, and whatever the label
    copies = [Labelled("Some  Text", 1), Labelled("some text\n", 0)]
    assert len({row.split(0.3) for row in copies}) == 1
    grouped = [Labelled(f"text {i}", i % 2, group=f"page {i // 40}") for i in range(4000)]
    sides = collections.defaultdict(set)
    for row in grouped:
        sides[row.group].add(row.split(0.2))
    assert all(len(side) == 1 for side in sides.values())
    assert len({next(iter(side)) for side in sides.values()}) == 3


def test_a_part_without_a_class_is_an_error():
    with pytest.raises(UserError, match=r"rows.jsonl: the \w+ part has 0 texts of label 1"):
        labelled.split([Labelled(f"{i}", 0) for i in range(100)], 0.2, "rows.jsonl")
    with pytest.raises(UserError, match=r"held_out is 0\.5"):
        labelled.split([], 0.5, "rows.jsonl")


# ------------------------------------------------------------------- from real text


def test_fluency_rows_use_each_passage_once(shared):
    text = (shared / "data/tinyshakespeare/input.txt").read_text()
    documents = [(f"part {i}", text[i * 5000 : (i + 1) * 5000]) for i in range(60)]
    rows = list(labelled.fluency(documents, seed=0))
    assert rows == list(labelled.fluency(documents, seed=0))
    assert rows != list(labelled.fluency(documents, seed=1))
    share = sum(row["label"] for row in rows) / len(rows)
    assert len(rows) > 100 and 0.35 < share < 0.65
    assert {row["kind"] for row in rows} == {"none", *corrupt.KINDS}
    for row in rows:
        group = dict(documents)[row["group"]]
        assert (row["text"] in group) == (row["label"] == 0)


def test_lists_and_tables_are_no_passages():
    table = "\n".join(f"{i} | {i * i} | {i**3}" for i in range(60))
    assert list(labelled.passages(table)) == []
    listing = "\n".join(f"usr/lib/module{i}.so" for i in range(40))
    assert list(labelled.passages(listing)) == []
    found = list(labelled.passages("\n\n".join([PROSE, table, PROSE, PROSE])))
    assert found and all("|" not in passage for passage in found)


def test_harmful_answers_of_real_dialogues(shared):
    rows = list(labelled.harmful_answers(shared / "data/hh_rlhf/harmless_base.jsonl"))
    assert len(rows) > 2500 and sum(row["label"] for row in rows) == len(rows) / 2
    first = files.read_jsonl(shared / "data/hh_rlhf/harmless_base.jsonl")[0]
    for row, side in zip(rows[:2], ("chosen", "rejected"), strict=True):
        question, _, answer = row["text"].partition("\n\n")
        assert first[side].endswith(f"Human: {question}\n\nAssistant: {answer}")
    assert rows[0]["group"] == rows[1]["group"] and rows[0]["group"] in first["chosen"]


def test_other_dialogue_formats_are_refused():
    with pytest.raises(UserError, match="does not end in a Human and an Assistant turn"):
        labelled.last_exchange("User: hi\nBot: hello")
