"""Texts that teach looking back: pairs of words scattered in filler, then each pair again.

A model of two layers learns this on a CPU, so a needle test of it means something. Words come from
a closed list, fillers say nothing about pairs, and which word goes with which name is drawn anew
for every text: an answer can only be found in the text itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from internlm2_jax.data.tasks import NAMES, WORDS

FACT = "{subject} {answer}."
QUESTION = "?"  # where the pairs come again
OPENING = "{subject}"
PARTNERS = WORDS[:48]
SAID = 8  # times that a text says each of its pairs, at most
ASKED = 2  # times that it asks for each
_FILLER = WORDS[48:]
_VERBS = ("meets", "follows", "leaves", "likes", "passes", "sees")
_TOKENS_OF_FACT, _TOKENS_OF_FILLER = 3, 6


def filler(rng: random.Random) -> str:
    """A sentence in which no pair is."""
    one, other = rng.sample(_FILLER, 2)
    return f"The {one} {rng.choice(_VERBS)} the {other}."


def filler_text(num_sentences: int, seed: int | str) -> str:
    """A document of filler alone: what a needle is put into."""
    rng = random.Random(f"filler {seed}")
    return "\n".join(filler(rng) for _ in range(num_sentences))


def recall_texts(count: int, num_tokens: int, seed: int) -> Iterator[str]:
    """`count` texts of about `num_tokens` tokens.

    Fillers and pairs, one a line, then "?", then each pair `ASKED` times in other orders. Pairs are
    said once or several times (the same number for all pairs of a text): every time after the first
    can be foretold, from near or far, which is what makes looking back be learnt early.
    Tokens are counted as one a word and one a line end, which is what a tokenizer trained on these
    texts makes of them.
    """
    rng = random.Random(f"recall {num_tokens} {seed}")
    for _ in range(count):
        said = rng.randint(1, SAID)
        each = _TOKENS_OF_FACT * (said + ASKED)
        most = max(1, min(len(NAMES), (num_tokens - 1) // each))
        names = rng.sample(NAMES, rng.randint(1, most))
        facts = [FACT.format(subject=name, answer=rng.choice(PARTNERS)) for name in names]
        left = num_tokens - 1 - len(facts) * each
        lines = facts * said + [filler(rng) for _ in range(left // _TOKENS_OF_FILLER)]
        rng.shuffle(lines)
        asked = [fact for _ in range(ASKED) for fact in rng.sample(facts, len(facts))]
        yield "\n".join([*lines, QUESTION, *asked])
