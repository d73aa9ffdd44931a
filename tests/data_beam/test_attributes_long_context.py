"""Conjunctions and pronouns in two languages against a slow count; what the long rules keep."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_beam.attributes import long_context
from data_beam.attributes.base import Examined
from data_beam.attributes.long_context import (
    CHINESE_CONJUNCTIONS,
    CHINESE_PRONOUNS,
    ENGLISH_CONJUNCTIONS,
    ENGLISH_PRONOUNS,
    LongContext,
)
from data_beam.kernels.tokens import tokenize
from data_beam.mix import rules
from data_beam.schema import Document

ROOT = Path(__file__).parents[2]
ANY_LENGTH = LongContext(min_bytes=0)


def measure(text, attribute=ANY_LENGTH):
    attribute.setup()
    columns = attribute.compute([Examined(Document("0" * 32, text, "text"))])
    assert columns.keys() == set(attribute.schema.names)
    return {name: values[0] for name, values in columns.items()}


def test_the_lists():
    assert (len(ENGLISH_PRONOUNS), len(CHINESE_PRONOUNS), len(CHINESE_CONJUNCTIONS)) == (
        39,
        20,
        140,
    )
    everything = [w.lower() for w in (*ENGLISH_PRONOUNS, *ENGLISH_CONJUNCTIONS)]
    everything += [*CHINESE_PRONOUNS, *CHINESE_CONJUNCTIONS]
    assert len(set(everything)) == len(everything) > 320
    for phrase in (*CHINESE_PRONOUNS, *CHINESE_CONJUNCTIONS):
        assert re.fullmatch(r"[\u4e00-\u9fff]{1,5}", phrase)
    assert {"Especially".lower(), "formally"} <= set(ENGLISH_CONJUNCTIONS)  # the report's examples


def test_english():
    text = (
        "However, I went home. In other words, they did not; on the one hand because it rained.\n"
        "Especially his friends were late, and so was she. "
    ) * 5
    found = measure(text)
    words = 26 * 5
    # however, in other words, on the one hand, because, especially, and, so
    assert found["conjunctions_en"] == 7
    assert found["conjunction_rate_en"] == pytest.approx(7 * 5 / words)
    assert found["pronoun_rate_en"] == pytest.approx(5 * 5 / words)  # I they it his she
    assert math.isnan(found["conjunction_rate_zh"]) and found["conjunctions_zh"] == 0


@pytest.mark.parametrize("traditional", [False, True])
def test_chinese_in_both_ways_of_writing(traditional):
    text = "因为我们不是他们，所以我走了。但是，换句话说，那么这个与那个不同。" * 6
    if traditional:
        text = "因為我們不是他們，所以我走了。但是，換句話說，那麼這個與那個不同。" * 6
    found = measure(text)
    characters = len(re.findall(r"[\u4e00-\u9fff]", text))
    # 因为 所以 但是 换句话说 那么 与; the 那 of 那么 and the 我 of 我们 are no pronouns
    assert found["conjunctions_zh"] == 6
    assert found["conjunction_rate_zh"] == pytest.approx(6 * 6 / characters)
    assert found["pronoun_rate_zh"] == pytest.approx(5 * 6 / characters)  # 我们 他们 我 这 那
    assert math.isnan(found["pronoun_rate_en"])


def test_a_mark_between_its_characters_breaks_a_chinese_phrase():
    padding = "山水風雲" * 20
    assert measure(f"{padding}但，是{padding}")["conjunctions_zh"] == 1  # 但
    assert measure(f"{padding}但是{padding}")["conjunctions_zh"] == 1  # 但是
    assert measure(f"{padding}因。为{padding}")["conjunctions_zh"] == 0


LATIN = [
    *[w for w in ENGLISH_CONJUNCTIONS if " " in w][:12],
    "and", "in", "on", "other", "the", "words", "house", "as", "well", "if", "it", "they",
]  # fmt: skip


def slow(words):
    """Longest first, each place once: by hand over a list of words."""
    table = {}
    for kind, phrases in enumerate((ENGLISH_CONJUNCTIONS, ENGLISH_PRONOUNS)):
        table |= {tuple(p.lower().split()): kind for p in phrases}
    used, counts = [False] * len(words), [0, 0]
    for size in range(6, 0, -1):
        starts = [
            i
            for i in range(len(words) - size + 1)
            if tuple(words[i : i + size]) in table and not used[i]
        ]
        for i in starts:
            counts[table[tuple(words[i : i + size])]] += 1
            used[i : i + size] = [True] * size
    return counts


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(LATIN), max_size=40))
def test_counts_equal_a_slow_count(pieces):
    text = " ".join(pieces)
    occurrences, _ = long_context.count_phrases(tokenize(text))
    assert occurrences[0].tolist() == slow(text.split())


def test_lines_and_marks():
    found = measure("a, b\n\nlonger line | x\n  four  \n")
    assert found["num_lines"] == 3
    assert found["mean_line_length"] == pytest.approx((4 + 15 + 4) / 3)
    assert (found["min_line_length"], found["max_line_length"]) == (4, 15)
    assert found["median_line_length"] == 4
    assert found["std_line_length"] == pytest.approx(np.std([4, 15, 4]))
    size = len("a, b\n\nlonger line | x\n  four  \n")
    assert found["newline_rate"] == pytest.approx(4 / size)
    assert found["comma_rate"] == pytest.approx(1 / size)
    assert found["bar_rate"] == pytest.approx(1 / size)
    assert found["space_rate"] == pytest.approx(8 / size)
    assert found["dedup_rate"] == 1 and found["comp_rate"] == pytest.approx(6 / size)


def test_short_documents_have_their_size_alone():
    short, long = measure("x" * 32767, LongContext()), measure("x " * 16384, LongContext())
    assert short.pop("num_bytes") == 32767 and set(short.values()) == {None}
    assert long["num_bytes"] == 32768 and None not in long.values()
    assert measure("漢字" * 6000, LongContext())["num_lines"] == 1  # bytes, not characters


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=200))
def test_any_text_has_its_columns(text):
    found = measure(text)
    pa.table({k: pa.array([v], LongContext.schema.field(k).type) for k, v in found.items()})
    assert all(v is None or v == v or "rate" in k or "length" in k for k, v in found.items())


def test_values_do_not_depend_on_the_neighbours():
    texts = ["However, we know that it is so. " * 9, "因为我们知道。" * 30, "", "a,b,c\n" * 20]
    examined = [Examined(Document("0" * 32, text, "text")) for text in texts]
    together = ANY_LENGTH.compute(examined)
    for i, text in enumerate(texts):
        alone = measure(text)
        for name, values in together.items():
            assert values[i] == alone[name] or math.isnan(values[i])


# ---------------------------------------------------------------------- the rules


def judged(text, lang, source="text"):
    """The reason why the long rules drop a document; None when they keep it."""
    found = measure(text, LongContext())
    columns = {
        f"long_context.{name}": pa.chunked_array(
            [pa.array([value], LongContext.schema.field(name).type)]
        )
        for name, value in found.items()
    }
    columns["perplexity.gain"] = pa.chunked_array([pa.array([None], pa.float32())])
    for rule in rules.rules_for(source, rules.load("internlm2_long")):
        if (rule.lang is None or lang in rule.lang) and rules.broken(rule, columns)[0]:
            return rule.reason
    return None


def test_the_preset_keeps_prose_and_programs_and_drops_lists(shared):
    import json

    play = (shared / "data/tinyshakespeare/input.txt").read_text()[:100_000]
    assert judged(play, "en") is None
    assert judged(play[:30_000], "en") == "too_short"
    paragraphs = json.loads((shared / "data/chinese_poetry/guwenguanzhi.json").read_text())
    classics = re.sub(r"[\x00-\x7f]+", "\n", json.dumps(paragraphs, ensure_ascii=False))
    assert judged(classics, "zh") is None
    program = "\n".join(p.read_text() for p in sorted((ROOT / "data_beam").rglob("*.py")))
    assert judged(program[:80_000], "en", source="code") is None
    rng = np.random.default_rng(0)
    numbers = "\n".join(",".join(f"{x:.3f}" for x in row) for row in rng.normal(size=(2000, 8)))
    assert judged(numbers, "en") is not None
    words = "\n".join(sorted(set(re.findall(r"[a-z]{4,}", play.lower()))) * 2)[:60_000]
    assert judged(words, "en") is not None
    hashes = "\n".join(f"lib/x{i}/mod{i * 7}.py,sha256={hash(i * 7919):x},{i}" for i in range(3000))
    assert judged(hashes, "und") == "few_conjunctions"
    table = "\n".join(f"| usr/lib/x{i} | {i * 7919} | {i % 17} |" for i in range(3000))
    assert judged(table, "en") is not None


@pytest.mark.slow
def test_speed(shared):
    text = (shared / "data/tinyshakespeare/input.txt").read_text()
    pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
    measure(pieces[0])
    best = 0.0
    for _ in range(3):
        examined = [Examined(Document("0" * 32, piece, "text")) for piece in pieces]
        start = time.process_time()
        ANY_LENGTH.compute(examined)
        best = max(best, len(text) / 1e6 / (time.process_time() - start))
    assert best > 6  # MB/s on a busy core; 8 and more on a free one


def test_settings_are_fields():
    assert dataclasses.asdict(LongContext()) == {"min_bytes": 32768}
