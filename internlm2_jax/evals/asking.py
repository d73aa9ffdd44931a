"""Asks a model the items of a suite, in the way the suite says, and marks its answers."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from internlm2_jax.errors import UserError
from internlm2_jax.evals import prompts
from internlm2_jax.evals.formats import LETTERS
from internlm2_jax.evals.items import Item, Loaded
from internlm2_jax.evals.measures import MEASURES, Mark
from internlm2_jax.evals.subject import Said, Subject
from internlm2_jax.evals.suites import Suite
from internlm2_jax.infer.sampling import Sampling

TOGETHER = 16  # answers that are graded together


class Asking:
    """One suite on one model."""

    def __init__(
        self, subject: Subject, suite: Suite, loaded: Loaded, seed: int, shot_seed: int | None
    ) -> None:
        self._subject, self._suite, self._loaded = subject, suite, loaded
        self._seed, self._shot_seed = seed, shot_seed
        self._numbers = {item.id: n for n, item in enumerate(loaded.items)}

    def results(self, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        """A record of each item, in the order in which they end."""
        if self._suite.method == "session":
            from internlm2_jax.evals import session

            yield from session.results(self._subject, self._suite, items, self._seed)
        elif self._suite.method == "likelihood":
            yield from self._by_likelihood(items)
        else:
            yield from self._by_generation(items)

    def _turns(self, item: Item) -> tuple[Suite, prompts.Messages]:
        suite = self._suite.of_group(item.group)
        shots = prompts.examples_for(suite, item, self._loaded.pool, self._shot_seed)
        return suite, prompts.messages(suite, item, shots)

    def _ids(self, item: Item, room: int) -> tuple[np.ndarray, bool]:
        """Ids of the prompt, and whether its middle or left had to go."""
        suite, turns = self._turns(item)
        subject = self._subject
        ids = (
            subject.encode_chat(turns)
            if suite.chat
            else subject.encode(prompts.plain(suite, turns))
        )
        ids, cut = subject.cut(ids, room, suite.cut)
        return np.asarray(ids, np.int32), cut

    def _record(self, item: Item, cut: bool) -> dict[str, Any]:
        """`question` is the last turn, `prompt` all that was read, before anything was cut."""
        suite, turns = self._turns(item)
        text = "\n\n".join(t["content"] for t in turns)
        return {
            "id": item.id, "group": item.group, "where": item.where, "cut": cut,
            "prompt": text if suite.chat else prompts.plain(suite, turns),
            "question": prompts.messages(suite, item)[-1]["content"],
            "answers": list(item.answers),
        }  # fmt: skip

    # -------------------------------------------------------------------- likelihood
    def _by_likelihood(self, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        asked, kept = [], []
        for item in items:
            suite = self._suite.of_group(item.group)
            for turned in (item, _swapped(item)) if suite.measure == "judge" else (item,):
                texts = _labels(suite, turned)
                tails = [self._subject.tokenizer.encode(text) for text in texts]
                ids, cut = self._ids(turned, max(map(len, tails)))
                asked.append((ids, tails))
                kept.append((item, cut, [len(t.encode()) for t in texts]))
        halves: dict[str, dict[int, Any]] = {}
        for n, found in self._subject.likelihoods(asked):
            item, cut, sizes = kept[n]
            suite = self._suite.of_group(item.group)
            logprobs = [likely.logprob for likely in found]
            worth = np.asarray(logprobs) / (sizes if suite.by_bytes else 1)
            said = int(np.argmax(worth))
            record = self._record(item, cut) | {"logprobs": logprobs, "said": LETTERS[said]}
            if suite.measure != "judge":
                yield record | {"score": float(said in item.right)}
                continue
            halves.setdefault(item.id, {})[n] = record
            if len(halves[item.id]) == 2:
                yield _judged(item, *(r for _, r in sorted(halves.pop(item.id).items())))

    # -------------------------------------------------------------------- generation
    def _by_generation(self, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        suite, chosen = self._suite, {item.id for item in items}
        asked, cut, longest = {}, {}, 0
        for item in self._loaded.items:
            ids, shortened = self._ids(item, suite.of_group(item.group).max_new_tokens)
            longest = max(longest, len(ids))
            if item.id in chosen:
                asked[item.id], cut[item.id] = ids, shortened
        most = max(suite.of_group(i.group).max_new_tokens for i in self._loaded.items)
        order = [(item, sample) for item in items for sample in range(suite.samples)]
        own = [suite.of_group(item.group) for item, _ in order]
        stream = self._subject.answers(
            [asked[item.id] for item, _ in order],
            max_new_tokens=[s.max_new_tokens for s in own],
            sampling=Sampling(suite.temperature, top_p=suite.top_p),
            seeds=[(self._seed, self._numbers[i.id] * suite.samples + n) for i, n in order],
            stop=[s.stop for s in own],
            sizes=(len(self._loaded.items) * suite.samples, longest, most),
        )
        texts: dict[str, dict[int, Said]] = {}
        ready: list[Item] = []
        # The engine goes on while a thread grades: a test in the sandbox may take seconds.
        with concurrent.futures.ThreadPoolExecutor(1) as grader:
            graded: collections.deque[concurrent.futures.Future] = collections.deque()
            for number, said in stream:
                item, sample = order[number]
                texts.setdefault(item.id, {})[sample] = said
                if len(texts[item.id]) == suite.samples:
                    ready.append(item)
                if len(ready) * suite.samples >= TOGETHER:
                    graded.append(grader.submit(self._graded, ready, texts, cut))
                    ready = []
                while graded and (graded[0].done() or len(graded) > 4):
                    yield from graded.popleft().result()
            graded.append(grader.submit(self._graded, ready, texts, cut))
            for future in graded:
                yield from future.result()

    def _graded(
        self, items: Sequence[Item], texts: dict[str, dict[int, Said]], cut: Mapping[str, bool]
    ) -> list[dict[str, Any]]:
        count = range(self._suite.samples)
        said = {item.id: [texts[item.id][n] for n in count] for item in items}
        marks: dict[str, list[Mark]] = {item.id: [] for item in items}
        alike: dict[str, list[Item]] = {}
        for item in items:
            alike.setdefault(item.group if item.group in self._suite.groups else "", []).append(
                item
            )
        for group, members in alike.items():
            suite = self._suite.of_group(group)
            pairs = [(item, answer.text) for item in members for answer in said[item.id]]
            for (item, _), mark in zip(pairs, MEASURES[suite.measure](suite, pairs), strict=True):
                marks[item.id].append(mark)
        records = []
        for item in items:
            outputs = [
                {"text": a.text, "tokens": len(a.tokens), "finished": a.finished}
                | dataclasses.asdict(mark)
                for a, mark in zip(said[item.id], marks[item.id], strict=True)
            ]
            known = [mark.score for mark in marks[item.id] if mark.score is not None]
            score = sum(known) / len(known) if known else None
            record = self._record(item, cut[item.id])
            records.append(record | {"outputs": outputs, "score": score})
        return records


def _labels(suite: Suite, item: Item) -> list[str]:
    """The continuations of which the likeliest is the model's choice."""
    before = "" if suite.chat else suite.glue
    if not item.choices:
        raise UserError(f"suite {suite.name}: items of format {suite.format} have no choices")
    texts = item.choices if suite.labels == "texts" else LETTERS[: len(item.choices)]
    return [before + text for text in texts]


def _swapped(item: Item) -> Item:
    return dataclasses.replace(
        item, choices=item.choices[::-1], right=tuple(1 - i for i in item.right)
    )


def _judged(item: Item, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both orders in one: right in both is 1, in one of them 1/2; `consistent`: the same answer is
    preferred wherever it stands."""
    ways = [LETTERS.index(first["said"]), 1 - LETTERS.index(second["said"])]
    return first | {
        "said": [first["said"], second["said"]],
        "logprobs": [first["logprobs"], second["logprobs"]],
        "consistent": ways[0] == ways[1],
        "score": sum(way in item.right for way in ways) / 2,
    }
