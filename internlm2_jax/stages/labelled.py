"""Labelled texts for the classifier stages, made from real ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from internlm2_jax import files
from internlm2_jax.data import documents
from internlm2_jax.stages.classifier import LABELLED


def labelled_fluency(
    folder: Path,
    *,
    corpus: Path,
    source: str = "text",
    per_document: int = 4,
    positives: float = 0.5,
    seed: int = 0,
) -> None:
    """Passages of the corpus, whole (0) or damaged (1); see data_beam/scoring/labelled.py."""
    from data_beam.scoring import labelled

    texts = (
        (d.path, d.text) for d in documents.read(corpus / "corpus", "train") if d.source == source
    )
    rows = list(labelled.fluency(texts, seed=seed, per_document=per_document, positives=positives))
    files.write_jsonl(folder / LABELLED, rows)
    kinds = Counter(row["kind"] for row in rows)
    files.write_json(folder / "result.json", {"texts": len(rows), "kinds": dict(kinds)})


def labelled_harm(folder: Path, *, pairs: str) -> None:
    """The last exchange of each dialogue of a preference file in hh-rlhf's format: 1 is the answer
    that people found the more harmful."""
    from data_beam.scoring import labelled

    rows = list(labelled.harmful_answers(pairs))
    files.write_jsonl(folder / LABELLED, rows)
    files.write_json(folder / "result.json", {"texts": len(rows)})


def labelled_advertisements(folder: Path, *, mail: str) -> None:
    """Mail that people sorted into spam (1) and ham (0); see data_beam/scoring/mail.py."""
    from data_beam.scoring.mail import advertisements

    rows = list(advertisements(mail))
    files.write_jsonl(folder / LABELLED, rows)
    spam = sum(row["label"] for row in rows)
    files.write_json(folder / "result.json", {"texts": len(rows), "spam": spam})
