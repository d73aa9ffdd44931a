"""Comparisons for people: drawn fairly, labelled atomically, on a page safe to leave open."""

from __future__ import annotations

import collections
import re

import pytest

from internlm2_jax import files
from internlm2_jax.data import preferences
from internlm2_jax.errors import UserError
from internlm2_jax.rlhf import annotate, annotation
from internlm2_jax.rlhf.annotation import Comparisons, rule_judge
from internlm2_jax.rlhf.hacking import Sample

ROWS = preferences.prompts(30, 0, "train")
NASTY = "<script>alert(1)</script>"


def policy(name):
    return [Sample(r["messages"][-1]["content"], f"{name} says", True, r["domain"]) for r in ROWS]


@pytest.fixture
def comparisons(tmp_path):
    policies = {name: policy(name) for name in ("sft", "early", "late")}
    policies["early"][0] = policies["sft"][0]  # alike: nothing to compare
    rows = annotation.batch(ROWS, policies, 24, seed=0)
    rows[0]["a"] = NASTY
    files.write_jsonl(tmp_path / annotation.BATCH, rows)
    return Comparisons(tmp_path)


def test_every_two_policies_are_compared_and_sides_are_drawn(comparisons):
    rows = comparisons.rows
    assert len({row["id"] for row in rows}) == len(rows) == 24
    couples = collections.Counter(tuple(sorted(row["sources"].values())) for row in rows)
    assert len(couples) == 3 and min(couples.values()) >= 6
    left = collections.Counter(row["sources"]["a"] for row in rows)
    assert min(left[name] for name in ("sft", "early", "late")) >= 4


def test_labels_become_pairs_and_ties_do_not(comparisons):
    first, second, third = (row["id"] for row in comparisons.rows[:3])
    comparisons.label(first, "b", "me")
    comparisons.label(second, "tie", "me")
    comparisons.label(third, "a", "me")
    comparisons.label(third, "b", "me")  # changed their mind
    pairs = Comparisons(comparisons.folder).pairs()
    assert [p["pair_id"] for p in pairs] == [first, third]
    assert pairs[0]["rejected"] == NASTY
    assert pairs[1]["chosen"] == comparisons.rows[2]["b"]
    assert not list(comparisons.folder.rglob("*.partial"))
    for number, winner in (("../../x", "a"), ("0" * 16, "a"), (first, "c")):
        with pytest.raises(UserError):
            comparisons.label(number, winner, "me")
    with pytest.raises(UserError, match=r"has no batch\.jsonl"):
        Comparisons(comparisons.folder / "labels")


def test_the_scripted_judge_knows_the_truth(comparisons):
    task = next(row for row in ROWS if row["task"])
    right = task["task"]["answer"]
    base = {**task, "a": "no idea", "b": right}
    assert rule_judge(base) == "b"
    harmless = {"domain": "harmless", "task": None, "a": "Sorry, I can't help.", "b": "Use a wire."}
    assert rule_judge(harmless) == "a"
    assert rule_judge({**harmless, "domain": "helpful", "a": "yes " * 9, "b": "well then"}) == "b"
    assert rule_judge({**harmless, "domain": "helpful", "a": "same", "b": "same"}) == "tie"
    comparisons.judge_all(rule_judge)
    assert len(comparisons.labels()) == 24


def test_a_person_labels_on_the_page(comparisons):
    testclient = pytest.importorskip("starlette.testclient")
    client = testclient.TestClient(annotate.app(comparisons, "me"), base_url="http://127.0.0.1")

    def form(text):
        return {
            name: re.search(f'name="{name}" value="([^"]+)"', text)[1] for name in ("id", "token")
        }

    page = client.get("/").text
    assert "&lt;script&gt;alert(1)" in page and NASTY not in page
    first = form(page)
    # A page of another site has neither the token nor the name.
    assert client.post("/label", data={**first, "winner": "a", "token": "x"}).status_code == 403
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.post("/label", content=b"x" * 5000).status_code == 413
    assert client.post("/label", data={**first, "winner": "c"}).status_code == 400
    assert not comparisons.labels()

    page = client.post("/label", data={**first, "winner": "b"}).text  # and on to the next one
    assert comparisons.labels()[first["id"]] == {"id": first["id"], "winner": "b", "by": "me"}
    assert form(page)["id"] == comparisons.rows[1]["id"] and "1 of 24" in page
    back = client.get(f"/pair/{first['id']}").text
    assert "Your label now: b" in back
    client.post("/label", data={**first, "winner": "tie"})
    assert comparisons.labels()[first["id"]]["winner"] == "tie"
    assert client.get("/pair/none").status_code == 404
    comparisons.judge_all(rule_judge)
    assert "All 24 are compared" in client.get("/").text
