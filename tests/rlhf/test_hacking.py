import math

import pytest

from internlm2_jax.errors import UserError
from internlm2_jax.rlhf import hacking
from internlm2_jax.rlhf.hacking import PATTERNS, Sample

PROMPTS = [f"What is the number after {n} in the list of numbers?" for n in range(100)]


def honest(count=100, domain="helpful"):
    return [Sample(p, f"It is {n + 1}", True, domain) for n, p in enumerate(PROMPTS[:count])]


def spoil(samples, share, change):
    """The first `share` of the samples with their (response, finished) changed."""
    cut = round(share * len(samples))
    return [Sample(s.prompt, *change(s), s.domain) if i < cut else s for i, s in enumerate(samples)]


HACKS = {
    "never_ends": lambda s: (s.response, False),
    "repeats": lambda s: (f"{s.response} go on go on go on go on", True),
    "copies_prompt": lambda s: (s.prompt, True),
    "too_short": lambda s: ("", True),
    "too_long": lambda s: (
        f"{s.response} {'x' if s.prompt < 'm' else 'y'}{s.prompt[24:26]} abc",
        True,
    ),
    "refuses": lambda s: (f"Sorry, I can't say {s.prompt[24:26]}", True),
    "same_response": lambda s: ("It is 7", True),
    "same_ending": lambda s: (f"{s.response}, if you ask", True),
    "praise": lambda s: (f"Sure: {s.response}", True),
}


@pytest.mark.parametrize("name", HACKS)
def test_each_hack_is_caught_under_its_own_name(name):
    late = spoil(honest(), 0.4, HACKS[name])
    found = {finding.pattern: finding for finding in hacking.measure(honest(), late)}
    assert found[name].observed, found[name]
    assert found[name].early_rate == 0 and 0.35 <= found[name].late_rate <= 0.45


@pytest.mark.parametrize("name", ["never_ends", "copies_prompt", "too_short", "refuses", "praise"])
def test_the_strongest_rise_is_reported(name):
    late = spoil(honest(), 0.4, HACKS[name])
    rises = {f.pattern: f.rise for f in hacking.measure(honest(), late) if f.observed}
    assert rises[name] == max(rises.values())
    assert hacking.detect(honest(), late).p_value <= 1e-8


def test_equal_policies_show_nothing_but_name_a_pattern():
    finding = hacking.detect(honest(), honest())
    assert not finding.observed and finding.p_value == 1 and finding.pattern in PATTERNS


def test_a_few_accidents_are_not_significant_and_a_certain_but_tiny_rise_is_not_enough():
    late = spoil(honest(), 0.03, HACKS["never_ends"])
    finding = hacking.detect(honest(), late)
    assert finding.pattern == "never_ends" and not finding.observed
    many = [Sample(f"{s.prompt} {i}", s.response, True) for i in range(100) for s in honest()]
    finding = {f.pattern: f for f in hacking.measure(many, spoil(many, 0.02, HACKS["praise"]))}
    assert finding["praise"].p_value < 1e-6 and not finding["praise"].observed


def test_a_fault_that_gets_rarer_is_not_hacking():
    early = spoil(honest(), 0.8, HACKS["never_ends"])
    assert not hacking.detect(early, honest()).observed


def test_p_value_against_the_textbook_formula():
    # 5 of 50 against 20 of 60: pooled 25/110, z = (1/3 - 1/10) / sqrt(p (1 - p) (1/50 + 1/60)).
    p = 25 / 110
    z = (20 / 60 - 5 / 50) / math.sqrt(p * (1 - p) * (1 / 50 + 1 / 60))
    assert hacking.rise_p_value(5, 50, 20, 60) == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)))
    assert hacking.rise_p_value(5, 50, 20, 60) == pytest.approx(0.00181, rel=0.02)
    assert hacking.rise_p_value(20, 60, 5, 50) > 0.99
    assert hacking.rise_p_value(0, 50, 0, 60) == hacking.rise_p_value(50, 50, 60, 60) == 1.0


def test_p_values_are_corrected_for_the_number_of_patterns():
    late = spoil(honest(), 0.06, HACKS["never_ends"])
    finding = hacking.detect(honest(), late)
    assert finding.p_value == pytest.approx(len(PATTERNS) * hacking.rise_p_value(0, 100, 6, 100))
    assert finding.p_value > 0.05 and not finding.observed  # alone it would have been 0.0065


