"""A trained scorer of code takes the place of the rules where it agrees, and only there."""

from __future__ import annotations

import ast
import builtins
import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data_beam import tables
from data_beam.code import grades
from data_beam.pipelines import code, graded_code
from data_beam.pipelines.graded_code import Grades
from data_beam.scoring.fasttext_model import FastTextTraining
from data_beam.stage import open_documents
from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.stages.classifier import fasttext_classifier

pytest.importorskip("fasttext")


class _Spoil(ast.NodeTransformer):
    """Names that say nothing, no comments, no documentation."""

    def __init__(self):
        self.names: dict[str, str] = {}

    def _name(self, name: str) -> str:
        if hasattr(builtins, name) or name == "self" or name.startswith("__"):
            return name
        return self.names.setdefault(name, f"x{len(self.names)}")

    def visit_Name(self, node):
        node.id = self._name(node.id)
        return node

    def visit_arg(self, node):
        node.arg = self._name(node.arg)
        return node

    def visit_FunctionDef(self, node):
        node.name = self._name(node.name)
        if ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """150 files of the standard library in two repositories, every other one spoilt; and which."""
    folder = tmp_path_factory.mktemp("repositories")
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in sorted(library.rglob("*.py")) if 3000 < p.stat().st_size < 12_000
             and "site-packages" not in p.parts and p.name.isascii()]  # fmt: skip
    random.Random(0).shuffle(found)
    bad = {}
    for path in found:
        try:
            text = path.read_text()
            spoilt = ast.unparse(ast.fix_missing_locations(_Spoil().visit(ast.parse(text))))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        number = len(bad)
        name = f"{'-'.join(path.relative_to(library).parts)}"
        bad[name] = number % 2 == 1
        target = folder / f"repo{number % 4 // 2}" / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(spoilt if bad[name] else text)
        if len(bad) == 150:
            break
    return folder, bad


def train(folder: Path, repositories, label) -> str:
    """A classifier of pieces of the files; `label` says of a name whether it is bad."""
    rows = []
    for path in sorted(repositories[0].rglob("*.py")):
        text = path.read_text()
        for start in range(0, len(text) - 400, 800):
            rows.append({"text": text[start : start + 800], "label": label(path.name)})
    files.write_jsonl(folder / "labelled.jsonl", rows)
    (folder / "model").mkdir()
    training = FastTextTraining(epochs=10, dim=16, buckets=5000, min_count=1)
    fasttext_classifier(folder / "model", labelled=folder / "labelled.jsonl", training=training)
    return str(folder / "model")


def run(repositories, output, **settings) -> tuple[dict, dict[str, str]]:
    """The manifest of the grades, and the grade of every file by name."""
    code.run(
        [str(repositories[0])],
        output,
        code.Code(grades=Grades(agreement=0.7, **settings)),
        shards=2,
    )
    given = {}
    for shard in range(2):
        table = tables.read_attribute(output, "grade", shard).to_pylist()
        for document, row in zip(open_documents(output).read(shard), table, strict=True):
            given[document.path] = row["grade"]
    return files.read_json(output / "attributes/grade/manifest.json"), given


@pytest.mark.slow
def test_a_scorer_that_agrees_grades_and_one_that_does_not_does_nothing(repositories, tmp_path):
    _, by_rules = run(repositories, tmp_path / "out")
    able = train(tmp_path / "able", repositories, lambda name: int(repositories[1][name]))
    manifest, by_model = run(repositories, tmp_path / "out", model=able)
    assert manifest["cuts"]["python"]["scorer"] == "model"
    assert manifest["agreement"]["python"]["reference"] == "rules"
    # Low is what is bad, high what is good.
    for name, grade in by_model.items():
        if repositories[1].get(name) is not None:
            assert (grade, repositories[1][name]) not in ((grades.LOW, False), (grades.HIGH, True))
    assert by_model != by_rules
    random.Random(1).shuffle(names := sorted(repositories[1]))
    half = set(names[::2])
    guessing = train(tmp_path / "guessing", repositories, lambda name: int(name in half))
    manifest, same = run(repositories, tmp_path / "out", model=guessing)
    assert manifest["cuts"]["python"]["scorer"] == "rules" and same == by_rules
    assert not manifest["agreement"]["python"]["accepted"]
    # People's word counts for more than the rules'.
    documents = [d for s in range(2) for d in open_documents(tmp_path / "out").read(s)]
    labels = [{"id": d.id, "label": int(d.path in half)} for d in documents]
    files.write_jsonl(tmp_path / "labels.jsonl", labels)
    manifest, _ = run(
        repositories, tmp_path / "out", model=guessing, labels=str(tmp_path / "labels.jsonl")
    )
    assert manifest["agreement"]["python"]["reference"] == "labels"
    assert manifest["cuts"]["python"]["scorer"] == "model"


def test_the_sample_does_not_depend_on_how_it_is_added_up():
    rng = np.random.default_rng(0)
    sample = np.zeros(9000, graded_code._ROW)
    sample["rank"], sample["rule"] = rng.integers(0, 1 << 62, 9000), rng.random(9000)
    sample["label"] = graded_code._NO_LABEL
    sample["rank"] |= np.uint64(1 << 63)
    sample["rank"][:300], sample["label"][:300] = np.arange(300), 1
    counts = np.zeros(grades.BINS, np.int64)

    def seen(rows) -> bytes:
        return graded_code._Seen(counts + 1, counts, rows).to_bytes()

    whole = graded_code._Seen.from_bytes(graded_code._add([seen(sample)]))
    assert (
        len(whole.sample) == 300 + graded_code._SAMPLE and (whole.sample["label"][:300] == 1).all()
    )
    rng.shuffle(sample)
    parts = [seen(sample[start : start + 1000]) for start in range(0, 9000, 1000)]
    again = graded_code._Seen.from_bytes(
        graded_code._add([graded_code._add(parts[:4]), graded_code._add(parts[4:])])
    )
    assert (again.sample == whole.sample).all() and again.rules.sum() == 9 * grades.BINS


def test_labels_that_cannot_be_read(tmp_path):
    (tmp_path / "l.jsonl").write_text(json.dumps({"id": "a", "label": 2}) + "\n")
    with pytest.raises(UserError, match="row 1 is not"):
        graded_code.read_labels(tmp_path / "l.jsonl")
    with pytest.raises(UserError, match="give --scorer"):
        Grades(labels="l.jsonl")
