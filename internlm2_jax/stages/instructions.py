"""The data of the alignment stages: conversations, preference pairs, prompts, held-out tasks."""

from __future__ import annotations

from pathlib import Path

from internlm2_jax import files
from internlm2_jax.data import alignment, documents


def instructions(
    folder: Path,
    *,
    corpus: Path,
    sft: int = 8000,
    preference_pairs: int = 3000,
    prompts: int = 2000,
    eval_tasks: int = 200,
    seed: int = 0,
) -> None:
    """Builds them from the corpus itself and from generated tasks that a program can check.

    The four sizes are rows; see data/alignment.py for the files.
    """
    counts = alignment.build(
        folder,
        documents.read(corpus / "corpus", "train"),
        seed,
        sft=sft,
        preference_pairs=preference_pairs,
        prompts=prompts,
        eval_tasks=eval_tasks,
    )
    files.write_json(folder / "result.json", counts)
