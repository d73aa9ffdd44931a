"""How far back does a checkpoint find a sentence? With and without a long phase, by RoPE option.

By default a model of two layers learns synthetic retrieval (data/haystacks.py) on rows of 128
tokens, goes on or not in a phase of 1024, and is asked for needles in texts of up to 2048. With
--set run=RUN an existing run's checkpoint is asked instead, from 4k to 256k tokens, in English and
Chinese (give --set haystack=DIR of .txt files for hay of your own).

Needs   : nothing; or a run with the stages tokenizer, corpus and --set stage=NAME
Mesh    : one CPU device
Expect  : see docs/ablations.md
Run     : internlm2 run experiments/ablations/needle_lengths.py
          internlm2 run experiments/ablations/needle_lengths.py --sweep long=True,False \\
              --sweep rope=none,dynamic,linear,yarn --seeds 3
          internlm2 run experiments/ablations/needle_lengths.py --set run=runs/7b --set stage=sft
"""

from __future__ import annotations

import functools

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.models.config import preset
from internlm2_jax.stages import Output, Phase, Pipeline, Series

output = functools.partial(Config, Output)
POD_LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072, 200_000, 262_144]


def experiment(
    seed: int = 0,
    long: bool = True,
    rope: str = "none",
    steps: int = 2000,
    run: str | None = None,
    stage: str = "pretrain",
    haystack: str | None = None,
) -> Config:
    """`long` adds the phase of 1024 tokens; `rope` is how longer rows are read (stages/needle.py).

    With `run`, `long` only names the arm.
    """
    arm = f"{'long phase' if long else 'short only'}, {rope}"
    if run is not None:
        measured = Partial(
            stages.needle,
            model=f"{run}/{stage}",
            tokenizer=f"{run}/tokenizer",
            haystack=haystack or f"{run}/corpus",
            lengths=POD_LENGTHS,
            series=[
                Config(Series, language, count) for language in ("en", "zh") for count in (1, 3)
            ],
            rope=rope,
            arm=f"{run}, {rope}",
            seed=seed,
        )
        return Config(Pipeline, needle=measured)
    short = Config(
        Phase,
        name="short",
        steps=steps,
        sequence_length=128,
        batch_size=8,
        rope_theta=10_000.0,
        learning_rate=3e-3,
        warmup=50,
        final_ratio=0.5,
        weight_decay=0.0,
        mixture={"recall": 1.0},
    )
    further = Config(
        Phase,
        name="long",
        steps=steps * 3 // 10,
        sequence_length=1024,
        batch_size=2,
        rope_theta=100_000.0,
        learning_rate=3e-3,
        warmup=10,
        final_ratio=0.1,
        weight_decay=0.0,
        mixture={"recall_long": 1.0},
    )
    return Config(
        Pipeline,
        corpus=Partial(
            stages.haystacks,
            lengths={"recall": 124, "recall_long": 1000},
            tokens={"recall": 3_000_000, "recall_long": 1_500_000},
        ),
        tokenizer=Partial(stages.tokenizer, corpus=output("corpus"), vocab_size=1024),
        pretrain=Partial(
            stages.pretrain,
            tokenizer=output("tokenizer"),
            model=Config(
                preset,
                "tiny",
                embed_dim=64,
                num_heads=2,
                num_kv_heads=2,
                head_dim=32,
                mlp_dim=128,
                initializer_range=0.1,  # about 1 / sqrt(embed_dim)
            ),
            phases=[short, further] if long else [short],
            validation_tokens=8192,
            checkpoint_every=400,
            seed=seed,
        ),
        needle=Partial(
            stages.needle,
            model=output("pretrain"),
            tokenizer=output("tokenizer"),
            haystack=output("corpus"),
            lengths=[128, 256, 512, 1024, 2048],
            depths=[0, 25, 50, 75, 100],
            series=[Config(Series, "pairs", 1), Config(Series, "pairs", 3)],
            style="completion",
            rope=rope,
            max_new_tokens=4,
            arm=arm,
            seed=seed,
        ),
        report=Partial(stages.report, after=output("needle")),
    )


def tiny(seed: int = 0, long: bool = True, rope: str = "none") -> Config:
    """The same in a few steps: nothing is found."""
    config = experiment(seed=seed, long=long, rope=rope, steps=8)
    config.corpus.tokens = {"recall": 20_000, "recall_long": 20_000}
    config.corpus.fillers = 20
    for phase in config.pretrain.phases:
        phase.warmup, phase.batch_size = 1, 2
    config.pretrain.validation_tokens = 1024
    config.needle.lengths, config.needle.depths, config.needle.repeats = [128, 256], [0, 100], 2
    return config
