"""Tasks made to a length, whose answers only the whole context gives: seven of RULER's kinds.

Source: RULER (arXiv 2404.06654), section 3: needles (single; among others with other keys; several
values of one key; several keys), chains of variables, and words to be counted. The texts are this
project's own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from internlm2_jax.errors import UserError
from internlm2_jax.evals.items import Item

NOISE = (
    "The river runs slowly past the old mill.",
    "Leaves turn in the light of the morning.",
    "A boat is tied to the bank and nobody is in it.",
    "The road goes on behind the hill.",
)
ADJECTIVES = (
    "amber",
    "brave",
    "calm",
    "dusty",
    "eager",
    "faint",
    "gentle",
    "hollow",
    "icy",
    "keen",
)
NOUNS = ("anchor", "basin", "candle", "desert", "engine", "forest", "garden", "harbor", "kettle")


class Task(NamedTuple):
    """Facts to hide in their order, the question, its answers, and `noise`: so many sentences or
    words to hide them among."""

    facts: list[str]
    question: str
    answers: list[str]
    noise: Callable[[int], list[str]]


def _plain(count: int) -> list[str]:
    return [NOISE[i % len(NOISE)] for i in range(count)]


def _keys(rng: random.Random, count: int) -> list[str]:
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}-{rng.randrange(100)}"] = None
    return list(keys)


def _value(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def niah(rng: random.Random, *, keys: int = 1, values: int = 1, asked: int = 1) -> Task:
    """Numbers of keys; those of some are asked."""
    names = _keys(rng, keys)
    said = {name: [_value(rng) for _ in range(values)] for name in names}
    wanted = rng.sample(names, asked)
    facts = [f"A special number of {name} is {v}." for name in names for v in said[name]]
    rng.shuffle(facts)
    question = f"What are all the special numbers of {', '.join(wanted)} in the text? They are"
    return Task(facts, question, [v for name in wanted for v in said[name]], _plain)


def variable_tracking(rng: random.Random, chain: int = 4, others: int = 2) -> Task:
    """Chains of assignments; which variables have the first one's value?"""
    size = chain + 1
    names = [f"V{n:03d}" for n in rng.sample(range(1000), size * (1 + others))]
    chains = [names[i : i + size] for i in range(0, len(names), size)]
    values = [_value(rng) for _ in chains]
    lines = [
        [f"Let {part[0]} be {value}."]
        + [f"Let {b} be equal to {a}." for a, b in itertools.pairwise(part)]
        for part, value in zip(chains, values, strict=True)
    ]
    mixed: list[str] = []
    while any(lines):  # every chain keeps its order
        mixed.append(rng.choice([part for part in lines if part]).pop(0))
    question = f"Which variables have the value {values[0]} in the text? All of them are"
    return Task(mixed, question, chains[0], _plain)


def _vocabulary(rng: random.Random, count: int) -> list[str]:
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choice(syllables) for _ in range(3))] = None
    return list(words)


def common_words(rng: random.Random, common: int = 5, ratio: int = 10, rare: int = 3) -> Task:
    """A list of words of which a few stand `ratio` times and all others `rare` times."""
    some = _vocabulary(rng, 20_000)
    often, others, order = some[:common], some[common:], rng.random()

    def noise(count: int) -> list[str]:
        words = [word for word in often for _ in range(ratio)]
        words += [others[i // rare % len(others)] for i in range(max(0, count - len(words)))]
        random.Random(order).shuffle(words)
        return words

    return Task([], f"What are the {common} most common words in the list? They are", often, noise)


def frequent_words(rng: random.Random, top: int = 3, alpha: float = 2.0) -> Task:
    """Words as often as a zeta distribution has it; the commonest are asked."""
    some, order = _vocabulary(rng, 200), rng.random()
    weights = [(i + 1) ** -alpha for i in range(len(some))]
    total = sum(weights)

    def noise(count: int) -> list[str]:
        times = [max(top - i, 0) + round(count * w / total) for i, w in enumerate(weights)]
        words = [word for word, n in zip(some, times, strict=True) for _ in range(n)]
        random.Random(order).shuffle(words)
        return words

    question = f"What are the {top} most frequent words in the text? They are"
    return Task([], question, some[:top], noise)


TASKS: Mapping[str, Callable[[random.Random], Task]] = {
    "niah_single": niah,
    "niah_multikey": lambda rng: niah(rng, keys=8),
    "niah_multivalue": lambda rng: niah(rng, values=4),
    "niah_multiquery": lambda rng: niah(rng, keys=4, asked=4),
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
}


def items(options: Mapping[str, Any], tokenizer: Any) -> list[Item]:
    """`count` items of each of `tasks` at each of `lengths` in tokens, fixed by `seed`.

    A prompt is the longest that fits its length. Errors: UserError for an unknown task, or a length
    that cannot hold what is hidden in it.
    """
    if unknown := [task for task in options.get("tasks", ()) if task not in TASKS]:
        raise UserError(f"ruler has no task {unknown[0]!r}; it has {', '.join(TASKS)}")
    found = []
    for task, length, number in itertools.product(
        options.get("tasks", TASKS),
        options.get("lengths", (1024,)),
        range(options.get("count", 10)),
    ):
        rng = random.Random(f"{options.get('seed', 0)} {task} {length} {number}")
        made = TASKS[task](rng)
        fields = {"question": fitted(made, length, tokenizer, rng)}
        place = f"{task}/{length}/{number}"
        found.append(Item(place, "ruler.py", f"{task} {length}", fields, tuple(made.answers)))
    return found


def fitted(task: Task, length: int, tokenizer: Any, rng: random.Random) -> str:
    """The longest prompt of at most `length` tokens, bos included."""
    places = sorted(rng.random() for _ in task.facts)

    def text(count: int) -> str:
        parts = task.noise(count)
        size = len(parts)
        for shift, (place, fact) in enumerate(zip(places, task.facts, strict=True)):
            parts.insert(round(place * size) + shift, fact)
        return f"{' '.join(parts)}\n\n{task.question}"

    def fits(count: int) -> bool:
        return 1 + len(tokenizer.encode(text(count))) <= length

    if not fits(0):
        raise UserError(f"ruler: {length} tokens cannot hold what is hidden in them; raise lengths")
    low, high = 0, 1
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return text(low)
