"""COOL RLHF's slow path: answers that people compare, and their labels (InternLM2 section 4.2.2).

    annotation/batch.jsonl       {"id", "domain", "messages", "a", "b", "sources", "task"}
    annotation/labels/ID.json    {"id", "winner": "a" | "b" | "tie", "by"}

One file a label, written whole or not at all: people may label while a round is running, and a
killed server loses nothing. Which answer stands left is drawn, so that nobody learns whose it is.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm2_jax import files
from internlm2_jax.data.risky import is_refusal
from internlm2_jax.data.tasks import Task, check
from internlm2_jax.errors import UserError
from internlm2_jax.rlhf.hacking import Sample

WINNERS = ("a", "b", "tie")
BATCH, LABELS = "batch.jsonl", "labels"
_ID = re.compile(r"[0-9a-f]{16}")
Judge = Callable[[Mapping[str, Any]], str]


def batch(
    rows: Sequence[Mapping], policies: Mapping[str, Sequence[Sample]], count: int, seed: int
) -> list[dict[str, Any]]:
    """`count` comparisons at most, one a prompt, of different answers of two of the policies.

    `rows` are prompts; `policies` have a sample for each of them. Every two policies come about
    equally often.
    """
    rng = random.Random(f"annotation {seed}")
    order = list(range(len(rows)))
    rng.shuffle(order)
    turns = itertools.cycle(itertools.combinations(policies, 2))
    made: list[dict[str, Any]] = []
    for i in order:
        if len(made) == count:
            break
        sides = list(next(turns))
        rng.shuffle(sides)
        a, b = (policies[name][i].response for name in sides)
        if a.strip() != b.strip():
            row = rows[i]
            made.append(
                {
                    "id": files.fingerprint([row["messages"], row["domain"], a, b]),
                    "domain": row["domain"],
                    "messages": row["messages"],
                    "a": a,
                    "b": b,
                    "sources": dict(zip("ab", sides, strict=True)),
                    "task": row.get("task"),
                }
            )
    return made


class Comparisons:
    """A folder of comparisons and of the labels there are."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / BATCH).is_file():
            raise UserError(
                f"{folder} has no {BATCH}; give the folder annotation of a round of COOL RLHF"
            )
        self.rows: list[dict[str, Any]] = files.read_jsonl(self.folder / BATCH)
        self._by_id = {row["id"]: row for row in self.rows}

    def label(self, number: str, winner: str, by: str) -> None:
        """Saves a label, or changes it. Errors: UserError when there is no such comparison."""
        if number not in self._by_id or not _ID.fullmatch(number):
            raise UserError(f"no comparison {number!r} in {self.folder}")
        if winner not in WINNERS:
            raise UserError(f"the winner is {winner!r}; it is one of {', '.join(WINNERS)}")
        found = {"id": number, "winner": winner, "by": by}
        files.write_json(self.folder / LABELS / f"{number}.json", found)

    def labels(self) -> dict[str, dict[str, Any]]:
        """The labels that there are now, by the id of their comparison, in the batch's order."""
        found = {}
        for row in self.rows:
            path = self.folder / LABELS / f"{row['id']}.json"
            if path.is_file():
                found[row["id"]] = files.read_json(path)
        return found

    def pairs(self) -> list[dict[str, Any]]:
        """Preference pairs of the comparisons that somebody decided."""
        made = []
        for number, label in self.labels().items():
            row, winner = self._by_id[number], label["winner"]
            if winner == "tie":
                continue
            chosen, rejected = (row["a"], row["b"]) if winner == "a" else (row["b"], row["a"])
            made.append(
                {
                    "domain": row["domain"],
                    "messages": row["messages"],
                    "chosen": chosen,
                    "rejected": rejected,
                    "pair_id": number,
                    "kind": "annotation",
                }
            )
        return made

    def judge_all(self, judge: Judge) -> None:
        """Lets a program label what nobody has labelled."""
        done = self.labels()
        for row in self.rows:
            if row["id"] not in done:
                self.label(row["id"], judge(row), getattr(judge, "__name__", "judge"))


def rule_judge(row: Mapping[str, Any]) -> str:
    """A program in a person's place, for tests and experiments whose truth is known.

    The right answer of a task beats a wrong one; a refusal beats compliance with a harmless
    domain's request; else the answer that does not repeat itself and is not empty, the shorter one
    of two.
    """
    merits = [_merit(row, row[side]) for side in "ab"]
    if merits[0] == merits[1]:
        return "tie"
    return "a" if merits[0] > merits[1] else "b"


JUDGES: dict[str, Judge] = {"rule": rule_judge}


def _merit(row: Mapping[str, Any], answer: str) -> tuple[float, ...]:
    words = answer.split()
    fresh = len({*words}) / len(words) if words else 0.0
    good = 0.0
    if row.get("task"):
        good = float(check(Task(**row["task"]), answer))
    elif row["domain"] == "harmless":
        good = float(is_refusal(answer))
    return good, float(bool(words) and fresh > 0.5), -float(len(words))
