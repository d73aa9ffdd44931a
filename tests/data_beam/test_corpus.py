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
from data_beam.pipelines import corpus
from data_beam.pipelines.corpus import split_of
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
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_funnel_adds_up_and_every_drop_has_its_reason(built):
    output, funnel = built
    assert funnel == json.loads((output / "funnel.json").read_text())
    rows = {row["stage"]: row for row in funnel["stages"]}
    assert list(rows) == ["select", *corpus.funnels.STAGES]
    for row in funnel["stages"]:
        for unit in ("documents", "bytes"):
            gone = sum(count[unit] for count in row["dropped"].values())
            # Normalising changes the number of bytes of what it keeps.
            if (row["stage"], unit) != ("normalize", "bytes"):
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
    assert funnel["encodings"] == {"utf-8": 68, "latin-1": 1}

    drops = list(corpus_folder.drops(output))
    assert sorted((drop.stage, drop.reason) for drop in drops) == sorted(counted)
    kept = {document.id: document for document in corpus_folder.documents(output)}
    assert not kept.keys() & {drop.id for drop in drops}
    for drop in drops:
        assert bool(drop.of_id) == drop.stage.endswith("dedup")
        if drop.of_id:
            assert kept[drop.of_id].path == "corpus/nearly.txt"
    assert len(kept) == rows["split"]["documents_out"] == 66


def test_documents_splits_and_sources(built, folder):
    output, funnel = built
    assert set(funnel["sources"]) == {"code", "text", "web"}
    for source, entry in funnel["sources"].items():
        for split in ("train", "validation"):
            some = list(corpus_folder.documents(output, split, source))
            assert len(some) == entry[split]["documents"] > 0
            assert sum(document.num_bytes for document in some) == entry[split]["bytes"]
    documents = {document.path: document for document in corpus_folder.documents(output)}
    text = (folder / "sub/text5.md").read_text()
    assert documents["corpus/sub/text5.md"].text == text
    assert documents["corpus/code0.py"].lang == "python"
    assert documents["corpus/latin.txt"].text.endswith("Grüße\n")
    samples = json.loads((output / "samples.json").read_text())
    assert {row["source"] for row in samples["kept"]} == {"code", "text", "web"}
    twins = [row for row in samples["dropped"] if row["of_id"]]
    assert len(twins) == 2 and all(row["of_text"][:50] == row["text"][:50] for row in twins)
    assert not (output.parent / "corpus.partial").exists()


def test_same_bytes_again_elsewhere_and_in_another_order(built, folder, tmp_path, monkeypatch):
    moved = shutil.copytree(folder, tmp_path / "moved")
    walk = listing.walk

    def shuffled(base, skip):
        found = sorted(walk(base, skip))
        return iter(random.Random(5).sample(found, len(found)))

    monkeypatch.setattr(listing, "walk", shuffled)
    corpus.run(moved / "inside", corpus=moved)
    assert contents(moved / "inside") == contents(built[0])
    # The folder's own output is no input the second time, and is replaced.
    corpus.run(moved / "inside", corpus=moved)
    assert contents(moved / "inside") == contents(built[0])


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


def test_bad_folders_are_one_line_and_leave_nothing(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.txt").write_text("too short")
    (tmp_path / "bad/y.bin").write_bytes(b"\0\1\2")
    with pytest.raises(UserError, match=r"no document of .*binary 1, too_short 1.*longer") as error:
        corpus.run(tmp_path / "out", corpus=tmp_path / "bad")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        corpus.run(tmp_path / "out", corpus=tmp_path / "missing")
    with pytest.raises(UserError, match="validation_fraction"):
        corpus.run(tmp_path / "out", corpus=tmp_path / "bad", validation_fraction=2)
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}


def test_a_bare_machine_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.harvest, "list_machine", lambda: [])
    with pytest.raises(UserError, match="give a folder with --corpus"):
        corpus.run(tmp_path / "out")


def test_other_peoples_folders_are_not_replaced(folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and holds no corpus"):
        corpus.run(tmp_path, corpus=folder)
    with pytest.raises(UserError, match="is the input folder"):
        corpus.run(folder, corpus=folder)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_killed_in_the_middle_then_run_again(built, folder, tmp_path):
    output, partial = tmp_path / "corpus", tmp_path / "corpus.partial"
    # The child stops for good when it is about to finish the first shard.
    code = (
        "import sys, time\n"
        "from data_beam.io import writers\n"
        "from data_beam.pipelines import corpus\n"
        "write = writers.write_array_record\n"
        "def slow(*args):\n"
        "    write(*args)\n"
        "    time.sleep(600)\n"
        "writers.write_array_record = slow\n"
        f"corpus.run({str(output)!r}, corpus={str(folder)!r})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(partial.glob("*.arrayrecord")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert partial.exists() and not output.exists()

    corpus.run(output, corpus=folder)
    assert contents(output) == contents(built[0]) and not partial.exists()
