"""Was a test set trained on? Losses on train, test and reference, and overlap with the corpus.

Report, section 5.4: there with GSM8K, and a reference set that GPT-4 wrote.

Needs   : a finished run, and three files (JSONL, JSON, CSV, Parquet) of questions with answers:
          DATA/train.jsonl, DATA/test.jsonl, and DATA/reference.jsonl of the same kind that nobody
          can have seen
Mesh    : one CPU device
Expect  : see docs/ablations.md
Run     : internlm2 run experiments/evaluation/contamination.py --set run=runs/demo \
              --set data=gsm8k --set "baseline='runs/clean/pretrain'"
"""

from __future__ import annotations

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.stages import Output, Pipeline


def experiment(
    run: str = "runs/demo",
    data: str = "gsm8k",
    stage: str = "pretrain",
    baseline: str | None = None,
    corpus: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Config:
    """`stage` of `run` is judged; its corpus is searched unless another `corpus` is given."""
    return Config(
        Pipeline,
        contamination=Partial(
            stages.contamination,
            model=f"{run}/{stage}",
            tokenizer=f"{run}/tokenizer",
            train=f"{data}/train.jsonl",
            test=f"{data}/test.jsonl",
            reference=f"{data}/reference.jsonl",
            baseline=baseline,
            corpus=corpus or f"{run}/corpus",
            limit=limit,
            arm=stage,
            seed=seed,
        ),
        report=Partial(stages.report, after=Config(Output, "contamination")),
    )


def tiny(run: str = "runs/demo", data: str = "gsm8k", seed: int = 0) -> Config:
    """The same with 32 examples of each set."""
    return experiment(run=run, data=data, limit=32, seed=seed)
