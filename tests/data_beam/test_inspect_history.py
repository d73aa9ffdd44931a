"""The history of a document says what the files say, and cannot be forged by a document."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
from inspect_corpus import RULES, build, sample_documents, write_attribute

from data_beam import tables
from data_beam.inspect.corpus import Corpus, Place
from data_beam.inspect.history import history
from data_beam.schema import Document
from internlm2_jax.errors import UserError


def ids_by_reason(output: Path) -> dict[str | None, list[tuple[str, str | None]]]:
    found: dict[str | None, list[tuple[str, str | None]]] = {}
    for shard in range(3):
        for row in tables.read_attribute(output, "decision", shard).to_pylist():
            found.setdefault(row["reason"], []).append((row["id"], row["of_id"]))
    return found


def test_every_document_has_a_history_that_ends_where_it_is(whole):
    """Kept ones are in the file that is named, dropped ones tell reason, value and limit."""
    from data_beam.io import writers

    for reason, some in ids_by_reason(whole).items():
        id, of_id = some[0]
        text = "\n".join(history(whole, id))
        assert text.startswith(f"document {id}\n")
        if reason is None:
            name, row = re.search(r"  corpus      (corpus/\S+), record ([\d,]+)", text).groups()
            (record,) = writers.read_array_record(whole / name, int(row), int(row) + 1)
            assert Document.from_bytes(record).id == id
            assert "kept: breaks none of the" in text
        else:
            assert f" for {reason}: " in text
        if of_id:
            assert re.search(rf"  copy of     {of_id}  \S+", text)
            assert f"    {id}  " in "\n".join(history(whole, of_id)), "the survivor knows its copy"
    short = ids_by_reason(whole)["too_short"][0][0]
    assert re.search(r"signals.num_chars is \d+, below the minimum of 200",
                     "\n".join(history(whole, short)))  # fmt: skip


def test_a_copy_of_a_copy_leads_to_the_survivor(whole):
    lines = history(whole, "again")
    (first, second) = (line for line in lines if line.startswith("  copy of"))
    assert "itself dropped for near_duplicate" in first and "(kept" in second


def test_documents_are_found_by_prefix_path_and_part_of_it(whole):
    corpus = Corpus(whole)
    document = corpus.read([Place(1, 0)])[Place(1, 0)]
    for query in (document.id, document.id[:16], document.id[:20].upper(), document.path):
        assert history(whole, query)[0] == f"document {document.id}"
    lines = history(whole, "internlm2_jax/data/")
    assert sum(line.startswith("document ") for line in lines) == 5
    assert any("more documents match" in line for line in lines)
    assert history(whole, "poem")[0].startswith("document ")


def test_dead_letters_are_found_by_their_place(whole):
    lines = history(whole, "in/<b>.gz")
    assert lines[0] == "dead letter in/<b>.gz"
    assert "  reason      truncated_gzip: ends early" in lines


def test_unknown_names_are_told(whole):
    for query in ("0" * 32, "nowhere/at/all", "abcd" * 4):
        with pytest.raises(UserError, match="knows nothing of"):
            history(whole, query)
    with pytest.raises(UserError, match="empty name"):
        history(whole, "")


def test_no_document_can_forge_a_line_or_move_the_cursor(whole):
    lines = history(whole, "<img src=x")
    assert not [line for line in lines if "\n" in line or "\x1b" in line or "\u202e" in line]
    assert any("onerror=alert(1)>␊fake line" in line for line in lines)


def test_what_was_cut_out_is_told(tmp_path):
    from data_beam.mix import funnel, write

    long = [document for document in sample_documents() if len(document.text) > 400]
    output = build(tmp_path / "out", long[:30])
    corpus = Corpus(output)
    write_attribute(output, corpus.documents, "cuts", {"removed": pa.list_(pa.int32())},
                    lambda d: {"removed": [0, 10]})  # fmt: skip
    funnel.finish(output, RULES, write.Mix(edits=("cuts.removed",)))
    id = ids_by_reason(output)[None][0][0]
    assert re.search(r"edited      10 of [\d,]+ characters cut out", "\n".join(history(output, id)))
