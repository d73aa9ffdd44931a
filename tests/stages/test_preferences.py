"""The stage of public preference pairs: what it holds out, and what it adds."""

from __future__ import annotations

from internlm2_jax import files
from internlm2_jax.data import preference_sets, preferences
from internlm2_jax.stages import preferences as stage


def test_generated_pairs_are_trained_on_and_never_held_out(tmp_path):
    own = [
        preference_sets.pair(
            "helpful", [{"role": "user", "content": f"{i}?"}], f"{i}.", "", kind="own"
        )
        for i in range(10)
    ]
    files.write_jsonl(tmp_path / "own.jsonl", own)
    sets = {"pairs": str(tmp_path / "own.jsonl")}
    stage(tmp_path, sets=sets, validation_share=0.4, generated=40)
    train = files.read_jsonl(tmp_path / "preferences.jsonl")
    held_out = files.read_jsonl(tmp_path / "preferences_validation.jsonl")
    assert {row["kind"] for row in held_out} == {"own"} and len(held_out) == 4
    drawn = preferences.pairs(40, 0, "train")
    added = [row for row in train if row["kind"] == "generated"]
    assert added == [{**r, "kind": "generated"} for r in drawn if r["domain"] == "helpful"]
    assert 0 < len(added) < 40 and len(train) == 6 + len(added)
    told = files.read_jsonl(tmp_path / "sft.jsonl")
    said = {(r["messages"][0]["content"], r["messages"][-1]["content"]) for r in told}
    assert said == {(r["messages"][0]["content"], r["chosen"]) for r in train}
    assert len(told) == len(said)
    assert files.read_json(tmp_path / "result.json")["validation"] == {"own": 4}
