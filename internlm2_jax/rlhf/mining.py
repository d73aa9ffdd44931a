"""What a round of PPO did to the policy: samples, patterns of hacking, pairs against them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internlm2_jax.data import chat
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.rlhf import hacking, ngrams, rollout
from internlm2_jax.rlhf.hacking import Finding, Pattern, Sample
from internlm2_jax.rlhf.ppo import next_token_logprobs
from internlm2_jax.rlhf.scoring import Scorer
from internlm2_jax.train.checkpoint import load_model


class Sampler:
    """Samples one answer a prompt of any policy; with its score and its KL to the reference."""

    def __init__(
        self,
        rows: Sequence[Mapping],
        vocabulary: Tokenizer,
        *,
        reference: Path,
        scorer: Scorer,
        reward_params: Any,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        batch_size: int = 64,
    ):
        self._rows, self._vocabulary = rows, vocabulary
        self._prompts = [
            chat.render(r["messages"], vocabulary, add_generation_prompt=True).ids for r in rows
        ]
        self._model, self._reference = load_model(reference)
        self._scorer, self._reward_params = scorer, reward_params
        self._new, self._temperature, self._seed = max_new_tokens, temperature, seed
        self._batch = batch_size
        self._logprobs = jax.jit(next_token_logprobs, static_argnums=0)

    def __call__(self, stage: Path) -> list[Sample]:
        """Answers of the model of `stage`."""
        model, params = load_model(stage)
        found: list[Sample] = []
        for start in range(0, len(self._rows), self._batch):
            rows = self._rows[start : start + self._batch]
            sampled = rollout.sample(
                model,
                params,
                self._prompts[start : start + self._batch],
                prompt_length=max(map(len, self._prompts)),
                max_new_tokens=self._new,
                sampling=Sampling(temperature=self._temperature),
                seed=self._seed + start,
                stop_ids=(self._vocabulary.eos_id, self._vocabulary.im_end_id),
                pad_id=self._vocabulary.pad_id,
            )
            texts = [self._vocabulary.decode(response) for response in sampled.responses]
            reference = np.asarray(self._logprobs(self._model, self._reference, sampled.tokens))
            kl = np.where(sampled.mask, sampled.logprobs - reference, 0.0).sum(axis=1)
            scores = self._scorer(
                self._reward_params,
                [(r["domain"], r["messages"], text) for r, text in zip(rows, texts, strict=True)],
            )
            found += [
                Sample(
                    row["messages"][-1]["content"],
                    texts[i],
                    bool(sampled.finished[i]),
                    row["domain"],
                    float(scores[i]),
                    float(kl[i]),
                )
                for i, row in enumerate(rows)
            ]
        return found


def patterns_and_findings(
    early: Sequence[Sample], late: Sequence[Sample], most_phrases: int = 5
) -> tuple[dict[str, Pattern], list[Finding]]:
    """The known patterns and the mined phrases, and how often each is shown, worst first."""
    mined, of_phrases = ngrams.mine(early, late, most_phrases)
    findings = hacking.ordered([*hacking.measure(early, late), *of_phrases])
    return {**hacking.PATTERNS, **mined}, findings


def patches(
    patterns: Mapping[str, Pattern],
    findings: Sequence[Finding],
    early: Sequence[Sample],
    late: Sequence[Sample],
    domains: Sequence[str],
    *,
    pairs_per_pattern: int = hacking.MAX_PAIRS,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Early-over-late pairs against each pattern that was observed, domains in turn.

    A pattern of which the samples give fewer than MIN_PAIRS pairs has what there is: the report
    asks for 20 to 100.
    """
    made = {}
    for finding in findings:
        if not finding.observed:
            continue
        pairs: list[dict[str, Any]] = []
        for place, domain in enumerate(domains):
            room = pairs_per_pattern - len(pairs)
            share = -(-room // (len(domains) - place))
            clean = [s for s in early if s.domain == domain]
            hacked = [s for s in late if s.domain == domain]
            if clean and hacked and share:
                pairs += hacking.patch_pairs(
                    finding.pattern, clean, hacked, domain, n=share, seed=seed, patterns=patterns
                )
        made[finding.pattern] = pairs
    return made


def rows_of(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(sample) for sample in samples]
