"""RULER's thirteen tasks, made to a length: only the whole context gives their answers.

Source: RULER (arXiv 2404.06654), section 3 and its appendix on task configurations:

    niah_single_1          one needle in noise; a key and a number
    niah_single_2, _3      the same in essays; _3: the value is a UUID
    niah_multikey_1        three needles with other keys beside it, in essays
    niah_multikey_2, _3    the haystack is needles; _3: keys and values are UUIDs
    niah_multivalue        four values of one key, in essays
    niah_multiquery        four keys are asked, in essays
    variable_tracking      a chain of four assignments in noise
    common_words           ten words 30 times each among others 3 times each (below 4,096 tokens
                           five, 10 times: the paper's do not fit)
    frequent_words         words as often as a zeta distribution has it
    qa_1, qa_2             SQuAD's and HotpotQA's questions, among the documents of others

Essays and questions are files: essays/*.txt, squad/*.json and hotpotqa/*.json of a folder. The
words of all other texts are this project's own. With hay "noise" there are no essays: their tasks
hide needles in noise.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from internlm2_jax.errors import UserError
from internlm2_jax.evals import formats, rows
from internlm2_jax.evals.items import Item, load

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
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def _spaced(parts: Sequence[str]) -> str:
    return " ".join(parts)


class Task(NamedTuple):
    """Facts to hide in their order, the question, its answers, and what to hide them in.

    noise: as many sentences, words or documents; the first n of n + 1 may be others than of n.
    most: how many there are. show: all parts as one text. any: one of the answers is enough.
    """

    facts: list[str]
    question: str
    answers: list[str]
    noise: Callable[[int], list[str]]
    most: float = float("inf")
    show: Callable[[Sequence[str]], str] = _spaced
    any: bool = False


class Sources:
    """What is read rather than made. Errors: UserError for files that are not there or are bad."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @functools.cached_property
    def sentences(self) -> list[str]:
        """Of all essays, one after another."""
        texts = [rows.text_of(path) for path in self._found("essays/*.txt", "essays")]
        found = [" ".join(s.split()) for text in texts for s in _SENTENCE_END.split(text)]
        if not any(found):
            raise UserError(f"ruler: {self._folder}/essays/*.txt have no text")
        return [s for s in found if s]

    @functools.cached_property
    def squad(self) -> list[Item]:
        return self._items("squad/*.json", "SQuAD's questions", formats.squad, "data")

    @functools.cached_property
    def hotpotqa(self) -> list[Item]:
        return self._items("hotpotqa/*.json", "HotpotQA's questions", formats.hotpotqa, "")

    def _items(self, pattern: str, what: str, reader: Any, records: str) -> list[Item]:
        self._found(pattern, what)
        assert self._folder is not None
        fields = {"id": "_id"} if reader is formats.hotpotqa else {}
        return load(self._folder, pattern, reader, records=records, fields=fields)

    def _found(self, pattern: str, what: str) -> list[Path]:
        if self._folder is None:
            raise UserError(
                f"ruler reads {what}: give a folder with {pattern} by --data, or take the suite "
                "ruler_made, which needs no files"
            )
        if not (paths := sorted(self._folder.glob(pattern))):
            raise UserError(f"ruler reads {what} and there is no {self._folder / pattern}")
        return paths


# ------------------------------------------------------------------------------ needles


def _plain(count: int) -> list[str]:
    return [NOISE[i % len(NOISE)] for i in range(count)]


def _essays(rng: random.Random, sources: Sources) -> Callable[[int], list[str]]:
    """Sentences from a place on, and from the beginning again when they run out."""
    sentences = sources.sentences
    start = rng.randrange(len(sentences))
    return lambda count: [sentences[(start + i) % len(sentences)] for i in range(count)]


def _word(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}-{rng.randrange(10_000)}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _distinct(make: Callable[[random.Random], str], rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)


def _needle(key: str, value: str) -> str:
    return f"A special value of {key} is {value}."


def niah(
    rng: random.Random,
    noise: Callable[[int], list[str]] | None,
    *,
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
    key: Callable[[random.Random], str] = _word,
    value: Callable[[random.Random], str] = _number,
) -> Task:
    """Values of keys; those of some are asked. Without `noise` the haystack is other needles."""
    names = _distinct(key, rng, keys)
    said = {name: _distinct(value, rng, values) for name in names}
    wanted = rng.sample(names, asked)
    facts = [_needle(name, v) for name in names for v in said[name]]
    rng.shuffle(facts)
    if noise is None:
        order = rng.random()

        def noise(count: int) -> list[str]:
            mine = random.Random(order)
            others = (name for name in _distinct(key, mine, count + keys) if name not in said)
            return [_needle(name, value(mine)) for name in itertools.islice(others, count)]

    question = f"What are all the special values of {', '.join(wanted)} in the text? They are"
    return Task(facts, question, [v for name in wanted for v in said[name]], noise)


def variable_tracking(rng: random.Random, chain: int = 4, others: int = 0) -> Task:
    """Chains of assignments; which variables have the first one's value?"""
    size = chain + 1
    names = [f"V{n:03d}" for n in rng.sample(range(1000), size * (1 + others))]
    chains = [names[i : i + size] for i in range(0, len(names), size)]
    values = [_number(rng) for _ in chains]
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


# ------------------------------------------------------------------------------ words


def _vocabulary(rng: random.Random, count: int) -> list[str]:
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return _distinct(lambda r: "".join(r.choice(syllables) for _ in range(3)), rng, count)


