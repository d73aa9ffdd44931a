"""Needle in a haystack: can a model find one sentence in a long text? (InternLM2 report, 5.2.6)

A needle sentence is put into real documents at a chosen depth, the question follows at the end, and
the score is drawn over context length and depth. The protocol is OpenCompass's of the report's
time (single needle, whole prompt counted in tokens, a buffer left for the answer) with one point
taken from the original test: the needle stands between sentences, at the sentence end nearest to
the depth, rather than in the middle of a word.

Five scores, chosen by name, all in 0..1:
- "keyword": the answer's keyword occurs in the response.
- "edit": 1 - Levenshtein / longer length against the needle, whitespace removed (Dec 2023).
- "needlebench": 1 when the keyword occurs, else 0.2 x edit (OpenCompass's later rule).
- "likelihood": share of k wrong answers that the right one beats in log-probability (chance 1/2).
- "choice": 1 when it beats all of them (chance 1 / (k + 1)).
The last two need no instruction following, so that a tiny base model shows a graded signal: its
question ends with the needle's own opening words, and the model only has to go on.

Several needles in one text (`num_needles`) stand at even distances from the depth to the end, as
in OpenCompass's NeedleBench, each with a subject of its own, and all are asked for: a score is the
mean over them, and each is a lure to the others.

Models are injected as functions of text; nothing here imports jax.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from internlm2_jax.errors import UserError
from internlm2_jax.evals.needle_text import TEXTS, NeedleText
from internlm2_jax.progress import Progress

GenerateFn = Callable[[list[list[dict[str, str]]]], list[str]]
"""Conversations -> responses, one each."""

LikelihoodFn = Callable[[list[tuple[str, list[str]]]], list[list[float]]]
"""(context, continuations) pairs -> summed log-probability (nats) of each continuation."""


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


# A sentence ends at Chinese full stops, at Latin ones before white space, or at a line's end.
_SENTENCE_END = re.compile(r"[。！？]|[.!?](?=\s)|\n")


@dataclass(frozen=True)
class Needle:
    """One sentence to find. `opening` is how it begins, up to the answer; `position` its real
    depth, 0..1, in characters of the haystack."""

    text: str
    opening: str
    answer: str
    distractors: tuple[str, ...]
    position: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One prompt, which asks for all of its needles. `num_tokens` counts the whole of it."""

    prompt: str
    needles: tuple[Needle, ...]
    num_tokens: int

    @property
    def first(self) -> Needle:
        return self.needles[0]


def edit_score(response: str, reference: str) -> float:
    """1 - Levenshtein distance / longer length, whitespace removed from both; 1 for two blanks."""
    a, b = ("".join(text.split()) for text in (response, reference))
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return 1 - row[-1] / max(len(a), len(b), 1)


def needle_score(response: str, needle: Needle) -> float:
    """1 when the keyword occurs, else a fifth of the edit score (OpenCompass NeedleBench)."""
    found = keyword_score(response, needle)
    return found or 0.2 * edit_score(response, needle.text)


def keyword_score(response: str, needle: Needle) -> float:
    """1 when the answer occurs in the response as it stands, else 0."""
    return float(needle.answer in response)


GENERATION_SCORES: dict[str, Callable[[str, Needle], float]] = {
    "keyword": keyword_score,
    "edit": lambda response, needle: edit_score(response, needle.text),
    "needlebench": needle_score,
}

# From the log-probabilities of (right answer, distractors...).
LIKELIHOOD_SCORES: dict[str, Callable[[Sequence[float]], float]] = {
    "likelihood": lambda logps: sum(logps[0] > other for other in logps[1:]) / (len(logps) - 1),
    "choice": lambda logps: float(all(logps[0] > other for other in logps[1:])),
}


