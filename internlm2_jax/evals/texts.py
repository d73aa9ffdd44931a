"""How alike two texts are, in English and Chinese."""

from __future__ import annotations

import collections
import difflib
import re
import unicodedata

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_TOKENS = re.compile(r"[㐀-鿿豈-﫿]|[^\W㐀-鿿豈-﫿]+")


def normal(text: str) -> str:
    """Lower case, no punctuation, no English articles, single spaces: SQuAD's form."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text)
    return " ".join(_ARTICLES.sub(" ", text).split())


def tokens(text: str) -> list[str]:
    """Words, and Chinese characters one by one, of the normal form."""
    return _TOKENS.findall(normal(text))


def f1(said: str, right: str) -> float:
    """Harmonic mean of precision and recall over tokens."""
    a, b = tokens(said), tokens(right)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def rouge_l(said: str, right: str) -> float:
    """F-measure of the longest common subsequence of tokens (Lin, 2004)."""
    a, b = tokens(said), tokens(right)
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if left == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def similar(said: str, right: str) -> float:
    """Share of letters that two lines of code have in common, in order."""
    lines = (line for line in said.strip().split("\n") if line.strip()[:1] not in ("`", "#", "/"))
    return difflib.SequenceMatcher(None, next(lines, "").strip(), right.strip()).ratio()
