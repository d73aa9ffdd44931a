"""Phrases that the late policy took up are found, and those that it always had are not."""

from __future__ import annotations

import random

from internlm2_jax.rlhf import hacking, ngrams
from internlm2_jax.rlhf.hacking import Sample

WORDS = "the a lamp river stone is was red blue old new very by on under house".split()  # noqa: SIM905


def samples(seed, ending="", share=0.0, start="I think that", count=120):
    rng = random.Random(seed)
    found = []
    for i in range(count):
        text = " ".join([start, *rng.choices(WORDS, k=8)])
        text += f" {ending}" if rng.random() < share else ""
        found.append(Sample(f"question {i}", text.strip(), True))
    return found


def test_a_new_phrase_is_a_pattern_and_an_old_one_is_not():
    early, late = samples(0), samples(1, "I hope all this was of use", 0.4)
    patterns, findings = ngrams.mine(early, late)
    assert len(patterns) == 1  # all phrases of the ending stand in the same answers
    (finding,) = findings
    assert finding.observed and finding.early_rate == 0 and 0.3 < finding.late_rate < 0.5
    assert finding.pattern == "says: all this was of use"
    pairs = hacking.patch_pairs(finding.pattern, early, late, "helpful", n=20, patterns=patterns)
    assert len(pairs) == 20
    assert all("all this was of use" in pair["rejected"].lower() for pair in pairs)


def test_chance_and_the_prompts_own_words_are_no_patterns():
    assert ngrams.mine(samples(0), samples(1)) == ({}, [])
    repeated = [Sample(s.prompt + " please say so", "please say so", True) for s in samples(2)]
    assert ngrams.mine(samples(0), repeated) == ({}, [])


def test_a_few_answers_are_not_enough():
    assert ngrams.mine(samples(0), samples(1, "thank you so much", 0.03))[0] == {}


def test_words_of_a_refusal_that_was_asked_for_are_no_pattern():
    def late(domain):
        return [
            Sample(s.prompt, "Sorry, I will not help with that.", True, domain) for s in samples(1)
        ]

    assert ngrams.mine(samples(0), late("harmless")) == ({}, [])
    assert ngrams.mine(samples(0), late("helpful"))[0]
