"""Slow, literal readings of the published definitions, in plain Python: what `kernels.textstats`,
`kernels.repetition` and `kernels.c4` must agree with."""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections import Counter

TERMINALS = ".!?…。！？．؟।"
QUOTES = "\"'”’»」"
SOFT = ":;`：；"
CLOSERS = QUOTES + ")]}）】》"
JOINERS = "\u200c\u200d"  # count as letters
CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICY = ["terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
          "use cookies"]  # fmt: skip


def ideograph(character: str) -> bool:
    """Of a script without spaces (Han, kana, Thai), and part of a word."""
    name = unicodedata.name(character, "")
    script = name.startswith(("CJK UNIFIED", "HIRAGANA", "KATAKANA", "THAI", "CJK COMPATIBILITY I",
                              "IDEOGRAPHIC", "HALFWIDTH KATAKANA"))  # fmt: skip
    return unicodedata.category(character)[0] in "LMN" and script


def wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def words(text: str) -> list[str]:
    """Runs of letters, marks, digits and underscores of the lower-cased text; an ideograph is a
    word of its own."""
    result, run = [], ""
    for c in text.lower() + "\n":
        inside = unicodedata.category(c)[0] in "LMN" or c == "_"
        if run and (not inside or ideograph(c)):
            result.append(run)
            run = ""
        if inside and ideograph(c):
            result.append(c)
        elif inside:
            run += c
    return result


def quarters(word: str) -> int:
    if not ideograph(word[0]):
        return 4
    return 1 if unicodedata.name(word[0]).startswith("THAI") else 2


def chunks(text: str) -> list[str]:
    result: list[str] = []
    before = " "
    for c in text:
        if not c.isspace():
            breaks = ideograph(before) or (wide(before) and unicodedata.category(before)[0] in "PS")
            letter = unicodedata.category(c)[0] in "LMN" or c in JOINERS
            if before.isspace() or ideograph(c) or (breaks and letter):
                result.append("")
            result[-1] += c
        before = c
    return result


def ngrams(some: list[str], n: int) -> list[tuple[int, int]]:
    """(first word, last + 1) of every n-gram."""
    spans = []
    for start in range(len(some)):
        weight, end = 0, start
        while weight < 4 * n and end < len(some):
            weight += quarters(some[end])
            end += 1
        if weight >= 4 * n:
            spans.append((start, end))
    return spans


def top_share(some: list[str], n: int) -> float:
    counts = Counter(tuple(some[a:b]) for a, b in ngrams(some, n))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
    return min(1.0, most * longest / sum(map(len, some)))


def duplicate_share(some: list[str], n: int) -> float:
    seen, covered = set(), [False] * len(some)
    for start, end in ngrams(some, n):
        gram = tuple(some[start:end])
        if gram in seen:
            covered[start:end] = [True] * (end - start)
        seen.add(gram)
    chars = sum(map(len, some))
    return sum(len(w) for w, c in zip(some, covered, strict=True) if c) / max(chars, 1)


def duplicates(pieces: list[str]) -> tuple[float, float]:
    """Share of the pieces, and of their characters, that stood before."""
    seen: set[str] = set()
    count = chars = 0
    for piece in pieces:
        if piece in seen:
            count, chars = count + 1, chars + len(piece)
        seen.add(piece)
    return count / max(len(pieces), 1), chars / max(sum(map(len, pieces)), 1)


def sentences(text: str) -> int:
    count = 0
    for match in re.finditer(f"[{re.escape(TERMINALS)}]+", text):
        end = match.end()
        while end < len(text) and end - match.end() < 3 and text[end] in CLOSERS:
            end += 1
        rest = text[end : end + 1]
        count += wide(text[match.end() - 1]) or not rest or rest.isspace()
    return count


def mojibake(text: str) -> int:
    follows = "\x80-\xbf" + CP1252
    pattern = f"[\xc2-\xdf][{follows}]|[\xe0-\xef][{follows}]{{2}}|[\xf0-\xf4][{follows}]{{3}}"
    return sum(len(found) for found in re.findall(pattern, text))


def share(which, of) -> float:
    of = list(of)
    return sum(1 for one in of if which(one)) / max(len(of), 1)


