"""The two halves of a round of COOL RLHF around its PPO: train the judge, find how it was gamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internlm2_jax import files
from internlm2_jax.data.tokenizer import Tokenizer
from internlm2_jax.rlhf import annotation, mining
from internlm2_jax.rlhf.annotation import Comparisons
from internlm2_jax.rlhf.hacking import MIN_PAIRS
from internlm2_jax.rlhf.scoring import Scorer, accuracy, load_domains
from internlm2_jax.stages.reward_model import RewardTraining, train_pairs
from internlm2_jax.train.checkpoint import load_model

ANNOTATION, SNAPSHOT = "annotation", "labels.jsonl"


@dataclasses.dataclass(frozen=True)
class Mining:
    """How a round is searched for reward hacking, and what becomes of what is found.

    Attributes:
        num_prompts: of the rollouts' prompts, answered by the policy before and after the round.
        pairs_per_pattern: most patch pairs against one pattern (20 to 100 in the report).
        phrases: most mined phrases.
        comparisons: of the batch that people label.
        max_new_tokens, temperature: of the answers.
    """

    num_prompts: int = 512
    pairs_per_pattern: int = 100
    phrases: int = 5
    comparisons: int = 100
    max_new_tokens: int = 64
    temperature: float = 1.0


def next_reward_model(
    folder: Path,
    *,
    tokenizer: Path,
    instructions: Path,
    reward: Path,
    rounds: Sequence[Path],
    training: RewardTraining,
    labelled: Sequence[Path] | None = None,
    patch_share: float = 0.3,
    label_share: float = 0.2,
    seed: int = 0,
) -> None:
    """Trains the reward model of stage `reward` on: first pairs, patches and labels of `rounds`.

    Labels are those that are there when the stage starts; they are kept in labels.jsonl, so a
    continued run has the same ones, however many have come since. Patches and labels take their
    shares of every batch, the first pairs the rest, so that nothing is forgotten.

    Args:
        labelled: the rounds whose labels count; default: all of `rounds`.
    """
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    snapshot = folder / SNAPSHOT
    if not snapshot.is_file():
        batches = [Comparisons(r / ANNOTATION) for r in (rounds if labelled is None else labelled)]
        files.write_jsonl(snapshot, [pair for batch in batches for pair in batch.pairs()])
    patch = [pair for r in rounds for pair in files.read_jsonl(r / "patch.jsonl")]
    labels = files.read_jsonl(snapshot)
    domains = load_domains(reward)
    model, params = load_model(reward)
    scorer = Scorer(model, vocabulary, training.longest, domains=domains)
    extra = {"patch": (patch, patch_share), "labels": (labels, label_share)}
    extra = {name: (pairs, share) for name, (pairs, share) in extra.items() if pairs}
    before = {name: accuracy(scorer.pairs(params, pairs)) for name, (pairs, _) in extra.items()}
    first = files.read_jsonl(instructions / "preferences.jsonl")
    rest = 1 - sum(share for _, share in extra.values())
    train_pairs(
        folder,
        model,
        params,
        vocabulary,
        {
            name: (training.source(pairs, vocabulary, domains), share)
            for name, (pairs, share) in {"pairs": (first, rest), **extra}.items()
        },
        held_out=files.read_jsonl(instructions / "preferences_validation.jsonl"),
        domains=domains,
        training=training,
        seed=seed,
        label="reward model",
    )
    _, params = load_model(folder)
    after = {name: accuracy(scorer.pairs(params, pairs)) for name, (pairs, _) in extra.items()}
    result = files.read_json(folder / "result.json")
    files.write_json(folder / "result.json", {**result, "before": before, "after": after})


def mine_round(
    folder: Path,
    *,
    tokenizer: Path,
    instructions: Path,
    reward: Path,
    reference: Path,
    early: Path,
    late: Path,
    mining_config: Mining,
    reward_row_length: int,
    judge: str = "",
    seed: int = 0,
) -> None:
    """Looks for reward hacking between the policies `early` and `late`, and prepares the mending.

        samples_NAME.jsonl       answers of reference, early and late, with score and KL
        patch.jsonl              the fast path: early-over-late pairs against every pattern
        annotation/              the slow path: comparisons for people (rlhf/annotation.py)

    With a `judge`, one of annotation.JUDGES labels the comparisons at once.
    """
    vocabulary = Tokenizer.load(tokenizer / "tokenizer.model")
    rows = files.read_jsonl(instructions / "prompts.jsonl")[: mining_config.num_prompts]
    reward_model, reward_params = load_model(reward)
    domains = load_domains(reward)
    sampler = mining.Sampler(
        rows,
        vocabulary,
        reference=reference,
        scorer=Scorer(reward_model, vocabulary, reward_row_length, domains=domains),
        reward_params=reward_params,
        max_new_tokens=mining_config.max_new_tokens,
        temperature=mining_config.temperature,
        seed=seed,
    )
    policies = {name: sampler(at) for name, at in _distinct(reference, early, late).items()}
    for name, samples in policies.items():
        files.write_jsonl(folder / f"samples_{name}.jsonl", mining.rows_of(samples))
    before, after = policies.get("early", policies["reference"]), policies["late"]
    patterns, findings = mining.patterns_and_findings(before, after, mining_config.phrases)
    made = mining.patches(
        patterns,
        findings,
        before,
        after,
        list(dict.fromkeys(row["domain"] for row in rows)),
        pairs_per_pattern=mining_config.pairs_per_pattern,
        seed=seed,
    )
    files.write_jsonl(folder / "patch.jsonl", [pair for pairs in made.values() for pair in pairs])
    comparisons = annotation.batch(rows, policies, mining_config.comparisons, seed)
    files.write_jsonl(folder / ANNOTATION / annotation.BATCH, comparisons)
    batch = Comparisons(folder / ANNOTATION)
    if judge:
        batch.judge_all(annotation.JUDGES[judge])
    strongest = findings[0]
    liked = {
        f"reward_of_{name}": float(np.mean([s.score for s in samples]))
        for name, samples in (("early", before), ("late", after))
    }
    files.write_json(
        folder / "result.json",
        {
            "patterns": [dataclasses.asdict(f) for f in findings],
            "hacking": {
                **dataclasses.asdict(strongest),
                "num_pairs": sum(map(len, made.values())),
                **liked,
            },
            "patches": {name: len(pairs) for name, pairs in made.items()},
            "too_few": sorted(name for name, pairs in made.items() if len(pairs) < MIN_PAIRS),
            "comparisons": len(comparisons),
            "length_growth": _length(after) / max(1e-9, _length(before)),
        },
    )


def _distinct(reference: Path, early: Path, late: Path) -> dict[str, Path]:
    """In the first round the early policy is the reference."""
    named: Mapping[str, Any] = {"reference": reference, "early": early, "late": late}
    return {n: p for n, p in named.items() if n != "early" or p != reference}


def _length(samples: Sequence[mining.Sample]) -> float:
    return float(np.mean([len(sample.response.split()) for sample in samples]))
