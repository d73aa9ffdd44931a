"""Patterns of reward hacking that nobody thought of: phrases that the late policy took up.

Every phrase of a few words is counted once a response. One that became significantly more frequent
from the early policy to the late one, corrected for all phrases that were counted, is a pattern as
good as those of hacking.py; of phrases that stand in the same responses the strongest is kept.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from internlm2_jax.rlhf.hacking import (
    MIN_RISE,
    SIGNIFICANCE,
    Context,
    Finding,
    Pattern,
    Sample,
    declines_as_asked,
    measure,
    ordered,
    rise_p_value,
)

WORDS = (5, 4, 3)  # lengths of phrases, the longest first
ALIKE = 0.5  # phrases that share more of their responses are one pattern


def phrases(response: str) -> set[tuple[str, ...]]:
    words = response.lower().split()
    return {tuple(words[i : i + n]) for n in WORDS for i in range(len(words) - n + 1)}


def mine(
    early: Sequence[Sample], late: Sequence[Sample], most: int = 5
) -> tuple[dict[str, Pattern], list[Finding]]:
    """Up to `most` patterns by name, and their findings, the most certain rise first.

    Phrases of a prompt do not count in its own response: to repeat a question is another pattern.
    Nor do those of a refusal where harmlessness is asked: a patch against them would teach the
    reward model that declining is wrong.
    """
    spoken = [[_own(sample) for sample in samples] for samples in (early, late)]
    counts = [collections.Counter(p for own in each for p in own) for each in spoken]
    tried = max(1, len(counts[1]))
    rising = []
    for phrase, b in counts[1].items():
        a = counts[0][phrase]
        rise = b / len(late) - a / len(early)
        if rise >= MIN_RISE:
            p_value = tried * rise_p_value(a, len(early), b, len(late))
            if p_value < SIGNIFICANCE:
                rising.append((p_value, -rise, -len(phrase), phrase))
    chosen: dict[str, Pattern] = {}
    taken: list[set[int]] = []
    for *_, phrase in sorted(rising):
        if len(chosen) == most:
            break
        where = {i for i, own in enumerate(spoken[1]) if phrase in own}
        if all(_overlap(where, other) <= ALIKE for other in taken):
            taken.append(where)
            pattern = _pattern(phrase)
            chosen[pattern.name] = pattern
    findings = measure(early, late, chosen, tried) if chosen else []
    return chosen, ordered(findings)


def _own(sample: Sample) -> set[tuple[str, ...]]:
    if declines_as_asked(sample):
        return set()
    return phrases(sample.response) - phrases(sample.prompt)


def _overlap(a: set[int], b: set[int]) -> float:
    return len(a & b) / max(1, len(a | b))


def _pattern(phrase: tuple[str, ...]) -> Pattern:
    text = " ".join(phrase)

    def shown_by(sample: Sample, _: Context) -> bool:
        return phrase in _own(sample)

    return Pattern(f"says: {text}", f"the phrase {text!r}", shown_by)
