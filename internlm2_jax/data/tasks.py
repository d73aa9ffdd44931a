"""Generated tasks whose answers a program can check: what a tiny model is trained and graded on.

Each family draws its *content* (operands, words, facts), which the split hashes, and then a wording
and an answer. The split looks at content alone: a held-out sum is held out in every wording and in
both orders, so an evaluation task was never seen in any form. A fixed share of each family's
content is held out, however small its space is. Answers are bare ("12", "lamp"), so checking is
equality after stripping white space.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from internlm2_jax.errors import UserError

Split = Literal["train", "held_out"]

HELD_OUT_PERCENT = 10

_WORDS = """
    apple lamp river stone cloud bread chair green house light money night ocean paper queen round
    sugar table uncle voice water young zebra beach candle dance earth field garden horse island
    jacket kitchen letter market number orange pencil quiet road silver train umbrella valley
    window yellow bridge castle dinner engine forest glass hammer iron jungle king lemon mirror
    needle office plate rabbit salt tiger violin winter bird cat dog fish goat key leaf map nest
    owl pan red sun tree box cup door egg fan gate hat ice jar kite log moon nail oil pin ring sand
    tent van wall yard blue cold dark east fast gold high long north open soft south tall warm west
"""
_NAMES = """
    amber basil cedar delta ember falcon grove hazel indigo jade karma lotus maple nova onyx pearl
    quartz raven sable topaz umber velvet willow xenon yarrow zinc
"""
WORDS = tuple(_WORDS.split())
NAMES = tuple(_NAMES.split())
_SHORT_WORDS = tuple(word for word in WORDS + NAMES if len(word) <= 5)


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt with its one right answer. `key` names the content, free of wording and order."""

    prompt: str
    answer: str
    family: str
    key: str

    def row(self) -> dict[str, str]:
        """A plain dict; `Task(**row)` is its inverse."""
        return dataclasses.asdict(self)


def check(task: Task, response: str) -> bool:
    """Whether `response` is exactly the answer, white space at the ends aside."""
    return response.strip() == task.answer


