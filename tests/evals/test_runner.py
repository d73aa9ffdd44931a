"""A whole evaluation: lines, totals, resumption, and every method on a tiny model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from internlm2_jax import files
from internlm2_jax.errors import UserError
from internlm2_jax.evals import runner, suites
from internlm2_jax.evals.subject import Likely, Said

KNOWN = suites.built_in()
CHOICES = suites.of(
    "trial",
    {
        "dimension": "examinations", "format": "choices", "measure": "choice",
        "method": "likelihood", "prompt": "{question}\n{options}\nAnswer:", "shots": 1,
        "data": [{"files": "test.jsonl", "shots": "dev.jsonl"}], "max_new_tokens": 4,
    },
    "here",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Twelve questions of two groups, and two examples of each."""

    def row(i, group):
        texts = [str(2 * i), str(i), str(3 * i + 1)]
        return {"id": i, "group": group, "question": f"What is {i} + {i}?", "choices": texts,
                "answer": "ABC"[i % 3]}  # fmt: skip

    for name, count in (("test", 12), ("dev", 4)):
        rows = [row(i, "even" if i % 2 == 0 else "odd") for i in range(count)]
        files.write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    return tmp_path


def measured(subject, suite, folder, out="out", **options):
    loaded = runner.load(suite, folder / "data", subject.tokenizer, options.pop("limit", None))
    return runner.evaluate(subject, suite, loaded, folder / out, silent=True, **options)


def test_a_killed_evaluation_ends_in_the_same_lines_and_totals(subject, folder, monkeypatch):
    whole = measured(subject, CHOICES, folder)
    assert whole["items"] == whole["graded"] == 12
    assert set(whole["groups"]) == {"even", "odd"} and whole["groups"]["odd"]["items"] == 6
    assert whole["macro"] == pytest.approx(whole["score"])  # groups of one size
    lines = (folder / "out/items.jsonl").read_bytes()
    first = files.parse_json(lines.splitlines()[0], "")
    assert first["where"].endswith("test.jsonl:1") and len(first["logprobs"]) == 3
    assert first["prompt"].startswith("What is 2 + 2?\nA. 4\n")  # never the item itself
    assert first["prompt"].endswith("\n\nWhat is 0 + 0?\nA. 0\nB. 0\nC. 1\nAnswer:")

    original, seen = type(subject).likelihoods, []

    def killed(self, asked):
        for found in original(self, asked):
            if len(seen) == 5:
                raise KeyboardInterrupt
            seen.append(found)
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(type(subject), "likelihoods", killed)
        with pytest.raises(KeyboardInterrupt):
            measured(subject, CHOICES, folder, "killed")
    assert not (folder / "killed/totals.json").exists()
    with open(folder / "killed/items.jsonl", "ab") as torn:
        torn.write(b'{"id": "3", "sco')
    asked = []

    def watched(self, left):
        asked.append(len(left))
        return original(self, left)

    monkeypatch.setattr(type(subject), "likelihoods", watched)
    assert measured(subject, CHOICES, folder, "killed") == whole
    assert asked == [7] and (folder / "killed/items.jsonl").read_bytes() == lines
    assert measured(subject, CHOICES, folder, "killed") == whole and asked == [7]


def test_results_of_other_settings_are_not_mixed(subject, folder):
    measured(subject, CHOICES, folder, limit=4)
    with pytest.raises(UserError, match=r"out has results with another data, items; give another"):
        measured(subject, CHOICES, folder)
    chat = dataclasses.replace(CHOICES, shots=0)
    with pytest.raises(UserError, match="another data, suite"):
        measured(subject, chat, folder, limit=4)
    assert measured(subject, CHOICES, folder, redo=True)["items"] == 12


def test_a_limit_is_spread_evenly(subject, folder):
    loaded = runner.load(CHOICES, folder / "data", subject.tokenizer, 4)
    assert [item.id for item in loaded.items] == ["0", "3", "6", "9"]


