"""The scoring job: a row for every document, the same bytes however it is divided or cut short."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from scoring_corpus import source_texts, train_vocabulary, untrained_classifier, write_documents

from data_beam.mix import rules
from data_beam.scoring import handlers, models, score
from data_beam.tables import read_attribute
from internlm2_jax import files
from internlm2_jax.errors import UserError

SOURCES = [text for text in source_texts() if text]
TEXTS = [t[i : i + n] for t in SOURCES for i, n in ((0, 30), (50, 200), (300, 1500), (7, 90))]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return untrained_classifier(folder / "stage", train_vocabulary(folder, SOURCES))


def table(output: Path, name: str, shards: int) -> pa.Table:
    return pa.concat_tables(read_attribute(output, name, shard) for shard in range(shards))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_row_for_every_document_in_the_order_of_the_shards(classifier, tmp_path):
    documents = write_documents(tmp_path, [*TEXTS, ""], shards=3)
    job = score.Classifier("toxicity", str(classifier), documents_per_call=8)
    manifest = job.run(tmp_path)
    found = table(tmp_path, "toxicity", 3)
    assert found["id"].to_pylist() == [d.id for d in documents]
    assert manifest["records"] == len(documents) and manifest["failed"] == 0
    assert found["error"].null_count == len(documents)
    direct = models.TextClassifier(classifier).score([d.text for d in documents])
    for name in ("score", "max_score"):
        np.testing.assert_allclose(found[name].to_numpy(), [r[name] for r in direct], atol=1e-5)
    assert found["windows"].to_pylist() == [r["windows"] for r in direct]


def test_sharding_and_batching_do_not_show(classifier, tmp_path):
    results = {}
    for shards, per_call in ((1, 5), (4, 64)):
        output = tmp_path / f"{shards}"
        write_documents(output, TEXTS, shards)
        job = score.Classifier("toxicity", str(classifier), documents_per_call=per_call)
        job.run(output)
        rows = table(output, "toxicity", shards).to_pylist()
        results[shards] = {row["id"]: row for row in rows}
    assert results[1].keys() == results[4].keys()
    for id, row in results[1].items():
        assert row["score"] == pytest.approx(results[4][id]["score"], abs=1e-5)
        assert row["windows"] == results[4][id]["windows"]


def test_what_is_there_is_not_made_again_and_what_changed_is(classifier, tmp_path, monkeypatch):
    write_documents(tmp_path, TEXTS, shards=3)
    job = score.Classifier("toxicity", str(classifier))
    job.run(tmp_path)
    folder = tmp_path / "attributes" / "toxicity"
    before = contents(folder)
    loads = []
    load = handlers.load_classifier
    monkeypatch.setattr(
        handlers, "load_classifier", lambda *args: loads.append(args) or load(*args)
    )
    job.run(tmp_path)
    assert not loads and contents(folder) == before
    # one shard lost: one shard made, the same bytes
    (folder / "part-00001-of-00003.parquet").unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    job.run(tmp_path)
    assert contents(folder) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    # how much goes through at once is no setting of the result; the number of windows is
    dataclasses.replace(job, documents_per_call=3).run(tmp_path)
    assert contents(folder) == before
    dataclasses.replace(job, max_windows=2).run(tmp_path)
    assert contents(folder) != before
    # and so is the model
    changed = tmp_path / "changed"
    shutil.copytree(classifier, changed)
    described = files.read_json(changed / "classifier.json")
    calibration = {"temperature": 5.0, "bias": 0.0}
    files.write_json(changed / "classifier.json", {**described, "calibration": calibration})
    dataclasses.replace(job, model=str(changed)).run(tmp_path)
    assert contents(folder).keys() == before.keys() and contents(folder) != before


def test_an_empty_shard_and_an_empty_corpus_are_written(classifier, tmp_path):
    write_documents(tmp_path, ["only one text"], shards=4)
    assert score.Classifier("toxicity", str(classifier)).run(tmp_path)["records"] == 1
    assert table(tmp_path, "toxicity", 4).num_rows == 1
    write_documents(tmp_path / "none", [], shards=1)
    assert score.Classifier("toxicity", str(classifier)).run(tmp_path / "none")["records"] == 0


# ------------------------------------------------------------------------ failures


class Picky:
    def score(self, texts):
        if any("bad" in text for text in texts):
            raise RuntimeError("cannot read this")
        return [{"value": float(len(text))} for text in texts]


class Broken(handlers.ScoreHandler):
    """Fails outside the model: what RunInference itself catches."""

    def run_inference(self, batch, model, inference_args=None):
        if any("bad" in text for text in batch):
            raise MemoryError("the machine is full")
        return super().run_inference(batch, model, inference_args)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A scorer without a model: the length of a text, of those that do not begin with "skip"."""

    model: str
    name: str = "lengths"
    broken: bool = False
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema([("value", pa.float32())])

    def settings(self):
        return {}

    def selects(self, document):
        return not document.text.startswith("skip")

    def example(self, document):
        return document.text

    def handler(self):
        return (Broken if self.broken else handlers.ScoreHandler)(Picky, 4)


def test_failures_are_null_with_a_reason_and_counted(classifier, tmp_path):
    texts = [f"text {i}" for i in range(40)] + ["bad one", "skip me", "another bad"]
    texts += ["long " * 20_000, "longer " * 20_000]  # each more than a call holds
    documents = write_documents(tmp_path, texts, shards=3)
    manifest = score.run(tmp_path, Lengths(str(classifier)), max_failed_share=0.1)
    assert manifest["failed"] == 2
    rows = table(tmp_path, "lengths", 3).to_pylist()
    for row, document in zip(rows, documents, strict=True):
        assert row["id"] == document.id
        if "bad" in document.text:
            assert row["value"] is None and row["error"] == "RuntimeError: cannot read this"
        elif "skip" in document.text:
            assert row["value"] is None and row["error"] is None
        else:
            assert row["value"] == len(document.text) and row["error"] is None


