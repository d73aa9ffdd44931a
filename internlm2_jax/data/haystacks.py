"""Texts that teach looking back: facts scattered in filler, then a question about each fact.

A model of two layers learns this in minutes on a CPU, so a needle test of it means something. Words
come from a closed list, fillers say nothing about facts, and which word goes with which name is
drawn anew for every text: an answer can only be found in the text itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from internlm2_jax.data.tasks import NAMES, WORDS

FACT = "The pair is {subject} {answer}."
QUESTION = "Who is with {subject}?"
OPENING = "The pair is {subject}"
PARTNERS = WORDS[:48]
_FILLER = WORDS[48:]
_VERBS = ("meets", "follows", "leaves", "likes", "passes", "sees")
TOKENS_OF_FACT, TOKENS_OF_QUESTION, TOKENS_OF_FILLER = 6, 11, 6


def filler(rng: random.Random) -> str:
    """A sentence in which no fact is."""
    one, other = rng.sample(_FILLER, 2)
    return f"The {one} {rng.choice(_VERBS)} the {other}."


def filler_text(num_sentences: int, seed: int | str) -> str:
    """A document of filler alone: what a needle is put into."""
    rng = random.Random(f"filler {seed}")
    return "\n".join(filler(rng) for _ in range(num_sentences))


def recall_texts(count: int, num_tokens: int, seed: int) -> Iterator[str]:
    """`count` texts of about `num_tokens` tokens: fillers and facts, one a line, then questions.

    Tokens are counted as one a word and one a line end, which is what a tokenizer trained on these
    texts makes of them. Each text asks for all of its facts, in another order.
    """
    rng = random.Random(f"recall {num_tokens} {seed}")
    for _ in range(count):
        each = TOKENS_OF_FACT + TOKENS_OF_QUESTION
        most = max(1, min(len(NAMES), num_tokens // each))
        names = rng.sample(NAMES, rng.randint(1, most))
        facts = [(name, rng.choice(PARTNERS)) for name in names]
        taken = len(facts) * each
        lines = [FACT.format(subject=name, answer=partner) for name, partner in facts]
        lines += [filler(rng) for _ in range(max(0, num_tokens - taken) // TOKENS_OF_FILLER)]
        rng.shuffle(lines)
        rng.shuffle(facts)
        for name, partner in facts:
            lines += [QUESTION.format(subject=name), FACT.format(subject=name, answer=partner)]
        yield "\n".join(lines)
