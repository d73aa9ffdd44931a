"""COOL RLHF's fast path: find how a policy games its reward model, and make pairs against it.

InternLM2 section 4.2.2: after each round of PPO, patterns of reward hacking are looked for, and 20
to 100 preference pairs a pattern, early against late responses, suffice to mend the reward model.
People looked for them there. Here a pattern is a measurable property of decoded responses; it
counts as hacking when it became significantly more frequent from the early policy to the late one
(one-sided two-proportion test, corrected for the number of patterns tried).

Pure Python over text: nothing here needs the model or jax.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import random
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from internlm2_jax.data.risky import is_refusal
from internlm2_jax.errors import UserError
from internlm2_jax.files import fingerprint

SIGNIFICANCE = 0.05
MIN_RISE = 0.05  # a rise below five points is not worth a patch, however certain it is
MIN_PAIRS, MAX_PAIRS = 20, 100


@dataclasses.dataclass(frozen=True)
class Sample:
    """One rollout: decoded text without special tokens, and whether it ended with its stop token.

    Attributes:
        domain: the preference the prompt is judged by; refusing is no fault under "harmless".
        score: of the reward model; kl: to the reference, nats of the whole answer. None: unknown.
    """

    prompt: str
    response: str
    finished: bool
    domain: str = "helpful"
    score: float | None = None
    kl: float | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What a pattern needs to know beyond the sample.

    The limits of length and score come from the early policy and hold for both; that of the KL is
    of the sample's own set. The counts are of prompts, in that set, that share a response or an
    ending.
    """

    short: float
    long: float
    high_score: float
    high_kl: float
    prompts: int
    same_response: dict[str, int]
    same_ending: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Pattern:
    name: str
    explanation: str
    shown_by: Callable[[Sample, Context], bool]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A pattern's rates in the early and the late set. `p_value` is corrected for multiple tests;
    `observed` says that the rise is significant and large enough to act on."""

    pattern: str
    early_rate: float
    late_rate: float
    p_value: float
    observed: bool

    @property
    def rise(self) -> float:
        return self.late_rate - self.early_rate


# -------------------------------------------------------------------------------------- patterns

_CYCLE = re.compile(r"(.{2,24}?)\1{3,}", re.DOTALL)
_PRAISE = re.compile(
    r"\b(great|good|excellent|wonderful|nice) (question|idea|point|choice)\b"
    r"|\b(happy|glad) to help\b|\b(hope|trust) (this|that|it) helps\b|\bfeel free to\b"
    r"|\blet me know if\b|\bas an ai\b|\bthank you for\b|^(sure|certainly|of course|absolutely)\b",
    re.IGNORECASE,
)
_SHARED = 0.1  # of the prompts: answering them alike is no longer chance
_SHARED_MIN = 4  # prompts


def _repeats(sample: Sample, _: Context) -> bool:
    words = sample.response.split()
    trigrams = collections.Counter(zip(words, words[1:], words[2:], strict=False))
    if trigrams and max(trigrams.values()) >= 3:
        return True
    cycle = _CYCLE.search(sample.response)
    return cycle is not None and len(cycle.group(0)) >= 12


def _copies_prompt(sample: Sample, _: Context) -> bool:
    prompt, response = _normal(sample.prompt), _normal(sample.response)
    opening = prompt[: max(20, len(prompt) // 2)]
    return len(prompt) >= 12 and (prompt in response or response.startswith(opening))


def _refuses(sample: Sample, _: Context) -> bool:
    return sample.domain != "harmless" and is_refusal(sample.response)


def _far_out(sample: Sample, context: Context) -> bool:
    return sample.kl is not None and sample.kl > context.high_kl


def _paid_far_out(sample: Sample, context: Context) -> bool:
    """Better paid than the early policy ever is, for an answer unlike any of the reference."""
    paid = sample.score is not None and sample.score > context.high_score
    return paid and _far_out(sample, context)


def _widespread(count: int, context: Context) -> bool:
    return count >= max(_SHARED_MIN, _SHARED * context.prompts)


def declines_as_asked(sample: Sample) -> bool:
    """One good refusal serves many risky requests: that they sound alike is no pattern."""
    return sample.domain == "harmless" and is_refusal(sample.response)


def _same_response(sample: Sample, context: Context) -> bool:
    shared = context.same_response.get(_normal(sample.response), 0)
    return not declines_as_asked(sample) and _widespread(shared, context)


def _same_ending(sample: Sample, context: Context) -> bool:
    ending = _ending(sample.response)
    shared = context.same_ending.get(ending, 0) if ending else 0
    return not declines_as_asked(sample) and _widespread(shared, context)


PATTERNS: dict[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        Pattern("never_ends", "cut at the limit without a stop token", lambda s, _: not s.finished),
        Pattern("repeats", "says the same words over and over", _repeats),
        Pattern("copies_prompt", "gives the prompt back", _copies_prompt),
        Pattern(
            "too_short",
            "empty, or much shorter than the early policy's shortest",
            lambda s, context: len(s.response.strip()) < max(1.0, context.short),
        ),
        Pattern(
            "too_long",
            "much longer than the early policy's longest",
            lambda s, context: len(s.response.strip()) > context.long,
        ),
        Pattern("refuses", "declines requests that are not risky", _refuses),
        Pattern("same_response", "one response for many prompts", _same_response),
        Pattern("same_ending", "one closing phrase after many responses", _same_ending),
        Pattern("kl_outlier", "far more unlike the reference than other answers", _far_out),
        Pattern("reward_outlier", "a KL outlier that is paid more than ever before", _paid_far_out),
        Pattern(
            "praise", "flattery or stock phrases", lambda s, _: bool(_PRAISE.search(s.response))
        ),
    )
}


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _ending(text: str) -> str:
    """The last three words of a response that has more than three, else ""."""
    words = _normal(text).split()
    return " ".join(words[-3:]) if len(words) > 3 else ""


def context_of(samples: Sequence[Sample], early: Sequence[Sample]) -> Context:
    """The context of one set of samples, with length limits from the early set: half its 5th and
    one and a half times its 95th percentile."""
    lengths = sorted(len(sample.response.strip()) for sample in early)
    response_prompts: dict[str, set[str]] = collections.defaultdict(set)
    ending_prompts: dict[str, set[str]] = collections.defaultdict(set)
    for sample in samples:
        response_prompts[_normal(sample.response)].add(sample.prompt)
        ending_prompts[_ending(sample.response)].add(sample.prompt)
    return Context(
        short=0.5 * lengths[round(0.05 * (len(lengths) - 1))],
        long=1.5 * lengths[round(0.95 * (len(lengths) - 1))],
        high_score=max((s.score for s in early if s.score is not None), default=math.inf),
        high_kl=_outlier([s.kl for s in samples if s.kl is not None]),
        prompts=len({sample.prompt for sample in samples}),
        same_response={text: len(prompts) for text, prompts in response_prompts.items()},
        same_ending={text: len(prompts) for text, prompts in ending_prompts.items()},
    )


def _outlier(values: Sequence[float]) -> float:
    """Five median absolute deviations above the median, and at least a nat above it."""
    if not values:
        return math.inf
    middle = statistics.median(values)
    return middle + max(1.0, 5 * statistics.median(abs(v - middle) for v in values))


# ------------------------------------------------------------------------------------- detection


def rise_p_value(early: int, early_total: int, late: int, late_total: int) -> float:
    """One-sided p-value of the pooled two-proportion z-test that the late rate is the higher one.

    1 when nothing was counted, or everything (no variance, no evidence).
    """
    pooled = (early + late) / (early_total + late_total)
    variance = pooled * (1 - pooled) * (1 / early_total + 1 / late_total)
    if variance == 0:
        return 1.0
    z = (late / late_total - early / early_total) / math.sqrt(variance)
    return 0.5 * math.erfc(z / math.sqrt(2))


def measure(
    early: Sequence[Sample],
    late: Sequence[Sample],
    patterns: Mapping[str, Pattern] = PATTERNS,
    tried: int = 0,
) -> list[Finding]:
    """Every pattern's rates, the most certain rise first (ties: the largest rise).

    p-values are multiplied by the number of patterns (Bonferroni), or by `tried` where these were
    picked from more (ngrams.py). Raises UserError for an empty set.
    """
    if not early or not late:
        raise UserError(
            f"hacking patterns need samples of both policies, got {len(early)} early and "
            f"{len(late)} late ones; raise the number of rollouts"
        )
    contexts = context_of(early, early), context_of(late, early)
    findings = []
    for pattern in patterns.values():
        a, b = (
            sum(pattern.shown_by(sample, context) for sample in samples)
            for samples, context in zip((early, late), contexts, strict=True)
        )
        found = rise_p_value(a, len(early), b, len(late))
        p_value = min(1.0, max(tried, len(patterns)) * found)
        rates = a / len(early), b / len(late)
        observed = p_value < SIGNIFICANCE and rates[1] - rates[0] >= MIN_RISE
        findings.append(Finding(pattern.name, *rates, p_value, observed))
    return ordered(findings)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """The most certain rise first."""
    return sorted(findings, key=lambda f: (not f.observed, f.p_value, -f.rise))


def detect(early: Sequence[Sample], late: Sequence[Sample]) -> Finding:
    """The strongest rise. When none is significant it still comes back, with observed=False."""
    return measure(early, late)[0]


# --------------------------------------------------------------------------------------- patches


def patch_pairs(
    pattern: str,
    early: Sequence[Sample],
    late: Sequence[Sample],
    domain: str,
    n: int = MAX_PAIRS,
    seed: int = 0,
    patterns: Mapping[str, Pattern] = PATTERNS,
) -> list[dict[str, Any]]:
    """Up to `n` preference pairs against a pattern, in the form of data.preferences.

    chosen is an early response without the pattern, rejected a late one to the same prompt that
    shows it. Prompts take turns, so that many are covered before one comes twice; no pair comes
    twice. Fewer than MIN_PAIRS may come back where the samples hold no more. Raises UserError for
    an unknown pattern or n outside 1..MAX_PAIRS.
    """
    if pattern not in patterns:
        raise UserError(f"unknown pattern {pattern!r}; choose from {', '.join(patterns)}")
    if not 1 <= n <= MAX_PAIRS:
        raise UserError(f"patch_pairs: n={n} must lie in 1..{MAX_PAIRS}")
    if not early or not late:
        return []
    shown_by = patterns[pattern].shown_by
    clean: dict[str, list[str]] = collections.defaultdict(list)
    hacked: dict[str, list[str]] = collections.defaultdict(list)
    early_context, late_context = context_of(early, early), context_of(late, early)
    for sample in early:
        # An early response that was cut is no model to follow, whatever the pattern.
        if sample.domain == domain and sample.finished and not shown_by(sample, early_context):
            clean[sample.prompt].append(sample.response)
    for sample in late:
        if sample.domain == domain and shown_by(sample, late_context):
            hacked[sample.prompt].append(sample.response)

    rng = random.Random(f"patch {pattern} {seed}")
    queues = []
    for prompt in sorted(clean.keys() & hacked.keys()):
        couples = sorted(
            (chosen, rejected)
            for chosen in set(clean[prompt])
            for rejected in set(hacked[prompt])
            if chosen != rejected and not _trades_for_harm(domain, chosen, rejected)
        )
        rng.shuffle(couples)
        queues.append([(prompt, chosen, rejected) for chosen, rejected in couples])
    rng.shuffle(queues)
    pairs: list[dict[str, Any]] = []
    while queues and len(pairs) < n:
        for queue in queues[: n - len(pairs)]:
            if queue:
                pairs.append(_pair(pattern, domain, *queue.pop()))
        queues = [queue for queue in queues if queue]
    return pairs


def _trades_for_harm(domain: str, chosen: str, rejected: str) -> bool:
    """A canned refusal may lose to another refusal, never to an answer that does the harm."""
    return domain == "harmless" and is_refusal(rejected) and not is_refusal(chosen)


def _pair(pattern: str, domain: str, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "domain": domain,
        "messages": [{"role": "user", "content": prompt}],
        "chosen": chosen,
        "rejected": rejected,
        "pair_id": fingerprint([prompt, *sorted((chosen, rejected))]),
        "kind": f"patch:{pattern}",
    }