def signals(text: str) -> dict[str, float]:
    some = words(text)
    spaced = [word for word in some if not ideograph(word[0])]
    pieces = chunks(text)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    widths = [sum(1 + wide(c) for c in line) for line in lines]
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    count = (sum(map(quarters, some)) + 3) // 4
    visible = [c for c in text if not c.isspace()]
    kinds = Counter(
        "A" if c == "\ufffd" else "L" if c in JOINERS else unicodedata.category(c)[0]
        for c in visible
    )
    marks = [c for c in visible if unicodedata.category(c)[0] in "PS" and c != "\ufffd"]
    runs = [m.group() for m in re.finditer(r"(\S)\1{3,}", text)]
    raw = text.split("\n")[: -1 if text.endswith("\n") or not text else None]
    frequencies = [n / max(len(visible), 1) for n in Counter(visible).values()]
    ellipses = text.count("...") + len(re.findall("……?", text))
    result = {
        "num_chars": len(text),
        "num_words": count,
        "mean_word_length": (
            sum(len(w) * (2 if wide(w[0]) else 1) for w in spaced) / len(spaced)
            if len(spaced) >= 10 else math.nan
        ),
        "max_word_length": max(map(len, some), default=0),
        "alphabetic_word_share": share(
            lambda p: any(unicodedata.category(c)[0] in "LM" or c in JOINERS for c in p),
            pieces,
        ),
        "symbol_word_ratio": max(text.count("#"), ellipses) / max(len(pieces), 1),
        "english_stop_words": len(
            {"the", "be", "to", "of", "and", "that", "have", "with"} & set(some)
        ),
        "num_lines": len(lines),
        "max_line_length": max(map(len, lines), default=0),
        "mean_line_length": sum(map(len, lines)) / max(len(lines), 1),
        "mean_line_width": sum(widths) / max(len(lines), 1),
        "short_line_share": share(lambda width: width < 30, widths),
        "bullet_line_share": share(lambda line: line[0] in "-*+•‣◦·・●○■□▪–—", lines),
        "ellipsis_line_share": share(lambda line: line.endswith(("...", "…")), lines),
        "terminal_line_share": share(lambda line: line[-1] in TERMINALS + QUOTES, lines),
        "sentence_end_share": share(lambda line: line[-1] in TERMINALS + CLOSERS + SOFT, lines),
        "newline_word_ratio": text.count("\n") / max(count, 1),
        "blank_line_share": share(lambda line: not line.strip(), raw),
        "one_word_line_share": share(lambda line: len(chunks(line)) == 1, lines),
        "duplicate_line_share": duplicates(lines)[0],
        "duplicate_line_char_share": duplicates(lines)[1],
        "duplicate_paragraph_share": duplicates(paragraphs)[0],
        "duplicate_paragraph_char_share": duplicates(paragraphs)[1],
        "letter_share": (kinds["L"] + kinds["M"]) / max(len(visible), 1),
        "digit_share": kinds["N"] / max(len(visible), 1),
        "space_share": share(str.isspace, text),
        "abnormal_char_share": (kinds["C"] + kinds["A"]) / max(len(text), 1),
        "mojibake_share": mojibake(text) / max(len(text), 1),
        "top_char_share": max(frequencies, default=0),
        "char_entropy": -sum(p * math.log2(p) for p in frequencies),
        "punctuation_share": len(marks) / max(len(visible), 1),
        "top_mark_share": (
            max(Counter(c for c in marks if c not in TERMINALS).values(), default=0) / len(marks)
            if len(marks) >= 20 else math.nan
        ),
        "repeated_mark_share": sum(
            len(run) for run in runs if run[0] in marks
        ) / max(len(visible), 1),
        "words_per_sentence": count / max(sentences(text), 1),
        "single_letter_word_share": (
            share(lambda w: len(w) == 1 and unicodedata.category(w)[0] in "LM", spaced)
            if len(spaced) >= 10 else math.nan
        ),
        "curly_bracket": int("{" in text),
        "lorem_ipsum": int(("lorem", "ipsum") in itertools.pairwise(some)),
    }  # fmt: skip
    for n in (2, 3, 4):
        result[f"top_{n}gram_char_share"] = top_share(some, n)
    for n in range(5, 11):
        result[f"duplicate_{n}gram_char_share"] = duplicate_share(some, n)
    return result


def c4(text: str) -> tuple[str, int]:
    """The page after C4's rules for lines, and its sentences."""
    kept, count = [], 0
    for line in text.split("\n"):
        line = CITATION.sub("", line).strip()
        if not line or line[-1] not in TERMINALS + QUOTES or line.endswith(("...", "…")):
            continue
        pieces = chunks(line)
        lower = line.lower()
        if len(pieces) < 5 or max(map(len, pieces)) > 1000 or "javascript" in lower:
            continue
        if any(phrase in lower for phrase in POLICY):
            continue
        kept.append(line)
        count += max(sentences(line), 1)
    return "\n".join(kept), count
