"""The section on trained classifiers: what each cut-off of its score would find and flag."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_beam.inspect.corpus import Corpus
from data_beam.io import storage
from internlm2_jax.errors import UserError
from internlm2_jax.report import plots, svg
from internlm2_jax.report.blocks import Block, Grid, Section, Table, num, share
from internlm2_jax.report.load import ABSENT, DONE, Record

_PARTS = ("test", "validation")


def section(corpus: Corpus, folders: Mapping[str, str]) -> Section:
    """A curve and a table per classifier; `folders` by name hold a result.json each."""
    blocks: list[Block] = []
    for name, folder in folders.items():
        blocks += _classifier(name, folder)
    lead = (
        "A document is flagged when its score is at or above the cut-off. Precision: what is "
        "rightly flagged of what is flagged. Recall: what is flagged of what should be."
        if blocks
        else ""
    )
    return Section("classifiers", "Classifiers", DONE if blocks else ABSENT, lead, blocks)


def _classifier(name: str, folder: str) -> list[Block]:
    path = storage.join(folder, "result.json")
    value = storage.read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; train the classifier again")
    result = Record(value, f"{name}/result.json")
    cutoff = result.record("cutoff")
    cut = cutoff.number("threshold")
    pictures: list[Block] = []
    for part in _PARTS:
        curve = result.record(part).record("curve")
        thresholds = curve.array("threshold")
        if len(thresholds) < 2:
            continue
        order = np.argsort(thresholds, kind="stable")
        lines = [
            plots.Shares(label, curve.array(key)[order], dashed)
            for label, key, dashed in (
                ("precision", "precision", False), ("recall", "recall", True),
            )
            if len(curve.array(key)) == len(thresholds)
        ]  # fmt: skip
        at = cutoff.record(part)
        scores = f"precision {share(at.number('precision'))}, recall {share(at.number('recall'))}"
        pictures.append(
            svg.picture(
                title=f"{name} on {part} texts: {scores if cut is not None else 'no cut-off'}",
                alt=f"Precision and recall of the classifier {name} over its cut-off, "
                f"{len(thresholds)} points.",
                source=result.source,
                draw=plots.share_curves(
                    thresholds[order], lines, "cut-off of the score", "share", cut=cut
                ),
                height=240,
            )
        )
    if not pictures:
        return []
    keys = ("precision", "recall", "flagged_share", "false_positive_rate", "f1")
    rows = [
        [f"{part} texts", num(result.record(part).number("texts")),
         num(result.record(part).number("auc")),
         *(num(cutoff.record(part).number(key)) for key in keys)]
        for part in _PARTS if result.record(part)
    ]  # fmt: skip
    chosen = "no cut-off fits" if cut is None else f"cut-off {svg.tick(cut)}"
    chosen += f", {cutoff.text('rule')}" if cutoff.text("rule") else ""
    table = Table(
        title=f"{name}: {chosen}",
        head=["On", "Texts", "AUC", "Precision", "Recall", "Flagged", "False positives", "F1"],
        rows=rows, source=result.source, numeric=frozenset(range(1, 8)),
    )  # fmt: skip
    return [Grid(pictures), table]
