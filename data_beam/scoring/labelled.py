"""Labelled texts for the classifiers: file format, split, and data sets made from real text.

A file has one JSON object a line:

    {"text": str, "label": 0..1, "weight": above 0 (default 1), "group": str (default: the text)}

Label 1 is what the classifier is named after and what a rule will drop. A label between 0 and 1 is
a score (the share of annotators, a Perspective score). Texts of one group (the same document, the
same prompt) never lie on both sides of a split, nor do two copies of one text.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from data_beam.kernels.textstats import Signals
from data_beam.schema import hash63
from data_beam.scoring import corrupt
from internlm2_jax.errors import UserError
from internlm2_jax.files import read_jsonl

Split = Literal["train", "validation", "test"]


class Labelled(NamedTuple):
    text: str
    label: float
    weight: float = 1.0
    group: str = ""

    @property
    def is_positive(self) -> bool:
        return self.label >= 0.5

    def split(self, held_out: float) -> Split:
        """By content: `held_out` of the groups for validation (calibration and cut-off), as many
        for the test."""
        key = self.group or " ".join(self.text.split()).casefold()
        place = hash63(key, purpose="labelled split") / 2**63
        return "test" if place < held_out else "validation" if place < 2 * held_out else "train"


def read(path: str | os.PathLike) -> list[Labelled]:
    """Rows of a labelled file. A bad one is a UserError with its line."""
    rows = []
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f"{where} has no text; each row needs text and label")
        label, weight = row.get("label"), row.get("weight", 1.0)
        if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
            raise UserError(f"{where}: label is {label!r}; it must be a number from 0 to 1")
        if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"{where}: weight is {weight!r}; it must be a positive number")
        rows.append(Labelled(row["text"], float(label), float(weight), str(row.get("group", ""))))
    return rows


class Splits(NamedTuple):
    train: list[Labelled]
    validation: list[Labelled]
    test: list[Labelled]


def split(rows: Sequence[Labelled], held_out: float, where: str) -> Splits:
    """The three parts. Raises UserError when one of them lacks a class."""
    if not 0 < held_out < 0.5:
        raise UserError(f"held_out is {held_out}; it must lie between 0 and 0.5")
    parts: dict[str, list[Labelled]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        parts[row.split(held_out)].append(row)
    for name, part in parts.items():
        positives = sum(row.is_positive for row in part)
        if not 0 < positives < len(part):
            raise UserError(
                f"{where}: the {name} part has {positives} texts of label 1 among {len(part)}; "
                "give more labelled texts, or another held_out"
            )
    return Splits(parts["train"], parts["validation"], parts["test"])


def columns(rows: Sequence[Labelled]) -> tuple[np.ndarray, np.ndarray]:
    """(is label 1 [N] bool, weights [N])."""
    return np.array([r.is_positive for r in rows]), np.array([r.weight for r in rows])


# ----------------------------------------------------------------------- fluency

_PARAGRAPH = re.compile(r"\n\s*\n")


def passages(text: str, shortest: int = 250, longest: int = 1000) -> Iterator[str]:
    """Stretches of prose of `shortest` to `longest` characters: whole paragraphs where they fit."""
    held = ""
    for paragraph in _PARAGRAPH.split(text):
        paragraph = paragraph.strip("\n").rstrip()
        if len(held) + len(paragraph) > longest:
            if len(held) >= shortest and _is_prose(held):
                yield held
            held = ""
        if len(paragraph) <= longest:
            held = f"{held}\n\n{paragraph}" if held else paragraph
    if len(held) >= shortest and _is_prose(held):
        yield held


def _is_prose(text: str) -> bool:
    """Sentences, not tables, menus, programs or lists of names."""
    signals = Signals(text)
    ends = len(re.findall(r"[.!?。！？](?:\s|$)|[。！？]", text))
    return signals.letter_share >= 0.85 and signals.num_words >= 40 and ends >= 3


def fluency(
    documents: Iterable[tuple[str, str]],
    *,
    seed: int,
    per_document: int = 4,
    positives: float = 0.5,
    weakest: float = 0.15,
) -> Iterator[dict[str, Any]]:
    """Rows for a classifier of damaged writing from (group, text) of good documents.

    A passage appears once, whole (label 0) or damaged (label 1, `positives` of them), at a strength
    drawn from [`weakest`, 1]; `kind` says how. At most `per_document` passages of a document, drawn
    by the seed.
    """
    for group, text in documents:
        found = sorted(passages(text), key=lambda passage: hash63(passage, seed, "passage"))
        for passage in found[:per_document]:
            rng = random.Random(hash63(passage, seed, "damage"))
            kind = rng.choice(sorted(corrupt.KINDS)) if rng.random() < positives else "none"
            damaged = passage
            if kind != "none":
                damaged = corrupt.corrupt(passage, kind, rng.uniform(weakest, 1), rng)
                if damaged == passage:
                    continue
            yield {"text": damaged, "label": int(kind != "none"), "group": group, "kind": kind}


# ------------------------------------------------------------------ harmlessness

_TURN = re.compile(r"\n\n(Human|Assistant):")


def last_exchange(dialogue: str) -> tuple[str, str, str]:
    """(all before the last answer, the last question, the last answer) of a dialogue written as
    "\\n\\nHuman: ...\\n\\nAssistant: ..." (Bai et al. 2022)."""
    parts = _TURN.split(dialogue)
    if len(parts) < 5 or parts[-2] != "Assistant" or "Human" not in parts:
        raise UserError(
            "a dialogue does not end in a Human and an Assistant turn; expected the format of "
            "Anthropic's hh-rlhf"
        )
    asked = len(parts) - 1 - parts[::-1].index("Human")
    prompt = dialogue[: len(dialogue) - len(parts[-1])]
    return prompt, parts[asked + 1].strip(), parts[-1].strip()


def harmful_answers(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Rows from preference pairs {"chosen", "rejected"}: label 1 is the answer that people found
    the more harmful. Both answers of a pair are of one group, the prompt's. Left out are pairs of
    equal or empty answers, and of answers to different prompts."""
    for pair in read_jsonl(path):
        prompt, question, chosen = last_exchange(pair["chosen"])
        other, _, rejected = last_exchange(pair["rejected"])
        if prompt != other or not chosen or not rejected or chosen == rejected:
            continue
        for label, answer in ((0, chosen), (1, rejected)):
            yield {"text": f"{question}\n\n{answer}", "label": label, "group": prompt}