class Haystack:
    """Documents in a seeded order, cut to any number of tokens; repeated when they run out."""

    def __init__(self, tokenizer: Tokenizer, documents: Sequence[str], seed: int):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        documents = [text for text in documents if text.strip()]
        if not documents:
            raise UserError("the needle test got no documents with text; give it a haystack")
        self._order = self._endless(documents, np.random.default_rng(seed))

    @staticmethod
    def _endless(documents: Sequence[str], rng: np.random.Generator) -> Iterator[str]:
        while True:
            for index in rng.permutation(len(documents)):
                yield documents[index]

    def take(self, num_tokens: int) -> str:
        """About `num_tokens` of text; a character cut in half at the end is dropped."""
        while len(self._ids) < num_tokens:
            self._ids += self._tokenizer.encode(next(self._order).strip() + "\n")
        return self._tokenizer.decode(self._ids[: max(num_tokens, 0)]).rstrip("\ufffd")


def insert(
    haystack: str, needles: Sequence[str], depths: Sequence[float]
) -> tuple[str, list[float]]:
    """Puts each needle on its own line at the sentence end nearest to its depth in percent.

    Both ends of the text count as sentence ends. Returns the text and the needles' depths in 0..1
    of the haystack's characters.
    """
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(haystack)), len(haystack)]
    places = [min(ends, key=lambda end: abs(end - len(haystack) * d / 100)) for d in depths]
    text = haystack
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda p: -p[0]):
        text = f"{text[:place]}\n{needle}\n{text[place:]}"
    return text, [place / max(len(haystack), 1) for place in places]


def build_sample(
    tokenizer: Tokenizer,
    haystack: Haystack,
    length: int,
    depth: float,
    *,
    language: str = "en",
    index: int = 0,
    num_needles: int = 1,
    num_distractors: int = 3,
    buffer: int | None = None,
) -> Sample:
    """One prompt of at most `length - buffer` tokens, question included, and close to it.

    length: tokens of the whole test; buffer: those left for the answer (default: the language's).
    depth: percent, 0 = start of the haystack, 100 = right before the question; of several needles,
        where the first stands.
    index: which subject and answer; the distractors are the answers after it in the list.
    Raises UserError for an unknown language, a depth outside 0..100, or a length with no room.
    """
    if language not in TEXTS:
        raise UserError(f"needle language {language!r} is unknown; choose from {', '.join(TEXTS)}")
    text = TEXTS[language]
    if not 0 <= depth <= 100:
        raise UserError(f"needle depth {depth} is not a percentage; give 0 to 100")
    if not 1 <= num_distractors < len(text.answers):
        raise UserError(f"{num_distractors} distractors; give 1 to {len(text.answers) - 1}")
    if not 1 <= num_needles <= len(text.subjects):
        raise UserError(f"{num_needles} needles; give 1 to {len(text.subjects)}")
    needles = [_needle(text, index + i, num_distractors) for i in range(num_needles)]
    depths = [depth + (100 - depth) * i / num_needles for i in range(num_needles)]
    question = "\n".join(
        text.question.format(subject=_pick(text.subjects, index + i)) for i in range(num_needles)
    )
    room = length - (text.buffer if buffer is None else buffer)

    def render(num_tokens: int) -> tuple[str, list[float], int]:
        content, positions = insert(haystack.take(num_tokens), [n.text for n in needles], depths)
        prompt = text.prompt.format(haystack=content, question=question)
        return prompt, positions, len(tokenizer.encode(prompt))

    frame = render(0)[2]
    if frame > room:
        raise UserError(
            f"a needle test of {length} tokens has no room: needle, question and answer buffer "
            f"take {frame + length - room}; ask for a longer one or a smaller buffer"
        )
    # Joining text changes how it is tokenized at the seams: correct once, then only shrink.
    size = room - frame
    size = max(size + room - render(size)[2], 0)
    rendered = render(size)
    while rendered[2] > room and size > 0:
        size = max(size - (rendered[2] - room), 0)
        rendered = render(size)
    prompt, positions, num_tokens = rendered
    placed = zip(needles, positions, strict=True)
    return Sample(prompt, tuple(replace(n, position=p) for n, p in placed), num_tokens)


def _pick(items: Sequence[str], index: int) -> str:
    return items[index % len(items)]


def _needle(text: NeedleText, index: int, num_distractors: int) -> Needle:
    subject = _pick(text.subjects, index)
    answer, *others = (_pick(text.answers, index + i) for i in range(num_distractors + 1))
    return Needle(
        text.needle.format(subject=subject, answer=answer),
        text.opening.format(subject=subject),
        answer,
        tuple(others),
    )


