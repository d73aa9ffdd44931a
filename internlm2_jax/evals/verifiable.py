"""Accuracy on tasks whose answers a program can check.

RLHF moves open-ended scores; a reward model can be fooled. These tasks cannot be: every answer is
right or wrong by `internlm2_jax.data.tasks.check`, so the same numbers are comparable before SFT,
after SFT and after every PPO round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from internlm2_jax.data.tasks import Task, check
from internlm2_jax.errors import UserError

Messages = list[dict[str, str]]
GenerateFn = Callable[[list[Messages]], list[str]]

ALL = "all"


def task_accuracy(generate_fn: GenerateFn, tasks: Sequence[Task]) -> dict[str, float]:
    """Share of `tasks` answered rightly: under "all" over every task, then one entry a family.

    generate_fn: answers a list of conversations, here of one user message each, in order.
    Raises UserError when there is nothing to ask, or when answers and questions differ in number
    (a generation function that drops rows would shift every answer to its neighbour's question).
    """
    if not tasks:
        raise UserError("task_accuracy got no tasks; generate some with internlm2_jax.data.tasks")
    responses = generate_fn([[{"role": "user", "content": task.prompt}] for task in tasks])
    if len(responses) != len(tasks):
        raise UserError(
            f"the generation function answered {len(responses)} of {len(tasks)} tasks; "
            "it must return one response per conversation, in order"
        )
    right: dict[str, list[bool]] = {}
    for task, response in zip(tasks, responses, strict=True):
        right.setdefault(task.family, []).append(bool(check(task, response)))
    accuracy = {ALL: sum(map(sum, right.values())) / len(tasks)}
    return accuracy | {family: sum(marks) / len(marks) for family, marks in sorted(right.items())}
