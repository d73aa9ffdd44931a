"""Heuristic filters: named limits on the signals of `kernels.textstats`, one list per source.

InternLM2 filters on anomalies of separation and line breaks, character frequency and punctuation
(section 3.1.1) and gives no thresholds; these start from Gopher, C4 and, for code, StarCoder (Li
et al. 2023, section 3), loosened where reference manuals would be lost: their section headings,
code fences and parameter lists repeat (Gopher's 0.3 repeated lines and 0.15 repeated 5-grams drop a
fifth of the bytes of the machine's own documentation, most of it good prose). The first limit that
is broken names the reason of the drop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from data_beam.kernels.textstats import Signals
from internlm2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limit:
    """A document is dropped for `reason` when `signal` lies outside [minimum, maximum]."""

    reason: str
    signal: str
    minimum: float = -math.inf
    maximum: float = math.inf

    def __post_init__(self):
        if not hasattr(Signals, self.signal):
            known = [name for name in vars(Signals) if not name.startswith("_")]
            raise UserError(f"no signal {self.signal!r} to filter on; known: {', '.join(known)}")

    def broken_by(self, value: float) -> bool:
        return value < self.minimum or value > self.maximum


# In order of cost: what needs only the characters comes before what needs lines, words, n-grams.
TEXT = (
    Limit("too_short", "num_chars", minimum=200),
    Limit("too_long", "num_chars", maximum=1_000_000),
    Limit("generated", "generated_mark", maximum=0),
    Limit("long_line", "max_line_length", maximum=20_000),
    Limit("short_lines", "mean_line_length", minimum=12),
    Limit("too_few_words", "num_words", minimum=40),
    Limit("encoded_data", "max_word_length", maximum=1100),
    Limit("word_length", "mean_word_length", minimum=2.5, maximum=10),
    Limit("few_letters", "letter_share", minimum=0.55),
    Limit("few_alphabetic_words", "alphabetic_word_share", minimum=0.7),
    Limit("symbols", "symbol_word_ratio", maximum=0.1),
    Limit("bullets", "bullet_line_share", maximum=0.9),
    Limit("ellipses", "ellipsis_line_share", maximum=0.3),
    Limit("no_sentences", "sentence_end_share", minimum=0.1),
    Limit("repeated_lines", "duplicate_line_share", maximum=0.6),
    Limit("repeated_line_chars", "duplicate_line_char_share", maximum=0.25),
    Limit("top_2gram", "top_2gram_char_share", maximum=0.2),
    Limit("top_3gram", "top_3gram_char_share", maximum=0.18),
    Limit("top_4gram", "top_4gram_char_share", maximum=0.16),
    Limit("repeated_5grams", "duplicate_5gram_char_share", maximum=0.4),
    Limit("repeated_10grams", "duplicate_10gram_char_share", maximum=0.25),
)
CODE = (
    Limit("too_short", "num_chars", minimum=100),
    Limit("too_long", "num_chars", maximum=1_000_000),
    Limit("generated", "generated_mark", maximum=0),
    Limit("long_line", "max_line_length", maximum=1000),
    Limit("minified", "mean_line_length", maximum=100),
    Limit("too_few_words", "num_words", minimum=20),
    Limit("encoded_data", "max_word_length", maximum=200),
    Limit("few_letters", "letter_share", minimum=0.4),
    Limit("digits", "digit_share", maximum=0.3),
    Limit("repeated_lines", "duplicate_line_share", maximum=0.6),
    Limit("repeated_10grams", "duplicate_10gram_char_share", maximum=0.5),
)
DEFAULT: dict[str, tuple[Limit, ...]] = {"text": TEXT, "code": CODE}


def limits_for(source: str, filters: Mapping[str, Sequence[Limit]]) -> Sequence[Limit]:
    """The limits of a source; an unknown source is filtered like text."""
    return filters.get(source, filters.get("text", TEXT))


def first_broken(signals: Signals, limits: Sequence[Limit]) -> tuple[str, float] | None:
    """(reason, value) of the first broken limit, or None when the document passes."""
    for limit in limits:
        value = float(getattr(signals, limit.signal))
        if limit.broken_by(value):
            return limit.reason, value
    return None
