"""The whole job on small folders: same bytes twice, sums that add up, nothing half-written."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from raw_folder import write_folder

from data_beam.io import corpus_folder, listing
from data_beam.mix import decide
from data_beam.mix.write import split_of
from data_beam.pipelines import corpus, ingest
from internlm2_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("raw") / "folder")


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "corpus"
    return output, corpus.run(output, corpus=folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def test_the_funnel_adds_up_and_every_drop_has_its_reason(built):
    output, funnel = built
    assert funnel["input_files"] == 67
    rows = {row["stage"]: row for row in funnel["stages"]}
    assert list(rows) == ["select", "read", "filter", "exact_dedup", "near_dedup"]
    for row in funnel["stages"]:
        for unit in ("documents", "bytes"):
            gone = sum(count[unit] for count in row["dropped"].values())
            assert row[f"{unit}_in"] - gone == row[f"{unit}_out"], row["stage"]
    stages = funnel["stages"][1:]
    for before, after in itertools.pairwise(stages):
        assert before["documents_out"] == after["documents_in"]
        assert before["bytes_out"] == after["bytes_in"]
    counted = {(row["stage"], reason): count["documents"] for row in stages
               for reason, count in row["dropped"].items()}  # fmt: skip
    assert counted == {("read", "binary"): 1, ("read", "corrupt_gzip"): 1, ("read", "bad_json"): 1,
                       ("filter", "too_short"): 1, ("exact_dedup", "exact_duplicate"): 1,
                       ("near_dedup", "near_duplicate"): 1}  # fmt: skip
    assert funnel["encodings"] == {"utf-8": 68, "cp1252": 1}
    letters = {letter.reason: letter.where for letter in ingest.dead_letters(output)}
    assert set(letters) == {"binary", "corrupt_gzip", "bad_json"}
    assert "image.png" in letters["binary"] and "records.jsonl#" in letters["bad_json"]

    drops = list(decide.drops(output))
    assert sorted((d.stage, d.reason) for d in drops) == sorted(
        c for c in counted if c[0] != "read"
    )
    kept = {document.id: document for document in corpus_folder.documents(output / "corpus")}
    assert not kept.keys() & {drop.id for drop in drops}
    for drop in drops:
        assert bool(drop.of_id) == drop.stage.endswith("dedup")
        if drop.of_id:
            assert kept[drop.of_id].path == "nearly.txt"
    assert len(kept) == rows["near_dedup"]["documents_out"] == 66


def test_documents_splits_and_sources(built, folder):
    output, funnel = built
    corpus_path = output / "corpus"
    assert set(funnel["sources"]) == {"code", "text", "web"}
    for source, entry in funnel["sources"].items():
        for split in ("train", "validation"):
            some = list(corpus_folder.documents(corpus_path, split, source))
            assert len(some) == entry[split]["documents"] > 0
            assert sum(document.num_bytes for document in some) == entry[split]["bytes"]
    documents = {document.path: document for document in corpus_folder.documents(corpus_path)}
    text = (folder / "sub/text5.md").read_text()
    assert documents["sub/text5.md"].text == text
    assert documents["code0.py"].lang == "python"
    assert documents["latin.txt"].text.endswith("Grüße\n")
    samples = json.loads((corpus_path / "samples.json").read_text())
    assert {row["source"] for row in samples["kept"]} == {"code", "text", "web"}
    twins = [row for row in samples["dropped"] if row["of_id"]]
    assert len(twins) == 2 and all(row["of_text"][:50] == row["text"][:50] for row in twins)
    assert not list(output.rglob("*.partial"))


def test_same_bytes_again_elsewhere_and_in_another_order(built, folder, tmp_path, monkeypatch):
    moved = shutil.copytree(folder, tmp_path / "moved")
    walk = listing.walk

    def shuffled(*args, **keywords):
        found = sorted(walk(*args, **keywords))
        return iter(random.Random(5).sample(found, len(found)))

    monkeypatch.setattr(listing, "walk", shuffled)
    corpus.run(moved / "inside", corpus=moved)
    assert contents(moved / "inside/corpus") == contents(built[0] / "corpus")
    # The folder's own output is no input the second time, and nothing is made again.
    before = {p: p.stat().st_mtime_ns for p in (moved / "inside").rglob("*.arrayrecord")}
    corpus.run(moved / "inside", corpus=moved)
    assert {p: p.stat().st_mtime_ns for p in (moved / "inside").rglob("*.arrayrecord")} == before


def test_waves_change_nothing(built, folder, tmp_path):
    files = listing.select(listing.list_folder(folder), None, 0)
    whole = ingest.run(files, tmp_path / "whole", shards=2, max_dead_share=1)
    waves = ingest.run(files, tmp_path / "waves", shards=2, max_dead_share=1, wave_bytes=20_000)
    assert waves.digests == whole.digests
    letters = [sorted(ingest.dead_letters(tmp_path / name)) for name in ("whole", "waves")]
    assert letters[0] == letters[1] and len(letters[0]) == 3
    assert not (tmp_path / "waves/waves").exists()


def test_duplicate_ids_and_too_many_dead_letters(tmp_path):
    rows = [{"id": "a", "text": "one text"}] * 3 + [{"id": "b", "text": "another"}, {"x": 1}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = listing.list_folder(tmp_path / "in")
    with pytest.raises(UserError, match=r"3 of 5 records .*duplicate_id 2.*max-dead-share 0\.5"):
        ingest.run(files, tmp_path / "out", max_dead_share=0.5)
    assert ingest.run(files, tmp_path / "out", max_dead_share=0.7).counts == (2,)
    reasons = [letter.reason for letter in ingest.dead_letters(tmp_path / "out")]
    assert sorted(reasons) == ["duplicate_id", "duplicate_id", "no_text"]


def test_the_selection_is_bounded_and_seeded(folder, tmp_path):
    funnel = corpus.run(tmp_path / "a", corpus=folder, max_bytes=60_000, seed=1)
    assert 40_000 < funnel["input_bytes"] <= 70_000
    assert funnel["stages"][0]["dropped"]["over_budget"]["documents"] > 20
    sizes = [funnel["sources"][source]["input_bytes"] for source in ("code", "text")]
    assert min(sizes) > 15_000


def test_split_keeps_one_document_on_each_side():
    numbers = [5, 2**62, 2**63 - 7]
    for fraction in (1e-9, 0.5, 0.999999999):
        splits = [split_of(n, (min(numbers), max(numbers)), fraction) for n in numbers]
        assert splits[0] == "validation" and splits[2] == "train"
    assert split_of(7, (7, 7), 0.5) == "train"
    many = [random.Random(n).randrange(2**63) for n in range(20_000)]
    ends = min(many), max(many)
    share = sum(split_of(n, ends, 0.02) == "validation" for n in many) / 20_000
    assert share == pytest.approx(0.02, abs=0.005)


def test_bad_folders_are_one_line(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.txt").write_text("too short")
    (tmp_path / "bad/y.bin").write_bytes(b"\0\1\2")
    with pytest.raises(UserError, match=r"no document is left .*binary 1, too_short 1") as error:
        corpus.run(tmp_path / "out", corpus=tmp_path / "bad")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        corpus.run(tmp_path / "new", corpus=tmp_path / "missing")
    with pytest.raises(UserError, match="validation_fraction"):
        corpus.run(tmp_path / "new", corpus=tmp_path / "bad", validation_fraction=2)
    assert not (tmp_path / "new").exists()


def test_a_bare_machine_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.harvest, "list_machine", lambda: [])
    with pytest.raises(UserError, match="give a folder with --corpus"):
        corpus.run(tmp_path / "out")


def test_other_peoples_folders_are_not_touched(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"not empty and thesis\.tex is not of a corpus job"):
        corpus_folder.check_work_folder(tmp_path, [str(folder)])
    with pytest.raises(UserError, match="is the input itself"):
        corpus_folder.check_work_folder(folder, [str(folder)])


@pytest.mark.parametrize("moment", ["first shard read", "corpus written"])
def test_killed_in_the_middle_then_run_again(built, folder, tmp_path, moment):
    output = tmp_path / "corpus"
    # The child stops for good after its first shard.
    code = (
        "import pathlib, time\n"
        "from data_beam.stage import Output\n"
        "from data_beam.pipelines import corpus\n"
        "from data_beam.mix import write\n"
        "def stop(*args, **keywords):\n"
        f"    pathlib.Path({str(tmp_path / 'reached')!r}).touch()\n"
        "    time.sleep(600)\n"
        f"if {moment == 'first shard read'}:\n"
        "    finish = Output.finish\n"
        "    def once(*args, **keywords):\n"
        "        finish(*args, **keywords)\n"
        "        stop()\n"
        "    Output.finish = once\n"
        "else:\n"
        "    write._remove_others = stop\n"
        f"corpus.run({str(output)!r}, corpus={str(folder)!r})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "reached").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (output / "corpus/manifest.json").exists()
    corpus.run(output, corpus=folder)
    same = contents(built[0])
    assert contents(output) == same