def held_out(key: str) -> bool:
    """The fixed, seedless split: about HELD_OUT_PERCENT of all keys are evaluation only."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest) % 100 < HELD_OUT_PERCENT


# ------------------------------------------------------------------------------------- families
# Each draws one task: (prompt, answer, content). `pick` chooses a wording.


def _pick(rng: random.Random, *wordings: str) -> str:
    return rng.choice(wordings)


def _draw_words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def _copy(rng: random.Random) -> tuple[str, str, str]:
    phrase = " ".join(_draw_words(rng, 2, 4))
    wording = _pick(rng, "Repeat this:\n{}", "Copy these words:\n{}", "Say exactly:\n{}")
    return wording.format(phrase), phrase, phrase


def _first_word(rng: random.Random) -> tuple[str, str, str]:
    words = _draw_words(rng, 3, 6)
    wording = _pick(
        rng,
        "What is the first word of this list?\n{}",
        "Which word comes first?\n{}",
        "Give the first of these words:\n{}",
    )
    return wording.format("\n".join(words)), words[0], " ".join(words)


def _last_word(rng: random.Random) -> tuple[str, str, str]:
    words = _draw_words(rng, 3, 6)
    wording = _pick(
        rng,
        "What is the last word of this list?\n{}",
        "Which word comes last?\n{}",
        "Give the last of these words:\n{}",
    )
    return wording.format("\n".join(words)), words[-1], " ".join(words)


def _addition(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    wording = _pick(rng, "What is {} + {}?", "{} + {} =", "Add {} and {}.")
    return wording.format(a, b), str(a + b), f"{min(a, b)} {max(a, b)}"


def _subtraction(rng: random.Random) -> tuple[str, str, str]:
    b, difference = rng.randint(0, 20), rng.randint(0, 20)
    wording = _pick(rng, "What is {0} - {1}?", "{0} - {1} =", "Take {1} away from {0}.")
    return wording.format(b + difference, b), str(difference), f"{b + difference} {b}"


def _comparison(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.sample(range(100), 2)
    word = _pick(rng, "larger", "smaller")
    wording = _pick(rng, "Which is {}, {} or {}?", "Which number is {}: {} or {}?")
    answer = max(a, b) if word == "larger" else min(a, b)
    return wording.format(word, a, b), str(answer), f"{min(a, b)} {max(a, b)}"


def _parity(rng: random.Random) -> tuple[str, str, str]:
    n = rng.randint(0, 999)
    wording = _pick(rng, "Is {} even or odd?", "Even or odd: {}?")
    return wording.format(n), "odd" if n % 2 else "even", str(n)


def _retrieval(rng: random.Random) -> tuple[str, str, str]:
    names = rng.sample(NAMES, rng.randint(2, 4))
    codes = rng.sample(range(100, 1000), len(names))
    thing = _pick(rng, "code", "number", "room")
    facts = " ".join(
        f"The {thing} of {name} is {code}." for name, code in zip(names, codes, strict=True)
    )
    asked = rng.randrange(len(names))
    wording = _pick(rng, "{0} What is the {1} of {2}?", "{0} Give the {1} of {2}.")
    return wording.format(facts, thing, names[asked]), str(codes[asked]), facts


def _literal(rng: random.Random) -> tuple[str, list[str]]:
    """A Python list or string and the str() of its elements."""
    if rng.random() < 0.5:
        word = rng.choice(WORDS)
        return f'"{word}"', list(word)
    numbers = [rng.randint(0, 9) for _ in range(rng.randint(2, 6))]
    return str(numbers), [str(n) for n in numbers]


def _python_len(rng: random.Random) -> tuple[str, str, str]:
    literal, elements = _literal(rng)
    wording = _pick(rng, "What does len({}) return in Python?", "Python: len({}) ==")
    return wording.format(literal), str(len(elements)), literal


def _python_index(rng: random.Random) -> tuple[str, str, str]:
    literal, elements = _literal(rng)
    index = rng.choice([0, 1, -1])
    wording = _pick(rng, "What does print({}[{}]) show in Python?", "Python: print({}[{}])")
    return wording.format(literal, index), elements[index], f"{literal} {index}"


def _upper(rng: random.Random) -> tuple[str, str, str]:
    word = rng.choice(_SHORT_WORDS)
    wording = _pick(rng, "Write {} in upper case.", 'Python: print("{}".upper())')
    return wording.format(word), word.upper(), word


def _lower(rng: random.Random) -> tuple[str, str, str]:
    word = rng.choice(_SHORT_WORDS)
    wording = _pick(rng, "Write {} in lower case.", 'Python: print("{}".lower())')
    return wording.format(word.upper()), word, word


FAMILIES: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {
    "copy": _copy,
    "first_word": _first_word,
    "last_word": _last_word,
    "addition": _addition,
    "subtraction": _subtraction,
    "comparison": _comparison,
    "parity": _parity,
    "retrieval": _retrieval,
    "python_len": _python_len,
    "python_index": _python_index,
    "upper": _upper,
    "lower": _lower,
}
# Families whose answer is a matter of numbers: the domain "maths" of the reward model.
MATHS = ("addition", "subtraction", "comparison", "parity", "python_len")

_ATTEMPTS = 200


def stream(seed: int, split: Split, families: Sequence[str] | None = None) -> Iterator[Task]:
    """Distinct tasks of one split, the families in turn; ends when no family has a new one left."""
    names = list(FAMILIES) if families is None else list(families)
    for name in names:
        if name not in FAMILIES:
            raise UserError(f"unknown task family {name!r}; choose from {', '.join(FAMILIES)}")
    rng = random.Random(f"tasks {seed} {split}")
    seen: set[str] = set()
    while names:
        for name in tuple(names):
            task = _new_task(name, rng, split, seen)
            if task is None:
                names.remove(name)
            else:
                seen.add(task.prompt)
                yield task


def _new_task(name: str, rng: random.Random, split: Split, seen: set[str]) -> Task | None:
    # Upper and lower of one word share their content: knowing one gives the other away.
    space = "case" if name in ("upper", "lower") else name
    for _ in range(_ATTEMPTS):
        prompt, answer, content = FAMILIES[name](rng)
        key = f"{space}: {content}"
        if prompt not in seen and held_out(key) == (split == "held_out"):
            return Task(prompt, answer, name, key)
    return None


def generate(
    count: int, seed: int, split: Split, families: Sequence[str] | None = None
) -> list[Task]:
    """`count` distinct tasks, as evenly over the families as their spaces allow.

    Raises UserError when the families have fewer distinct tasks than that.
    """
    tasks: list[Task] = []
    for task in stream(seed, split, families):
        if len(tasks) == count:
            break
        tasks.append(task)
    if len(tasks) < count:
        raise UserError(
            f"only {len(tasks)} distinct {split} tasks exist in {families or 'all families'}, "
            f"{count} were asked for; ask for fewer or add families"
        )
    return tasks


def recall_sessions(count: int, seed: int, max_facts: int = 16) -> list[str]:
    """`count` texts of facts followed by a question and its answer for each, in another order.

    Plain text for pre-training: every answer can only be found in the text itself, so that they
    teach looking back. The codes are random; no evaluation task can be learnt by heart from them.
    """
    rng = random.Random(f"recall {seed}")
    texts = []
    for _ in range(count):
        thing = rng.choice(("code", "number", "room"))
        names = rng.sample(NAMES + WORDS, rng.randint(2, max_facts))
        facts = [(name, rng.randint(100, 999)) for name in names]
        lines = [f"The {thing} of {name} is {code}." for name, code in facts]
        rng.shuffle(facts)
        ask = rng.choice(("What is the {} of {}? {}", "Give the {} of {}. {}"))
        lines += [ask.format(thing, name, code) for name, code in facts]
        texts.append("\n".join(lines))
    return texts


# ---------------------------------------------------------------------------------- distractors


def wrong_answer(task: Task, rng: random.Random) -> str:
    """A wrong answer that a careless reader would give; never the right one."""
    candidates = [text for text in _distractors(task, rng) if text and not check(task, text)]
    return rng.choice(candidates)


def _distractors(task: Task, rng: random.Random) -> list[str]:
    answer, prompt = task.answer, task.prompt
    words = prompt.replace("?", " ").replace(".", " ").replace(",", " ").split()
    if task.family == "copy":
        parts = answer.split()
        swapped = [*parts[1:], parts[0]]
        return [" ".join(parts[:-1]), " ".join(parts[1:]), " ".join(swapped)]
    if task.family in ("first_word", "last_word"):
        return [word for word in words if word in WORDS]
    if task.family == "parity":
        return ["even", "odd"]
    if task.family in ("comparison", "retrieval"):
        return [word for word in words if word.isdigit()]
    if task.family in ("upper", "lower"):
        other = answer.lower() if task.family == "upper" else answer.upper()
        return [other, other[:-1] + answer[-1], answer[:-1] + other[-1]]
    if task.family == "python_index" and answer.isdigit():
        return list("0123456789")
    if answer.isdigit():
        near = [int(answer) + step for step in (-10, -3, -2, -1, 1, 2, 3, 10)]
        return [str(n) for n in near if n >= 0]
    return list("abcdehilmnorst")  # python_index of a string: another letter
