"""Lines and paragraphs: the kernel against plain Python, the removal against the rules."""

import dataclasses
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_corpus import doc, write_documents

from data_beam import tables
from data_beam.attributes.base import Examined
from data_beam.attributes.line_hashes import LineHashes
from data_beam.dedup import lines
from data_beam.dedup.lines import RepeatedLines
from data_beam.kernels.labels import label_of
from data_beam.kernels.lines import cut, merge, split
from data_beam.kernels.tokens import tokenize
from data_beam.pipelines import annotate
from data_beam.schema import Document
from data_beam.stage import open_documents
from internlm2_jax.errors import UserError

# --- kernel -----------------------------------------------------------------------------------


def plain_lines(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """(line with its end, its words) of the lines that have words."""
    found = re.findall(r"[^\n]*\n|[^\n]+", text)
    low = re.findall(r"[^\n]*\n|[^\n]+", text.lower())
    rows = []
    for line, lowered in zip(found, low, strict=True):
        tokens = tokenize(lowered)
        if len(tokens.starts):
            ends = zip(tokens.starts, tokens.ends, strict=True)
            rows.append((line, tuple(lowered[a:b] for a, b in ends)))
    return rows


TEXTS = st.text(st.sampled_from("aB é中文\n\n.-İß\u3000"), max_size=80)


@given(TEXTS)
def test_lines_are_those_of_plain_python(text):
    units = split(text, tokenize(text))
    rows = plain_lines(text)
    spans = zip(units.starts, units.ends, strict=True)
    assert [text[a:b] for a, b in spans] == [row[0] for row in rows]
    words = [row[1] for row in rows]
    for i, hash_ in enumerate(units.hashes):
        for j, other in enumerate(units.hashes):
            assert (hash_ == other) == (words[i] == words[j])
    wide = [sum(len(w) * (2 if w in "中文" else 1) for w in row) for row in words]
    assert units.widths.tolist() == wide


@given(TEXTS)
def test_paragraphs_end_with_blank_lines(text):
    units = split(text, tokenize(text), paragraphs=True)
    spans = list(zip(units.starts.tolist(), units.ends.tolist(), strict=True))
    pieces = re.split(r"(?:(?<=\n)|^)(?=[^\S\n]*\S)", text)  # before lines that are not blank
    blocks: list[str] = []
    for piece in pieces:
        joins = blocks and not re.search(r"\n[^\S\n]*\n|^[^\S\n]*\n?$", blocks[-1] + "")
        if joins:
            blocks[-1] += piece
        else:
            blocks.append(piece)
    expected = [block for block in blocks if len(tokenize(block).starts)]
    assert [text[a:b].strip() for a, b in spans] == [block.strip() for block in expected]


def test_equal_lines_whatever_their_decoration():
    text = "  * Click HERE, to subscribe!\nclick here to subscribe\nclick to here subscribe\n"
    hashes = split(text, tokenize(text)).hashes
    assert hashes[0] == hashes[1] != hashes[2]


SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), max_size=12)


@given(SPANS, st.text(min_size=70))
def test_cutting_merged_spans_removes_exactly_them(rows, text):
    rows = sorted(rows)
    spans, last = [], 0
    for start, length in rows:
        if start >= last:
            spans.append((start, start + length))
            last = start + length
    both = np.array(spans, np.int64).reshape(-1, 2)
    merged = merge(both[:, 0], both[:, 1])
    assert (np.diff(merged) > 0).all()  # apart and in order
    gone = {place for start, end in spans for place in range(start, end)}
    assert cut(text, merged) == "".join(c for place, c in enumerate(text) if place not in gone)


def test_the_attribute_keeps_wide_lines_alone():
    text = "short line\na line of some twenty letters or more\n十二个汉字的一行也足够宽了\n"
    found = LineHashes().compute([Examined(doc(text))])
    spans = found["spans"][0].reshape(-1, 2)
    assert [text[a:b] for a, b in spans] == text.splitlines(keepends=True)[1:]
    assert len(found["hashes"][0]) == 2


# --- removal ----------------------------------------------------------------------------------

COOKIES = "We use cookies to give you the best experience on our pages."


def corpus(seed: int = 0) -> list[Document]:
    """Documents of unique lines, boilerplate of several frequencies and short lines between."""
    rng = random.Random(seed)
    boilerplate = {f"This sentence stands in {n} of all the documents here": n
                   for n in (2, 3, 4, 9, 30)}  # fmt: skip
    rows = [[f"{number} own line {n} of this very document {rng.random()}" for n in range(6)]
            for number in range(40)]  # fmt: skip
    for line, count in boilerplate.items():
        for number in rng.sample(range(40), count):
            for _ in range(rng.choice((1, 1, 2))):
                place = rng.randrange(len(rows[number]))
                rows[number].insert(place, rng.choice((line, f"# {line}!")))
    for row in rows:
        row.insert(rng.randrange(len(row)), "Home | About")
    return [doc("\n".join(row) + "\n", path=str(number), dump=f"CC-MAIN-20{10 + number % 9}-05")
            for number, row in enumerate(rows)]  # fmt: skip


