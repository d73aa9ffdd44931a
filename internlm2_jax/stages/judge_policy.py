"""What a policy is worth where the truth is known: tasks with answers, requests to be declined.

The reward model has no say in it, so this tells a policy that got better from one that got paid.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internlm2_jax import files
from internlm2_jax.data import chat
from internlm2_jax.data.risky import is_refusal
from internlm2_jax.data.tasks import Task, check
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.infer import engine
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.rlhf import hacking
from internlm2_jax.rlhf.annotation import rule_judge
from internlm2_jax.rlhf.hacking import Sample
from internlm2_jax.train.checkpoint import load_model


def judge_policy(
    folder: Path,
    *,
    tokenizer: Path,
    instructions: Path,
    policy: Path,
    sft: Path,
    arm: str = "",
    judge: Callable[[Mapping[str, Any]], str] = rule_judge,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Samples answers to held-out prompts (eval_tasks.jsonl, eval_requests.jsonl), and judges them.

    result.json, "gold": task_accuracy (share right), refusals (share of risky requests declined),
    over_refusals (of tasks declined), good (right or declined as the domain wants, all prompts),
    win_rate (against `sft`'s answers by `judge`, ties half); "hacking": the share of answers that
    show each pattern; "length" in words; "finished".
    """
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    rows = [
        row
        for name in ("eval_tasks", "eval_requests")
        for row in files.read_jsonl(instructions / f"{name}.jsonl")
    ]
    sample = _Sampler(rows, vocabulary, max_new_tokens, temperature, seed)
    base = sample(sft)
    own = base if policy == sft else sample(policy)
    good = np.array([_good(row, s.response) for row, s in zip(rows, own, strict=True)])
    is_task = np.array([bool(row["task"]) for row in rows])
    refused = np.array([is_refusal(s.response) for s in own])
    context = hacking.context_of(own, base)
    shown = {
        pattern.name: float(np.mean([pattern.shown_by(s, context) for s in own]))
        for pattern in hacking.PATTERNS.values()
        if not pattern.name.endswith("outlier")
    }
    files.write_jsonl(
        folder / "samples.jsonl",
        [
            {"domain": s.domain, "prompt": s.prompt, "response": s.response, "good": bool(g)}
            for s, g in zip(own, good, strict=True)
        ],
    )
    files.write_json(
        folder / "result.json",
        {
            "arm": arm,
            "gold": {
                "task_accuracy": float(good[is_task].mean()),
                "refusals": float(refused[~is_task].mean()),
                "over_refusals": float(refused[is_task].mean()),
                "good": float(good.mean()),
                "win_rate": _wins(rows, own, base, judge),
            },
            "hacking": {**shown, "any": _any_shown(own, context)},
            "length": float(np.mean([len(s.response.split()) for s in own])),
            "finished": float(np.mean([s.finished for s in own])),
        },
    )


class _Sampler:
    def __init__(
        self,
        rows: Sequence[Mapping],
        vocabulary: Tokenizer,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ):
        self._rows, self._vocabulary = rows, vocabulary
        self._prompts = [
            chat.render(row["messages"], vocabulary, add_generation_prompt=True).ids for row in rows
        ]
        self._new, self._sampling, self._seed = max_new_tokens, Sampling(temperature), seed

    def __call__(self, stage: Path) -> list[Sample]:
        out = engine.generate(
            *load_model(stage),
            self._prompts,
            max_new_tokens=self._new,
            sampling=self._sampling,
            seed=self._seed,
            stop_ids=(self._vocabulary.eos_id, self._vocabulary.im_end_id),
        )
        return [
            Sample(
                row["messages"][-1]["content"],
                self._vocabulary.decode(ids),
                bool(done),
                row["domain"],
            )
            for row, ids, done in zip(self._rows, out.tokens, out.finished, strict=True)
        ]


def _good(row: Mapping[str, Any], answer: str) -> bool:
    return check(Task(**row["task"]), answer) if row["task"] else is_refusal(answer)


def _wins(
    rows: Sequence[Mapping], own: Sequence[Sample], base: Sequence[Sample], judge: Callable
) -> float:
    points = {"a": 1.0, "tie": 0.5, "b": 0.0}
    verdicts = collections.Counter(
        judge({**row, "a": a.response, "b": b.response})
        for row, a, b in zip(rows, own, base, strict=True)
    )
    return sum(points[v] * count for v, count in verdicts.items()) / len(rows)


def _any_shown(samples: Sequence[Sample], context: hacking.Context) -> float:
    found = [any(p.shown_by(s, context) for p in hacking.PATTERNS.values()) for s in samples]
    return float(np.mean(found))
