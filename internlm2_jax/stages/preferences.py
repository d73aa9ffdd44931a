"""Preference pairs from public sets, split by prompt: what a reward model trains on."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path

from internlm2_jax import files
from internlm2_jax.data import preference_sets
from internlm2_jax.data import preferences as generated_pairs

GENERATED = "generated"


def preferences(
    folder: Path,
    *,
    sets: Mapping[str, str],
    turns: int | None = None,
    validation_share: float = 0.25,
    generated: int = 0,
    seed: int = 0,
) -> None:
    """Writes preferences.jsonl and preferences_validation.jsonl of data/preference_sets.py.

    Beside them sft.jsonl and sft_validation.jsonl: the conversations with the chosen answers, for
    the fine-tuning that a reward model starts from.

    Args:
        turns: of each conversation only so many last ones, for models that read little.
        generated: draw so many pairs of data/preferences.py too, and train on those whose domain
            the sets have; their kind is "generated". None is held out.
    """
    rows = preference_sets.read(sets)
    if turns is not None:
        rows = [{**row, "messages": row["messages"][-turns:]} for row in rows]
    train, held_out = preference_sets.split(rows, validation_share, seed)
    if generated:
        domains = {row["domain"] for row in rows}
        drawn = generated_pairs.pairs(generated, seed, "train")
        train += [{**row, "kind": GENERATED} for row in drawn if row["domain"] in domains]
    files.write_jsonl(folder / "preferences.jsonl", train)
    files.write_jsonl(folder / "preferences_validation.jsonl", held_out)
    files.write_jsonl(folder / "sft.jsonl", preference_sets.conversations(train))
    files.write_jsonl(folder / "sft_validation.jsonl", preference_sets.conversations(held_out))
    kinds = {
        name: dict(collections.Counter(row["kind"] for row in part))
        for name, part in (("train", train), ("validation", held_out))
    }
    files.write_json(folder / "result.json", kinds)
