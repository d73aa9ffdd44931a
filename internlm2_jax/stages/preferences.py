"""Preference pairs from public sets, split by prompt: what a reward model trains on."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path

from internlm2_jax import files
from internlm2_jax.data import preference_sets


def preferences(
    folder: Path, *, sets: Mapping[str, str], validation_share: float = 0.25, seed: int = 0
) -> None:
    """Writes preferences.jsonl and preferences_validation.jsonl of data/preference_sets.py."""
    rows = preference_sets.read(sets)
    train, held_out = preference_sets.split(rows, validation_share, seed)
    files.write_jsonl(folder / "preferences.jsonl", train)
    files.write_jsonl(folder / "preferences_validation.jsonl", held_out)
    kinds = {
        name: dict(collections.Counter(row["kind"] for row in part))
        for name, part in (("train", train), ("validation", held_out))
    }
    files.write_json(folder / "result.json", kinds)