def needle_grid(
    tokenizer: Tokenizer,
    documents: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    score: str,
    generate: GenerateFn | None = None,
    likelihood: LikelihoodFn | None = None,
    language: str = "en",
    repeats: int = 10,
    num_needles: int = 1,
    num_distractors: int = 3,
    buffer: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Mean score per cell, float64 [len(depths), len(lengths)] in 0..1.

    score: one of the names in the module's docstring; the first three need `generate`, the other
        two `likelihood`. Each call gets the `repeats` prompts of one cell, which are of one length.
    A repeat has its own order of documents, subject and answers, and keeps them over all cells,
    lengths and models: differences between cells are not differences between samples.
    """
    _check(score, generate, likelihood)
    haystacks = [Haystack(tokenizer, documents, seed=seed + repeat) for repeat in range(repeats)]
    scores = np.zeros((len(depths), len(lengths)))
    with Progress("needle", total=scores.size, unit="cell") as progress:
        for column, length in enumerate(lengths):
            for row, depth in enumerate(depths):
                samples = [
                    build_sample(
                        tokenizer, haystack, length, depth, language=language, index=seed + repeat,
                        num_needles=num_needles, num_distractors=num_distractors, buffer=buffer,
                    )
                    for repeat, haystack in enumerate(haystacks)
                ]  # fmt: skip
                marks = score_samples(samples, score, generate, likelihood)
                scores[row, column] = float(np.mean(marks))
                progress.update(1, score=scores[row, column])
    return scores


def score_samples(
    samples: Sequence[Sample],
    score: str,
    generate: GenerateFn | None = None,
    likelihood: LikelihoodFn | None = None,
) -> list[float]:
    """One score in 0..1 per sample."""
    _check(score, generate, likelihood)
    if score in GENERATION_SCORES:
        assert generate is not None
        responses = generate([[{"role": "user", "content": s.prompt}] for s in samples])
        return [mark(score, s, [text]) for text, s in zip(responses, samples, strict=True)]
    assert likelihood is not None
    asked = [(s, needle) for s in samples for needle in s.needles]
    found = likelihood([(f"{s.prompt}\n{n.opening}", _continuations(n)) for s, n in asked])
    marks = iter(LIKELIHOOD_SCORES[score](logps) for logps in found)
    return [float(np.mean([next(marks) for _ in s.needles])) for s in samples]


def mark(score: str, sample: Sample, responses: Sequence[str]) -> float:
    """A generation score: `responses` are one to all needles, or one to each."""
    texts = [*responses] * len(sample.needles) if len(responses) == 1 else responses
    marks = [GENERATION_SCORES[score](t, n) for t, n in zip(texts, sample.needles, strict=True)]
    return float(np.mean(marks))


def effective_length(
    lengths: Sequence[int], means: Sequence[float], threshold: float
) -> int | None:
    """The longest of the `lengths` up to which every mean score is at least `threshold`."""
    passed = None
    for length, mean in sorted(zip(lengths, means, strict=True)):
        if mean < threshold:
            break
        passed = length
    return passed


def _continuations(needle: Needle) -> list[str]:
    """The right answer first, joined as in the needle: a space in English, none in Chinese."""
    gap = needle.text[len(needle.opening) : needle.text.index(needle.answer, len(needle.opening))]
    return [gap + answer for answer in (needle.answer, *needle.distractors)]


def check_score(score: str) -> None:
    """A UserError for a name that is not a generation score."""
    if score not in GENERATION_SCORES:
        known = ", ".join(GENERATION_SCORES)
        raise UserError(f"needle score {score!r} is unknown; choose from {known}")


def _check(score: str, generate: GenerateFn | None, likelihood: LikelihoodFn | None) -> None:
    """A UserError for an unknown score or one whose function is missing."""
    known = [*GENERATION_SCORES, *LIKELIHOOD_SCORES]
    if score not in known:
        raise UserError(f"needle score {score!r} is unknown; choose from {', '.join(known)}")
    given = generate if score in GENERATION_SCORES else likelihood
    if given is None:
        argument = "generate" if score in GENERATION_SCORES else "likelihood"
        raise UserError(f"needle score {score!r} needs the `{argument}` function; pass one")
