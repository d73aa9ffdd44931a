"""Bad writing made from good: the negatives of a fluency classifier, where nobody has labelled any.

Each kind imitates something that goes wrong between an author and a corpus: text assembled by a
program (`shuffled`), lost or doubled by an extractor (`dropped`, `repeated`), read by a scanner
(`scanned`), left with torn markup (`markup`), decoded with the wrong character set (`garbled`).
`strength` in (0, 1] is about the share of words touched. A word is a run without white space; in
scripts written without spaces it is a character. Everything is a function of the text, the kind,
the strength and the random generator given.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from internlm2_jax.errors import UserError

# One ideograph or kana, or a run of other characters that are not white space; separators between.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")  # noqa: E501  # fmt: skip

# What a scanner takes for what: letter shapes that are confused with one another.
_SCANNER = {
    "m": "rn", "rn": "m", "l": "1", "I": "l", "O": "0", "o": "0", "e": "c", "c": "e", "h": "b",
    "u": "ii", "w": "vv", "d": "cl", "S": "5", "B": "8", "g": "9", "t": "f", "f": "t", "a": "o",
    "n": "ri", ".": ",", ",": ".", " ": "",
    "日": "曰", "未": "末", "己": "已", "人": "入", "大": "太", "的": "旳", "是": "昰", "不": "木",
}  # fmt: skip
_MARKUP = (
    '<div class="', "</a></li><li>", "&nbsp;&amp;", '<span style="color:', "</td><td>", "[edit]",
    "{{cite web|url=", "<br/><br", '" href="/index.php?id=', "]]>", "&lt;p&gt;", "| |",
)  # fmt: skip


def _pieces(text: str) -> tuple[list[str], list[str]]:
    """Words, and the separators before each and after the last (one more than there are words)."""
    words, gaps, at = [], [], 0
    for match in _WORD.finditer(text):
        gaps.append(text[at : match.start()])
        words.append(match.group())
        at = match.end()
    return words, [*gaps, text[at:]]


def _join(words: list[str], gaps: list[str]) -> str:
    return "".join(gap + word for gap, word in zip(gaps, words, strict=False)) + gaps[-1]


def shuffled(text: str, strength: float, rng: random.Random) -> str:
    """Words change places within stretches of 4 to 4 + 16 x strength words."""
    words, gaps = _pieces(text)
    start, most = 0, 4 + round(16 * strength)
    while start < len(words):
        end = min(len(words), start + rng.randint(4, most))
        stretch = words[start:end]
        rng.shuffle(stretch)
        words[start:end] = stretch
        start = end
    return _join(words, gaps)


def dropped(text: str, strength: float, rng: random.Random) -> str:
    """Words go missing."""
    words, gaps = _pieces(text)
    kept = [(g, w) for g, w in zip(gaps, words, strict=False) if rng.random() >= 0.6 * strength]
    return "".join(gap + word for gap, word in kept) + gaps[-1]


def repeated(text: str, strength: float, rng: random.Random) -> str:
    """Words and short phrases stand twice or three times."""
    words, gaps = _pieces(text)
    out, i = [], 0
    while i < len(words):
        size = rng.randint(1, 4)
        phrase = "".join(gaps[j] + words[j] for j in range(i, min(i + size, len(words))))
        again = rng.randint(1, 2) if rng.random() < strength else 0
        glue = "" if phrase[:1].isspace() else " "
        out.append(phrase + (glue + phrase) * again)
        i += size
    return "".join(out) + gaps[-1]


def scanned(text: str, strength: float, rng: random.Random) -> str:
    """Letters are confused by their shape, words run together or fall apart."""
    out = []
    for character in text:
        if rng.random() < 0.35 * strength:
            character = _SCANNER.get(character, character)
            if character.isalpha() and rng.random() < 0.15:
                character += " "
        out.append(character)
    return "".join(out)


def markup(text: str, strength: float, rng: random.Random) -> str:
    """Torn tags, entities and templates stand between the words, the end is cut off."""
    words, gaps = _pieces(text)
    words = words[: max(1, len(words) - rng.randint(0, len(words) // 4))]
    for i in range(len(words)):
        if rng.random() < 0.4 * strength:
            torn = rng.choice(_MARKUP)
            words[i] = rng.choice((torn + words[i], words[i] + torn, f"{torn} {words[i]}"))
    return _join(words, [*gaps[: len(words)], ""])


def garbled(text: str, strength: float, rng: random.Random) -> str:
    """Words decoded with the wrong character set, or with bytes lost. Plain ASCII words lose their
    apostrophes and quotes to the same fault, and some letters to replacement characters."""
    words, gaps = _pieces(text)
    for i, word in enumerate(words):
        if rng.random() < 0.5 * strength:
            if word.isascii():
                at = rng.randrange(len(word))
                words[i] = word[:at] + rng.choice(("\ufffd", "Ã©", "â€™", "Â ")) + word[at + 1 :]
            else:
                words[i] = word.encode().decode("latin-1")
    return _join(words, gaps)


KINDS: dict[str, Callable[[str, float, random.Random], str]] = {
    "shuffled": shuffled,
    "dropped": dropped,
    "repeated": repeated,
    "scanned": scanned,
    "markup": markup,
    "garbled": garbled,
}


def corrupt(text: str, kind: str, strength: float, rng: random.Random) -> str:
    """`text` damaged in the way of `kind`; a text too short to be damaged comes back as it is."""
    if kind not in KINDS:
        raise UserError(f"no kind of damage {kind!r}; there are {', '.join(KINDS)}")
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; it must lie in (0, 1]")
    return KINDS[kind](text, strength, rng) if text.strip() else text
