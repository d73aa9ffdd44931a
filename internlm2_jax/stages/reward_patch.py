"""COOL RLHF's fast path: find how the policy games the reward model, and patch that model.

InternLM2 section 4.2.2: after a round of PPO, hacking patterns are looked for, 20 to 100 preference
pairs that set early against late responses are made for each, and the reward model learns them
before the next round. Here the patterns are measurable ones (rlhf/hacking.py) and the one whose
rate rose most significantly is patched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internlm2_jax import files
from internlm2_jax.data import chat
from internlm2_jax.data.preferences import DOMAINS
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.infer import engine
from internlm2_jax.infer.sampling import Sampling
from internlm2_jax.rlhf import hacking
from internlm2_jax.rlhf.scoring import Scorer, accuracy, load_domains
from internlm2_jax.stages.reward_model import RewardTraining, train_pairs
from internlm2_jax.train.checkpoint import load_model


def _samples(
    stage: Path,
    rows: Sequence[Mapping],
    vocabulary: Tokenizer,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[hacking.Sample]:
    """One sampled response per prompt from the model of `stage`."""
    model, params = load_model(stage)
    prompts = [chat.render(r["messages"], vocabulary, add_generation_prompt=True).ids for r in rows]
    out = engine.generate(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature),
        seed=seed,
        stop_ids=(vocabulary.eos_id, vocabulary.im_end_id),
    )
    return [
        hacking.Sample(
            row["messages"][-1]["content"], vocabulary.decode(ids), bool(done), row["domain"]
        )
        for row, ids, done in zip(rows, out.tokens, out.finished, strict=True)
    ]


def reward_patch(
    folder: Path,
    *,
    tokenizer: Path,
    instructions: Path,
    reward: Path,
    early: Path,
    late: Path,
    training: RewardTraining,
    num_prompts: int = 256,
    max_pairs: int = 100,
    patch_share: float = 0.5,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Patches the reward model of stage `reward` with pairs of `early` over `late` responses.

    The patch takes `patch_share` of every batch, the model's own training pairs the rest, so that
    it forgets nothing. When no pair that fits a row shows the strongest pattern, only the latter
    are used, and result.json says so.
    """
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    rows = files.read_jsonl(instructions / "prompts.jsonl")[:num_prompts]
    before, after = (
        _samples(stage, rows, vocabulary, max_new_tokens, temperature, seed)
        for stage in (early, late)
    )
    findings = hacking.measure(before, after)
    strongest = findings[0]
    patch: list[dict[str, Any]] = []
    for domain in DOMAINS:
        clean = [s for s in before if s.domain == domain]
        hacked = [s for s in after if s.domain == domain]
        room = max_pairs - len(patch)
        if clean and hacked and room:
            patch += hacking.patch_pairs(
                strongest.pattern, clean, hacked, domain, n=room, seed=seed
            )
    domains = load_domains(reward)
    patch = [pair for pair in patch if training.fits(pair, vocabulary, domains)]
    files.write_jsonl(folder / "patch.jsonl", patch)

    replay = files.read_jsonl(instructions / "preferences.jsonl")
    sources = {"replay": (training.source(replay, vocabulary, domains), 1 - patch_share)}
    if patch:
        sources["patch"] = (training.source(patch, vocabulary, domains), patch_share)
    model, params = load_model(reward)
    scorer = Scorer(model, vocabulary, training.longest, domains=domains)
    measured = {
        "patch_accuracy_before": accuracy(scorer.pairs(params, patch)) if patch else None,
        "reward_of_early": _mean_score(scorer, params, before),
        "reward_of_late": _mean_score(scorer, params, after),
    }
    train_pairs(
        folder,
        model,
        params,
        vocabulary,
        sources,
        held_out=files.read_jsonl(instructions / "preferences_validation.jsonl"),
        domains=domains,
        training=training,
        seed=seed,
        label="reward patch",
    )
    _, patched = load_model(folder)
    accuracy_after = accuracy(scorer.pairs(patched, patch)) if patch else None
    files.write_json(
        folder / "result.json",
        {
            **files.read_json(folder / "result.json"),
            "hacking": {
                **dataclasses.asdict(strongest),
                "num_pairs": len(patch),
                "patch_accuracy_after": accuracy_after,
                **measured,
            },
            "patterns": [dataclasses.asdict(f) for f in findings],
        },
    )


def _mean_score(scorer: Scorer, params: Any, samples: Sequence[hacking.Sample]) -> float:
    judged = [(s.domain, [{"role": "user", "content": s.prompt}], s.response) for s in samples]
    return float(np.mean(scorer(params, judged)))
