"""Two models' answers to the same questions before a judge, in both orders.

The judge is any chat model: it reads a question and two answers and its choice is the likelier of
"A" and "B". An answer that wins in one order alone has won half: judges favour a place, so each
pair is asked twice (MT-Bench, arXiv 2306.05685, section 3.4).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.evals import runner, suites
from internlm2_jax.evals.items import Item, Loaded
from internlm2_jax.evals.subject import Subject

PROMPT = (
    "Question:\n{question}\n\nAnswer A:\n{choice0}\n\nAnswer B:\n{choice1}\n\n"
    "Which answer is better? Say A or B."
)


def pairs(a: Path, b: Path) -> list[Item]:
    """Items of two finished evaluations of one suite, with the first answer of each.

    Errors: UserError where they have other questions, or no answers in words.
    """
    ours, theirs = (_lines(folder) for folder in (a, b))
    if {k: v["question"] for k, v in ours.items()} != {k: v["question"] for k, v in theirs.items()}:
        raise UserError(
            f"{a} and {b} have other questions; measure both on the same suite and data"
        )
    return [
        Item(
            key, line["where"], line["group"], {"question": line["question"]},
            choices=(_answer(line, a), _answer(theirs[key], b)), right=(1,), answers=("B",),
        )
        for key, line in ours.items()
    ]  # fmt: skip


def judge(
    subject: Subject, a: Path, b: Path, out: Path, *, prompt: str = PROMPT, **options: Any
) -> dict[str, Any]:
    """Writes `out` as any evaluation does; its score is how often b wins against a, a win in one
    order counting half.

    a, b: folders of evaluations. options: see `runner.evaluate`.
    """
    suite = suites.Suite(
        name=out.name, dimension="alignment", format="pairs", measure="judge",
        method="likelihood", prompt=prompt, chat=True,
    )  # fmt: skip
    items = pairs(a, b)
    parts = [dataclasses.astuple(dataclasses.replace(item, where="")) for item in items]
    loaded = Loaded(items, {}, files.fingerprint(parts))
    return runner.evaluate(subject, suite, loaded, out, **options)


def _lines(folder: Path) -> dict[str, dict[str, Any]]:
    if not (folder / runner.TOTALS).exists():
        raise UserError(f"{folder} has no finished evaluation; run internlm2 evaluate first")
    return {line["id"]: line for line in files.read_jsonl(folder / runner.ITEMS)}


def _answer(line: dict[str, Any], folder: Path) -> str:
    if not line.get("outputs"):
        raise UserError(f"{folder} has no answers in words; judge a suite that is generated")
    return line["outputs"][0]["text"].strip()