def test_texts_are_compared_per_byte(subject, tmp_path, monkeypatch):
    rows = [{"ind": i, "ctx": "So", "endings": ["it went", "no"], "label": "1"} for i in range(2)]
    files.write_jsonl(tmp_path / "data/hellaswag_val.jsonl", rows)
    seen = []

    def likelihoods(self, asked):
        for n, (_, tails) in enumerate(asked):
            seen.extend(self.tokenizer.decode(tail) for tail in tails)
            yield n, [Likely(-4.0, False), Likely(-1.4 - n, False)]  # per byte -0.5; -0.47, -0.8

    monkeypatch.setattr(type(subject), "likelihoods", likelihoods)
    found = measured(subject, KNOWN["hellaswag"], tmp_path)
    assert found["score"] == 0.5 and seen[:2] == [" it went", " no"]


class Parrot:
    """A subject that says what it is told to; the rest is the real one's."""

    def __init__(self, subject, says):
        self._subject, self._says = subject, says
        self.prompts = []

    def __getattr__(self, name):
        return getattr(self._subject, name)

    def answers(self, prompts, *, seeds, **settings):
        self.prompts += [self.tokenizer.decode(p[1:]) for p in prompts]
        for n in reversed(range(len(prompts))):  # in no order
            text = self._says(self.tokenizer.decode(prompts[n][1:]), seeds[n][1])
            yield n, Said(text, [1] * len(text), True)


