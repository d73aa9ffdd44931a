"""Statistics that tell long prose and long programs from long lists: InternLM2 section 3.1.3.

The report keeps texts of more than 32K bytes and filters them by lexical and linguistic features,
such as discourse conjunctions, before any model reads them. The features are those of LongWanjuan's
published code: cohesion (rates of conjunctions and pronouns, in English and Chinese), complexity
(lengths of lines, rates of newlines, commas, spaces and bars), coherence (words per character,
share of distinct words). The lists of words are ours; the third part of coherence, perplexity, is
data_beam/scoring/perplexity.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from data_beam.attributes.base import Examined
from data_beam.kernels.textstats import Signals
from data_beam.kernels.tokens import IDEOGRAPH, Tokens, character_classes, mix64, tokenize

FEW_WORDS = 50  # below as many words of a language, its rates say nothing


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ENGLISH_PRONOUNS = _words(
    """
    I me my mine myself you your yours yourself yourselves he him his himself she her hers herself
    it its itself we us our ours ourselves they them their theirs themselves this that these those
    who whom whose which
    """
)

# Coordinating and subordinating conjunctions, and the adverbs that tie one sentence to another.
ENGLISH_CONJUNCTIONS = (
    *_words(
        """
        and but or nor so yet although though because since unless until while whereas whether if
        then albeit lest whenever wherever whereby wherein either neither otherwise instead however
        therefore moreover furthermore nevertheless nonetheless thus hence consequently accordingly
        meanwhile besides likewise similarly indeed namely finally firstly secondly thirdly lastly
        additionally alternatively conversely especially specifically particularly generally
        formally informally notably importantly obviously clearly essentially ultimately eventually
        subsequently afterwards previously initially rather also still thereby therein thereafter
        hereafter regardless
        """
    ),
    "in addition", "as well as", "as a result", "for example", "for instance", "in other words",
    "on the other hand", "on the one hand", "on the contrary", "in contrast", "by contrast",
    "in particular", "in general", "in fact", "in conclusion", "in summary", "in short",
    "to sum up", "after all", "at the same time", "even though", "even if", "as long as",
    "as soon as", "as far as", "so that", "such that", "in order to", "due to", "because of",
    "that is", "not only", "but also", "rather than", "as if", "as though", "provided that",
    "in case", "no matter", "above all", "first of all", "more precisely", "strictly speaking",
    "roughly speaking", "without loss of generality", "it follows that", "note that",
    "with regard to", "with respect to", "in spite of", "other than", "as opposed to",
)  # fmt: skip

CHINESE_PRONOUNS = _words(
    "我 你 您 他 她 它 我们 你们 他们 她们 它们 咱们 自己 这 那 这些 那些 谁 大家 彼此"
)

# Addition and order; contrast and concession; cause; condition; choice and purpose; example and
# summary; likeness; the single characters of the written style.
CHINESE_CONJUNCTIONS = _words(
    """
    以及 并且 而且 况且 何况 甚至 甚至于 乃至 不仅 不但 不光 不单 不只 非但 不仅如此 此外 另外
    除此之外 再者 再说 同时 与此同时 一方面 另一方面 尤其 尤其是 特别是 进而 从而 继而 接着 随后
    然后 其次 首先 最后 最终
    但 但是 可是 然而 不过 只是 反之 反而 相反 尽管 虽然 虽说 固然 即使 即便 哪怕 纵使 纵然 就算
    尽管如此 话虽如此
    因为 由于 因此 因而 所以 故而 故此 于是 以致 以至 以至于 致使 之所以 既然 鉴于 由此 由此可见
    如果 假如 假使 假设 倘若 若是 要是 如若 万一 只要 只有 除非 无论 不论 不管 任凭 否则 不然
    要不然 那么 一旦
    或 或者 或是 还是 要么 与其 宁可 宁愿 不如 以便 以免 免得 为了
    例如 比如 譬如 诸如 换言之 换句话说 也就是说 即 总之 总而言之 综上所述 简而言之 一般来说
    总的来说 事实上 实际上 其实 当然 显然 也就是 具体来说 具体而言
    同样 同样地 类似地 正如 如同
    与 且 而 虽
    """
)

# The characters of the lists above that traditional writing has otherwise.
_TRADITIONAL = str.maketrans(
    "万与为么们从仅于体况别则单却后宁实尽并当总换无时显来样终继综虽见论设话说诸谁过还这进鉴随际类简纵着",
    "萬與為麼們從僅於體況別則單卻後寧實儘並當總換無時顯來樣終繼綜雖見論設話說諸誰過還這進鑑隨際類簡縱著",
)

_ENGLISH, _CHINESE = 0, 1
_CONJUNCTION, _PRONOUN = 0, 1
_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF))


class Phrases(NamedTuple):
    """Phrases of one number of words; sorted by hash. `kind` is 2 * language + class."""

    words: int
    keys: np.ndarray
    kind: np.ndarray
    number: np.ndarray  # of the phrase, the same in both ways of writing


@functools.cache
def _phrases() -> tuple[list[Phrases], np.ndarray]:
    """The lists by number of words, the longest first, and the sorted hashes of all first words."""
    rows: dict[int, dict[int, tuple[int, int]]] = {}
    first = set()
    lists = (
        (_ENGLISH, _CONJUNCTION, ENGLISH_CONJUNCTIONS), (_ENGLISH, _PRONOUN, ENGLISH_PRONOUNS),
        (_CHINESE, _CONJUNCTION, CHINESE_CONJUNCTIONS), (_CHINESE, _PRONOUN, CHINESE_PRONOUNS),
    )  # fmt: skip
    for language, kind, phrases in lists:
        for number, phrase in enumerate(phrases):
            for spelling in {phrase, phrase.translate(_TRADITIONAL)}:
                hashes = tokenize(spelling).hashes
                key = int(_run_hash(hashes, np.zeros(1, np.int64), len(hashes))[0])
                rows.setdefault(len(hashes), {})[key] = (2 * language + kind, number)
                first.add(int(hashes[0]))
    found = []
    for size in sorted(rows, reverse=True):
        keys = np.array(sorted(rows[size]), np.uint64)
        kind, number = np.array([rows[size][int(key)] for key in keys], np.int32).T
        found.append(Phrases(size, keys, kind, number))
    return found, np.array(sorted(first), np.uint64)


def _run_hash(hashes: np.ndarray, starts: np.ndarray, count: int) -> np.ndarray:
    """One hash per run of `count` words from each of `starts`."""
    run = hashes[starts]
    for offset in range(1, count):
        run = mix64(run) + hashes[starts + offset]
    return run


def _places(keys: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(which queries are keys, where): indices into both."""
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    hit = np.flatnonzero(keys[at] == queries)
    return hit, at[hit]


