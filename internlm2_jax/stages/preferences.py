"""Preference pairs from public sets, split by prompt: what a reward model trains on."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path

from internlm2_jax import files
from internlm2_jax.data import preference_sets


def preferences(
    folder: Path,
    *,
    sets: Mapping[str, str],
    turns: int | None = None,
    validation_share: float = 0.25,
    seed: int = 0,
) -> None:
    """Writes preferences.jsonl and preferences_validation.jsonl of data/preference_sets.py.

    Args:
        turns: of each conversation only so many last ones, for models that read little.
    """
    rows = preference_sets.read(sets)
    if turns is not None:
        rows = [{**row, "messages": row["messages"][-turns:]} for row in rows]
    train, held_out = preference_sets.split(rows, validation_share, seed)
    files.write_jsonl(folder / "preferences.jsonl", train)
    files.write_jsonl(folder / "preferences_validation.jsonl", held_out)
    kinds = {
        name: dict(collections.Counter(row["kind"] for row in part))
        for name, part in (("train", train), ("validation", held_out))
    }
    files.write_json(folder / "result.json", kinds)
