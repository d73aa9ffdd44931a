"""How an item is asked: templates, examples before it, and their order."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from internlm2_jax.errors import UserError
from internlm2_jax.evals.formats import LETTERS
from internlm2_jax.evals.items import Item
from internlm2_jax.evals.suites import Suite

Messages = list[dict[str, Any]]


def messages(suite: Suite, item: Item, examples: Sequence[Item] = ()) -> Messages:
    """Turns that end with the question; examples are earlier turns."""
    if item.messages:
        return [dict(message) for message in item.messages]
    turns: Messages = []
    for example in examples:
        turns.append({"role": "user", "content": question(suite, example)})
        turns.append({"role": "assistant", "content": solved(suite, example)})
    turns.append({"role": "user", "content": question(suite, item)})
    header = fill(suite, suite.header, item)
    turns[0]["content"] = header + turns[0]["content"]
    return turns


def plain(suite: Suite, turns: Messages) -> str:
    """The same turns as one text for a model that goes on with texts."""
    parts = []
    for turn in turns[:-1]:
        after = suite.separator if turn["role"] == "assistant" else suite.glue
        parts.append(turn["content"] + after)
    return "".join([*parts, turns[-1]["content"]])


def question(suite: Suite, item: Item) -> str:
    return fill(suite, suite.prompt, item)


def solved(suite: Suite, item: Item) -> str:
    """An example's answer."""
    return fill(suite, suite.answer, item)


def fill(suite: Suite, template: str, item: Item) -> str:
    """A template with the item's fields, its group, its options and its first answer."""
    option = suite.option
    texts = {
        **item.fields,
        "group": item.group.replace("_", " "),
        "options": "\n".join(
            option.format(letter=letter, text=text)
            for letter, text in zip(LETTERS, item.choices, strict=False)
        ),
        "answer": item.answers[0] if item.answers else "",
        "right": item.choices[item.right[0]] if item.right else "",
        **{f"choice{i}": text for i, text in enumerate(item.choices)},
    }
    try:
        return template.format_map(texts)
    except (KeyError, IndexError) as error:
        name = error.args[0]
        raise UserError(
            f"suite {suite.name}: the template names {name!r}; items of format {suite.format} have "
            f"{', '.join(sorted(texts))}"
        ) from error


def examples_for(
    suite: Suite, item: Item, pool: Mapping[str, Sequence[Item]], seed: int | None
) -> list[Item]:
    """The item's examples, never itself: the first of its group's in the order of the file, or
    with a seed some of them in an order that the seed and the group fix.

    Errors: UserError when there are too few.
    """
    if not suite.shots:
        return []
    found = [e for e in pool.get(item.group, pool.get("", ())) if e.id != item.id]
    if len(found) < suite.shots:
        raise UserError(
            f"suite {suite.name}: {suite.shots} examples are asked for, and group {item.group!r} "
            f"has {len(found)}; lower --shots"
        )
    if seed is None:
        return found[: suite.shots]
    return random.Random(f"{seed} {suite.name} {item.group}").sample(found, suite.shots)
