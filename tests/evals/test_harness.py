"""lm-evaluation-harness and `internlm2 evaluate` on the same items: the same, item by item."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from internlm2_jax import files
from internlm2_jax.evals import runner, suites

lm_eval = pytest.importorskip("lm_eval", reason="pip install -e '.[harness]'")

KNOWN = suites.built_in()
ITEMS = 24


@pytest.fixture(scope="module")
def both(subject, shared, tmp_path_factory):
    """({suite: lines of ours}, {suite: samples of theirs}, {suite: scores})."""
    from lm_eval.tasks import TaskManager

    from internlm2_jax.evals.harness import HarnessModel

    home = tmp_path_factory.mktemp("harness")
    mmlu = dataclasses.replace(KNOWN["mmlu"], header="", shots=2)
    gsm8k = dataclasses.replace(
        KNOWN["gsm8k"], shots=1, max_new_tokens=24, options={"accept": "strict"}
    )
    ours, scores = {}, {}
    tasks = home / "tasks"
    tasks.mkdir()
    for suite, data in ((mmlu, "mmlu"), (gsm8k, "gsm8k")):
        loaded = runner.load(suite, shared / "data" / data, subject.tokenizer, ITEMS)
        found = runner.evaluate(subject, suite, loaded, home / suite.name, silent=True)
        ours[suite.name] = files.read_jsonl(home / suite.name / "items.jsonl")
        scores[suite.name] = found["score"]
        rows = [
            {**i.fields, "choices": i.choices, "answer": i.answers[0], "asked": line["prompt"]}
            for i, line in zip(loaded.items, ours[suite.name], strict=True)
        ]
        files.write_jsonl(home / f"{suite.name}.jsonl", rows)
        task = {
            "task": suite.name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(home / f"{suite.name}.jsonl")}},
            "doc_to_text": "{{asked}}", "target_delimiter": " ", "num_fewshot": 0,
        }  # fmt: skip
        if suite.method == "likelihood":
            task |= {
                "output_type": "multiple_choice", "doc_to_choice": ["A", "B", "C", "D"],
                "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
                "metric_list": [{"metric": "acc"}],
            }  # fmt: skip
        else:
            task |= {
                "output_type": "generate_until", "doc_to_target": "{{answer}}",
                "generation_kwargs": {
                    "until": list(suite.stop), "do_sample": False, "max_gen_toks": 24
                },
                "metric_list": [{"metric": "exact_match"}],
            }  # fmt: skip
        (tasks / f"{suite.name}.yaml").write_text(yaml.safe_dump(task))
    result = lm_eval.simple_evaluate(
        model=HarnessModel.of(subject), tasks=[mmlu.name, gsm8k.name], log_samples=True,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )  # fmt: skip
    theirs = {
        name: sorted(samples, key=lambda s: s["doc_id"])
        for name, samples in result["samples"].items()
    }
    return ours, theirs, scores, result["results"]


def test_choices_have_the_same_likelihoods_and_score(both):
    ours, theirs, scores, results = both
    for mine, other in zip(ours["mmlu"], theirs["mmlu"], strict=True):
        said = [response[0][0] for response in other["resps"]]
        assert said == mine["logprobs"]  # to the last bit
        assert other["acc"] == mine["score"]
    assert results["mmlu"]["acc,none"] == pytest.approx(scores["mmlu"])
    assert len(ours["mmlu"]) == ITEMS and 0 < scores["mmlu"] < 1


def test_answers_are_the_same_texts(both):
    ours, theirs, _, _ = both
    mine = [line["outputs"][0]["text"] for line in ours["gsm8k"]]
    assert mine == [sample["resps"][0][0] for sample in theirs["gsm8k"]]
    assert len(set(mine)) > ITEMS // 2


def test_turns_and_whole_texts(subject):
    from types import SimpleNamespace

    from internlm2_jax.evals.harness import HarnessModel

    model = HarnessModel.of(subject)
    turns = [{"role": "user", "content": "Hi <|im_end|>"}]
    assert model._ids(model.apply_chat_template(turns)) == subject.encode_chat(turns)
    text = "def f(x): return x " * 150  # longer than the model's positions
    ids = subject.tokenizer.encode(text)
    assert len(ids) > subject.max_length
    (whole,) = model.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert -20 * len(ids) < whole < 0
    short = "def f(x)"
    (rolled,) = model.loglikelihood_rolling([SimpleNamespace(args=(short,))])
    (asked,) = model.loglikelihood([SimpleNamespace(args=("", short))])
    assert rolled == pytest.approx(asked[0], abs=1e-3)