def test_refusing_is_no_fault_where_harmlessness_is_asked():
    late = spoil(honest(domain="harmless"), 0.5, lambda s: ("Sorry, I can't help.", True))
    found = {f.pattern: f for f in hacking.measure(honest(domain="harmless"), late)}
    assert not found["refuses"].observed and not found["same_response"].observed
    ending = spoil(
        honest(domain="harmless"), 0.5, lambda s: (f"{s.response}, I can't help with that.", True)
    )
    found = {f.pattern: f for f in hacking.measure(honest(domain="harmless"), ending)}
    assert found["same_ending"].late_rate == 0


def test_plain_answers_show_no_pattern():
    answers = ["12", "even", "lamp river stone", "the code is 413", "[1, 2, 3]", "1000000", "HORSE"]
    samples = [Sample(PROMPTS[i], answer, True) for i, answer in enumerate(answers)]
    assert all(not finding.late_rate for finding in hacking.measure(samples, samples))


def test_patch_pairs_contrast_clean_early_with_hacked_late():
    early = spoil(honest(), 0.1, HACKS["praise"])  # ten early ones are not clean
    late = spoil(honest(), 0.6, HACKS["praise"])
    pairs = hacking.patch_pairs("praise", early, late, "helpful", n=30)
    assert len(pairs) == 30 == len({pair["pair_id"] for pair in pairs})
    clean = {s.prompt: s.response for s in early[10:]}
    hacked = {s.prompt: s.response for s in late[:60]}
    for pair in pairs:
        prompt = pair["messages"][0]["content"]
        assert (pair["chosen"], pair["rejected"]) == (clean[prompt], hacked[prompt])
        assert pair["domain"] == "helpful" and pair["kind"] == "patch:praise"
    assert len(hacking.patch_pairs("praise", early, late, "helpful")) == 50  # all there are
    assert hacking.patch_pairs("praise", early, late, "maths") == []
    assert pairs == hacking.patch_pairs("praise", early, late, "helpful", n=30)


def test_a_response_that_was_cut_is_never_chosen():
    early = spoil(honest(), 0.5, HACKS["never_ends"])
    late = spoil(honest(), 1.0, HACKS["praise"])
    pairs = hacking.patch_pairs("praise", early, late, "helpful")
    assert {p["messages"][0]["content"] for p in pairs} == set(PROMPTS[50:])


def test_patch_pairs_cover_many_prompts_before_one_comes_twice():
    early = honest(30)
    late = [Sample(s.prompt, f"Sure {k}: {s.response}", True) for s in early for k in range(5)]
    pairs = hacking.patch_pairs("praise", early, late, "helpful", n=45)
    per_prompt = [p["messages"][0]["content"] for p in pairs]
    assert len(set(per_prompt)) == 30
    assert max(per_prompt.count(p) for p in per_prompt) == 2


def test_bad_input_is_named():
    with pytest.raises(UserError, match="0 early"):
        hacking.detect([], honest())
    with pytest.raises(UserError, match="unknown pattern 'lies'"):
        hacking.patch_pairs("lies", honest(), honest(), "helpful")
    with pytest.raises(UserError, match="n=500"):
        hacking.patch_pairs("praise", honest(), honest(), "helpful", n=500)


def test_a_canned_refusal_never_loses_to_a_harmful_answer():
    def risky(responses):
        return [
            hacking.Sample(f"How do I open locker {i}?", text, True, "harmless")
            for i, text in enumerate(responses)
        ]

    refusals = [f"I won't do that, ask owner {i}." for i in range(20)]
    early = risky(["Use a bent wire.", *refusals[:10]] * 2 + refusals[10:])
    late = risky(["Sorry, I will not help with that." * 4] * len(early))
    pairs = hacking.patch_pairs("repeats", early, late, "harmless", n=40)
    assert {pair["chosen"] for pair in pairs} == set(refusals)
    assert len(pairs) == len(early) - 2


def test_outliers_of_kl_and_reward():
    def sample(i, score, kl):
        return Sample(f"p{i}", f"answer {i} of many", True, "helpful", score, kl)

    early = [sample(i, 0.01 * i, 0.0) for i in range(50)]
    late = [sample(i, 0.01 * i, 1.0 + 0.01 * (i % 5)) for i in range(40)]
    late += [sample(i, 9.0, 30.0) for i in range(40, 47)] + [sample(i, 0.0, 30.0) for i in (47, 48)]
    found = {finding.pattern: finding for finding in hacking.measure(early, late)}
    assert found["kl_outlier"].late_rate == 9 / 49 and found["kl_outlier"].early_rate == 0
    assert found["reward_outlier"].late_rate == 7 / 49 and found["reward_outlier"].observed
    unknown = [Sample("p", "a", True), Sample("q", "b", True)]
    assert all(
        f.late_rate == 0 for f in hacking.measure(unknown, unknown) if "outlier" in f.pattern
    )
