"""Accuracy over families, with the real checker."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from internlm2_jax.data import tasks as task_module
from internlm2_jax.errors import UserError
from internlm2_jax.evals.verifiable import answer_loss, task_accuracy


@pytest.fixture
def tasks(monkeypatch):
    """Three tasks of two families, marked by equality."""
    monkeypatch.setattr(
        "internlm2_jax.evals.verifiable.check", lambda task, response: response == task.answer
    )
    rows = [("1+1", "2", "sum"), ("2+2", "4", "sum"), ("say hi", "hi", "copy")]
    return [task_module.Task(prompt=p, answer=a, family=f, key=p) for p, a, f in rows]


def test_accuracy_is_per_family_and_over_all_tasks(tasks):
    asked = []

    def generate(conversations):
        asked.extend(conversations)
        return ["2", "5", "hi"]

    assert task_accuracy(generate, tasks) == {"all": 2 / 3, "copy": 1.0, "sum": 0.5}
    assert asked[1] == [{"role": "user", "content": "2+2"}]


def test_a_generator_that_drops_rows_is_refused(tasks):
    with pytest.raises(UserError, match="answered 2 of 3"):
        task_accuracy(lambda conversations: ["2", "hi"], tasks)
    with pytest.raises(UserError, match="no tasks"):
        task_accuracy(lambda conversations: [], [])


def test_the_loss_of_right_answers_is_that_of_their_tokens_alone(subject):
    model, params, vocabulary = subject.model, subject.params, subject.tokenizer
    nats, count = 0.0, 0
    for task in task_module.generate(5, 3, "held_out"):
        asked = [1, *vocabulary.encode(f"Question: {task.prompt}\nAnswer:")]
        row = [1, *vocabulary.encode(f"Question: {task.prompt}\nAnswer: {task.answer}")]
        assert row[: len(asked)] == asked
        logprobs = jax.nn.log_softmax(model.logits(params, jnp.array([row]))[0])
        answer = range(len(asked), len(row))
        nats -= sum(float(logprobs[i - 1, row[i]]) for i in answer)
        count += len(answer)
    found = answer_loss(model, params, vocabulary, num_tasks=5, seed=3)
    assert found == pytest.approx(nats / count, rel=1e-4)