def common_words(rng: random.Random, common: int = 10, ratio: int = 30, rare: int = 3) -> Task:
    """A list of words of which a few stand `ratio` times and all others `rare` times."""
    some = _vocabulary(rng, 20_000)
    often, others, order = some[:common], some[common:], rng.random()

    def noise(count: int) -> list[str]:
        words = [word for word in often for _ in range(ratio)]
        words += [others[i // rare % len(others)] for i in range(max(0, count - len(words)))]
        random.Random(order).shuffle(words)
        return words

    question = f"What are the {common} most common words in the list? They are"
    return Task([], question, often, noise, most=common * ratio + rare * len(others))


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


# ------------------------------------------------------------------------------ questions


def _documents(parts: Sequence[str]) -> str:
    return "\n\n".join(f"Document {n}:\n{text}" for n, text in enumerate(parts, 1))


def question_answering(rng: random.Random, questions: Sequence[Item], number: int) -> Task:
    """One of the questions; its own documents are hidden among those of the others.

    number: which, counted in an order that is the same for all.
    """
    order = list(range(len(questions)))
    random.Random("ruler qa").shuffle(order)
    item = questions[order[number % len(order)]]
    own = list(item.check["documents"])
    every = dict.fromkeys(text for q in questions for text in q.check["documents"])
    others = [text for text in every if text not in own]
    rng.shuffle(others)
    rng.shuffle(own)
    question = (
        "Answer the question from the documents, with the answer and nothing else.\n"
        f"Question: {item.fields['question']}\nAnswer:"
    )
    return Task(
        own, question, list(item.answers), lambda count: others[:count],
        most=len(others), show=_documents, any=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------ items


class _Asked(NamedTuple):
    """Which item of a task is made, and from what."""

    rng: random.Random
    length: int
    number: int
    sources: Sources
    hay: str


def _in_essays(asked: _Asked, /, **settings: Any) -> Task:
    noise = _plain if asked.hay == "noise" else _essays(asked.rng, asked.sources)
    return niah(asked.rng, noise, **settings)


def _common(asked: _Asked) -> Task:
    return common_words(asked.rng) if asked.length >= 4096 else common_words(asked.rng, 5, 10)


TASKS: Mapping[str, Callable[[_Asked], Task]] = {
    "niah_single_1": lambda a: niah(a.rng, _plain),
    "niah_single_2": _in_essays,
    "niah_single_3": lambda a: _in_essays(a, value=_uuid),
    "niah_multikey_1": lambda a: _in_essays(a, keys=4),
    "niah_multikey_2": lambda a: niah(a.rng, None),
    "niah_multikey_3": lambda a: niah(a.rng, None, key=_uuid, value=_uuid),
    "niah_multivalue": lambda a: _in_essays(a, values=4),
    "niah_multiquery": lambda a: _in_essays(a, keys=4, asked=4),
    "variable_tracking": lambda a: variable_tracking(a.rng),
    "common_words": _common,
    "frequent_words": lambda a: frequent_words(a.rng),
    "qa_1": lambda a: question_answering(a.rng, a.sources.squad, a.number),
    "qa_2": lambda a: question_answering(a.rng, a.sources.hotpotqa, a.number),
}


def items(options: Mapping[str, Any], tokenizer: Any, folder: Path | None = None) -> list[Item]:
    """`count` items of each of `tasks` at each of `lengths` in tokens, fixed by `seed`.

    A prompt is the longest that fits its length; all documents of qa_1 and qa_2 may be shorter.

    folder: where essays and questions are, for the tasks that need them.
    Errors: UserError for an unknown task, a length that cannot hold what is hidden in it, or files
    that are not there or are bad.
    """
    if unknown := [task for task in options.get("tasks", ()) if task not in TASKS]:
        raise UserError(f"ruler has no task {unknown[0]!r}; it has {', '.join(TASKS)}")
    if (hay := options.get("hay", "essays")) not in ("essays", "noise"):
        raise UserError(f"ruler: hay is {hay!r}; it is essays or noise")
    found, sources = [], Sources(folder)
    for task, length, number in itertools.product(
        options.get("tasks", TASKS),
        options.get("lengths", (4096,)),
        range(options.get("count", 10)),
    ):
        rng = random.Random(f"{options.get('seed', 0)} {task} {length} {number}")
        made = TASKS[task](_Asked(rng, length, number, sources, hay))
        fields = {"question": fitted(made, length, tokenizer, rng)}
        place = f"{task}/{length}/{number}"
        found.append(
            Item(
                place, "ruler.py", f"{task} {length}", fields, tuple(made.answers),
                check={"any": made.any},
            )
        )  # fmt: skip
    return found


def fitted(task: Task, length: int, tokenizer: Any, rng: random.Random) -> str:
    """The longest prompt of at most `length` tokens, bos included."""
    places = sorted(rng.random() for _ in task.facts)

    def text(count: int) -> str:
        parts = task.noise(count)
        size = len(parts)
        for shift, (place, fact) in enumerate(zip(places, task.facts, strict=True)):
            parts.insert(round(place * size) + shift, fact)
        return f"{task.show(parts)}\n\n{task.question}"

    def fits(count: int) -> bool:
        return count <= task.most and 1 + len(tokenizer.encode(text(count))) <= length

    if not fits(0):
        raise UserError(f"ruler: {length} tokens cannot hold what is hidden in them; raise lengths")
    low, high = 0, 1
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return text(low)