def test_samples_are_counted_voted_on_and_estimated(subject, tmp_path):
    rows = [{"question": f"{i}?", "answer": f"so #### {i}"} for i in range(3)]
    files.write_jsonl(tmp_path / "data/test.jsonl", rows)
    suite = dataclasses.replace(
        KNOWN["gsm8k"], shots=0, samples=4, temperature=0.8, k=(1, 2), options={"accept": "strict"}
    )
    # item 0: 3 of 4 right; item 1: 1 of 4, the wrong ones agree; item 2: none, all differ
    table = {0: "0009", 1: "1777", 2: "3456"}
    parrot = Parrot(subject, lambda _, row: f"#### {table[row // 4][row % 4]}")
    found = measured(parrot, suite, tmp_path)
    assert found["score"] == pytest.approx((3 / 4 + 1 / 4 + 0) / 3)
    assert found["pass_at_k"]["1"] == pytest.approx(found["score"])
    assert found["pass_at_k"]["2"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert found["majority"] == pytest.approx(1 / 3)
    assert found["interval"][0] <= found["score"] <= found["interval"][1]


def test_groups_are_asked_and_graded_in_their_own_way(subject, tmp_path):
    row = {"context": "C", "length": 1, "all_classes": ["Date", "City"]}
    for name, answer in (("trec", "Date"), ("passage_count", "7"), ("hotpotqa", "red hat")):
        asked = [{**row, "input": f"{name}?", "answers": [answer], "_id": f"{i}"} for i in range(2)]
        files.write_jsonl(tmp_path / f"data/data/{name}.jsonl", asked)
    says = {"trec": "Date or City date", "pass": "7 of 14", "hotp": "a red hat, blue"}
    parrot = Parrot(subject, lambda text, _: next(s for k, s in says.items() if f"{k}" in text))
    found = measured(parrot, KNOWN["longbench"], tmp_path)
    groups = {name: group["score"] for name, group in found["groups"].items()}
    assert groups == {"trec": 1, "passage_count": 0.5, "hotpotqa": pytest.approx(0.8)}
    assert sum("assistant" in prompt for prompt in parrot.prompts) == 4  # trec is no conversation


def test_choices_by_generation_and_in_turns(subject, folder):
    suite = dataclasses.replace(CHOICES, method="generation", chat=True)
    parrot = Parrot(subject, lambda text, _: "The answer is B.")
    found = measured(parrot, suite, folder)
    assert found["score"] == pytest.approx(4 / 12)
    assert parrot.prompts[0].count("assistant\n") == 2  # an example's turn and its own


def test_a_judge_is_asked_in_both_orders(subject, tmp_path, monkeypatch):
    rows = [
        {"input": f"Task {i}", "output_1": "good", "output_2": "bad", "label": 1} for i in range(4)
    ]
    files.write_json(tmp_path / "data/N/dataset.json", rows)
    suite = KNOWN["llmbar"]

    def first(self, asked):  # whatever stands first
        for n in range(len(asked)):
            yield n, [Likely(-1.0, True), Likely(-2.0, False)]

    monkeypatch.setattr(type(subject), "likelihoods", first)
    found = measured(subject, suite, tmp_path)
    assert found["score"] == 0.5 and found["inconsistent"] == 4

    def knows(self, asked):
        for n, (ids, _) in enumerate(asked):
            text = self.tokenizer.decode(ids)
            good = text.index("good") < text.index("bad")
            yield n, [Likely(-1.0 - (not good), True), Likely(-1.0 - good, False)]

    monkeypatch.setattr(type(subject), "likelihoods", knows)
    found = measured(subject, suite, tmp_path, "knows")
    assert found["score"] == 1 and found["inconsistent"] == 0


def test_sessions_keep_their_state_and_die_alone(subject, tmp_path):
    from internlm2_jax.sandbox import require

    try:
        require()
    except UserError as error:
        pytest.skip(str(error))

    def cell(question, code, shown=None):
        outputs = [{"data": {"text/plain": shown}}] if shown else []
        return [{"cell_type": "markdown", "source": question},
                {"cell_type": "code", "source": code, "outputs": outputs}]  # fmt: skip

    cells = [*cell("set", "x = 20"), *cell("use", "x + 1", "21"), *cell("more", "x * 2", "40")]
    (tmp_path / "data").mkdir()
    for name in ("good", "dies"):
        (tmp_path / f"data/{name}.ipynb").write_text(json.dumps({"cells": cells}))
    said = {"set": "x = 20", "use": "x + 1", "more": "x * 2"}

    class Coder(Parrot):
        def answers(self, prompts, *, seeds, **settings):
            for n, prompt in enumerate(prompts):
                text = self.tokenizer.decode(prompt)
                last = next(w for w in ("more", "use", "set") if f"user\n{w}" in text)
                code = "import os; os._exit(1)" if n == 0 and last == "use" else said[last]
                answer = f"```python\n{code}\n```"
                yield n, Said(answer, self.tokenizer.encode(answer), True)

    found = measured(Coder(subject, None), KNOWN["cibench"], tmp_path)
    records = {r["id"]: r for r in files.read_jsonl(tmp_path / "out/items.jsonl")}
    assert records["good"]["score"] == 1
    assert [s["status"] for s in records["dies"]["steps"]] == ["ok", "died", "error"]
    assert found["parts"] == {"executable": 4 / 6, "general": 2 / 4}


def test_two_models_answers_go_before_a_judge(subject, tmp_path, monkeypatch):
    from internlm2_jax.evals import judge

    asked = [{"question_id": i, "category": "c", "turns": [f"Task {i}?"]} for i in range(4)]
    files.write_jsonl(tmp_path / "data/question.jsonl", asked)
    suite = dataclasses.replace(KNOWN["mt_bench"], max_new_tokens=32)
    measured(Parrot(subject, lambda *_: "bad"), suite, tmp_path, "a")
    found = measured(Parrot(subject, lambda *_: "good"), suite, tmp_path, "b")
    assert found["score"] is None and found["items"] == 4

    def knows(self, asked):
        for n, (ids, _) in enumerate(asked):
            text = self.tokenizer.decode(ids)
            good = text.index("good") < text.index("bad")
            yield n, [Likely(-1.0 - (not good), True), Likely(-1.0 - good, False)]

    monkeypatch.setattr(type(subject), "likelihoods", knows)
    a, b = tmp_path / "a", tmp_path / "b"
    assert judge.judge(subject, a, b, tmp_path / "ab", silent=True)["score"] == 1
    assert judge.judge(subject, b, a, tmp_path / "ba", silent=True)["score"] == 0
    with pytest.raises(UserError, match="no finished evaluation"):
        judge.judge(subject, a, tmp_path / "none", tmp_path / "x")