@dataclasses.dataclass(frozen=True)
class Even:
    """Every second document of a shard, as a cheap rule may leave them."""

    def __call__(self, shard):
        return np.arange(100) % 2 == 0

    def settings(self):
        return {"every": 2}


def test_what_a_cheap_rule_drops_is_not_looked_at(classifier, tmp_path):
    write_documents(tmp_path, [f"text {i}" for i in range(20)], shards=2)
    all_of_them = score.run(tmp_path, Lengths(str(classifier)))
    some = score.run(tmp_path, Lengths(str(classifier)), candidates=Even())
    assert some["key"] != all_of_them["key"]
    for shard in range(2):
        values = read_attribute(tmp_path, "lengths", shard)["value"].to_pylist()
        assert [v is not None for v in values] == [i % 2 == 0 for i in range(len(values))]


def test_a_lost_batch_still_has_its_rows(classifier, tmp_path):
    texts = [f"text {i}" for i in range(40)] + ["bad one"]
    documents = write_documents(tmp_path, texts, shards=2)
    manifest = score.run(tmp_path, Lengths(str(classifier), broken=True), max_failed_share=0.2)
    rows = table(tmp_path, "lengths", 2).to_pylist()
    assert [row["id"] for row in rows] == [d.id for d in documents]
    lost = [row for row in rows if row["error"]]
    assert 1 <= len(lost) <= 4 and manifest["failed"] == len(lost)
    assert all("machine is full" in row["error"] and row["value"] is None for row in lost)
    assert all(row["value"] is not None for row in rows if not row["error"])


def test_too_many_failures_stop_the_job_and_are_tried_again(classifier, tmp_path, monkeypatch):
    write_documents(tmp_path, [f"text {i}" for i in range(30)] + ["bad"], shards=2)
    job = Lengths(str(classifier))
    with pytest.raises(UserError, match=r"lengths: 1 of 31 .*cannot read this.*share 0.01"):
        score.run(tmp_path, job)
    assert not (tmp_path / "attributes/lengths/manifest.json").exists()
    with pytest.raises(UserError, match="1 of 31"):  # no second run passes by skipping
        score.run(tmp_path, job)
    monkeypatch.setattr(Picky, "score", lambda self, texts: [{"value": 1.0} for _ in texts])
    assert score.run(tmp_path, job)["failed"] == 0


def test_a_model_that_does_not_load_is_one_line(classifier, tmp_path):
    write_documents(tmp_path / "out", ["a text"], shards=1)
    damaged = tmp_path / "damaged"
    shutil.copytree(classifier, damaged)
    (damaged / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"tokenizer\.model is not a whole SentencePiece model"):
        score.Classifier("toxicity", str(damaged)).run(tmp_path / "out")


# --------------------------------------------------------------------------- rules


def test_the_rule_flags_exactly_what_reaches_the_cut_off(classifier, tmp_path):
    rule = score.Classifier("toxicity", str(classifier)).rule("safe")
    assert (rule.stage, rule.reason, rule.signal) == ("safe", "toxicity", "toxicity.max_score")
    values = pa.chunked_array([pa.array([0.6249999, 0.625, 0.7, None], pa.float32())])
    assert rules.broken(rule, {rule.signal: values}).tolist() == [False, True, True, False]
    described = files.read_json(classifier / "classifier.json")
    other = tmp_path / "other"
    cutoff = {"rule": "most recall at precision 0.99", "threshold": None}
    files.write_json(other / "classifier.json", {**described, "judge": "mean", "cutoff": cutoff})
    with pytest.raises(UserError, match=r"no cut-off \(most recall at precision 0.99 is out"):
        score.Classifier("toxicity", str(other)).rule("safe")
    given = score.Classifier("toxicity", str(other)).rule("safe", threshold=0.5)
    assert given.signal == "toxicity.score" and 0.4999 < given.maximum < 0.5


@pytest.mark.slow
def test_one_model_for_two_processes(classifier, tmp_path):
    options = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    for name, share, beam_options in (("one", False, []), ("two", True, options)):
        write_documents(tmp_path / name, TEXTS, shards=3)
        job = score.Classifier("toxicity", str(classifier), share_model=share)
        job.run(tmp_path / name, beam_options=beam_options)
    one, two = (contents(tmp_path / name / "attributes") for name in ("one", "two"))
    assert one == two


# ---------------------------------------------------------------------- cut short


def test_cut_short_after_a_shard_then_run_again(classifier, tmp_path, monkeypatch):
    for name in ("whole", "cut"):
        write_documents(tmp_path / name, TEXTS, shards=3)
    job = score.Classifier("toxicity", str(classifier))
    job.run(tmp_path / "whole")
    folder = tmp_path / "cut/attributes/toxicity"
    finish = score.Output.finish

    def fail_at_the_second(self, *args, **more):
        if list(folder.glob("*.parquet.json")):
            raise OSError("power cut")
        finish(self, *args, **more)

    with monkeypatch.context() as patch, pytest.raises(Exception, match="power cut"):
        patch.setattr(score.Output, "finish", fail_at_the_second)
        job.run(tmp_path / "cut")
    (sidecar,) = folder.glob("*.parquet.json")
    made = sidecar.stat().st_mtime_ns
    assert len(list(folder.glob("*.parquet"))) == 2  # one of them not vouched for
    job.run(tmp_path / "cut")
    assert sidecar.stat().st_mtime_ns == made
    # bit for bit, though the batches were others
    assert contents(folder) == contents(tmp_path / "whole/attributes/toxicity")
