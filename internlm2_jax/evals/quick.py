"""A suite as a quick evaluation while a model trains (`suites` of the pre-training stage)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.errors import UserError
from internlm2_jax.evals import hub, runner, suites, totals
from internlm2_jax.evals.asking import Asking
from internlm2_jax.evals.items import Loaded
from internlm2_jax.evals.subject import Subject, left_of
from internlm2_jax.models.build import Model


@dataclasses.dataclass(frozen=True)
class QuickSuite:
    """Called with model, parameters and tokenizer it gives {"score": the mean over its items}.

    suite: a name, or a YAML file of one suite. data: a folder or a hub id; default the suite's id.
    limit: so many items, evenly spread over all. shots: default the suite's.
    """

    suite: str
    data: str | None = None
    limit: int | None = 64
    shots: int | None = None

    def load(self, tokenizer: Tokenizer) -> tuple[suites.Suite, Loaded]:
        """Reads the items, once in a process. Errors: UserError for what is not there or is bad."""
        return _load(self, tokenizer)

    def check(self, tokenizer: Tokenizer, max_length: int) -> None:
        """Errors: UserError for what `load` finds, or for answers longer than so many tokens."""
        suite, loaded = self.load(tokenizer)
        if suite.method != "likelihood":
            for group in {item.group for item in loaded.items}:
                left_of(max_length, suite.of_group(group).max_new_tokens)

    def __call__(self, model: Model, params: Any, tokenizer: Tokenizer) -> dict[str, float | None]:
        suite, loaded = self.load(tokenizer)
        asking = Asking(Subject(model, params, tokenizer), suite, loaded, seed=0, shot_seed=None)
        by_id = {result["id"]: result for result in asking.results(loaded.items)}
        ordered = [by_id[item.id] for item in loaded.items]
        return {"score": totals.totals(suite, ordered, model="", settings={})["score"]}


@functools.cache
def _load(quick: QuickSuite, tokenizer: Tokenizer) -> tuple[suites.Suite, Loaded]:
    found = suites.find(quick.suite)
    if len(found) != 1:
        raise UserError(
            f"{quick.suite} is {len(found)} suites; name one: {', '.join(s.name for s in found)}"
        )
    suite = found[0]
    if quick.shots is not None:
        suite = dataclasses.replace(suite, shots=quick.shots)
    return suite, runner.load(suite, hub.folder(suite, quick.data), tokenizer, quick.limit)
