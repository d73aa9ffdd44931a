"""IFEval's rules: 25 instructions whose keeping a program can tell (arXiv 2311.07911).

Each rule takes the response and its arguments. `followed` is strict; `followed_loosely` also tries
the response without its first or last line and without asterisks, as the paper's section 3 does.
Sentences and languages are told by other means than the authors' nltk and langdetect: by final
punctuation, and by pycld2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from internlm2_jax.errors import UserError

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda seen, wanted: seen >= wanted,
    "less than": lambda seen, wanted: seen < wanted,
}
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATIONS = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|vs|etc|e\.g|i\.e|No|Inc|Ltd|Co|[A-Z])\.(?=\s)"
)
_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)|[。！？]+[”’」』）]*")


def _compare(seen: int, relation: str, wanted: int) -> bool:
    if relation not in RELATIONS:
        raise UserError(f"IFEval relation {relation!r} is none of {', '.join(RELATIONS)}")
    return RELATIONS[relation](seen, wanted)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def sentences(text: str) -> int:
    """How many there are; a last one without a full stop counts."""
    text = _ABBREVIATIONS.sub("", text).strip()
    if not text:
        return 0
    ends = [match.end() for match in _END.finditer(text)]
    return len(ends) + (not ends or bool(text[ends[-1] :].strip()))


def _has(text: str, word: str) -> bool:
    return re.search(word, text, re.IGNORECASE) is not None


def keywords(text: str, keywords: Sequence[str]) -> bool:
    return all(_has(text, re.escape(word)) for word in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(re.escape(keyword), text, re.I)), relation, frequency)


def forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(_has(text, rf"\b{re.escape(word)}\b") for word in forbidden_words)


def letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def language(text: str, language: str) -> bool:
    try:
        import pycld2
    except ImportError as error:
        raise UserError(
            "IFEval's language rules need pycld2: pip install 'internlm2-jax[data]'"
        ) from error
    clean = "".join(c for c in text if c.isprintable() or c.isspace())
    try:
        _, _, found = pycld2.detect(clean.encode(), bestEffort=True)
    except pycld2.error:
        return False
    return found[0][1].split("-")[0] == language.split("-")[0]


def paragraphs(text: str, num_paragraphs: int) -> bool:
    """Parted by "***"; an empty one may stand first or last, nowhere else."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


def first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are parted by an empty line."""
    parts = [part.strip() for part in re.split(r"\n\n", text)]
    full = [part for part in parts if part]
    if len(full) != num_paragraphs or nth_paragraph > len(parts):
        return False
    head = parts[nth_paragraph - 1].split()
    said = re.match(r"[^\s.,?!'\"]*", head[0].lstrip("'\"")) if head else None
    return said is not None and said.group().lower() == first_word.lower()


def sections(text: str, section_spliter: str, num_sections: int) -> bool:
    parts = re.split(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)
    return len(parts) - 1 >= num_sections


def highlights(text: str, num_highlights: int) -> bool:
    twice = [s for s in re.findall(r"\*\*([^\n*]*)\*\*", text) if s.strip()]
    once = [s for s in re.findall(r"\*([^\n*]*)\*", text) if s.strip()]
    return len(once) + len(twice) >= num_highlights


def bullets(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, re.M)
    return len(stars) + len(re.findall(r"^\s*-.*$", text, re.M)) == num_bullets


def postscript(text: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = patterns.get(postscript_marker, rf"\s*{re.escape(postscript_marker.lower())}.*$")
    return re.search(pattern, text.lower(), re.M) is not None


def is_json(text: str) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.I).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def two_responses(text: str) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    full = [part.strip() for part in parts if part.strip()]
    return len(full) == 2 and full[0] != full[1]


def quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capitals(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words all in capitals; a contraction counts without its end, AM/PM as one."""
    found = [re.sub(r"['’](?:m|s|re|ve|ll|d)$", "", word) for word in text.split()]
    return _compare(sum(w.isupper() for w in found), capital_relation, capital_frequency)


RULES: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden,
    "keywords:letter_frequency": letters,
    "language:response_language": language,
    "length_constraints:number_sentences": lambda text, num_sentences, relation: _compare(
        sentences(text), relation, num_sentences
    ),
    "length_constraints:number_words": lambda text, num_words, relation: _compare(
        len(words(text)), relation, num_words
    ),
    "length_constraints:number_paragraphs": paragraphs,
    "length_constraints:nth_paragraph_first_word": first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": bullets,
    "detectable_format:constrained_response": lambda text: any(o in text for o in OPTIONS),
    "detectable_format:number_highlighted_sections": highlights,
    "detectable_format:multiple_sections": sections,
    "detectable_format:json_format": is_json,
    "detectable_format:title": lambda text: any(
        title.strip() for title in re.findall(r"<<([^\n]+?)>>", text)
    ),
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": end,
    "startend:quotation": quoted,
    "change_case:capital_word_frequency": capitals,
    "change_case:english_capital": lambda text: text.isupper() and language(text.lower(), "en"),
    "change_case:english_lowercase": lambda text: text.islower() and language(text, "en"),
    "punctuation:no_comma": lambda text: "," not in text,
}  # fmt: skip


def followed(text: str, rules: Sequence[Sequence[Any]]) -> list[bool]:
    """Which of the (name, arguments) a response keeps; an empty response keeps none."""
    return [bool(text.strip()) and RULES[name](text, **given) for name, given in rules]


def followed_loosely(text: str, rules: Sequence[Sequence[Any]]) -> list[bool]:
    """The same, of the response or of any of its seven relaxed forms."""
    lines = text.split("\n")
    cuts = [text, *("\n".join(lines[a:b]).strip() for a, b in ((1, None), (0, -1), (1, -1)))]
    forms = [*cuts, *(form.replace("*", "") for form in cuts)]
    marks = [followed(form, rules) for form in dict.fromkeys(forms)]
    return [any(column) for column in zip(*marks, strict=True)]
