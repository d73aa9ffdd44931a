"""Builds every file that supervised fine-tuning, the reward model and PPO read.

    sft.jsonl, sft_validation.jsonl                  {"messages", "source", "family"}
    preferences.jsonl, preferences_validation.jsonl  {"domain", "messages", "chosen", "rejected",
                                                      "pair_id", "kind"}
    prompts.jsonl                                    {"messages", "domain", "task" | null}
    eval_tasks.jsonl, eval_requests.jsonl            as prompts.jsonl, held out

Training files draw on the train side of one fixed split by content, the others on its held-out
side, so no evaluation task or request has been seen in any wording. Everything is a function of the
documents and the seed.
"""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from internlm2_jax.data import instructions, preferences, risky, tasks
from internlm2_jax.data.instructions import Instruction
from internlm2_jax.data.preferences import Example
from internlm2_jax.data.tasks import Split
from internlm2_jax.files import write_jsonl

# Shares of the SFT rows; what the corpus cannot fill goes to the tasks.
CORPUS_SHARE = 0.35
RISKY_SHARE = 0.1
# PPO can only strengthen what the fine-tuned model does sometimes: it must both refuse and comply.
REFUSAL_SHARE = 0.5

Row = dict[str, Any]


def build(
    folder: str | Path,
    documents: Iterable[tuple[str, str, str]],
    seed: int,
    *,
    sft: int = 8000,
    sft_validation: int = 400,
    preference_pairs: int = 3000,
    preference_pairs_validation: int = 400,
    prompts: int = 2000,
    eval_tasks: int = 200,
    eval_requests: int = 100,
) -> dict[str, Any]:
    """Writes the files above into `folder`, each whole or not at all, and returns their counts.

    `documents` are (source, path, text). The counts are {file stem: {"rows", "family" | "domain" |
    "kind": {name: rows}}} and "corpus": what the extraction read. Raises UserError when a size is
    beyond what can be generated.
    """
    folder = Path(folder)
    # A tenth of the instructions falls on the held-out side: ask for enough to fill both.
    wanted = round(CORPUS_SHARE * max(sft / 0.85, sft_validation / 0.08))
    found, read = instructions.extract(documents, wanted)
    corpus: dict[Split, list[Instruction]] = {"train": [], "held_out": []}
    for item in found:
        corpus["held_out" if tasks.held_out(item.key) else "train"].append(item)
    examples = {
        split: [Example(item.prompt, item.answer) for item in items if item.family != "module"]
        for split, items in corpus.items()
    }

    files: dict[str, list[Row]] = {
        "sft": sft_rows(sft, seed, "train", corpus["train"]),
        "sft_validation": sft_rows(sft_validation, seed, "held_out", corpus["held_out"]),
        "preferences": preferences.pairs(preference_pairs, seed, "train", examples["train"]),
        "preferences_validation": preferences.pairs(
            preference_pairs_validation, seed, "held_out", examples["held_out"]
        ),
        # Another seed than the SFT tasks': rollouts should not only repeat demonstrated prompts.
        "prompts": preferences.prompts(prompts, seed + 1, "train"),
        "eval_tasks": [
            preferences.task_prompt(task) for task in tasks.generate(eval_tasks, seed, "held_out")
        ],
        "eval_requests": [
            preferences.request_prompt(request)
            for request in risky.generate(eval_requests, seed, "held_out")
        ],
    }
    for stem, rows in files.items():
        write_jsonl(folder / f"{stem}.jsonl", rows)
    return {"corpus": read, **{stem: _counts(rows) for stem, rows in files.items()}}


def sft_rows(count: int, seed: int, split: Split, corpus: list[Instruction]) -> list[Row]:
    """`count` conversations: instructions from the corpus, risky requests, tasks; shuffled."""
    rng = random.Random(f"sft {seed} {split}")
    chosen = rng.sample(corpus, min(len(corpus), round(CORPUS_SHARE * count)))
    rows = [item.row() for item in chosen]
    for request in itertools.islice(risky.requests(seed, split), round(RISKY_SHARE * count)):
        refuse = rng.random() < REFUSAL_SHARE
        answer = rng.choice(risky.REFUSALS if refuse else request.answers)
        family = "refusal" if refuse else "compliance"
        rows.append(Instruction(request.prompt, answer, family, "risky", request.key).row())
    for task in tasks.generate(count - len(rows), seed, split):
        rows.append(Instruction(task.prompt, task.answer, task.family, "tasks", task.key).row())
    rng.shuffle(rows)
    return rows


def _counts(rows: list[Row]) -> dict[str, Any]:
    counts: dict[str, Any] = {"rows": len(rows)}
    for field in ("family", "domain", "kind"):
        values = [row[field] for row in rows if field in row]
        if values:
            counts[field] = dict(sorted(collections.Counter(values).items()))
    return counts