def expected(documents: list[Document], least: int) -> dict[str, str]:
    """What is left of each text, by the definition."""
    holders = defaultdict(set)
    for document in documents:
        for line in document.text.splitlines():
            words = tuple(re.findall(r"\w+", line.lower()))
            if sum(map(len, words)) >= 24:
                holders[words].add((label_of(document), document.id))
    keeper = {words: min(some)[1] for words, some in holders.items() if len(some) >= least}
    result = {}
    for document in documents:
        kept = []
        for line in document.text.splitlines(keepends=True):
            words = tuple(re.findall(r"\w+", line.lower()))
            if keeper.get(words, document.id) == document.id:
                kept.append(line)
        result[document.id] = "".join(kept)
    return result


def remove(
    output: Path, documents: list[Document], shards: int, settings: RepeatedLines, **options
) -> dict[str, str]:
    """What is left of each text."""
    opened = write_documents(output, documents, shards)
    annotate.run(output, [settings.attribute()])
    lines.run(output, opened, settings, **options)
    return left(output)


def left(output: Path) -> dict[str, str]:
    opened, result = open_documents(output), {}
    for shard in range(opened.shards):
        rows = tables.read_attribute(output, lines.NAME, shard).to_pylist()
        for document, row in zip(opened.read(shard), rows, strict=True):
            assert row["id"] == document.id
            if row["removed"] is not None:
                text = cut(document.text, np.array(row["removed"]))
                share = 1 - len(text) / len(document.text)
                assert row["removed_share"] == pytest.approx(share, abs=1e-6)
                result[document.id] = text
    return result


def test_repeated_lines_go_and_the_best_document_keeps_them(tmp_path):
    documents = corpus()
    for least, shards in ((3, 1), (3, 5), (6, 2)):
        settings = RepeatedLines(
            min_documents=least, partition_bytes=1 << (10 + shards), max_memory=10 ** (2 * shards)
        )
        found = remove(tmp_path / f"{least}-{shards}", documents, shards, settings)
        assert found == expected(documents, least)
        assert any(found[d.id] != d.text for d in documents)
        assert all("Home | About" in text for text in found.values())


def test_paragraphs_of_many_documents(tmp_path):
    notice = f"{COOKIES}\nYou may change this at any time, in your settings."
    own = ((f"The beginning of document {n}, its own", f"and then its end {n}") for n in range(6))
    documents = [doc(f"{a}\n\n{notice}\n\n{COOKIES}\n{b}\n", path=a) for a, b in own]
    found = remove(tmp_path, documents, 2, RepeatedLines(unit="paragraph"))
    keepers = [d.id for d in documents if notice in found[d.id]]
    assert keepers == [min((label_of(d), d.id) for d in documents)[1]]
    assert all(COOKIES in text for text in found.values())  # part of a paragraph that differs
    assert {text.count("\n\n") for id_, text in found.items() if id_ not in keepers} == {1}


@dataclasses.dataclass(frozen=True)
class Only:
    output: str
    ids: tuple[str, ...]

    def __call__(self, shard: int) -> np.ndarray:
        return np.array([d.id in self.ids for d in open_documents(self.output).read(shard)])

    def settings(self) -> list[str]:
        return list(self.ids)


def test_documents_that_take_no_part_keep_nothing_and_count_for_nothing(tmp_path):
    documents = [doc(f"{COOKIES}\nown text {n}\n", path=str(n)) for n in range(4)]
    by_label = sorted(documents, key=label_of)
    chosen = tuple(d.id for d in by_label[1:])
    opened = write_documents(tmp_path, documents)
    settings = RepeatedLines(min_documents=3)
    annotate.run(tmp_path, [settings.attribute()])
    mask = Only(str(tmp_path), chosen)
    manifest = lines.run(tmp_path, opened, settings, candidates=mask)
    found = left(tmp_path)
    assert set(found) == set(chosen)
    assert [COOKIES in found[id_] for id_ in chosen] == [True, False, False]
    assert sum(row["changed_documents"] for row in manifest["shards"]) == 2
    few = Only(str(tmp_path), chosen[:2])
    lines.run(tmp_path, opened, settings, candidates=few)
    assert all(COOKIES in text for text in left(tmp_path).values())


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    documents = corpus(1)
    settings = RepeatedLines(min_documents=3)
    remove(tmp_path, documents, 2, settings)
    folder, opened = tmp_path / "attributes" / lines.NAME, open_documents(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "part-00001-of-00002.parquet").unlink()
    lines.run(tmp_path, opened, settings)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.setattr("data_beam.runners.run", None)
    lines.run(tmp_path, opened, settings)


def test_bad_settings(tmp_path):
    with pytest.raises(UserError, match="unit 'page'"):
        RepeatedLines(unit="page")
    with pytest.raises(UserError, match="min_documents 1"):
        RepeatedLines(min_documents=1)
    opened = write_documents(tmp_path, [doc("some text")])
    annotate.run(tmp_path, [LineHashes(min_width=10)])
    with pytest.raises(UserError, match="min_width 10"):
        lines.run(tmp_path, opened)
