"""A small model learns to add and subtract from rewards that a program verifies (GRPO).

Needs   : nothing; the corpus is what every machine has (sources and documentation), or --corpus DIR
Mesh    : one CPU device
Expect  : on two busy CPU cores (seed 0): fine-tuning leaves 43% of sampled answers right, 100
          iterations of GRPO make that 60% (means of the first and the last ten), steadily; 13
          held-out sums are too few to say anything; no infrastructure error; 1.5 s an iteration.
Run     : internlm2 run experiments/rlhf/grpo_arithmetic.py       (the same again resumes or skips)
"""

from __future__ import annotations

from internlm2_jax import stages
from internlm2_jax.config import Config, Partial
from internlm2_jax.models.config import preset
from internlm2_jax.rlhf.grpo import GRPOConfig
from internlm2_jax.stages import Output, Phase, Pipeline


def experiment(seed: int = 0, corpus: str | None = None, iterations: int = 100) -> Config:
    """Pre-training and fine-tuning are short: they leave a model that is right now and then."""
    common = {"tokenizer": Config(Output, "tokenizer")}
    return Config(
        Pipeline,
        corpus=Partial(
            stages.corpus, files_below=corpus, max_bytes=2_000_000, validation_fraction=0.05
        ),
        tokenizer=Partial(stages.tokenizer, corpus=Config(Output, "corpus"), vocab_size=512),
        problems=Partial(stages.problems, largest=9),
        pretrain=Partial(
            stages.pretrain,
            **common,
            model=Config(preset, "tiny", embed_dim=96, head_dim=24, mlp_dim=256),
            phases=[
                Config(
                    Phase,
                    name="only",
                    steps=100,
                    sequence_length=64,
                    batch_size=16,
                    rope_theta=10_000.0,
                    learning_rate=3e-3,
                    warmup=10,
                    mixture={"code": 0.5, "text": 0.5},
                )
            ],
            validation_tokens=4096,
            validate_every=50,
            checkpoint_every=100,
            seed=seed,
        ),
        sft=Partial(
            stages.sft,
            **common,
            instructions=Config(Output, "problems"),
            base=Config(Output, "pretrain"),
            steps=600,
            batch_size=16,
            row_length=64,
            learning_rate=3e-3,
            validation_batches=1,
            seed=seed,
        ),
        grpo=Partial(
            stages.grpo,
            **common,
            problems=Config(Output, "problems"),
            actor=Config(Output, "sft"),
            iterations=iterations,
            prompts_per_iteration=32,
            group_size=16,
            prompt_length=32,
            max_new_tokens=8,
            config=Config(GRPOConfig, learning_rate=3e-4, warmup=20, minibatches=4),
            validate_every=25,
            checkpoint_every=25,
            seed=seed,
        ),
        report=Partial(stages.report, after=Config(Output, "grpo")),
    )


def tiny(seed: int = 0, corpus: str | None = None) -> Config:
    """The same pipeline, small enough to try every stage in seconds."""
    config = experiment(seed=seed, corpus=corpus, iterations=2)
    config.corpus.max_bytes, config.corpus.validation_fraction = 500_000, 0.1
    config.pretrain.phases[0].steps = 4
    config.pretrain.validation_tokens = 512
    config.sft.steps = 4
    config.grpo.prompts_per_iteration, config.grpo.group_size = 2, 4
    config.grpo.validate_every = 2
    return config
