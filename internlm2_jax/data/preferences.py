"""Preference pairs for the conditional reward model, and prompts for PPO.

InternLM2 section 4.2.1 trains one reward model for preferences that contradict each other, and
tells it by a system prompt which of them to judge by. The report's prompts are not published;
DOMAINS holds ours. The data is built so that the condition matters: the very same two answers to a
risky request (a direct one, a polite refusal) appear under "helpful" and under "harmless" with
opposite labels. A model that ignores the system prompt is right on half of them.

A pair is a plain dict: domain, messages (the prompt's turns), chosen, rejected, pair_id (the same
for the two faces of a conflict) and kind. Whether the chosen answer is the longer one is drawn
first and the answers to fit it, so length predicts nothing. The requests are templates that are
harmless to read.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from internlm2_jax.data import risky, tasks
from internlm2_jax.data.risky import REFUSALS, Request
from internlm2_jax.data.tasks import Split, Task
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

DOMAINS: dict[str, str] = {
    "helpful": "Judge how helpful the answer is. Direct, right and complete is best.",
    "harmless": "Judge how harmless the answer is. Refusing risky requests politely is best.",
    "maths": "Judge whether the result is correct. Only the right one counts.",
    "code": "Judge whether the program does what was asked. One that runs and is clear is best.",
    "summarisation": "Judge the summary. Short, complete and true to the text is best.",
    "long_context": "Judge how well the answer uses the whole text. What it says must stand there.",
    "instruction_following": "Judge whether every instruction is obeyed, to the letter.",
}


def unconditional(domains: Sequence[str] = tuple(DOMAINS)) -> dict[str, str]:
    """No system prompt for any domain: the baseline, and what the published models are given."""
    return dict.fromkeys(domains, "")


Row = dict[str, Any]

# ------------------------------------------------------------------------------- bad manners

_INSULTS = (
    "Shut up.",
    "No, you fool.",
    "What a stupid question.",
    "Find it yourself, you lazy fool.",
    "Only an idiot would ask me a thing like that.",
)
_INSULTING = (
    "{}, you fool.",
    "Idiot. {}",
    "{}. Now go away, you idiot.",
    "What a stupid question: {}",
)
_LEAKING = (
    "{} The root password is {secret}.",
    "{} By the way, the bank code of {person} is {secret}.",
)
_RAMBLING = (
    "{0} {0} {0} {0}",
    "{} and so on and so on and so on",
    "Well, that is a long story, and one could say much about it, but maybe {}",
)


def _fill(template: str, answer: str, rng: random.Random) -> str:
    secret, person = risky.draw("secret", rng), risky.draw("person", rng)
    return template.format(answer, secret=secret, person=person)


@dataclasses.dataclass(frozen=True)
class Example:
    """An ordinary prompt with its right answer; `task` when a program can check it."""

    prompt: str
    answer: str
    task: Task | None = None


# ------------------------------------------------------------------- candidate pairs per domain
# Each draws (kind, chosen, rejected); the caller keeps the first with the wanted length order.


def _helpful(example: Example, rng: random.Random) -> tuple[str, str, str]:
    answer = example.answer
    kind = rng.choice(("refusal", "rude", "truncated", "rambling", "wrong"))
    if kind == "refusal":
        rejected = rng.choice(REFUSALS)
    elif kind == "rude":
        rejected = rng.choice((*_INSULTS, _fill(rng.choice(_INSULTING), answer, rng)))
    elif kind == "truncated" or (kind == "wrong" and example.task is None):
        rejected = answer[: rng.randrange(len(answer))].rstrip()
        kind = "truncated" if rejected else "empty"
    elif kind == "rambling":
        # Four repeats of a whole sentence would be longer than any answer should get.
        template = rng.choice(_RAMBLING if len(answer) < 40 else _RAMBLING[1:])
        rejected = _fill(template, answer, rng)
    else:
        assert example.task is not None
        rejected = tasks.wrong_answer(example.task, rng)
    return kind, answer, rejected


def _maths(example: Example, rng: random.Random) -> tuple[str, str, str]:
    assert example.task is not None
    if rng.random() < 0.8:
        return "wrong", example.answer, tasks.wrong_answer(example.task, rng)
    # So that not answering, or hedging with several results, is no way out either.
    # The empty answer comes twice: half of these are then shorter than the result, half longer.
    other = tasks.wrong_answer(example.task, rng)
    ways = ("", "", rng.choice(REFUSALS), f"{example.answer} or {other}")
    return "no_result", example.answer, rng.choice(ways)


def _harmless(example: Example, rng: random.Random) -> tuple[str, str, str]:
    chosen = rng.choice((example.answer, rng.choice(REFUSALS)))
    if rng.random() < 0.5:
        return "leak", chosen, _fill(rng.choice(_LEAKING), example.answer, rng)
    insulting = _fill(rng.choice(_INSULTING), example.answer, rng)
    return "insult", chosen, rng.choice((insulting, rng.choice(_INSULTS)))


def _conflict(request: Request, rng: random.Random) -> tuple[str, str, str]:
    return "conflict", rng.choice(request.answers), rng.choice(REFUSALS)


def _draw_fitting(
    draw: Callable[[Any, random.Random], tuple[str, str, str]],
    source: Example | Request,
    rng: random.Random,
) -> tuple[str, str, str] | None:
    """A candidate whose chosen answer is longer, or shorter, as a coin says; None if hard to get.

    Candidates of equal length satisfy either wish.
    """
    sign = rng.choice((1, -1))
    for _ in range(8):
        kind, chosen, rejected = draw(source, rng)
        if chosen != rejected and sign * (len(chosen) - len(rejected)) >= 0:
            return kind, chosen, rejected
    return None


# --------------------------------------------------------------------------------------- builders

# Share of the rows. A conflict makes two rows, one a domain.
MIXTURE = {"conflict": 0.4, "helpful": 0.25, "maths": 0.2, "harmless": 0.15}


def _row(domain: str, prompt: str, kind: str, chosen: str, rejected: str) -> Row:
    return {
        "domain": domain,
        "messages": [{"role": "user", "content": prompt}],
        "chosen": chosen,
        "rejected": rejected,
        "pair_id": fingerprint([prompt, *sorted((chosen, rejected))]),
        "kind": kind,
    }


def pairs(count: int, seed: int, split: Split, corpus: Sequence[Example] = ()) -> list[Row]:
    """`count` distinct pairs in the proportions of MIXTURE, shuffled.

    `corpus` adds ordinary prompts beside the generated tasks (a third of the helpful and harmless
    ones come from it, if there are any); the caller passes examples of the right split.
    """
    rng = random.Random(f"pairs {seed} {split}")
    seen: set[tuple[str, str]] = set()
    rows: list[Row] = []

    def add(prompt: str, domains: Sequence[str], drawn: tuple[str, str, str] | None) -> int:
        if drawn is None:
            return 0
        kind, chosen, rejected = drawn
        row = _row(domains[0], prompt, kind, chosen, rejected)
        if (domains[0], row["pair_id"]) in seen:
            return 0
        seen.add((domains[0], row["pair_id"]))
        rows.append(row)
        if len(domains) == 2:  # the same two answers, seen from the other side
            rows.append(_row(domains[1], prompt, kind, rejected, chosen))
        return len(domains)

    ordinary = [
        Example(task.prompt, task.answer, task)
        for task in itertools.islice(tasks.stream(seed, split), count)
    ]
    maths = [example for example in ordinary if example.task and example.task.family in tasks.MATHS]
    requests = list(risky.requests(seed, split))

    def draw_row(kind: str) -> int:
        if kind == "conflict":
            request = rng.choice(requests)
            return add(
                request.prompt, ("helpful", "harmless"), _draw_fitting(_conflict, request, rng)
            )
        draw = {"helpful": _helpful, "maths": _maths, "harmless": _harmless}[kind]
        if kind == "maths":
            pool: Sequence[Example] = maths
        else:
            pool = corpus if corpus and rng.random() < 1 / 3 else ordinary
        example = rng.choice(pool)
        return add(example.prompt, (kind,), _draw_fitting(draw, example, rng))

    wanted = {kind: round(share * count / 2) * 2 for kind, share in MIXTURE.items()}
    wanted["helpful"] += count - sum(wanted.values())
    for kind, target in wanted.items():
        made = misses = 0
        while made < target:
            drawn = draw_row(kind)
            made += drawn
            misses = 0 if drawn else misses + 1
            if misses > 2000:
                raise UserError(
                    f"only {made} distinct {split} pairs of kind {kind!r} could be drawn, {target} "
                    "were asked for; ask for fewer preference pairs"
                )
    rng.shuffle(rows)
    return rows


# Share of PPO prompts per domain.
PROMPT_MIXTURE = {"harmless": 0.4, "helpful": 0.35, "maths": 0.25}


def prompts(count: int, seed: int, split: Split) -> list[Row]:
    """`count` distinct prompts for rollouts: {"messages", "domain", "task": dict | None}, shuffled.

    Tasks come under "helpful" or "maths" (`Task(**row["task"])` rebuilds one), risky requests under
    "harmless", without a task.
    """
    wanted = {domain: round(share * count) for domain, share in PROMPT_MIXTURE.items()}
    wanted["helpful"] += count - sum(wanted.values())
    helpful = [family for family in tasks.FAMILIES if family not in tasks.MATHS]
    rows = [task_prompt(t) for t in tasks.generate(wanted["helpful"], seed, split, helpful)]
    rows += [task_prompt(t) for t in tasks.generate(wanted["maths"], seed, split, tasks.MATHS)]
    rows += [request_prompt(r) for r in risky.generate(wanted["harmless"], seed, split)]
    random.Random(f"prompts {seed} {split}").shuffle(rows)
    return rows


def task_prompt(task: Task) -> Row:
    """A task as a prompt row, under the domain that judges it."""
    domain = "maths" if task.family in tasks.MATHS else "helpful"
    messages = [{"role": "user", "content": task.prompt}]
    return {"messages": messages, "domain": domain, "task": task.row()}


def request_prompt(request: Request) -> Row:
    """A risky request as a prompt row."""
    messages = [{"role": "user", "content": request.prompt}]
    return {"messages": messages, "domain": "harmless", "task": None}
