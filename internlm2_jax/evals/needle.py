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

Models are injected as functions of text; nothing here imports jax.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from internlm2_jax.errors import UserError
from internlm2_jax.progress import Progress

GenerateFn = Callable[[list[list[dict[str, str]]]], list[str]]
"""Conversations -> responses, one each."""

LikelihoodFn = Callable[[list[tuple[str, list[str]]]], list[list[float]]]
"""(context, continuations) pairs -> summed log-probability (nats) of each continuation."""


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class NeedleText:
    """The words of the test in one language; {subject} and {answer} are filled in.

    buffer: tokens kept free for the response and the chat frame (OpenCompass: 600 en, 200 zh).
    """

    needle: str
    question: str
    opening: str
    prompt: str
    subjects: tuple[str, ...]
    answers: tuple[str, ...]
    buffer: int


# Repeat 0 with seed 0 in Chinese is the report's own needle. Subjects and answers are stepped
# through together; their numbers have no common factor, so pairs repeat only after their product.
TEXTS: dict[str, NeedleText] = {
    "zh": NeedleText(
        needle="{subject}最喜欢的实习的地点就是{answer}。",
        question="{subject}最喜欢的实习地点是哪里？"
        "你的回答格式应该为“{subject}最喜欢的实习地点就是________。”",
        opening="{subject}最喜欢的实习的地点就是",
        prompt="请阅读下面的文档，然后简短地回答最后的问题。\n{haystack}\n\n问题：{question}",
        subjects=("小明", "小红", "小刚", "李雷", "韩梅", "王芳", "张伟"),
        answers=(
            "上海人工智能实验室", "北京天文馆", "广州植物园", "成都水电站", "杭州图书馆",
            "南京博物院", "青岛造船厂", "西安气象台",
        ),
        buffer=200,
    ),
    "en": NeedleText(
        needle="The favourite internship place of {subject} is the {answer}.",
        question="What is the favourite internship place of {subject}? Answer in the form "
        '"The favourite internship place of {subject} is the ________."',
        opening="The favourite internship place of {subject} is the",
        prompt="Read the document below, then answer the question at its end in one sentence.\n"
        "{haystack}\n\nQuestion: {question}",
        subjects=("Anna", "Boris", "Chen", "Dalia", "Emil", "Farah", "Goran"),
        answers=(
            "Shanghai AI Laboratory", "Lisbon planetarium", "Bergen fish market",
            "Nairobi seed bank", "Quito observatory", "Dublin print museum",
            "Hobart weather station", "Kyoto railway yard",
        ),
        buffer=600,
    ),
}  # fmt: skip

# A sentence ends at Chinese full stops, at Latin ones before white space, or at a line's end.
_SENTENCE_END = re.compile(r"[。！？]|[.!?](?=\s)|\n")


@dataclass(frozen=True)
class Sample:
    """One prompt. `num_tokens` counts the whole of it; `position` is the needle's real depth, 0..1,
    in characters of the haystack."""

    prompt: str
    opening: str
    needle: str
    answer: str
    distractors: tuple[str, ...]
    num_tokens: int
    position: float


def edit_score(response: str, reference: str) -> float:
    """1 - Levenshtein distance / longer length, whitespace removed from both; 1 for two blanks."""
    a, b = ("".join(text.split()) for text in (response, reference))
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return 1 - row[-1] / max(len(a), len(b), 1)


def needle_score(response: str, sample: Sample) -> float:
    """1 when the keyword occurs, else a fifth of the edit score (OpenCompass NeedleBench)."""
    found = keyword_score(response, sample)
    return found or 0.2 * edit_score(response, sample.needle)


def keyword_score(response: str, sample: Sample) -> float:
    """1 when the answer occurs in the response as it stands, else 0."""
    return float(sample.answer in response)


GENERATION_SCORES: dict[str, Callable[[str, Sample], float]] = {
    "keyword": keyword_score,
    "edit": lambda response, sample: edit_score(response, sample.needle),
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


def insert(haystack: str, needle: str, depth: float) -> tuple[str, float]:
    """Puts `needle` on its own line at the sentence end nearest to `depth` percent.

    Both ends of the text count as sentence ends. Returns the text and the needle's depth in 0..1.
    """
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(haystack)), len(haystack)]
    place = min(ends, key=lambda end: abs(end - len(haystack) * depth / 100))
    text = f"{haystack[:place]}\n{needle}\n{haystack[place:]}"
    return text, place / max(len(haystack), 1)


def build_sample(
    tokenizer: Tokenizer,
    haystack: Haystack,
    length: int,
    depth: float,
    *,
    language: str = "en",
    index: int = 0,
    num_distractors: int = 3,
    buffer: int | None = None,
) -> Sample:
    """One prompt of at most `length - buffer` tokens, question included, and close to it.

    length: tokens of the whole test; buffer: those left for the answer (default: the language's).
    depth: percent, 0 = start of the haystack, 100 = right before the question.
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
    subject = text.subjects[index % len(text.subjects)]
    answers = [text.answers[(index + i) % len(text.answers)] for i in range(num_distractors + 1)]
    needle = text.needle.format(subject=subject, answer=answers[0])
    question = text.question.format(subject=subject)
    room = length - (text.buffer if buffer is None else buffer)

    def render(num_tokens: int) -> tuple[str, float, int]:
        content, position = insert(haystack.take(num_tokens), needle, depth)
        prompt = text.prompt.format(haystack=content, question=question)
        return prompt, position, len(tokenizer.encode(prompt))

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
    prompt, position, num_tokens = rendered
    return Sample(
        prompt=prompt, opening=text.opening.format(subject=subject), needle=needle,
        answer=answers[0], distractors=tuple(answers[1:]), num_tokens=num_tokens, position=position,
    )  # fmt: skip


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
                        num_distractors=num_distractors, buffer=buffer,
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
        mark = GENERATION_SCORES[score]
        return [mark(text, sample) for text, sample in zip(responses, samples, strict=True)]
    assert likelihood is not None
    requests = [(f"{s.prompt}\n{s.opening}", _continuations(s)) for s in samples]
    return [LIKELIHOOD_SCORES[score](logps) for logps in likelihood(requests)]


def _continuations(sample: Sample) -> list[str]:
    """The right answer first, joined as in the needle: a space in English, none in Chinese."""
    gap = sample.needle[len(sample.opening) : sample.needle.index(sample.answer)]
    return [gap + answer for answer in (sample.answer, *sample.distractors)]


def _check(score: str, generate: GenerateFn | None, likelihood: LikelihoodFn | None) -> None:
    """A UserError for an unknown score or one whose function is missing."""
    known = [*GENERATION_SCORES, *LIKELIHOOD_SCORES]
    if score not in known:
        raise UserError(f"needle score {score!r} is unknown; choose from {', '.join(known)}")
    given = generate if score in GENERATION_SCORES else likelihood
    if given is None:
        argument = "generate" if score in GENERATION_SCORES else "likelihood"
        raise UserError(f"needle score {score!r} needs the `{argument}` function; pass one")
