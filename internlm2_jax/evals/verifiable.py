"""Accuracy on tasks whose answers a program can check.

RLHF moves open-ended scores; a reward model can be fooled. These tasks cannot be: every answer is
right or wrong by `internlm2_jax.data.tasks.check`, so the same numbers are comparable before SFT,
after SFT and after every PPO round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from internlm2_jax.data import tasks as generated
from internlm2_jax.data.tasks import Task, check
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.evals.subject import Subject
from internlm2_jax.infer import engine
from internlm2_jax.infer.sampling import Sampling

_QUESTION = "Question: {}\nAnswer:"
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


def completion_accuracy(
    model: Any,
    params: Any,
    vocabulary: Tokenizer,
    *,
    num_tasks: int = 64,
    seed: int = 0,
    max_new_tokens: int = 24,
) -> dict[str, float]:
    """`task_accuracy` of a model that cannot chat yet: it goes on after "Question: ... Answer:".

    Greedy, on held-out tasks, up to the end of the line: a quick suite for pre-training.
    """

    def generate(conversations: list[Messages]) -> list[str]:
        texts = [_QUESTION.format(messages[0]["content"]) for messages in conversations]
        out = engine.generate(
            model,
            params,
            [[vocabulary.bos_id, *vocabulary.encode(text)] for text in texts],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=0.0),
            stop_ids=(vocabulary.eos_id,),
        )
        return [vocabulary.decode(tokens).strip().partition("\n")[0] for tokens in out.tokens]

    return task_accuracy(generate, generated.generate(num_tasks, seed, "held_out"))


def answer_loss(
    model: Any, params: Any, vocabulary: Tokenizer, *, num_tasks: int = 64, seed: int = 0
) -> float:
    """Nats per token of the right answers to the tasks of `completion_accuracy`.

    It tells models apart that answer none of them rightly.
    """
    asked = []
    for task in generated.generate(num_tasks, seed, "held_out"):
        question = vocabulary.encode(_QUESTION.format(task.prompt))
        whole = vocabulary.encode(f"{_QUESTION.format(task.prompt)} {task.answer}")
        asked.append(([vocabulary.bos_id, *question], [whole[len(question) :]]))
    found = dict(Subject(model, params, vocabulary).likelihoods(asked))
    nats = -sum(tails[0].logprob for tails in found.values())
    return nats / sum(len(tail) for _, (tail,) in asked)
