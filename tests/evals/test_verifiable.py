"""Accuracy over families, with the real checker."""

from __future__ import annotations

import pytest

from internlm2_jax.data import tasks as task_module
from internlm2_jax.errors import UserError
from internlm2_jax.evals.verifiable import task_accuracy


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
