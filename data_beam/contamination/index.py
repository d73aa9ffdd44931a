"""One file with all that a worker needs to recognise evaluation examples in a text.

* Every run of `n` = 13 words of a question or a solution (GPT-3, Brown et al. 2020, appendix C).
* A question of fewer words is one run. From `min_words` = 8 on (GPT-3's smallest n) it counts by
  itself; below, only with its answer near it, and when both together have `min_words` words. What
  is shorter still is counted as too short to be told from ordinary text.
* A run says something only with `_TELLING` = 3 words of two letters or more (or characters of a
  script without spaces): counting from 0 to 12 is no evidence.
* A text with line breaks or quotes is indexed as it looks inside a JSON string as well: evaluation
  sets leak as their own files. GSM8K's <<16-3=13>> is indexed with and without.

The file is in safetensors form; the same examples give the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import orjson
import safetensors.numpy
from safetensors import SafetensorError

from data_beam.contamination.benchmarks import EvaluationSet
from data_beam.contamination.words import Words, words_of
from data_beam.io import storage
from data_beam.kernels.ngrams import HashSet, Postings, Runs
from data_beam.kernels.tokens import IDEOGRAPH, character_classes
from internlm2_jax.errors import UserError
from internlm2_jax.files import json_bytes

QUESTION, ANSWER = 0, 1  # the last bit of a posting of `grams`
ALONE, WITH_ANSWER = 0, 1  # the last bit of a posting of `runs`
ANCHOR = 3  # words; the last ones of a short question, looked up before it
_LONGEST_FINAL = 12  # words of an answer that is looked for as a whole
_TELLING = 3
_EXCERPT = 400  # characters of a question kept for the report
_NUMBER = re.compile(r"[-+]?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)(?:\\?%)?")
_CALCULATOR = re.compile(r"<<.*?>>")


class Index:
    """`grams` and `runs` map hashes to example * 2 + bit; `examples` have "id", "set" (a number),
    "question", "answer", "finals" and "totals" (the distinct grams of its questions and answers);
    `sets` are rows of counts per evaluation set."""

    def __init__(self, meta: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.meta = meta
        self.n: int = meta["n"]
        self.sets: list[dict[str, Any]] = meta["sets"]
        self.run_lengths: list[int] = meta["run_lengths"]
        self.examples: list[dict[str, Any]] = orjson.loads(arrays["examples"].tobytes())
        self.grams = _postings(arrays, "grams")
        self.runs = _postings(arrays, "runs")
        self.gram_set = HashSet(self.grams.keys)
        self.run_set = HashSet(self.runs.keys)
        self.anchors = HashSet(arrays["anchors"])

    def ignoring(self, keys: np.ndarray) -> Index:
        """The same without some of the runs of n words."""
        other = Index.__new__(Index)
        other.__dict__.update(self.__dict__)
        other.grams = self.grams.without(keys)
        other.gram_set = HashSet(other.grams.keys)
        return other


def build(
    sets: Sequence[EvaluationSet],
    output: str | os.PathLike,
    *,
    n: int = 13,
    min_words: int = 8,
    answers: bool = True,
) -> dict[str, Any]:
    """Writes the index file `output`. With `answers` off, only questions are looked for.

    Returns {"digest", "n", "sets": [{"name", "examples", "indexed", "too_short", "unusable"}]}.
    """
    if not ANCHOR <= min_words <= n:
        raise UserError(f"min_words {min_words} is not between {ANCHOR} and n = {n}; try 8 and 13")
    names = [some.name for some in sets]
    if len(set(names)) < len(names) or not names:
        raise UserError(
            f"evaluation sets need names of their own, not {', '.join(names) or 'none'}"
        )
    builder = _Builder(n, min_words, answers)
    rows = [builder.add(number, some) for number, some in enumerate(sets)]
    arrays, run_lengths = builder.arrays()
    meta = {"words": _words_probe(), "n": n, "min_words": min_words, "sets": rows,
            "run_lengths": run_lengths}  # fmt: skip
    # One key only: safetensors writes several in the order of a randomised hash.
    data = safetensors.numpy.save(arrays, {"contamination": json_bytes(meta).decode()})
    with storage.whole(output) as path:
        path.write_bytes(data)
    return {"digest": hashlib.blake2b(data, digest_size=16).hexdigest(), "n": n, "sets": rows}


@functools.lru_cache(maxsize=4)
def load(path: str, expected: str = "") -> Index:
    """Reads an index, once in a process. With `expected`, one of another digest is a UserError."""
    try:
        with storage.open_read(path) as handle:
            data = handle.read()
        with_header = safetensors.numpy.load(data)
        size = int.from_bytes(data[:8], "little")
        meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["contamination"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not a contamination index ({error}); build it from the evaluation sets"
        ) from error
    found = hashlib.blake2b(data, digest_size=16).hexdigest()
    if expected not in ("", found):
        raise UserError(f"{path} is not the index that the job began with; start the job again")
    if meta.get("words") != _words_probe():
        raise UserError(f"{path} was written by another version of this program; build it again")
    return Index(meta, with_header)


def _words_probe() -> str:
    """Changes whenever the hashes of words do: those of an older program would match nothing."""
    return f"{Runs(words_of(chr(92) + 'dfrac a_1 42 naïve 中文').hashes).whole():016x}"


class _Builder:
    def __init__(self, n: int, min_words: int, answers: bool):
        self.n, self.min_words, self.with_answers = n, min_words, answers
        self.grams: list[tuple[np.ndarray, int]] = []
        self.runs: list[tuple[np.ndarray, int]] = []
        self.anchors: list[np.ndarray] = [np.zeros(0, np.uint64)]
        self.run_lengths: set[int] = set()
        self.examples: list[dict[str, Any]] = []

    def add(self, number: int, evaluation: EvaluationSet) -> dict[str, Any]:
        indexed = 0
        for example in evaluation.examples:
            finals = list(dict.fromkeys(f for a in example.answers if (f := final_answer(a))))
            totals = [
                sum(self._add_question(text, finals) for text in example.questions),
                sum(map(self._add_answer, example.answers)) if self.with_answers else 0,
            ]
            indexed += totals[QUESTION] > 0
            self.examples.append({
                "id": example.id, "set": number, "finals": finals, "totals": totals,
                "question": "\n\n".join(example.questions)[:_EXCERPT],
                "answer": "\n\n".join(example.answers)[:_EXCERPT],
            })  # fmt: skip
        count = len(evaluation.examples)
        return {"name": evaluation.name, "examples": count, "indexed": indexed,
                "too_short": count - indexed, "unusable": evaluation.unusable}  # fmt: skip

    def _add_question(self, text: str, finals: list[str]) -> int:
        """How many different grams and runs of the text as it stands were added."""
        total = 0
        for variant in _variants(text):
            found = self._add_text(variant, QUESTION)
            found = found or self._add_run(variant, finals)
            total = total or found
        return total

    def _add_answer(self, text: str) -> int:
        first, *_ = (self._add_text(variant, ANSWER) for variant in _variants(text))
        return first

    def _add_text(self, text: str, role: int) -> int:
        words = words_of(text)
        keys = np.unique(Runs(words.hashes).all(self.n)[_telling(text, words, self.n)])
        self.grams.append((keys, len(self.examples) * 2 + role))
        return len(keys)

    def _add_run(self, text: str, finals: list[str]) -> int:
        words = words_of(text)
        hashes = words.hashes
        longest = max((len(words_of(final).hashes) for final in finals), default=0)
        if not ANCHOR <= len(hashes) < self.n or len(hashes) + longest < self.min_words:
            return 0
        if not _telling(text, words, len(hashes))[0]:
            return 0
        need = ALONE if len(hashes) >= self.min_words else WITH_ANSWER
        runs = Runs(hashes)
        self.runs.append((runs.all(len(hashes)), len(self.examples) * 2 + need))
        self.anchors.append(runs.at(np.array([len(hashes) - ANCHOR]), ANCHOR))
        self.run_lengths.add(len(hashes))
        return 1

    def arrays(self) -> tuple[dict[str, np.ndarray], list[int]]:
        arrays = {
            "anchors": np.unique(np.concatenate(self.anchors)),
            "examples": np.frombuffer(orjson.dumps(self.examples), np.uint8),
        }
        for name, pairs in (("grams", self.grams), ("runs", self.runs)):
            arrays |= {f"{name}.{k}": v for k, v in Postings.build(pairs)._asdict().items()}
        return arrays, sorted(self.run_lengths)


def _postings(arrays: dict[str, np.ndarray], name: str) -> Postings:
    return Postings(*(arrays[f"{name}.{field}"] for field in Postings._fields))


def _telling(text: str, words: Words, n: int) -> np.ndarray:
    """[max(W - n + 1, 0)] bool: which runs of n words hold enough that say something."""
    lowered = text.lower()
    spans = zip(words.starts.tolist(), words.ends.tolist(), strict=True)
    texts = [lowered[start:end] for start, end in spans]
    letters = [sum(map(str.isalpha, text)) for text in texts]
    unspaced = character_classes()[[ord(text[0]) for text in texts]] == IDEOGRAPH
    sums = np.append(0, np.cumsum((np.array(letters, int) >= 2) | unspaced))
    return sums[n:] - sums[: max(len(sums) - n, 0)] >= _TELLING


def _variants(text: str) -> Iterable[str]:
    text = unicodedata.normalize("NFC", text)
    shown = _CALCULATOR.sub("", text)
    return dict.fromkeys([text, shown, json.dumps(text)[1:-1], json.dumps(shown)[1:-1]])


def final_answer(text: str) -> str:
    """The bare answer in a solution: what follows GSM8K's ####, stands in the last \\boxed{}, or
    the whole text if it is short. "" when there is none, or only the letter of a choice."""
    if "####" in text:
        text = text.rpartition("####")[2]
    elif "\\boxed{" in text:
        text = _braced(text, text.rindex("\\boxed{") + len("\\boxed{"))
    text = unicodedata.normalize("NFC", text.strip())
    if number(text):
        return number(text)
    words = len(words_of(text).hashes)
    return text if 0 < words <= _LONGEST_FINAL and len(text) > 1 else ""


def _braced(text: str, start: int) -> str:
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end]
    return text[start:]


def number(text: str) -> str:
    """A number in one form of the many it can be written in ("$1,200.00" -> "1200"), else ""."""
    match = _NUMBER.fullmatch(text.strip().rstrip("."))
    return _canonical(match) if match else ""


def numbers(text: str) -> set[str]:
    """All numbers that a text holds, in that form."""
    return {_canonical(match) for match in _NUMBER.finditer(text)}


def _canonical(match: re.Match) -> str:
    sign = "-" if match[0].startswith("-") else ""
    value = Decimal(match[1].replace(",", "")).normalize()
    return sign + format(value, "f") if value else "0"
