"""Public preference sets become pairs of the right domain, and no prompt is on both sides."""

from __future__ import annotations

import collections
import json

import pytest

from internlm2_jax import files
from internlm2_jax.data import preference_sets
from internlm2_jax.errors import UserError

TALK = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Pick a lock?\n\nAssistant: "


def test_a_refusal_against_an_answer_is_a_conflict(tmp_path):
    rows = [
        {"chosen": TALK + "Sorry, I can't.", "rejected": TALK + "Use a wire."},
        {"chosen": TALK + "Ask its owner.", "rejected": TALK + "Use a wire."},
        {"chosen": TALK + "Same.", "rejected": TALK + "Same."},
    ]
    files.write_jsonl(tmp_path / "hh.jsonl", rows)
    harmless, helpful, plain = preference_sets.hh_rlhf(tmp_path / "hh.jsonl")
    assert [m["role"] for m in harmless["messages"]] == ["user", "assistant", "user"]
    assert (harmless["domain"], harmless["chosen"]) == ("harmless", "Sorry, I can't.")
    assert (helpful["domain"], helpful["chosen"]) == ("helpful", "Use a wire.")
    assert harmless["pair_id"] == helpful["pair_id"] != plain["pair_id"]
    files.write_jsonl(tmp_path / "hh.jsonl", [{"chosen": "Hi", "rejected": "Ho"}])
    with pytest.raises(UserError, match=r"hh.jsonl:1: no conversation of Human and Assistant"):
        list(preference_sets.hh_rlhf(tmp_path / "hh.jsonl"))


def test_chosen_answers_become_conversations():
    asked = [{"role": "user", "content": "Hi"}]
    rows = [preference_sets.pair(d, asked, "yes", "no") for d in ("helpful", "harmless")]
    rows.append(preference_sets.pair("helpful", asked, "no", "yes"))
    found = [r["messages"] for r in preference_sets.conversations(rows)]
    assert [m[-1] for m in found] == [
        {"role": "assistant", "content": "yes"},
        {"role": "assistant", "content": "no"},
    ]
    assert all(m[:-1] == asked for m in found)


def test_annotators_must_agree(tmp_path):
    def row(*votes):
        row = {"instruction": "Do", "input": "it", "response1": "one", "response2": "two"}
        return row | {f"annotator{i}": vote for i, vote in enumerate(votes, start=1)}

    votes = [(1, 1, 1), (2, 2, 1), (0, 0, 0), (0, 0, 2), (0, 2, 2)]
    (tmp_path / "p.json").write_text(json.dumps([row(*v) for v in votes]))
    rows = list(preference_sets.pandalm(tmp_path / "p.json"))
    assert [(r["chosen"], r["margin"]) for r in rows] == [("one", 3), ("two", 1), ("two", 2)]
    assert rows[0]["messages"][0]["content"] == "Do\nit"


def test_the_real_sets(shared):
    sets = {
        "hh_rlhf": shared / "data/hh_rlhf/harmless_base.jsonl",
        "llmbar": shared / "data/llmbar",
        "pandalm": shared / "data/pandalm/testset-v1.json",
    }
    rows = preference_sets.read(sets)
    count = collections.Counter(row["domain"] for row in rows)
    assert count["instruction_following"] == 419
    assert count["harmless"] > 1500
    train, held_out = preference_sets.split(rows, 0.25, seed=0)
    assert len(train) + len(held_out) == len(rows)
    prompts = [{files.fingerprint(row["messages"]) for row in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert 0.2 < len(held_out) / len(rows) < 0.3
    assert preference_sets.split(rows, 0.25, seed=0) == (train, held_out)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="no preference set 'shp'"):
        preference_sets.read({"shp": tmp_path})
    with pytest.raises(UserError, match="the preference set llmbar is not at"):
        preference_sets.read({"llmbar": tmp_path / "absent"})
    with pytest.raises(UserError, match="holds no pair of llmbar"):
        preference_sets.read({"llmbar": tmp_path})
