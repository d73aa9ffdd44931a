"""The table of sampled answers that a run of PPO leaves while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internlm2_jax import files
from internlm2_jax.report.blocks import Cell, Headline, Section, Table, clip, num
from internlm2_jax.report.load import DONE
from internlm2_jax.report.page import layout

FILE = "samples.html"
LETTERS = 600
NEWEST = 200  # rows; the rest is in the JSONL file


def write(folder: Path, rows: Sequence[Mapping[str, Any]], label: str) -> None:
    """Writes `folder`/samples.html, whole or not at all: the newest samples first.

    Rows are {"step", "domain", "prompt", "response", "score"} and, where known, "kl", "length",
    "finished".
    """
    shown = sorted(rows, key=lambda row: -row["step"])[:NEWEST]
    steps = sorted({row["step"] for row in rows})
    table = Table(
        title=f"{len(shown)} of {len(rows)} answers",
        head=["Iteration", "Prompt", "Answer", "Score", "KL", "Tokens"],
        rows=[
            [
                num(row["step"]),
                Cell(clip(row["prompt"], LETTERS), row["domain"]),
                Cell(
                    clip(row["response"], LETTERS) or "(empty)",
                    "" if row.get("finished", True) else "cut: it did not end by itself",
                ),
                num(row["score"], 3),
                num(row.get("kl"), 3),
                num(row.get("length")),
            ]
            for row in shown
        ],
        source="samples.jsonl",
        numeric=frozenset({0, 3, 4, 5}),
        stacked=True,
        note="KL to the reference in nats of the whole answer.",
    )
    page = layout(
        name=label,
        kind="samples",
        about=f"Answers sampled at iterations {', '.join(map(str, steps))}, the newest first.",
        headlines=[_mean_score(rows, steps)],
        sections=[Section("samples", "Samples", DONE, "", [table])],
    )
    files.atomic_write(folder / FILE, page)


def _mean_score(rows: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> Headline:
    means = [
        num(float(np.mean([row["score"] for row in rows if row["step"] == step])))
        for step in dict.fromkeys((steps[0], steps[-1]))
    ]
    reading = f"mean score of these answers, iterations {steps[0]} and {steps[-1]}."
    return Headline("Score", " → ".join(means), reading, "samples.jsonl", "samples")