def count_phrases(words: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """(occurrences [2, 2], distinct phrases [2, 2]) by language (English, Chinese) and class
    (conjunction, pronoun). Where a longer phrase stands, the shorter ones in it do not count."""
    occurrences, distinct = np.zeros(4, np.int64), np.zeros(4, np.int64)
    phrases, first = _phrases()
    hashes = words.hashes
    if not len(hashes):
        return occurrences.reshape(2, 2), distinct.reshape(2, 2)
    candidates, _ = _places(first, hashes)
    used = np.zeros(len(hashes), bool)
    seen: list[np.ndarray] = []
    for size, keys, kind, number in phrases:
        starts = candidates[candidates + size <= len(hashes)]
        hit, at = _places(keys, _run_hash(hashes, starts, size))
        starts = starts[hit]
        # The characters of a Chinese phrase stand side by side, with no mark between them.
        apart = words.starts[starts + size - 1] - words.starts[starts] != size - 1
        free = ~(used[starts] | (apart & (kind[at] >= 2 * _CHINESE)))
        starts, at = starts[free], at[free]
        for offset in range(size):
            used[starts + offset] = True
        occurrences += np.bincount(kind[at], minlength=4)
        seen.append(kind[at].astype(np.int64) << 32 | number[at])
    for code in np.unique(np.concatenate(seen)).tolist():
        distinct[code >> 32] += 1
    return occurrences.reshape(2, 2), distinct.reshape(2, 2)


_INTEGERS = ("num_bytes", "num_lines", "conjunctions_en", "conjunctions_zh")
_REALS = (
    "conjunction_rate_en", "pronoun_rate_en", "conjunction_rate_zh", "pronoun_rate_zh",
    "mean_line_length", "std_line_length", "median_line_length", "min_line_length",
    "max_line_length", "newline_rate", "comma_rate", "space_rate", "bar_rate", "dedup_rate",
    "comp_rate",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LongContext:
    """num_bytes: UTF-8 bytes of the text. conjunctions_*: how many different ones occur.
    *_rate_en: per English word, *_rate_zh: per Chinese character; NaN where fewer than 50 of them
    are. Line lengths: characters of lines that are not blank. Other rates: per character; commas of
    both languages. dedup_rate: distinct words / words; comp_rate: words / characters (LongWanjuan
    takes a language model's tokens for words).

    A document of fewer than `min_bytes` has its size alone: most of a corpus is short."""

    min_bytes: int = 32 * 1024

    name: ClassVar[str] = "long_context"
    version: ClassVar[int] = 1
    schema: ClassVar[pa.Schema] = pa.schema(
        [(name, pa.int64()) for name in _INTEGERS] + [(name, pa.float32()) for name in _REALS]
    )

    def setup(self) -> None:
        _phrases()

    def compute(self, batch: Sequence[Examined]) -> dict[str, Sequence[Any]]:
        rows = [_measure(examined, self.min_bytes) for examined in batch]
        return {name: [row.get(name) for row in rows] for name in (*_INTEGERS, *_REALS)}


def _measure(examined: Examined, min_bytes: int) -> dict[str, float]:
    num_bytes = examined.document.num_bytes
    if num_bytes < min_bytes:
        return {"num_bytes": num_bytes}
    signals = examined.signals
    words = signals.words
    occurrences, distinct = count_phrases(words)
    spaced, han = _words_by_script(words)
    rates = {
        f"{name}_rate_{language}": _rate(occurrences[row, column], total)
        for row, (language, total) in enumerate((("en", spaced), ("zh", han)))
        for column, name in enumerate(("conjunction", "pronoun"))
    }
    characters = max(len(words.codepoints), 1)
    unique = len(np.unique(words.hashes))
    return {
        "num_bytes": num_bytes,
        "conjunctions_en": int(distinct[_ENGLISH, _CONJUNCTION]),
        "conjunctions_zh": int(distinct[_CHINESE, _CONJUNCTION]),
        **rates,
        **_lines(signals),
        **_marks(words.codepoints),
        "dedup_rate": unique / len(words.hashes) if len(words.hashes) else math.nan,
        "comp_rate": len(words.hashes) / characters,
    }


def _rate(count: int, total: int) -> float:
    return float(count / total) if total >= FEW_WORDS else math.nan


def _words_by_script(words: Tokens) -> tuple[int, int]:
    """Words written with spaces, and Chinese characters."""
    points = words.codepoints[words.starts]
    spaced = np.count_nonzero(character_classes().take(points) != IDEOGRAPH)
    han = sum(np.count_nonzero((points >= low) & (points <= high)) for low, high in _HAN)
    return int(spaced), int(han)


def _lines(signals: Signals) -> dict[str, float]:
    lengths = signals.lines.ends - signals.lines.starts
    if not len(lengths):
        return {"num_lines": 0} | {name: math.nan for name in _REALS if "line_length" in name}
    return {
        "num_lines": len(lengths),
        "mean_line_length": float(lengths.mean()),
        "std_line_length": float(lengths.std()),
        "median_line_length": float(np.median(lengths)),
        "min_line_length": float(lengths.min()),
        "max_line_length": float(lengths.max()),
    }


def _marks(points: np.ndarray) -> dict[str, float]:
    total = max(len(points), 1)
    marks = {"newline": "\n", "comma": ",，", "space": " \u3000", "bar": "|"}
    return {
        f"{name}_rate": sum(int(np.count_nonzero(points == ord(c))) for c in characters) / total
        for name, characters in marks.items()
    }
